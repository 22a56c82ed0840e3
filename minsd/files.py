"""Files that this program writes, and files of strangers: whole or not at all, locked, and read
with care.

Folders of images are shared by processes and machines, and may come from somebody else. So nothing
is written through a symbolic link, JSON is parsed with bounds, and text from files reaches a
terminal with its control characters escaped.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import stat
import time
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HOST = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64] or "host"
TEMPORARY = re.compile(r"minsd-(?P<host>[\w.]+)-(?P<pid>\d{1,10})-[0-9a-f]{8}\.tmp", re.ASCII)
STALE = 3600  # seconds after which an unlocked temporary file of another machine was left behind
PATIENCE = 10  # seconds to wait for a lock before saying so
DEEPEST = 64  # levels of nested JSON: ten times those of any settings
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories that a terminal acts upon or cannot show
JOINERS = "\u200c\u200d"  # zero-width, but part of words and of emoji


# --- text and JSON --------------------------------------------------------------------------------


def printable(text: object, most: int = 2000) -> str:
    """Text for one line of a terminal: control characters, line breaks and other invisible
    characters as escapes, and the middle left out where it is longer than `most` characters.
    """
    text = str(text)
    if len(text) > most:
        text = f"{text[: most // 2]} ... ({len(text) - most} characters more) ... {text[-most // 2 :]}"
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in HIDDEN and c not in JOINERS else c
        for c in text
    )


def dumps(value: Any) -> str:
    """JSON in one line, readable in UTF-8. File names that are not UTF-8 (lone surrogates in
    Python) are escaped and come back as they were.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def encodable(text: str) -> str:
    """The text with whatever UTF-8 cannot hold as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def parse_json(text: str | bytes, unique: bool = False) -> Any:
    """Parse JSON that anybody may have written. `unique`: refuse an object with a key given twice.

    ValueError, in one line, for anything but JSON in UTF-8, for deep nesting and endless numbers.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        raise ValueError("not text in UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None, parse_int=_whole)
        # Deep values are refused before something recursive meets them. The count is the cheap
        # test.
        if text.count("[") + text.count("{") > DEEPEST and _deeper(value, DEEPEST):
            raise RecursionError
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply: too many brackets") from None
    return value


def _whole(digits: str) -> int:
    if len(digits) > 400:  # beyond any float
        raise ValueError(f"a number of {len(digits)} digits is too large")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def _deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value is nested deeper than `levels`."""
    layer = [value]
    for _ in range(levels):
        inner: list[Any] = []
        for one in layer:
            if isinstance(one, dict):
                inner += [v for v in one.values() if isinstance(v, (dict, list))]
            elif isinstance(one, list):
                inner += [v for v in one if isinstance(v, (dict, list))]
        if not inner:
            return False
        layer = inner
    return True


def exists(path: Path) -> bool:
    """Whether a path exists. False too for what cannot be a path: too long, or with a NUL in it."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


# --- files that appear whole ----------------------------------------------------------------------


@contextlib.contextmanager
def temporary(folder: Path) -> Iterator[BinaryIO]:
    """A new file in the folder to write to, which `put` then moves to its place. Without that, and
    after an error, it is deleted. Its permissions are those of the umask.

    Its name tells its host and process, and it is locked while it is open: `remove_stale` tells by
    these the files of killed processes from those of living ones.
    """
    path = folder / f"minsd-{HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(path, "xb") as file:  # never through a link that lies there
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def sync(files: Sequence[BinaryIO]) -> None:
    """Have the disk write the contents of open files, at once: file systems join such requests, so
    that a batch costs little more than one file.
    """
    if len(files) == 1:
        _sync(files[0])
    elif files:
        with ThreadPoolExecutor(min(8, len(files))) as pool:
            list(pool.map(_sync, files))


def _sync(file: BinaryIO) -> None:
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # where nothing can be synced
            raise


def put(file: BinaryIO, path: Path, replace: bool = True, synced: bool = False) -> None:
    """Move a temporary file to `path`, once the disk has its contents: after a power cut the name
    stands for the whole file or for none. `synced`: they were given to `sync` already.

    FileExistsError, without `replace`, where there is such a file.
    """
    if not synced:
        _sync(file)
    if fcntl is None:
        file.close()  # Windows renames no open file
    if not replace:
        try:
            os.link(file.name, path)  # unlike a rename, it never replaces a file
            return  # the other name goes at the end of `temporary`
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(path):
                raise FileExistsError(path) from None
    os.replace(file.name, path)


def remove_stale(folder: Path) -> list[str]:
    """Remove the temporary files that killed processes left in a folder. Returns their names.

    A file that a process holds locked is never removed. Others are if their process, of this
    machine, has ended, or if they are an hour old: process numbers are used again, and the locks
    of other machines may not be visible here.
    """
    removed: list[str] = []
    if fcntl is None:
        return removed
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = TEMPORARY.fullmatch(entry.name)
            if match is None:
                continue
            with contextlib.suppress(OSError):
                if _stale(entry, match):
                    os.unlink(entry.path)
                    removed.append(entry.name)
    return removed


def _stale(entry: os.DirEntry[str], match: re.Match[str]) -> bool:
    assert fcntl is not None
    if not entry.is_file(follow_symlinks=False):
        return False
    old = time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE
    if not old and (match["host"] != HOST or _alive(int(match["pid"]))):
        return False
    with open(entry.path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks here: the name decides
            return match["host"] == HOST and not _alive(int(match["pid"]))
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


# --- locks, and files that several processes write ------------------------------------------------


def own(path: Path, append: bool = False) -> BinaryIO:
    """Open a file of this program for reading and writing, made where it is missing. `append`: what
    is written goes to its end, whoever else writes.

    A symbolic link in its place is replaced by a file, with a warning: in a stranger's folder it
    could lead to any file of the user. OSError for a folder, a pipe, or a file that may not be
    written to.
    """
    flags = os.O_RDWR | os.O_CREAT | (os.O_APPEND if append else 0)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # no system has all of them
        flags |= getattr(os, name, 0)
    for _ in range(3):
        try:
            handle = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EMLINK) or not path.is_symlink():
                raise
            warnings.warn(f"{path} was a symbolic link: replaced by a file", stacklevel=2)
            path.unlink(missing_ok=True)
            continue
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return os.fdopen(handle, "r+b")
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    raise OSError(errno.ELOOP, "a symbolic link", str(path))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[BinaryIO | None]:
    """Hold an exclusive lock on the folder among minsd processes; a no-op where the system cannot
    lock.

    Yields the lock's file, open for reading and writing. It holds the name of the last image saved.
    Yields None, with a warning, where something else is in its place that cannot be used.
    """
    path = folder / ".lock"
    try:
        file = own(path)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENXIO):
            raise
        warnings.warn(f"{path} cannot be used as a lock ({error.strerror}): remove it", stacklevel=3)
        yield None
        return
    with file:
        _wait(file, path)
        yield file  # closing it ends the lock


def _wait(file: BinaryIO, path: Path) -> None:
    """Lock a file, saying so where another process keeps it long (suspended, it holds its locks)."""
    if fcntl is None:
        return
    end = time.monotonic() + PATIENCE
    with contextlib.suppress(OSError):  # a network file system without locks
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.002)
        warnings.warn(f"another process has kept {path} locked for {PATIENCE} s: waiting", stacklevel=4)
        fcntl.flock(file, fcntl.LOCK_EX)
