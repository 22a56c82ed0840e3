"""How often does the embedded model draw what it was asked for, and how does it fail?

    python -m bench.shapes                       # every group at the model's defaults
    python -m bench.shapes --groups two --samplers ddim pndm --steps 30 50 --guidance 3 5 7.5
    python -m bench.shapes --codec               # the detector itself: renders, the VAE's round trip, false accepts

A detector that looks at pixels alone judges every picture (weights/shapes/detector.py). Rates come with 95 % Wilson
intervals, failures by kind; contact sheets with verdicts go to `--sheets`, rows to bench/results/ with `--csv`.
Prompts and seeds are the same for every sampler, number of steps and guidance scale.
"""

import argparse
import collections
import itertools
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bench import loaded, pool, rate, report, wilson, write_csv
from minsd.samplers import SAMPLERS
from minsd.weights.shapes import data, detector

SEED = 7  # of the prompts; picture k of a group starts from noise seed k
GROUPS = ("one", "two", "three", "held-out", "held-out-pair")
BATCH = 10


def sentence(subjects) -> str:
    """[(colour, shape), ...] -> "a red circle, a blue square and a green star"."""
    phrases = [f"{'an' if c == 'orange' else 'a'} {c} {s}" for c, s in subjects]
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def cases(group: str, n: int) -> list[list[tuple[str, str]]]:
    """The subjects of n prompts of a group. Alone, every combination comes equally often; together they are drawn."""
    rng = np.random.default_rng((SEED, GROUPS.index(group)))
    if group == "one":
        return [[data.COMBINATIONS[i % len(data.COMBINATIONS)]] for i in range(n)]
    if group == "held-out":
        return [[sorted(data.HELD_OUT)[i % len(data.HELD_OUT)]] for i in range(n)]
    if group == "held-out-pair":  # two shapes never seen together, in colours each was seen in
        pairs, out = sorted(sorted(pair) for pair in data.HELD_OUT_PAIRS), []
        while len(out) < n:
            shapes, colours = pairs[len(out) % len(pairs)], rng.choice(list(data.COLOURS), 2, replace=False)
            subjects = [(str(c), s) for c, s in zip(colours, shapes)]
            if not data.HELD_OUT & set(subjects):
                out.append(subjects)
        return out
    return [data.draw_subjects(rng, {"two": 2, "three": 3}[group]) for _ in range(n)]


def draw(sd, group: str, n: int, part: slice, **settings) -> list[tuple[str, list, int, Image.Image]]:
    """(group, subjects, seed, picture) for a part of a group's cases."""
    mine = list(enumerate(cases(group, n)))[part]
    pictures = sd([sentence(s) for _, s in mine], seeds=[k for k, _ in mine], **settings)
    return [(group, subjects, k, picture) for (k, subjects), picture in zip(mine, pictures)]


def _job(job) -> list:
    model, group, n, start, settings = job
    drawn = draw(loaded(model), group, n, slice(start, start + BATCH), **settings)
    return [(s, k, np.asarray(p), detector.judge(p, s)) for _, s, k, p in drawn]


