"""The program behind `python -m minsd.generate`: options, requests, jobs, runs. The model itself is
minsd/pipeline.py.
"""

import errno
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from minsd.app.ranks import label
from minsd.files import printable


@dataclass
class Tally:
    """Counts of a run's images: how many are wanted, saved so far, and failed so far. The messages
    at the end of the run state these counts."""

    made: int = 0  # images saved
    wanted: int = 0
    failed: int = 0  # images that could not be drawn or saved
    mistaken: bool = False  # the last failure was the user's mistake, not the machine's
    single: bool = False  # only one image was asked for


def mistake(error: Exception) -> bool:
    """Returns whether an error is a mistake of the user (ValueError or FileNotFoundError), for
    which the program exits with code 2. For other errors the code is 1."""
    return isinstance(error, (ValueError, FileNotFoundError))


def reason(error: Exception, hint: str = " (--debug shows where)") -> str:
    """Returns one line that tells the user what went wrong. For a mistake of the user, it is the
    error's message. For a full disk, it says what to do. For any other error, it is the error's
    type and message, followed by `hint`."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space, and give the same command with --resume"
    if mistake(error):
        return " ".join(str(error).split())
    return " ".join(f"{type(error).__name__}: {error}{hint}".split())


@contextmanager
def warned() -> Iterator[None]:
    """Context manager. Prints every warning that is issued within the block as one line on standard
    error, above the progress bar if there is one."""

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        from tqdm import tqdm

        tqdm.write(f"minsd: warning: {printable(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def ended(program: Callable[[], int]) -> int:
    """Runs `program` and returns its exit code. If `program` raises an error, returns 2 for a
    mistake of the user and 1 for any other error. If the user stops it, returns 130. Warnings and
    errors are printed to standard error, one line each."""
    try:
        with warned():
            return program()
    except Exception as error:
        print(f"minsd: error: {label()}{printable(reason(error, ''))}", file=sys.stderr)
        return 2 if mistake(error) else 1
    except KeyboardInterrupt:
        print("minsd: stopped; the same command goes on", file=sys.stderr)
        return 130
