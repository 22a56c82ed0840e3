"""Do chosen and optimised noises, and updates while denoising, make images show what was asked for?

    python -m bench.alignment --csv --sheets out            # the embedded model and the pixel detector
    python -m bench.alignment --model sd14 --set animals --clip FOLDER --pickscore FOLDER
    python -m bench.alignment --model DIR --prompts FILE --clip FOLDER

Every method gets the same prompts and seeds: `plain` sampling; `select`, the best of five seeds by
attention score (the image's own seed is one of them); `noise`, InitNO's optimised noise alone;
`excite`, Attend-and-Excite; `initno`, optimised noise and updates. With the embedded model a
detector that sees only pixels judges the images, and gains over plain are paired, image by image.
With real checkpoints CLIP measures the similarity of an image to its prompt, and to the half of
the prompt that it neglects more (the smaller of the two similarities); PickScore predicts which
images people prefer.

The prompts of the Attend-and-Excite paper are made from its word lists. The paper drew the colours
at random; here they are drawn anew (`--prompts` takes any list). UNet rows count every image of
every evaluation, including early-stopped ones with gradients. On a busy machine trust
`cpu_seconds` rather than `seconds`.
"""

import argparse
import itertools
import math
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import Row, loaded, parser, pool, print_table, write_csv
from bench.shapes import BATCH, GROUPS, Subjects, cases, sentence, summary
from minsd.config import MODELS
from minsd.guidance import counted
from minsd.image import contact_sheet
from minsd.noise import excite, initno, losses
from minsd.noise.initial import noise as draw_noise
from minsd.pipeline import StableDiffusion, load
from minsd.weights.shapes import detector

METHODS = ("plain", "select", "noise", "excite", "initno")
CANDIDATES = 5  # seeds that `select` scores per image
SHOWN = 10  # rows of a sheet: the first seeds

ANIMALS = tuple("cat dog bird bear lion horse elephant monkey frog turtle rabbit mouse".split())
THINGS = "backpack glasses crown suitcase chair balloon bow car bowl bench clock apple"
OBJECTS = tuple(THINGS.split())
COLOURS = tuple("red orange yellow green blue purple pink brown gray black white".split())

Costs = dict[str, float]  # unet_rows, seconds, cpu_seconds of one image


class Settings(NamedTuple):
    """The settings that all methods have in common."""

    steps: int
    sampler: str
    guidance_scale: float


def named(word: str) -> str:
    """Returns a word with its article; "glasses" has none."""
    if word == "glasses":
        return word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def attend_and_excite(name: str) -> list[str]:
    """Returns the prompts of a set: 66 pairs of animals, 144 animals with a coloured object, or 66
    pairs of coloured objects."""
    rng = np.random.default_rng(0)

    def coloured(word: str, colour: str) -> str:
        return f"{colour} {word}" if word == "glasses" else f"{named(str(colour))} {word}"

    if name == "animals":
        return [f"{named(a)} and {named(b)}" for a, b in itertools.combinations(ANIMALS, 2)]
    if name == "animals-objects":
        return [
            f"{named(animal)} and {coloured(thing, rng.choice(COLOURS))}"
            for animal, thing in itertools.product(ANIMALS, OBJECTS)
        ]
    return [
        " and ".join(map(coloured, pair, rng.choice(COLOURS, 2, replace=False)))
        for pair in itertools.combinations(OBJECTS, 2)
    ]


# --- the methods ----------------------------------------------------------------------------------


class Cost:
    """UNet rows, seconds and processor seconds, summed over the blocks that `spending` encloses."""

    def __init__(self, sd: StableDiffusion) -> None:
        self.unet = sd.unet
        self.total = np.zeros(3)

    @contextmanager
    def spending(self) -> Iterator[None]:
        begin = np.array([0, time.perf_counter(), time.process_time()])
        with counted(self.unet) as rows:
            yield
        self.total += np.array([sum(rows), time.perf_counter(), time.process_time()]) - begin

    def per_image(self, images: int) -> Costs:
        unet_rows, seconds, cpu_seconds = self.total / images
        return {"unet_rows": unet_rows, "seconds": seconds, "cpu_seconds": cpu_seconds}


