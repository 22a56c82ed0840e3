"""Jobs to pictures: batches, files, what is done already, several processes.

A job is a dict: everything that one picture is made from, resolved to the last default. It goes into the picture, and
into the line of runs.jsonl that is appended once the picture is in place, so that a line means a picture. Work is split
over processes (torchrun's) job by job from the full list, which every process knows: no two ever talk or wait. Each
writes a file of lines of its own and merges it into runs.jsonl at its end.
"""

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from minsd import __version__, image
from minsd.controlnet import Control, Controlled, read_control_image
from minsd.noise import collage, control, excite, initno, losses, stability
from minsd.noise.initial import noise as draw_noise
from minsd.noise.layout import Layout
from minsd.noise.layout import load as load_layout
from minsd.pipeline import StableDiffusion, first_step
from minsd.samplers import SAMPLERS
from minsd.weights import lora

# What tells one picture from another; all else in a line is how it went.
IDENTITY = (
    "prompt", "negative_prompt", "model", "vae", "tokenizer", "prediction_type", "seed", "sampler", "karras", "steps",
    "guidance_scale", "height", "width", "init_image", "strength", "noise_file", "noise_index", "init_noise", "score",
    "optimize_steps", "optimize_mode", "subjects", "excite", "layout", "controlnet", "control_image", "control_scale", "lora",
    "invert", "dtype",
)


