"""Do layouts put things where they were asked for?

    python -m bench.layout                                    # the embedded model, 210 layouts
    python -m bench.layout --methods plain collage --boxes 2 --sheet out/layouts.png
    python -m bench.layout --model sd15 --clip FOLDER         # real checkpoints, judged by CLIP
    python -m bench.layout --cost --model sd15 --boxes 2 4 8  # seconds and memory of a step

The layouts are random: 2 to 4 boxes per image that do not overlap, each with its own coloured
shape; the image's caption names all shapes. Every method gets the same layouts and noise. With
`+bare` the image's caption is "a picture" instead. With `+arranged` the noise is composed for the
layout from candidates (minsd.noise.arrange). With `+chosen` it is the candidate that is best for
all regions together, unchanged.

A box is right if the detector (weights/shapes/detector.py, pixels alone) finds a well drawn body
(object) of its shape and colour whose centre is in the box. `strays` are bodies whose centre is in
no box, `extras` are further bodies in one box, and `spill` is the fraction of the drawn pixels that
lies outside every box. The method `plain` is not given the places, so its rate is the rate of
chance. With a real checkpoint CLIP sees the contents of each box on white: `clip_crop` is the
cosine with the box's own caption, and `nearest_own` the fraction of boxes for which that caption is
nearer than those of the other boxes.

Seconds are the time of sampling alone: on a CPU the processor time of one process with one thread,
on a GPU elapsed time.

`--cost` times one step of a collage (noise/collage.py, which evaluates the UNet for each region's
caption) of N regions on random full-size weights, in two ways: with all its N + 2 UNet rows in one
batch, and with 2 (N + 1) rows, two per text, evaluated two at a time. Both predict the same noise
(`differ` is the relative difference).
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from bench import (
    Row,
    clocked,
    in_own_process,
    loaded,
    parser,
    peak_mb,
    pool,
    print_table,
    report,
    wait,
    wilson,
    write_csv,
)
from bench.unet import random_model
from minsd import judges
from minsd.app.prompt_sets import ANIMALS, LAYOUT_SEED, OBJECTS, SIDES, boxes, named, sentence
from minsd.config import MODELS
from minsd.guidance import counted
from minsd.judges import pixels
from minsd.noise import arrange, collage, layout
from minsd.noise.initial import noise
from minsd.noise.layout import SizedLayout
from minsd.pipeline import StableDiffusion, load
from minsd.weights.shapes import data, detector

SEED = LAYOUT_SEED  # layout k of a group begins from noise seed k
METHODS: dict[str, dict[str, Any] | None] = {  # name -> options of the collage
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
CHOICES = ("+chosen", "+arranged")  # how the noise is found from candidates
BARE = "a picture"  # a caption that names nothing
DEFAULT_METHODS = [
    *METHODS,
    "collage+bare",
    "plain+chosen",
    "plain+arranged",
    "collage+bare+chosen",
    "collage+bare+arranged",
]


class Settings(NamedTuple):
    """The settings that all methods of a run have in common."""

    sampler: str
    steps: int
    guidance_scale: float
    candidates: int


class Contents(NamedTuple):
    """The judgement of which objects are in the boxes of an image."""

    right: list[bool]  # per box
    somewhere: list[bool]  # per subject, wherever it is
    strays: int
    extras: int
    spill: float


class Drawn(NamedTuple):
    """An image, the number of UNet rows of one sampling step (the sum of the batch sizes of its
    UNet evaluations), and the seconds that sampling took."""

    image: Image.Image
    rows: int
    seconds: float


class Judged(NamedTuple):
    pixels: np.ndarray
    rows: int
    seconds: float
    contents: Contents
    subjects: list[tuple[str, str]]
    layout: SizedLayout


def with_boxes(rng: np.random.Generator, captions: Sequence[str], whole: str) -> dict[str, Any]:
    places = boxes(rng, len(captions))
    regions = [{"prompt": caption, "box": box} for caption, box in zip(captions, places)]
    return {"prompt": whole, "regions": regions}


def cases(n: int, count: int) -> list[tuple[list[tuple[str, str]], dict[str, Any]]]:
    """Returns `count` random pairs (subjects, layout). The subjects are n coloured shapes, and the
    layout has n boxes, one for each subject."""
    rng = np.random.default_rng((SEED, n))
    out = []
    for _ in range(count):
        subjects = data.draw_subjects(rng, n)
        captions = [sentence([subject]) for subject in subjects]
        out.append((subjects, with_boxes(rng, captions, sentence(subjects))))
    return out


def real_cases(n: int, count: int) -> list[dict[str, Any]]:
    """Returns `count` random layouts for real checkpoints. Each has n boxes, each with an animal or
    a thing as its caption."""
    rng = np.random.default_rng((SEED, n))
    out = []
    for _ in range(count):
        captions = [named(str(word)) for word in rng.choice(ANIMALS + OBJECTS, n, replace=False)]
        out.append(with_boxes(rng, captions, " and ".join(captions)))
    return out


def sized(sd: StableDiffusion, given: dict[str, Any], size: int | None = None) -> SizedLayout:
    side = size or sd.config.size
    return layout.load(given).sized(side, side)


@functools.cache
def arranged(sd: StableDiffusion, lay: SizedLayout, seed: int, settings: Settings) -> arrange.Arrangement:
    candidates = range(1000 * seed, 1000 * seed + settings.candidates)
    return arrange.arrange(sd, lay, candidates, steps=settings.steps, sampler=settings.sampler)


def draw(sd: StableDiffusion, lay: SizedLayout, seed: int, method: str, settings: Settings) -> Drawn:
    clock = time.process_time if sd.device.type == "cpu" else time.perf_counter
    method, *more = method.split("+")
    options = METHODS[method]
    start = noise([seed], (4, lay.height // 8, lay.width // 8))
    if "arranged" in more or "chosen" in more:
        found = arranged(sd, lay, seed, settings)
        start = found.noise if "arranged" in more else noise(found.chosen[:1], start.shape[1:])
    if "bare" in more:
        lay = dataclasses.replace(lay, prompt=BARE)
    begin = clock()
    with counted(sd.unet) as rows:
        if options is None:
            context, uncond = sd.encode_prompt([lay.prompt]), sd.encode_prompt([""])
            predict = sd.predictor(context, uncond, settings.guidance_scale)
        else:
            predict = collage.predictor(sd, lay, guidance_scale=settings.guidance_scale, seed=seed, **options)
        x = sd.denoise(predict, start, seeds=[seed], steps=settings.steps, sampler=settings.sampler)
    wait(sd.device)
    seconds = clock() - begin
    return Drawn(sd.decode(x)[0], sum(rows) // settings.steps, seconds)


# --- the embedded model: right or wrong -----------------------------------------------------------


def judge(image: Image.Image, subjects: Sequence[tuple[str, str]], lay: SizedLayout) -> Contents:
    found = detector.find(image)
    inside = [
        [body for body in found if x0 <= body.centre[0] < x1 and y0 <= body.centre[1] < y1]
        for x0, y0, x1, y1 in (region.bounds for region in lay.regions)
    ]

    def shows(bodies: Sequence[detector.Found], subject: tuple[str, str]) -> bool:
        colour, shape = subject
        return any(body.whole and body.shape == shape and body.colours == (colour,) for body in bodies)

    pixels = np.asarray(image).astype(float)
    edges = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    drawn = np.linalg.norm(pixels - np.median(edges, 0), axis=-1) > detector.FOREGROUND
    outside = drawn & ~np.any([region.pixels for region in lay.regions], axis=0)
    return Contents(
        right=[shows(bodies, subject) for subject, bodies in zip(subjects, inside)],
        somewhere=[shows(found, subject) for subject in subjects],
        strays=len(found) - sum(map(len, inside)),
        extras=sum(max(0, len(bodies) - 1) for bodies in inside),
        spill=float(outside.sum() / max(1, drawn.sum())),
    )


def _job(job: tuple[str, int, int, int, str, Settings]) -> Judged:
    model, n, count, k, method, settings = job
    sd = loaded(model)
    subjects, given = cases(n, count)[k]
    lay = sized(sd, given)
    image, rows, seconds = draw(sd, lay, k, method, settings)
    return Judged(np.asarray(image), rows, seconds, judge(image, subjects, lay), subjects, lay)


def row_of(method: str, n: int, results: Sequence[Judged], settings: Settings) -> Row:
    contents = [result.contents for result in results]
    right = [ok for image in contents for ok in image.right]
    low, high = wilson(sum(right), len(right))
    return {
        "method": method,
        "boxes": n,
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "layouts": len(results),
        "boxes_right": round(np.mean(right), 3),
        "boxes_95": f"{low:.3f}-{high:.3f}",
        "all_right": round(np.mean([all(image.right) for image in contents]), 3),
        "drawn_anywhere": round(np.mean([ok for image in contents for ok in image.somewhere]), 3),
        "strays": round(np.mean([image.strays for image in contents]), 3),
        "extras": round(np.mean([image.extras for image in contents]), 3),
        "spill": round(np.mean([image.spill for image in contents]), 3),
        "rows_before": n * settings.candidates * method.endswith(CHOICES),
        "rows_a_step": results[0].rows,
        "seconds": round(np.mean([result.seconds for result in results]), 3),
    }


def on_embedded_model(args: argparse.Namespace, settings: Settings) -> None:
    """Draws and judges all layouts with every method on the embedded model. Prints, and with --csv
    saves, the result of each method as soon as it is measured."""
    hidden = ("method", "boxes", "sampler", "steps", "guidance_scale", "layouts", "rows_before")
    kept = {}
    with pool(args.workers, args.model) as processes:
        for n in args.boxes:
            for method in args.methods:
                jobs = [(args.model, n, args.n, k, method, settings) for k in range(args.n)]
                kept[method, n] = processes.map(_job, jobs, chunksize=2)
                row = row_of(method, n, kept[method, n], settings)
                values = ", ".join(f"{key} {value}" for key, value in row.items() if key not in hidden)
                print(f"{n} boxes {method:14}", values, flush=True)
                if args.csv:
                    write_csv("layout", [row])
    if args.sheet:
        grid(kept, args.sheet)


def framed(result: Judged) -> Image.Image:
    """Returns the image of `result` with the layout's boxes drawn on it and their captions below. A
    box and its caption are green if the box contains its subject, otherwise red."""
    lay = result.layout
    out = Image.new("RGB", (lay.width + 4, lay.height + 11 * len(result.subjects) + 6), "white")
    out.paste(Image.fromarray(result.pixels), (2, 2))
    pen = ImageDraw.Draw(out)
    for i, (subject, region, ok) in enumerate(zip(result.subjects, lay.regions, result.contents.right)):
        x0, y0, x1, y1 = region.bounds
        colour = "green" if ok else "crimson"
        pen.rectangle((x0 + 2, y0 + 2, x1 + 1, y1 + 1), outline=colour)
        pen.text((x0 + 4, y0 + 2), str(i + 1), fill=colour)
        pen.text((2, lay.height + 2 + 11 * i), f"{i + 1} {' '.join(subject)}", fill=colour)
    return out


def grid(kept: dict[tuple[str, int], list[Judged]], path: Path, columns: int = 12) -> None:
    """Saves a sheet of images at `path`. `kept` maps (method, number of boxes) to the judged images
    of one row of the sheet, of which the first `columns` are shown. Images in the same column and
    with the same number of boxes have the same layout and the same seed."""
    lines = {key: [framed(result) for result in results[:columns]] for key, results in kept.items()}
    width = max(sum(image.width for image in line) for line in lines.values())
    out = Image.new("RGB", (110 + width, sum(line[0].height for line in lines.values())), "white")
    pen = ImageDraw.Draw(out)
    y = 0
    for (method, n), line in lines.items():
        pen.text((4, y + 40), method.replace("+", "\n+") + f"\n{n} boxes", fill="black")
        for i, image in enumerate(line):
            out.paste(image, (110 + i * image.width, y))
        y += line[0].height
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save(path, optimize=True)


# --- real checkpoints: similarities ---------------------------------------------------------------


def crops(sd: StableDiffusion, args: argparse.Namespace, settings: Settings) -> list[Row]:
    """Measures layouts on a real checkpoint, and returns the table's rows. CLIP compares the
    contents of each box, on a white background, with the captions of all boxes."""
    clip = judges.load("clip", {"clip-b16": str(args.clip)}, sd.device).clip
    rows = []
    for n in args.boxes:
        for method in args.methods:
            own: list[float] = []
            first: list[bool] = []
            drawn: list[Drawn] = []
            for k, given in enumerate(real_cases(n, args.n)):
                lay = sized(sd, given, args.size)
                drawn.append(draw(sd, lay, k, method, settings))
                captions = [region.prompt for region in lay.regions]
                for i, region in enumerate(lay.regions):
                    alone = np.where(region.pixels[..., None], np.asarray(drawn[-1].image), 255)
                    crop = Image.fromarray(alone.astype(np.uint8)).crop(region.bounds)
                    vector = clip.images(pixels.pil([crop], clip.size))[0]
                    cosines = (clip.texts(captions).to(vector) @ vector).tolist()
                    own.append(cosines[i])
                    first.append(cosines[i] == max(cosines))
            row: Row = {"model": args.model, "method": method, "boxes": n, **settings._asdict()}
            row |= {
                "layouts": args.n,
                "clip_crop": round(np.mean(own), 4),
                "nearest_own": round(np.mean(first), 3),
                "rows_a_step": drawn[-1].rows,
                "seconds": round(np.median([one.seconds for one in drawn]), 2),
            }
            rows.append(row)
            print_table(rows[-1:])
    return rows


# --- one step's seconds and memory ----------------------------------------------------------------


def filling(n: int, negative_prompt: str) -> list[dict[str, Any]]:
    """Returns n regions, in the form in which a layout.json lists them, that fill the image in two
    rows. n is even. All have the negative prompt `negative_prompt`."""
    columns = n // 2
    places = [(k % columns / columns, k // columns / 2) for k in range(n)]
    return [
        {"prompt": "x" * (k + 2), "box": [x, y, x + 1 / columns, y + 0.5], "negative_prompt": negative_prompt}
        for k, (x, y) in enumerate(places)
    ]


def cost_worker(args: argparse.Namespace) -> None:
    """Times steps of one layout in this process, on random weights, and prints the result as
    JSON."""
    torch.set_num_threads(args.threads)
    dim = MODELS[args.model].unet.context_dim

    def encode(texts: Sequence[str]) -> Tensor:
        """Returns random text states (texts,77,D), in the place of a text encoder. They depend only
        on the length of each text without the spaces around it."""
        generators = [torch.Generator().manual_seed(len(text.strip())) for text in texts]
        states = [torch.randn(77, dim, generator=generator) for generator in generators]
        return torch.stack(states).to(args.device)

    text = types.SimpleNamespace(encode=encode)
    sd = random_model(args.model, getattr(torch, args.dtype), args.device, text)
    size = args.size or sd.config.size
    apart = args.cost_worker == "apart"
    if apart:
        collage.ROWS_AT_ONCE = 2 * (size // 8) ** 2
        sd.batch_size = lambda height, width: 1
    # Negative prompts that differ from the image's, if only by a space, prevent texts from sharing
    # the unconditional half of guidance.
    regions = filling(args.boxes[0], negative_prompt=" " if apart else "")
    lay = layout.load({"prompt": "x", "width": size, "height": size, "regions": regions})
    predict = collage.predictor(sd, lay)
    x = noise([0], (4, size // 8, size // 8)).to(args.device, sd.dtype)
    seconds = []
    with torch.no_grad(), counted(sd.unet) as rows:
        for _ in range(args.runs):
            rows.clear()
            eps, *spent = clocked(sd.device, predict, x, 481)
            seconds.append(spent)
            result = {"rows": list(rows), "eps": eps.flatten().tolist()}
    print(json.dumps({"seconds": seconds[1:] or seconds, "peak_mb": peak_mb(sd.device), **result}))


def cost(args: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(args.threads)  # as in the workers, for the CSV's device column
    table = []
    for n in args.boxes:
        rows: list[Row] = []
        eps: list[np.ndarray] = []
        for variant in ("apart", "together"):
            result = in_own_process("--boxes", str(n), "--cost-worker", variant)
            seconds, cpu_seconds = (statistics.median(column) for column in zip(*result["seconds"]))
            rows.append(
                {
                    "model": args.model,
                    "size": args.size or MODELS[args.model].size,
                    "dtype": args.dtype,
                    "regions": n,
                    "rows": variant,
                    "rows_a_step": sum(result["rows"]),
                    "passes": len(result["rows"]),
                    "seconds": round(seconds, 2),
                    "cpu_seconds": round(cpu_seconds, 2),
                    "peak_mb": round(result["peak_mb"]),
                }
            )
            eps.append(np.array(result["eps"]))
        apart, together = rows
        ratios = {
            "time_ratio": round(together["seconds"] / apart["seconds"], 3),
            "cpu_ratio": round(together["cpu_seconds"] / apart["cpu_seconds"], 3),
            "differ": f"{np.abs(eps[0] - eps[1]).max() / np.abs(eps[0]).max():.1e}",
        }
        table += [apart | dict.fromkeys(ratios, ""), together | ratios]
    return table


# --- all of it ------------------------------------------------------------------------------------


def read_options() -> argparse.Namespace:
    options = parser(__doc__, "layout", "layout_clip", "layout_cost")
    options.add_argument("--model", default="shapes", help="as for minsd.generate (default: shapes)")
    options.add_argument(
        "--boxes",
        nargs="+",
        type=int,
        default=list(SIDES),
        help="per layout: 2 to 4 (default: 2 3 4); with --cost any even number",
    )
    every = ["".join(parts) for parts in itertools.product(METHODS, ("", "+bare"), ("", *CHOICES))]
    options.add_argument(
        "--methods",
        nargs="+",
        choices=every,
        metavar="METHOD",
        default=DEFAULT_METHODS,
        help=f"{', '.join(METHODS)}; each also with +bare, then +chosen or +arranged",
    )
    options.add_argument(
        "--candidates", type=int, default=40, help="noises for +chosen and +arranged (default: 40)"
    )
    options.add_argument("-n", type=int, default=70, help="layouts per number (default: 70)")
    options.add_argument("--sampler", default="ddim", help="default: ddim")
    options.add_argument("--steps", type=int, default=50, help="sampling steps (default: 50)")
    options.add_argument("--guidance", type=float, help="scale (default: the model's)")
    options.add_argument(
        "--size", type=int, help="pixels per side, not for the embedded model (default: the model's)"
    )
    options.add_argument("--sheet", type=Path, help="file for the first layouts under every method")
    options.add_argument("--clip", type=Path, help="folder of a CLIPModel, for real checkpoints")
    options.add_argument(
        "--device", help="for real checkpoints (default: CUDA if there is any), --cost (cpu)"
    )
    options.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)"
    )
    options.add_argument("--cost", action="store_true", help="measure one step instead")
    options.add_argument("--dtype", default="float32", help="for --cost (default: float32)")
    options.add_argument(
        "--runs", type=int, default=2, help="steps for --cost, the first a warm-up (default: 2)"
    )
    options.add_argument("--threads", type=int, default=1, help="for --cost (default: 1)")
    options.add_argument("--cost-worker", choices=("together", "apart"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.cost:
        args.device = args.device or "cpu"
    elif unknown := set(args.boxes) - set(SIDES):
        options.error(f"--boxes without --cost takes {', '.join(map(str, SIDES))}, not {unknown.pop()}")
    return args


def main() -> None:
    args = read_options()
    if args.cost_worker:
        cost_worker(args)
        return
    if args.cost:
        report("layout_cost", cost(args), args.csv, args.device)
        return

    def settings(default_scale: float) -> Settings:
        scale = default_scale if args.guidance is None else args.guidance
        return Settings(args.sampler, args.steps, scale, args.candidates)

    if not args.clip:
        on_embedded_model(args, settings(MODELS["shapes"].guidance_scale))
        return
    sd = load(args.model, args.device)
    rows = crops(sd, args, settings(sd.config.guidance_scale))
    if args.csv:
        write_csv("layout_clip", rows, sd.device)


if __name__ == "__main__":
    main()
