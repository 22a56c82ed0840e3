"""Nouns and their modifiers, given by the user or found in a prompt.

    "red circle; blue square"            two groups; the last word of each is its noun
    "big red: fire truck; green: apples" a colon stands before a noun of several words

Objectives that bind attributes to nouns (noise/objectives/syngen.py and others) take groups as
token positions. `find_groups` needs no parser of English: it cuts the prompt at commas, "and",
"with" and prepositions. It does not handle clauses with "that", "which" and "who"; for these, give
the pairs.
"""

import re
from contextlib import suppress
from typing import NamedTuple

from minsd.text import TextEncoder
from minsd.words import Finder, words

ARTICLES = frozenset(
    "a an the this that these those some any each every no one two three four five six seven eight nine "
    "ten both several many few my your his her its our their".split()
)
CUTS = frozenset(
    "on in at of near under behind beside over above below next to by from into through inside wearing "
    "holding against between around atop".split()
)
CARRIERS = frozenset("photo photograph picture painting image drawing".split())


class Group(NamedTuple):
    """A noun and its modifiers. The noun is a list of token positions in the prompt; so is each
    modifier."""

    modifiers: list[list[int]]
    noun: list[int]


def read_groups(text: TextEncoder, prompt: str, pairs: str) -> list[Group]:
    """Parses `pairs`, a text that lists groups of a noun with its modifiers, such as "red circle;
    blue square". The last word of a group is the noun, unless a colon stands before a noun of
    several words: "big red: fire truck". Every word must be in the prompt; `cat#2` means the second
    "cat" in the prompt. A group of one word is a noun without modifiers.

    Raises ValueError for an empty group, for a word that is not in the prompt, and for a word that
    is in two groups.
    """
    groups = []
    taken: dict[int, str] = {}
    for part in pairs.split(";"):
        before, colon, noun = part.rpartition(":")
        words_of = before.split() if colon else part.split()[:-1]
        noun = " ".join(noun.split()) if colon else " ".join(part.split()[-1:])
        if not noun:
            raise ValueError(
                f"--pairs: a group of {pairs!r} is empty: write such as 'red circle; blue square'"
            )
        group = Group([text.positions(prompt, word) for word in words_of], text.positions(prompt, noun))
        for place in (place for word in (*group.modifiers, group.noun) for place in word):
            if place in taken:
                raise ValueError(
                    f"--pairs: {part.strip()!r} and {taken[place]!r} share a word: each belongs to one group"
                )
        taken |= {place: part.strip() for word in (*group.modifiers, group.noun) for place in word}
        groups.append(group)
    return groups


def find_groups(text: TextEncoder, prompt: str) -> list[Group]:
    """Finds the groups of a noun with its modifiers in a prompt, by cutting the prompt at commas,
    "and", "with" and prepositions. Returns an empty list if there are none.

    A group is left out if one of its words has no token position of its own, because the tokenizer
    rewrites the word, or because the word is beyond the end of the tokens of a long prompt.
    """
    groups = []
    for modifiers, noun in named_groups(prompt):
        with suppress(ValueError):  # the tokenizer rewrites these words, or cuts them off
            places = [text.positions(prompt, word) for word in modifiers]
            groups.append(Group(places, text.positions(prompt, noun)))
    return groups


def named_groups(prompt: str) -> list[tuple[list[str], str]]:
    """Finds the groups of a noun with its modifiers in a prompt. Returns (modifiers, noun) for
    each, as words in the form that `TextEncoder.positions` accepts ("cat", or "cat#2" for a second
    "cat")."""
    named = _named(prompt)
    parts: list[list[tuple[str, str]]] = [[]]  # (case-folded word, its name for `positions`)
    ends: list[str] = []  # the word or comma after each part
    for word, name in named:
        if word in (",", "and", "with") or word in CUTS:
            ends.append(word)
            parts.append([])
        else:
            parts[-1].append((word, name))
    ends.append("")
    groups: list[tuple[list[str], str]] = []
    held: list[str] = []  # adjectives such as "red" in "a red and blue ball"
    for k, (part, end) in enumerate(zip(parts, ends)):
        kept = [name for word, name in part if word not in ARTICLES]
        begins = bool(part) and part[0][0] in ARTICLES
        if kept and end == "of" and part[-1][0] in CARRIERS and not groups:
            continue
        following = parts[k + 1] if k + 1 < len(parts) else []
        joins = len(following) >= 2 and following[0][0] not in ARTICLES
        if begins and len(kept) == 1 and end == "and" and joins:
            held += kept
        elif kept:
            groups.append(([*held, *kept[:-1]], kept[-1]))
            held = []
    return groups


def _named(prompt: str) -> list[tuple[str, str]]:
    """Returns (word, name) for each word of the prompt, where the word is case-folded, and the name
    is the one by which `TextEncoder.positions` finds it, such as "cat#2"."""
    finder = Finder(prompt)
    out = []
    for word in words(prompt):
        spelled = prompt[word.start : word.end]
        starts = [start for start, _ in finder.occurrences(spelled)] if word.text != "," else []
        number = f"#{starts.index(word.start) + 1}" if len(starts) > 1 and word.start in starts else ""
        out.append((re.sub(r"\s+", " ", word.text), spelled + number))
    return out
