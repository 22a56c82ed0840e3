"""From one picture to many: does a killed run end complete, how fast are several processes, what does the machinery cost?

    python -m bench.bulk [--processes 4] [--pairs 200] [--kills 10] [--steps 10] [--csv]

With the embedded model on the CPU:

    kills     `torchrun` draws prompts x seeds in several processes, is killed with all its workers at random moments and
              taken up again with --resume, until it is done; every picture must be there once, whole, and equal to the
              single process's within 2/255
    speed     pictures a second of one process and of several, start-up left out (time between the first line and the last)
    overhead  the command line's drawing against a plain loop over `sd(...)` and `Image.save`, in one process, taking turns
    resume    seconds until a run knows that nothing is left to do, with 10,000 lines and pictures
"""

import argparse
import json
import os
import random
import shutil
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

import minsd
from bench import report
from bench.shapes import cases, sentence
from minsd.app import run as running
from minsd.generate import main as generate

BATCH = 16  # of pictures of 128x128 on a CPU
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(processes: int, *args: str) -> subprocess.Popen:
    torchrun = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    command = [sys.executable, *(torchrun if processes > 1 else ()), "-m", "minsd.generate", "--quiet", *args]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill(process: subprocess.Popen) -> None:
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def pictures(folder: Path) -> dict:
    rows = running.recorded([folder / "runs.jsonl"])
    return {
        (row["prompt"], row["seed"]): np.asarray(Image.open(folder / row["file"])).astype(int) for row in rows
    }


def rate(folder: Path) -> float:
    """Pictures a second, from the beginning of the first batch (its end less its duration) to the last picture."""
    rows = list(running.recorded([folder / "runs.jsonl"]))
    times = {row["file"]: (folder / row["file"]).stat().st_mtime for row in rows}
    first = min(rows, key=lambda row: times[row["file"]])
    return len(rows) / (max(times.values()) - times[first["file"]] + BATCH * first["seconds"])


def kills(args, folder: Path, options: list[str]) -> dict:
    rng, out, survived = random.Random(0), folder / "killed", 0
    for k in range(args.kills):
        process, before = (
            launch(args.processes, *options, "--out", str(out), "--resume"),
            len(list(out.glob("*.png"))),
        )
        wanted = before + rng.randint(0, (args.pairs - before) // (args.kills - k + 1))
        while process.poll() is None and len(list(out.glob("*.png"))) < wanted:
            time.sleep(0.02)
        if process.poll() is None:
            time.sleep(0.2 * rng.random())
            kill(process)
            survived += 1
    assert launch(args.processes, *options, "--out", str(out), "--resume").wait() == 0
    many, one = pictures(out), pictures(folder / "one")
    lines = list(running.recorded(out.glob("runs*.jsonl")))
    difference = max(np.abs(many[k] - one[k]).max() for k in one)
    assert (
        many.keys() == one.keys()
        and len(lines) == len(list(out.glob("*.png"))) == args.pairs
        and difference <= 2
    )
    note = f"{args.pairs} pictures once each, within {difference}/255"
    return {"what": "kills", "value": survived, "unit": "kills survived", "note": note}


def speeds(args, folder: Path, options: list[str]) -> list[dict]:
    rows = []
    for processes in (1, args.processes):
        out = folder / ("one" if processes == 1 else "several")
        assert launch(processes, *options, "--out", str(out)).wait() == 0
        rows.append(
            {
                "what": f"{processes} process(es)",
                "value": round(rate(out), 3),
                "unit": "pictures/s",
                "note": f"{args.steps} steps",
            }
        )
    return rows


def overhead(args, folder: Path) -> dict:
    torch.set_num_threads(1)
    sd, ratios = minsd.load("shapes", device="cpu"), []
    for turn in range(4):  # the first warms both
        start = time.perf_counter()
        for first in range(0, 64, BATCH):
            for k, picture in enumerate(
                sd("a red circle", seeds=range(first, first + BATCH), steps=args.steps)
            ):
                picture.save(folder / f"plain-{k}.png")
        plain, start = time.perf_counter() - start, time.perf_counter()
        lines = argparse.Namespace(**vars(args), made=0)
        lines.__dict__ |= {"out": folder / f"machinery{turn}", "quiet": True, "save_noise": None, "net": None}
        lines.__dict__ |= dict.fromkeys(("resume", "json", "attention_maps"), False)
        jobs = [
            {
                "prompt": "a red circle",
                "negative_prompt": "",
                "seed": s,
                "steps": args.steps,
                "sampler": "ddim",
                "karras": False,
                "guidance_scale": 5.0,
                "height": 128,
                "width": 128,
                "model": "shapes",
                "init_noise": "random",
            }
            for s in range(64)
        ]
        running.run(sd, lines, jobs)
        ratios.append((time.perf_counter() - start) / plain)
    value = round(100 * (statistics.median(ratios[1:]) - 1), 2)
    return {"what": "overhead", "value": value, "unit": "% over a plain loop", "note": "64 pictures, 3 turns"}


def resume(folder: Path) -> dict:
    out = folder / "large"
    assert generate(["a red circle", "--seed", "0", "--steps", "1", "--out", str(out), "--quiet"]) == 0
    row = json.loads((out / "runs.jsonl").read_text())
    for seed in range(1, 10_000):
        shutil.copy(out / "00000-0.png", out / f"{seed:05d}-{seed}.png")
    with (out / "runs.jsonl").open("a") as file:
        file.writelines(
            json.dumps(row | {"seed": s, "file": f"{s:05d}-{s}.png"}) + "\n" for s in range(1, 10_000)
        )
    options = ["a red circle", "--seeds", "0-9999", "--steps", "1", "--out", str(out), "--resume"]
    start = time.perf_counter()
    assert launch(1, *options).wait() == 0
    value = time.perf_counter() - start
    assert len(list(out.glob("*.png"))) == 10_000
    return {
        "what": "resume of 10,000",
        "value": round(value, 2),
        "unit": "s",
        "note": "the whole command, nothing left to do",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=200, help="pictures, a multiple of ten")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--csv", action="store_true", help="append to bench/results/bulk.csv")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = list(dict.fromkeys(map(sentence, cases("two", args.pairs))))[
            : args.pairs // 10
        ]  # each once
        (folder / "prompts.txt").write_text("\n".join(prompts))
        options = ["--prompts", str(folder / "prompts.txt"), "--seeds", "0-9", "--steps", str(args.steps)]
        rows += speeds(args, folder, options)
        rows.append(kills(args, folder, options))
        rows.append(overhead(args, folder))
        rows.append(resume(folder))
    report("bulk", rows, args.csv)


if __name__ == "__main__":
    main()
