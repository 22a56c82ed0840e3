"""Reads a judged study and computes its table: means, paired differences, rates of won pairs,
costs.

A study compares noise methods over a set of prompts. It is a folder with one folder per method,
each with rows (runs.jsonl) and scores (scores.jsonl). Only (prompt, seed) pairs of which every
method has an image are compared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minsd import judge
from minsd.app import statistics, study_file
from minsd.app.statistics import Estimate, Resample
from minsd.judges import LOWER, RATES

# --- reading what was drawn and judged ------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """The judged values, costs and images of all methods of a study. Only those (prompt, seed)
    pairs are included of which every method has an image. NaN marks a missing value."""

    methods: list[str]
    pairs: list[tuple[str, Any]]  # (prompt, seed)
    tags: list[str]  # per pair
    files: dict[str, list[Path]]  # method -> the images, per pair
    values: dict[str, dict[str, np.ndarray]]  # column -> method -> (pairs,)
    costs: dict[str, dict[str, np.ndarray]]  # the same for unet_rows, seconds, peak_mb
    found: dict[str, list[list[dict[str, Any]]]]  # method -> detections per pair
    identities: dict[str, dict[str, Any]]  # judge -> its weights, dtype and options
    notes: list[str]

    @property
    def prompts(self) -> list[int]:
        """Returns, for each pair, the number of its prompt. Pairs of the same prompt have the same
        number."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(prompt, len(numbers)) for prompt, _ in self.pairs]


def read(folder: Path, unjudged: bool = False) -> Results:
    """Reads a study, or any folder with one judged folder per method. With `unjudged`, images
    without scores count too. Raises FileNotFoundError if there is no folder, and ValueError if
    there are no scores, if no (prompt, seed) pair has an image of every method, or if the scores of
    a judge come from different weights or options."""
    study = study_file.read(folder)
    if study is not None:
        places = {name: folder / sub for name, sub in study_file.folders(study.methods).items()}
    elif folder.is_dir():
        places = {sub.name: sub for sub in sorted(folder.iterdir()) if sub.is_dir()}
    else:
        raise FileNotFoundError(f"there is no folder {folder}")
    pattern = "runs*.jsonl" if unjudged else "scores*.jsonl"
    places = {name: place for name, place in places.items() if any(place.rglob(pattern))}
    left_out = sorted(set(study.methods) - set(places)) if study else []
    if not places:
        raise ValueError(f"{folder} holds no scores: python -m minsd.judge {folder}")
    tags = {item["prompt"]: item.get("tag", "") for item in study.prompts} if study else {}
    notes = [f"method {name} is left out: it has no scores" for name in left_out]
    held = {name: _of_method(place, notes, unjudged) for name, place in places.items()}
    common = set.intersection(*(set(rows) for rows in held.values()))
    pairs = [pair for pair in next(iter(held.values())) if pair in common]
    most = max(len(rows) for rows in held.values())
    if len(pairs) < most:
        notes.append(
            f"{most - len(pairs)} of {most} (prompt, seed) pairs are left out: not all methods have them"
        )
    if not pairs:
        raise ValueError(f"the methods in {folder} share no (prompt, seed) pair with scores")
    columns = dict.fromkeys(key for rows in held.values() for pair in pairs for key in rows[pair]["values"])

    def table(part: str, key: str) -> dict[str, np.ndarray]:
        """Returns a dict method -> array with one value per (prompt, seed) pair. If `part` is
        "values", the value is what a judge gave the image for the column `key`. If `part` is "row",
        it is the entry `key` of the image's row of runs.jsonl. A missing value is NaN."""
        return {
            name: np.array([rows[pair][part].get(key) for pair in pairs], float)
            for name, rows in held.items()
        }

    identities: dict[str, dict[str, Any]] = {}
    for rows in held.values():
        for pair in pairs:
            for name, identity in rows[pair]["identities"].items():
                if identities.setdefault(name, identity) != identity:
                    raise ValueError(
                        f"the scores of judge {name} in {folder} come from different weights or options "
                        f"({described(identities[name])}; {described(identity)}): python -m minsd.judge "
                        f"{folder} --judges {name} judges again those that differ from its own"
                    )
    return Results(
        list(held),
        pairs,
        [tags.get(prompt, "") for prompt, _ in pairs],
        {name: [rows[pair]["path"] for pair in pairs] for name, rows in held.items()},
        {key: table("values", key) for key in columns},
        {key: table("row", key) for key in ("unet_rows", "seconds", "peak_mb")},
        {name: [rows[pair]["found"] for pair in pairs] for name, rows in held.items()},
        identities,
        list(dict.fromkeys(notes)),
    )


