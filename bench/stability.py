"""Does inversion stability tell which noises make right pictures, and what does choosing or optimising by it cost?

    python -m bench.stability --csv                                  # the embedded model, the pixel detector as judge
    python -m bench.stability --scores 5:7.5/1 10:1/1 --minutes 30   # what fits into half an hour
    python -m bench.stability --cost --csv [--model sd15 --size 128] # seconds and memory of one gradient

Many noises a prompt are drawn, judged and scored under every setting, T:DOWN/UP[:N], which is T steps, guidance down and up,
and how many noises of a prompt are scored so (the dear ones: fewer). The rank correlation
of score and verdict is taken within prompts (ranks among a prompt's noises, verdicts less the prompt's rate), so that easy
prompts do not make it. The rate after taking the best of K is its expectation over all subsets of K of a prompt's N
noises, P(the best has rank r) = C(N - r, K - 1) / C(N, K): no luck of one draw. Intervals are 95 % bootstraps over prompts;
gains are over one random noise. Attention scores (InitNO's losses at the first timestep) stand beside it, on the same
noises. The optimised noises are compared with the very noises they began from.

UNet rows are those spent on the choice, the picture's own left out. Right is `no_neglect`: nothing missing, merged, or in a
wrong colour; `strict` is in the CSV as well. What `--minutes` cuts off is the later noises of every prompt, never prompts. With `--kept` a
stopped run loses nothing.
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
from pathlib import Path

import numpy as np
import torch

import minsd
from bench import (
    RESULTS,
    clocked,
    in_own_process,
    loaded,
    on_gpu,
    peak_mb,
    pool,
    print_table,
    report,
    write_csv,
)
from bench.attention_maps import rank_correlation
from bench.shapes import BATCH, cases, sentence
from minsd.noise import initno, stability
from minsd.noise.initial import noise
from minsd.weights.shapes import detector

GROUPS = ("two", "three")  # where there is something to lose
PICTURE = {"steps": 20, "sampler": "ddim"}  # at the model's own guidance
SCORES = (
    "10:7.5/1",
    "5:7.5/1",
    "10:5/1:50",
    "10:1/1:50",
    "10:7.5/7.5:50",
    "20:7.5/1:50",
    "50:7.5/1:50",
)  # 5: the embedded model's own
BEST_OF = (10, 30, 100)
VERDICTS = ("no_neglect", "strict")


def setting(text: str) -> tuple[dict, float]:
    """T:DOWN/UP[:N] -> what `score` takes, and how many noises of a prompt get it."""
    steps, guidance, *limit = text.split(":")
    down, up = map(float, guidance.split("/"))
    return {"steps": int(steps), "guidance_scale": down, "guidance_invert": up}, int(
        limit[0]
    ) if limit else math.inf


def name(setting: dict) -> str:
    return f"T{setting['steps']} {setting['guidance_scale']:g}/{setting['guidance_invert']:g}"


def attention_scores(sd, prompt, subjects, x) -> list[float]:
    """The more the better, as stability."""
    return [
        -score
        for score in initno.attention_scores(
            sd, prompt, [shape for _, shape in subjects], x, steps=PICTURE["steps"]
        )
    ]


def judge(sd, prompts, x, subjects) -> list[dict]:
    """Verdicts of the pictures that noises x become."""
    pictures = sd.decode(sd.sample(prompts, x, seeds=range(len(x)), **PICTURE))
    return [
        {v: float(getattr(detector.judge(p, s), v)) for v in VERDICTS} for p, s in zip(pictures, subjects)
    ]


def run(model: str, job) -> tuple[str, list[dict]]:
    """A part of the work -> its name and what came out."""
    return json.dumps(job), {"score": score_part, "optimise": optimise_part}[job[0]](loaded(model), *job[1:])


def score_part(sd, group, prompts, number, which, how) -> list[dict]:
    """Some of a prompt's noises: verdicts and scores."""
    subjects, rows = cases(group, prompts)[number], []
    prompt, x = sentence(subjects), noise([seed_of(group, number, k) for k in which], (4, 16, 16))
    out = [
        {"group": group, "prompt": number} | verdict
        for verdict in judge(sd, [prompt] * len(x), x, [subjects] * len(x))
    ]
    for setting in how:
        result = stability.score(sd, prompt, x, **setting)
        rows.append((name(setting), result.scores, result.rows / len(x)))
    rows.append(("attention", attention_scores(sd, prompt, subjects, x), 1))
    for k, row in enumerate(out):
        row["scores"] = {key: (scores[k], spent) for key, scores, spent in rows}
    return out


