"""Does inversion stability predict which noises make right images, and what does using it cost?

    python -m bench.stability --csv                                  # the embedded model
    python -m bench.stability --scores 5:7.5/1 10:1/1 --minutes 30   # what fits into half an hour
    python -m bench.stability --cost --csv [--model sd15 --size 128] # one gradient: seconds, memory

The stability score of a noise compares the noise with the noise that is found by sampling and then
inverting. For each prompt, images of many noises are drawn and judged, and the noises are scored
under several settings, T:DOWN/UP[:N]: T steps, the guidance scales of sampling and of inversion,
and for costly settings the number of noises per prompt that are scored. InitNO's attention score at
the first timestep is computed for the same noises, for comparison. An image is right if it has
`no_neglect`: nothing is missing, merged, or in a wrong colour; `strict` is in the CSV as well.

The rank correlation of score and verdict is taken within prompts (ranks among the prompt's noises,
verdicts less the prompt's rate), so that easy prompts do not produce it. The rate of the best of K
is the expectation over all subsets of K of a prompt's N noises, P(the best has rank r) = C(N - r, K
- 1) / C(N, K), not the luck of one choice. Intervals are 95 % bootstraps over prompts; gains are
over one random noise. Optimised noises are compared with the noises from which they began. UNet
rows are those spent on the choice, without those of drawing the image.

`--minutes` cuts off the later noises of every prompt, never prompts. With `--kept` a stopped run
loses nothing.
"""

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import sys
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import (
    RESULTS,
    Row,
    clocked,
    in_own_process,
    loaded,
    on_gpu,
    parser,
    peak_mb,
    pool,
    print_table,
    report,
    write_csv,
)
from bench.attention_maps import rank_correlation
from bench.shapes import BATCH, Subjects, cases, sentence
from bench.unet import context_rows, random_model
from minsd.config import MODELS
from minsd.noise import initno, stability
from minsd.noise.initial import noise
from minsd.pipeline import StableDiffusion, load
from minsd.weights.shapes import detector

GROUPS = ("two", "three")  # of prompts: one object is hardly ever neglected
PICTURE: dict[str, Any] = {
    "steps": 20,
    "sampler": "ddim",
}  # how images are drawn, at the model's own guidance
SCORES = (
    "10:7.5/1",
    "5:7.5/1",
    "10:5/1:50",  # 5: the embedded model's own scale
    "10:1/1:50",
    "10:7.5/7.5:50",
    "20:7.5/1:50",
    "50:7.5/1:50",
)
BEST_OF = (10, 30, 100)
VERDICTS = ("no_neglect", "strict")
ACTIVATIONS = ("checkpointed", "whole")

# A trip is sampling followed by inversion. Here it is a dict of the arguments of stability.score and
# optimize: steps, guidance_scale, ...
Trip = dict[str, Any]


def setting(text: str) -> tuple[Trip, float]:
    """Parses a setting of the stability score, T:DOWN/UP[:N]. Returns (arguments, number): the
    arguments of `stability.score` (T steps, the guidance scales of sampling and of inversion), and
    the number of noises per prompt to score, infinity if N is missing."""
    steps, guidance, *limit = text.split(":")
    down, up = map(float, guidance.split("/"))
    trip = {"steps": int(steps), "guidance_scale": down, "guidance_invert": up}
    return trip, int(limit[0]) if limit else math.inf


def name(trip: Trip) -> str:
    return f"T{trip['steps']} {trip['guidance_scale']:g}/{trip['guidance_invert']:g}"


def seed_of(group: str, prompt: int, k: int) -> int:
    """Returns the seed of noise number k of prompt number `prompt` in a group. No two prompts share
    a seed."""
    return 1_000_000 * (1 + GROUPS.index(group)) + 1000 * prompt + k


# --- the work, in parts ---------------------------------------------------------------------------


