"""Prompt sets by name, made from their published rules, and prompts of one's own from a file.

An item of a set is a dict with `prompt` and, as known, `tag` (its group), `include`, `exclude` and
`bodies` (what a detector must find, see judges/objects.py), and `layout` (a layout.json).

GenEval's 553 prompts (Ghosh et al. 2023, arXiv 2310.11513) are drawn anew by its rule and equal the
published file. Attend-and-Excite's (Chefer et al. 2023, arXiv 2301.13826) come from its word lists;
the authors drew the colours at random, so here they are drawn anew. The sets named shapes-... are
for the embedded model.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minsd import files
from minsd.judges.objects import COCO, COLOURS, RELATIONS
from minsd.weights.shapes import data

Item = dict[str, Any]
Subjects = list[tuple[str, str]]  # (colour, shape) of each object

ANIMALS = tuple("cat dog bird bear lion horse elephant monkey frog turtle rabbit mouse".split())
THINGS = "backpack glasses crown suitcase chair balloon bow car bowl bench clock apple"
OBJECTS = tuple(THINGS.split())
THEIR_COLOURS = tuple("red orange yellow green blue purple pink brown gray black white".split())
NUMBERS = ("zero", "one", "two", "three", "four")
SEED = 7  # of the prompts for the embedded model
LAYOUT_SEED = 11
GROUPS = ("one", "two", "three", "held-out", "held-out-pair")
# Number of boxes -> fractions of the image's side that a box's sides lie between.
SIDES = {2: (0.40, 0.55), 3: (0.36, 0.46), 4: (0.34, 0.42)}
COLUMNS = ("prompt", "Prompt", "Prompts", "caption")  # of a .csv or .tsv file of prompts


def named(word: str) -> str:
    """Returns a word with its article; "glasses" has none."""
    if word == "glasses":
        return word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# --- Attend-and-Excite ----------------------------------------------------------------------------


def attend_and_excite(name: str) -> list[str]:
    """Returns 66 pairs of animals, 144 animals with a coloured object, or 66 pairs of coloured
    objects."""
    rng = np.random.default_rng(0)

    def coloured(word: str, colour: str) -> str:
        return f"{colour} {word}" if word == "glasses" else f"{named(str(colour))} {word}"

    if name == "animals":
        return [f"{named(a)} and {named(b)}" for a, b in itertools.combinations(ANIMALS, 2)]
    if name == "animals-objects":
        return [
            f"{named(animal)} and {coloured(thing, rng.choice(THEIR_COLOURS))}"
            for animal, thing in itertools.product(ANIMALS, OBJECTS)
        ]
    return [
        " and ".join(map(coloured, pair, rng.choice(THEIR_COLOURS, 2, replace=False)))
        for pair in itertools.combinations(OBJECTS, 2)
    ]


# --- GenEval --------------------------------------------------------------------------------------


def geneval() -> list[Item]:
    """Returns GenEval's 553 prompts, in every field those of the published evaluation_metadata."""
    rng = np.random.default_rng(43)
    items: list[Item] = []

    def add(tag: str, include: list[Item], words: str, **more: Any) -> None:
        items.append({"tag": tag, "include": include, **more, "prompt": f"a photo of {words}"})

    def one(k: int, **more: Any) -> Item:
        return {"class": COCO[k], "count": 1, **more}

    for k in rng.choice(len(COCO), len(COCO), replace=False):
        add("single_object", [one(k)], named(COCO[k]))
    for _ in range(100):
        a, b = rng.choice(len(COCO), 2, replace=False)
        add("two_object", [one(a), one(b)], f"{named(COCO[a])} and {named(COCO[b])}")
    for _ in range(100):
        name = COCO[rng.choice(len(COCO))]
        count = int(rng.integers(2, 4, endpoint=True))
        plural = name + ("es" if name.endswith("s") else "s")
        more = [{"class": name, "count": count + 1}]
        add("counting", [{"class": name, "count": count}], f"{NUMBERS[count]} {plural}", exclude=more)
    for _ in range(100):  # no person has a colour
        k = rng.choice(len(COCO) - 1) + 1
        colour = COLOURS[rng.choice(len(COLOURS))]
        add("colors", [one(k, color=colour)], f"{named(colour)} {COCO[k]}")
    for _ in range(100):
        a, b = rng.choice(len(COCO), 2, replace=False)
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        words = f"{named(COCO[a])} {relation} {named(COCO[b])}"
        add("position", [one(b), one(a, position=[relation, 0])], words)
    for _ in range(100):
        a, b = rng.choice(len(COCO) - 1, 2, replace=False) + 1
        first, second = (COLOURS[k] for k in rng.choice(len(COLOURS), 2, replace=False))
        words = f"{named(first)} {COCO[a]} and {named(second)} {COCO[b]}"
        add("color_attr", [one(a, color=first), one(b, color=second)], words)
    return _distinct(items)


