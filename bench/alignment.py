"""Do chosen and optimised noises, and updates while denoising, make pictures that show what was asked for?

    python -m bench.alignment --csv --sheets out            # the embedded model, two and three objects, the pixel detector
    python -m bench.alignment --model sd14 --set animals --clip FOLDER --pickscore FOLDER
    python -m bench.alignment --model DIR --prompts FILE --clip FOLDER

Every method gets the same prompts and seeds: `plain` sampling; `select`, the best of five seeds by attention score (the
picture's own first among them); `noise`, InitNO's optimised noise alone; `excite`, Attend-and-Excite; `initno`, optimised
noise and updates. With the embedded model a detector that sees pixels alone says what is right, and gains over plain are
paired, picture by picture. With real checkpoints CLIP says how near a picture is to its prompt, and to the half of it that
it neglects most (the least of the two similarities), and PickScore what people would prefer.

The prompts of the Attend-and-Excite paper are made from its word lists; the colours, which it drew, are drawn here anew
(`--prompts` takes any list). UNet rows count every image of every evaluation, early-stopped ones with gradients included;
on a busy machine `cpu_seconds` say more than `seconds`.
"""

import argparse
import itertools
import math
import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import minsd
from bench import loaded, pool, print_table, write_csv
from bench.shapes import BATCH, GROUPS, cases, sentence, summary
from minsd.image import contact_sheet
from minsd.noise import excite, initno, losses
from minsd.noise.initial import noise as draw_noise
from minsd.weights.shapes import detector

METHODS = ("plain", "select", "noise", "excite", "initno")
CANDIDATES = 5
SHOWN = 10  # rows of a sheet: the first seeds