def attention_scores(sd: StableDiffusion, prompt: str, subjects: Subjects, x: Tensor) -> list[float]:
    """Returns the attention score of each noise in x (K,4,16,16): the sum of InitNO's losses at the
    first timestep, negated, so that higher is better, as for stability."""
    words: list[str | int] = [shape for _, shape in subjects]
    return [-score for score in initno.attention_scores(sd, prompt, words, x, steps=PICTURE["steps"])]


def judge(
    sd: StableDiffusion, prompts: list[str], x: Tensor, subjects: Sequence[Subjects]
) -> list[dict[str, float]]:
    """Draws one image from each noise in x (B,4,16,16), and judges it by its prompt's subjects.
    Returns for each image a dict name of the verdict -> 1 if right, otherwise 0."""
    images = sd.decode(sd.sample(prompts, x, seeds=range(len(x)), **PICTURE))
    verdicts = [detector.judge(image, these) for image, these in zip(images, subjects)]
    return [{name: float(getattr(verdict, name)) for name in VERDICTS} for verdict in verdicts]


def run(model: str, job: tuple[Any, ...]) -> tuple[str, list[Row]]:
    """Does one job of `jobs_of` (a part of the work for one process). Returns (name, rows): the job
    as JSON, and its results."""
    kind, *rest = job
    part = score_part if kind == "score" else optimise_part
    return json.dumps(job), part(loaded(model), *rest)


def score_part(
    sd: StableDiffusion, group: str, prompts: int, number: int, which: list[int], trips: list[Trip]
) -> list[Row]:
    """Draws and judges images of one prompt from several noises, and scores these noises. Returns
    one row per noise.

    The prompt is number `number` of the `prompts` prompts of the group `group`. `which` lists the
    numbers of its noises. Each of the `trips` holds the settings of one stability score, and every
    noise gets one score for each of them, and an attention score.
    """
    subjects = cases(group, prompts)[number]
    prompt = sentence(subjects)
    x = noise([seed_of(group, number, k) for k in which], (4, 16, 16))
    verdicts = judge(sd, [prompt] * len(x), x, [subjects] * len(x))
    columns = []
    for trip in trips:
        result = stability.score(sd, prompt, x, **trip)
        columns.append((name(trip), result.scores, result.rows / len(x)))
    columns.append(("attention", attention_scores(sd, prompt, subjects, x), 1))
    out = []
    for k, verdict in enumerate(verdicts):
        scores = {key: (values[k], rows) for key, values, rows in columns}
        out.append({"group": group, "prompt": number, **verdict, "scores": scores})
    return out


def optimise_part(
    sd: StableDiffusion, group: str, prompts: int, numbers: list[int], ways: list[tuple[str, Trip]]
) -> list[Row]:
    """Draws and judges images from the first noise of several prompts, and from the same noise
    after optimisation. Returns one row for each prompt and noise, with the verdict, the gain in
    score, the norm and the number of UNet rows.

    `numbers` selects from the `prompts` prompts of the group `group`. `ways` are (name, settings)
    pairs, with the arguments of `stability.optimize_batch` as settings. Each of them gives one
    optimised noise per prompt. Rows of noises that were not optimised have the name "plain".
    """
    subjects = [cases(group, prompts)[k] for k in numbers]
    texts = [sentence(these) for these in subjects]
    x = noise([seed_of(group, k, 0) for k in numbers], (4, 16, 16))
    out: list[Row] = []
    for k, verdict in zip(numbers, judge(sd, texts, x, subjects)):
        row = {"group": group, "prompt": k, "way": "plain", "score": math.nan, "norm": 1.0, "rows": 0}
        out.append(row | verdict)
    for way, options in ways:
        results = stability.optimize_batch(sd, texts, x, **options)
        verdicts = judge(sd, texts, torch.cat([result.noise for result in results]), subjects)
        for k, result, verdict in zip(numbers, results, verdicts):
            row = {"group": group, "prompt": k, "way": way, "score": result.score - result.before}
            row["norm"] = result.history[-1]["norm"] if result.history else math.nan
            row["rows"] = result.rows
            out.append(row | verdict)
    return out


