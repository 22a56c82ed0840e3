"""Benches: one script per question, run from the checkout as `python -m bench.NAME`. What they share is here.

Importing this package imports minsd first, which settles the import path of a bare checkout.
"""

import csv
import datetime
import functools
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import minsd

RESULTS = Path(__file__).parent / "results"

# --- rows and tables ----------------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """A value or argument as rows have it: of an absolute path, behind --flag= too, the last part alone."""
    flag, equals, path = text.partition("=") if text.startswith("-") else ("", "", text)
    return flag + equals + Path(path).name if Path(path).is_absolute() else text


def on_gpu(device) -> bool:
    return str(device).startswith("cuda")


def environment(device: str = "cpu") -> dict[str, str]:
    """What a figure depends on: the columns that end every CSV row."""
    import torch

    if on_gpu(device):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
            if line.startswith("model name"):
                name = (
                    f"{line.split(':')[1].strip()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
                )
                break
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "minsd": minsd.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python -m " + shlex.join([bench_name(), *map(shown, sys.argv[1:])]),
    }


def write_csv(name: str, rows: list[dict], device: str = "cpu") -> Path:
    """Append rows (dicts of one shape) with the environment's columns to bench/results/NAME.csv."""
    path, env = RESULTS / f"{name}.csv", environment(device)
    rows = [
        {key: shown(value) if isinstance(value, str) else value for key, value in row.items()} | env
        for row in rows
    ]
    new = not path.exists()
    RESULTS.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def print_table(rows: list[dict]) -> None:
    """Rows (dicts of one shape) as a plain aligned table."""
    cells = [list(rows[0])] + [
        [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def report(name: str, rows: list[dict], keep: bool, device: str = "cpu") -> None:
    """The table; and with `keep`, a bench's --csv, the rows in bench/results/NAME.csv."""
    print_table(rows)
    if keep:
        print("written to", write_csv(name, rows, device))


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    middle, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def rate(name: str, successes: int, n: int) -> dict:
    """A rate and its interval as columns NAME and NAME_95."""
    low, high = wilson(successes, n)
    return {name: round(successes / n, 3), f"{name}_95": f"{low:.3f}-{high:.3f}"}


# --- seconds and memory -------------------------------------------------------------------------------------------------


def wait(device) -> None:
    """Until a GPU has done what it was told."""
    if on_gpu(device):
        import torch

        torch.cuda.synchronize()


def clocked(device, run, *args):
    """-> what run(*args) gives, its seconds, and its processor seconds: of all threads, waiting for a core left out."""
    wait(device)
    start, cpu = time.perf_counter(), time.process_time()
    result = run(*args)
    wait(device)
    return result, time.perf_counter() - start, time.process_time() - cpu


def forget_peak(device) -> None:
    """Memory's peak begins anew; where Linux does not let it, it is the process's."""
    if on_gpu(device):
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device="cpu") -> float:
    """Peak memory in MB since the process began or `forget_peak`: a GPU's allocated, else what was resident."""
    if on_gpu(device):
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return (int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


# --- processes ----------------------------------------------------------------------------------------------------------


def bench_name() -> str:
    """Of the bench that runs, as `python -m` takes it."""
    return f"bench.{Path(sys.argv[0]).stem}"


def in_own_process(*options: str) -> dict:
    """This bench again in a new process, its arguments and `options` -> the line of JSON that it prints last.

    SystemExit, with all that it wrote to stderr, where it fails.
    """
    command = ["-m", bench_name(), *sys.argv[1:], *options]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}python {shlex.join(command)} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def loaded(model: str):
    """minsd.load(model) on the CPU, once a process: for the jobs of a pool, which take models by name."""
    return minsd.load(model, device="cpu")


def pool(workers: int, model: str):
    """A pool of processes of one thread each, begun with the model loaded; they share one that is loaded here already."""
    return multiprocessing.get_context("fork").Pool(workers, _begin, (model,))


def _begin(model: str) -> None:
    import torch

    torch.set_num_threads(1)
    loaded(model)