ANIMALS = (
    "cat",
    "dog",
    "bird",
    "bear",
    "lion",
    "horse",
    "elephant",
    "monkey",
    "frog",
    "turtle",
    "rabbit",
    "mouse",
)
OBJECTS = (
    "backpack",
    "glasses",
    "crown",
    "suitcase",
    "chair",
    "balloon",
    "bow",
    "car",
    "bowl",
    "bench",
    "clock",
    "apple",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white")


def named(word: str) -> str:
    return word if word == "glasses" else f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def attend_and_excite(name: str) -> list[str]:
    """66 pairs of animals, 144 animals with a coloured object, or 66 pairs of coloured objects."""
    rng = np.random.default_rng(0)

    def coloured(word, colour):
        return f"{colour} {word}" if word == "glasses" else f"{named(str(colour))} {word}"

    if name == "animals":
        return [f"{named(a)} and {named(b)}" for a, b in itertools.combinations(ANIMALS, 2)]
    if name == "animals-objects":
        return [
            f"{named(a)} and {coloured(b, rng.choice(COLOURS))}"
            for a, b in itertools.product(ANIMALS, OBJECTS)
        ]
    pairs = itertools.combinations(OBJECTS, 2)
    return [" and ".join(map(coloured, pair, rng.choice(COLOURS, 2, replace=False))) for pair in pairs]


def draw(
    sd, methods, prompts: list[str], seeds: list[int], how: dict
) -> dict[str, tuple[list[Image.Image], dict]]:
    """method -> (pictures, what one of them cost: UNet rows, seconds, and CPU seconds), for a batch of prompts and their seeds."""
    rows, out = [0], {}
    shape = (4, sd.config.size // 8, sd.config.size // 8)
    run = {key: how[key] for key in ("steps", "sampler")}
    subjects = [losses.automatic_subjects(prompt) for prompt in prompts]
    plain, optimised, shared = draw_noise(seeds, shape), None, 0.0

    def count(module, inputs):
        rows[0] += len(inputs[0])

    def now():
        return np.array([rows[0], time.perf_counter(), time.process_time()])

    handle = sd.unet.register_forward_pre_hook(count)
    for method in methods:
        start, x, refine = now(), plain, None
        if method == "select":
            chosen = []
            for prompt, words, seed in zip(prompts, subjects, seeds):
                candidates = [
                    seed,
                    *range(100_000 + seed * CANDIDATES, 100_000 + seed * CANDIDATES + CANDIDATES - 1),
                ]
                scores = initno.attention_scores(sd, prompt, words, candidates, **run)
                chosen.append(candidates[int(np.argmin(scores))])
            x = draw_noise(chosen, shape)
        if method in ("noise", "initno"):
            if optimised is None:  # once for both, and counted in both
                optimised = torch.cat(
                    [r.noise for r in initno.optimize_batch(sd, prompts, subjects, seeds, **run)]
                )
                shared = now() - start
            else:
                start = start - shared
            x = optimised
        if method in ("excite", "initno"):
            variant = "official" if method == "initno" else "attend-and-excite"
            refine = excite.updates(sd, prompts, subjects, variant=variant, **run)
        pictures = sd.decode(sd.sample(prompts, x, seeds=seeds, refine=refine, **how))
        out[method] = (
            pictures,
            dict(zip(("unet_rows", "seconds", "cpu_seconds"), (now() - start) / len(prompts))),
        )
    handle.remove()
    return out


# --- the embedded model: right or wrong -------------------------------------------------------------------------------


def _job(job) -> dict[str, list]:
    """method -> [(subjects, seed, picture, verdict, costs), ...] for a part of a group."""
    model, group, n, start, methods, how, keep = job
    kept = (
        keep and keep / f"{group}-{start}-{min(start + BATCH, n)}-{'-'.join(map(str, how.values()))}.pickle"
    )
    if kept and kept.exists():
        results = pickle.loads(kept.read_bytes())
        if all(method in results for method in methods):
            return results
    numbers = list(range(start, min(start + BATCH, n)))
    subjects = [cases(group, n)[k] for k in numbers]
    drawn = draw(loaded(model), methods, [sentence(s) for s in subjects], numbers, how)
    results = {
        method: [
            (s, k, np.asarray(p), detector.judge(p, s), costs) for s, k, p in zip(subjects, numbers, pictures)
        ]
        for method, (pictures, costs) in drawn.items()
    }
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps(results))
        part.rename(kept)
    return results


def gain(results: list, plain: list) -> dict:
    """How many pictures without neglect more than plain, in points, with the 95 % interval of the paired difference."""
    change = np.array([float(a[3].no_neglect) - float(b[3].no_neglect) for a, b in zip(results, plain)])
    half = 1.96 * change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.nan
    mean = change.mean()
    return {
        "gain": round(mean, 3),
        "gain_95": f"{mean - half:+.3f}..{mean + half:+.3f}",
        "repaired": int((change > 0).sum()),
        "broken": int((change < 0).sum()),
    }


def counted(args, how: dict) -> list[dict]:
    """The table of the embedded model."""
    torch.set_num_threads(1)
    loaded(args.model)
    rows = []
    with pool(args.workers, args.model) as processes:
        for group in args.groups:
            jobs = [
                (args.model, group, args.n, start, args.methods, how, args.keep)
                for start in range(0, args.n, BATCH)
            ]
            results = {method: [] for method in args.methods}
            for done, part in enumerate(processes.imap(_job, jobs), 1):
                for method in args.methods:
                    results[method] += part[method]
                print(
                    f"{group}: {min(done * BATCH, args.n)}/{args.n} "
                    + ", ".join(
                        f"{m} {np.mean([r[3].no_neglect for r in results[m]]):.2f}" for m in args.methods
                    ),
                    flush=True,
                )
            new = []
            for method in args.methods:
                row = {
                    "model": args.model,
                    "group": group,
                    "method": method,
                    **how,
                    **gain(results[method], results["plain"]),
                }
                row |= summary([r[:4] for r in results[method]])
                costs = [r[4] for r in results[method]]
                new.append(row | {key: round(np.mean([c[key] for c in costs]), 2) for key in costs[0]})
            rows += new
            if args.csv:
                write_csv("alignment", new)
            if args.sheets:
                pictures = [
                    (Image.fromarray(results[m][k][2]), f"{m} {k}: {results[m][k][3].kind}")
                    for k in range(min(SHOWN, args.n))
                    for m in args.methods
                ]
                save_sheet(args.sheets / f"alignment-{group}.png", pictures, len(args.methods))
    return rows


# --- real checkpoints: similarities -------------------------------------------------------------------------------------


class Similarity:
    """A CLIPModel from files: cosines of pictures with texts."""

    def __init__(self, folder: Path, device):
        from transformers import CLIPModel, CLIPProcessor

        if not (
            folder / "config.json"
        ).is_file():  # or it would be taken for an id to fetch, and the error would be a page
            sys.exit(f"{folder} holds no config.json: give the folder of a CLIPModel with its processor")
        try:
            self.model = (
                CLIPModel.from_pretrained(folder, local_files_only=True)
                .to(device)
                .eval()
                .requires_grad_(False)
            )
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            sys.exit(f"{folder} is no CLIPModel with its processor: {str(error).splitlines()[0]}")

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image], texts: list[str]) -> list[float]:
        inputs = self.processor(
            text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True
        )
        seen = self.model(**inputs.to(self.model.device))
        return (seen.image_embeds * seen.text_embeds).sum(1).tolist()  # both of unit length


