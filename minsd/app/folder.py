"""Finds the images in an output folder, and keeps one row (line of settings) per image in its
runs.jsonl.

The images decide, not the rows: only a complete image counts as done, and the settings embedded in
the image identify it. A row is ignored if its image is missing, or if the file of that name is now
a different image. A row is added for an image that has none. Files and rows that cannot be read are
named in a message and ignored.
"""

import os
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minsd import files, image
from minsd.app.jobs import identity, key

Row = dict[str, Any]  # an image's settings, its file name, and its cost
Say = Callable[[str], None]

# Keys of a row that are no settings of the image: its file name and its cost. `batch` is the number
# of images drawn together, and `peak_mb` the peak of the GPU memory during that (None on a CPU).
NOT_SETTINGS = ("file", "seconds", "unet_rows", "batch", "peak_mb")


def silent(message: str) -> None:
    """Ignores a message."""


# --- rows -------------------------------------------------------------------------------------------------


def recorded(paths: Iterable[Path], say: Say = silent) -> Iterator[Row]:
    """Reads the rows (dicts of an image's settings, file name and cost) of the files `paths`, and
    yields every complete row. The file runs.jsonl is read first, and files that do not exist are
    skipped. Lines that are no complete row, such as a line cut off by a kill, are reported with
    `say` and skipped."""
    # The processes' own files hold the rows since the last merge into runs.jsonl.
    for path in sorted(paths, key=lambda path: (path.name != "runs.jsonl", path.name)):
        broken: list[str] = []
        try:
            yield from _rows(path, broken)
        except FileNotFoundError:  # another process has merged this file
            pass
        except OSError:
            broken.append(path.name)
        if broken:
            note_ignored(broken, "is no row", "are no rows", say)


def _rows(path: Path, broken: list[str]) -> Iterator[Row]:
    if path.exists() and not path.is_file():
        broken.append(path.name)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):  # lines of bytes end at "\n" only
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


def note_ignored(names: list[str], one: str, several: str, say: Say) -> None:
    """Reports with `say(message)` that files or lines are ignored. `names` are these files or
    lines, of which the message lists the first three. The message ends with the reason, which is
    `one` for a single name ("is no row") and `several` for more ("are no rows")."""
    listed = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
    say(f"{listed} {one if len(names) == 1 else several}: ignored")


def key_of(settings: Row) -> bytes | None:
    """Returns the key of an image, a hash of those settings that identify it. `settings` come from
    the image's metadata or its row of runs.jsonl. Returns None if minsd cannot have written these
    settings."""
    try:
        return key(identity(settings))
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, RecursionError):
        return None


def by_file(rows: Iterable[Row], folder: Path) -> dict[str, Row]:
    """Chooses one of the `rows` (an image's settings, file name and cost) for each file name.
    Returns a dict file name -> row.

    A file name has several rows if one image was recorded more than once, or if an image was
    deleted and its name used again. Then only the rows of one image are considered: the image that
    is in the folder now or, if that image has no row, the image of the last row. The first of these
    rows with a time (`seconds`) is chosen. If none has a time, because they were restored from a
    PNG, the last row is chosen.
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
    """Returns the key (`key_of`) of the image file `name` in the folder, or None if the folder has
    no complete image of that name."""
    if image.NUMBERED.fullmatch(name):
        with suppress(ValueError, OSError):
            return key_of(image.verified(folder / name))
    return None


def append(path: Path, row: Row) -> None:
    """Appends one row (a dict of an image's settings, file name and cost) as a line to a file of
    JSON lines. Creates the file and its folder if they are missing.

    The file is not synced to the disk: a row that is lost in a power cut is restored from its PNG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(path.parent), files.own(path, append=True) as file:  # another process may be merging it
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")  # the last line was cut off by a kill
        file.write((files.dumps(row) + "\n").encode())


def merge(folder: Path, paths: list[Path], say: Say = silent) -> None:
    """Merges rows into the folder's runs.jsonl, and keeps one row per image. `paths` are the files
    whose rows are merged, each written by one process; these files are deleted afterwards. A merge
    that was interrupted can be repeated. Lines that are no rows are reported with `say`."""
    with files.locked(folder):
        rows = by_file(recorded([folder / "runs.jsonl", *paths], say), folder)
        with files.temporary(folder) as file:
            # 99999- sorts before 100000-
            by_number = sorted(rows, key=lambda name: (len(name.partition("-")[0]), name))
            file.writelines((files.dumps(rows[name]) + "\n").encode() for name in by_number)
            files.put(file, folder / "runs.jsonl")
        for path in paths:
            path.unlink(missing_ok=True)


# --- what is done -----------------------------------------------------------------------------------------


def done(
    folder: Path, write: Callable[[Row], None], say: Say = silent, mine: Container[bytes] | None = None
) -> set[bytes]:
    """Returns the keys (hashes of the identifying settings) of the complete images in a folder. For
    each image without a row in runs.jsonl, calls `write` with a row made from the image's metadata.

    Every image is checked by `image.verified`; an image without a row is also decoded. Files that
    are not complete images of minsd are reported with `say`.

    If several processes work on the folder, `mine` holds the keys of this process's jobs. An image
    whose row has a key outside `mine` is then skipped, because another process checks it.
    """
    rows: dict[str, set[bytes | None]] = {}
    for row in recorded(folder.glob("runs*.jsonl"), say):
        rows.setdefault(row["file"], set()).add(key_of(row))
    known: set[bytes] = set()
    broken: list[str] = []
    for name in sorted(filter(image.NUMBERED.fullmatch, os.listdir(folder))):
        keys = rows.get(name, set())
        if mine is not None and len(keys) == 1 and not any(k is None or k in mine for k in keys):
            continue  # another process checks this image
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
            rest = {name: value for name, value in settings.items() if name not in NOT_SETTINGS}
            write({"file": name, **rest, "seconds": None, "unet_rows": None})
    if broken:
        note_ignored(broken, "is no complete image of minsd's", "are no complete images of minsd's", say)
    return known
