"""How often does the embedded model draw what the prompt asks for, and how does it fail?

    python -m bench.shapes                       # every group at the model's defaults
    python -m bench.shapes --groups two --samplers ddim pndm --steps 30 50 --guidance 3 5 7.5
    python -m bench.shapes --codec               # the detector itself, on images of known content

A detector that sees only pixels (weights/shapes/detector.py) judges every image. Rates come with
95 % Wilson intervals, and failures by kind. Contact sheets with verdicts go to `--sheets`, rows to
bench/results/ with `--csv`. Prompts and seeds are the same for every sampler, number of steps and
guidance scale.
"""

import argparse
import collections
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from bench import Row, loaded, parser, pool, rate, report, wilson, write_csv
from minsd.app.prompt_sets import GROUPS, SEED, Subjects
from minsd.app.prompt_sets import cases as cases
from minsd.app.prompt_sets import sentence as sentence
from minsd.pipeline import StableDiffusion
from minsd.samplers import SAMPLERS
from minsd.weights.shapes import data, detector

# Image k of a group starts from noise seed k.
BATCH = 10  # images per job of the pool


class Judged(NamedTuple):
    """An image, its subjects and seed, and the detector's verdict on it."""

    subjects: Subjects
    seed: int
    pixels: np.ndarray  # (H,W,3) uint8
    verdict: detector.Verdict


def draw(
    sd: StableDiffusion, group: str, n: int, part: slice, **settings: Any
) -> list[tuple[str, Subjects, int, Image.Image]]:
    """Draws those of a group's n cases (lists of coloured shapes) that the slice `part` selects.
    Returns (group, subjects, seed, image) for each. `settings` are arguments of `sd(...)`, such as
    `steps`."""
    mine = list(enumerate(cases(group, n)))[part]
    images = sd([sentence(s) for _, s in mine], seeds=[k for k, _ in mine], **settings)
    return [(group, subjects, k, image) for (k, subjects), image in zip(mine, images)]


def _job(job: tuple[str, str, int, int, dict[str, Any]]) -> list[Judged]:
    model, group, n, start, settings = job
    drawn = draw(loaded(model), group, n, slice(start, start + BATCH), **settings)
    return [Judged(s, k, np.asarray(image), detector.judge(image, s)) for _, s, k, image in drawn]


