"""Benches: one script per question, run from the checkout as `python -m bench.NAME`. What they share is here.

Importing this package imports minsd first, which settles the import path of a bare checkout.
"""

import csv
import datetime
import math
import os
import platform
import resource
import sys
from pathlib import Path

import minsd

RESULTS = Path(__file__).parent / "results"


def environment(device: str = "cpu") -> dict[str, str]:
    """What a figure depends on: the columns that end every CSV row."""
    import torch

    if str(device).startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
            if line.startswith("model name"):
                name = f"{line.split(':')[1].strip()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
                break
    return {
        "device": name, "torch": torch.__version__, "python": platform.python_version(), "minsd": minsd.__version__,
        "date": datetime.date.today().isoformat(), "command": "python -m " + " ".join(["bench." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
    }


def write_csv(name: str, rows: list[dict], device: str = "cpu") -> Path:
    """Append rows (dicts of one shape) with the environment's columns to bench/results/NAME.csv."""
    path, env = RESULTS / f"{name}.csv", environment(device)
    rows = [{**row, **env} for row in rows]
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
    cells = [list(rows[0])] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    middle, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))
