"""Which method most often draws what the prompt names, and at what cost in time?

    python -m bench.methods --csv --keep out --sheets out    # 200 prompts per group: hours
    python -m bench.methods --quick                          # 10 per group and few methods: minutes
    python -m bench.methods --tune 40 --keep out             # step sizes first, on separate seeds
    python -m bench.methods --plot methods.png               # from bench/results/methods.csv

Every method of noise/objectives/ draws the same prompts with the embedded model from the same
seeds: two objects, three objects, and two objects of which one has a colour that training never
showed on its shape (`binding`). A detector that reads only pixels judges the images: right (exactly
the prompt's objects), without neglect (no object is missing), and with the right colours. Gains
over plain sampling are paired, image by image. `pick-K` draws the best of K seeds by attention
score. A method is worthwhile only if it is better than its rival, the `pick-K` that takes the most
similar time; the column `over_rival_95` is the paired difference.

Each method has its published settings. `--tune` draws prompts and seeds that the table does not
use with several step sizes (`--factors`, multiples of the published one; 1/40 of it on the embedded
model), chooses each method's best factor, and writes it to the file scales.json in the folder
`--keep`. A table whose `--keep` folder has this file uses these factors, and otherwise 1. Seconds
are processor seconds of one thread, per image, so that other work on the machine does not count.
Finished parts are kept in the folder `--keep`, so a stopped run can be continued, and `--report`
makes the table of the parts finished so far.
"""

import argparse
import csv
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import RESULTS, Row, forget_peak, loaded, parser, peak_mb, pool, print_table, rate, write_csv
from bench.alignment import Cost, save_sheet
from bench.shapes import BATCH, Subjects, cases, sentence
from minsd.noise import best, initno, look, steer
from minsd.noise.drivers import SHARE
from minsd.noise.initial import candidate_seeds
from minsd.noise.initial import noise as draw_noise
from minsd.pipeline import StableDiffusion
from minsd.weights.shapes import data, detector

GROUPS = ("two", "three", "binding")
SHOWN = 8  # rows of a sheet
TUNED = 1_000_000  # seeds of --tune begin here
MOVED = frozenset(("hybrid", "mixed", "wrong colour"))  # failures of colours
SCALES = "scales.json"  # in the folder --keep: method -> factor, as `--tune` has chosen
PRINTED = ("rival", "over_rival_95")  # columns of the printed table alone


class Method(NamedTuple):
    """One method: how an image's noise is chosen or optimised, and how its latents are updated
    while denoising. `objective`, `driver` and `settings` are those of noise/steer.py."""

    objective: str | None = None
    driver: str | None = None
    settings: dict[str, Any] = {}
    pick: int = 0  # first choose the best of so many seeds by attention score
    best: bool = False  # or first choose the seed by noise/best.py
    initno: bool = False  # then optimise that seed's noise by InitNO


METHODS = {
    "plain": Method(),
    "pick-5": Method(pick=5),
    "pick-16": Method(pick=16),
    "pick-50": Method(pick=50),
    "zero-order": Method("initno", "select", {"search": "zero-order"}),
    "initno-noise": Method(initno=True),
    "excite": Method("excite"),
    "initno": Method("initno", initno=True),
    "pick-16+initno": Method("initno", pick=16, initno=True),
    "pick-16+initno-noise": Method(pick=16, initno=True),
    "best": Method(best=True),
    "best+initno": Method("initno", best=True, initno=True),
    "syngen": Method("syngen"),
    "divide": Method("divide"),
    "contrast": Method("contrast"),
    "overlap": Method("overlap"),
    "nlg": Method("nlg"),
    "optimize-excite": Method("excite", "optimize", {"steps": 10}),
    "saga": Method("saga"),
}
PICKS = ("plain", "pick-5", "pick-16", "pick-50")  # what every method is compared with at equal time
QUICK = ("plain", "pick-5", "excite", "syngen")