def jobs_of(args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Returns all jobs (parts of the work for one process). Their order keeps prompts balanced
    wherever the run is cut off: first some noises of every prompt are scored and the noises of some
    prompts are optimised, then the next ones of both."""
    own = 100 * (4 * 16 * 16) / stability.PAPER_NUMBERS  # the default of `optimize`
    trip = {"optimize_steps": args.optimize_steps, "steps": 5, "guidance_scale": 7.5}  # the cheapest T
    ways = [
        (f"{mode} lr {lr:.3g} rescaled", trip | {"mode": mode, "lr": lr, "rescale": True})
        for mode, lr in (("detach", 100.0), ("full", own))
    ]
    jobs = []
    for start in range(0, args.n, BATCH):
        trips = [trip for trip, limit in args.scores if start < limit]
        which = list(range(start, min(start + BATCH, args.n)))
        for prompt in range(args.prompts):
            jobs += [("score", group, args.prompts, prompt, which, trips) for group in GROUPS]
        half = start // 2
        numbers = list(range(half, min(half + BATCH // 2, args.optimised)))
        if numbers:
            jobs += [("optimise", group, args.optimised, numbers, ways) for group in GROUPS]
    return jobs


# --- statistics -----------------------------------------------------------------------------------


def by_prompt(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups rows (one per noise) by prompt. Returns a list of rows for each prompt."""

    def key(row: Row) -> tuple[str, int]:
        return row["group"], row["prompt"]

    return [list(these) for _, these in itertools.groupby(sorted(rows, key=key), key=key)]


def within(rows: Sequence[Row], key: str, verdict: str) -> tuple[float, float]:
    """Returns (correlation, p): the rank correlation between the score called `key` and the verdict
    called `verdict`, taken among the noises of each prompt, and its p-value."""
    ranks: list[float] = []
    right: list[float] = []
    for these in by_prompt(rows):
        values = np.array([row["scores"][key][0] for row in these])
        verdicts = np.array([row[verdict] for row in these])
        ranks += list((values.argsort().argsort() + 0.5) / len(values))
        right += list(verdicts - verdicts.mean())
    return rank_correlation(np.round(ranks, 9).tolist(), np.round(right, 9).tolist())


def expected(values: Sequence[float], right: Sequence[float], k: int) -> float:
    """Suppose that `k` of all noises are chosen at random, without replacement, and that an image
    is drawn from the one with the highest score among them. Returns the expected verdict on this
    image. `values` holds the score of each noise, and `right` the verdict on its image (1 or 0)."""
    n = len(values)
    order = np.argsort(-np.asarray(values), kind="stable")
    chances = [math.comb(n - r, k - 1) / math.comb(n, k) for r in range(1, n + 1)]
    return float(np.dot(chances, np.asarray(right)[order]))


def interval(per_prompt: Sequence[float]) -> str:
    """Returns, as text, the 95 % bootstrap interval of the mean of `per_prompt`, which has one
    value for each prompt."""
    draws = np.random.default_rng(0).choice(per_prompt, (4000, len(per_prompt))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{low:+.3f}..{high:+.3f}"


def mean(values: Sequence[float] | np.ndarray) -> float:
    return round(float(np.mean(values)), 3)


def rates_of(prompts: Sequence[Sequence[Row]]) -> dict[str, list[float]]:
    """Returns a dict name of a verdict -> list with the rate of this verdict for each prompt.
    `prompts` holds the rows (one per noise) of each prompt."""
    return {v: [float(np.mean([row[v] for row in these])) for these in prompts] for v in VERDICTS}


def correlation(rows: Sequence[Row], prompts: int, key: str) -> Row:
    """Returns, as a row, the mean and standard deviation of the score called `key` over `rows` (one
    per noise), and its correlation with each verdict. `prompts` is the number of prompts."""
    values = np.array([row["scores"][key][0] for row in rows])
    out: Row = {"score": key, "mean": mean(values), "sd": round(float(values.std()), 3)}
    half = 1.96 / max(1, len(rows) - prompts) ** 0.5
    for verdict in VERDICTS:
        r, p = within(rows, key, verdict)
        out[f"rank_{verdict}"] = round(r, 3)
        out[f"rank_{verdict}_95"] = f"{r - half:+.3f}..{r + half:+.3f}"
        out[f"p_{verdict}"] = f"{p:.1g}"
    return out


def choices(prompts: Sequence[Sequence[Row]], key: str) -> Iterator[Row]:
    """Yields rows of the table for choosing noises by the score called `key`: one row for the best
    of K noises for each K, and one for the worst of the largest K. `prompts` holds the rows (one
    per noise) of each prompt."""
    base = rates_of(prompts)  # of the noises that have this score
    cost = prompts[0][0]["scores"][key][1]
    fewest = min(map(len, prompts))
    sizes = [k for k in BEST_OF if k <= fewest]
    tries = [(1, "best", k) for k in sizes] + [(-1, "worst", k) for k in sizes[-1:]]
    for sign, word, k in tries:
        after = {
            v: [
                expected([sign * row["scores"][key][0] for row in these], [row[v] for row in these], k)
                for these in prompts
            ]
            for v in VERDICTS
        }
        gains = [a - b for a, b in zip(after["no_neglect"], base["no_neglect"])]
        row: Row = {"choice": f"{word} by {key}", "k": k, "rows": round(k * cost)}
        row |= {v: mean(after[v]) for v in VERDICTS}
        yield row | {"gain": mean(gains), "gain_95": interval(gains)}


def tabulate(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Returns (correlations, rates), two tables from `rows` (one per noise). The first has one row
    per group of prompts and score. The second has one row per group and way of choosing a noise."""
    correlations = []
    rates = []
    for group in (*dict.fromkeys(row["group"] for row in rows), "all"):
        everything = [row for row in rows if group in (row["group"], "all")]
        prompts = by_prompt(everything)
        base = rates_of(prompts)
        random: Row = {"group": group, "prompts": len(prompts), "noises": len(everything)}
        random |= {"choice": "random", "k": 1, "rows": 0, **{v: mean(base[v]) for v in VERDICTS}}
        rates.append(random | {"gain": 0.0, "gain_95": ""})
        for key in rows[0]["scores"]:
            these = [row for row in everything if key in row["scores"]]
            prompts = by_prompt(these)
            same = {"group": group, "prompts": len(prompts), "noises": len(these)}
            correlations.append(same | correlation(these, len(prompts), key))
            rates += [same | choice for choice in choices(prompts, key)]
    return correlations, rates


def tabulate_optimised(rows: Sequence[Row]) -> list[Row]:
    """Returns one row for each way of optimising noise, with the rates, and the gains over the same
    noises without optimisation. `rows` are those of `optimise_part`."""
    plain = {(row["group"], row["prompt"]): row for row in rows if row["way"] == "plain"}
    out = []
    for way in dict.fromkeys(row["way"] for row in rows):
        these = [row for row in rows if row["way"] == way]
        gains = [row["no_neglect"] - plain[row["group"], row["prompt"]]["no_neglect"] for row in these]
        norms = [row["norm"] for row in these]
        table_row: Row = {"group": "all", "prompts": len(these), "noises": len(these), "choice": way, "k": 1}
        table_row["rows"] = round(np.mean([row["rows"] for row in these]))
        table_row |= {v: mean([row[v] for row in these]) for v in VERDICTS}
        table_row |= {"gain": mean(gains), "gain_95": interval(gains) if way != "plain" else ""}
        table_row["score_gain"] = mean([row["score"] for row in these])
        table_row["norms"] = f"{min(norms):.2f}..{max(norms):.2f}"
        out.append(table_row)
    return out


def plot(correlations: Sequence[Row], rates: Sequence[Row], optimised: Sequence[Row], path: Path) -> None:
    import matplotlib  # pyright: ignore[reportMissingImports]  (of the extra "bench")

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(1, 1.3))
    keys = list(dict.fromkeys(row["score"] for row in correlations))
    for i, group in enumerate(dict.fromkeys(row["group"] for row in correlations)):
        these = [row for row in correlations if row["group"] == group]
        places = np.arange(len(keys)) + 0.25 * (i - 1)
        values = [row["rank_no_neglect"] for row in these]
        errors = [1.96 / max(row["noises"] - row["prompts"], 1) ** 0.5 for row in these]
        left.barh(places, values, 0.22, xerr=errors, label=f"{group} ({these[0]['noises']} noises)")
    left.set(
        yticks=range(len(keys)),
        yticklabels=keys,
        xlabel="rank correlation with being right, within prompts (95 %)",
    )
    left.axvline(0, color="black", lw=0.8)
    left.invert_yaxis()
    left.legend(fontsize=8)
    of_all = [row for row in rates if row["group"] == "all"]
    base = of_all[0]["no_neglect"]
    right.axhline(base, color="black", lw=0.8, label="one random noise")
    for key in keys:
        line = [(row["rows"], base + row["gain"]) for row in of_all if row["choice"] == f"best by {key}"]
        if line:
            right.plot(*zip(*line), "o-", label=key)
    for row in optimised[1:]:
        right.plot(row["rows"], base + row["gain"], "x", label=row["choice"])
    right.set(
        xscale="log", xlabel="UNet rows spent on the choice", ylabel="images without neglect (random + gain)"
    )
    right.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# --- one gradient's seconds and memory ------------------------------------------------------------


def cost_worker(args: argparse.Namespace) -> None:
    """Times the gradient of the stability score with respect to the noise, in this process, and
    prints the result as JSON. The gradient passes through both sampling and inversion (mode "full"
    of `stability.gradients`).

    The model is the embedded one, or one with random weights and the sizes of another model.
    """
    torch.set_num_threads(1)
    if args.model == "shapes":
        sd = load("shapes", args.device)
    else:
        unet = MODELS[args.model].unet

        def encode(prompts: Sequence[str]) -> Tensor:
            return torch.zeros(len(prompts), context_rows(unet), unet.context_dim, device=args.device)

        text = types.SimpleNamespace(encode=encode)
        sd = random_model(args.model, getattr(torch, args.dtype), args.device, text)
    cells = (args.size or sd.config.size) // 8
    x = noise([0], (4, cells, cells)).to(sd.device)
    row = torch.zeros(1, dtype=torch.long)
    trip = stability.Trip(sd, "a red circle and a blue square", steps=args.steps[0])
    at_rest = torch.cuda.memory_allocated() / 2**20 if on_gpu(sd.device) else peak_mb()
    checkpointed = args.cost_worker == "checkpointed"
    seconds = []
    for _ in range(args.runs):
        (_, gradient), *spent = clocked(sd.device, stability.gradients, trip, x, row, "full", checkpointed)
        seconds.append(spent)
        result = {"gradient": gradient.flatten().tolist()}
    result |= {"peak_mb": peak_mb(sd.device), "at_rest_mb": at_rest, "seconds": seconds[1:] or seconds}
    print(json.dumps(result))


def cost(args: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(1)  # as in the workers, for the CSV's device column
    rows: list[Row] = []
    for steps in args.steps:
        gradients = {}
        for variant in args.activations:
            try:
                result = in_own_process("--steps", str(steps), "--cost-worker", variant)
            except SystemExit as failure:  # all activations at once may not fit the memory
                print(failure, file=sys.stderr)
                continue
            gradients[variant] = result["gradient"]
            seconds, cpu_seconds = (statistics.median(column) for column in zip(*result["seconds"]))
            rows.append(
                {
                    "model": args.model,
                    "size": args.size or MODELS[args.model].size,
                    "dtype": args.dtype,
                    "T": steps,
                    "activations": variant,
                    "seconds": round(seconds, 2),
                    "cpu_seconds": round(cpu_seconds, 2),
                    "peak_mb": round(result["peak_mb"]),
                    "above_rest_mb": round(result["peak_mb"] - result["at_rest_mb"]),
                    "same_gradient": "",
                }
            )
        if len(gradients) == 2:
            rows[-1]["same_gradient"] = gradients["checkpointed"] == gradients["whole"]
    return rows


# --- all of it ------------------------------------------------------------------------------------


def read_options() -> argparse.Namespace:
    options = parser(__doc__, "stability", "stability_rates", "stability_cost")
    options.add_argument("--model", default="shapes", help="with --cost: any model's sizes")
    options.add_argument(
        "--scores",
        nargs="+",
        type=setting,
        default=[setting(text) for text in SCORES],
        metavar="T:DOWN/UP[:N]",
        help=f"settings to score noises with (default: {' '.join(SCORES)})",
    )
    options.add_argument("--prompts", type=int, default=10, help="per group (default: 10)")
    options.add_argument("-n", type=int, default=100, help="noises per prompt (default: 100)")
    options.add_argument(
        "--optimised",
        type=int,
        default=20,
        help="noises per group to optimise, each for a prompt of its own (default: 20)",
    )
    options.add_argument("--optimize-steps", type=int, default=20, help="of each (default: 20)")
    options.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after this long; evaluate what is done"
    )
    options.add_argument("--kept", type=Path, help="file of finished parts, to go on from later")
    options.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)"
    )
    options.add_argument("--cost", action="store_true", help="measure one gradient instead")
    options.add_argument(
        "--steps", nargs="+", type=int, default=[5, 10, 20, 50], help="T, for --cost (default: 5 10 20 50)"
    )
    options.add_argument("--size", type=int, help="pixels, for --cost (default: the model's)")
    options.add_argument("--runs", type=int, default=3, help="gradients, for --cost (default: 3)")
    options.add_argument(
        "--activations",
        nargs="+",
        choices=ACTIVATIONS,
        default=ACTIVATIONS,
        help="for --cost (default: both)",
    )
    options.add_argument("--device", default="cpu", help="for --cost: cpu (the default) or cuda")
    options.add_argument("--dtype", default="float32", help="for --cost (default: float32)")
    options.add_argument("--cost-worker", choices=ACTIVATIONS, help=argparse.SUPPRESS)
    return options.parse_args()


def work(args: argparse.Namespace) -> dict[str, list[Row]]:
    """Does all jobs of `jobs_of` (parts of the work), or as many as are finished within --minutes.
    Returns a dict kind of job -> rows, in the order of the jobs."""
    begin = time.time()
    torch.set_num_threads(1)
    loaded(args.model)
    jobs = jobs_of(args)
    done: dict[str, list[Row]] = {}
    if args.kept and args.kept.exists():
        done = dict(json.loads(line) for line in args.kept.read_text().splitlines())
    left = [job for job in jobs if json.dumps(job) not in done]
    with pool(args.workers, args.model) as processes:
        for key, part in processes.imap_unordered(functools.partial(run, args.model), left):
            done[key] = part
            if args.kept:
                with args.kept.open("a") as file:
                    print(json.dumps([key, part]), file=file)
            print(f"{len(done)} of {len(jobs)} parts, {time.time() - begin:.0f} s", flush=True)
            if time.time() - begin > 60 * args.minutes:
                break
    out: dict[str, list[Row]] = {"score": [], "optimise": []}
    for job in jobs:
        out[job[0]] += done.get(json.dumps(job), [])
    return out


def main() -> None:
    args = read_options()
    if args.cost_worker:
        cost_worker(args)
        return
    if args.cost:
        report("stability_cost", cost(args), args.csv, args.device)
        return
    begin = time.time()
    done = work(args)
    correlations, rates = tabulate(done["score"])
    optimised = tabulate_optimised(done["optimise"])
    for table in (correlations, rates, optimised):
        if table:
            print_table(table)
            print()
    if args.csv:
        empty = {"score_gain": "", "norms": ""}
        write_csv("stability", correlations)
        write_csv("stability_rates", [row | empty for row in rates] + optimised)
        plot(correlations, rates, optimised, RESULTS / "stability.png")
    print(f"{(time.time() - begin) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
