"""Benches: one script per question, run from the checkout as `python -m bench.NAME`.

This file holds the functions that all benches share. Importing this package imports minsd first,
which sets up the import path of a bare checkout.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import json
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
Row = dict[str, Any]  # a row of a table: name of the column -> value

RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None, *tables: str) -> argparse.ArgumentParser:
    """Returns an option parser with the option --csv, which all benches have. The parser's
    description is the first line of `doc`, the bench's docstring. `tables` are the names, without
    .csv, of the files that the bench writes with --csv."""
    out = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    files = " or ".join(f"{table}.csv" for table in tables)
    out.add_argument("--csv", action="store_true", help=f"append the rows to {files} in bench/results")
    return out


# --- rows and tables ------------------------------------------------------------------------------


def shown(text: str) -> str:
    """Returns a value, or an argument of the command line, in the form in which it is written to a
    CSV file. Only the last part of an absolute path is kept, also of a path in --flag=PATH."""
    flag, equals, path = text.partition("=") if text.startswith("-") else ("", "", text)
    return flag + equals + Path(path).name if Path(path).is_absolute() else text


def on_gpu(device: Device) -> bool:
    return str(device).startswith("cuda")


def _processor() -> str:
    """Returns the name of the CPU, from /proc/cpuinfo if that exists, otherwise from Python."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return f"{platform.processor() or platform.machine()} CPU"


def environment(device: Device = "cpu") -> dict[str, str]:
    """Returns the conditions of a measurement on `device` (its name, versions, date, command), as
    columns. They are the last columns of every CSV row."""
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
    """Appends rows to bench/results/NAME.csv, where NAME is `name`, and returns the path of that
    file. All rows must have the same columns. The columns of `environment` are added to each row.
    If the file has other columns, it gets the columns of both, and the values that a row does not
    have are empty.
    """
    path = RESULTS / f"{name}.csv"
    conditions = environment(device)
    complete = []
    for row in rows:
        values = {k: shown(v) if isinstance(v, str) else v for k, v in row.items()}
        complete.append(values | conditions)
    RESULTS.mkdir(exist_ok=True)
    if path.exists():
        with path.open(newline="") as file:
            complete = [*csv.DictReader(file), *complete]
    names = {name: "" for row in complete for name in row}
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(names), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(complete)
    part.replace(path)
    return path


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows as an aligned table. All rows must have the same columns."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def report(name: str, rows: Sequence[Row], keep: bool, device: Device = "cpu") -> None:
    """Prints rows as a table. If `keep` is True (the option --csv), also appends them to
    bench/results/NAME.csv, where NAME is `name`. `device` is the device that was measured."""
    print_table(rows)
    if keep:
        print("written to", write_csv(name, rows, device))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval (low, high) of the rate successes / n."""
    from minsd.app import statistics

    _, low, high = statistics.wilson(successes, n)
    return low, high


def rate(name: str, successes: int, n: int) -> Row:
    """Returns the rate successes / n and its 95 % interval, as two columns of a row. Their names
    are `name`, and `name` followed by _95."""
    low, high = wilson(successes, n)
    return {name: round(successes / n, 3), f"{name}_95": f"{low:.3f}-{high:.3f}"}


def without_missing(providers: Sequence[str], package: str = "diffusers") -> list[str]:
    """Returns those of the providers (implementations to compare) that can run. If `package` is not
    installed, providers whose names begin with its name are left out, and their names are printed.
    """
    if find_spec(package) is not None:
        return list(providers)
    left_out = [name for name in providers if name.startswith(package)]
    print(f"left out, as {package} is not installed: {', '.join(left_out)}", file=sys.stderr)
    return [name for name in providers if name not in left_out]


# --- seconds and memory ---------------------------------------------------------------------------


def wait(device: Device) -> None:
    """Waits until a GPU has finished its queued work. Returns at once on a CPU."""
    if on_gpu(device):
        import torch

        torch.cuda.synchronize()


def clocked(device: Device, run: Callable[..., R], *args: Any) -> tuple[R, float, float]:
    """Calls run(*args) on `device`. Returns (result, seconds, processor seconds).

    Processor seconds are the sum over all threads, without the time spent waiting for a core.
    """
    wait(device)
    start = time.perf_counter()
    cpu = time.process_time()
    result = run(*args)
    wait(device)
    return result, time.perf_counter() - start, time.process_time() - cpu


def forget_peak(device: Device) -> None:
    """Resets the peak memory that `peak_mb` returns. Where the system does not allow this,
    `peak_mb` continues to return the peak since the process began."""
    if on_gpu(device):
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: Device = "cpu") -> float:
    """Returns the peak memory in MB since the process began or since the last `forget_peak`.

    On a GPU this is the memory allocated by PyTorch, on a CPU the resident memory.
    """
    if on_gpu(device):
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return (int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


# --- processes ------------------------------------------------------------------------------------


def bench_name() -> str:
    """Returns the name of the running bench in the form that `python -m` takes: bench.NAME."""
    return f"bench.{Path(sys.argv[0]).stem}"


def in_own_process(*options: str) -> dict[str, Any]:
    """Runs this bench again in a new process, with the same arguments followed by `options`.

    Returns the JSON on the last line that the process prints. If the process fails, raises
    SystemExit with the text that the process wrote to stderr.
    """
    command = ["-m", bench_name(), *sys.argv[1:], *options]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}python {shlex.join(command)} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def loaded(model: str) -> StableDiffusion:
    """Loads a model on the CPU and returns it. Later calls in the same process return the same
    object, so that each process of a `pool` loads the model only once."""
    from minsd.pipeline import load

    return load(model, device="cpu")


def pool(workers: int, model: str) -> multiprocessing.pool.Pool:
    """Returns a pool of single-threaded processes, each of which has the model loaded.

    If this process has loaded the model already, the processes of the pool share its memory.
    """
    return multiprocessing.get_context("fork").Pool(workers, _begin, (model,))


def _begin(model: str) -> None:
    import torch

    torch.set_num_threads(1)
    loaded(model)
