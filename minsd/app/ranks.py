"""This process among those of one run, as torchrun and Slurm state it in the environment."""

import os
import re
from dataclasses import dataclass

LARGEST_WORLD = 1_000_000  # processes of one run


@dataclass(frozen=True)
class Share:
    """This process among all of its run (torchrun's)."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Share":
        """From RANK and WORLD_SIZE. ValueError, in one line, where they do not fit together: images
        would be left out silently, or drawn by every process.
        """
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

    @property
    def label(self) -> str:
        """How this process's messages begin where there are several."""
        return f"rank {self.rank} of {self.world}: " if self.world > 1 else ""


def label() -> str:
    """`Share.label`, also where the environment is wrong: how an error begins."""
    try:
        return Share.from_environment().label
    except ValueError:
        return ""


def run_name() -> str:
    """Equal for the processes of one run alone: torchrun's id and address, or Slurm's step."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    if "MASTER_ADDR" not in os.environ:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    return " ".join(os.environ.get(name, "-") for name in (*names, "WORLD_SIZE"))


def restarted() -> bool:
    """Whether torchrun has started this process again, while others of the run may still be
    ending.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def local_rank() -> int | None:
    """The process's number on its machine, which is that of its GPU."""
    return _number("LOCAL_RANK")


def _number(name: str) -> int | None:
    """A whole number of the environment; None where it is not set or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{name} is {text!r} in the environment: it must be a whole number")
    return int(text)
