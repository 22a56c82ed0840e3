"""Benches: one script per question, run from the checkout as `python -m bench.NAME`.

This file holds the functions that they share. Importing this package imports minsd first, which
sets up the import path of a bare checkout.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import json
import math
import multiprocessing
import multiprocessing.pool
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import minsd

if TYPE_CHECKING:
    import torch

    from minsd.pipeline import StableDiffusion

    Device = str | torch.device

R = TypeVar("R")
Row = dict[str, Any]  # a row of a table: column -> value

RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None, *tables: str) -> argparse.ArgumentParser:
    """Returns a bench's option parser: its question as the description, and --csv, which every
    bench has."""
    out = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    files = " or ".join(f"{table}.csv" for table in tables)
    out.add_argument("--csv", action="store_true", help=f"append the rows to {files} in bench/results")
    return out


# --- rows and tables ------------------------------------------------------------------------------


def shown(text: str) -> str:
    """Returns a value or argument as rows record it. An absolute path, also behind --flag=, is cut
    to its last part."""
    flag, equals, path = text.partition("=") if text.startswith("-") else ("", "", text)
    return flag + equals + Path(path).name if Path(path).is_absolute() else text


def on_gpu(device: Device) -> bool:
    return str(device).startswith("cuda")


def _processor() -> str:
    """Returns the CPU's name, as Linux states it or else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return f"{platform.processor() or platform.machine()} CPU"


def environment(device: Device = "cpu") -> dict[str, str]:
    """Returns the conditions of a measurement, which are the columns that end every CSV row."""
    import torch

    if on_gpu(device):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "minsd": minsd.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python -m " + shlex.join([bench_name(), *map(shown, sys.argv[1:])]),
    }


def write_csv(name: str, rows: Sequence[Row], device: Device = "cpu") -> Path:
    """Appends rows with the same columns, and the environment's, to bench/results/NAME.csv."""
    path = RESULTS / f"{name}.csv"
    conditions = environment(device)
    complete = []
    for row in rows:
        values = {k: shown(v) if isinstance(v, str) else v for k, v in row.items()}
        complete.append(values | conditions)
    new = not path.exists()
    RESULTS.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(complete[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(complete)
    return path


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows with the same columns as an aligned table."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def report(name: str, rows: Sequence[Row], keep: bool, device: Device = "cpu") -> None:
    """Prints the table. With `keep`, which is a bench's --csv, also appends it to
    bench/results/NAME.csv."""
    print_table(rows)
    if keep:
        print("written to", write_csv(name, rows, device))


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the 95 % interval of a rate (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    z2 = z * z
    middle = p + z2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def rate(name: str, successes: int, n: int) -> Row:
    """Returns a rate and its interval as columns NAME and NAME_95."""
    low, high = wilson(successes, n)
    return {name: round(successes / n, 3), f"{name}_95": f"{low:.3f}-{high:.3f}"}


def without_missing(providers: Sequence[str], package: str = "diffusers") -> list[str]:
    """Returns the providers, without those that need a package that is not installed. Prints which
    those are."""
    if find_spec(package) is not None:
        return list(providers)
    left_out = [name for name in providers if name.startswith(package)]
    print(f"left out, as {package} is not installed: {', '.join(left_out)}", file=sys.stderr)
    return [name for name in providers if name not in left_out]


# --- seconds and memory ---------------------------------------------------------------------------


def wait(device: Device) -> None:
    """Waits for a GPU to finish its queued work."""
    if on_gpu(device):
        import torch

        torch.cuda.synchronize()


def clocked(device: Device, run: Callable[..., R], *args: Any) -> tuple[R, float, float]:
    """Returns the result of run(*args), its seconds, and its processor seconds.

    Processor seconds are the sum over all threads; time spent waiting for a core does not count.
    """
    wait(device)
    start = time.perf_counter()
    cpu = time.process_time()
    result = run(*args)
    wait(device)
    return result, time.perf_counter() - start, time.process_time() - cpu


def forget_peak(device: Device) -> None:
    """Resets the peak that `peak_mb` reports. If the system refuses, the peak of the whole process
    remains."""
    if on_gpu(device):
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: Device = "cpu") -> float:
    """Returns the peak memory in MB since the process began, or since `forget_peak`.

    On a GPU it is the memory allocated by PyTorch, on a CPU the resident memory.
    """
    if on_gpu(device):
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return (int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


# --- processes ------------------------------------------------------------------------------------


def bench_name() -> str:
    """Returns the running bench's name, as `python -m` takes it."""
    return f"bench.{Path(sys.argv[0]).stem}"


def in_own_process(*options: str) -> dict[str, Any]:
    """Runs this bench again in a new process, with its arguments and `options`.

    Returns the JSON on its last line of output. SystemExit with its stderr if it fails.
    """
    command = ["-m", bench_name(), *sys.argv[1:], *options]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}python {shlex.join(command)} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def loaded(model: str) -> StableDiffusion:
    """Returns the model on the CPU, loaded once per process. The jobs of a pool get their model
    from this function, by name."""
    from minsd.pipeline import load

    return load(model, device="cpu")


def pool(workers: int, model: str) -> multiprocessing.pool.Pool:
    """Returns a pool of single-threaded processes with the model loaded.

    If this process has loaded the model already, they share its memory.
    """
    return multiprocessing.get_context("fork").Pool(workers, _begin, (model,))


def _begin(model: str) -> None:
    import torch

    torch.set_num_threads(1)
    loaded(model)
