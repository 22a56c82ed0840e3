r"""Reads weights of words and chunk breaks in a prompt, in the syntax of AUTOMATIC1111's web UI,
and divides long prompts into chunks that the text encoder can read.

    (words:1.3)   weight 1.3                  \( \) \[ \] \\   the character after the backslash
    (words)       weight 1.1                  BREAK            the words after it begin a new chunk
    [words]       weight 1 / 1.1

Brackets nest, and their weights multiply. A bracket that is not closed acts up to the end of the
prompt; a closing bracket without an opening one is text. CLIP reads 77 tokens at once, including
the start and end tokens, so a chunk has 75 tokens of the prompt. As in the web UI, chunks are
encoded one by one, and their text states are concatenated. Unlike in the web UI, a full chunk
always ends after its 75th token; the web UI may end it at a nearby comma.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

ROUND = 1.1  # the weight of a pair of round brackets
DEEPEST = 100  # brackets open at a time
_LEXEME = re.compile(r"\\[()\[\]\\]?|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|:", re.ASCII)
# Numbers to a program, but not in this syntax. The web UI would draw the text "inf" or "1e3".
_NO_WEIGHT = re.compile(r"\s*[+-]?(?:inf(?:inity)?|nan|(?:\d+\.?\d*|\.\d+)e[+-]?\d+)\s*", re.ASCII | re.I)
LARGEST = 1e6  # a weight; far beyond it, text states overflow
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_LONE_BREAK = re.compile(r"(?<!\S)BREAK(?![^\s,])")


@dataclass(frozen=True)
class Fragment:
    """A part of a prompt whose words all have the same weight."""

    text: str  # without brackets, weights and the backslashes of escapes
    weight: float
    where: Sequence[int]  # the place in the prompt of each character of `text`


def fragments(prompt: str, weights: bool | None = None) -> list[Fragment | None]:
    """Divides a prompt into fragments, parts whose words all have the same weight. Returns a list
    of at least one item: fragments, and None wherever the prompt has the word BREAK.

    The syntax of weights, such as (cat:1.3), and of BREAK is read if `weights` is True. If
    `weights` is False, it is not read, and the whole prompt is one fragment of weight 1. If
    `weights` is None, it is read if the prompt contains it without doubt (`is_weighted`).

    Raises ValueError for more than 100 open brackets, for a weight that is not a plain number, such
    as (cat:inf), and for a weight beyond 1e6.
    """
    if weights is False or (weights is None and not is_weighted(prompt)):
        return [Fragment(prompt, 1.0, range(len(prompt)))]
    lexemes = list(_LEXEME.finditer(prompt))
    factors, closes = _brackets(lexemes)
    active: dict[int, float] = {}  # the factors of the brackets that are open
    found: list[Fragment | None] = []
    for k, lexeme in enumerate(lexemes):
        if k in factors:
            active[k] = factors[k]
            if len(active) > DEEPEST:
                raise ValueError(f"the prompt has more than {DEEPEST} open brackets: write \\( for a bracket")
        elif k in closes:
            del active[closes[k]]
        else:
            weight = math.prod(reversed(active.values()))
            if not abs(weight) <= LARGEST:
                raise ValueError(f"the prompt has a weight beyond {LARGEST:g}: write such as (cat:1.3)")
            for text, start, end in _parts(lexeme):
                if text is None:
                    found.append(None)
                    continue
                last = found[-1] if found else None
                where = range(start, end)
                if last is not None and last.weight == weight:
                    found[-1] = Fragment(last.text + text, weight, [*last.where, *where])
                else:
                    found.append(Fragment(text, weight, where))
    return found or [Fragment("", 1.0, [])]


def is_weighted(prompt: str) -> bool:
    """Returns True if a prompt contains the syntax of prompt weights without doubt: a weight in
    brackets, such as (cat:1.3) or (cat:2), or the word BREAK between spaces. Brackets without a
    weight do not count, because ordinary text has them too. Times and proportions, such as (10:30)
    and (16:9), do not count either. Raises ValueError for a weight such as (cat:inf)."""
    lexemes = list(_LEXEME.finditer(prompt))
    _, closes = _brackets(lexemes)
    for k in closes:
        number = lexemes[k][1]
        after_digit = prompt[: lexemes[k].start()][-1:].isdigit()
        if number is not None and ("." in number or not after_digit):
            return True
    return _LONE_BREAK.search(prompt) is not None


def _brackets(lexemes: Sequence[re.Match[str]]) -> tuple[dict[int, float], dict[int, int]]:
    """Finds the brackets among the lexemes of a prompt. A lexeme is a match of `_LEXEME`: a
    bracket, a weight with its closing bracket, an escape, or a piece of text. Returns (factors,
    closes), two dicts that name lexemes by their index.

    `factors` maps each opening bracket to the factor for the weights inside it. `closes` maps each
    closing bracket to its opening bracket, if there is one. Round and square brackets are matched
    separately, so the two kinds may overlap. Raises ValueError for a weight such as (cat:inf) or
    (cat:1e3).
    """
    opened: dict[str, list[int]] = {"(": [], "[": []}
    factors: dict[int, float] = {}
    closes: dict[int, int] = {}
    for k, lexeme in enumerate(lexemes):
        text = lexeme[0]
        if text in opened:
            opened[text].append(k)
            factors[k] = ROUND if text == "(" else 1 / ROUND
        elif text[-1] in ")]" and text[0] != "\\":
            pair = opened["(" if text[-1] == ")" else "["]
            if pair:
                closes[k] = pair.pop()
                _check_weight(*(before[0] for before in lexemes[max(0, k - 2) : k + 1]))
                if lexeme[1] is not None:
                    factors[closes[k]] = float(lexeme[1])
    return factors, closes


def _check_weight(*last: str) -> None:
    """Raises ValueError if a closing bracket follows a weight that is not a plain number, as in
    (cat:inf). `last` are the texts of up to three lexemes, the closing bracket and those before it,
    such as ":", "inf" and ")"."""
    if len(last) == 3 and last[0] == ":" and last[2] == ")" and _NO_WEIGHT.fullmatch(last[1]):
        raise ValueError(
            f"the weight in (...:{last[1].strip()}) is not a plain number: write such as (cat:1.3), or "
            "give --no-prompt-weights to draw it as text"
        )


def _parts(lexeme: re.Match[str]) -> Iterable[tuple[str | None, int, int]]:
    """Divides a lexeme, a match of `_LEXEME` that is text or an escape, at each BREAK. Yields
    (text, start, end) for each part: its text (None for BREAK), and its place in the prompt, from
    `start` up to but not including `end`. The text of an escape is the character after the
    backslash."""
    start, end = lexeme.span()
    if lexeme[0][0] == "\\":
        yield lexeme[0][1:], start + 1, end
        return
    for found in _BREAK.finditer(lexeme.string, start, end):
        if found.start() > start:
            yield lexeme.string[start : found.start()], start, found.start()
        yield None, *found.span()
        start = found.end()
    if end > start:
        yield lexeme.string[start:end], start, end


def chunked(units: Iterable[Sequence[Item] | None], size: int) -> list[list[Item]]:
    """Divides items into chunks of at most `size` items, in order. `units` are sequences of items
    that must not be divided between chunks. None among the units begins a new chunk. Returns the
    chunks, at least one."""
    chunks: list[list[Item]] = [[]]
    for unit in units:
        if unit is None or len(chunks[-1]) + len(unit) > size:
            chunks.append([])
        chunks[-1] += unit or ()
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]
