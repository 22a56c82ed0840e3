"""Turns prompts into text states, and finds the token positions of a prompt's words. Attention maps
have one column per token position.

CLIP's text encoder (Radford et al. 2021) and its byte-pair tokenizer run through transformers.
Padding is done in this module, because the model families differ in it (SD1 pads with the end
token, SD2 with id 0), and a tokenizer may come from another model. Long prompts are divided into
chunks in this module too, each of which CLIP reads alone (minsd/emphasis.py).
"""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minsd import emphasis
from minsd.emphasis import Fragment
from minsd.words import Span, occurrences, token_bytes, token_spans

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

Item = TypeVar("Item")


class TextEncoder:
    """CLIP's text encoder (a CLIPTextModel) with its CLIPTokenizer.

    A prompt is encoded in chunks of 77 token positions, because CLIP reads that many at once.
    Positions are counted from 0 through all chunks: position 0 is the start token of the first
    chunk, and position 77 the start token of the second. Text states and attention maps have the
    same positions.
    """

    def __init__(self, model: "CLIPTextModel", tokenizer: "CLIPTokenizer", pad_token_id: int):
        self.model = model
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.max_length: int = model.config.max_position_embeddings  # 77
        # Whether weights and BREAK are read in prompts. None: only in prompts in which their syntax
        # is unmistakable.
        self.prompt_weights: bool | None = None
        # The last layer that runs, counted from the model's own last layer, which is number 1.
        self.clip_skip = 1
        self.added: dict[str, list[int]] = {}  # the embeddings' names in lower case -> token ids

    def ids(self, prompt: str) -> list[int]:
        """Returns the token ids of a prompt. They include the start and the end token of every
        chunk; a chunk is a part of the prompt that CLIP reads at once. All chunks but the last are
        padded to 77 ids."""
        return [token for chunk in self._rows(prompt) for token, _ in chunk]

    def _rows(self, prompt: str) -> list[list[tuple[int, float]]]:
        """Returns the tokens of a prompt, as one list for each chunk (a part of the prompt that
        CLIP reads at once). The items of the list are (token id, weight) pairs, from the start
        token to the end token. All chunks but the last are padded to 77 pairs."""
        start, end = ((token, 1.0) for token in self._tokenized(""))
        rows = [
            [start, *((token, fragment.weight) for token, fragment in chunk), end]
            for chunk in self._chunks(prompt, self._units)
        ]
        return [self._padded(row) for row in rows[:-1]] + rows[-1:]

    def _padded(self, row: list[tuple[int, float]]) -> list[tuple[int, float]]:
        return row + [(self.pad_token_id, 1.0)] * (self.max_length - len(row))

    def _tokenized(self, text: str) -> list[int]:
        return self.tokenizer(text, truncation=False, verbose=False)["input_ids"]

    def _chunks(
        self, prompt: str, units: Callable[[str], list[list[Item]]]
    ) -> list[list[tuple[Item, Fragment]]]:
        """Divides a prompt into chunks, parts that CLIP reads at once. The function `units` is
        called with parts of the prompt's text. It returns a list of units for a text, and a unit is
        a list of items that must stay in one chunk, such as the token ids of one embedding.

        Returns the chunks. A chunk is a list of (item, fragment) pairs, where `fragment` is the
        part of the prompt, with one weight, that the item comes from.
        """
        found: list[list[tuple[Item, Fragment]] | None] = []
        for fragment in emphasis.fragments(prompt, self.prompt_weights):
            if fragment is None:
                found.append(None)
            else:
                found += [[(item, fragment) for item in unit] for unit in units(fragment.text)]
        return emphasis.chunked(found, self.max_length - 2)

    def _units(self, text: str) -> list[list[int]]:
        """Returns the tokens of a text, divided into units: lists of token ids that must stay in
        one chunk (a part of the prompt that CLIP reads at once). The vectors of a textual-inversion
        embedding are one unit. Any other token is a unit of its own."""
        units: list[list[int]] = []
        for piece, _, vectors in self._pieces(text):
            units += [[token] for token in self._tokenized(piece)[1:-1]] if vectors is None else [vectors]
        return units

    def _pieces(self, text: str) -> Iterator[tuple[str, int, list[int] | None]]:
        """Divides a text at the names of textual-inversion embeddings. Yields (piece, start,
        vectors) for each part: the part's text, the index of its first character, and, if the part
        is the name of an embedding, the token ids of the embedding. Otherwise `vectors` is None."""
        start = 0
        if self.added:
            names = "|".join(re.escape(name) for name in sorted(self.added, key=len, reverse=True))
            for name in re.finditer(rf"(?<!\w)(?:{names})(?!\w)", text, re.IGNORECASE):
                yield text[start : name.start()], start, None
                yield name[0], name.start(), self.added[name[0].lower()]
                start = name.end()
        yield text[start:], start, None

    def chunk_count(self, prompt: str) -> int:
        """Returns the number of chunks in which a prompt is encoded: 1 for up to 75 tokens. A chunk
        is a part of the prompt that CLIP reads at once."""
        return len(self._rows(prompt))

    def encode(self, prompts: list[str], size: tuple[int, int] | None = None) -> Tensor:
        """Encodes prompts into text states (B,77n,D) on the model's device. A prompt is encoded in
        chunks, parts that CLIP reads at once, and n is the number of chunks of the longest prompt.
        Shorter prompts get empty chunks. `size` is ignored here; only `TwoTextEncoders` (SDXL) uses
        it."""
        with torch.no_grad():
            chunks = self.inputs(prompts)
            return torch.cat([weighted(self.states(ids), weights) for ids, weights in chunks], dim=1)

    def inputs(self, prompts: list[str]) -> list[tuple[Tensor, Tensor | None]]:
        """Tokenizes B prompts. A prompt is divided into chunks, parts that CLIP reads at once.
        Returns a list of pairs (ids, weights), the first for the first chunk of all prompts, the
        next for the second, and so on. `ids` (B,77) are the token ids. `weights` (B,77) are the
        weights of these tokens, or None if all are 1. Prompts with fewer chunks than the longest
        one get empty chunks."""
        prompt_rows = [[self._padded(row) for row in self._rows(prompt)] for prompt in prompts]
        empty = [self._padded(row) for row in self._rows("")]
        count = max(map(len, prompt_rows), default=1)
        found = []
        for chunk in zip(*(rows + empty * (count - len(rows)) for rows in prompt_rows)):
            ids, weights = ([[pair[k] for pair in row] for row in chunk] for k in (0, 1))
            plain = all(weight == 1 for row in weights for weight in row)
            device = self.model.device
            found.append(
                (torch.tensor(ids, device=device), None if plain else torch.tensor(weights, device=device))
            )
        return found

    def states(self, ids: Tensor) -> Tensor:
        """Runs the text encoder on token ids (B,77). Returns text states (B,77,D)."""
        if self.clip_skip == 1:
            return self.model(ids).last_hidden_state
        hidden = self.model(ids, output_hidden_states=True).hidden_states[-self.clip_skip]
        return getattr(self.model, "text_model", self.model).final_layer_norm(hidden)

    def skip(self, clip_skip: int) -> None:
        """Sets the layer whose output becomes the text states (CLIP skip). 1 is the last layer that
        the model itself uses, 2 the layer before it, and so on. Raises ValueError for a layer that
        does not exist."""
        layers = self.model.config.num_hidden_layers
        if not 1 <= clip_skip <= layers:
            raise ValueError(f"clip skip must be from 1 (nothing is skipped) to {layers}, not {clip_skip}")
        self.clip_skip = clip_skip

    @property
    def width(self) -> int:
        """Returns the width D of a token's embedding vector."""
        return self._embeddings.token_embedding.weight.shape[1]

    @property
    def _embeddings(self) -> Any:
        return getattr(self.model, "text_model", self.model).embeddings

    def add(self, name: str, vectors: Tensor) -> None:
        """Adds a textual-inversion embedding: from now on, the word `name` in a prompt stands for k
        tokens with the embeddings `vectors` (k,D). Raises ValueError if an embedding with this name
        was added before."""
        if name.lower() in self.added:
            raise ValueError(f"two embeddings are called {name}: give one as FILE:NAME with another name")
        table = self._embeddings.token_embedding.weight
        weight = torch.cat([table, vectors.to(table)])
        self._embeddings.token_embedding = nn.Embedding.from_pretrained(weight)
        self.added[name.lower()] = list(range(len(table), len(weight)))
        # Some configs have 2 there, by which transformers means the token with the greatest number.
        base = getattr(self.model, "text_model", self.model)
        base.eos_token_id = self._tokenized("")[-1]

    def filled(self, context: Tensor, rows: int) -> Tensor:
        """Appends text states of empty chunks, 77 each, to the text states `context` (B,77m,D),
        until there are `rows` of them per image. Returns the result. If `context` has as many
        already, returns it unchanged."""
        missing = (rows - context.shape[1]) // self.max_length
        if missing <= 0:
            return context
        empty = self.encode([""] * len(context)).to(context)
        return torch.cat([context, *[empty] * missing], dim=1)

    def tokens(self, prompt: str) -> list[str]:
        """Returns the tokens of a prompt as texts, in the order of the method `ids`. `</w>` marks
        the end of a word. A vector of a textual-inversion embedding appears as the embedding's
        name."""
        names = {token: name for name, vectors in self.added.items() for token in vectors}
        return [names.get(token) or self._name(token) for token in self.ids(prompt)]

    def _name(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def spans(self, prompt: str) -> list[Span]:
        """Returns for each token the characters of the prompt that it stands for, as a pair (start,
        end) of indices, `end` excluded. The list begins with the token at position 1, after the
        first start token, and ends before the last end token.

        The pair is (0, 0) for start, end and padding tokens between two chunks (parts that CLIP
        reads at once), and for tokens whose characters are unknown. Raises ValueError if a slow
        tokenizer changes the prompt so much that its tokens cannot be assigned to characters.
        """
        spans: list[Span] = []
        for c, chunk in enumerate(self._chunks(prompt, self._unit_spans)):
            spans += [(0, 0)] * (self.max_length * c - len(spans))
            spans += [
                (fragment.where[start], fragment.where[end - 1] + 1) if end > start else (0, 0)
                for (start, end), fragment in chunk
            ]
        return spans

    def places(self, prompt: str) -> list[int]:
        """Returns the positions of a prompt's own tokens, without start, end and padding tokens. A
        position is the index of a row of the text states."""
        chunks = self._chunks(prompt, self._units)
        return [self.max_length * c + i for c, chunk in enumerate(chunks) for i in range(1, len(chunk) + 1)]

    def _unit_spans(self, text: str) -> list[list[Span]]:
        """Returns for each token of `text` the characters that it stands for, as a pair (start,
        end) of indices, `end` excluded. The pairs are in lists, one list for each unit; a unit is
        one or several tokens that must stay in one chunk, as in `_units`."""
        units: list[list[Span]] = []
        for piece, at, vectors in self._pieces(text):
            if vectors is not None:
                units.append([(at, at + len(piece))] * len(vectors))
            else:
                units += [[(at + start, at + end)] for start, end in self._text_spans(piece)]
        return units

    def _text_spans(self, text: str) -> list[Span]:
        """Returns for each token of `text` the characters that it stands for, as a pair (start,
        end) of indices, `end` excluded. The pair is (0, 0) if they are unknown.

        If the tokens have exactly the bytes of the text, `words.token_spans` finds the characters.
        Otherwise a fast tokenizer reports them. With a slow tokenizer, each part of the text
        between spaces is tokenized alone; if this gives other tokens than the whole text,
        ValueError is raised.
        """
        tokens = self._text_tokens(text)
        spans = self._spans_of(tokens, text)
        if spans is not None:
            return spans
        if self.tokenizer.is_fast:
            own = self.tokenizer(text, truncation=False, verbose=False, return_offsets_mapping=True)
            return [(start, end) for start, end in own["offset_mapping"][1:-1]]
        spans = []
        again: list[str] = []
        for stretch in re.finditer(r"\S+", text):
            part = self._text_tokens(stretch[0])
            again += part
            for start, end in self._spans_of(part, stretch[0]) or [(0, 0)] * len(part):
                spans.append((stretch.start() + start, stretch.start() + end) if end else (0, 0))
        if again != tokens:
            raise ValueError(
                f"the tokenizer rewrites the prompt {text!r}: name its subjects by --token-indices"
                " (--list-tokens)"
            )
        return spans

    def _text_tokens(self, text: str) -> list[str]:
        return [self._name(token) for token in self._tokenized(text)[1:-1]]

    def _spans_of(self, tokens: list[str], text: str) -> list[Span] | None:
        """Returns for each of `tokens` the characters of `text` that it stands for, as a pair
        (start, end) of indices, `end` excluded. Returns None if the tokens do not have exactly the
        bytes of the text."""
        fix: Callable[[str], str] | None = getattr(self.tokenizer, "fix_text", None)  # ftfy's
        return token_spans([token_bytes(token) for token in tokens], text, fix)

    def positions(self, prompt: str, subject: str) -> list[int]:
        """Returns the positions of the tokens of `subject` in a prompt. `subject` is a word of the
        prompt, or several words in sequence. If it occurs several times, "cat#2", for example,
        means the second "cat".

        Words are found by their characters, not by tokens. Only whole words count: "ball" is not
        found in "baseball". If there is no such whole word, parts of compound words count too:
        "cage" is then found in "bird-cage". Raises ValueError if the word is missing, or if it
        occurs several times and no number is given.
        """
        word, _, number = subject.partition("#")
        word = word.strip()
        if number and not re.fullmatch(r"[1-9]\d*", number):
            raise ValueError(f"subject {subject!r}: after # stands the number of the occurrence, 1, 2, ...")
        if not word:
            raise ValueError("a subject is empty: name a word of the prompt")
        found = occurrences(prompt, word)
        if not found:
            raise ValueError(
                f"subject {word!r} is not in the prompt {prompt!r}: use its words exactly as written"
                " (--list-tokens)"
            )
        if len(found) > 1 and not number:
            raise ValueError(
                f"subject {word!r} occurs {len(found)} times in the prompt: write {word}#1, or use"
                " --token-indices"
            )
        if number and int(number) > len(found):
            raise ValueError(f"subject {subject!r}: {word!r} occurs only {len(found)} times in the prompt")
        return self._tokens_of(prompt, found[int(number or 1) - 1])

    def _tokens_of(self, prompt: str, characters: tuple[int, int]) -> list[int]:
        """Returns the positions of the tokens that stand for certain characters of a prompt.
        `characters` is a pair (start, end) of indices, `end` excluded. Raises ValueError if a
        letter or a digit among these characters belongs to no token."""
        first, last = characters
        spans = dict(enumerate(self.spans(prompt), 1))
        places = [k for k, (start, end) in spans.items() if start < last and end > first]
        known = {at for k in places for at in range(*spans[k])}
        letters = {at for at in range(first, last) if prompt[at].isalnum()}
        if not places or not letters <= known:
            raise ValueError(
                f"the tokenizer rewrites {prompt[first:last]!r}, so that its tokens are unknown: name them"
                " by --token-indices (--list-tokens)"
            )
        return places


class TwoTextEncoders(TextEncoder):
    """The two text encoders of SDXL. The text states are the outputs of both encoders before their
    last layers, side by side. The second encoder also makes a pooled text state, one vector for the
    whole text. Tokens and their positions are those of the first encoder. The second one divides a
    text into the same tokens and differs only in padding."""

    def __init__(self, first: TextEncoder, second: TextEncoder, zero_empty: bool):
        """Joins the two encoders of a model. If `zero_empty` is True, an empty prompt has text
        states and a pooled text state of zeros."""
        super().__init__(first.model, first.tokenizer, first.pad_token_id)
        self.second = second
        self.zero_empty = zero_empty

    def encode(self, prompts: list[str], size: tuple[int, int] | None = None) -> Tensor:
        """Encodes prompts into contexts (B,77n+1,D). A prompt is encoded in chunks, parts that CLIP
        reads at once, and n is the number of chunks of the longest prompt. The first 77n rows are
        text states, those of both encoders side by side. The last row consists of the pooled text
        state of the first chunk, six numbers, and zeros up to the width D.

        The six numbers describe an image, in pixels: its height and width before it was cropped,
        how much was cut off at the top and at the left, and its height and width afterwards. Give
        `size`, (height, width), if the latents will be a part of an image of this size. The numbers
        then describe this image, not cropped. Without `size` they are zeros, and `UNet.embed_whole`
        replaces them by the size of the latents.
        """
        self.second.prompt_weights = self.prompt_weights
        layer = -1 - self.clip_skip
        chunks = []
        pooled = torch.empty(0)
        for (ids, weights), (ids_2, _) in zip(self.inputs(prompts), self.second.inputs(prompts)):
            with torch.no_grad():
                outputs = [
                    self.model(ids, output_hidden_states=True),
                    self.second.model(ids_2, output_hidden_states=True),
                ]
            both = [weighted(output.hidden_states[layer], weights) for output in outputs]
            pooled = pooled if chunks else outputs[1].text_embeds  # (B, P)
            chunks.append(torch.cat(both, dim=-1))
        states = torch.cat(chunks, dim=1)  # (B, 77n, D)
        if self.zero_empty:
            empty = torch.tensor([not prompt for prompt in prompts], device=states.device)
            states = states.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        height, width = size or (0, 0)
        numbers = pooled.new_tensor([height, width, 0, 0, height, width]).expand(len(prompts), 6)
        row = torch.cat([pooled, numbers], dim=1)
        row = F.pad(row, (0, states.shape[-1] - row.shape[1]))
        return torch.cat([states, row[:, None]], dim=1)

    def filled(self, context: Tensor, rows: int) -> Tensor:
        """Inserts text states of empty chunks, 77 each, before the last row of `context`
        (B,77m+1,D), until there are `rows` rows per image. Returns the result. If `context` has as
        many already, returns it unchanged. For a prompt whose text states are all zeros, the
        inserted rows are zeros too."""
        missing = (rows - context.shape[1]) // self.max_length
        if missing <= 0:
            return context
        states, row = context[:, :-1], context[:, -1:]
        chunk = self.encode([" "])[:, :-1].to(context) * states.any(dim=(1, 2))[:, None, None]
        return torch.cat([states, *[chunk] * missing, row], dim=1)


def weighted(states: Tensor, weights: Tensor | None) -> Tensor:
    """Multiplies text states (B,77,D) by the weights (B,77) of their tokens. Then, as in
    AUTOMATIC1111's web UI, all text states of a prompt are multiplied by one number, so that their
    mean is what it was before. If `weights` is None, returns the text states unchanged."""
    if weights is None:
        return states
    scaled = states * weights[..., None].to(states)
    before, after = (each.float().mean(dim=(1, 2), keepdim=True) for each in (states, scaled))
    return scaled * (before / after).to(states)
