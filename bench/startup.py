"""How long from the command to the first sampling step, and to the picture, against diffusers?

    python -m bench.startup [--runs 3] [--csv]

The embedded model, whose networks cost little: what is left is Python, its imports and loading. Each run is a process of its
own, begun when its clock begins; the providers take turns. Both read the same files. `cpu_seconds` leave out waiting for a
core on a busy machine; `help` is `python -m minsd.generate --help`, which must not import PyTorch.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

from bench import report

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
PROVIDERS = {
    "minsd": CLOCK
    + """
import minsd
sd = minsd.load("shapes", "cpu")
mark("loaded")
start = minsd.noise.initial.noise([0], (4, 16, 16))
latents = sd.sample("a red circle", start, steps=%d, sampler="ddim", progress=lambda i, t: mark("first_step"))
sd.decode(latents)[0].save(sys.argv[2])
""",
    "diffusers": CLOCK
    + """
from bench import minsd
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from minsd.weights.load import SHAPES_FOLDER
pipe = StableDiffusionPipeline.from_pretrained(SHAPES_FOLDER, torch_dtype=torch.float32, safety_checker=None, local_files_only=True)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
mark("loaded")
def step(pipe, i, t, kept):
    mark("first_step")
    return kept
pipe("a red circle", height=128, width=128, num_inference_steps=%d, callback_on_step_end=step).images[0].save(sys.argv[2])
""",
}


def measure(command: list[str]) -> dict[str, tuple[float, float]]:
    """-> what the process printed last, as JSON; {} where it prints none."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[:3]} failed: {done.stderr[-2000:]}")
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--csv", action="store_true", help="append to bench/results/startup.csv")
    args = parser.parse_args()

    import torch  # noqa: F401  (its files are read from disk before anything is timed)

    end = '\nmark("picture")\nprint(json.dumps(marks))\n'
    results = {name: [] for name in ("help", *PROVIDERS)}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.runs):
            begin = time.time()
            measure([sys.executable, "-m", "minsd.generate", "--help"])
            results["help"].append({"answer": (time.time() - begin, float("nan"))})
            for name, code in PROVIDERS.items():
                results[name].append(
                    measure(
                        [sys.executable, "-c", code % STEPS + end, str(time.time()), f"{folder}/{name}.png"]
                    )
                )
    rows = []
    for name, runs in results.items():
        for mark in runs[0]:
            seconds, cpu = (statistics.median(run[mark][k] for run in runs) for k in (0, 1))
            rows.append(
                {
                    "provider": name,
                    "until": mark,
                    "seconds": round(seconds, 2),
                    "cpu_seconds": "" if cpu != cpu else round(cpu, 2),
                }
            )
    report("startup", rows, args.csv)


if __name__ == "__main__":
    main()
