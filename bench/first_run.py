"""The first run on a GPU: one command that checks and measures everything, in about ten minutes.

    python -m bench.first_run --out DIR         # needs CUDA, but neither installation nor diffusers
    python -m bench.first_run --dry             # only list the steps, with limits and commands
    python -m bench.first_run --cpu --out DIR   # the same steps at small sizes, within four minutes
    python -m bench.first_run --steps attention attention_64 compiled --out DIR2    # a second call

A step is one bench or one set of tests. The most informative steps come first. Steps for which no
time is left are skipped, and a second call can run them. Each step is a process group of its own,
which is killed at its time limit. If a step fails, the next one still runs. DIR receives four
files, which are kept up to date: summary.txt (a line per step), log.txt (all output), results.tar
(the CSV rows of each bench; bench/results is left alone) and smoke.png.

Exit code: 0 if every step succeeded or was skipped with a reason; 1 if one failed or was killed at
its limit.
"""

import argparse
import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOG_BYTES = 2**20  # of each step's output
LEAST = 10  # seconds that must be left for a step to begin
# Runs a bench with its CSV going to another folder than bench/results.
BENCH = (
    "import pathlib, runpy, sys, bench; bench.RESULTS = pathlib.Path(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
PYTEST = "pytest -q -rs -p no:cacheprovider --tb=short --maxfail=50"
KERNELS = "tests/test_kernels.py tests/test_kernels_flash.py tests/test_kernels_groupnorm.py"
GPU_TESTS = "tests/test_graphs.py tests/test_pipeline.py tests/test_waits.py"
HALF = "--device cuda --dtype float16 --csv"
SMALL = "--model shapes --size 128 --csv"
FULL = f"--batches 1 8 --runs 2 {HALF}"
COMPILED = f"--compile --batches 1 16 --runs 2 {HALF}"
# Without flex and lse_sum, which torch.compile compiles for every shape.
OURS = (
    "sdpa_flash sdpa_efficient sdpa_cudnn materialised reference fused fused_heads_apart "
    "fused_small_blocks small decoupled decoupled_one_lse"
)
SIDES = f"--sides 16 32 --batches 1 8 --providers {OURS} {HALF}"
LAYOUT = f"--model sd15 --runs 9 {HALF}"
TINY = f"--steps 2 --batches 1 --runs 1 {SMALL}"
TRY = f"--runs 1 --variants default cudnn_first {SMALL}"
CPU_LIMIT = 90  # seconds, for each step with --cpu
NO_GPU = "needs a CUDA device"


@dataclass(frozen=True)
class Step:
    name: str
    limit: int  # seconds, on a GPU
    command: str  # after `python -m`; {out} is the folder of --out
    gpu: str = ""  # options on a GPU
    cpu: str | None = ""  # options on a CPU; None: needs a GPU
    figure: str = ""  # for the summary: a column of the bench's CSV, and a row's label or labels


STEPS = (
    Step("smoke", 100, "bench.smoke --out {out}"),
    Step("kernels", 170, f"{PYTEST} {KERNELS}", "-n 8"),
    Step("gpu_tests", 90, f"{PYTEST} {GPU_TESTS} -k gpu"),
    Step("unet", 60, "bench.unet", f"--runs 7 --warmup 3 {HALF}", f"--runs 2 {SMALL}", "seconds minsd"),
    Step("end_to_end", 110, "bench.end_to_end", FULL, TINY, "seconds minsd"),
    Step("maps", 90, "bench.maps", f"--runs 7 {HALF}", f"--runs 2 {SMALL}", "times_faster graphs/minsd"),
    Step("switches", 150, "bench.switches", "--batches 1 8 --csv", TRY, "look_ms default"),
    Step("profile", 40, "bench.profile", HALF, SMALL, "share attention"),
    Step("initno", 90, "bench.initno", f"--runs 5 {HALF}", f"--runs 2 {SMALL}", "seconds minsd"),
    Step("attention", 90, "bench.attention", SIDES, "--runs 1 --csv", "us fused/reference"),
    Step("layout", 40, "bench.layout --cost --boxes 2", LAYOUT, SMALL, "time_ratio together"),
    Step("control", 40, "bench.control --cost", HALF, "--csv", "of_alone ControlNet"),
    Step("attention_64", 150, "bench.attention", f"--sides 64 --batches 1 {HALF}", None, "us fused"),
    Step("compiled", 420, "bench.end_to_end", COMPILED, None, "seconds minsd compiled"),
)


def arguments(step: Step, cpu: bool, out: Path) -> list[str]:
    """Returns the arguments of `python -m` for a step. With `cpu` they are those for small sizes,
    without a GPU. `out` is the output folder."""
    options = (step.cpu if cpu else step.gpu) or ""
    if find_spec("xdist") is None:
        options = options.replace("-n 8", "")
    return [word.replace("{out}", str(out)) for word in shlex.split(f"{step.command} {options}")]


def run(
    command: Sequence[str], limit: float, log: Path, cpu: bool, meanwhile: Callable[[], None]
) -> int | None:
    """Runs a command for at most `limit` seconds. Returns the command's exit code, or None if the
    command was killed at the limit.

    The output of the command is appended to `log`. With `cpu`, the command sees no GPU. `meanwhile`
    is called every few seconds. When this function returns, no process of the command's group is
    left.
    """
    end = time.monotonic() + limit
    left_out = ("PYTEST_", "MINSD_CI")  # of tests that run this
    env = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    env.setdefault("GOMP_SPINCOUNT", "1000")  # as in minsd/generate.py
    if not os.access(os.path.expanduser("~"), os.W_OK):  # where Triton keeps what it has compiled
        env.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir(), "minsd-triton")))
    if cpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("ab") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        process = subprocess.Popen(command, cwd=ROOT, env=env, process_group=0, **streams)
    try:
        while (left := end - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(min(left, 3))
            meanwhile()
        return None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def written(log: Path, start: int) -> str:
    """Returns the text of the log from byte `start` on. If that text is longer than LOG_BYTES, its
    middle is removed, in the log file too."""
    part = log.read_bytes()[start:]
    if len(part) > LOG_BYTES:
        part = part[: LOG_BYTES // 2] + b"\n[... cut ...]\n" + part[-LOG_BYTES // 2 :]
        os.truncate(log, start)
        with log.open("ab") as file:
            file.write(part)
    return part.decode(errors="replace")


def figure_of(step: Step, rows: Path) -> str:
    """Returns the number that the summary shows for a step, as text, from the CSV files in the
    folder `rows`. Returns an empty string if they do not contain it."""
    column, _, labels = step.figure.partition(" ")
    files = [path.read_text().splitlines() for path in rows.glob("*.csv")]
    table = [row for lines in files for row in csv.DictReader(lines)]
    for label in labels.split("/"):
        for row in table:
            if label in row.values() and row.get(column):
                return f"{label}: {column} {row[column]}"
    return ""


def pack(work: Path, out: Path) -> None:
    """Writes results.tar in the folder `out` anew. It contains one folder per step, with the CSV
    files that the step has written to the folder `work` so far."""
    part = out / "results.tar.part"
    with tarfile.open(part, "w") as tar:
        for path in sorted(work.glob("*/*.csv")):
            tar.add(path, path.relative_to(work))
    part.replace(out / "results.tar")


def take(step: Step, work: Path, out: Path, cpu: bool, left: float) -> tuple[str, str]:
    """Runs a step. `left` is the number of seconds until the end of the whole run. `work` is the
    parent of the folder for the step's CSV files, and `out` is the folder of the log. With `cpu`,
    the step runs at its small sizes, without a GPU.

    Returns (state, text). The state is "ok", "failed", "timed out" or "skipped". The text belongs
    beside the state in the summary: what the step measured, or why it failed or was skipped.
    """
    if cpu and step.cpu is None:
        return "skipped", NO_GPU
    if step.command.startswith("pytest") and find_spec("pytest") is None:
        return "skipped", "needs pytest"
    if left < LEAST:
        return "skipped", "no time left"
    log = out / "log.txt"
    command = arguments(step, cpu, out)
    with log.open("a") as file:
        file.write(f"\n===== {step.name}: python -m {shlex.join(command)}\n")
    start = log.stat().st_size
    rows = work / step.name
    is_bench = command[0].startswith("bench.")
    python = [sys.executable, *(["-c", BENCH, str(rows)] if is_bench else ["-m"])]
    limit = CPU_LIMIT if cpu else step.limit
    code = run([*python, *command], min(limit, left), log, cpu, lambda: pack(work, out))
    output = written(log, start)
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    last = lines[-1] if lines else "no output"
    if code:
        return "failed", last
    told = figure_of(step, rows) or last
    if code is None:
        if left < limit:
            return "skipped", f"no time left to finish ({told})"
        return "timed out", told
    unmet = re.search(r"^SKIPPED .*?: (.+)", output, re.MULTILINE)
    if unmet and " passed" not in last:
        return "skipped", f"{unmet[1]} ({last})"
    return "ok", told


def take_all(steps: Sequence[Step], out: Path, cpu: bool, limit: float) -> int:
    """Runs the steps one after the other, for at most `limit` seconds in total. With `cpu`, they
    run at small sizes, without a GPU. Writes summary.txt, log.txt and results.tar to the folder
    `out`. Returns the exit code of the bench: 1 if a step failed or was killed at its own time
    limit, otherwise 0."""
    end = time.monotonic() + limit
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    bad = False
    with tempfile.TemporaryDirectory() as work:
        for step in steps:
            begin = time.monotonic()
            state, told = take(step, Path(work), out, cpu, end - begin)
            bad |= state not in ("ok", "skipped")
            lines.append(f"{step.name:13}{state:10}{time.monotonic() - begin:5.0f} s  {told}"[:110])
            print(lines[-1], file=sys.stderr, flush=True)
            (out / "summary.txt").write_text("\n".join(lines) + "\n")
            pack(Path(work), out)
    print("\n".join(lines))
    return int(bad)


def main() -> None:
    names = [step.name for step in STEPS]
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--out", type=Path, default=Path("outputs/first_run"), help="a new folder")
    options.add_argument(
        "--steps", nargs="+", choices=names, default=names, metavar="NAME", help="only these"
    )
    options.add_argument("--limit", type=float, help="seconds in all (default: 570, or 230 with --cpu)")
    options.add_argument("--cpu", action="store_true", help="small sizes, without a GPU")
    options.add_argument("--dry", action="store_true", help="only list the steps")
    args = options.parse_args()
    out = args.out.resolve()
    steps = [step for step in STEPS if step.name in args.steps]
    if args.dry:
        for step in steps:
            runs = step.cpu is not None or not args.cpu
            command = shlex.join(["python", "-m", *arguments(step, args.cpu, args.out)])
            limit = CPU_LIMIT if args.cpu else step.limit
            print(f"{step.name:13}{limit:4} s  {command if runs else NO_GPU}")
        return
    if not args.cpu:
        import torch

        if not torch.cuda.is_available():
            options.error("PyTorch finds no CUDA device; --cpu takes the same steps without one")
    if (out / "log.txt").exists():
        options.error(f"{args.out} holds an earlier run; give a new folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `run` kills its processes
    sys.exit(take_all(steps, out, args.cpu, args.limit or (230 if args.cpu else 570)))


if __name__ == "__main__":
    main()
