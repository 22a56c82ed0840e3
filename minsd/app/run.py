"""Run jobs: batches, files, resuming, several processes.

A row is appended to runs.jsonl once its image is in place, so that a row means an image. Under
torchrun every process knows the full list of jobs and takes its share of it: processes never
communicate or wait. Each writes rows to a file of its own and merges it into runs.jsonl at its
end. minsd/app/draw.py draws a batch; this module decides which, and saves.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minsd import image
from minsd.app import Tally
from minsd.app.draw import Drawn, Extras, draw, steps_of
from minsd.app.jobs import Job, identity
from minsd.app.session import Session
from minsd.graphs import empty_cache
from minsd.guidance import counted
from minsd.noise.initial import save_noise
from minsd.pipeline import StableDiffusion

Row = dict[str, Any]  # an image's settings, its file and how its run went


# --- what is done -----------------------------------------------------------------------------------------


def recorded(paths: Iterable[Path]) -> Iterator[Row]:
    """Yields every complete row of the files that exist, and skips rows that a killed process
    truncated."""
    for path in sorted(paths):
        text = ""
        with suppress(FileNotFoundError):  # or another process has merged it by now
            text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            with suppress(json.JSONDecodeError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("file"), str):
                    yield row


def by_file(rows: Iterable[Row]) -> dict[str, Row]:
    """One row per image; the original row, which has its timing, wins over one reconstructed from
    the PNG.
    """
    best: dict[str, Row] = {}
    for row in rows:
        if best.get(row["file"], {}).get("seconds") is None:
            best[row["file"]] = row
    return best


def done(folder: Path, write: Callable[[Row], None]) -> set[str]:
    """Returns the identities of the images in a folder. For an image without a row, `write` is
    called with a row read from its PNG.
    """
    rows = by_file(recorded(folder.glob("runs*.jsonl")))
    present = set(filter(image.NUMBERED.match, os.listdir(folder)))
    for name in sorted(present - rows.keys()):
        with suppress(ValueError):  # not an image that minsd wrote
            rows[name] = {
                "file": name,
                **image.read_settings(folder / name),
                "seconds": None,
                "unet_rows": None,
            }
            write(rows[name])
    known = set()
    for name in present & rows.keys():
        with suppress(TypeError, KeyError, IndexError):  # a row that minsd did not write
            known.add(identity(rows[name]))
    return known


def append(path: Path, row: Row) -> None:
    """Appends one complete row to a file of JSON lines. The file and its folder are made where they
    are missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with image.locked(path.parent), path.open("ab+") as file:  # another process may be merging it
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")  # a kill cut the last line
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def merge(folder: Path, paths: list[Path]) -> None:
    """Merges the files `paths` into runs.jsonl, one row per image, and deletes them. Safe to
    repeat.
    """
    with image.locked(folder):
        rows = by_file(recorded([folder / "runs.jsonl", *paths]))
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                by_number = sorted(
                    rows, key=lambda name: (len(name.partition("-")[0]), name)
                )  # 99999- before 100000-
                file.writelines(json.dumps(rows[name], ensure_ascii=False) + "\n" for name in by_number)
            os.chmod(temporary, 0o644)
            os.replace(temporary, folder / "runs.jsonl")
        except BaseException:
            os.unlink(temporary)
            raise
        for path in paths:
            path.unlink(missing_ok=True)


# --- the run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """This process among all (torchrun's)."""

    rank: int
    world: int

    @classmethod
    def from_environment(cls) -> "Share":
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def rows_file(self) -> str:
        return f"runs-{self.rank}.jsonl" if self.world > 1 else "runs.jsonl"


def run(session: Session, jobs: Sequence[Job], tally: Tally) -> None:
    """Draws and saves all jobs that fall to this process. `tally` counts the images as they are
    saved.
    """
    command = session.command
    share = Share.from_environment()
    record = partial(append, command.out / share.rows_file)
    mine = list(
        jobs[share.rank :: share.world]
    )  # the same split in every process, whatever fits each one's memory
    if command.resume and command.out.is_dir():
        have = done(command.out, record if share.rank == 0 else lambda row: None)
        mine = [job for job in mine if job.identity() not in have]
    tally.wanted = len(mine)
    if command.resume and not session.quiet:
        by_whom = " by this process" if share.world > 1 else ""
        print(f"minsd: {len(mine)} of {len(jobs)} images are still to be made{by_whom}", file=sys.stderr)
    _draw_all(session, mine, record, tally)
    _merge_rows(command.out, share)