def compared(args, how: dict) -> list[dict]:
    """The table of a real checkpoint."""
    sd = minsd.load(args.model, args.device)
    clip, pick = (Similarity(folder, sd.device) if folder else None for folder in (args.clip, args.pickscore))
    if args.prompts:
        prompts, name = (
            [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()],
            args.prompts.stem,
        )
    else:
        prompts, name = attend_and_excite(args.set), args.set
    prompts = prompts[: args.n]
    kept, scores = [], {method: [] for method in args.methods}
    pairs = [(prompt, seed) for prompt in prompts for seed in range(args.seeds)]
    size = sd.batch_size(sd.config.size, sd.config.size)
    for start in range(0, len(pairs), size):
        these, seeds = map(list, zip(*pairs[start : start + size]))
        for method, (pictures, costs) in draw(sd, args.methods, these, seeds, how).items():
            told = [dict(costs) for _ in these]
            if clip:
                halves = [prompt.split(" and ", 1) for prompt in these]
                columns = [
                    clip(pictures, these),
                    *(clip(pictures, [h[i if i < len(h) else 0] for h in halves]) for i in (0, 1)),
                ]
                for row, full, a, b in zip(told, *columns):
                    row |= {"clip": full, "clip_least_half": min(a, b)}
            if pick:
                for row, value in zip(told, pick(pictures, these)):
                    row["pickscore"] = value * float(pick.model.logit_scale.exp())
            scores[method] += told
            kept += [(start + k, method, picture) for k, picture in enumerate(pictures)]
        print(f"{min(start + size, len(pairs))}/{len(pairs)}", flush=True)
    if args.sheets:
        kept.sort(key=lambda entry: (entry[0], args.methods.index(entry[1])))
        shown = [
            (p.resize((256, 256)), f"{m} {pairs[k][0]} {pairs[k][1]}"[:40])
            for k, m, p in kept[: SHOWN * len(args.methods)]
        ]
        save_sheet(args.sheets / f"alignment-{name}.png", shown, len(args.methods))
    means = [
        {key: round(float(np.mean([row[key] for row in told])), 4) for key in told[0]}
        for told in scores.values()
    ]
    rows = [
        {"model": args.model, "prompts": name, "method": method, "n": len(pairs), **how, **mean}
        for method, mean in zip(scores, means)
    ]
    if args.csv:
        write_csv("alignment_clip", rows, sd.device)
    return rows


def save_sheet(path: Path, pictures: list, columns: int) -> None:
    """In 128 colours, which the eye misses little of in 128x128 pictures of shapes: sheets lie in the repository."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet([p for p, _ in pictures], columns, [caption for _, caption in pictures])
    sheet.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=GROUPS,
        default=("two", "three", "held-out-pair"),
        help="of the embedded model",
    )
    parser.add_argument("-n", type=int, default=200, help="pictures a group and method; prompts of a set")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument(
        "--set",
        choices=("animals", "animals-objects", "objects"),
        default="animals",
        help="prompts for real checkpoints",
    )
    parser.add_argument("--prompts", type=Path, help="a prompt a line")
    parser.add_argument("--seeds", type=int, default=4, help="pictures a prompt of a set or file")
    parser.add_argument("--clip", type=Path, help="folder of a CLIPModel (ViT-B/16)")
    parser.add_argument("--pickscore", type=Path, help="folder of PickScore")
    parser.add_argument("--device")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder where parts of the embedded model's table wait for a run that is cut off",
    )
    parser.add_argument("--sheets", type=Path, help="folder for pictures, methods by seeds")
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.prompts and not args.prompts.is_file():
        parser.error(f"there is no file {args.prompts}: --prompts takes a text file, a prompt a line")
    args.methods = [m for m in METHODS if m in args.methods or m == "plain"]  # gains are over plain
    config = minsd.config.MODELS.get(args.model, minsd.config.MODELS["sd15"])
    how = {
        "steps": args.steps or config.steps,
        "sampler": args.sampler or config.sampler,
        "guidance_scale": config.guidance_scale if args.guidance_scale is None else args.guidance_scale,
    }
    counting = args.model == "shapes" and not args.prompts
    print_table(
        [
            {k: v for k, v in row.items() if k not in ("steps", "sampler")}
            for row in (counted if counting else compared)(args, how)
        ]
    )


if __name__ == "__main__":
    main()
