"""Finds the words of a prompt by their characters, and the characters that each token stands for.

Words are found without a tokenizer, because the tokens do not show where words begin and end. For
example, CLIP's tokenizer ends both "balls" and "baseballs" with the token `balls</w>`, and begins
the quoted word in "the word 'START'" with the token `'s</w>`.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

Span = tuple[int, int]  # characters [start, end) of a prompt

# --- words ---------------------------------------------------------------------------------------

# Patterns for the result of `_kinds`, which has one letter per character.
RUN = "[wd](?:f*[wdm])*"
ABBREVIATION = r"(?<![wdmf.])w(?:\.w(?![wdmf]))+"  # U.S.A
# Between the runs of a word: t-shirt, 2.5, 1,000.
INSIDE = r"j|(?<=d)\.(?=d)|(?<=d)(?<!dddd),(?=ddd(?![wdmf]))"
PART = re.compile(RUN)
WORD = re.compile(f",|(?:{ABBREVIATION}|{RUN})(?:(?:{INSIDE}){RUN})*")

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
CLOCK = re.compile(r"(?<!\d)\d\d?:\d\d(?!\d)")
TAG = re.compile(r"<[^<>\s]+:[^<>\s]+>")  # such as <lora:name:0.8>
APOSTROPHES = "'’ʼ＇"
HYPHENS = "-‐‑"
COMMAS = ",，、"


@dataclass(frozen=True)
class Word:
    """A word of a prompt, or a comma."""

    text: str  # as `folded` returns it, so that two spellings of a word are equal
    start: int  # characters of the prompt
    end: int


def words(prompt: str) -> list[Word]:
    """Returns the words of a prompt, and the commas between them, in order.

    Hyphens and apostrophes inside a word belong to it ("bird-cage", "dog's"). So do points and
    commas inside a number, and points in an abbreviation. Left out are weights, such as in "(a
    cat:1.3)", "(cat)1.3" and "cat::2", numbers alone in brackets, and tags such as
    "<lora:name:0.8>".
    """
    ignored = _ignored(prompt)
    return [
        Word("," if prompt[start] in COMMAS else folded(prompt[start:end])[0], start, end)
        for start, end in _spans(WORD, prompt)
        if start not in ignored
    ]


def occurrences(prompt: str, phrase: str) -> list[Span]:
    """Returns every place in a prompt where `phrase` occurs, in order. `phrase` is a word or
    several words in sequence. A place is a pair (start, end) of indices of characters, `end`
    excluded. Upper and lower case, the number of spaces, and different forms of accents,
    apostrophes and hyphens do not matter.

    Only whole words count: "bird" is not found in "bird-cage". If there is no such whole word,
    parts of compound words count too: "cage" is then found in "bird-cage".
    """
    return Finder(prompt).occurrences(phrase)


class Finder:
    """Searches one prompt for many phrases. The constructor prepares the prompt, so that this is
    done only once."""

    def __init__(self, prompt: str):
        self.text, self.where = folded(prompt)
        # Places inside whole words, and inside parts of compound words. A match of whole words, or
        # of parts, neither begins nor ends there.
        self.in_words = _inner(_spans(WORD, prompt))
        self.in_parts = _inner(_spans(PART, prompt))
        self.ignored = _ignored(prompt)

    def occurrences(self, phrase: str) -> list[Span]:
        """Returns every place in the prompt where `phrase` occurs as whole words, or, if there is
        none, as parts of compound words. A place is a pair (start, end) of indices of characters,
        `end` excluded. The rules are those of the function `occurrences`."""
        found = list(self._everywhere(folded(phrase.strip())[0]))
        whole = [span for span in found if span[0] not in self.ignored and self.in_words.isdisjoint(span)]
        return whole or [span for span in found if self.in_parts.isdisjoint(span)]

    def _everywhere(self, wanted: str) -> Iterator[Span]:
        at = self.text.find(wanted) if wanted else -1
        while at >= 0:
            end = at + len(wanted)
            # A character that becomes several when folded ("İ") is found only as a whole.
            starts_one = at == 0 or self.where[at - 1] != self.where[at]
            ends_one = end == len(self.text) or self.where[end - 1] != self.where[end]
            if starts_one and ends_one:
                yield self.where[at][0], self.where[end - 1][1]
            at = self.text.find(wanted, at + 1)


def split(subjects: str) -> list[str]:
    """Splits a text that lists subjects, such as "cat, rabbit", at its commas. Commas inside
    numbers, such as 1,000, do not count. Spaces around the subjects are removed."""
    return [part.strip() for part in re.split(r",(?!(?<=\d,)(?<!\d{4},)\d{3}(?!\w))", subjects)]


def folded(text: str) -> tuple[str, list[Span]]:
    """Converts a text to a form in which two spellings of the same word are equal: Unicode's normal
    form C, in lower case, with one space for any white space, and with plain apostrophes and
    hyphens.

    Returns (folded, where): the converted text, and for each of its characters the characters of
    `text` that it stands for, as a pair (start, end) of indices, `end` excluded.
    """
    out = ""
    where: list[Span] = []
    for start, end in _characters(text):
        piece = _lower(text[start:end])
        if piece.isspace():
            piece = " "
        elif piece in APOSTROPHES:
            piece = "'"
        elif piece in HYPHENS:
            piece = "-"
        if piece == " " and out[-1:] == " ":
            where[-1] = (where[-1][0], end)
        else:
            out += piece
            where += [(start, end)] * len(piece)
    return out, where


def _kinds(text: str) -> str:
    """Returns the kinds of the characters of a text, as a string with one letter per character: w
    for a letter, d for a digit, m for a combining mark, f for a format or control character, j for
    an apostrophe or hyphen. A comma is "," and a point is "."; any other character is a space."""
    return "".join(map(_kind, text))


def _kind(c: str) -> str:
    category = unicodedata.category(c)
    if c in APOSTROPHES or c in HYPHENS:
        return "j"
    if c.isalnum():
        return "d" if c.isdecimal() else "w"
    if category[0] == "M":
        return "m"
    if category in ("Cc", "Cf") and c not in "\t\n\r":
        return "f"
    return "," if c in COMMAS else "." if c == "." else " "


def _spans(pattern: re.Pattern[str], prompt: str) -> list[Span]:
    return [match.span() for match in pattern.finditer(_kinds(prompt))]


def _inner(spans: Iterable[Span]) -> set[int]:
    """Returns the places inside spans, which are pairs (start, end) of indices of characters, `end`
    excluded. A place is an index k; it is inside a span if the characters k - 1 and k both belong
    to this span."""
    return {at for start, end in spans for at in range(start + 1, end)}


def _ignored(prompt: str) -> set[int]:
    """Returns the indices of those characters of a prompt that the search for words must skip. They
    belong to weights, such as 1.3 in "(a cat:1.3)", to numbers alone in brackets, or to tags such
    as "<lora:name:0.8>"."""
    ignored = {at for tag in TAG.finditer(prompt) for at in range(*tag.span())}
    clocks = {clock.end() for clock in CLOCK.finditer(prompt)}
    depth = _depth(prompt)
    for start, end in _spans(WORD, prompt):
        if not NUMBER.fullmatch(prompt, start, end):
            continue
        before = prompt[:start].rstrip("+-.")
        closes = prompt[end:].lstrip(". \t\n")[:1] in tuple(")]}")
        weight = before.rstrip()[-1:] == ":" and end not in clocks and (depth[start] > 0 or closes)
        bare = before.endswith("::") or (before.endswith(":") and "." in prompt[start:end])
        alone = before.rstrip()[-1:] in tuple("([{") and closes
        if weight or bare or alone or before[-1:] in tuple(")]}"):
            ignored.update(range(start, end))
    return ignored


def _depth(prompt: str) -> list[int]:
    """Returns a list with one number per character of a prompt: how many brackets are open after
    this character."""
    depth: list[int] = []
    now = 0
    for c in prompt:
        now = max(0, now + (c in "([{") - (c in ")]}"))
        depth.append(now)
    return depth


# --- tokens --------------------------------------------------------------------------------------


def token_spans(pieces: Sequence[bytes], prompt: str, fix: Callable[[str], str] | None) -> list[Span] | None:
    """Returns for each token of a prompt the characters that it stands for, as a pair (start, end)
    of indices, `end` excluded. `pieces` has the bytes of each token. Returns None if these bytes
    are not those of the prompt.

    Tokenizers of CLIP change a prompt before they divide it. They all convert it to Unicode's
    normal form C and to lower case, and remove white space. Some also remove control characters.
    Others first replace ligatures and typographic quotation marks by the function `fix`, which is
    None if there is none. This function tries each way until the bytes are those of the tokens.
    """
    # At the end of a word, sigma has another lower-case form, which some tokenizers do not use.
    written = b"".join(pieces).replace("ς".encode(), "σ".encode())
    rewrites = [_lower, _printed]
    if fix is not None:
        rewrites.append(lambda text: _lower(fix(text)))
    for rewrite in rewrites:
        expected = bytearray()
        behind: list[Span] = []
        for start, end in _characters(prompt):
            data = "".join(rewrite(prompt[start:end]).split()).encode(errors="replace")
            expected += data
            behind += [(start, end)] * len(data)
        if bytes(expected) == written:
            return _behind(pieces, behind)
    return None


def _behind(pieces: Sequence[bytes], behind: Sequence[Span]) -> list[Span]:
    """Returns for each item of `pieces`, the bytes of one token, the characters that the token
    stands for, as a pair (start, end) of indices, `end` excluded. The pair is (0, 0) for a token
    without bytes. `behind` has such a pair for each single byte of all tokens."""
    spans: list[Span] = []
    at = 0
    for piece in pieces:
        end = at + len(piece)
        spans.append((behind[at][0], behind[end - 1][1]) if piece else (0, 0))
        at = end
    return spans


def token_bytes(token: str) -> bytes:
    """Returns the bytes that a token of CLIP's vocabulary stands for, without white space. `token`
    is its text there: one character per byte, in a special alphabet (`alphabet`), and perhaps
    `</w>` at its end."""
    token = token.removesuffix("</w>")
    data = b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in token)
    return bytes(byte for byte in data if byte > 127 or not chr(byte).isspace())


def _unicode_to_bytes() -> dict[str, int]:
    """Returns the alphabet in which the vocabularies of GPT-2 and CLIP write bytes (Radford et al.
    2019), as a dict of character -> byte. In this alphabet, a byte that is a printable character of
    Latin-1 is written as that character. The other bytes are written, in order, as the characters
    from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTES = _unicode_to_bytes()


