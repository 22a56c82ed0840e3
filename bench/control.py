"""What a ControlNet and a LoRA do to the embedded model's pictures, counted by pixels, and what they cost.

    python -m minsd.weights.shapes.extras control; python -m minsd.weights.shapes.extras style    # first: makes the files
    python -m bench.control                      # outlines obeyed, holes made, each against the model alone
    python -m bench.control --cost               # time of a guided step: alone, with each, adapters by row

Both are counted on prompts and places that neither has seen, `scale` 0 being the model alone. Outlines: a picture is `strict` when it
shows what its caption says (weights/shapes/detector.py), and `as_asked` when moreover each subject overlaps its own outline, filled,
by half or more (intersection over union). Holes: `strict` with every hole filled up, `as_asked` when moreover every body has a hole
where its middle is.
Rates come with 95 % Wilson intervals; rows go to bench/results/ with --csv.
"""

import argparse
import contextlib
import statistics
from pathlib import Path

import numpy as np
import torch

import minsd
from bench import clocked, print_table, rate, report
from bench.shapes import BATCH, sentence
from minsd import guidance
from minsd.controlnet import Control, Controlled
from minsd.noise.initial import noise
from minsd.weights import lora
from minsd.weights.controlnet import load_controlnet
from minsd.weights.shapes import data, detector, extras

SEED = 11  # of prompts and places; picture k starts from noise seed k


def cases(count: int, objects: int) -> list[tuple[data.Object, ...]]:
    """Objects in places of their own; none held out."""
    rng = np.random.default_rng((SEED, objects))
    out = []
    for _ in range(count):
        subjects, places = data.draw_subjects(rng, objects), data.place(rng, objects)
        out.append(
            tuple(
                data.Object(c, s, *place, rng.uniform(-0.14, 0.14)) for (c, s), place in zip(subjects, places)
            )
        )
    return out


def filled(picture: np.ndarray) -> tuple[np.ndarray, list[bool]]:
    """The picture with every hole of a body in that body's colour, and for each body whether it had one in its middle."""
    pixels = picture.astype(np.float32)
    rim = np.concatenate(
        [side.reshape(-1, 3) for side in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])]
    )
    foreground = np.linalg.norm(pixels - np.median(rim, 0), axis=-1) > detector.FOREGROUND
    out, holes = picture.copy(), []
    enclosed = [
        part for part in detector.bodies(~foreground) if not (part[[0, -1]].any() or part[:, [0, -1]].any())
    ]
    for body in detector.bodies(foreground):
        padded = np.pad(body, 2)
        beside = padded[:-4, 2:-2] | padded[4:, 2:-2] | padded[2:-2, :-4] | padded[2:-2, 4:]
        hole = np.any([part for part in enclosed if (part & beside).any()], axis=0) & np.ones_like(body)
        rows, columns = np.nonzero(body | hole)
        holes.append(bool(hole[round(rows.mean()), round(columns.mean())]))
        out[hole] = np.median(picture[body], axis=0).astype(np.uint8)
    return out, holes


def placed(picture: np.ndarray, objects: tuple[data.Object, ...]) -> bool:
    """Strictly right, and every subject where its outline is."""
    if not detector.judge(picture, [(o.colour, o.shape) for o in objects]).strict:
        return False
    pixels = picture.astype(np.float32)
    distance = {
        o: np.linalg.norm(pixels - np.array(data.COLOURS[o.colour]), axis=-1) < detector.FAR for o in objects
    }
    for o in objects:
        body, wanted = max(detector.bodies(distance[o]), key=np.sum, default=None), o.mask() > 0.5
        if body is None or (body & wanted).sum() < 0.5 * (body | wanted).sum():
            return False
    return True


def draw(sd, chosen: list[tuple[data.Object, ...]], net=None, scale: float = 1.0) -> list[np.ndarray]:
    """Pictures of the cases, as `sd(...)` draws them, with their outlines where there is a net."""
    pictures = []
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        prompts = [sentence([(o.colour, o.shape) for o in objects]) for objects in part]
        unet = sd.unet
        if net is not None:
            images = (
                torch.from_numpy(
                    np.stack([np.asarray(extras.outlines(objects)) for objects in part])
                ).permute(0, 3, 1, 2)
                / 255
            )
            unet = Controlled(sd.unet, [Control(net, images, scale)])
        cond, uncond = sd.encode_prompt(prompts), sd.encode_prompt("")
        predict = guidance.classifier_free(unet, cond, uncond, sd.config.guidance_scale, sd.schedule)
        latents = sd.denoise(predict, noise(range(start, start + len(part)), (4, 16, 16)))
        pictures += [np.asarray(p) for p in sd.decode(latents)]
    return pictures


