"""Judges folders of images: python -m minsd.judge FOLDER --judges clip pickscore

A judge rates how well an image shows its prompt. Every image is judged once by every judge. The
scores are lines of the file scores.jsonl in the images' folder, beside runs.jsonl, so that a second
call does nothing and a call after an interruption continues. A line stays valid as long as the
image's file and size, the judge's identity (weights, dtype, options), the prompt and the objects
that a detector must look for are unchanged; otherwise the image is judged again. Under torchrun
each process judges a part of the images.

The judges are in minsd/judges/; `--list` shows them with their weights. Weights come from
`--weights` or the hub's cache. Missing weights are downloaded for judges that the command names.
"""

import argparse
import csv
import hashlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minsd import files, judges
from minsd.app import ended, prompt_sets, study_file
from minsd.app.options import Parser, positive
from minsd.app.prompts import located
from minsd.app.ranks import Share, label, local_rank
from minsd.judges import JUDGES, WEIGHTS

SCORES = "scores.jsonl"
DEFAULT = ("clip", "least")
FORMS = (
    "runs.jsonl of minsd, prompts.jsonl or prompts.csv with columns file and prompt, GenEval's "
    "NNNNN/metadata.jsonl, PNGs that hold their prompt, or with --folders one folder per prompt"
)
Line = dict[str, Any]  # one line of scores.jsonl
LINE = {"judge": str, "identity": dict, "asked": str, "size": int, "values": dict}  # its keys
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Picture:
    """An image file that is to be judged, with its prompt."""

    folder: Path  # where its scores go
    file: str  # relative to the folder
    prompt: str
    asked: Mapping[str, Any] | None = None  # what a detector must look for (`judges.objects.Asked`)
    model: str | None = None  # the model that drew it, if known

    @property
    def path(self) -> Path:
        """Returns the path of the image file: `file` is relative to `folder`."""
        return self.folder / self.file

    @property
    def question(self) -> str:
        """Returns a hash of what the image is judged by: the prompt, and `asked`, the objects that
        a detector must look for. A stored score of the image is valid only while this hash is the
        same."""
        return judges.short({"prompt": self.prompt, "asked": self.asked})


# --- which images ---------------------------------------------------------------------------------


def pictures(folder: Path, by_folder: bool = False) -> list[Picture]:
    """Finds the images with prompts in a folder and its subfolders. With `by_folder`, the prompt of
    an image is the name of the subfolder in which it lies, with spaces for underscores. Raises
    FileNotFoundError if there is no such folder, and ValueError if it has no images with
    prompts."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    asked = _asked(folder)
    found = [] if by_folder else list(_from_rows(folder, asked))
    if not found and by_folder:
        found = [
            Picture(folder, f"{sub.name}/{name}", sub.name.replace("_", " "))
            for sub in sorted(path for path in folder.iterdir() if path.is_dir())
            for name in _images(sub)
        ]
    for form in (_from_list, _from_geneval, _from_text):
        if not found and not by_folder:
            found = list(form(folder, asked))
    if not found:
        raise ValueError(f"{folder} holds no images with prompts: give {FORMS}")
    return found


def _asked(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Returns what a detector must look for in an image, as a dict with the prompt of the image as
    key. The values state objects with their colours, counts and places. They come from the file
    study.json in the folder or in its parent folder. If there is no study.json, they are those of
    the prompts of the GenEval benchmark."""
    study = study_file.read(folder) or study_file.read(folder.parent)
    items = prompt_sets.geneval() if study is None else study.prompts
    return {item["prompt"]: item for item in items}


