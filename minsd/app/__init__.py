"""The program behind `python -m minsd.generate`: options, requests, jobs, runs. The model itself is
minsd/pipeline.py.
"""

import errno
from dataclasses import dataclass


@dataclass
class Tally:
    """How many images of a run are saved so far, for the messages that end it."""

    made: int = 0
    wanted: int = 0
    failed: int = 0  # images that could not be drawn or saved
    mistaken: bool = False  # the last of them by what the user asked for, rather than by the machine
    single: bool = False  # the run was asked for one image


def mistake(error: Exception) -> bool:
    """Whether an error is the user's, with exit code 2, rather than the machine's."""
    return isinstance(error, (ValueError, FileNotFoundError))


def reason(error: Exception) -> str:
    """An error as one line for the user."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space, and give the same command with --resume"
    if mistake(error):
        return " ".join(str(error).split())
    return " ".join(f"{type(error).__name__}: {error} (--debug shows where)".split())