def group_cases(group: str, n: int, tune: bool) -> list[Subjects]:
    """Returns the subjects of `n` prompts of a group (one of GROUPS): for each prompt, a list of
    (colour, shape) pairs. If `tune` is True, the prompts are those for choosing step sizes,
    otherwise those for comparing the methods. The two sets are drawn independently."""
    if group != "binding" and not tune:
        return cases(group, n)
    rng = np.random.default_rng((31, GROUPS.index(group), tune))
    if group != "binding":
        return [data.draw_subjects(rng, {"two": 2, "three": 3}[group]) for _ in range(n)]
    held = sorted(data.HELD_OUT)
    out: list[Subjects] = []
    while len(out) < n:
        colour, shape = held[len(out) % len(held)]
        (other, name), *_ = data.draw_subjects(rng, 1)
        if other != colour and name != shape:
            pair = [(colour, shape), (other, name)]
            out.append(pair if rng.random() < 0.5 else pair[::-1])
    return out


def draw(
    sd: StableDiffusion, method: Method, prompts: list[str], seeds: list[int]
) -> tuple[list[Image.Image], dict[str, float]]:
    """Draws a batch by one method, with one prompt and seed per image. Returns (images, costs),
    where costs is a dict name -> cost per image (seconds, UNet rows, memory)."""
    cost = Cost(sd)
    shape = (4, sd.config.size // 8, sd.config.size // 8)
    rows: Counter[str] = Counter()
    forget_peak("cpu")
    with cost.spending():
        asks = look.ask(sd, prompts, seeds)
        starts = seeds
        if method.pick:
            starts = [picked(sd, prompt, seed, method.pick) for prompt, seed in zip(prompts, seeds)]
        if method.best:
            listed = [candidate_seeds(seed, best.CANDIDATES) for seed in seeds]
            config = sd.config
            course = best.Course(config.steps, config.sampler, guidance_scale=config.guidance_scale)
            chosen = best.choose(sd, prompts, [None] * len(prompts), listed, shape, course)
            starts = [one.seed for one in chosen]
        x = draw_noise(starts, shape)
        if method.initno:
            results = initno.optimize_batch(sd, prompts, [None] * len(prompts), starts)
            x = torch.cat([result.noise for result in results])
        x, refine, end, run = steered(sd, method, asks, starts, x)
        images = sd.decode(sd.sample(prompts, x, seeds=starts, refine=refine))
        end()
    for record in [] if run is None else run.records:
        rows.update(record["rows"])
    costs = cost.per_image(len(prompts)) | {"peak_mb": peak_mb()}
    costs |= {kind: rows[kind] / len(prompts) for kind in ("gradient", "stopped")}
    return images, costs


def steered(
    sd: StableDiffusion, method: Method, asks: list[look.Ask], seeds: list[int], x: Tensor
) -> tuple[Tensor, Any, Callable[[], None], steer.Run | None]:
    """Applies a method's objective to noise `x` (B,4,h,w) of the images that `asks` describes and
    whose seeds are `seeds`. Returns (noise, refine, end, run).

    `noise` (B,4,h,w) is `x`, or other noise if the objective chooses or optimises noise. `refine`
    is the function that updates the latents while denoising, or None. `end` is a function without
    arguments, to be called after denoising. `run` is the `steer.Run` that applies the objective and
    records the costs, or None if the method has no objective.
    """

    def nothing() -> None: ...

    if method.objective is None:
        return x, None, nothing, None
    chosen = steer.choose(method.objective, driver=method.driver, settings=method.settings)
    run = steer.Run(sd, chosen, asks)
    if chosen.driver != "refine":
        return run.noise(seeds, x.shape[1:]), None, nothing, run
    return x, *run.refine(), run


def picked(sd: StableDiffusion, prompt: str, seed: int, count: int) -> int:
    """Chooses a seed for an image by attention score (InitNO's losses of the noise for this
    prompt). There are `count` candidates: the image's own `seed`, and others derived from it.
    Returns the best candidate."""
    candidates = candidate_seeds(seed, count)
    return candidates[int(np.argmin(initno.attention_scores(sd, prompt, None, candidates)))]


# --- jobs ----------------------------------------------------------------------------------------


class Job(NamedTuple):
    """The task of one process of the pool: to draw one batch of a group's n prompts, beginning with
    number `start`, by one method."""

    model: str
    group: str
    method: str
    scale: float  # factor of the step scale
    n: int
    start: int
    tune: bool
    keep: Path

    @property
    def file(self) -> Path:
        end = min(self.start + BATCH, self.n)
        kind = "tune" if self.tune else "table"
        return self.keep / f"{kind}-{self.group}-{self.method}-{self.scale:g}-{self.start}-{end}.json"


class Judged(NamedTuple):
    """The detector's verdict on one image, and the costs of the image."""

    right: bool
    no_neglect: bool
    colours: bool
    kind: str
    costs: dict[str, float]


def steps(name: str) -> bool:
    """Returns True if the method called `name` has a step size. Three kinds of method have none:
    those without an objective, those that only choose between seeds (driver "select"), and SAGA,
    which computes the sizes of its updates itself."""
    method = METHODS[name]
    return method.objective not in (None, "saga") and method.driver != "select"


def scaled(sd: StableDiffusion, name: str, factor: float) -> Method:
    """Returns the method called `name` with its step size multiplied by `factor`. Methods without a
    step size are returned unchanged."""
    method = METHODS[name]
    if factor == 1 or not steps(name):
        return method
    if method.objective == "nlg":
        size = {"lr": 1.0}
    elif method.driver == "optimize":
        size = {"share": SHARE}
    else:
        size = {"scale": sd.config.update_scale}
    changed = {key: factor * value for key, value in size.items()}
    return method._replace(settings={**method.settings, **changed})


def work(job: Job) -> Job:
    """Draws and judges the batch that the job describes, and writes the result to `job.file`. Does
    nothing if that file exists. Returns the job."""
    if not job.file.exists():
        sd = loaded(job.model)
        numbers = list(range(job.start, min(job.start + BATCH, job.n)))
        these = [group_cases(job.group, job.n, job.tune)[k] for k in numbers]
        seeds = [k + TUNED * job.tune for k in numbers]
        images, costs = draw(sd, scaled(sd, job.method, job.scale), [sentence(s) for s in these], seeds)
        verdicts = [detector.judge(image, s) for image, s in zip(images, these)]
        found = [Judged(v.strict, v.no_neglect, not MOVED & set(v.failures), v.kind, costs) for v in verdicts]
        if not job.tune and job.start < SHOWN:
            for k, image in zip(numbers, images):
                image.save(job.keep / f"{job.group}-{job.method}-{k}.png")
        part = job.file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found))
        part.rename(job.file)
    return job


