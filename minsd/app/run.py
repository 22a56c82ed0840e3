"""Jobs to pictures: batches, files, what is done already, several processes.

A job is a dict: everything that one picture is made from, resolved to the last default. It goes into the picture, and
into the line of runs.jsonl that is appended once the picture is in place, so that a line means a picture. Work is split
over processes (torchrun's) job by job from the full list, which every process knows: no two ever talk or wait. Each
writes a file of lines of its own and merges it into runs.jsonl at its end. How a batch is drawn is minsd/draw.py's affair.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from minsd import __version__, image
from minsd.app.draw import draw, steps_of
from minsd.app.prompts import located
from minsd.noise import arrange, collage, losses
from minsd.noise.initial import read_noise, save_noise
from minsd.noise.layout import Layout
from minsd.pipeline import StableDiffusion, first_step
from minsd.samplers import timesteps

# --- what is to be done ----------------------------------------------------------------------------------------------


def plan(sd: StableDiffusion, args, lines) -> list[dict]:
    """One job a picture, in the order of the prompts and their seeds. `lines`: checked arguments, one for each prompt."""
    once = {
        "model": args.model,
        "model_hash": sd.model_hash,
        "vae": args.vae and str(args.vae),
        "tokenizer": args.tokenizer and str(args.tokenizer),
        "prediction_type": args.prediction_type,
        "lora": args.lora,
        "attention": args.attention,
        "device": sd.device.type,
        "dtype": str(sd.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    jobs, notes = [], []
    for line in lines:
        with located(line):
            jobs += jobs_of(sd, line, once, notes.append)
    if args.save_noise is not None and len({(job["height"], job["width"]) for job in jobs}) > 1:
        raise ValueError("--save-noise takes the noise of pictures of one size")
    once_each = list({identity(job): job for job in jobs}.values())
    if len(once_each) < len(jobs):
        notes.append(
            f"{len(jobs) - len(once_each)} pictures were asked for more than once: each is made once"
        )
    for note in () if args.quiet else notes:  # only now: an error stands alone
        print(f"minsd: {note}", file=sys.stderr)
    return once_each


def versions() -> dict[str, str]:
    import transformers

    return {"minsd": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


METHOD_OPTIONS = ("candidates", "score", "optimize_steps", "optimize_mode")


def jobs_of(sd: StableDiffusion, line, once: dict, tell: Callable[[str], None]) -> list[dict]:
    """The jobs of one prompt; `once`: what all have in common. `tell(note)` for what its author may not expect."""
    settings = {
        "prompt": line.prompt,
        "negative_prompt": line.negative_prompt or "",
        **once,
        "sampler": line.sampler or sd.config.sampler,
        "karras": bool(line.karras),
        "steps": sd.config.steps if line.steps is None else line.steps,
        "guidance_scale": sd.config.guidance_scale if line.guidance_scale is None else line.guidance_scale,
        "height": line.height or sd.config.size,
        "width": line.width or sd.config.size,
        "init_noise": line.init_noise,
    }
    if line.looks:
        settings |= {"subjects": subjects_of(sd, line, tell), "excite": excitement(line)}
    settings |= {key: value for key in METHOD_OPTIONS if (value := getattr(line, key)) is not None}
    if line.regions is not None:
        line.regions = line.regions.sized(settings["width"], settings["height"])
        if line.init_noise == "select" and line.score == "attention":
            arrange.caption_subjects(sd, line.regions)  # says now which caption names none
        settings["layout"] = layout_json(line.regions)
        for note in line.regions.notes:
            tell(f"{line.where}{note}")
    if line.controlnet is not None:
        picture = line.control_image or line.regions.control_image
        scale = 1.0 if line.control_scale is None else line.control_scale
        settings |= {
            "controlnet": str(line.controlnet),
            "control_image": picture and str(picture),
            "control_scale": scale,
        }
    if line.invert is not None:
        settings |= {
            "invert": str(line.invert),
            "guidance_scale": 1.0 if line.guidance_scale is None else line.guidance_scale,
        }
    if line.init_image is not None:
        settings |= {
            "init_image": str(line.init_image),
            "strength": 0.8 if line.strength is None else line.strength,
        }
    left_out = first_step(settings["steps"], settings.get("strength", 1.0))
    visited = timesteps(
        settings["sampler"], sd.schedule, settings["steps"], start=left_out, karras=settings["karras"]
    )
    if line.crop_margin is not None:
        settings["crop_margin"] = line.crop_margin
        if not line.regions.regions or all(t < collage.CROP_UNTIL for t in visited):
            tell(
                f"{line.where}crop_margin changes nothing here: it is for a layout's regions, and for timesteps from {collage.CROP_UNTIL}"
            )
    seeds = line.seeds
    if line.noise is not None:
        count = len(read_noise(line.noise, (4, settings["height"] // 8, settings["width"] // 8)))
        seeds = list(range(seeds[0], seeds[0] + count)) if len(seeds) == 1 else seeds
        if count != len(seeds):
            raise ValueError(
                f"{line.noise} holds {count} noises and {len(seeds)} seeds were given: one a picture"
            )
    return [
        settings
        | ({"noise_file": str(line.noise), "noise_index": k} if line.noise is not None else {})
        | {"seed": seed}
        for k, seed in enumerate(seeds)
    ]


def layout_json(layout: Layout) -> dict:
    """What a layout.json with this in it would hold; file names are absolute."""
    regions = []
    for r in layout.regions:
        place = {"box": list(r.box)} if r.box is not None else {"mask": str(r.mask.resolve())}
        more = {"negative_prompt": r.negative_prompt, "weight": r.weight}
        more["control_scale"] = 1.0 if r.control_scale is None else r.control_scale
        more["lora"] = [f"{path.resolve()}:{scale}" for path, scale in r.lora]
        if r.control_image is not None:
            more["control_image"] = str(r.control_image.resolve())
        regions.append({"prompt": r.prompt, **place, **more})
    return {
        "prompt": layout.prompt,
        "negative_prompt": layout.negative_prompt,
        "width": layout.width,
        "height": layout.height,
        "regions": regions,
    }


def subjects_of(sd: StableDiffusion, line, tell: Callable[[str], None]) -> list[str | int]:
    """The subjects of a line, found in its prompt where it names none. ValueError for what the prompt does not have."""
    subjects = losses.automatic_subjects(line.prompt) if line.subjects is None else line.subjects
    losses.resolve(sd.text, line.prompt, subjects)
    if line.subjects is None:
        tell(f"subjects: {', '.join(subjects)}")
    return subjects


def excitement(line) -> str | None:
    """Which updates while denoising: InitNO brings its own, and alone they are Attend-and-Excite's."""
    if line.init_noise == "initno":
        return None if line.excite is False else "official"
    return "attend-and-excite" if line.excite else None


