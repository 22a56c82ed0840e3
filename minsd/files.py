"""Writes files completely or not at all, locks folders, and reads JSON and text of unknown origin.

Folders of images are shared by processes and machines, and may come from other people. So no file
is opened for writing through a symbolic link, JSON is parsed with limits, and text from files
reaches a terminal with its control characters escaped.
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
STALE = 3600  # seconds; an unlocked temporary file of this age was left behind by a killed process
PATIENCE = 10  # seconds to wait for a lock before a warning is printed
DEEPEST = 64  # levels of nesting in JSON; settings have at most six
LARGEST_JSON = 32 * 2**20  # bytes; parsed JSON takes up to twenty times as much memory as its text
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories that a terminal obeys or cannot show
JOINERS = "\u200c\u200d"  # zero-width characters that are part of words and of emoji


# --- text and JSON --------------------------------------------------------------------------------


def printable(text: object, most: int = 2000) -> str:
    """Returns the text as one line that is safe to print on a terminal. Line breaks, control
    characters and other invisible characters become escape sequences. If the text has more than
    `most` characters, its middle is left out."""
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
    """Returns `value` as JSON in one line. Characters outside ASCII are kept as they are, unless
    the text could then not be encoded in UTF-8, as with file names that are not UTF-8 (Python gives
    them lone surrogates). In this case all characters outside ASCII are escaped, and parsing
    restores them."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def encodable(text: str) -> str:
    """Returns the text in a form that UTF-8 can encode: characters for which this is impossible
    (lone surrogates) become escape sequences with a backslash."""
    return text.encode("utf-8", "backslashreplace").decode()


def parse_json(text: str | bytes, unique: bool = False) -> Any:
    """Parses JSON from a source that may be malicious.

    Raises ValueError if the text is not JSON or not UTF-8, is nested deeper than 64 levels, or has
    an integer of more than 400 digits. With `unique`, also raises it if an object has a key twice.
    The error message is one line with the reason, such as "not JSON: ...". It does not name the
    source of the text.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        raise ValueError("not text in UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None, parse_int=_whole)
        # Recursive functions would fail on deep values later. Counting brackets first is cheap.
        if text.count("[") + text.count("{") > DEEPEST and _deeper(value, DEEPEST):
            raise RecursionError
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply: too many brackets") from None
    return value


def read_json(path: Path, unique: bool = False) -> Any:
    """Reads a JSON file from a source that may be malicious. With `unique`, no object in the file
    may have a key twice.

    Raises FileNotFoundError if the file is missing. Raises ValueError if it cannot be read, is a
    pipe or a device, has more than 32 MiB, or has content that `parse_json` refuses. The error
    message is one line and contains the path.
    """
    try:
        with open(path, "rb", opener=without_blocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{path} is not a regular file")
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"{path} has more than {LARGEST_JSON >> 20} MiB")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return parse_json(content.removeprefix(b"\xef\xbb\xbf"), unique)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def without_blocking(path: str, flags: int) -> int:
    """Opens a file and returns its file descriptor. Use this function as the argument `opener` of
    the built-in `open`. The difference to the default opener: if `path` is a named pipe, it does
    not wait until another process opens the pipe too."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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
    """Returns True if the dicts and lists in `value`, parsed JSON, are nested deeper than
    `levels`."""
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
    """Returns True if `path` exists. If it cannot be a path, because it is too long or contains a
    NUL character, returns False rather than raising an error."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


# --- files that appear whole ----------------------------------------------------------------------


@contextlib.contextmanager
def temporary(folder: Path) -> Iterator[BinaryIO]:
    """Creates a temporary file in `folder` and yields it, open for writing in binary mode. Within
    the `with` block, `put` can move the file to its final name. Otherwise the file is deleted at
    the end of the block. The file's permissions follow the umask.

    The file's name contains the host and the process number, and the file is locked while it is
    open. This shows `remove_stale` whether the process still runs.
    """
    path = folder / f"minsd-{HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(path, "xb") as file:  # "x" does not follow a symbolic link
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def sync(files: Sequence[BinaryIO]) -> None:
    """Writes the contents of open files to the disk (fsync). Several files in one call take little
    longer than one file, because they are synced at the same time."""
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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # no fsync on this file system
            raise


def put(file: BinaryIO, path: Path, replace: bool = True, synced: bool = False) -> None:
    """Gives a temporary file (from `temporary`) its final name `path`. The contents are written to
    the disk first, so that a power cut never leaves an incomplete file at `path`. Set `synced` if
    `sync` has been called for the file already.

    If `path` exists, it is replaced, or, if `replace` is False, FileExistsError is raised.
    """
    if not synced:
        _sync(file)
    if fcntl is None:
        file.close()  # Windows cannot rename an open file
    if not replace:
        try:
            os.link(file.name, path)  # unlike a rename, a link never replaces a file
            return  # `temporary` removes the other name
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(path):
                raise FileExistsError(path) from None
    os.replace(file.name, path)


def write(path: Path, text: str) -> None:
    """Writes a text file. If writing is interrupted, `path` keeps its old content or stays missing;
    there is never an incomplete file."""
    with temporary(path.parent) as file:
        file.write(encodable(text).encode())
        put(file, path)


def remove_stale(folder: Path) -> list[str]:
    """Removes temporary files that killed processes have left in a folder. Returns the names of the
    removed files.

    A file that a running process has locked is never removed. A file without a lock is removed if
    its process ran on this machine and has ended. It is also removed if it is older than an hour,
    because another process may have the same number by then, and the processes of other machines
    cannot be seen.
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
    """Opens a file that minsd itself manages, for reading and writing in binary mode. Creates the
    file if it is missing. With `append`, every write goes to the end of the file, even while other
    processes write to it.

    If `path` is a symbolic link, the link is replaced by an empty file, with a warning: in a folder
    from somebody else, a link could point to any file of the user. Raises OSError if `path` is a
    folder, a pipe or a file that may not be written.
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
    """Locks a folder for the `with` block: only one minsd process at a time can have the lock, and
    others wait for it. Where the system cannot lock files, the block runs without a lock.

    Yields the lock file, open for reading and writing in binary mode. It contains the file name of
    the last image that was saved in the folder. If the lock file cannot be used, for example
    because a folder has its name, warns, runs the block without a lock, and yields None.
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
    """Waits until this process has an exclusive lock on `file`. After 10 seconds of waiting, warns
    and goes on waiting, because a suspended process may hold the lock for ever. `path` is the
    file's path for this warning."""
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