def count_outlines(sd, net, n: int) -> list[dict]:
    rows = []
    for objects in (1, 2, 3):
        chosen = cases(n, objects)
        for scale in (0.0, 1.0):
            pictures = draw(sd, chosen, net if scale else None, scale)
            strict = sum(
                detector.judge(p, [(o.colour, o.shape) for o in c]).strict for p, c in zip(pictures, chosen)
            )
            asked = sum(placed(p, c) for p, c in zip(pictures, chosen))
            rows.append(
                {
                    "what": "outlines",
                    "objects": objects,
                    "scale": scale,
                    "n": n,
                    **rate("strict", strict, n),
                    **rate("as_asked", asked, n),
                }
            )
            print_table(rows[-1:])
    return rows


def count_holes(sd, adapter, n: int) -> list[dict]:
    rows = []
    for objects in (1, 2):
        chosen = cases(n, objects)
        for scale in (0.0, 1.0):
            kept = lora.merge([(adapter, scale)])
            pictures = [filled(p) for p in draw(sd, chosen)]
            lora.unmerge(kept)
            strict = [
                detector.judge(p, [(o.colour, o.shape) for o in c]).strict
                for (p, _), c in zip(pictures, chosen)
            ]
            asked = [ok and all(holes) for ok, (_, holes) in zip(strict, pictures)]
            rows.append(
                {
                    "what": "holes",
                    "objects": objects,
                    "scale": scale,
                    "n": n,
                    **rate("strict", sum(strict), n),
                    **rate("as_asked", sum(asked), n),
                }
            )
            print_table(rows[-1:])
    return rows


def cost(sd, net, adapter, repeats: int) -> list[dict]:
    """Milliseconds of a guided step of BATCH pictures: medians of turns taken one after the other."""
    x, uncond = noise(range(BATCH), (4, 16, 16)), sd.encode_prompt("").expand(BATCH, -1, -1)
    cond = sd.encode_prompt(["a red circle"] * BATCH)
    images = torch.zeros(1, 3, data.SIZE, data.SIZE)

    def predictor(unet):
        return guidance.classifier_free(unet, cond, uncond, 5.0, sd.schedule)

    one = [1.0] + [0.0] * (BATCH - 1)
    scales = {
        "alone": [],
        "every row adapted": [(adapter, [1.0])],
        f"one row in {BATCH} adapted": [(adapter, one)],
    }
    ways = {name: (predictor(sd.unet), lambda s=s: lora.per_row(s)) for name, s in scales.items()}
    ways["ControlNet"] = predictor(Controlled(sd.unet, [Control(net, images)])), contextlib.nullcontext
    times = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(repeats + 2):
            for name, (predict, context) in ways.items():
                with context():
                    predict(x, 500) if turn == 0 else None  # its keys, once
                    times[name].append(1000 * clocked("cpu", predict, x, 500)[1])
    medians = {name: statistics.median(t[2:]) for name, t in times.items()}
    alone = medians["alone"]
    return [
        {"step": name, "rows": 2 * BATCH, "ms": round(ms, 1), "of_alone": round(ms / alone, 3)}
        for name, ms in medians.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--extras", type=Path, default=extras.HERE, help="where weights.shapes.extras wrote to"
    )
    parser.add_argument("-n", type=int, default=200, help="pictures a row")
    parser.add_argument("--only", choices=("outlines", "holes"), help="one of the two")
    parser.add_argument("--cost", action="store_true", help="time instead of counting")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sd = minsd.load("shapes", "cpu")
    rows, name = [], "control_cost" if args.cost else "control"
    if args.only != "holes" or args.cost:
        net = load_controlnet(args.extras / "outlines", device="cpu", dtype=torch.float32)
    if args.only != "outlines" or args.cost:
        adapter = lora.read(args.extras / "pierced.safetensors", sd)
    if args.cost:
        rows = cost(sd, net, adapter, 15)
    else:
        rows += [] if args.only == "holes" else count_outlines(sd, net, args.n)
        rows += [] if args.only == "outlines" else count_holes(sd, adapter, args.n)
    report(name, rows, args.csv)


if __name__ == "__main__":
    main()