def versions() -> dict[str, str]:
    import transformers

    return {"minsd": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


# --- what is to be done, and what is done ----------------------------------------------------------------------------


def plan(sd: StableDiffusion, args, lines) -> list[dict]:
    """One job a picture, in the order of the prompts and their seeds. `lines`: checked arguments, one for each prompt."""
    once = {
        "model": args.model, "model_hash": sd.model_hash, "vae": args.vae and str(args.vae),
        "tokenizer": args.tokenizer and str(args.tokenizer), "prediction_type": args.prediction_type, "lora": args.lora,
        "attention": args.attention, "device": sd.device.type, "dtype": str(sd.dtype).removeprefix("torch."), "versions": versions(),
    }
    jobs = []
    for line in lines:
        try:
            jobs += jobs_of(sd, args, line, once)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{line.where}{error}") from None
    if args.save_noise is not None and len({(job["height"], job["width"]) for job in jobs}) > 1:
        raise ValueError("--save-noise takes the noise of pictures of one size")
    once_each = list({identity(job): job for job in jobs}.values())
    if len(once_each) < len(jobs) and not args.quiet:
        print(f"minsd: {len(jobs) - len(once_each)} pictures were asked for more than once: each is made once", file=sys.stderr)
    return once_each


def jobs_of(sd: StableDiffusion, args, line, once: dict) -> list[dict]:
    """The jobs of one prompt."""
    settings = {
        "prompt": line.prompt, "negative_prompt": line.negative_prompt or "", **once,
        "sampler": line.sampler or sd.config.sampler, "karras": bool(line.karras),
        "steps": sd.config.steps if line.steps is None else line.steps,
        "guidance_scale": sd.config.guidance_scale if line.guidance_scale is None else line.guidance_scale,
        "height": line.height or sd.config.size, "width": line.width or sd.config.size, "init_noise": line.init_noise,
    }
    if line.looks:
        settings |= {"subjects": subjects_of(sd, args, line), "excite": excitement(line)}
    settings |= {key: value for key in METHOD_OPTIONS if (value := getattr(line, key)) is not None}
    if line.regions is not None:
        line.regions = line.regions.sized(settings["width"], settings["height"])
        if line.init_noise == "select" and line.score == "attention":
            collage.caption_subjects(sd, line.regions)  # says now which caption names none
        settings["layout"] = layout_json(line.regions)
        for note in () if args.quiet else line.regions.notes:
            print(f"minsd: {line.where}{note}", file=sys.stderr)
    if args.controlnet is not None:
        picture = line.control_image or line.regions.control_image
        scale = 1.0 if line.control_scale is None else line.control_scale
        settings |= {"controlnet": str(args.controlnet), "control_image": picture and str(picture), "control_scale": scale}
    if line.invert is not None:
        settings |= {"invert": str(line.invert), "guidance_scale": 1.0 if line.guidance_scale is None else line.guidance_scale}
    if line.init_image is not None:
        settings |= {"init_image": str(line.init_image), "strength": 0.8 if line.strength is None else line.strength}
        first_step(settings["steps"], settings["strength"])
    check_steps(settings["sampler"], settings["steps"], sd.schedule)
    seeds = line.seeds
    if line.noise is not None:
        count = len(read_noise(line.noise, (4, settings["height"] // 8, settings["width"] // 8)))
        seeds = list(range(seeds[0], seeds[0] + count)) if len(seeds) == 1 else seeds
        if count != len(seeds):
            raise ValueError(f"{line.noise} holds {count} noises and {len(seeds)} seeds were given: one a picture")
    return [
        settings | ({"noise_file": str(line.noise), "noise_index": k} if line.noise is not None else {}) | {"seed": seed}
        for k, seed in enumerate(seeds)
    ]


@cache
def check_steps(sampler: str, steps: int, schedule) -> None:
    """ValueError where a sampler does not take so many steps: it is tried on nothing."""
    next(SAMPLERS[sampler](lambda x, t: x, torch.zeros(1, 1, 1, 1), schedule, steps, generator=[torch.Generator()]))


METHOD_OPTIONS = ("candidates", "score", "optimize_steps", "optimize_mode")


def layout_json(layout: Layout) -> dict:
    """What a layout.json with this in it would hold; file names are absolute."""
    regions = []
    for r in layout.regions:
        place = {"box": list(r.box)} if r.box is not None else {"mask": str(r.mask.resolve())}
        more = {"negative_prompt": r.negative_prompt, "weight": r.weight, "control_scale": r.control_scale}
        more["lora"] = [f"{path.resolve()}:{scale}" for path, scale in r.lora]
        if r.control_image is not None:
            more["control_image"] = str(r.control_image.resolve())
        regions.append({"prompt": r.prompt, **place, **more})
    return {"prompt": layout.prompt, "negative_prompt": layout.negative_prompt, "width": layout.width, "height": layout.height,
            "regions": regions}


def subjects_of(sd: StableDiffusion, args, line) -> list[str | int]:
    """The subjects of a line, found in its prompt where it names none. ValueError for what the prompt does not have."""
    subjects = losses.automatic_subjects(line.prompt) if line.subjects is None else line.subjects
    losses.resolve(sd.text, line.prompt, subjects)
    if line.subjects is None and not args.quiet:
        print(f"minsd: subjects: {', '.join(subjects)}", file=sys.stderr)
    return subjects


def excitement(line) -> str | None:
    """Which updates while denoising: InitNO brings its own, and alone they are Attend-and-Excite's."""
    if line.init_noise == "initno":
        return None if line.excite is False else "official"
    return "attend-and-excite" if line.excite else None


def identity(row: dict) -> str:
    """A search is known by the seed it began at and how many it looked at."""
    ranked = row.get("candidates") or 0
    if isinstance(ranked, list):  # of a finished picture: each seed with its score
        row, ranked = row | {"seed": ranked[0]["seed"]}, len(ranked)
    return json.dumps([ranked, *(row.get(key) for key in IDENTITY)])


def recorded(paths: Iterable[Path]) -> Iterator[dict]:
    """Every whole line of the files that there are; what a kill left half written is passed over."""
    for path in sorted(paths):
        text = ""
        with suppress(FileNotFoundError):  # or another process has merged it by now
            text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            with suppress(json.JSONDecodeError):
                if isinstance(row := json.loads(line), dict) and isinstance(row.get("file"), str):
                    yield row


def by_file(rows: Iterable[dict]) -> dict[str, dict]:
    """One line a picture: the one that knows how long it took, where another was made up from the picture."""
    best = {}
    for row in rows:
        if best.get(row["file"], {}).get("seconds") is None:
            best[row["file"]] = row
    return best


def done(folder: Path, write) -> set[str]:
    """Identities of the pictures in a folder. One whose line was lost gets it back, from the settings inside the picture."""
    rows = by_file(recorded(folder.glob("runs*.jsonl")))
    present = set(filter(image.NUMBERED.match, os.listdir(folder)))
    for name in sorted(present - rows.keys()):
        with suppress(ValueError):  # another program's picture
            rows[name] = {"file": name, **image.read_settings(folder / name), "seconds": None, "unet_rows": None}
            write(rows[name])
    known = set()
    for name in present & rows.keys():
        with suppress(TypeError, KeyError, IndexError):  # a line by another hand
            known.add(identity(rows[name]))
    return known


class Lines:
    """A file of JSON lines, appended to one whole line at a time."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, row: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with image.locked(self.path.parent), self.path.open("ab+") as file:  # another run may merge it just now
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")  # a kill cut the last line
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def merge(folder: Path, paths: list[Path]) -> None:
    """These files' lines into runs.jsonl, each picture once, and the files away. Broken off, it can be done again."""
    with image.locked(folder):
        rows = by_file(recorded([folder / "runs.jsonl", *paths]))
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                order = sorted(rows, key=lambda name: (len(name.partition("-")[0]), name))  # 99999-7.png before 100000-2.png
                file.writelines(json.dumps(rows[name], ensure_ascii=False) + "\n" for name in order)
            os.chmod(temporary, 0o644)
            os.replace(temporary, folder / "runs.jsonl")
        except BaseException:
            os.unlink(temporary)
            raise
        for path in paths:
            path.unlink(missing_ok=True)


def batches(jobs: list[dict], sd: StableDiffusion) -> list[list[dict]]:
    """Neighbours that differ in prompt and seed at most, as many as fit the networks at once."""
    parts, last = [], None
    for job in jobs:
        key = {k: v for k, v in job.items() if k not in ("prompt", "seed", "noise_index", "subjects")}
        if key == last and len(parts[-1]) < sd.batch_size(job["height"], job["width"]):
            parts[-1].append(job)
        else:
            parts.append([job])
        last = key
    return parts


# --- drawing ---------------------------------------------------------------------------------------------------------


def read_noise(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Initial noise (B,4,h,w) from a safetensors file, of the given shape per picture."""
    from safetensors.torch import load_file

    from minsd.weights.load import read_header

    if not path.is_file():
        raise FileNotFoundError(f"there is no noise file {path}")
    read_header(path)
    tensors = load_file(path)
    if list(tensors) != ["noise"]:
        raise ValueError(f"{path} holds {', '.join(sorted(tensors)[:3])}; a noise file holds one tensor called noise")
    noise = tensors["noise"].float()
    if noise.ndim != 4 or tuple(noise.shape[1:]) != shape:
        wanted = f"(pictures, {', '.join(map(str, shape))})"
        raise ValueError(f"{path} holds noise of shape {tuple(noise.shape)}; this model and size need {wanted}")
    if not noise.isfinite().all():
        raise ValueError(f"{path} holds noise that is not finite")
    return noise


@dataclass
class Drawn:
    """A batch: its pictures, the noise they began from, what is to be said of each, and further files by name."""

    pictures: list[Image.Image]
    noise: torch.Tensor  # (B, 4, h, w)
    notes: list[dict]
    extras: list[dict[str, Image.Image | torch.Tensor]]


def find_noise(sd: StableDiffusion, jobs: list[dict], tell) -> tuple[torch.Tensor, list[dict], list[dict]]:
    """The initial noise (B,4,h,w) of a batch by its method, what is to be said of each, and files that come of it.
    `tell(message)` for progress."""
    first, seeds, notes, extras = jobs[0], [job["seed"] for job in jobs], [{} for _ in jobs], [{} for _ in jobs]
    shape, method = (4, first["height"] // 8, first["width"] // 8), first["init_noise"]
    if first.get("noise_file"):
        return read_noise(Path(first["noise_file"]), shape)[[job["noise_index"] for job in jobs]], notes, extras
    run = {key: first[key] for key in ("steps", "sampler", "karras", "height", "width")}
    if first.get("score") == "attention":
        for k, job in enumerate(jobs):
            candidates = list(range(seeds[k], seeds[k] + job["candidates"]))
            if method == "select" and job.get("layout") and job["layout"]["regions"]:  # by where the captions of its regions look
                where = {key: job[key] for key in ("steps", "sampler")}
                scores = collage.arrange(sd, load_layout(job["layout"]), candidates, **where).scores
                best = max(scores)
            else:
                scores = initno.attention_scores(sd, job["prompt"], job["subjects"], candidates, **run)
                best = min(scores)  # they are losses
            seeds[k] = candidates[scores.index(best)]
            notes[k] = {"seed": seeds[k], "candidates": [{"seed": s, "score": round(x, 5)} for s, x in zip(candidates, scores)]}
            tell(f"seed {seeds[k]} has the best of {len(scores)} scores, {best:.3f}")
    trip = {key: first[key] for key in ("negative_prompt", "guidance_scale", "height", "width")}
    if method == "select" and first["score"] == "stability":
        for k, job in enumerate(jobs):
            chosen = stability.select(sd, job["prompt"], range(seeds[k], seeds[k] + job["candidates"]), progress=tell, **trip)
            seeds[k] = chosen.seed
            notes[k] = {"seed": chosen.seed, "candidates": [{"seed": s, "score": round(x, 5)} for s, x in chosen.scores.items()]}
            extras[k]["candidates"] = stability.sheet(sd, job["prompt"], chosen, **trip | run)
    if method == "optimize":
        results = stability.optimize_batch(
            sd, [job["prompt"] for job in jobs], seeds, mode=first["optimize_mode"], optimize_steps=first["optimize_steps"],
            progress=lambda b, message: tell(f"seed {seeds[b]}: {message}"), **trip,
        )
        for note, result in zip(notes, results):
            note["stability"] = {"before": result.before, "after": result.score}
            if result.note:
                warnings.warn(result.note, stacklevel=2)
        return torch.cat([result.noise for result in results]), notes, extras
    if method == "initno":
        results = initno.optimize_batch(
            sd, [job["prompt"] for job in jobs], [job["subjects"] for job in jobs], seeds, **run,
            progress=lambda b, message: tell(f"seed {seeds[b]}: {message}"),
        )
        for note, result in zip(notes, results):
            note["initno"] = {"success": result.success, "rounds": result.rounds, "steps": result.steps, "losses": result.losses}
            if result.note:
                warnings.warn(result.note, stacklevel=2)
        return torch.cat([result.noise for result in results]), notes, extras
    return draw_noise(seeds, shape), notes, extras


def invert(sd: StableDiffusion, job: dict) -> Drawn:
    """The noise of a picture, and what is drawn from it."""
    keys = ("negative_prompt", "steps", "guidance_scale", "height", "width")
    with Image.open(job["invert"]) as picture:
        found = stability.invert_picture(sd, picture, job["prompt"], **{key: job[key] for key in keys})
    note = {"psnr": round(found.psnr, 2), "codec_psnr": round(found.codec_psnr, 2)}
    return Drawn([found.picture], found.noise, [note], [{"noise": found.noise}])


@contextmanager
def controlled(sd: StableDiffusion, job: dict, net):
    """Within the block a ControlNet stands beside the network, whatever calls it."""
    if not job.get("control_image"):
        yield
        return
    plain, pictures = sd.unet, read_control_image(job["control_image"], job["width"], job["height"])
    sd.unet = Controlled(plain, [Control(net, pictures, job["control_scale"])])
    try:
        yield
    finally:
        sd.unet = plain


@contextmanager
def predictor(sd: StableDiffusion, job: dict, prompts: list[str], seeds: list[int], args):
    """What predicts a batch's noise, within the block: the prompts, or the layout with what its regions have of their own."""
    if not job.get("layout"):
        yield sd.guided(prompts, job["negative_prompt"], job["guidance_scale"])
        return
    layout, how = load_layout(job["layout"]), {"guidance_scale": job["guidance_scale"], "seed": seeds}
    with lora.by_region(layout.regions, args.by_region) as tell:
        if job.get("controlnet"):
            pictures, scales = control.read(layout, job["control_image"], job["control_scale"])
            yield control.predictor(sd, layout, args.net, pictures, scales, tell=tell, **how)
        else:
            yield collage.predictor(sd, layout, tell=tell, **how)


def draw(sd: StableDiffusion, jobs: list[dict], args, progress, tell) -> Drawn:
    """One batch from its noise to its pictures."""
    first, prompts, subjects = jobs[0], [job["prompt"] for job in jobs], [job.get("subjects") for job in jobs]
    noise, notes, extras = find_noise(sd, jobs, tell)
    seeds = [note.get("seed", job["seed"]) for job, note in zip(jobs, notes)]
    run = {key: first[key] for key in ("steps", "sampler", "karras")}
    refine = frames = init = None
    if first.get("excite"):
        refine = excite.updates(sd, prompts, subjects, variant=first["excite"], **run)
    if args.attention_maps:
        refine, frames = excite.watch(sd, prompts, subjects, before=refine, **run)
    if first.get("init_image"):
        with Image.open(first["init_image"]) as picture:
            init = sd.encode(image.fit(picture, first["width"], first["height"]))
    with predictor(sd, first, prompts, seeds, args) as predict:
        latents = sd.denoise(
            predict, noise, seeds=seeds, init=init, strength=first.get("strength", 0.8), refine=refine, progress=progress, **run,
        )
    pictures = sd.decode(latents)
    if frames is not None:
        for b, (picture, extra) in enumerate(zip(pictures, extras)):
            extra["attention"] = excite.sheet(picture, frames, b, [str(subject) for subject in subjects[b]])
    return Drawn(pictures, noise, notes, extras)


def save_noise(noise: torch.Tensor, path: Path) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    save_file({"noise": noise.float().contiguous()}, temporary)
    os.replace(temporary, path)


def save_extra(what: Image.Image | torch.Tensor, stem: Path) -> None:
    """A picture, or a noise, beside the picture that it belongs to."""
    if isinstance(what, torch.Tensor):
        stem.parent.mkdir(parents=True, exist_ok=True)
        save_noise(what, stem.with_name(stem.name + ".safetensors"))
    else:
        image.save(what, stem.with_name(stem.name + ".png"))


def steps_of(job: dict) -> int:
    """How often a sampler calls `progress` for a picture."""
    steps = job["steps"] - (first_step(job["steps"], job["strength"]) if job.get("init_image") else 0)
    if job.get("invert"):
        return 0
    return steps + (job["sampler"] == "pndm" and steps > 1)  # which visits one timestep twice


def run(sd: StableDiffusion, args, jobs: list[dict]) -> None:
    """Draw and save all jobs that this process has to do; the number of pictures made is kept in `args.made`."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    lines = Lines(args.out / (f"runs-{rank}.jsonl" if world > 1 else "runs.jsonl"))
    mine = jobs[rank::world]  # the same split everywhere; how many fit at once is each process's own affair
    if args.resume and args.out.is_dir():
        have = done(args.out, lines.write if rank == 0 else lambda row: None)
        mine = [job for job in mine if identity(job) not in have]
    parts = batches(mine, sd)
    args.wanted = len(mine)
    if args.resume and not args.quiet:
        print(f"minsd: {len(mine)} of {len(jobs)} pictures are still to be made" + (" by this process" * (world > 1)), file=sys.stderr)
    kept, evaluations = [], []
    watching = sd.unet.register_forward_pre_hook(lambda module, inputs: evaluations.append(len(inputs[0])))
    steps = sum(map(steps_of, mine))
    with watching, tqdm(total=steps, unit="step", disable=args.quiet or rank > 0 or not steps, file=sys.stderr) as bar:
        while parts:
            part, begin = parts.pop(0), time.perf_counter()
            numbers = f"picture {args.made + 1}" if len(part) == 1 else f"pictures {args.made + 1}-{args.made + len(part)}"
            bar.set_description(f"{numbers}/{len(mine)}")
            evaluations.clear()
            at = bar.n
            try:
                with controlled(sd, part[0], args.net):
                    step = partial(bar.update, len(part))
                    drawn = invert(sd, part[0]) if part[0].get("invert") else draw(sd, part, args, lambda i, t: step(), bar.set_postfix_str)  # noqa: B023
            except torch.cuda.OutOfMemoryError:
                held = sd.graphs is not None and sd.graphs.held
                if len(part) == 1 and not held:
                    size = f"{part[0]['width']}x{part[0]['height']}"
                    raise ValueError(f"not even one picture of {size} fits the GPU's memory: make it smaller") from None
                if held:
                    sd.graphs.release()
                torch.cuda.empty_cache()
                parts[:0] = [part] if held else [part[: len(part) // 2], part[len(part) // 2 :]]
                bar.n = at
                continue
            seconds = (time.perf_counter() - begin) / len(part)
            args.out.mkdir(parents=True, exist_ok=True)
            bar.set_postfix_str("")
            for job, picture, note, extra in zip(part, drawn.pictures, drawn.notes, drawn.extras):
                settings = {**job, **note}
                path = image.save_numbered(picture, args.out, settings)
                for name, more in extra.items():
                    save_extra(more, args.out / "extra" / f"{path.stem}-{name}")
                row = {"file": path.name, **settings, "seconds": round(seconds, 3), "unet_rows": sum(evaluations) // len(part)}
                lines.write(row)
                args.made += 1
                if args.json:
                    print(json.dumps(row, ensure_ascii=False), flush=True)
                elif not args.quiet:
                    bar.write(f"minsd: {path}", file=sys.stderr)
            if args.save_noise is not None:
                kept.append(drawn.noise.cpu())
    if kept:
        save_noise(torch.cat(kept), args.save_noise)
    paths = [args.out / f"runs-{rank}.jsonl"] if world > 1 else []
    if rank == 0:  # a killed run of more processes leaves files that none of these will see to
        others = [p for p in args.out.glob("runs-*.jsonl") if p.stem[5:].isdigit()]
        paths += [p for p in others if int(p.stem[5:]) >= world or world == 1]
    if paths and args.out.is_dir():
        merge(args.out, paths)