# --- what is done ----------------------------------------------------------------------------------------------------


# What tells one picture from another; all else in a line is how it went.
IDENTITY = (
    "prompt",
    "negative_prompt",
    "model",
    "vae",
    "tokenizer",
    "prediction_type",
    "seed",
    "sampler",
    "karras",
    "steps",
    "guidance_scale",
    "height",
    "width",
    "init_image",
    "strength",
    "noise_file",
    "noise_index",
    "init_noise",
    "score",
    "optimize_steps",
    "optimize_mode",
    "subjects",
    "excite",
    "layout",
    "crop_margin",
    "controlnet",
    "control_image",
    "control_scale",
    "lora",
    "invert",
    "dtype",
)


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


def done(folder: Path, write: Callable[[dict], None]) -> set[str]:
    """Identities of the pictures in a folder. One whose line was lost gets it back, from the settings inside the picture."""
    rows = by_file(recorded(folder.glob("runs*.jsonl")))
    present = set(filter(image.NUMBERED.match, os.listdir(folder)))
    for name in sorted(present - rows.keys()):
        with suppress(ValueError):  # another program's picture
            rows[name] = {
                "file": name,
                **image.read_settings(folder / name),
                "seconds": None,
                "unet_rows": None,
            }
            write(rows[name])
    known = set()
    for name in present & rows.keys():
        with suppress(TypeError, KeyError, IndexError):  # a line by another hand
            known.add(identity(rows[name]))
    return known


