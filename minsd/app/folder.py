"""A folder of images: which images it holds, and their rows in runs.jsonl.

A row means an image, and the image itself is believed: only a complete image counts as done, and
its embedded settings say which one it is. A row whose image is gone, or is another one by now,
counts for nothing; an image without a row gets one. Files that cannot be read are named, and cost
nothing else.
"""

import os
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minsd import files, image
from minsd.app.jobs import identity, key

Row = dict[str, Any]  # an image's settings, its file and how its run went
Say = Callable[[str], None]

OF_THE_RUN = ("file", "seconds", "unet_rows")  # what a row has beside the image's settings


def silent(message: str) -> None:
    pass


# --- rows -------------------------------------------------------------------------------------------------


def recorded(paths: Iterable[Path], say: Say = silent) -> Iterator[Row]:
    """Yield every complete row of the files that exist, those of runs.jsonl first. `say` gets a
    note of rows that are none, such as one cut off by a kill.
    """
    # Processes' own files hold what was made since the last merge into runs.jsonl.
    for path in sorted(paths, key=lambda path: (path.name != "runs.jsonl", path.name)):
        broken: list[str] = []
        try:
            yield from _rows(path, broken)
        except FileNotFoundError:  # another process has merged it by now
            pass
        except OSError:
            broken.append(path.name)
        if broken:
            named(broken, "is no row", "are no rows", say)


def _rows(path: Path, broken: list[str]) -> Iterator[Row]:
    if path.exists() and not path.is_file():
        broken.append(path.name)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):  # of bytes, so that only "\n" ends a line
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            try:
                row = files.parse_json(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("file"), str):
                yield row
            else:
                broken.append(f"line {number} of {path.name}")


def named(what: list[str], one: str, several: str, say: Say) -> None:
    """Say of several things that they are passed over, naming the first."""
    listed = ", ".join(what[:3]) + f" and {len(what) - 3} more" * (len(what) > 3)
    say(f"{listed} {one if len(what) == 1 else several}: passed over")


def key_of(settings: Row) -> bytes | None:
    """The key of an image's settings or row; None where minsd cannot have written them."""
    try:
        return key(identity(settings))
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, RecursionError):
        return None


def by_file(rows: Iterable[Row], folder: Path) -> dict[str, Row]:
    """One row per image. Where a name has rows of several images, as after one was deleted and its
    name used again, the image in the folder decides, or else the last row. Of one image's rows,
    the original, which has its timing, wins over one reconstructed from the PNG.
    """
    best: dict[str, Row] = {}
    rivals: dict[str, list[Row]] = {}
    for row in rows:
        name = row["file"]
        if name in best:
            rivals.setdefault(name, [best[name]]).append(row)
        best[name] = row
    for name, several in rivals.items():
        of = key_of(several[-1])
        if any(key_of(row) != of for row in several):
            there = _key_in(folder, name)
            of = there if any(key_of(row) == there for row in several) else of
        same = [row for row in several if key_of(row) == of]
        best[name] = next((row for row in same if row.get("seconds") is not None), same[-1])
    return best


def _key_in(folder: Path, name: str) -> bytes | None:
    """The key of the image of that name in the folder; None where there is none."""
    if image.NUMBERED.fullmatch(name):
        with suppress(ValueError, OSError):
            return key_of(image.verified(folder / name))
    return None


def append(path: Path, row: Row) -> None:
    """Append one complete row to a file of JSON lines. The file and its folder are made where they
    are missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(path.parent), files.own(path, append=True) as file:  # another process may be merging it
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")  # a kill cut the last line
        file.write((files.dumps(row) + "\n").encode())


def merge(folder: Path, paths: list[Path], say: Say = silent) -> None:
    """Merge these files into runs.jsonl, one row per image, and delete them. Safe to repeat."""
    with files.locked(folder):
        rows = by_file(recorded([folder / "runs.jsonl", *paths], say), folder)
        with files.temporary(folder) as file:
            # 99999- before 100000-
            by_number = sorted(rows, key=lambda name: (len(name.partition("-")[0]), name))
            file.writelines((files.dumps(rows[name]) + "\n").encode() for name in by_number)
            files.put(file, folder / "runs.jsonl")
        for path in paths:
            path.unlink(missing_ok=True)


# --- what is done -----------------------------------------------------------------------------------------


def done(
    folder: Path, write: Callable[[Row], None], say: Say = silent, mine: Container[bytes] | None = None
) -> set[bytes]:
    """Keys of the images in a folder. `write` gets a row, read from its PNG, for each image that
    has none.

    Every image is checked, as `image.verified` says; one without a row is decoded. `mine`: the
    keys that matter to one of several processes, which leaves the check of the others' images to
    these.
    """
    rows: dict[str, set[bytes | None]] = {}
    for row in recorded(folder.glob("runs*.jsonl"), say):
        rows.setdefault(row["file"], set()).add(key_of(row))
    known: set[bytes] = set()
    broken: list[str] = []
    for name in sorted(filter(image.NUMBERED.fullmatch, os.listdir(folder))):
        keys = rows.get(name, set())
        if mine is not None and len(keys) == 1 and not any(k is None or k in mine for k in keys):
            continue  # another process's
        try:
            settings = image.verified(folder / name, whole=not keys)
        except (ValueError, OSError):
            broken.append(name)
            continue
        own = key_of(settings)
        if own is None:
            broken.append(name)
            continue
        known.add(own)
        if own not in keys:
            rest = {name: value for name, value in settings.items() if name not in OF_THE_RUN}
            write({"file": name, **rest, "seconds": None, "unet_rows": None})
    if broken:
        named(broken, "is no complete image of minsd's", "are no complete images of minsd's", say)
    return known
