"""How long from the command to the first sampling step, and to the image, against diffusers?

    python -m bench.startup [--runs 3] [--csv]

The embedded model's networks cost little: most of the time is Python, its imports and loading. Each
run is a process of its own, whose clock starts before the process does. The providers (minsd and
diffusers) take turns and read the same files. `cpu_seconds` leaves out waiting for a core. `help`
is `python -m minsd.generate --help`, which must not import PyTorch.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time

from bench import parser, report

STEPS = 20
CLOCK = """
import json, os, resource, sys, time
def spent():
    use = resource.getrusage(resource.RUSAGE_SELF)
    return time.time() - float(sys.argv[1]), use.ru_utime + use.ru_stime
marks = {}
def mark(name):
    marks.setdefault(name, spent())
"""
MINSD = """
import minsd
sd = minsd.load("shapes", "cpu")
mark("loaded")
start = minsd.noise.initial.noise([0], (4, 16, 16))
step = lambda i, t: mark("first_step")
latents = sd.sample("a red circle", start, steps=%d, sampler="ddim", progress=step)
sd.decode(latents)[0].save(sys.argv[2])
"""
DIFFUSERS = """
from bench import minsd
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from minsd.weights.load import SHAPES_FOLDER
pipe = StableDiffusionPipeline.from_pretrained(
    SHAPES_FOLDER, torch_dtype=torch.float32, safety_checker=None, local_files_only=True)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
mark("loaded")
def step(pipe, i, t, kept):
    mark("first_step")
    return kept
how = {"height": 128, "width": 128, "num_inference_steps": %d, "callback_on_step_end": step}
pipe("a red circle", **how).images[0].save(sys.argv[2])
"""
END = """
mark("picture")
print(json.dumps(marks))
"""
PROVIDERS = {"minsd": CLOCK + MINSD % STEPS + END, "diffusers": CLOCK + DIFFUSERS % STEPS + END}

Marks = dict[str, tuple[float, float]]  # name -> seconds, processor seconds


def run(command: list[str]) -> str:
    """Runs a command until it ends, and returns what it printed. Raises SystemExit if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[:3]} failed: {done.stderr[-2000:]}")
    return done.stdout


def time_help() -> Marks:
    begin = time.time()
    run([sys.executable, "-m", "minsd.generate", "--help"])
    return {"answer": (time.time() - begin, float("nan"))}


def main() -> None:
    options = parser(__doc__, "startup")
    options.add_argument("--runs", type=int, default=3, help="processes per provider (default: 3)")
    args = options.parse_args()

    import torch  # noqa: F401  (reads its files from disk before anything is timed)

    results: dict[str, list[Marks]] = {name: [] for name in ("help", *PROVIDERS)}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.runs):
            results["help"].append(time_help())
            for name, code in PROVIDERS.items():
                output = run([sys.executable, "-c", code, str(time.time()), f"{folder}/{name}.png"])
                results[name].append(json.loads(output.splitlines()[-1]))
    rows = []
    for name, runs in results.items():
        for mark in runs[0]:
            seconds, cpu_seconds = (statistics.median(marks[mark][k] for marks in runs) for k in (0, 1))
            known = cpu_seconds == cpu_seconds  # not NaN
            row = {"provider": name, "until": mark, "seconds": round(seconds, 2)}
            rows.append({**row, "cpu_seconds": round(cpu_seconds, 2) if known else ""})
    report("startup", rows, args.csv)


if __name__ == "__main__":
    main()