def selected(
    sd: StableDiffusion, prompts: list[str], subjects: list[list[str]], seeds: list[int], **run: Any
) -> list[int]:
    """Returns, for each image, the seed with the best attention score among its own and further
    ones."""
    chosen = []
    for prompt, words, seed in zip(prompts, subjects, seeds):
        first = 100_000 + seed * CANDIDATES
        candidates = [seed, *range(first, first + CANDIDATES - 1)]
        scores = initno.attention_scores(sd, prompt, words, candidates, **run)
        chosen.append(candidates[int(np.argmin(scores))])
    return chosen


def draw(
    sd: StableDiffusion, methods: Sequence[str], prompts: list[str], seeds: list[int], settings: Settings
) -> dict[str, tuple[list[Image.Image], Costs]]:
    """Returns {method: (images, the costs of one)} for a batch of prompts and their seeds."""
    shape = (4, sd.config.size // 8, sd.config.size // 8)
    run: dict[str, Any] = {"steps": settings.steps, "sampler": settings.sampler}
    subjects = [losses.automatic_subjects(prompt) for prompt in prompts]
    plain = draw_noise(seeds, shape)
    optimised: Tensor | None = None
    optimising = Cost(sd)  # done once for two methods, and part of the costs of both
    out = {}
    for method in methods:
        cost = Cost(sd)
        x = plain
        if method in ("noise", "initno"):
            if optimised is None:
                with optimising.spending():
                    results = initno.optimize_batch(sd, prompts, subjects, seeds, **run)
                    optimised = torch.cat([result.noise for result in results])
            cost.total += optimising.total
            x = optimised
        with cost.spending():
            refine = None
            if method == "select":
                x = draw_noise(selected(sd, prompts, subjects, seeds, **run), shape)
            if method in ("excite", "initno"):
                variant = "official" if method == "initno" else "attend-and-excite"
                refine = excite.updates(sd, prompts, subjects, variant=variant, **run)
            scale = settings.guidance_scale
            latents = sd.sample(prompts, x, seeds=seeds, refine=refine, guidance_scale=scale, **run)
            images = sd.decode(latents)
        out[method] = images, cost.per_image(len(prompts))
    return out


# --- the embedded model: right or wrong -----------------------------------------------------------


class Judged(NamedTuple):
    """One image of one method, its verdict and its costs."""

    subjects: Subjects
    seed: int
    pixels: np.ndarray  # (H,W,3) uint8
    verdict: detector.Verdict
    costs: Costs


class Job(NamedTuple):
    """A batch of one group of prompts, for a process of the pool."""

    model: str
    group: str
    n: int  # images of the group
    start: int  # of this batch in it
    methods: tuple[str, ...]
    settings: Settings
    keep: Path | None  # folder of finished jobs

    @property
    def numbers(self) -> list[int]:
        """Returns the seeds, and the images' places in the group."""
        return list(range(self.start, min(self.start + BATCH, self.n)))

    @property
    def file(self) -> Path | None:
        if self.keep is None:
            return None
        end = min(self.start + BATCH, self.n)
        return self.keep / f"{self.group}-{self.start}-{end}-{'-'.join(map(str, self.settings))}.pickle"


def _job(job: Job) -> dict[str, list[Judged]]:
    """Returns {method: judged images}. With --keep they are read from the job's file, or written to
    it."""
    if job.file and job.file.exists():
        kept = pickle.loads(job.file.read_bytes())
        if all(method in kept for method in job.methods):
            return {method: [Judged(*values) for values in judged] for method, judged in kept.items()}
    subjects = [cases(job.group, job.n)[k] for k in job.numbers]
    prompts = [sentence(these) for these in subjects]
    drawn = draw(loaded(job.model), job.methods, prompts, job.numbers, job.settings)
    results = {}
    for method, (images, costs) in drawn.items():
        results[method] = [
            Judged(these, k, np.asarray(image), detector.judge(image, these), costs)
            for these, k, image in zip(subjects, job.numbers, images)
        ]
    if job.file:
        job.file.parent.mkdir(parents=True, exist_ok=True)
        part = job.file.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps({m: [tuple(r) for r in judged] for m, judged in results.items()}))
        part.rename(job.file)
    return results


