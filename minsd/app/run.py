"""Runs jobs (one per image): forms batches, saves images and rows, resumes, and divides work
between processes.

An image's row, a line with its settings and cost, is appended to runs.jsonl after the image is in
place, so that every row has an image. Under torchrun every process knows the whole list of jobs and
takes a fixed part of it: processes do not communicate, and do not wait for work. Each process
writes rows to its own file and merges that file into runs.jsonl at its end. minsd/app/draw.py draws
one batch; this module chooses the batches and saves the images. An image that cannot be drawn is
reported, and the others are still drawn.
"""

import json
import sys
import time
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from minsd import files, image
from minsd.app import Tally, mistake, reason
from minsd.app.draw import Drawn, Extras, draw
from minsd.app.folder import Row, Say, append, done, merge, silent
from minsd.app.folder import recorded as recorded
from minsd.app.hold import Hold
from minsd.app.jobs import Job, Jobs, Piece
from minsd.app.progress import Progress, Show
from minsd.app.ranks import Share
from minsd.app.session import Session
from minsd.graphs import empty_cache
from minsd.guidance import counted
from minsd.noise.initial import save_noise
from minsd.pipeline import StableDiffusion

Wanted = Sequence[tuple[Piece, Sequence[int]]]  # pieces, each with the numbers of its jobs to draw


def run(
    session: Session,
    jobs: Jobs,
    tally: Tally,
    hold: Hold | None = None,
    engine: "Callable[[Drawing, Wanted], None] | None" = None,
    show: Progress | None = None,
) -> None:
    """Draws and saves this process's part of the jobs (one per image). With --resume, images that
    are in the folder already are skipped. `session` holds the loaded model, and `tally` counts the
    images that are saved and those that failed. `hold` is the lock on the folder; None creates one.
    `engine(drawing, wanted)` draws the jobs elsewhere, such as on a Ray cluster; None draws them in
    this process. `show` receives the progress; None shows it on standard error."""
    command = session.command
    share = Share.from_environment()

    def say(message: str) -> None:
        if not session.quiet:
            print(f"minsd: {files.printable(message)}", file=sys.stderr)

    hold = hold or Hold(command.out, command.resume, command.wait, say)
    hold.take()
    try:
        for folder in (command.out, command.out / "extra"):
            removed = files.remove_stale(folder)
            if removed:
                say(f"removed {len(removed)} temporary files that a killed run left in {folder}")
        record = partial(_record, command.out / share.rows_file)
        # The division is the same in every process, and does not depend on free memory.
        mine: Wanted = list(jobs.share(share.rank, share.world))
        if command.resume and command.out.is_dir():
            mine = _missing(command.out, mine, share, record, say)
        tally.wanted = sum(len(numbers) for _, numbers in mine)
        tally.single = len(jobs) == 1
        if command.resume:
            by_whom = " by this process" if share.world > 1 else ""
            say(f"{tally.wanted} of {len(jobs)} images are still to be made{by_whom}")
        show = show or Progress(tally.wanted, command.out, hidden=session.quiet)
        try:
            (engine or Drawing.all)(Drawing(session, record, tally, show), mine)
        finally:
            show.close()
        _merge_rows(command.out, share, say if share.rank == 0 else silent)
        if tally.failed:
            hold.wait_for_others()
    finally:
        hold.release()


def _missing(out: Path, mine: Wanted, share: Share, record: Callable[[Row], None], say: Say) -> Wanted:
    """Returns those of the jobs `mine`, this process's part of the run, whose images are not in the
    folder `out` yet. In the first process, also calls `record` with a new row for each image in the
    folder that has no row, and `say` with messages."""
    keys = None
    if share.world > 1:
        keys = {key for piece, numbers in mine for key in piece.keys(numbers)}
    first = share.rank == 0
    have = done(out, record if first else lambda row: None, say if first else silent, keys)
    missing = []
    for piece, numbers in mine:
        left = array("q", (k for k, key in zip(numbers, piece.keys(numbers)) if key not in have))
        if left:
            missing.append((piece, left))
    return missing


def _record(path: Path, row: Row) -> None:
    """Appends an image's row, a dict of its settings and cost, to the file at `path`. If the file
    cannot be written, only warns, because the image itself also contains its settings."""
    try:
        append(path, row)
    except (IsADirectoryError, PermissionError) as error:
        warnings.warn(f"{path} cannot be written to: {error.strerror}", stacklevel=2)


def _merge_rows(out: Path, share: Share, say: Say) -> None:
    """Merges the rows that this process wrote to its own file into runs.jsonl in the folder `out`.
    The first process also merges the files that an earlier, killed run left behind, if that run had
    more processes than this one."""
    paths = share.parts(out, "runs")
    if (paths or share.world > 1) and out.is_dir():
        try:
            merge(out, paths, say)
        except (IsADirectoryError, PermissionError) as error:
            warnings.warn(f"{out / 'runs.jsonl'} cannot be written to: {error.strerror}", stacklevel=2)


