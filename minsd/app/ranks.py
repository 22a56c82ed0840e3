"""Reads from the environment which of a run's processes this is (torchrun's RANK, WORLD_SIZE)."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

LARGEST_WORLD = 1_000_000  # the most processes of one run


@dataclass(frozen=True)
class Share:
    """The index of this process in the run (`rank`, from 0), and the number of processes in the run
    (`world`)."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Share":
        """Returns the share that RANK and WORLD_SIZE in the environment state. Raises ValueError,
        with a message of one line, if they are no whole numbers or contradict each other. Otherwise
        images would be left out silently, or drawn by every process."""
        rank = _number("RANK")
        world = _number("WORLD_SIZE")
        if rank is not None and world is None:
            raise ValueError(
                f"RANK is {rank} in the environment without WORLD_SIZE: set both, as torchrun does, "
                "or unset RANK"
            )
        if rank is None and world is not None and world > 1:
            raise ValueError(
                f"WORLD_SIZE is {world} in the environment without RANK: set both, as torchrun does, "
                "or unset WORLD_SIZE"
            )
        rank = rank or 0
        world = 1 if world is None else world
        if not rank < world <= LARGEST_WORLD:
            raise ValueError(
                f"RANK is {rank} and WORLD_SIZE {world} in the environment: "
                "ranks count from 0 to WORLD_SIZE - 1"
            )
        return cls(rank, world)

    @property
    def rows_file(self) -> str:
        return f"runs-{self.rank}.jsonl" if self.world > 1 else "runs.jsonl"

    def parts(self, folder: Path, stem: str) -> list[Path]:
        """Returns those files in the folder that this process has to merge. Their names are `stem`,
        a hyphen and the rank of the process that wrote the file, such as runs-3.jsonl. A process
        merges its own file. The first process also merges the files of ranks that this run does not
        have, which a killed run with more processes left behind."""
        numbers = {path: path.stem.removeprefix(f"{stem}-") for path in folder.glob(f"{stem}-*.jsonl")}
        ranks = {path: int(number) for path, number in numbers.items() if number.isdecimal()}
        left = self.world if self.rank == 0 else LARGEST_WORLD
        return sorted(path for path, rank in ranks.items() if rank == self.rank or rank >= left)

    @property
    def label(self) -> str:
        """Returns the beginning of this process's messages, such as "rank 1 of 2: "; empty for a
        single process."""
        return f"rank {self.rank} of {self.world}: " if self.world > 1 else ""


def label() -> str:
    """Returns the beginning of this process's messages, such as "rank 1 of 2: "; empty for a single
    process. It is also empty if RANK or WORLD_SIZE is invalid, so that the error about them can be
    printed."""
    try:
        return Share.from_environment().label
    except ValueError:
        return ""


def run_name() -> str:
    """Returns a name that all processes of a run share and no other run has. It consists of
    torchrun's run id and address, or of Slurm's job and step."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    if "MASTER_ADDR" not in os.environ:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    return " ".join(os.environ.get(name, "-") for name in (*names, "WORLD_SIZE"))


def restarted() -> bool:
    """Returns whether torchrun has restarted this process. Processes of the previous attempt may
    then still be ending.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def local_rank() -> int | None:
    """Returns the index of this process on its machine (LOCAL_RANK), which is also the index of the
    GPU that the process uses. Returns None if LOCAL_RANK is not set."""
    return _number("LOCAL_RANK")


def _number(name: str) -> int | None:
    """Reads a whole number from an environment variable. Returns None if the variable is not set or
    empty. Raises ValueError for anything else.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{name} is {text!r} in the environment: it must be a whole number")
    return int(text)