def _distinct(items: Sequence[Item]) -> list[Item]:
    return list({json.dumps(item): item for item in items}.values())


def _by_prompt(items: Sequence[Item]) -> list[Item]:
    """Returns the first item of each prompt."""
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item["prompt"], item)
    return list(first.values())


# --- the embedded model ---------------------------------------------------------------------------


def sentence(subjects: Sequence[tuple[str, str]]) -> str:
    """Returns [(colour, shape), ...] in words: "a red circle, a blue square and a green star"."""
    phrases = [f"{named(colour)} {shape}" for colour, shape in subjects]
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def cases(group: str, n: int) -> list[Subjects]:
    """Returns the subjects of n prompts of one of GROUPS. Single objects cycle through all
    combinations."""
    rng = np.random.default_rng((SEED, GROUPS.index(group)))
    if group == "one":
        return [[data.COMBINATIONS[i % len(data.COMBINATIONS)]] for i in range(n)]
    if group == "held-out":
        return [[sorted(data.HELD_OUT)[i % len(data.HELD_OUT)]] for i in range(n)]
    if group == "held-out-pair":  # two shapes never seen together, in colours that each was seen in
        pairs = sorted(sorted(pair) for pair in data.HELD_OUT_PAIRS)
        out: list[Subjects] = []
        while len(out) < n:
            shapes = pairs[len(out) % len(pairs)]
            colours = rng.choice(list(data.COLOURS), 2, replace=False)
            subjects = [(str(colour), shape) for colour, shape in zip(colours, shapes)]
            if not data.HELD_OUT & set(subjects):
                out.append(subjects)
        return out
    return [data.draw_subjects(rng, {"two": 2, "three": 3}[group]) for _ in range(n)]


def _one(shape: str, colour: str | None = None, **more: Any) -> Item:
    return {"class": shape, "count": 1, **({} if colour is None else {"color": colour}), **more}


def shapes_geneval(n: int = 40) -> list[Item]:
    """Returns GenEval's six tasks in miniature, for the embedded model: 6 + 26 + 40 + 3 n prompts.

    `counting` cannot ask by number words, which no caption of the training data has: it names three
    different objects, and exactly three bodies must be there.
    """
    rng = np.random.default_rng(SEED)
    items = [{"tag": "single_object", "include": [_one(a)], "prompt": f"a {a}"} for a in data.SHAPES]
    for a, b in itertools.permutations(data.SHAPES, 2):
        if frozenset((a, b)) not in data.HELD_OUT_PAIRS:
            items.append({"tag": "two_object", "include": [_one(a), _one(b)], "prompt": f"a {a} and a {b}"})
    for colour, shape in data.COMBINATIONS:
        prompt = f"{named(colour)} {shape}"
        items.append({"tag": "colors", "include": [_one(shape, colour)], "prompt": prompt})
    for subjects in _draws(rng, 2, n):
        include = [_one(shape, colour) for colour, shape in subjects]
        items.append({"tag": "color_attr", "include": include, "prompt": sentence(subjects)})
    for (first, a), (second, b) in _draws(rng, 2, n):
        relation = str(rng.choice(RELATIONS))
        include = [_one(b, second), _one(a, first, position=[relation, 0])]
        words = f"{named(first)} {a} {relation} {named(second)} {b}"
        items.append({"tag": "position", "include": include, "prompt": words})
    for subjects in _draws(rng, 3, n):
        include = [_one(shape, colour) for colour, shape in subjects]
        items.append({"tag": "counting", "include": include, "bodies": 3, "prompt": sentence(subjects)})
    return items


def _draws(rng: np.random.Generator, count: int, n: int) -> list[Subjects]:
    """Returns n different lists of subjects."""
    out: list[Subjects] = []
    while len(out) < n:
        subjects = data.draw_subjects(rng, count)
        if subjects not in out:
            out.append(subjects)
    return out


def _shapes(group: str, n: int = 200) -> list[Item]:
    """Returns n different prompts of a group of coloured shapes, or all that there are."""
    items = [
        {"tag": group, "include": [_one(shape, colour) for colour, shape in subjects], "prompt": words}
        for subjects, words in ((these, sentence(these)) for these in cases(group, 2 * n))
    ]
    return _by_prompt(items)[:n]


