"""Many images: does a killed run end complete, and what do processes and the command line cost?

    python -m bench.bulk [--processes 4] [--pairs 200] [--kills 10] [--steps 10] [--csv]

With the embedded model on the CPU:

    kills     `torchrun` draws prompts x seeds in several processes. It is killed with all its
              workers at random moments and started again with --resume, until it is done. Every
              image must be there once, complete, and within 2/255 of the image that a single
              process draws
    speed     images per second of one process and of several, from the first batch to the last
              image (start-up left out)
    overhead  the time of the command line's drawing compared with that of a plain loop over
              `sd(...)` and `Image.save`; the two take turns in one process
    resume    seconds until a run finds that nothing is left to do, with 10,000 rows and images
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bench import Row, loaded, parser, report
from bench.shapes import cases, sentence
from minsd import image
from minsd.app import Tally, options, requests
from minsd.app import run as running
from minsd.app.jobs import plan
from minsd.app.session import Session
from minsd.generate import main as generate

BATCH = 16  # images of 128x128 on a CPU
OVERHEAD_IMAGES = 64
ROWS = 10_000  # of `resume`
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(processes: int, *args: str) -> subprocess.Popen[bytes]:
    """Starts minsd's command line with `args`, by torchrun if `processes` is more than one. Returns
    the started process."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += ["-m", "minsd.generate", "--quiet", *args]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def finish(processes: int, *args: str) -> None:
    """Runs minsd's command line with `args` in `processes` processes, and waits until it ends.
    Raises SystemExit if it fails."""
    code = launch(processes, *args).wait()
    if code:
        sys.exit(f"minsd.generate {' '.join(args)} failed with exit code {code}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that `launch` started, and its children."""
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    children = subprocess.run(command, capture_output=True, text=True).stdout.split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def images(folder: Path) -> list[Path]:
    return list(folder.glob("*.png"))


def by_request(folder: Path) -> dict[tuple[str, int], np.ndarray]:
    """Returns a dict (prompt, seed) -> pixels of the image, for all images that a folder's
    runs.jsonl lists."""
    rows = running.recorded([folder / "runs.jsonl"])
    out = {}
    for row in rows:
        out[row["prompt"], row["seed"]] = np.asarray(Image.open(folder / row["file"])).astype(int)
    return out


def images_per_second(folder: Path) -> float:
    """Returns the images per second of the finished run in `folder`. The time is counted from the
    beginning of the first batch (the time at which its first image was saved, minus the duration of
    the batch) to the last image."""
    rows = list(running.recorded([folder / "runs.jsonl"]))
    times = {row["file"]: (folder / row["file"]).stat().st_mtime for row in rows}
    first = min(rows, key=lambda row: times[row["file"]])
    return len(rows) / (max(times.values()) - times[first["file"]] + BATCH * first["seconds"])


def kills(args: argparse.Namespace, folder: Path, command: list[str]) -> Row:
    rng = random.Random(0)
    out = folder / "killed"
    again = (*command, "--out", str(out), "--resume")
    survived = 0
    for k in range(args.kills):
        process = launch(args.processes, *again)
        before = len(images(out))
        wanted = before + rng.randint(0, (args.pairs - before) // (args.kills - k + 1))
        while process.poll() is None and len(images(out)) < wanted:
            time.sleep(0.02)
        if process.poll() is None:
            time.sleep(0.2 * rng.random())
            kill(process)
            survived += 1
    finish(args.processes, *again)
    many, one = by_request(out), by_request(folder / "one")
    rows = list(running.recorded(out.glob("runs*.jsonl")))
    if many.keys() != one.keys() or not len(rows) == len(images(out)) == args.pairs:
        sys.exit(f"of {args.pairs} images there are {len(images(out))}, and {len(rows)} rows")
    difference = max(np.abs(many[key] - one[key]).max() for key in one)
    if difference > 2:
        sys.exit(f"an image differs from the single process's by {difference}/255")
    note = f"{args.pairs} pictures once each, within {difference}/255"
    return {"what": "kills", "value": survived, "unit": "kills survived", "note": note}


def speeds(args: argparse.Namespace, folder: Path, command: list[str]) -> list[Row]:
    rows = []
    for processes in (1, args.processes):
        out = folder / ("one" if processes == 1 else "several")
        finish(processes, *command, "--out", str(out))
        row = {"what": f"{processes} process(es)", "value": round(images_per_second(out), 3)}
        rows.append({**row, "unit": "pictures/s", "note": f"{args.steps} steps"})
    return rows


def overhead(args: argparse.Namespace, folder: Path) -> Row:
    torch.set_num_threads(1)
    sd = loaded("shapes")
    ratios = []
    for turn in range(4):  # the first warms both
        start = time.perf_counter()
        for first in range(0, OVERHEAD_IMAGES, BATCH):
            made = sd("a red circle", seeds=range(first, first + BATCH), steps=args.steps)
            for k, picture in enumerate(made):
                picture.save(folder / f"plain-{k}.png")
        plain = time.perf_counter() - start
        out = ["--out", str(folder / f"machinery{turn}"), "--quiet"]
        seeds = ["--seeds", f"0-{OVERHEAD_IMAGES - 1}", "--steps", str(args.steps)]
        command, lines = requests.read(options.parse(["a red circle", *seeds, *out]))
        jobs, _ = plan(sd, command, lines)
        start = time.perf_counter()
        running.run(Session(sd, command, quiet=True), jobs, Tally())
        ratios.append((time.perf_counter() - start) / plain)
    value = round(100 * (statistics.median(ratios[1:]) - 1), 2)
    note = f"{OVERHEAD_IMAGES} pictures, 3 turns"
    return {"what": "overhead", "value": value, "unit": "% over a plain loop", "note": note}


def resume(folder: Path) -> Row:
    out = folder / "large"
    command = ["a red circle", "--steps", "1", "--out", str(out)]
    if generate([*command, "--seed", "0", "--quiet"]):
        sys.exit("minsd.generate failed")
    row = json.loads((out / "runs.jsonl").read_text())
    settings = image.read_settings(out / "00000-0.png")
    picture = Image.open(out / "00000-0.png")
    with (out / "runs.jsonl").open("a") as file:
        for seed in range(1, ROWS):
            name = f"{seed:05d}-{seed}.png"
            info = PngInfo()  # an image is known by its own settings
            info.add_itxt(image.CHUNK, json.dumps(settings | {"seed": seed}))
            picture.save(out / name, pnginfo=info)
            file.write(json.dumps(row | {"seed": seed, "file": name}) + "\n")
    start = time.perf_counter()
    finish(1, *command, "--seeds", f"0-{ROWS - 1}", "--resume")
    seconds = time.perf_counter() - start
    if len(images(out)) != ROWS:
        sys.exit(f"{ROWS} images were there, and {len(images(out))} are now")
    note = "the whole command, nothing left to do"
    return {"what": "resume of 10,000", "value": round(seconds, 2), "unit": "s", "note": note}


def main() -> None:
    flags = parser(__doc__, "bulk")
    flags.add_argument("--processes", type=int, default=4, help="of several processes (default: 4)")
    flags.add_argument("--pairs", type=int, default=200, help="images, n x 10 (default: 200)")
    flags.add_argument("--kills", type=int, default=10, help="of the run (default: 10)")
    flags.add_argument("--steps", type=int, default=10, help="sampling steps (default: 10)")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unique = list(dict.fromkeys(sentence(subjects) for subjects in cases("two", args.pairs)))
        prompts = unique[: args.pairs // 10]
        (folder / "prompts.txt").write_text("\n".join(prompts))
        command = ["--prompts", str(folder / "prompts.txt"), "--seeds", "0-9", "--steps", str(args.steps)]
        rows = speeds(args, folder, command)
        rows.append(kills(args, folder, command))
        rows.append(overhead(args, folder))
        rows.append(resume(folder))
    report("bulk", rows, args.csv)


if __name__ == "__main__":
    main()