def optimise_part(sd, group, prompts, numbers, ways) -> list[dict]:
    """The first noise of some prompts, as it is and optimised in several ways: verdicts, scores, norms, rows."""
    subjects = [cases(group, prompts)[k] for k in numbers]
    texts, x = [sentence(s) for s in subjects], noise([seed_of(group, k, 0) for k in numbers], (4, 16, 16))
    out = [
        {"group": group, "prompt": k, "way": "plain", "score": math.nan, "norm": 1.0, "rows": 0} | verdict
        for k, verdict in zip(numbers, judge(sd, texts, x, subjects))
    ]
    for way, options in ways:
        results = stability.optimize_batch(sd, texts, x, **options)
        verdicts = judge(sd, texts, torch.cat([r.noise for r in results]), subjects)
        for k, r, verdict in zip(numbers, results, verdicts):
            told = {
                "score": r.score - r.before,
                "norm": r.history[-1]["norm"] if r.history else math.nan,
                "rows": r.rows,
            }
            out.append({"group": group, "prompt": k, "way": way} | told | verdict)
    return out


def seed_of(group: str, prompt: int, k: int) -> int:
    """No two prompts share a noise."""
    return 1_000_000 * (1 + GROUPS.index(group)) + 1000 * prompt + k


# --- what the numbers say -----------------------------------------------------------------------------------------------


def within(rows: list[dict], key: str, verdict: str) -> tuple[float, float]:
    """Rank correlation of a score with a verdict among the noises of one prompt, all prompts together; and its p."""
    ranks, right = [], []
    for _, these in by_prompt(rows):
        values = np.array([r["scores"][key][0] for r in these])
        ranks += list((values.argsort().argsort() + 0.5) / len(values))
        right += list(np.array([r[verdict] for r in these]) - np.mean([r[verdict] for r in these]))
    return rank_correlation(np.round(ranks, 9), np.round(right, 9))


def by_prompt(rows):
    order = sorted(rows, key=lambda r: (r["group"], r["prompt"]))
    return [(k, list(g)) for k, g in itertools.groupby(order, key=lambda r: (r["group"], r["prompt"]))]


def expected(values, right, k: int) -> float:
    """The mean verdict of the best of k noises drawn without replacement from these."""
    n, order = len(values), np.argsort(-np.asarray(values), kind="stable")
    chances = [math.comb(n - r, k - 1) / math.comb(n, k) for r in range(1, n + 1)]
    return float(np.dot(chances, np.asarray(right)[order]))


