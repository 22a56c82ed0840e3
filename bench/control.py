"""What do a ControlNet and a LoRA do to the embedded model's images, and what do they cost?

    python -m minsd.weights.shapes.extras control       # first: trains the ControlNet
    python -m minsd.weights.shapes.extras style         # and the LoRA
    python -m bench.control                      # outlines obeyed and holes made, counted by pixels
    python -m bench.control --cost               # time of a guided step, with and without them

The ControlNet makes objects follow drawn outlines, and the LoRA makes objects with holes. Neither
was trained on the prompts and places that are counted here. `scale` 0 is the model alone. An image
is `strict` if it shows exactly what its caption says (weights/shapes/detector.py). An image with
outlines is `as_asked` if it is strict and each subject overlaps its own filled outline by half or
more (intersection over union). An image with holes is judged with every hole filled, and is
`as_asked` if it is strict and every body (drawn object) has a hole in its middle.

Rates come with 95 % Wilson intervals. Rows go to bench/results/ with --csv.
"""

import contextlib
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import Row, clocked, parser, print_table, rate, report
from bench.shapes import BATCH, Subjects, sentence
from minsd import guidance
from minsd.controlnet import Control, Controlled, ControlNet
from minsd.noise.initial import noise
from minsd.pipeline import StableDiffusion, load
from minsd.weights import lora
from minsd.weights.controlnet import load_controlnet
from minsd.weights.shapes import data, detector, extras

SEED = 11  # of prompts and places; image k starts from noise seed k
GUIDANCE = 5.0
COST_TURNS = 15

Objects = tuple[data.Object, ...]


def cases(count: int, objects: int) -> list[Objects]:
    """Returns `count` random cases. A case is a tuple of `objects` coloured shapes in separate
    places. Each object's combination of colour and shape also occurs in the training images."""
    rng = np.random.default_rng((SEED, objects))
    out = []
    for _ in range(count):
        subjects = data.draw_subjects(rng, objects)
        places = data.place(rng, objects)
        out.append(
            tuple(
                data.Object(colour, shape, *place, rng.uniform(-0.14, 0.14))
                for (colour, shape), place in zip(subjects, places)
            )
        )
    return out


def subjects_of(objects: Objects) -> Subjects:
    return [(o.colour, o.shape) for o in objects]


def filled(image: np.ndarray) -> tuple[np.ndarray, list[bool]]:
    """Fills the hole in the middle of every body (drawn object) with the body's colour. Returns
    (image, holes): the filled image, and for each body whether there was a hole in its middle."""
    pixels = image.astype(np.float32)
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    ground = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), 0)
    foreground = np.linalg.norm(pixels - ground, axis=-1) > detector.FOREGROUND
    grounds = detector.bodies(~foreground)
    enclosed = [part for part in grounds if not (part[[0, -1]].any() or part[:, [0, -1]].any())]
    out = image.copy()
    holes = []
    for body in detector.bodies(foreground):
        padded = np.pad(body, 2)
        beside = padded[:-4, 2:-2] | padded[4:, 2:-2] | padded[2:-2, :-4] | padded[2:-2, 4:]
        hole = np.zeros_like(body)
        for part in enclosed:
            if (part & beside).any():
                hole |= part
        rows, columns = np.nonzero(body | hole)
        holes.append(bool(hole[round(rows.mean()), round(columns.mean())]))
        out[hole] = np.median(image[body], axis=0).astype(np.uint8)
    return out, holes


def is_strict(image: np.ndarray, objects: Objects) -> bool:
    return detector.judge(image, subjects_of(objects)).strict


def is_placed(image: np.ndarray, objects: Objects) -> bool:
    """Returns whether the image shows exactly the objects, and each of them overlaps its own filled
    outline by half or more (intersection over union)."""
    if not is_strict(image, objects):
        return False
    pixels = image.astype(np.float32)
    for o in objects:
        near = np.linalg.norm(pixels - np.array(data.COLOURS[o.colour]), axis=-1) < detector.FAR
        body = max(detector.bodies(near), key=np.sum, default=None)
        wanted = o.mask() > 0.5
        if body is None or (body & wanted).sum() < 0.5 * (body | wanted).sum():
            return False
    return True


def outlines(objects: Objects) -> np.ndarray:
    return np.asarray(extras.outlines(objects))


def draw(
    sd: StableDiffusion, chosen: list[Objects], net: ControlNet | None = None, scale: float = 1.0
) -> list[np.ndarray]:
    """Draws an image for each of the cases `chosen` (tuples of objects). The noise of case k is
    that of seed k. With `net`, a ControlNet with the outlines of the case acts at `scale`. Returns
    the pixels of each image."""
    drawn = []
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        unet = sd.unet
        if net is not None:
            controls = torch.from_numpy(np.stack([outlines(objects) for objects in part]))
            unet = Controlled(sd.unet, [Control(net, controls.permute(0, 3, 1, 2) / 255, scale)])
        prompts = [sentence(subjects_of(objects)) for objects in part]
        cond, uncond = sd.encode_prompt(prompts), sd.encode_prompt("")
        predict = guidance.classifier_free(unet, cond, uncond, sd.config.guidance_scale, sd.schedule)
        latents = sd.denoise(predict, noise(range(start, start + len(part)), (4, 16, 16)))
        drawn += [np.asarray(image) for image in sd.decode(latents)]
    return drawn