def append(path: Path, row: dict) -> None:
    """One whole line at the end of a file of JSON lines. The file, and its folder, are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with image.locked(path.parent), path.open("ab+") as file:  # another run may merge it just now
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
                order = sorted(
                    rows, key=lambda name: (len(name.partition("-")[0]), name)
                )  # 99999-7.png before 100000-2.png
                file.writelines(json.dumps(rows[name], ensure_ascii=False) + "\n" for name in order)
            os.chmod(temporary, 0o644)
            os.replace(temporary, folder / "runs.jsonl")
        except BaseException:
            os.unlink(temporary)
            raise
        for path in paths:
            path.unlink(missing_ok=True)


# --- the run ---------------------------------------------------------------------------------------------------------


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


def save_extra(what: Image.Image | torch.Tensor, stem: Path) -> None:
    """A picture, or a noise, beside the picture that it belongs to."""
    if isinstance(what, torch.Tensor):
        stem.parent.mkdir(parents=True, exist_ok=True)
        save_noise(what, stem.with_name(stem.name + ".safetensors"))
    else:
        image.save(what, stem.with_name(stem.name + ".png"))


def run(sd: StableDiffusion, args, jobs: list[dict]) -> None:
    """Draw and save all jobs that this process has to do; the number of pictures made is kept in `args.made`."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    record = partial(append, args.out / (f"runs-{rank}.jsonl" if world > 1 else "runs.jsonl"))
    mine = jobs[rank::world]  # the same split everywhere; how many fit at once is each process's own affair
    if args.resume and args.out.is_dir():
        have = done(args.out, record if rank == 0 else lambda row: None)
        mine = [job for job in mine if identity(job) not in have]
    parts = batches(mine, sd)
    args.wanted = len(mine)
    if args.resume and not args.quiet:
        print(
            f"minsd: {len(mine)} of {len(jobs)} pictures are still to be made"
            + (" by this process" * (world > 1)),
            file=sys.stderr,
        )
    kept, evaluations = [], []
    watching = sd.unet.register_forward_pre_hook(lambda module, inputs: evaluations.append(len(inputs[0])))
    steps = sum(map(steps_of, mine))
    with (
        watching,
        tqdm(total=steps, unit="step", disable=args.quiet or rank > 0 or not steps, file=sys.stderr) as bar,
    ):
        while parts:
            part, begin = parts.pop(0), time.perf_counter()
            numbers = (
                f"picture {args.made + 1}"
                if len(part) == 1
                else f"pictures {args.made + 1}-{args.made + len(part)}"
            )
            bar.set_description(f"{numbers}/{len(mine)}")
            evaluations.clear()
            at = bar.n
            try:
                step = partial(bar.update, len(part))
                drawn = draw(sd, part, args, lambda i, t, step=step: step(), bar.set_postfix_str)
            except torch.cuda.OutOfMemoryError:
                held = sd.graphs is not None and sd.graphs.held
                if len(part) == 1 and not held:
                    size = f"{part[0]['width']}x{part[0]['height']}"
                    raise ValueError(
                        f"not even one picture of {size} fits the GPU's memory: make it smaller"
                    ) from None
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
                row = {
                    "file": path.name,
                    **settings,
                    "seconds": round(seconds, 3),
                    "unet_rows": sum(evaluations) // len(part),
                }
                record(row)
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