def alphabet() -> list[str]:
    """Returns the 256 characters by which CLIP's vocabulary writes single bytes, in the order of
    their token ids."""
    return list(_BYTES)


# --- characters ----------------------------------------------------------------------------------


def _characters(text: str) -> list[Span]:
    """Divides a text into characters as a reader counts them, so that a letter with its accents, or
    a Korean syllable, is one. Returns the place of each in the text, as a pair (start, end) of
    indices, `end` excluded. Unicode's normal form C never joins two of these characters."""
    spans: list[Span] = []
    for at, c in enumerate(text):
        if spans and not c.isascii():
            start = spans[-1][0]
            before = unicodedata.normalize("NFC", text[start:at])
            apart = before + unicodedata.normalize("NFC", c)
            if unicodedata.combining(c) or unicodedata.normalize("NFC", text[start : at + 1]) != apart:
                spans[-1] = (start, at + 1)
                continue
        spans.append((at, at + 1))
    return spans


def _lower(text: str) -> str:
    """Converts a text to Unicode's normal form C and to lower case. The Greek letter sigma always
    becomes "σ", also at the end of a word, where it is usually written "ς"."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFC", text)
    return "".join(c.lower() for c in text).replace("ς", "σ")


def _printed(text: str) -> str:
    """Removes control characters and other unprintable ones (Unicode categories C) and replacement
    characters, as tokenizers derived from BERT's do. Then converts the text to Unicode's normal
    form C and to lower case."""
    kept = [c for c in text if c in "\t\n\r" or unicodedata.category(c)[0] != "C" and c != "\ufffd"]
    return _lower("".join(kept))