def row_of(what: str, objects: int, scale: float, strict: list[bool], asked: list[bool]) -> Row:
    n = len(strict)
    row = {"what": what, "objects": objects, "scale": scale, "n": n}
    return row | rate("strict", sum(strict), n) | rate("as_asked", sum(asked), n)


def count_outlines(sd: StableDiffusion, net: ControlNet, n: int) -> list[Row]:
    rows = []
    for objects in (1, 2, 3):
        chosen = cases(n, objects)
        for scale in (0.0, 1.0):
            images = draw(sd, chosen, net if scale else None, scale)
            strict = [is_strict(image, these) for image, these in zip(images, chosen)]
            asked = [is_placed(image, these) for image, these in zip(images, chosen)]
            rows.append(row_of("outlines", objects, scale, strict, asked))
            print_table(rows[-1:])
    return rows


def count_holes(sd: StableDiffusion, adapter: lora.LoRA, n: int) -> list[Row]:
    rows = []
    for objects in (1, 2):
        chosen = cases(n, objects)
        for scale in (0.0, 1.0):
            kept = lora.merge([(adapter, scale)])
            images = [filled(image) for image in draw(sd, chosen)]
            lora.unmerge(kept)
            strict = [is_strict(image, these) for (image, _), these in zip(images, chosen)]
            asked = [ok and all(holes) for ok, (_, holes) in zip(strict, images)]
            rows.append(row_of("holes", objects, scale, strict, asked))
            print_table(rows[-1:])
    return rows


def cost(sd: StableDiffusion, net: ControlNet, adapter: lora.LoRA) -> list[Row]:
    """Times a guided step of BATCH images with and without the ControlNet and the LoRA. Returns one
    row per variant, with the median milliseconds over several turns."""
    x = noise(range(BATCH), (4, 16, 16)).to(sd.device, sd.dtype)
    uncond = sd.encode_prompt("").expand(BATCH, -1, -1)
    cond = sd.encode_prompt(["a red circle"] * BATCH)
    control = Control(net, torch.zeros(1, 3, data.SIZE, data.SIZE))

    def predictor(unet: Any) -> Callable[[Tensor, int], Tensor]:
        return guidance.classifier_free(unet, cond, uncond, GUIDANCE, sd.schedule)

    def adapted(scales: list[float]) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: lora.per_row([(adapter, scales)])

    ways = {
        "alone": (predictor(sd.unet), lambda: lora.per_row([])),
        "every row adapted": (predictor(sd.unet), adapted([1.0])),
        f"one row in {BATCH} adapted": (predictor(sd.unet), adapted([1.0] + [0.0] * (BATCH - 1))),
        "ControlNet": (predictor(Controlled(sd.unet, [control])), contextlib.nullcontext),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(COST_TURNS + 2):  # the first two are not counted
            for name, (predict, context) in ways.items():
                with context():
                    if turn == 0:
                        predict(x, 500)  # computes the text's keys and values, once
                    times[name].append(1000 * clocked(sd.device, predict, x, 500)[1])
    medians = {name: statistics.median(of[2:]) for name, of in times.items()}
    alone = medians["alone"]
    return [
        {"step": name, "rows": 2 * BATCH, "ms": round(ms, 1), "of_alone": round(ms / alone, 3)}
        for name, ms in medians.items()
    ]


def main() -> None:
    options = parser(__doc__, "control", "control_cost")
    options.add_argument(
        "--extras", type=Path, default=extras.HERE, help="folder of weights.shapes.extras' files"
    )
    options.add_argument("-n", type=int, default=200, help="images per row (default: 200)")
    options.add_argument("--only", choices=("outlines", "holes"), help="count one of the two")
    options.add_argument("--cost", action="store_true", help="measure time instead of counting")
    options.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's number"
    )
    options.add_argument("--device", default="cpu", help="for --cost: cpu (the default) or cuda")
    options.add_argument("--dtype", default="float32", help="for --cost (default: float32)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    sd = load("shapes", args.device, getattr(torch, args.dtype))

    def net() -> ControlNet:
        return load_controlnet(args.extras / "outlines", device=sd.device, dtype=sd.dtype)

    def adapter() -> lora.LoRA:
        return lora.read(args.extras / "pierced.safetensors", sd)

    if args.cost:
        report("control_cost", cost(sd, net(), adapter()), args.csv, args.device)
        return
    rows = []
    if args.only != "holes":
        rows += count_outlines(sd, net(), args.n)
    if args.only != "outlines":
        rows += count_holes(sd, adapter(), args.n)
    report("control", rows, args.csv)


if __name__ == "__main__":
    main()
