"""Prompts to text states, and words to the token positions whose attention maps belong to them.

CLIP's text encoder (Radford et al. 2021) and its byte-pair tokenizer run through transformers.
Padding is done here: the families differ in it (SD1 pads with the end token, SD2 with id 0), and a
tokenizer may come from elsewhere.
"""

import re
import unicodedata
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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
        """Token ids with the start and end tokens, neither padded nor cut."""
        return self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Prompts -> text states (B,77,D) on the model's device.

        A prompt that is too long is cut, with a warning that quotes the part cut off.
        """
        rows = []
        for prompt in prompts:
            ids = self.ids(prompt)
            if len(ids) > self.max_length:
                cut = str(self.tokenizer.decode(ids[self.max_length - 1 : -1])).strip()
                warnings.warn(
                    f"the prompt has more than {self.max_length - 2} tokens; cut off: {cut!r}", stacklevel=2
                )
                ids = ids[: self.max_length - 1] + ids[-1:]
            rows.append(ids + [self.pad_token_id] * (self.max_length - len(ids)))
        with torch.no_grad():
            return self.model(torch.tensor(rows, device=self.model.device)).last_hidden_state  # (B, 77, D)

    def tokens(self, prompt: str) -> list[str]:
        """The prompt's tokens, start and end included; `</w>` marks the end of a word."""
        return list(self.tokenizer.convert_ids_to_tokens(self.ids(prompt)))

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """The characters [start, end) of the prompt that each token covers, without the start and
        end tokens.

        A token's text is bytes of the prompt in lower case and normal form C, without white space.
        Where that does not hold (a tokenizer that rewrites text), the tokenizer's own offsets are
        taken. ValueError where it has none.
        """
        tokens = [token.removesuffix("</w>") for token in self.tokens(prompt)[1:-1]]
        text, where = folded(prompt)
        covered = [span for c, span in zip(text, where) if not c.isspace() for _ in c.encode()]
        written = b"".join(c.encode() for c in text if not c.isspace())
        pieces = [bytes(_BYTES.get(c, 0) for c in token) for token in tokens]
        if b"".join(pieces) == written:
            spans = []
            at = 0
            for piece in pieces:
                spans.append((covered[at][0], covered[at + len(piece) - 1][1]))
                at += len(piece)
            return spans
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(prompt, truncation=False, return_offsets_mapping=True)["offset_mapping"]
            return [(start, end) for start, end in offsets[1:-1]]
        raise ValueError(
            f"the tokenizer rewrites the prompt {prompt!r}: name its subjects by --token-indices"
            " (--list-tokens)"
        )

    def positions(self, prompt: str, subject: str) -> list[int]:
        """Token positions of a word (or of consecutive words) of the prompt; `cat#2` means its
        second occurrence.

        Words are found by their characters, whatever tokens they are cut into: whole words first,
        so that "ball" is not found in "baseball" nor "bird" in "bird-cage"; where there is none,
        parts of compound words ("cage"). ValueError if the word is missing, occurs several times
        without a number, or lies beyond the 77th token.
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
        start, end = found[int(number or 1) - 1]
        places = [k for k, (a, b) in enumerate(self.spans(prompt), 1) if a < end and b > start]
        if not places or places[-1] > self.max_length - 2:
            raise ValueError(
                f"subject {word!r} lies beyond the {self.max_length} tokens the model reads: shorten the"
                " prompt"
            )
        return places


# --- words of a prompt ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A word of a prompt, or a comma."""

    text: str  # in lower case, with straight apostrophes
    start: int  # characters of the prompt
    end: int


def words(prompt: str) -> list[Word]:
    """The words of a prompt and the commas between them, in order.

    Hyphens and apostrophes inside a word belong to it ("bird-cage", "dog's"). The numbers of prompt
    weights, as in "(a cat:1.3)", are no words.
    """
    text, where = folded(WEIGHT.sub(lambda m: " " * len(m[0]), prompt))
    letters = ""  # marks that no normal form joins to their letter, as in Hindi, count as letters
    for c in text:
        mark = unicodedata.category(c)[0] == "M" and letters[-1:].isalnum()
        letters += "x" if mark else c
    return [
        Word(text[m.start() : m.end()].replace("’", "'"), where[m.start()][0], where[m.end() - 1][1])
        for m in WORD.finditer(letters)
    ]


def occurrences(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """Where a word, or words with spaces between, stands in a prompt: characters [start, end), in
    order.

    Whole words; where there is none, a run of characters that begins and ends at the edges of
    letters.
    """
    if not phrase.strip():
        return []
    wanted = [word.text for word in words(phrase)]
    have = words(prompt)
    found = []
    for first, last in zip(have, have[len(wanted) - 1 :]) if wanted else ():
        k = have.index(first)
        window = have[k : k + len(wanted)]
        apart = [prompt[a.end : b.start] for a, b in zip(window, window[1:])]
        if [word.text for word in window] == wanted and all(gap.isspace() for gap in apart):
            found.append((first.start, last.end))
    plain = "".join(phrase.split()).lower().replace("’", "'") == "".join(wanted)
    if found and plain:
        return found
    text, where = folded(prompt)
    sought, _ = folded(phrase.strip())
    pattern = r"\s+".join(re.escape(part) for part in sought.replace("’", "'").split())
    edges = re.finditer(rf"(?<![^\W_]){pattern}(?![^\W_])", text.replace("’", "'"))
    return [(where[m.start()][0], where[m.end() - 1][1]) for m in edges]


def folded(prompt: str) -> tuple[str, list[tuple[int, int]]]:
    """The prompt in normal form C and lower case, and for each of its characters those of the
    prompt, [start, end).
    """
    text = ""
    where: list[tuple[int, int]] = []
    start = 0
    while start < len(prompt):
        end = start + 1
        while end < len(prompt) and _joins(prompt[end]):
            end += 1
        piece = unicodedata.normalize("NFC", prompt[start:end])
        piece = "".join(c.lower() for c in piece)
        text += piece
        where += [(start, end)] * len(piece)
        start = end
    return text, where


def _joins(c: str) -> bool:
    """Whether normal form C may join a character to the one before it: marks, and parts of Korean
    syllables.
    """
    return unicodedata.combining(c) != 0 or "\u1160" <= c <= "\u11ff"


def _unicode_to_bytes() -> dict[str, int]:
    """The inverse of the byte-level alphabet of GPT-2's and CLIP's tokenizers (Radford et al.
    2019).

    Bytes that are printable characters of Latin-1 stand for themselves; the others, in order, for
    the characters from 256 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTES = _unicode_to_bytes()
WORD = re.compile(r",|[^\W_]+(?:['’-][^\W_]+)*")
WEIGHT = re.compile(r":\s*[-+]?(?:\d+\.?\d*|\.\d+)(?=\s*\))")