def _draw_all(session: Session, jobs: list[Job], record: Callable[[Row], None], tally: Tally) -> None:
    """Draws jobs batch by batch, halving a batch that does not fit the GPU."""
    sd = session.sd
    parts = batches(jobs, sd)
    steps = sum(steps_of(sd, job) for job in jobs)
    bar = tqdm(total=steps, unit="step", disable=session.quiet or not steps, file=sys.stderr)
    with counted(sd.unet) as rows, bar:
        while parts:
            part = parts.pop(0)
            first = tally.made + 1
            last = tally.made + len(part)
            numbers = f"image {first}" if len(part) == 1 else f"images {first}-{last}"
            bar.set_description(f"{numbers}/{len(jobs)}")
            rows.clear()
            begin = time.perf_counter()
            drawn_before = bar.n
            advance = partial(bar.update, len(part))
            try:
                drawn = draw(session, part, lambda i, t, advance=advance: advance(), bar.set_postfix_str)
            except torch.cuda.OutOfMemoryError:
                parts[:0] = _smaller(sd, part)
                bar.n = drawn_before
                continue
            seconds = (time.perf_counter() - begin) / len(part)
            bar.set_postfix_str("")
            if session.command.save_noise:
                for b, extras in enumerate(drawn.extras):
                    extras["noise"] = drawn.noise[b : b + 1].cpu()
            for row in _save(session.command.out, part, drawn, seconds, sum(rows) // len(part)):
                record(row)
                tally.made += 1
                if session.command.json:
                    print(json.dumps(row, ensure_ascii=False), flush=True)
                elif not session.quiet:
                    bar.write(f"minsd: {session.command.out / row['file']}", file=sys.stderr)


def batches(jobs: Sequence[Job], sd: StableDiffusion) -> list[list[Job]]:
    """Groups consecutive jobs that differ only in prompt, seed or subjects into batches of at most
    sd.batch_size.
    """
    parts: list[list[Job]] = []
    last = None
    for job in jobs:
        key = job.batch_key()
        if key == last and len(parts[-1]) < sd.batch_size(job.sampling.height, job.sampling.width):
            parts[-1].append(job)
        else:
            parts.append([job])
        last = key
    return parts


def _smaller(sd: StableDiffusion, part: list[Job]) -> list[list[Job]]:
    """Returns what to try after a batch did not fit the GPU: first the same batch without the
    memory of CUDA graphs, then its two halves.

    ValueError where a single image does not fit.
    """
    held = sd.graphs is not None and bool(sd.graphs.held)
    if len(part) == 1 and not held:
        size = f"{part[0].sampling.width}x{part[0].sampling.height}"
        raise ValueError(f"not even one image of {size} fits the GPU's memory: make it smaller")
    if sd.graphs is not None and held:
        sd.graphs.release()
    empty_cache()
    half = len(part) // 2
    return [part] if held else [part[:half], part[half:]]


def _save(out: Path, jobs: Sequence[Job], drawn: Drawn, seconds: float, unet_rows: int) -> Iterator[Row]:
    """Saves a batch, and yields each image's row once it is in place."""
    out.mkdir(parents=True, exist_ok=True)
    for job, picture, note, extras in zip(jobs, drawn.images, drawn.notes, drawn.extras):
        settings = {**job.settings(), **note}
        path = image.save_numbered(picture, out, settings, partial(_save_extras, extras, settings))
        yield {"file": path.name, **settings, "seconds": round(seconds, 3), "unet_rows": unet_rows}


def _save_extras(extras: Extras, settings: Row, path: Path) -> None:
    """Saves what belongs to an image about to appear at `path`, in the folder extra/ beside it."""
    for name, extra in extras.items():
        stem = f"{path.stem}-{name}"
        if isinstance(extra, torch.Tensor):
            save_noise(extra, path.parent / "extra" / f"{stem}.safetensors", noise_metadata(settings))
        else:
            image.save(extra, path.parent / "extra" / f"{stem}.png")


def noise_metadata(settings: Row) -> dict[str, str]:
    """Returns the metadata of a noise file. `updates` names the method that also moved the image's
    latents while denoising, or is "none".
    """
    named = ("prompt", "negative_prompt", "seed", "init_noise", "model", "model_hash")
    said = {name: str(settings[name]) for name in named if settings.get(name) is not None}
    return {**said, "updates": settings.get("excite") or "none"}


def _merge_rows(out: Path, share: Share) -> None:
    """Merges this process's rows, and those that a killed run of more processes left behind, into
    runs.jsonl.
    """
    paths = [out / share.rows_file] if share.world > 1 else []
    if share.rank == 0:
        left = [path for path in out.glob("runs-*.jsonl") if path.stem[5:].isdigit()]
        paths += [path for path in left if int(path.stem[5:]) >= share.world or share.world == 1]
    if paths and out.is_dir():
        merge(out, paths)