def gain(results: Sequence[Judged], plain: Sequence[Judged]) -> Row:
    """Returns the fraction of images without neglect, minus that of plain images, with a paired 95
    % interval."""
    change = np.array(
        [float(a.verdict.no_neglect) - float(b.verdict.no_neglect) for a, b in zip(results, plain)]
    )
    half = 1.96 * change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.nan
    mean = change.mean()
    return {
        "gain": round(mean, 3),
        "gain_95": f"{mean - half:+.3f}..{mean + half:+.3f}",
        "repaired": int((change > 0).sum()),
        "broken": int((change < 0).sum()),
    }


def mean_costs(costs: Sequence[Costs], digits: int) -> Costs:
    return {key: round(float(np.mean([cost[key] for cost in costs])), digits) for key in costs[0]}


def on_embedded_model(args: argparse.Namespace, settings: Settings) -> list[Row]:
    """Returns the table of the embedded model."""
    torch.set_num_threads(1)
    loaded(args.model)
    rows = []
    with pool(args.workers, args.model) as processes:
        for group in args.groups:
            jobs = [
                Job(args.model, group, args.n, start, tuple(args.methods), settings, args.keep)
                for start in range(0, args.n, BATCH)
            ]
            results: dict[str, list[Judged]] = {method: [] for method in args.methods}
            for done, part in enumerate(processes.imap(_job, jobs), 1):
                for method in args.methods:
                    results[method] += part[method]
                rates = ", ".join(
                    f"{method} {np.mean([r.verdict.no_neglect for r in judged]):.2f}"
                    for method, judged in results.items()
                )
                print(f"{group}: {min(done * BATCH, args.n)}/{args.n} {rates}", flush=True)
            new = []
            for method, judged in results.items():
                row: Row = {"model": args.model, "group": group, "method": method, **settings._asdict()}
                row |= gain(judged, results["plain"])
                row |= summary([r.verdict for r in judged])
                new.append(row | mean_costs([r.costs for r in judged], 2))
            rows += new
            if args.csv:
                write_csv("alignment", new)
            if args.sheets:
                shown = [judged[k] for k in range(min(SHOWN, args.n)) for judged in results.values()]
                captions = [f"{m} {k}" for k in range(min(SHOWN, args.n)) for m in results]
                pairs = [
                    (Image.fromarray(r.pixels), f"{caption}: {r.verdict.kind}")
                    for r, caption in zip(shown, captions)
                ]
                save_sheet(args.sheets / f"alignment-{group}.png", pairs, len(args.methods))
    return rows


# --- real checkpoints: similarities ---------------------------------------------------------------


class Similarity:
    """A CLIPModel loaded from files, which gives cosines of images with texts."""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        # Without this check transformers takes the folder for a hub id, and its error fills a page.
        if not (folder / "config.json").is_file():
            sys.exit(f"{folder} holds no config.json: give the folder of a CLIPModel with its processor")
        self.model: Any
        self.processor: Any
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            sys.exit(f"{folder} is no CLIPModel with its processor: {str(error).splitlines()[0]}")
        self.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """Returns the cosine of each image with its text."""
        inputs = self.processor(
            text=list(texts), images=list(images), return_tensors="pt", padding=True, truncation=True
        )
        embedded = self.model(**inputs.to(self.model.device))
        return (embedded.image_embeds * embedded.text_embeds).sum(1).tolist()  # both of unit length

    @property
    def scale(self) -> float:
        """Returns PickScore's factor."""
        return float(self.model.logit_scale.exp())


def scores(
    images: list[Image.Image], prompts: list[str], clip: Similarity | None, pick: Similarity | None
) -> list[dict[str, float]]:
    """Returns the similarities of each image."""
    out: list[dict[str, float]] = [{} for _ in images]
    if clip:
        halves = [prompt.split(" and ", 1) for prompt in prompts]
        whole = clip(images, prompts)
        first = clip(images, [half[0] for half in halves])
        second = clip(images, [half[-1] for half in halves])
        for row, full, a, b in zip(out, whole, first, second):
            row |= {"clip": full, "clip_least_half": min(a, b)}
    if pick:
        for row, value in zip(out, pick(images, prompts)):
            row["pickscore"] = value * pick.scale
    return out