# --- drawing ----------------------------------------------------------------------------------------------


@dataclass
class Finished:
    """A batch that was drawn, and its cost (seconds, UNet rows, memory), which is added to each
    image's row."""

    drawn: Drawn
    cost: Row


def attempt(session: Session, part: list[Job], show: Show) -> Finished | Exception:
    """Draws the batch of jobs `part`, and reports its progress to `show`. Returns the drawn batch
    with its cost, or the error if drawing failed."""
    device = session.sd.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    try:
        with counted(session.sd.unet) as rows:
            drawn = draw(session, part, show)
    except Exception as error:
        return error
    seconds = (time.perf_counter() - begin) / len(part)
    if session.command.save_noise:
        for b, extras in enumerate(drawn.extras):
            extras["noise"] = drawn.noise[b : b + 1].cpu()
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    cost = {"seconds": round(seconds, 3), "unet_rows": sum(rows) // len(part)}
    return Finished(drawn, cost | {"batch": len(part), "peak_mb": peak and round(peak)})


class Drawing:
    """Draws jobs (one per image) batch by batch, and saves the images. A batch that fails, or that
    does not fit into the GPU's memory, is drawn again in halves, so that one bad image does not
    fail the others.

    `session` holds the loaded model. `record` is called with the row of every saved image. `tally`
    counts saved and failed images.
    """

    def __init__(self, session: Session, record: Callable[[Row], None], tally: Tally, show: Progress):
        self.session = session
        self.command = session.command
        self.record = record
        self.tally = tally
        self.show = show

    def all(self, wanted: Wanted) -> None:
        """Draws and saves the jobs `wanted` in this process."""
        again: deque[list[Job]] = deque()  # parts of batches that failed
        coming = batches(wanted, self.session.sd.batch_size)
        while (part := again.popleft() if again else next(coming, None)) is not None:
            again.extendleft(reversed(self._draw(part)))

    def _draw(self, part: list[Job]) -> list[list[Job]]:
        """Draws and saves the batch of jobs `part`. Returns an empty list, or, after an error, the
        smaller batches in which to draw these jobs again."""
        self.show.batch(len(part))
        outcome = attempt(self.session, part, self.show)
        if isinstance(outcome, torch.cuda.OutOfMemoryError):
            smaller = _smaller(self.session.sd, part)
            if smaller:
                return smaller
        return self.settle(part, outcome)

    def settle(self, part: list[Job], outcome: Finished | Exception) -> list[list[Job]]:
        """Handles the `outcome` of drawing the batch of jobs `part`. A drawn batch is saved. After
        an error, a batch of one image is reported as failed, and a larger batch is divided.

        Returns the two halves to draw again if the batch was divided, otherwise an empty list.
        Raises the error with --debug, or if it would also occur in all later images.
        """
        if isinstance(outcome, Finished):
            self._save(part, outcome)
            return []
        error = outcome
        if isinstance(error, torch.cuda.OutOfMemoryError):
            if len(part) > 1:
                return _halves(part)
            size = f"{part[0].sampling.width}x{part[0].sampling.height}"
            error = ValueError(f"not even one image of {size} fits the GPU's memory: make it smaller")
        if self.command.debug or _ends_the_run(error):
            raise error
        if len(part) > 1:
            return _halves(part)
        self._report(part[0], error)
        return []

    def _report(self, job: Job, error: Exception) -> None:
        """Prints one line about an image that failed, and counts the failure. Raises the error with
        --debug, or if it would also occur in all later images.
        """
        if self.command.debug or _ends_the_run(error):
            raise error
        self.tally.failed += 1
        self.tally.mistaken = mistake(error)
        what = f"{job.where}seed {job.seed} of {files.printable(job.prompt, 100)!r}"
        label = Share.from_environment().label
        line = files.printable(f"{label}{what} is not drawn: {reason(error)}")
        self.show.failed(f"minsd: error: {line}")

    def _save(self, jobs: Sequence[Job], finished: Finished) -> None:
        """Saves the images of a drawn batch of jobs. All images are written to temporary files and
        synced to the disk together, which takes little longer than for one image. Then each image
        is moved to its final name and its row is recorded. An image that cannot be saved is
        reported, and the others are still saved."""
        out = self.command.out
        out.mkdir(parents=True, exist_ok=True)
        drawn = finished.drawn
        with ExitStack() as stack:
            saved: list[tuple[Job, Row, Extras, BinaryIO]] = []
            for job, picture, note, extras in zip(jobs, drawn.images, drawn.notes, drawn.extras):
                settings = {**job.settings(), **note}
                try:
                    file = stack.enter_context(image.written(picture, out, settings))
                    saved.append((job, settings, extras, file))
                except Exception as error:
                    self._report(job, error)
            files.sync([file for *_, file in saved])
            for job, settings, extras, file in saved:
                before = partial(_save_extras, extras, settings)
                try:
                    path = image.place(file, out, settings, before, synced=True)
                except Exception as error:
                    self._report(job, error)
                    continue
                row = {"file": path.name, **settings, **finished.cost}
                self.record(row)
                self._made(path, row)

    def _made(self, path: Path, row: Row) -> None:
        """Counts an image that was saved at `path`, and prints the path, or with --json the image's
        row."""
        self.tally.made += 1
        self.show.made(path, row)
        if self.command.json:
            print(json.dumps(row), flush=True)  # in ASCII, so that every encoding of stdout can print it
        elif not self.session.quiet:
            self.show.write(f"minsd: {files.printable(path)}{_about_regions(row)}")


def _about_regions(row: Row) -> str:
    """Returns the text to print about an image drawn with a layout, or "" for other images. It
    states, for each region, the fraction of the attention to the region's caption that falls into
    the region. If this fraction is no larger than the part of the image that the region covers, as
    if the attention were spread evenly, the text also warns about that region."""
    regions = row.get("attention_in_regions")
    if not regions:
        return ""
    told = " and ".join(f"{one['fraction']:.0%}" for one in regions)
    low = [str(k) for k, one in enumerate(regions, 1) if one["fraction"] <= one["area"]]
    text = f": its regions hold {told} of their captions' attention"
    if not low:
        return text
    these = "regions" if len(low) > 1 else "region"
    return f"{text}; warning: {these} {' and '.join(low)} may lack the caption's object"


def _ends_the_run(error: Exception) -> bool:
    """Returns whether an error would also occur in all later images: a full disk, or a GPU in a
    broken state.
    """
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def batches(wanted: Wanted, batch_size: Callable[[int, int], int]) -> Iterator[list[Job]]:
    """Groups the jobs `wanted` into batches. The jobs of a batch follow one another, and differ
    only in prompt, seed, subjects, or index in a noise file. A batch has at most batch_size(height,
    width) images."""
    # All sizes are asked for before drawing, because later some of the memory is in use.
    kinds = {(piece.template.sampling.height, piece.template.sampling.width) for piece, _ in wanted}
    sizes = {kind: batch_size(*kind) for kind in kinds}
    part: list[Job] = []
    last = None
    for piece, numbers in wanted:
        key = piece.template.batch_key()
        most = sizes[piece.template.sampling.height, piece.template.sampling.width]
        if part and key != last:
            yield part
            part = []
        last = key
        for k in numbers:
            part.append(piece.job(k))
            if len(part) >= most:
                yield part
                part = []
    if part:
        yield part


def _smaller(sd: StableDiffusion, part: list[Job]) -> list[list[Job]]:
    """Returns the batches to try after the batch `part` did not fit into the GPU's memory. If CUDA
    graphs took up memory, they are released, and the same batch is tried again. Otherwise the
    halves of the batch are tried; for a single image the list is empty."""
    held = sd.graphs is not None and bool(sd.graphs.held)
    if len(part) == 1 and not held:
        return []
    if sd.graphs is not None and held:
        sd.graphs.release()
    empty_cache()
    return [part] if held else _halves(part)


def _halves(part: list[Job]) -> list[list[Job]]:
    half = len(part) // 2
    return [part[:half], part[half:]]


def _save_extras(extras: Extras, settings: Row, path: Path) -> None:
    """Saves the further files of an image, such as its noise or attention maps, to the folder
    extra/ in the image's folder. `extras` holds the files' contents by name. `path` is where the
    image itself is about to be saved, and `settings` are the image's settings."""
    for name, extra in extras.items():
        stem = f"{path.stem}-{name}"
        if isinstance(extra, torch.Tensor):
            save_noise(extra, path.parent / "extra" / f"{stem}.safetensors", noise_metadata(settings))
        else:
            image.save(extra, path.parent / "extra" / f"{stem}.png")


def noise_metadata(settings: Row) -> dict[str, str]:
    """Returns the metadata for the noise file of an image, taken from the image's settings. The key
    `updates` names the method that also updated the image's latents while denoising, or is "none".
    """
    named = ("prompt", "negative_prompt", "seed", "init_noise", "model", "model_hash")
    texts = {name: str(settings[name]) for name in named if settings.get(name) is not None}
    return {name: files.encodable(text) for name, text in texts.items()} | {
        "updates": settings.get("excite") or "none"
    }
