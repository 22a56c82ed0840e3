"""Do layouts put what was asked for where it was asked for?

    python -m bench.layout                                    # the embedded model, 210 random layouts, the pixel detector
    python -m bench.layout --methods plain collage --boxes 2 --sheet out/layouts.png
    python -m bench.layout --model sd15 --clip FOLDER         # real checkpoints: CLIP on what each box holds
    python -m bench.layout --cost --model sd15 --boxes 2 4 8  # seconds and memory of a step, rows together or apart

Random boxes that do not overlap, 2 to 4 in a picture, each with its own coloured shape; the picture's caption names them
all. Every method gets the same layouts and noise. With `+bare` the picture's caption names nothing instead, and with
`+arranged` the noise is put together for the layout from candidates (minsd.noise.arrange); `+chosen` takes the one that is best
for all regions as it is. A box is right when the detector (weights/shapes/detector.py, pixels alone) finds a well drawn body of
that shape and colour centred in it; strays are bodies centred in no box, extras further bodies in one. What `plain` has right
is chance: it is told what, and not where. `spill` is the share of everything drawn that lies outside every box. With a real
checkpoint each box's content on white goes to CLIP: the cosine with its own caption, and how often that is nearer than the
other boxes' captions are.

Seconds are of one process and one thread on a CPU (its own time, whatever else the machine does), sampling alone.

`--cost` times one step of a collage on random full-size weights: its N + 2 rows as one batch, and, apart, the 2 (N + 1) rows
that two passes for each text make, two rows at a time. Both find the same noise (`differ`: by how much, relative).
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import time
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import minsd
from bench import clocked, in_own_process, loaded, peak_mb, pool, print_table, report, wait, wilson, write_csv
from bench.alignment import ANIMALS, OBJECTS, Similarity, named
from bench.shapes import sentence
from minsd.noise import arrange, collage, layout
from minsd.noise.initial import noise
from minsd.weights.shapes import data, detector

SEED = 11  # of the layouts; layout k of a group begins from noise seed k
SIDES = {2: (0.40, 0.55), 3: (0.36, 0.46), 4: (0.34, 0.42)}  # of boxes, as shares of the picture's side
METHODS = {
    "plain": None,
    "collage": {},
    "attention-only": {"attention_only": True},
    "drop 0": {"background_drop": 0.0},
    "drop 1": {"background_drop": 1.0},
    "pad 0.2": {"pad": 0.2},
    "weight 0.02": {"background_weight": 0.02},
    "weight 0.3": {"background_weight": 0.3},
    "weight 1": {"background_weight": 1.0},
    "compat": {"ladder": "compat"},
    "crop 0": {"crop_margin": 0.0},
    "crop 0.25": {"crop_margin": 0.25},
    "crop 0.5": {"crop_margin": 0.5},
    "crop 0.25 always": {"crop_margin": 0.25, "crop_until": 0},
}
BARE, CHOICES = (
    "a picture",
    ("+chosen", "+arranged"),
)  # a caption that names nothing; what is done for the noise


def boxes(rng: np.random.Generator, n: int, gap: float = 0.02) -> list[list[float]]:
    """n boxes [x0, y0, x1, y1] in fractions, apart from one another and inside the picture."""
    while True:
        placed = []
        for _ in range(100):
            w, h = rng.uniform(*SIDES[n], 2)
            x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
            if all(x > c + gap or x + w < a - gap or y > d + gap or y + h < b - gap for a, b, c, d in placed):
                placed.append((x, y, x + w, y + h))
                if len(placed) == n:
                    return [[round(float(v), 3) for v in box] for box in placed]


def cases(n: int, count: int, real: bool) -> list[tuple[list, dict]]:
    """(subjects, layout) of `count` pictures with n boxes: coloured shapes, or for real checkpoints animals and things."""
    rng, out = np.random.default_rng((SEED, n)), []
    for _ in range(count):
        if real:
            subjects = [str(s) for s in rng.choice(ANIMALS + OBJECTS, n, replace=False)]
            captions = [named(s) for s in subjects]
            whole = " and ".join(captions)
        else:
            subjects = data.draw_subjects(rng, n)
            captions, whole = [sentence([s]) for s in subjects], sentence(subjects)
        regions = [{"prompt": caption, "box": box} for caption, box in zip(captions, boxes(rng, n))]
        out.append((subjects, {"prompt": whole, "regions": regions}))
    return out


@functools.cache
def arranged(sd, lay, seed: int, candidates: int, steps: int, sampler: str) -> arrange.Arrangement:
    return arrange.arrange(
        sd, lay, range(1000 * seed, 1000 * seed + candidates), steps=steps, sampler=sampler
    )


def draw(sd, lay, seed: int, method: str, how: dict) -> tuple[Image.Image, int, float]:
    """-> picture, UNet rows a step, seconds of sampling."""
    how, rows, clock = dict(how), [], time.process_time if sd.device.type == "cpu" else time.perf_counter
    scale, candidates = how.pop("guidance_scale"), how.pop("candidates")
    method, *more = method.split("+")
    options, start = METHODS[method], noise([seed], (4, lay.height // 8, lay.width // 8))
    if {"arranged", "chosen"} & set(more):
        found = arranged(sd, lay, seed, candidates, **how)
        start = found.noise if "arranged" in more else noise(found.chosen[:1], start.shape[1:])
    if "bare" in more:
        lay = dataclasses.replace(lay, prompt=BARE)
    begin = clock()
    handle = sd.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    if options is None:
        predict = sd.predictor(sd.encode_prompt([lay.prompt]), sd.encode_prompt([""]), scale)
    else:
        predict = collage.predictor(sd, lay, guidance_scale=scale, seed=seed, **options)
    x = sd.denoise(predict, start, seeds=[seed], **how)
    wait(sd.device)
    seconds = clock() - begin
    handle.remove()
    return sd.decode(x)[0], sum(rows) // how["steps"], seconds


def judge(picture: Image.Image, subjects, lay) -> dict:
    """What the boxes of a picture hold."""
    found, right, strays, extras = detector.find(picture), [], 0, 0
    inside = [
        [f for f in found if x0 <= f.centre[0] < x1 and y0 <= f.centre[1] < y1]
        for x0, y0, x1, y1 in (r.bounds for r in lay.regions)
    ]
    for (colour, shape), bodies in zip(subjects, inside):
        right.append(any(f.whole and f.shape == shape and f.colours == (colour,) for f in bodies))
        extras += max(0, len(bodies) - 1)
    strays = len(found) - sum(map(len, inside))
    pixels = np.asarray(picture).astype(float)
    ground = np.median(np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)]), 0)
    drawn = np.linalg.norm(pixels - ground, axis=-1) > detector.FOREGROUND
    outside = drawn & ~np.any([r.pixels for r in lay.regions], axis=0)
    somewhere = [any(f.whole and f.shape == s and f.colours == (c,) for f in found) for c, s in subjects]
    return {
        "right": right,
        "somewhere": somewhere,
        "strays": strays,
        "extras": extras,
        "spill": outside.sum() / max(1, drawn.sum()),
    }


def _job(job):
    model, n, count, k, method, how = job
    sd, (subjects, given) = loaded(model), cases(n, count, False)[k]
    lay = layout.load(given).sized(sd.config.size, sd.config.size)
    picture, rows, seconds = draw(sd, lay, k, method, how)
    return np.asarray(picture), rows, seconds, judge(picture, subjects, lay), subjects, lay


def row_of(method: str, n: int, results, how: dict) -> dict:
    judged = [r[3] for r in results]
    right = [ok for j in judged for ok in j["right"]]
    low, high = wilson(sum(right), len(right))
    return {
        "method": method,
        "boxes": n,
        **{key: how[key] for key in ("sampler", "steps", "guidance_scale")},
        "layouts": len(results),
        "boxes_right": round(np.mean(right), 3),
        "boxes_95": f"{low:.3f}-{high:.3f}",
        "all_right": round(np.mean([all(j["right"]) for j in judged]), 3),
        "drawn_anywhere": round(np.mean([ok for j in judged for ok in j["somewhere"]]), 3),
        "strays": round(np.mean([j["strays"] for j in judged]), 3),
        "extras": round(np.mean([j["extras"] for j in judged]), 3),
        "spill": round(np.mean([j["spill"] for j in judged]), 3),
        "rows_before": n * how["candidates"] * method.endswith(CHOICES),
        "rows_a_step": results[0][1],
        "seconds": round(np.mean([r[2] for r in results]), 3),
    }


def framed(picture, subjects, lay, right) -> Image.Image:
    """A picture with its boxes drawn on, green where they hold what they should, and the captions below."""
    out = Image.new("RGB", (lay.width + 4, lay.height + 11 * len(subjects) + 6), "white")
    out.paste(Image.fromarray(picture), (2, 2))
    pen = ImageDraw.Draw(out)
    for i, (subject, region, ok) in enumerate(zip(subjects, lay.regions, right)):
        x0, y0, x1, y1 = region.bounds
        colour = "green" if ok else "crimson"
        pen.rectangle((x0 + 2, y0 + 2, x1 + 1, y1 + 1), outline=colour)
        pen.text((x0 + 4, y0 + 2), str(i + 1), fill=colour)
        pen.text((2, lay.height + 2 + 11 * i), f"{i + 1} {' '.join(subject)}", fill=colour)
    return out


def grid(kept: dict, path: Path, columns: int = 12) -> None:
    """A row for each method and number of boxes: the same layouts and noise below one another."""
    lines = {
        key: [framed(*(r[i] for i in (0, 4, 5)), r[3]["right"]) for r in results[:columns]]
        for key, results in kept.items()
    }
    wide = max(len(line) for line in lines.values()) * next(iter(lines.values()))[0].width
    out = Image.new("RGB", (110 + wide, sum(line[0].height for line in lines.values())), "white")
    pen, y = ImageDraw.Draw(out), 0
    for (method, n), line in lines.items():
        pen.text((4, y + 40), method.replace("+", "\n+") + f"\n{n} boxes", fill="black")
        for i, picture in enumerate(line):
            out.paste(picture, (110 + i * picture.width, y))
        y += line[0].height
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save(path, optimize=True)


def crops(sd, args, how: dict) -> list[dict]:
    """A real checkpoint: what each box holds, on white, against the captions, by CLIP."""
    clip, rows = Similarity(args.clip, sd.device), []
    for n in args.boxes:
        for method in args.methods:
            own, first, seconds, steps = [], [], [], 0
            for k, (_, given) in enumerate(cases(n, args.n, True)):
                lay = layout.load(given).sized(args.size or sd.config.size, args.size or sd.config.size)
                picture, steps, spent = draw(sd, lay, k, method, how)
                seconds.append(spent)
                captions = [region.prompt for region in lay.regions]
                for i, region in enumerate(lay.regions):
                    alone = np.where(region.pixels[..., None], np.asarray(picture), 255).astype(np.uint8)
                    crop = Image.fromarray(alone).crop(region.bounds)
                    cosines = clip([crop] * n, captions)
                    own.append(cosines[i])
                    first.append(cosines[i] == max(cosines))
            rows.append(
                {
                    "model": args.model,
                    "method": method,
                    "boxes": n,
                    **how,
                    "layouts": args.n,
                    "clip_crop": round(np.mean(own), 4),
                    "nearest_own": round(np.mean(first), 3),
                    "rows_a_step": steps,
                    "seconds": round(np.median(seconds), 2),
                }
            )
            print_table(rows[-1:])
    return rows


# --- one step's seconds and memory ------------------------------------------------------------------------------------


def cost_worker(args) -> None:
    """Steps of one collage in a process of its own, on random weights; texts' states are drawn, equal for equal words."""
    from bench.unet import build
    from minsd.pipeline import StableDiffusion

    torch.set_num_threads(args.threads)
    unet, config = build("minsd", args.model, getattr(torch, args.dtype), args.device)

    def encode(texts):
        states = [
            torch.randn(77, config.context_dim, generator=torch.Generator().manual_seed(len(text.strip())))
            for text in texts
        ]
        return torch.stack(states).to(args.device)

    sd = StableDiffusion(minsd.config.MODELS[args.model], unet, None, types.SimpleNamespace(encode=encode))
    (n,), size, apart = args.boxes, args.size or sd.config.size, args.cost_worker == "apart"
    negatives = [
        " " if apart else ""
    ] * n  # written otherwise than the picture's, all halves of guidance are computed
    columns = n // 2
    places = [
        (k % columns / columns, k // columns / 2) for k in range(n)
    ]  # two rows of boxes fill the picture
    regions = [
        {"prompt": "x" * (k + 2), "box": [x, y, x + 1 / columns, y + 0.5], "negative_prompt": negative}
        for k, ((x, y), negative) in enumerate(zip(places, negatives))
    ]
    if apart:
        collage.ROWS_AT_ONCE, sd.batch_size = 2 * (size // 8) ** 2, lambda height, width: 1
    predict = collage.predictor(
        sd, layout.load({"prompt": "x", "width": size, "height": size, "regions": regions})
    )
    x, rows, seconds = noise([0], (4, size // 8, size // 8)).to(args.device, sd.dtype), [], []
    unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        for _ in range(args.runs):
            rows.clear()
            eps, *spent = clocked(sd.device, predict, x, 481)
            seconds.append(spent)
    told = {
        "seconds": seconds[1:] or seconds,
        "peak_mb": peak_mb(sd.device),
        "rows": rows,
        "eps": eps.flatten().tolist(),
    }
    print(json.dumps(told))


def cost(args) -> list[dict]:
    torch.set_num_threads(args.threads)  # as the workers: the CSV says so
    table = []
    for n in args.boxes:
        results = {}
        for variant in ("apart", "together"):
            results[variant] = r = in_own_process("--boxes", str(n), "--cost-worker", variant)
            wall, cpu = (statistics.median(column) for column in zip(*r["seconds"]))
            size = args.size or minsd.config.MODELS[args.model].size
            table.append(
                {
                    "model": args.model,
                    "size": size,
                    "dtype": args.dtype,
                    "regions": n,
                    "rows": variant,
                    "rows_a_step": sum(r["rows"]),
                    "passes": len(r["rows"]),
                    "seconds": round(wall, 2),
                    "cpu_seconds": round(cpu, 2),
                    "peak_mb": round(r["peak_mb"]),
                }
            )
        a, b = (np.array(results[variant]["eps"]) for variant in ("apart", "together"))
        wall, cpu = (table[-1][key] / table[-2][key] for key in ("seconds", "cpu_seconds"))
        more = {
            "time_ratio": round(wall, 3),
            "cpu_ratio": round(cpu, 3),
            "differ": f"{np.abs(a - b).max() / np.abs(a).max():.1e}",
        }
        table[-2:] = [table[-2] | dict.fromkeys(more, ""), table[-1] | more]
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument(
        "--boxes", nargs="+", type=int, default=list(SIDES), help="2 to 4; with --cost any even number"
    )
    every = ["".join(parts) for parts in itertools.product(METHODS, ("", "+bare"), ("", *CHOICES))]
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=every,
        metavar="METHOD",
        default=[
            *METHODS,
            "collage+bare",
            "plain+chosen",
            "plain+arranged",
            "collage+bare+chosen",
            "collage+bare+arranged",
        ],
        help=f"{', '.join(METHODS)}; each also with +bare, then +chosen or +arranged",
    )
    parser.add_argument(
        "--candidates", type=int, default=40, help="noises that +chosen and +arranged take from"
    )
    parser.add_argument("-n", type=int, default=70, help="layouts of each number of boxes")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--size", type=int, help="pixels a side, for real checkpoints (default: the model's)")
    parser.add_argument("--sheet", type=Path, help="a picture of the first layouts under every method")
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--clip", type=Path, help="folder of a CLIPModel, for real checkpoints")
    parser.add_argument(
        "--device", help="for real checkpoints (default: CUDA if there is one) and --cost (default: cpu)"
    )
    parser.add_argument("--dtype", default="float32", help="for --cost")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--cost", action="store_true", help="measure one step instead")
    parser.add_argument("--runs", type=int, default=2, help="for --cost; of several the first is a warm-up")
    parser.add_argument("--threads", type=int, default=1, help="for --cost")
    parser.add_argument("--cost-worker", choices=("together", "apart"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cost:
        args.device = args.device or "cpu"
    if args.cost_worker:
        return cost_worker(args)
    if args.cost:
        return report("layout_cost", cost(args), args.csv, args.device)
    if unknown := set(args.boxes) - set(SIDES):
        parser.error(f"--boxes without --cost takes {', '.join(map(str, SIDES))}, not {unknown.pop()}")
    how = {
        "sampler": args.sampler,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "candidates": args.candidates,
    }
    if args.clip:
        sd = minsd.load(args.model, args.device)
        how["guidance_scale"] = sd.config.guidance_scale if args.guidance is None else args.guidance
        rows = crops(sd, args, how)
        if args.csv:
            write_csv("layout_clip", rows, sd.device)
        return
    how["guidance_scale"] = (
        minsd.config.MODELS["shapes"].guidance_scale if args.guidance is None else args.guidance
    )
    rows, kept = [], {}
    with pool(args.workers, args.model) as processes:
        for n in args.boxes:
            for method in args.methods:
                results = processes.map(
                    _job, [(args.model, n, args.n, k, method, how) for k in range(args.n)], chunksize=2
                )
                kept[method, n] = results
                rows.append(row_of(method, n, results, how))
                told = (
                    "boxes_right",
                    "boxes_95",
                    "all_right",
                    "drawn_anywhere",
                    "strays",
                    "extras",
                    "spill",
                    "rows_a_step",
                    "seconds",
                )
                print(
                    f"{n} boxes {method:14}", ", ".join(f"{key} {rows[-1][key]}" for key in told), flush=True
                )
                if args.csv:
                    write_csv("layout", rows[-1:])
    if args.sheet:
        grid(kept, args.sheet)


if __name__ == "__main__":
    main()