def _of_method(place: Path, notes: list[str], unjudged: bool) -> dict[tuple[str, Any], dict[str, Any]]:
    """Reads the images of one method from the folder `place`. Returns a dict with one entry per
    image. The key is (prompt, seed that the user gave). The value is a dict with the image's path,
    its row of runs.jsonl, the values by all judges, the detected objects, and the judges'
    identities.

    An image without a seed gets "#0", "#1", ... in place of it, counted per prompt. Images without
    scores are skipped unless `unjudged` is true. Messages about images without a seed and about
    skipped images or scores are appended to `notes`.
    """
    from minsd.app.folder import recorded

    out: dict[tuple[str, Any], dict[str, Any]] = {}
    count: dict[str, int] = {}
    known: dict[Path, tuple[dict[str, Any], dict[str, Any]]] = {}  # folder -> rows, scores, by file
    for one in judge.pictures(place):
        if one.folder not in known:
            rows = recorded(one.folder.glob("runs*.jsonl"))
            known[one.folder] = {row["file"]: row for row in rows}, judge.scores(one.folder)
        row, judged = (held.get(one.file, {}) for held in known[one.folder])
        if not one.path.is_file():
            notes.append("images that are listed in runs.jsonl but missing from their folder are left out")
            continue
        lines = judge.valid(judged, one)
        if len(lines) < len(judged):
            notes.append("scores of images that have changed since are left out: judge the folder again")
        if not lines and not unjudged:
            continue
        seed = row.get("asked_seed", row.get("seed"))
        if seed is None:
            seed = f"#{count.setdefault(one.prompt, 0)}"
            count[one.prompt] += 1
            notes.append("images without a seed are paired by their place among those of their prompt")
        out[one.prompt, seed] = {
            "path": one.path,
            "row": row,
            "values": {key: value for line in lines.values() for key, value in line["values"].items()},
            "found": [found for line in lines.values() for found in line.get("found", ())],
            "identities": {name: line["identity"] for name, line in lines.items()},
        }
    return out


def described(identity: Mapping[str, Any]) -> str:
    """Returns a judge's weights, dtype and options in words."""
    return ", ".join(f"{key} {value}" for key, value in identity.items() if key != "judge")


# --- the table ------------------------------------------------------------------------------------


def head(column: str) -> str:
    """Returns the heading of a table's column: the name of the judged value, followed by % for a
    rate, or by "(less is better)"."""
    if column in LOWER:
        return f"{column} (less is better)"
    return f"{column} %" if column in RATES else column


@dataclass(frozen=True)
class Cell:
    """One number of a study's table with its interval, as table.csv and table.md show it."""

    part: str  # values, differences, wins, preferred, costs or by tag
    method: str
    column: str
    estimate: Estimate
    n: int
    digits: int
    tag: str = ""
    more: str = ""  # repaired/broken and p, for right or wrong values

    @property
    def text(self) -> str:
        """Returns the number with its interval as tables show them: "0.31 [0.29, 0.33]", the number
        alone if it has no interval, or "-" if there is no number."""
        value, low, high = (self._number(number) for number in self.estimate)
        if math.isnan(self.estimate.value):
            return "-"
        return value if math.isnan(self.estimate.low) else f"{value} [{low}, {high}]"

    def _number(self, number: float) -> str:
        return "" if math.isnan(number) else f"{number:.{self.digits}f}"

    def row(self, prompts: int) -> dict[str, Any]:
        """Returns this number as a row of table.csv. `prompts` is the number of prompts in the
        study."""
        value, low, high = (self._number(number) for number in self.estimate)
        names = ("part", "method", "column", "tag")
        said = {name: getattr(self, name) for name in names}
        return said | {
            "value": value,
            "low": low,
            "high": high,
            "n": self.n,
            "prompts": prompts,
            "more": self.more,
        }


def compute(results: Results, baseline: str) -> list[Cell]:
    """Returns all numbers of a study's tables: the methods' mean values, their comparisons to the
    method `baseline`, and their costs. Rates are in per cent. If the prompts have several tags
    (groups of prompts), the mean values for each tag are included. Raises ValueError if the
    baseline is not among the methods."""
    if baseline not in results.methods:
        raise ValueError(f"--baseline {baseline} is not among the methods: {', '.join(results.methods)}")
    resample = Resample(results.prompts)
    cells: list[Cell] = []
    for column, by_method in results.values.items():
        rate = column in RATES
        digits = 1 if rate else _digits(by_method)
        for method, values in by_method.items():
            mean = _mean(values, rate, resample)
            cells.append(Cell("values", method, column, mean, _count(values), digits))
            if len(set(results.tags)) > 1:
                cells += _by_tag(results.tags, method, column, values, rate, digits)
            if method != baseline:
                cells += _against(method, column, values, by_method[baseline], resample, rate, digits)
    return cells + _costs(results, baseline)