def boxes(rng: np.random.Generator, n: int, gap: float = 0.02) -> list[list[float]]:
    """Returns n boxes [x0, y0, x1, y1] in fractions, apart from one another and inside the image."""
    while True:
        placed = []
        for _ in range(100):
            w, h = rng.uniform(*SIDES[n], 2)
            x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
            if all(x > c + gap or x + w < a - gap or y > d + gap or y + h < b - gap for a, b, c, d in placed):
                placed.append((x, y, x + w, y + h))
                if len(placed) == n:
                    return [[round(float(v), 3) for v in box] for box in placed]


def shapes_layout(n: int, count: int = 200) -> list[Item]:
    """Returns `count` layouts with n boxes of coloured shapes, no prompt twice."""
    rng = np.random.default_rng((LAYOUT_SEED, n))
    items = []
    for _ in range(2 * count):
        subjects = data.draw_subjects(rng, n)
        places = boxes(rng, n)
        regions = [{"prompt": sentence([one]), "box": box} for one, box in zip(subjects, places)]
        include = [_one(shape, colour) for colour, shape in subjects]
        prompt = sentence(subjects)
        layout = {"prompt": prompt, "regions": regions}
        items.append({"tag": f"{n} boxes", "include": include, "prompt": prompt, "layout": layout})
    return _by_prompt(items)[:count]


# --- by name, or from a file ----------------------------------------------------------------------


def _words(name: str) -> list[Item]:
    return [{"tag": name, "prompt": prompt} for prompt in attend_and_excite(name)]


SETS: dict[str, Callable[[], list[Item]]] = {
    "ae-animals": lambda: _words("animals"),
    "ae-animals-objects": lambda: _words("animals-objects"),
    "ae-objects": lambda: _words("objects"),
    "ae": lambda: [*_words("animals"), *_words("animals-objects"), *_words("objects")],
    "geneval": geneval,
    "shapes-geneval": shapes_geneval,
    "shapes-one": lambda: _shapes("one"),
    "shapes-two": lambda: _shapes("two"),
    "shapes-three": lambda: _shapes("three"),
    "shapes-held-out": lambda: _shapes("held-out"),
    "shapes-held-out-pair": lambda: _shapes("held-out-pair"),
    "shapes-layout-2": lambda: shapes_layout(2),
    "shapes-layout-3": lambda: shapes_layout(3),
    "shapes-layout-4": lambda: shapes_layout(4),
}


def load(name: str, count: int | None = None) -> list[Item]:
    """Returns a set by its name in SETS or the prompts of a file, the first `count` of each tag.

    A file is .txt (one prompt per line), .jsonl (items), .csv or .tsv (a column named as in
    COLUMNS), or .json (a list of prompts or items). Raises ValueError or FileNotFoundError, in one
    line, for anything else. Prompts that occur twice are taken once.
    """
    if name in SETS:
        items = SETS[name]()
    else:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no prompt set or file {name!r}: the sets are {', '.join(SETS)}"
            )
        items = _read(path)
    items = _by_prompt(items)
    if count is not None:
        seen: dict[Any, int] = {}
        first = []
        for item in items:
            seen[item.get("tag")] = seen.get(item.get("tag"), 0) + 1
            first += [item] if seen[item.get("tag")] <= count else []
        items = first
    return items


def _json(text: str, path: Path) -> Any:
    try:
        return files.parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(path: Path) -> list[Item]:
    """Returns the items of a file, as `load` describes it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            lines: list[Any] = [line.strip() for line in text.splitlines()]
            lines = [line for line in lines if line and not line.startswith("#")]
        elif path.suffix == ".jsonl":
            lines = [_json(line, path) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            lines = _json(text, path)
        elif path.suffix in (".csv", ".tsv"):
            rows = list(csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
            column = next((name for name in COLUMNS if rows and name in rows[0]), None)
            if column is None:
                raise ValueError(f"{path} has no column named {', '.join(COLUMNS)}")
            lines = [row[column] for row in rows]
        else:
            raise ValueError(f"prompts come from .txt, .jsonl, .json, .csv or .tsv, not from {path.name}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from None
    items = [{"prompt": line} if isinstance(line, str) else line for line in lines]
    if not items or not all(isinstance(item, Mapping) and "prompt" in item for item in items):
        raise ValueError(f"{path} holds no prompts: each line or entry needs one")
    return [dict(item) for item in items]


def slug(name: str) -> str:
    """Returns a name as a folder may be called: letters, digits, points and hyphens."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "set"