def interval(per_prompt: list[float]) -> str:
    """95 % of means over prompts drawn again."""
    draws = np.random.default_rng(0).choice(per_prompt, (4000, len(per_prompt))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{low:+.3f}..{high:+.3f}"


def tabulate(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """-> correlations a setting and group; rates a choice and group."""
    correlations, rates = [], []
    keys = list(rows[0]["scores"])
    for group in (*dict.fromkeys(r["group"] for r in rows), "all"):
        everything = [r for r in rows if group in (r["group"], "all")]
        base = {v: [np.mean([r[v] for r in g]) for _, g in by_prompt(everything)] for v in VERDICTS}
        same = {"group": group, "prompts": len(base["strict"]), "noises": len(everything)}
        rates.append(
            same
            | {"choice": "random", "k": 1, "rows": 0}
            | {v: round(float(np.mean(base[v])), 3) for v in VERDICTS}
            | {"gain": 0.0, "gain_95": ""}
        )
        for key in keys:
            these = [r for r in everything if key in r["scores"]]
            prompts = by_prompt(these)
            n = min(len(g) for _, g in prompts)  # equally many of each
            same = {"group": group, "prompts": len(prompts), "noises": len(these)}
            base = {
                v: [np.mean([r[v] for r in g]) for _, g in prompts] for v in VERDICTS
            }  # of just the noises with this score
            spread = np.array([r["scores"][key][0] for r in these])
            row = same | {
                "score": key,
                "mean": round(float(spread.mean()), 3),
                "sd": round(float(spread.std()), 3),
            }
            half = 1.96 / max(1, len(these) - len(prompts)) ** 0.5
            for v in VERDICTS:
                r, p = within(these, key, v)
                row |= {
                    f"rank_{v}": round(r, 3),
                    f"rank_{v}_95": f"{r - half:+.3f}..{r + half:+.3f}",
                    f"p_{v}": f"{p:.1g}",
                }
            correlations.append(row)
            cost = these[0]["scores"][key][1]
            reach = [k for k in BEST_OF if k <= n]
            for sign, word, sizes in ((1, "best", reach), (-1, "worst", reach[-1:])):
                for k in sizes:
                    after = {
                        v: [
                            expected([sign * r["scores"][key][0] for r in g], [r[v] for r in g], k)
                            for _, g in prompts
                        ]
                        for v in VERDICTS
                    }
                    gains = [a - b for a, b in zip(after["no_neglect"], base["no_neglect"])]
                    rates.append(
                        same
                        | {"choice": f"{word} by {key}", "k": k, "rows": round(k * cost)}
                        | {v: round(float(np.mean(after[v])), 3) for v in VERDICTS}
                        | {"gain": round(float(np.mean(gains)), 3), "gain_95": interval(gains)}
                    )
    return correlations, rates


def tabulate_optimised(rows: list[dict]) -> list[dict]:
    plain = {(r["group"], r["prompt"]): r for r in rows if r["way"] == "plain"}
    out = []
    for way in dict.fromkeys(r["way"] for r in rows):
        these = [r for r in rows if r["way"] == way]
        gains = [r["no_neglect"] - plain[r["group"], r["prompt"]]["no_neglect"] for r in these]
        norms = [r["norm"] for r in these]
        out.append(
            {
                "group": "all",
                "prompts": len(these),
                "noises": len(these),
                "choice": way,
                "k": 1,
                "rows": round(np.mean([r["rows"] for r in these])),
            }
            | {v: round(float(np.mean([r[v] for r in these])), 3) for v in VERDICTS}
            | {"gain": round(float(np.mean(gains)), 3), "gain_95": interval(gains) if way != "plain" else ""}
            | {
                "score_gain": round(float(np.mean([r["score"] for r in these])), 3),
                "norms": f"{min(norms):.2f}..{max(norms):.2f}",
            }
        )
    return out


def plot(correlations, rates, optimised, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(1, 1.3))
    groups = [g for g in dict.fromkeys(r["group"] for r in correlations)]
    keys = list(dict.fromkeys(r["score"] for r in correlations))
    for i, group in enumerate(groups):
        these = [r for r in correlations if r["group"] == group]
        left.barh(
            np.arange(len(keys)) + 0.25 * (i - 1),
            [r["rank_no_neglect"] for r in these],
            0.22,
            xerr=[1.96 / max(r["noises"] - r["prompts"], 1) ** 0.5 for r in these],
            label=f"{group} ({these[0]['noises']} noises)",
        )
    left.set(
        yticks=range(len(keys)),
        yticklabels=keys,
        xlabel="rank correlation with being right, within prompts (95 %)",
    )
    left.axvline(0, color="black", lw=0.8)
    left.invert_yaxis()
    left.legend(fontsize=8)
    of_all = [r for r in rates if r["group"] == "all"]
    base = of_all[0]["no_neglect"]
    right.axhline(base, color="black", lw=0.8, label="one random noise")
    for key in keys:
        line = [(r["rows"], base + r["gain"]) for r in of_all if r["choice"] == f"best by {key}"]
        if line:
            right.plot(*zip(*line), "o-", label=key)
    for r in optimised[1:]:
        right.plot(r["rows"], base + r["gain"], "x", label=r["choice"])
    right.set(
        xscale="log",
        xlabel="UNet rows spent on the choice",
        ylabel="pictures without neglect (random + gain)",
    )
    right.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# --- one gradient's seconds and memory ----------------------------------------------------------------------------------


def cost_worker(args) -> None:
    """One `full` gradient in a process of its own, on random full-size weights or the embedded model."""
    import types

    torch.set_num_threads(1)
    T, checkpointed = args.steps[0], args.cost_worker == "checkpointed"
    if args.model == "shapes":
        sd = minsd.load("shapes", args.device)
    else:
        from bench.unet import build
        from minsd.pipeline import StableDiffusion

        unet, config = build("minsd", args.model, getattr(torch, args.dtype), args.device)
        text = types.SimpleNamespace(
            encode=lambda prompts: torch.zeros(len(prompts), 77, config.context_dim, device=args.device)
        )
        sd = StableDiffusion(minsd.config.MODELS[args.model], unet, None, text)
    cells = (args.size or sd.config.size) // 8
    x, row, seconds = noise([0], (4, cells, cells)).to(sd.device), torch.zeros(1, dtype=torch.long), []
    trip = stability.Trip(sd, "a red circle and a blue square", steps=T)
    at_rest = torch.cuda.memory_allocated() / 2**20 if on_gpu(sd.device) else peak_mb()
    for _ in range(args.runs):
        (_, gradient), *spent = clocked(sd.device, stability.gradients, trip, x, row, "full", checkpointed)
        seconds.append(spent)
    told = {"peak_mb": peak_mb(sd.device), "at_rest_mb": at_rest, "gradient": gradient.flatten().tolist()}
    print(json.dumps(told | {"seconds": seconds[1:] or seconds}))


def cost(args) -> list[dict]:
    torch.set_num_threads(1)  # as the workers: the CSV says so
    rows = []
    for T in args.steps:
        results = {}
        for variant in args.activations:
            try:
                r = results[variant] = in_own_process("--steps", str(T), "--cost-worker", variant)
            except SystemExit as failure:  # all activations need not fit
                print(failure, file=sys.stderr)
                continue
            wall, cpu = (statistics.median(column) for column in zip(*r["seconds"]))
            rows.append(
                {
                    "model": args.model,
                    "size": args.size or minsd.config.MODELS[args.model].size,
                    "dtype": args.dtype,
                    "T": T,
                    "activations": variant,
                    "seconds": round(wall, 2),
                    "cpu_seconds": round(cpu, 2),
                    "peak_mb": round(r["peak_mb"]),
                    "above_rest_mb": round(r["peak_mb"] - r["at_rest_mb"]),
                    "same_gradient": "",
                }
            )
        if len(results) == 2:
            rows[-1]["same_gradient"] = results["checkpointed"]["gradient"] == results["whole"]["gradient"]
    return rows


# --- all of it ----------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument(
        "--scores", nargs="+", type=setting, default=[setting(text) for text in SCORES], help="T:DOWN/UP[:N]"
    )
    parser.add_argument("--prompts", type=int, default=10, help="a group")
    parser.add_argument("-n", type=int, default=100, help="noises a prompt")
    parser.add_argument(
        "--optimised", type=int, default=20, help="noises a group to optimise, each of a prompt of its own"
    )
    parser.add_argument("--optimize-steps", type=int, default=20)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after this long, with what is done"
    )
    parser.add_argument("--kept", type=Path, help="file for what is done: a later run goes on from it")
    parser.add_argument("--csv", action="store_true", help="also draws stability.png")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--cost", action="store_true", help="measure one gradient instead")
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 50], help="T, for --cost")
    parser.add_argument("--size", type=int, help="pixels a side, for --cost")
    parser.add_argument("--runs", type=int, default=3, help="for --cost")
    parser.add_argument(
        "--activations",
        nargs="+",
        choices=("checkpointed", "whole"),
        default=("checkpointed", "whole"),
        help="for --cost",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cost-worker", choices=("checkpointed", "whole"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cost_worker:
        return cost_worker(args)
    if args.cost:
        return report("stability_cost", cost(args), args.csv, args.device)
    torch.set_num_threads(1)
    loaded(args.model)
    begin, own = time.time(), 100 * (4 * 16 * 16) / stability.PAPER_NUMBERS  # `optimize`'s own
    trip = {"optimize_steps": args.optimize_steps, "steps": 5, "guidance_scale": 7.5}  # the cheapest T
    ways = [
        (f"{mode} lr {lr:.3g}" + " rescaled" * rescale, trip | {"mode": mode, "lr": lr, "rescale": rescale})
        for mode, lr, rescale in (("detach", 100.0, True), ("full", own, True))
    ]
    jobs = []
    for start in range(
        0, args.n, BATCH
    ):  # one part of every prompt at a time, and one of what is optimised: what is done is balanced
        how = [way for way, limit in args.scores if start < limit]
        seeds, numbers = (
            range(start, min(start + BATCH, args.n)),
            range(start // 2, min(start // 2 + BATCH // 2, args.optimised)),
        )
        jobs += [
            ("score", group, args.prompts, p, list(seeds), how)
            for p in range(args.prompts)
            for group in GROUPS
        ]
        jobs += [("optimise", group, args.optimised, list(numbers), ways) for group in GROUPS if numbers]
    done = {}
    if args.kept and args.kept.exists():
        done = dict(map(json.loads, args.kept.read_text().splitlines()))
    with pool(args.workers, args.model) as processes:
        for key, part in processes.imap_unordered(
            functools.partial(run, args.model), [job for job in jobs if json.dumps(job) not in done]
        ):
            done[key] = part
            if args.kept:
                with args.kept.open("a") as file:
                    print(json.dumps([key, part]), file=file)
            print(f"{len(done)} of {len(jobs)} parts, {time.time() - begin:.0f} s", flush=True)
            if time.time() - begin > 60 * args.minutes:
                break
    done = {
        kind: [row for job in jobs if job[0] == kind for row in done.get(json.dumps(job), [])]
        for kind in ("score", "optimise")
    }
    rows, optimised = done["score"], done["optimise"]
    correlations, rates = tabulate(rows)
    print_table(correlations)
    print()
    print_table(rates)
    print()
    if optimised:
        optimised = tabulate_optimised(optimised)
        print_table(optimised)
    if args.csv:
        write_csv("stability", correlations)
        empty = {"score_gain": "", "norms": ""}
        write_csv("stability_rates", [row | empty for row in rates] + optimised)
        plot(correlations, rates, optimised, RESULTS / "stability.png")
    print(f"{(time.time() - begin) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
