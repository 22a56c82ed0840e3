"""Where does the embedded model look, and does that tell what it will draw?

    python -m bench.attention_maps [--csv]

First, on true pictures that training never saw, noised to each timestep: do the 16x16 maps of a caption's colour and
shape words lie on the object they name? The argmax counts as a hit inside the object's outline; the share is the map's
weight inside it, beside the share of the picture that the object covers (what a map that knows nothing would give).

Second, at the first timestep of a run, where nothing is drawn yet: how far do InitNO's response and conflict losses
(noise/losses.py) spread over noises, and how do they rank against the detector's verdict on the finished picture? Only if
they do, has optimising them anything to work with.
"""

import argparse
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from bench import loaded, pool, print_table, write_csv
from bench.shapes import BATCH, cases, sentence
from minsd.attention import AttentionRecorder
from minsd.noise import losses
from minsd.noise.initial import noise
from minsd.weights.shapes import data, detector

TIMESTEPS = (981, 958, 900, 800, 700, 600, 500, 400, 300, 200, 100, 1)


def cross_maps(sd, prompts, x, t) -> AttentionRecorder:
    """A recorder holding what the conditional branch looks at, at latents x (B,4,16,16) and timestep t."""
    record = AttentionRecorder(only=True)
    with torch.no_grad():
        sd.unet(x, t, sd.encode_prompt(prompts), record=record)
    return record


def pictures_looked_at(sd, n: int) -> list[dict]:
    """Hits and shares by timestep and kind of word, over n pictures from beyond the training set."""
    examples = [data.example(91_000, i) for i in range(n)]
    latents, where = [], []
    for e in examples:
        picture, masks = e.render()
        latents.append(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1)
        cells = F.avg_pool2d(torch.from_numpy(masks), data.SIZE // 16)  # (objects, 16, 16)
        # (token position, kind, coverage of the cells by the object named); the start token comes first, commas count
        where.append(
            [
                (place + 1, kind, cells[index])
                for *places, index in e.named
                if index is not None
                for kind, place in zip(("colour", "shape"), places)
                if place is not None
            ]
        )
    with torch.no_grad():
        latents = sd.vae.encode(torch.cat(latents))[0] * sd.config.vae.scaling_factor
    eps, rows = noise(range(n), latents.shape[1:]), []
    for t in TIMESTEPS:
        x = sd.schedule.add_noise(latents, eps, t)
        maps = torch.cat(
            [
                cross_maps(sd, [e.caption for e in examples[i : i + 50]], x[i : i + 50], t).cross
                for i in range(0, n, 50)
            ]
        )
        for kind in ("colour", "shape"):
            hits, shares, chance = [], [], []
            for picture, words in zip(maps, where):
                for position, this, cells in words:
                    if this == kind:
                        m = picture[..., position]
                        hits.append(float(cells.flatten()[m.argmax()] > 0))
                        shares.append(float((m * cells).sum() / m.sum()))
                        chance.append(float(cells.mean()))
            means = {"argmax_hits": hits, "share_inside": shares, "area": chance}
            rows.append(
                {"t": t, "abar": round(sd.schedule.abar(t), 4), "words": kind, "n": len(hits)}
                | {k: round(float(np.mean(v)), 3) for k, v in means.items()}
            )
    return rows


def rank_correlation(a, b) -> tuple[float, float]:
    """Spearman's, ties sharing their mean rank, and its two-sided p by the normal approximation."""

    def ranks(v):
        _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    if len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0, 1.0
    r = float(np.corrcoef(ranks(np.asarray(a)), ranks(np.asarray(b)))[0, 1])
    return r, math.erfc(abs(r) * math.sqrt(len(a) - 1) / math.sqrt(2))


def _job(job):
    """Losses at the first timestep and verdicts for a part of a group: a list of dicts, one a noise."""
    model, group, n, start, steps = job
    sd, numbers = loaded(model), list(range(start, min(start + BATCH, n)))
    subjects = [cases(group, n)[k] for k in numbers]
    prompts, x = [sentence(s) for s in subjects], noise(numbers, (4, 16, 16))
    record = cross_maps(sd, prompts, x, sd.schedule.timesteps(steps)[0])
    out = [{} for _ in numbers]
    for kind, word in (("shape", lambda s: s[1:]), ("colour", lambda s: s[:1]), ("both", lambda s: s)):
        places = [
            [sd.text.positions(p, w) for s in these for w in word(s)] for p, these in zip(prompts, subjects)
        ]
        maps = losses.subject_maps(record.cross, losses.selector(places))
        response, claims = losses.cross_response(maps), losses.claims(record.self, losses.peaks(maps))
        for row, a, b in zip(out, response.tolist(), losses.self_conflict(claims).tolist()):
            row[kind] = (a, b)
    for row, picture, these in zip(out, sd(prompts, numbers, noise=x, steps=steps), subjects):
        row["verdict"] = detector.judge(picture, these)
    return out


def losses_against_verdicts(processes, model: str, n: int, steps: int) -> list[dict]:
    rows = []
    for group in ("two", "three"):
        noises = [
            r
            for part in processes.imap(_job, [(model, group, n, i, steps) for i in range(0, n, BATCH)])
            for r in part
        ]
        for words in ("shape", "colour", "both"):
            for name, values in zip(("response", "conflict"), zip(*(r[words] for r in noises))):
                low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
                row = {
                    "group": group,
                    "n": n,
                    "steps": steps,
                    "loss": name,
                    "words": words,
                    "median": round(middle, 3),
                    "iqr": round(high - low, 3),
                    "min": round(min(values), 3),
                    "max": round(max(values), 3),
                }
                for verdict in ("no_neglect", "strict"):
                    right = [float(getattr(r["verdict"], verdict)) for r in noises]
                    r, p = rank_correlation(values, right)
                    row |= {
                        verdict: round(np.mean(right), 3),
                        f"rank_{verdict}": round(r, 3),
                        f"p_{verdict}": f"{p:.1g}",
                    }
                rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("-n", type=int, default=240, help="pictures a row")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with pool(args.workers, args.model) as processes:
        told = losses_against_verdicts(processes, args.model, args.n, args.steps)
    looks = pictures_looked_at(loaded(args.model), args.n)
    for name, rows in (("attention_maps", looks), ("attention_maps_losses", told)):
        print_table(rows)
        print()
        if args.csv:
            write_csv(name, [{"model": args.model, **row} for row in rows])


if __name__ == "__main__":
    main()