def sheet(results: Sequence[Judged], path: Path, columns: int = 8, count: int = 64) -> None:
    """Saves a sheet of the first `count` images of `results`, with the subjects and the verdict
    below each image."""
    results = results[:count]
    lines = max(len(result.subjects) for result in results) + 1
    height = data.SIZE + 11 * lines + 4
    out = Image.new("RGB", (columns * (data.SIZE + 4), -(-len(results) // columns) * height), "white")
    pen = ImageDraw.Draw(out)
    for i, result in enumerate(results):
        x = i % columns * (data.SIZE + 4)
        y = i // columns * height
        out.paste(Image.fromarray(result.pixels), (x, y))
        texts = [(" ".join(subject), "black") for subject in result.subjects]
        verdict = "darkgreen" if result.verdict.strict else "crimson"
        texts.append((f"{result.seed}: {result.verdict.kind}", verdict))
        for line, (text, colour) in enumerate(texts):
            pen.text((x + 2, y + data.SIZE + 11 * line), text, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save(path)


def summary(verdicts: Sequence[detector.Verdict]) -> Row:
    """Summarises the detector's verdicts on several images. Returns, as columns of a row, the rates
    of success, the number of images by kind of failure, and the fraction of the failed subjects
    that were neglected."""
    n = len(verdicts)
    kinds = collections.Counter(verdict.kind for verdict in verdicts)
    failed = [kind for verdict in verdicts for kind in verdict.failures[: verdict.subjects_failed]]
    neglected = sum(kind in ("missing", "hybrid", "mixed") for kind in failed)
    row: Row = {"n": n}
    row |= rate("strict", sum(verdict.strict for verdict in verdicts), n)
    row |= rate("no_neglect", sum(verdict.no_neglect for verdict in verdicts), n)
    row |= {kind.replace(" ", "_"): kinds[kind] for kind in detector.KINDS}
    row["subjects_failed"] = len(failed)
    row["of_these_neglected"] = round(neglected / len(failed), 3) if failed else ""
    return row


# --- the detector itself --------------------------------------------------------------------------


def with_one_word_changed(subjects: Subjects, rng: np.random.Generator) -> Subjects:
    """Returns a copy of the subjects, (colour, shape) pairs, in which the colour or the shape of
    one of them is changed, so that they no longer describe the same image."""
    changed = list(subjects)
    i = int(rng.integers(len(subjects)))
    colour, shape = subjects[i]
    colours = [c for c in data.COLOURS if c not in {c for c, _ in subjects}]
    shapes = [s for s in data.SHAPES if s != shape]
    if rng.random() < 0.5:
        changed[i] = str(rng.choice(colours)), shape
    else:
        changed[i] = colour, str(rng.choice(shapes))
    return changed


def codec(sd: StableDiffusion, n: int) -> list[Row]:
    """Tests the detector on n rendered images of known content, and on the same images after
    encoding and decoding by the VAE, with true and with wrong captions. Returns the rows of a
    table."""
    examples = [data.example(90_000, i) for i in range(n)]
    renders = [Image.fromarray(example.render()[0]) for example in examples]
    coded = [image for i in range(0, n, 20) for image in sd.decode(sd.encode(renders[i : i + 20]))]
    subjects = [[(o.colour, o.shape) for o in example.objects] for example in examples]
    rng = np.random.default_rng(SEED)
    rows = []
    for name, images in (("render", renders), ("round trip", coded)):
        for count in (1, 2, 3):
            pairs = [(image, these) for image, these in zip(images, subjects) if len(these) == count]
            passed = sum(detector.judge(image, these).strict for image, these in pairs)
            changed = [(image, with_one_word_changed(these, rng)) for image, these in pairs]
            wrong = sum(detector.judge(image, these).strict for image, these in changed)
            low, high = wilson(passed, len(pairs))
            false_low, false_high = wilson(wrong, len(pairs))
            rows.append(
                {
                    "pictures": name,
                    "objects": count,
                    "n": len(pairs),
                    "accepted": round(passed / len(pairs), 4),
                    "accepted_95": f"{low:.3f}-{high:.3f}",
                    "false_accepts": wrong,
                    "false_95": f"{false_low:.3f}-{false_high:.3f}",
                }
            )
    pixels = [(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(renders, coded)]
    errors = [np.square(a - b).mean() for a, b in pixels]
    print(f"the VAE's round trip: {10 * np.log10(255**2 / np.mean(errors)):.1f} dB")
    return rows


# --- the table ------------------------------------------------------------------------------------


def in_words(row: Row) -> str:
    """Returns a row of the table as one line of text, to show progress."""
    found = [(kind, row[kind.replace(" ", "_")]) for kind in detector.KINDS]
    failures = ", ".join(f"{kind} {count}" for kind, count in found if count)
    return (
        f"{row['group']:13} {row['sampler']} {row['steps']} g{row['guidance_scale']:g}:"
        f" strict {row['strict']} [{row['strict_95']}]"
        f"  no neglect {row['no_neglect']} [{row['no_neglect_95']}]"
        f"  {failures}  ({row['seconds']} s)"
    )


def measure(args: argparse.Namespace) -> None:
    """Draws and judges every group of prompts with every combination of settings. Prints each row
    as soon as it is measured."""
    combinations = itertools.product(args.samplers, args.steps, args.guidance, args.groups)
    with pool(args.workers, args.model) as processes:
        for sampler, steps, scale, group in combinations:
            settings = {"sampler": sampler, "steps": steps, "guidance_scale": scale}
            start = time.time()
            jobs = [(args.model, group, args.n, i, settings) for i in range(0, args.n, BATCH)]
            results = [result for part in processes.imap(_job, jobs) for result in part]
            row = {"model": args.model, "group": group, **settings}
            row |= summary([result.verdict for result in results])
            row["seconds"] = round(time.time() - start, 1)
            print(in_words(row), flush=True)
            if args.sheets:
                sheet(results, args.sheets / f"{group}-{sampler}-{steps}-g{scale:g}.png")
            if args.csv:
                write_csv("shapes", [row])


def main() -> None:
    options = parser(__doc__, "shapes", "shapes_detector")
    options.add_argument(
        "--model", default="shapes", help="shapes (the default), shapes-turbo, or a folder like it"
    )
    options.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="default: all")
    options.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=["ddim"], help="default: ddim")
    options.add_argument(
        "--steps", nargs="+", type=int, default=[50], help="numbers of sampling steps (default: 50)"
    )
    options.add_argument("--guidance", nargs="+", type=float, default=[5.0], help="scales (default: 5)")
    options.add_argument("-n", type=int, default=200, help="images per row (default: 200)")
    options.add_argument("--codec", action="store_true", help="test the detector instead")
    options.add_argument("--sheets", type=Path, help="folder for contact sheets")
    options.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)"
    )
    args = options.parse_args()
    if args.codec:
        report("shapes_detector", codec(loaded(args.model), args.n), args.csv)
    else:
        measure(args)


if __name__ == "__main__":
    main()