def on_checkpoint(args: argparse.Namespace, settings: Settings) -> list[Row]:
    """Returns the table of a real checkpoint."""
    sd = load(args.model, args.device)
    clip, pick = (Similarity(folder, sd.device) if folder else None for folder in (args.clip, args.pickscore))
    name = args.prompts.stem if args.prompts else args.set
    if args.prompts:
        prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    else:
        prompts = attend_and_excite(args.set)
    pairs = [(prompt, seed) for prompt in prompts[: args.n] for seed in range(args.seeds)]
    results: dict[str, list[Costs]] = {method: [] for method in args.methods}
    shown: list[tuple[int, str, Image.Image]] = []
    size = sd.batch_size(sd.config.size, sd.config.size)
    for start in range(0, len(pairs), size):
        these, seeds = map(list, zip(*pairs[start : start + size]))
        for method, (images, costs) in draw(sd, args.methods, these, seeds, settings).items():
            results[method] += [costs | score for score in scores(images, these, clip, pick)]
            shown += [(start + k, method, image) for k, image in enumerate(images) if start + k < SHOWN]
        print(f"{min(start + size, len(pairs))}/{len(pairs)}", flush=True)
    if args.sheets:
        shown.sort(key=lambda entry: (entry[0], args.methods.index(entry[1])))
        captioned = [
            (image.resize((256, 256)), f"{method} {pairs[k][0]} {pairs[k][1]}"[:40])
            for k, method, image in shown
        ]
        save_sheet(args.sheets / f"alignment-{name}.png", captioned, len(args.methods))
    rows = []
    for method, costs in results.items():
        row: Row = {"model": args.model, "prompts": name, "method": method, "n": len(pairs)}
        rows.append(row | settings._asdict() | mean_costs(costs, 4))
    if args.csv:
        write_csv("alignment_clip", rows, sd.device)
    return rows


def save_sheet(path: Path, images: Sequence[tuple[Image.Image, str]], columns: int) -> None:
    """Saves a sheet in 128 colours, because sheets are kept in the repository. On images of shapes
    the loss is hardly visible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet([image for image, _ in images], columns, [caption for _, caption in images])
    sheet.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def read_options() -> argparse.Namespace:
    options = parser(__doc__, "alignment", "alignment_clip")
    options.add_argument(
        "--model",
        default="shapes",
        help="as minsd.generate takes it (default: shapes, judged by the detector)",
    )
    options.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all; plain is always added"
    )
    options.add_argument(
        "--groups",
        nargs="+",
        choices=GROUPS,
        default=("two", "three", "held-out-pair"),
        help="of the embedded model's prompts (default: two three held-out-pair)",
    )
    options.add_argument(
        "-n", type=int, default=200, help="images per group and method; prompts of a set (default: 200)"
    )
    options.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    options.add_argument("--sampler", help="default: the model's")
    options.add_argument("--guidance-scale", type=float, help="default: the model's")
    options.add_argument(
        "--set",
        choices=("animals", "animals-objects", "objects"),
        default="animals",
        help="prompts for real checkpoints (default: animals)",
    )
    options.add_argument("--prompts", type=Path, help="text file, one prompt per line, for --set")
    options.add_argument(
        "--seeds", type=int, default=4, help="images per prompt of a set or file (default: 4)"
    )
    options.add_argument("--clip", type=Path, help="folder of a CLIPModel (ViT-B/16)")
    options.add_argument("--pickscore", type=Path, help="folder of PickScore")
    options.add_argument("--device", help="for real checkpoints (default: CUDA if there is a GPU)")
    options.add_argument("--keep", type=Path, help="folder of finished parts of the embedded model's table")
    options.add_argument("--sheets", type=Path, help="folder for contact sheets, methods by seeds")
    options.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)"
    )
    args = options.parse_args()
    if args.prompts and not args.prompts.is_file():
        options.error(f"there is no file {args.prompts}: --prompts takes a text file, one prompt per line")
    args.methods = [m for m in METHODS if m in args.methods or m == "plain"]  # gains are over plain
    return args


def main() -> None:
    args = read_options()
    config = MODELS.get(args.model, MODELS["sd15"])
    settings = Settings(
        args.steps or config.steps,
        args.sampler or config.sampler,
        config.guidance_scale if args.guidance_scale is None else args.guidance_scale,
    )
    judged = args.model == "shapes" and not args.prompts
    rows = (on_embedded_model if judged else on_checkpoint)(args, settings)
    print_table([{k: v for k, v in row.items() if k not in ("steps", "sampler")} for row in rows])


if __name__ == "__main__":
    main()
