"""Turns prompts into text states, and finds the token positions of a prompt's words, to which
attention maps belong.

CLIP's text encoder (Radford et al. 2021) and its byte-pair tokenizer run through transformers.
Padding is done in this module, because the model families differ in it (SD1 pads with the end
token, SD2 with id 0), and a tokenizer may come from another model.
"""

import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minsd.words import occurrences, token_bytes, token_spans

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


class TextEncoder:
    """A CLIPTextModel with its CLIPTokenizer. Token position 0 is the start token, as in attention
    maps."""

    def __init__(self, model: "CLIPTextModel", tokenizer: "CLIPTokenizer", pad_token_id: int):
        self.model = model
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.max_length: int = model.config.max_position_embeddings  # 77

    def ids(self, prompt: str) -> list[int]:
        """Returns the prompt's token ids with the start and end tokens, neither padded nor cut."""
        return self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]

    def encode(self, prompts: list[str], size: tuple[int, int] | None = None) -> Tensor:
        """Encodes prompts into text states (B,77,D) on the model's device. `size` is only for SDXL.

        A prompt that is too long is cut, with a warning that quotes the part cut off.
        """
        with torch.no_grad():
            return self.model(self.padded_ids(prompts)).last_hidden_state  # (B, 77, D)

    def padded_ids(self, prompts: list[str], warn: bool = True) -> Tensor:
        """Returns the prompts' token ids (B,77), padded or cut, on the model's device."""
        rows = []
        for prompt in prompts:
            ids = self.ids(prompt)
            if len(ids) > self.max_length:
                cut = str(self.tokenizer.decode(ids[self.max_length - 1 : -1])).strip()
                said = f"the prompt has more than {self.max_length - 2} tokens; cut off: {cut!r}"
                if warn:
                    warnings.warn(said, stacklevel=3)
                ids = ids[: self.max_length - 1] + ids[-1:]
            rows.append(ids + [self.pad_token_id] * (self.max_length - len(ids)))
        return torch.tensor(rows, device=self.model.device)

    def tokens(self, prompt: str) -> list[str]:
        """Returns the prompt's tokens, start and end included; `</w>` marks the end of a word."""
        return list(self.tokenizer.convert_ids_to_tokens(self.ids(prompt)))

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """Returns the characters [start, end) of the prompt that each token stands for, without the
        start and end tokens. The span is (0, 0) for a token of unknown origin.

        The bytes of the tokens must be those of the prompt (`words.token_spans`). If they differ,
        the offsets that the tokenizer gives are used. If the tokenizer gives none, each part
        between spaces is tokenized alone. Raises ValueError if the tokens of these parts together
        differ from the tokens of the prompt.
        """
        tokens = self.tokens(prompt)[1:-1]
        spans = self._spans_of(tokens, prompt)
        if spans is not None:
            return spans
        if self.tokenizer.is_fast:
            own = self.tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True)
            return [(start, end) for start, end in own["offset_mapping"][1:-1]]
        spans = []
        again: list[str] = []
        for stretch in re.finditer(r"\S+", prompt):
            part = self.tokens(stretch[0])[1:-1]
            again += part
            for start, end in self._spans_of(part, stretch[0]) or [(0, 0)] * len(part):
                spans.append((stretch.start() + start, stretch.start() + end) if end else (0, 0))
        if again != tokens:
            raise ValueError(
                f"the tokenizer rewrites the prompt {prompt!r}: name its subjects by --token-indices"
                " (--list-tokens)"
            )
        return spans

    def _spans_of(self, tokens: list[str], text: str) -> list[tuple[int, int]] | None:
        """Returns the characters [start, end) of `text` that each token stands for; None if the
        tokens' bytes are not those of the text."""
        fix: Callable[[str], str] | None = getattr(self.tokenizer, "fix_text", None)  # ftfy's
        return token_spans([token_bytes(token) for token in tokens], text, fix)

    def positions(self, prompt: str, subject: str) -> list[int]:
        """Returns the token positions of a word (or of consecutive words) of the prompt. `cat#2`
        means the second occurrence of "cat".

        Words are found by their characters, whatever tokens they are cut into. Whole words are
        tried first, so that "ball" is not found in "baseball" nor "bird" in "bird-cage". If no
        whole word is found, parts of compound words are tried ("cage"). Raises ValueError if the
        word is missing, occurs several times and no number is given, or lies beyond the 77 tokens
        that the model reads.
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
        places = self._tokens_of(prompt, found[int(number or 1) - 1])
        if places[-1] > self.max_length - 2:
            raise ValueError(
                f"subject {word!r} lies beyond the {self.max_length} tokens the model reads: shorten the"
                " prompt"
            )
        return places

    def read_characters(self, prompt: str) -> int:
        """Returns how many of the prompt's characters come before the first token that is cut off
        because the prompt is too long. Returns the length of the prompt if nothing is cut off."""
        if len(self.ids(prompt)) <= self.max_length:
            return len(prompt)
        cut = self.spans(prompt)[self.max_length - 2 :]
        return min((start for start, end in cut if end > start), default=len(prompt))

    def _tokens_of(self, prompt: str, characters: tuple[int, int]) -> list[int]:
        """Returns the positions of the tokens that stand for the `characters` [start, end). Raises
        ValueError if a letter or digit among them belongs to no token."""
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
    """SDXL's text encoders. Each encoder's states come from before its last layer. The second
    encoder also makes a pooled state, one vector for the whole text. Tokens and positions are those
    of the first encoder's tokenizer; the second tokenizer cuts text alike and differs in padding.
    """

    def __init__(self, first: TextEncoder, second: TextEncoder, zero_empty: bool):
        """Joins two encoders. With `zero_empty` the states of the prompt "" are zeros."""
        super().__init__(first.model, first.tokenizer, first.pad_token_id)
        self.second = second
        self.zero_empty = zero_empty

    def encode(self, prompts: list[str], size: tuple[int, int] | None = None) -> Tensor:
        """Encodes prompts into contexts (B,78,D): 77 rows of text states, those of both encoders
        side by side, and one row for the whole, [pooled state | six numbers | zeros].

        The six numbers are pixels: height and width of the original image, the rows and columns cut
        off at its top and left, height and width now. With `size` (height, width), which states
        that the latents will be a part of an image that large, they are those of that image, uncut.
        Without `size` they are zeros, which the network reads as its latents' own size.
        """
        with torch.no_grad():
            one = self.model(self.padded_ids(prompts), output_hidden_states=True)
            two = self.second.model(self.second.padded_ids(prompts, warn=False), output_hidden_states=True)
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)  # (B, 77, D)
        pooled = two.text_embeds  # (B, P)
        if self.zero_empty:
            empty = torch.tensor([not prompt for prompt in prompts], device=states.device)
            states = states.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        height, width = size or (0, 0)
        numbers = pooled.new_tensor([height, width, 0, 0, height, width]).expand(len(prompts), 6)
        row = torch.cat([pooled, numbers], dim=1)
        row = F.pad(row, (0, states.shape[-1] - row.shape[1]))
        return torch.cat([states, row[:, None]], dim=1)