def _images(folder: Path) -> list[str]:
    """Returns the file names of the images in a folder, sorted. The list is empty if the folder is
    missing."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in paths if path.suffix.lower() in IMAGES)


def _from_rows(folder: Path, asked: Mapping[str, Any]) -> Iterator[Picture]:
    """Finds images by minsd's files runs*.jsonl in a folder and its subfolders, whose rows name
    images and their prompts. Yields the images. `asked` maps prompts to what a detector must look
    for.

    A run with --resume draws a missing or damaged image again under a new name. So if several
    images have the same settings, those that cannot be read are left out, as long as one can be
    read.
    """
    from minsd.app.folder import by_file, key_of, recorded

    for sub in sorted({path.parent for path in folder.rglob("runs*.jsonl")}):
        rows = by_file(recorded(sub.glob("runs*.jsonl")), sub)
        same: dict[bytes | None, list[Picture]] = {}  # images of the same settings
        for name, row in rows.items():
            prompt = str(row.get("prompt", ""))
            one = Picture(sub, name, prompt, asked.get(prompt), row.get("model"))
            same.setdefault(key_of(row), []).append(one)
        for key, several in same.items():
            if key is not None and len(several) > 1:
                whole = [one for one in several if not isinstance(opened(one), Exception)]
                several[:] = whole or several[-1:]
        yield from sorted((one for several in same.values() for one in several), key=lambda one: one.file)


def _from_list(folder: Path, asked: Mapping[str, Any]) -> Iterator[Picture]:
    """Finds images by the file prompts.jsonl or prompts.csv in a folder, whose rows name image
    files and their prompts. Yields the images. `asked` maps prompts to what a detector must look
    for; a row with the key "include" states it itself. Raises ValueError, naming the line, if a row
    lacks the file or the prompt, or has malformed clauses."""
    for name in ("prompts.jsonl", "prompts.csv"):
        if (folder / name).is_file():
            for where, row in prompt_sets.rows(folder / name):
                with located(where):
                    prompt_sets.check(row)
                    if not isinstance(row.get("file"), str):
                        raise ValueError('there is no "file"')
                own = row if "include" in row else asked.get(row["prompt"])
                yield Picture(folder, row["file"], row["prompt"], own)
            return


def _from_geneval(folder: Path, asked: Mapping[str, Any]) -> Iterator[Picture]:
    """Finds images in a folder as GenEval's own generator writes them: NNNNN/metadata.jsonl has the
    prompt of the images in NNNNN/samples/. Yields the images. `asked` is ignored, because the
    metadata also state what a detector must look for. Raises ValueError if metadata lack the
    prompt."""
    for path in sorted(folder.glob("*/metadata.jsonl")):
        item = files.read_json(path)
        with located(f"{path}: "):
            prompt_sets.check(item)
        for name in _images(path.parent / "samples"):
            yield Picture(folder, f"{path.parent.name}/samples/{name}", item["prompt"], item)


def _from_text(folder: Path, asked: Mapping[str, Any]) -> Iterator[Picture]:
    """Finds PNG files in a folder and its subfolders whose metadata contain their prompt, as
    written by minsd or by AUTOMATIC1111's web UI. Yields the images. `asked` maps prompts to what a
    detector must look for."""
    from PIL import Image

    for path in sorted(path for path in folder.rglob("*.png") if "extra" not in path.parts):
        broken = (OSError, ValueError, KeyError, TypeError, Image.DecompressionBombError)
        with suppress(*broken), Image.open(path, formats=["PNG"]) as image:
            text: Mapping[str, str] = getattr(image, "text", {})
            prompt = files.parse_json(text["minsd"])["prompt"] if "minsd" in text else None
            if prompt is None and "parameters" in text:
                prompt = text["parameters"].split("\nNegative prompt:")[0].split("\nSteps:")[0].strip()
            if isinstance(prompt, str):
                file = path.relative_to(folder).as_posix()
                yield Picture(folder, file, prompt, asked.get(prompt))


# --- scores ---------------------------------------------------------------------------------------


def scores(folder: Path) -> dict[str, dict[str, Line]]:
    """Reads the scores that are stored in a folder. Returns a nested dict: image file -> judge ->
    line. A line is a dict with the values that one judge gave one image; the constant `LINE` lists
    its keys. If one judge has several lines for an image, the last one is returned. Incomplete
    lines, left by a killed process, are skipped."""
    from minsd.app.folder import recorded

    # The processes' own files hold the lines since the last merge.
    rows = [*recorded([folder / SCORES]), *recorded(folder.glob("scores-*.jsonl"))]
    out: dict[str, dict[str, Line]] = {}
    for row in rows:
        if all(isinstance(row.get(key), kind) for key, kind in LINE.items()):
            out.setdefault(row["file"], {})[row["judge"]] = row
    return out


def merge(folder: Path, share: Share) -> None:
    """Moves the scores that this process has written into the folder's file scores.jsonl, with one
    line for each image and judge. The process wrote them to scores-RANK.jsonl, where RANK is its
    number; this file is then deleted. The process of rank 0 also merges such files of higher ranks
    that a killed run with more processes has left. The call can be repeated after an
    interruption."""
    parts = share.parts(folder, "scores")
    if not parts:
        return
    with files.locked(folder):
        lines = [
            line for _, by_judge in sorted(scores(folder).items()) for _, line in sorted(by_judge.items())
        ]
        files.write(folder / SCORES, "".join(files.dumps(line) + "\n" for line in lines))
        for path in parts:
            path.unlink(missing_ok=True)


def valid(lines: Mapping[str, Line], picture: Picture) -> dict[str, Line]:
    """Returns those stored scores of an image that are still valid. `lines` maps judges to lines of
    scores. A line is valid while the size of the image file, the prompt, and what a detector must
    look for are the same as when it was written."""
    if not lines or not picture.path.is_file():
        return {}
    now = picture.path.stat().st_size, picture.question
    return {name: line for name, line in lines.items() if (line["size"], line["asked"]) == now}


@dataclass
class Run:
    """One run of judges over images. `share` states the number of this process and how many
    processes there are; each judges a part of the images. `batch` is the number of images per
    batch. With `again`, images are judged even if they have valid scores. `judged` and `failed`
    count new scores and failures so far."""

    share: Share
    quiet: bool
    batch: int
    again: bool
    judged: int = 0
    failed: int = 0

    def error(self, message: str) -> None:
        """Prints a line about an image that cannot be judged, and counts it as a failure."""
        self.failed += 1
        print(f"minsd: error: {label()}{files.printable(message)}", file=sys.stderr)

    def judge(self, ready: "Ready", found: Sequence[Picture]) -> None:
        """Judges this process's part of the images `found`, except those that already have a valid
        score by this judge (with --again, these too). The judge is loaded only if an image is left
        to be judged."""
        known = {folder: scores(folder) for folder in {picture.folder for picture in found}}
        wanted = []
        for picture in found[self.share.rank :: self.share.world]:
            line = valid(known[picture.folder].get(picture.file, {}), picture).get(ready.name)
            if self.again or line is None or line["identity"] != ready.identity:
                wanted.append(picture)
        if not wanted:
            return
        judge = ready.load()
        parts = [wanted[at : at + self.batch] for at in range(0, len(wanted), self.batch)]
        done = 0
        with ThreadPoolExecutor(4) as pool:  # opens a batch while the network works on the one before
            images = pool.map(opened, parts[0])
            for part, later in zip(parts, [*parts[1:], []]):
                these = list(images)
                images = pool.map(opened, later)
                self._part(judge, part, these)
                done += len(part)
                if not self.quiet:
                    end = "\n" if done == len(wanted) else "\r"
                    print(f"minsd: {ready.name} {done}/{len(wanted)}", end=end, file=sys.stderr, flush=True)

    def _part(self, judge: judges.Judge, part: Sequence[Picture], images: Sequence[Any]) -> None:
        """Judges one batch, `part`, and stores a line of scores for each image. `images` has one
        item for each image of the batch: the opened image, or the error if it could not be opened.
        Prints these errors, and an error for each image with a value that is not finite."""
        from minsd.app.folder import append

        name = judge.identity["judge"]
        pairs = []
        for picture, image in zip(part, images):
            if isinstance(image, Exception):
                self.error(str(image))
            else:
                pairs.append((picture, image))
        for (picture, _), result in zip(pairs, halving(judge, pairs)):
            broken = [key for key, value in result.values.items() if not math.isfinite(value)]
            if broken:
                self.error(f"{picture.path}: {name} gives {broken[0]} = {result.values[broken[0]]}")
                continue
            held = picture.path.read_bytes()
            line = {
                "file": picture.file,
                "judge": name,
                "identity": judge.identity,
                "asked": picture.question,
                "size": len(held),
                "sha256": hashlib.sha256(held).hexdigest()[:10],
                "values": {key: round(value, 6) for key, value in result.values.items()},
            }
            if result.found is not None:
                line["found"] = [one.row() for one in result.found if one.score > 0.05]
            if result.reason:
                line["reason"] = result.reason
            append(picture.folder / f"scores-{self.share.rank}.jsonl", line)
            self.judged += 1


def opened(picture: Picture) -> Any:
    """Opens an image for a judge: in RGB, upright, and with white in place of transparency. If the
    image cannot be read, returns the error rather than raising it."""
    from minsd import image

    try:
        return image.read(picture.path, on="white").convert("RGB")
    except (OSError, ValueError) as error:
        return error


def halving(judge: judges.Judge, pairs: Sequence[tuple[Picture, Any]]) -> list[judges.Judged]:
    """Returns a judge's results for a batch, one for each pair in `pairs`, a picture and its opened
    image. If GPU memory runs out, the batch is divided into two halves, which are judged one after
    the other. Raises OutOfMemoryError if even a single image does not fit."""
    import torch

    if not pairs:
        return []
    try:
        return judge.pictures(
            [image for _, image in pairs],
            [picture.prompt for picture, _ in pairs],
            [picture.asked for picture, _ in pairs],
        )
    except torch.cuda.OutOfMemoryError:
        if len(pairs) == 1:
            raise
        half = len(pairs) // 2
        return halving(judge, pairs[:half]) + halving(judge, pairs[half:])


class Ready:
    """A judge that is not loaded yet, but whose weight files have been found. If `fetch` is True,
    the constructor downloads missing weights.

    The constructor raises FileNotFoundError if weights are missing. It raises ValueError if there
    is no judge called `name`, or if the option --weights names weights that no judge has.
    """

    def __init__(self, name: str, args: argparse.Namespace, fetch: bool):
        entry = judges.check(name)
        self.name = name
        self.options = {"nms": args.nms} if args.nms is not None and entry.module == "mask2former" else {}
        self.files = judges.found(name, places(args.weights), fetch)
        self.identity = judges.identity(name, self.files, args.dtype, self.options)
        self.device = args.device

    def load(self) -> judges.Judge:
        """Loads the judge and returns it. It runs on the device that the option --device names, or
        else on a GPU if there is one. Turns TF32 off for the whole process."""
        import torch

        # Scores of different machines are compared, so products keep all bits of float32.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and local_rank() is not None:
            device = f"cuda:{local_rank()}"
        return judges.built(self.identity, self.files, device, self.options)


def places(given: Sequence[str]) -> dict[str, str]:
    """Parses the values of the option --weights, texts of the form NAME=PLACE. Returns a dict of
    name -> place: the name of weights (a key of `judges.WEIGHTS`), and the file, folder or hub id
    to load them from. Raises ValueError for a name that is not in `judges.WEIGHTS`."""
    held = {name: place for name, _, place in (text.partition("=") for text in given)}
    unknown = sorted(set(held) - set(WEIGHTS))
    if unknown:
        raise ValueError(f"--weights {unknown[0]}=...: the names are {', '.join(WEIGHTS)}")
    return held


# --- the command ----------------------------------------------------------------------------------


def options() -> Parser:
    """Returns the parser for the options of this command."""
    p = Parser(prog="python -m minsd.judge", description="Judge images by how well they show their prompts.")
    p.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="images, also in folders below it")
    p.add_argument(
        "--judges",
        nargs="+",
        metavar="NAME",
        help="default: shapes for the embedded model's images, else clip least; `all` takes those "
        "whose weights are there",
    )
    p.add_argument(
        "--weights", nargs="+", default=[], metavar="NAME=PLACE", help="a folder, a file or a hub id"
    )
    p.add_argument("--list", action="store_true", help="print the judges and their weights, and stop")
    p.add_argument("--folders", action="store_true", help="a folder per prompt, named by it")
    p.add_argument("--again", action="store_true", help="judge again what is judged already")
    p.add_argument("--batch", type=positive, default=16, metavar="N", help="images per batch (default: 16)")
    p.add_argument("--device", metavar="NAME", help="default: cuda where there is one")
    p.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="default: float32"
    )
    p.add_argument(
        "--nms", type=float, metavar="IOU", help="geneval-style: drop boxes that overlap this much"
    )
    p.add_argument("--export", type=Path, metavar="FILE.csv", help="also write all scores as a table")
    p.add_argument("--quiet", action="store_true", help="errors only")
    return p


def chosen(args: argparse.Namespace, found: Sequence[Picture]) -> "list[Ready]":
    """Returns the judges that the option --judges names, after downloading their weights if they
    are missing. For "all", returns every judge whose weights are on this machine. Without the
    option, returns the judge `shapes` if all images in `found` are from the embedded model, and
    otherwise the judges in `DEFAULT`; then nothing is downloaded."""
    if args.judges is None:
        own = all(picture.model == "shapes" for picture in found)
        return [Ready(name, args, False) for name in (("shapes",) if own else DEFAULT)]
    if args.judges != ["all"]:
        return [Ready(name, args, True) for name in args.judges]
    there = []
    for name in JUDGES:
        with suppress(FileNotFoundError):
            there.append(Ready(name, args, False))
    return there


def listing(args: argparse.Namespace) -> None:
    """Prints all judges. For each of their weights it prints the source, the size, the licence, and
    whether they are on this machine."""
    given = places(args.weights)
    for name, entry in JUDGES.items():
        print(f"{name:14} {entry.about}")
        for key in entry.weights:
            row = WEIGHTS[key]
            state = "there"
            try:
                judges.find(key, name, given)
            except FileNotFoundError:
                state = "not there"
            print(f"{'':14}   {key}: {row.repo or row.file}, {row.size}, licence {row.licence}, {state}")


def export(path: Path, found: Sequence[Picture]) -> None:
    """Writes a CSV file to `path`, with one row for each image in `found`: its path, its prompt,
    and its valid scores by all judges."""
    known = {folder: scores(folder) for folder in {picture.folder for picture in found}}
    rows: list[dict[str, Any]] = []
    for picture in found:
        values: dict[str, Any] = {"file": str(picture.path), "prompt": picture.prompt}
        for line in valid(known[picture.folder].get(picture.file, {}), picture).values():
            values |= line["values"]
        rows.append(values)
    columns = dict.fromkeys(key for row in rows for key in row)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def run(args: argparse.Namespace) -> int:
    """Runs the command with the options `args`: judges the images in a folder. Returns the exit
    code, 1 if some images could not be judged, otherwise 0. Raises ValueError or FileNotFoundError
    if the user has made a mistake."""
    if args.list:
        listing(args)
        return 0
    if args.folder is None:
        raise ValueError("a folder of images is needed, for example: python -m minsd.judge outputs")
    if args.nms is not None and not 0 < args.nms <= 1:
        raise ValueError(f"--nms must be above 0 and at most 1, not {args.nms}")
    if args.export and args.export.suffix != ".csv":
        raise ValueError(f"--export writes a table of the form .csv: not {args.export.name}")
    found = pictures(args.folder, args.folders)
    folders = sorted({picture.folder for picture in found})
    for folder in folders:
        if not os.access(folder, os.W_OK):
            raise ValueError(f"scores cannot be written into {folder}: it is read-only")
    share = Share.from_environment()
    quiet = args.quiet or share.rank > 0
    work = Run(share, quiet, args.batch, args.again)
    ready = chosen(args, found)  # all weights are found before the first image is judged
    for folder in folders:
        merge(folder, share)  # so that lines left by a killed run do not come after this run's
    try:
        for one in ready:
            work.judge(one, found)
    finally:
        for folder in folders:
            merge(folder, share)
    if args.export:
        export(args.export, found)
    if not quiet:
        what = ", ".join(one.name for one in ready)
        whose = " of this process" if share.world > 1 else ""
        print(f"minsd: {len(found)} images, {what}: {work.judged} new scores{whose}", file=sys.stderr)
    return 1 if work.failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line with the arguments `argv`, or with those of the process if `argv` is
    None. Returns the exit code: 0 if all images were judged, 1 if some could not be judged or
    another error occurred, 2 if the user made a mistake, and 130 if the user stopped the run."""
    return ended(lambda: run(options().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