def read(job: Job) -> list[Judged]:
    return [Judged(*values) for values in json.loads(job.file.read_text())]


def all_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Yields the jobs (batches to draw by one method). The jobs of all methods for one batch of
    prompts come before those for the next batch, so that a stopped run can still compare methods on
    the same prompts."""
    n = args.tune or args.n
    scales = {} if args.tune else read_scales(args.keep)
    for start in range(0, n, BATCH):
        for group in args.groups:
            for method in args.methods:
                tried = args.factors if steps(method) else []
                for scale in tried if args.tune else [scales.get(method, 1.0)]:
                    yield Job(args.model, group, method, scale, n, start, bool(args.tune), args.keep)


# --- tables --------------------------------------------------------------------------------------


def paired(ours: Sequence[Judged], others: Sequence[Judged]) -> str:
    """Compares two methods on the same prompts: item k of `ours` and item k of `others` are images
    of the same prompt. Returns, as text, the rate of images without neglect in `ours` minus that in
    `others`, and its 95 % interval. Neglect means that an object is missing, merged, or in a wrong
    colour."""
    change = np.array([float(a.no_neglect) - float(b.no_neglect) for a, b in zip(ours, others)])
    half = 1.96 * change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.nan
    return f"{change.mean():+.3f} [{change.mean() - half:+.3f}, {change.mean() + half:+.3f}]"


def table(jobs: Sequence[Job]) -> list[Row]:
    """Makes the table from those jobs (batches drawn by one method) that are finished. Returns one
    row per group, method and `scale` (the factor of the method's step size). A group's rows contain
    only the prompts that have been drawn by all its methods."""
    there = [job for job in jobs if job.file.exists()]
    rows = []
    for group in dict.fromkeys(job.group for job in there):
        keys = dict.fromkeys((job.method, job.scale) for job in jobs if job.group == group)
        found = {
            key: {j.start: read(j) for j in there if (j.group, j.method, j.scale) == (group, *key)}
            for key in keys
        }
        shared = sorted(set.intersection(*(set(parts) for parts in found.values())))
        images = {key: [one for start in shared for one in parts[start]] for key, parts in found.items()}
        for (method, scale), judged in images.items() if shared else ():
            row: Row = {"group": group, "method": method, "scale": scale, "n": len(judged)}
            row |= rate("right", sum(j.right for j in judged), len(judged))
            row |= rate("no_neglect", sum(j.no_neglect for j in judged), len(judged))
            row |= rate("right_colours", sum(j.colours for j in judged), len(judged))
            row["gain_no_neglect_95"] = paired(judged, images.get(("plain", 1.0), judged))
            for key in ("cpu_seconds", "unet_rows", "gradient", "stopped", "peak_mb"):
                row[key] = round(float(np.mean([j.costs[key] for j in judged])), 2)
            rival = rival_of(method, images)
            row["rival"] = rival[0]
            row["over_rival_95"] = paired(judged, images.get(rival, judged))
            rows.append(row)
    return rows


def rival_of(method: str, images: Mapping[tuple[str, float], Sequence[Judged]]) -> tuple[str, float]:
    """Returns the rival of a method, as (name, scale). The possible rivals are plain sampling and
    the methods `pick-K`, but never the method itself. Of these, the rival is the one whose time per
    image is closest to the method's, as a ratio. If there is none, returns ("", 1).

    `images` maps the (name, scale) of each method to its judged images. The scale is the factor of
    the step size.
    """
    seconds = {key: np.mean([j.costs["cpu_seconds"] for j in judged]) for key, judged in images.items()}
    [own] = [value for key, value in seconds.items() if key[0] == method][:1]
    rivals = [key for key in seconds if key[0] in PICKS and key[0] != method]
    return min(rivals, key=lambda key: abs(math.log(seconds[key] / own)), default=("", 1.0))


def chosen_scales(rows: Sequence[Row]) -> dict[str, float]:
    """Returns a dict method -> best factor of its step size, from the rows of `--tune`.

    The best factor is the one with the most images without neglect, over all groups. If several
    factors are equal in this, the one with the most right images is chosen. If several are still
    equal, the one closest to 1 (the published step size) is chosen.
    """
    totals: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        total = totals.setdefault((row["method"], row["scale"]), [0.0, 0.0])
        total[0] += row["n"] * row["no_neglect"]
        total[1] += row["n"] * row["right"]
    ranked = sorted(totals, key=lambda key: (*(-round(x, 2) for x in totals[key]), abs(math.log(key[1]))))
    return {method: scale for method, scale in reversed(ranked)}


def read_scales(keep: Path) -> dict[str, float]:
    """Returns the factors that `--tune` has written to the folder `keep`, by method."""
    path = keep / SCALES
    return json.loads(path.read_text()) if path.exists() else {}


def recorded() -> list[Row]:
    """Returns the rows of bench/results/methods.csv, the last one of each group and method."""
    with (RESULTS / "methods.csv").open(newline="") as file:
        rows = {(row["group"], row["method"]): row for row in csv.DictReader(file)}
    numbers = ("cpu_seconds", "no_neglect")
    return [row | {name: float(row[name]) for name in numbers} for row in rows.values()]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plots, for each group, the rate of images without neglect, with its 95 % interval, against
    processor seconds. A grey line joins the methods whose rate is greater than that of every faster
    method."""
    import matplotlib  # pyright: ignore[reportMissingImports]  (of the extra "bench")

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure, axes = pyplot.subplots(1, len(groups), figsize=(5 * len(groups), 4), squeeze=False)
    for axis, group in zip(axes[0], groups):
        points = sorted((r["cpu_seconds"], r["no_neglect"], r["method"]) for r in rows if r["group"] == group)
        front = [p for k, p in enumerate(points) if all(p[1] > q[1] for q in points[:k])]
        axis.plot([p[0] for p in front], [p[1] for p in front], color="0.7")
        for row in rows:
            if row["group"] == group:
                ends = [float(end) for end in row["no_neglect_95"].split("-")]
                axis.plot([row["cpu_seconds"]] * 2, ends, color="tab:blue", alpha=0.3)
        for seconds, value, method in points:
            axis.plot(seconds, value, "o", color="tab:blue")
            axis.annotate(method, (seconds, value), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(title=group, xlabel="processor seconds per image", ylabel="without neglect", xscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def save_sheets(args: argparse.Namespace) -> None:
    """Saves one contact sheet per group to the folder --sheets: a row per prompt, a column per
    method."""
    for group in args.groups:
        tiles = []
        for k in range(SHOWN):
            for method in args.methods:
                path = args.keep / f"{group}-{method}-{k}.png"
                if path.exists():
                    tiles.append((Image.open(path).convert("RGB"), f"{method} {k}"))
        if tiles:
            save_sheet(args.sheets / f"methods-{group}.png", tiles, len(args.methods))


def main() -> None:
    options = parser(__doc__, "methods")
    options.add_argument("--model", default="shapes", help="shapes (the default), or a folder like it")
    options.add_argument("--methods", nargs="+", choices=METHODS, help="default: all; plain is always added")
    options.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="default: all")
    options.add_argument("-n", type=int, default=200, help="prompts per group (default: 200)")
    options.add_argument("--quick", action="store_true", help="10 prompts of a group, few methods")
    options.add_argument("--tune", type=int, default=0, metavar="N", help="try step scales on N prompts")
    options.add_argument("--factors", type=float, nargs="+", default=[0.5, 1, 2, 4], help="of --tune")
    options.add_argument(
        "--keep", type=Path, default=Path("out"), help="folder of finished parts (default: out)"
    )
    options.add_argument("--report", action="store_true", help="draw nothing: the table of what is there")
    options.add_argument("--sheets", type=Path, help="folder for a contact sheet per group, and the plot")
    options.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)"
    )
    options.add_argument("--plot", type=Path, metavar="FILE", help="only plot the rows of methods.csv")
    args = options.parse_args()
    if (args.sheets or args.plot) and find_spec("matplotlib") is None:
        options.error("--sheets and --plot need matplotlib: pip install 'minsd[bench]'")
    if args.plot:
        plot(recorded(), args.plot)
        return
    if args.quick:
        args.n, args.groups, args.methods = BATCH, ("two",), args.methods or QUICK
    wanted = args.methods or list(METHODS)
    args.methods = [name for name in METHODS if name in wanted or name == "plain"]
    args.keep.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    jobs = list(all_jobs(args))
    if not args.report:
        loaded(args.model)
        with pool(args.workers, args.model) as processes:
            for done, job in enumerate(processes.imap_unordered(work, jobs), 1):
                print(f"{done}/{len(jobs)} {job.file.name}", flush=True)
    rows = table(jobs)
    if not rows:
        print("no batch is finished for every method yet")
        return
    hidden = ["right_95", "no_neglect_95", "right_colours_95"]
    if args.tune:  # plain sampling is not drawn
        hidden += ["gain_no_neglect_95", *PRINTED]
    print_table([{k: v for k, v in row.items() if k not in hidden} for row in rows])
    if args.tune:
        scales = read_scales(args.keep) | chosen_scales(rows)
        (args.keep / SCALES).write_text(json.dumps(scales))
        print(f"written to {args.keep / SCALES}: {scales}")
    if args.csv:
        kept = [{k: v for k, v in row.items() if k not in PRINTED} for row in rows]
        print("written to", write_csv("methods-tune" if args.tune else "methods", kept))
    if args.sheets and not args.tune:
        args.sheets.mkdir(parents=True, exist_ok=True)
        plot(rows, args.sheets / "methods.png")
        save_sheets(args)


if __name__ == "__main__":
    main()
