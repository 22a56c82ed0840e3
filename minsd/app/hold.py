"""Ensures that only one run with --resume (with all its processes) works on a folder at a time.

Two runs that resume one folder would find the same images missing and draw them twice. So every
process of such a run locks one byte of the file .runs.lock in the folder. The operating system
releases the lock when the process ends, even by a kill. The text of the file describes the run.

Processes of a run without --resume also lock bytes, in another part of the file. Such runs may
share a folder; their locks only let a process wait for the other processes of its run
(`Hold.wait_for_others`).

Where the system or a network file system has no locks, runs do not exclude each other.
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
REGION = 2 * LARGEST_WORLD  # bytes of the file per run; the first region is for runs with --resume


class Hold:
    """This process's lock on an output folder, from `take` to `release` or the end of the process.

    `resume` and `wait` are the options --resume and --wait. `say(message)` is called when the
    process has to wait.
    """

    def __init__(self, folder: Path, resume: bool, wait: bool, say: Callable[[str], None]):
        self.folder = folder
        self.share = Share.from_environment()
        self.resume = resume
        self.wait = wait or restarted()  # processes of the attempt before may still be ending
        self.say = say
        self.start = 0 if resume else REGION * (1 + zlib.crc32(run_name().encode()))
        self.file: BinaryIO | None = None

    def take(self) -> None:
        """Locks the folder, and creates it if it is missing. Does nothing in three cases: this
        object has locked the folder already, the run has a single process and no --resume, or the
        system has no locks.

        Runs with --resume exclude each other. If another such run has locked the folder, waits
        until that run ends, provided that `wait` was given to the constructor or torchrun has
        restarted this process. Otherwise raises ValueError with the other run's process and
        machine.
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
        """Waits until every other process of this run has ended or is waiting in this method too. A
        process that is about to fail calls this method first, because torchrun stops all processes
        when one fails."""
        if self.file is None or self.share.world == 1:
            return
        told = False
        while not self._alone():
            if not told:
                # Two processes that wait must not wait for each other.
                self._lock(self.share.rank, 1, on=False)
                self.say("waiting for the other processes to end before this one fails")
                told = True
            time.sleep(0.5)

    def release(self) -> None:
        """Unlocks the folder."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def _try(self) -> str | None:
        """Tries to lock the folder once. Returns None if this process may work on the folder,
        otherwise a description of the run that has locked it. If the lock file cannot be used,
        warns and returns None."""
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
            rank = self.share.rank
            mine = self._lock(rank, 1)
            if not self.resume:
                return None
            alone = mine and self._free(0, rank) and self._free(rank + 1, REGION - rank - 1)
            name, holder = self._read()
            if mine and (alone or (self.share.world > 1 and name == run_name())):
                if alone:
                    self._write()
                return None
            self.release()
            return holder

    def _lock(self, first: int, count: int, on: bool = True) -> bool:
        """Locks `count` bytes of the lock file, or unlocks them if `on` is False. The bytes begin
        at byte `first` of this run's region, the part of the file that this run uses; all runs with
        --resume have the same region. Returns False, without waiting, if another process has locked
        any of these bytes. Returns True otherwise, also where the file system has no locks."""
        assert fcntl is not None and self.file is not None
        how = fcntl.LOCK_EX | fcntl.LOCK_NB if on else fcntl.LOCK_UN
        try:
            fcntl.lockf(self.file, how, count, self.start + first)
        except OSError as error:  # other error numbers come from file systems without locks
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True

    def _alone(self) -> bool:
        """Returns whether no other process of this run holds a lock on the folder."""
        with files.locked(self.folder):  # `_free` briefly locks all bytes, which `_try` must not see
            return self._free(0, REGION)

    def _free(self, first: int, count: int) -> bool:
        """Returns whether no other process has locked any of `count` bytes of the lock file. The
        bytes begin at byte `first` of this run's region, as in `_lock`. Leaves these bytes
        unlocked."""
        if count == 0:
            return True
        free = self._lock(first, count)
        if free:
            self._lock(first, count, on=False)
        return free

    def _read(self) -> tuple[object, str]:
        """Reads from the lock file which run has locked the folder. Returns (name, description) of
        that run. If the file describes no run, the name is None."""
        assert self.file is not None
        self.file.seek(0)
        try:
            run = files.parse_json(self.file.read(10_000))
            return run["run"], f"process {run['pid']} on {run['host']}, since {run['since']}"
        except (ValueError, TypeError, KeyError):
            return None, f"{NAME} names no process"

    def _write(self) -> None:
        """Writes the description of this run to the lock file."""
        assert self.file is not None
        since = datetime.now().isoformat(" ", "seconds")
        run = {"run": run_name(), "host": files.HOST, "pid": os.getpid(), "since": since}
        self.file.seek(0)
        self.file.truncate()
        self.file.write(json.dumps(run).encode() + b"\n")
        self.file.flush()
