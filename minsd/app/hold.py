"""Who works on a folder: one run with --resume at a time, with all of its processes.

Two runs that resume one folder would both find the same images missing, and make them twice. So
every process of such a run locks a byte of the folder's file .runs.lock. The system ends the lock
with the process, however it dies. The file's text says who the run is. The processes of a run
without --resume lock bytes too, but elsewhere in the file: such runs share a folder, and only a
process's wait for the others of its own run looks at them (`Hold.wait_for_others`).

Where the system or a network file system cannot lock, nothing is held.
"""

import errno
import json
import os
import time
import warnings
import zlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from minsd import files
from minsd.app.ranks import LARGEST_WORLD, Share, restarted, run_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".runs.lock"
REGION = 2 * LARGEST_WORLD  # bytes of the file per run; the first are those of runs with --resume


class Hold:
    """This process's hold on a folder, from `take` to the end of the process or `release`."""

    def __init__(self, folder: Path, resume: bool, wait: bool, say: Callable[[str], None]):
        self.folder = folder
        self.share = Share.from_environment()
        self.resume = resume
        self.wait = wait or restarted()  # the processes of the attempt before are still ending
        self.say = say
        # Bytes of other processes of this run, and, with --resume, of any other run.
        self.start = 0 if resume else REGION * (1 + zlib.crc32(run_name().encode()))
        self.file: BinaryIO | None = None

    def take(self) -> None:
        """Hold the folder, which is made where it is missing. Does nothing where it is held
        already.

        ValueError, saying who holds it, where another run with --resume does; with `wait`, waits.
        """
        if fcntl is None or self.file is not None or not (self.resume or self.share.world > 1):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        told = False
        while (holder := self._try()) is not None:
            if not self.wait:
                raise ValueError(
                    f"another run with --resume works on {self.folder}: {holder}; wait for its end "
                    "(--wait does), or give another --out"
                )
            if not told:
                self.say(f"waiting for the run that works on {self.folder}: {holder}")
                told = True
            time.sleep(1)

    def wait_for_others(self) -> None:
        """Return when no other process of this run draws any more, so that whoever started them
        does not end them because this one has failed.
        """
        if self.file is None or self.share.world == 1:
            return
        told = False
        while not self._free(0, REGION):
            if not told:
                self._lock(self.share.rank, 1, on=False)  # or two that wait would wait for each other
                self.say("waiting for the other processes to end before this one fails")
                told = True
            time.sleep(0.5)

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _try(self) -> str | None:
        """Try to hold the folder. Returns who holds it already, or None where this process does
        now.
        """
        with files.locked(self.folder):  # one process at a time
            try:
                self.file = files.own(self.folder / NAME)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EROFS):
                    raise
                warnings.warn(
                    f"{self.folder / NAME} cannot be used ({error.strerror}): remove it", stacklevel=2
                )
                return None
            mine = self._lock(self.share.rank, 1)
            if mine and not self.resume:
                return None
            rank = self.share.rank
            alone = mine and self._free(0, rank) and self._free(rank + 1, REGION - rank - 1)
            name, holder = self._read()
            if mine and (alone or (self.share.world > 1 and name == run_name())):
                if alone:
                    self._write()
                return None
            self.release()
            return holder

    def _lock(self, first: int, count: int, on: bool = True) -> bool:
        """Lock or unlock bytes of this run's region. Returns whether no other process has any."""
        assert fcntl is not None and self.file is not None
        how = fcntl.LOCK_EX | fcntl.LOCK_NB if on else fcntl.LOCK_UN
        try:
            fcntl.lockf(self.file, how, count, self.start + first)
        except OSError as error:  # any other: a file system without locks
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True

    def _free(self, first: int, count: int) -> bool:
        """Whether no other process has locked any of these bytes of the region. Leaves them
        unlocked.
        """
        if count == 0:
            return True
        free = self._lock(first, count)
        if free:
            self._lock(first, count, on=False)
        return free

    def _read(self) -> tuple[object, str]:
        """The run that the file names: its own name, and how to describe it."""
        assert self.file is not None
        self.file.seek(0)
        try:
            said = files.parse_json(self.file.read(10_000))
            return said["run"], f"process {said['pid']} on {said['host']}, since {said['since']}"
        except (ValueError, TypeError, KeyError):
            return None, f"{NAME} does not say which"

    def _write(self) -> None:
        assert self.file is not None
        since = datetime.now().isoformat(" ", "seconds")
        said = {"run": run_name(), "host": files.HOST, "pid": os.getpid(), "since": since}
        self.file.seek(0)
        self.file.truncate()
        self.file.write(json.dumps(said).encode() + b"\n")
        self.file.flush()
