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
    """The numbers of a run's images that were wanted, saved, and have failed so far, for the
    messages at the end of the run."""

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
    """Returns the message of an error for the user, in one line. If the error is no mistake of the
    user, the message contains the error's type and ends with `hint`."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space, and give the same command with --resume"
    if mistake(error):
        return " ".join(str(error).split())
    return " ".join(f"{type(error).__name__}: {error}{hint}".split())


@contextmanager
def warned() -> Iterator[None]:
    """Prints the warnings of the block in one line each, above a progress bar."""

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        from tqdm import tqdm

        tqdm.write(f"minsd: warning: {printable(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def ended(program: Callable[[], int]) -> int:
    """Runs a program and returns its exit code, or 2 for the user's mistakes, 1 for other errors,
    and 130 if the user stopped it. Prints warnings and errors in one line each."""
    try:
        with warned():
            return program()
    except Exception as error:
        print(f"minsd: error: {label()}{printable(reason(error, ''))}", file=sys.stderr)
        return 2 if mistake(error) else 1
    except KeyboardInterrupt:
        print("minsd: stopped; the same command goes on", file=sys.stderr)
        return 130