def sheet(results, path: Path, columns: int = 8, count: int = 64) -> None:
    """The first pictures of a row, each with its prompt's subjects and verdict written under it."""
    results = results[:count]
    lines = max(len(s) for s, *_ in results) + 1
    high = data.SIZE + 11 * lines + 4
    out = Image.new("RGB", (columns * (data.SIZE + 4), -(-len(results) // columns) * high), "white")
    pen = ImageDraw.Draw(out)
    for i, (subjects, k, picture, verdict) in enumerate(results):
        x, y = i % columns * (data.SIZE + 4), i // columns * high
        out.paste(Image.fromarray(picture), (x, y))
        for line, text in enumerate([" ".join(s) for s in subjects] + [f"{k}: {verdict.kind}"]):
            colour = "black" if line < len(subjects) else "darkgreen" if verdict.strict else "crimson"
            pen.text((x + 2, y + data.SIZE + 11 * line), text, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save(path)


def summary(results) -> dict:
    """Rates with 95 % intervals, the kinds of failure of pictures, and the share of neglect among failed subjects."""
    n = len(results)
    verdicts = [v for *_, v in results]
    kinds = collections.Counter(v.kind for v in verdicts)
    failed = [kind for v in verdicts for kind in v.failures[: v.subjects_failed]]
    neglected = sum(kind in ("missing", "hybrid", "mixed") for kind in failed)
    row = (
        {"n": n}
        | rate("strict", sum(v.strict for v in verdicts), n)
        | rate("no_neglect", sum(v.no_neglect for v in verdicts), n)
    )
    row |= {kind.replace(" ", "_"): kinds[kind] for kind in detector.KINDS}
    return row | {
        "subjects_failed": len(failed),
        "of_these_neglected": round(neglected / len(failed), 3) if failed else "",
    }


def codec(sd, n: int) -> list[dict]:
    """What the detector makes of pictures whose content is known: renders, their VAE round trips, and wrong captions."""
    rows = []
    examples = [data.example(90_000, i) for i in range(n)]
    renders = [Image.fromarray(e.render()[0]) for e in examples]
    coded = [p for i in range(0, n, 20) for p in sd.decode(sd.encode(renders[i : i + 20]))]
    rng = np.random.default_rng(SEED)
    for name, pictures in (("render", renders), ("round trip", coded)):
        for count in (1, 2, 3):
            subjects = [[(o.colour, o.shape) for o in e.objects] for e in examples]
            these = [(p, s) for p, s in zip(pictures, subjects) if len(s) == count]
            passed = sum(detector.judge(p, s).strict for p, s in these)
            wrong = 0
            for p, s in these:  # one word changed: never true of the picture
                changed, i = list(s), int(rng.integers(count))
                colours = [c for c in data.COLOURS if c not in {c for c, _ in s}]
                shapes = [k for k in data.SHAPES if k != s[i][1]]
                changed[i] = (
                    (str(rng.choice(colours)), s[i][1])
                    if rng.random() < 0.5
                    else (s[i][0], str(rng.choice(shapes)))
                )
                wrong += detector.judge(p, changed).strict
            a, b, c, d = *wilson(passed, len(these)), *wilson(wrong, len(these))
            rows.append(
                {
                    "pictures": name,
                    "objects": count,
                    "n": len(these),
                    "accepted": round(passed / len(these), 4),
                    "accepted_95": f"{a:.3f}-{b:.3f}",
                    "false_accepts": wrong,
                    "false_95": f"{c:.3f}-{d:.3f}",
                }
            )
    mse = np.mean(
        [np.square(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(renders, coded)]
    )
    print(f"the VAE's round trip: {10 * np.log10(255**2 / mse):.1f} dB")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--samplers", nargs="+", default=["ddim"], help=", ".join(SAMPLERS))
    parser.add_argument("--steps", nargs="+", type=int, default=[50])
    parser.add_argument("--guidance", nargs="+", type=float, default=[5.0])
    parser.add_argument("-n", type=int, default=200, help="pictures a row")
    parser.add_argument("--codec", action="store_true", help="judge the detector instead of the model")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.codec:
        return report("shapes_detector", codec(loaded(args.model), args.n), args.csv)
    rows = []
    with pool(args.workers, args.model) as processes:
        for sampler, steps, scale, group in itertools.product(
            args.samplers, args.steps, args.guidance, args.groups
        ):
            settings, start = {"sampler": sampler, "steps": steps, "guidance_scale": scale}, time.time()
            jobs = [(args.model, group, args.n, i, settings) for i in range(0, args.n, BATCH)]
            results = [r for part in processes.imap(_job, jobs) for r in part]
            row = {"model": args.model, "group": group, **settings, **summary(results)}
            rows.append(row | {"seconds": round(time.time() - start, 1)})
            failures = ", ".join(
                f"{k} {row[k.replace(' ', '_')]}" for k in detector.KINDS if row[k.replace(" ", "_")]
            )
            print(
                f"{group:13} {sampler} {steps} g{scale:g}: strict {row['strict']} [{row['strict_95']}]  no neglect {row['no_neglect']}"
                f" [{row['no_neglect_95']}]  {failures}  ({rows[-1]['seconds']} s)",
                flush=True,
            )
            if args.sheets:
                sheet(results, args.sheets / f"{group}-{sampler}-{steps}-g{scale:g}.png")
            if args.csv:
                write_csv("shapes", rows[-1:])


if __name__ == "__main__":
    main()