def _mean(values: np.ndarray, rate: bool, resample: Resample | None) -> Estimate:
    """Returns the mean of `values` without those that are NaN, with its 95 % interval. If `rate` is
    true, the values are right or wrong (1 or 0), the mean is in per cent, and the interval is
    Wilson's. Otherwise the interval is that of the bootstrap `resample`, or NaN if `resample` is
    None."""
    there = values[np.isfinite(values)]
    if rate:
        return _scaled(statistics.wilson(float(there.sum()), len(there)), 100.0)
    if resample is not None:
        return resample.estimate(values)
    return Estimate(float(there.mean()) if len(there) else math.nan, math.nan, math.nan)


def _count(values: np.ndarray) -> int:
    return int(np.isfinite(values).sum())


def _by_tag(
    tags: Sequence[str], method: str, column: str, values: np.ndarray, rate: bool, digits: int
) -> list[Cell]:
    """Returns the means of a method's `values` in one column: one mean for each tag (group of
    prompts), and the unweighted mean over the tags, which is GenEval's overall score. `tags` and
    `values` have one entry per (prompt, seed) pair. `rate` states whether the values are right or
    wrong (1 or 0), and `digits` how many decimals to show."""
    out = []
    for tag in dict.fromkeys(tags):
        inside = values[[one == tag for one in tags]]
        mean = _mean(inside, rate, None)
        out.append(Cell("by tag", method, column, mean, _count(inside), digits, tag))
    overall = Estimate(float(np.mean([cell.estimate.value for cell in out])), math.nan, math.nan)
    return [*out, Cell("by tag", method, column, overall, _count(values), digits, "mean of groups")]


def _against(
    method: str,
    column: str,
    values: np.ndarray,
    base: np.ndarray,
    resample: Resample,
    rate: bool,
    digits: int,
) -> list[Cell]:
    """Compares a method to the baseline in one column. `values` are the method's values and `base`
    the baseline's, one per (prompt, seed) pair. Returns the mean paired difference, the rate of
    pairs in which the method is better and, for PickScore, the probability that the method's image
    is preferred. `rate` states whether the values are right or wrong (1 or 0), and `digits` how
    many decimals to show."""
    difference = values - base
    n = _count(difference)
    more = ""
    if rate:
        repaired, broken = int((difference > 0).sum()), int((difference < 0).sum())
        more = f"{repaired} repaired, {broken} broken, p = {statistics.mcnemar(repaired, broken):.2g}"
    gain = _scaled(resample.estimate(difference), 100.0 if rate else 1.0)
    sign = -1 if column in LOWER else 1
    won = _scaled(resample.estimate(statistics.wins(sign * values, sign * base)), 100.0)
    out = [
        Cell("differences", method, column, gain, n, digits, more=more),
        Cell("wins", method, column, won, n, 1),
    ]
    if column == "pickscore":
        preferred = _scaled(resample.estimate(statistics.preference(values, base)), 100.0)
        out.append(Cell("preferred", method, column, preferred, n, 1))
    return out


def _costs(results: Results, baseline: str) -> list[Cell]:
    """Returns four costs of each method: the mean number of UNet rows per image (a UNet evaluation
    with a batch of n counts n rows), the median seconds per image, this median divided by the
    baseline's median, and the greatest peak of GPU memory in MB."""
    cells = []
    seconds = {
        name: float(np.nanmedian(s)) for name, s in results.costs["seconds"].items() if np.isfinite(s).any()
    }
    for method in results.methods:
        rows, memory = (results.costs[key][method] for key in ("unet_rows", "peak_mb"))
        found = {
            "UNet rows": (float(np.nanmean(rows)) if np.isfinite(rows).any() else math.nan, 0),
            "seconds": (seconds.get(method, math.nan), 2),
            "times the baseline": (seconds.get(method, math.nan) / seconds.get(baseline, math.nan), 2),
            "peak MB": (float(np.nanmax(memory)) if np.isfinite(memory).any() else math.nan, 0),
        }
        for column, (value, digits) in found.items():
            lone = Estimate(value, math.nan, math.nan)
            cells.append(Cell("costs", method, column, lone, len(results.pairs), digits))
    return cells


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(*(factor * value for value in estimate))


def _digits(by_method: Mapping[str, np.ndarray]) -> int:
    """Returns how many decimals to show for the values of a column: four if all absolute values are
    below 1.5, as those of cosines are, otherwise three."""
    largest = max(
        (float(np.nanmax(np.abs(v))) for v in by_method.values() if np.isfinite(v).any()), default=0
    )
    return 4 if largest < 1.5 else 3
