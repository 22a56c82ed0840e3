"""From prompt to pixels at full size: how long does an image take, against diffusers?

    python -m bench.end_to_end [--model sd15] [--size 512] [--steps 50] [--batches 1 4 16] [--csv]
    python -m bench.end_to_end --compile                             # the compiled providers too
    python -m bench.end_to_end --size 256 --steps 4 --batches 1      # a reduced form, for a CPU
    python -m bench.end_to_end --model shapes --size 128 --steps 2 --batches 1 --runs 1   # a try

The weights are random. Text encoding, guided sampling and decoding are timed; loading is not. Every
provider (implementation) draws the same prompt from the same noise with the same sampler. The first
image of a provider, which warms it up or compiles it, is reported separately; then the providers
take turns. The dtype is float16 on a GPU and float32 on a CPU by default.

    minsd                as it is: on a GPU with CUDA graphs
    minsd eager          without CUDA graphs (GPU only)
    minsd compiled       `sd.compile()`
    diffusers            StableDiffusionPipeline with its default attention (PyTorch's)
    diffusers compiled   its UNet under torch.compile, max-autotune, channels_last

`it/s` is sampling steps times images per second, where the time includes text encoding and
decoding. `tflops` counts the UNet's products (torch.utils.flop_counter); `of_peak` is the fraction
of the rate that a large matrix product reaches on this machine in this dtype. `ratio` compares
seconds, and `cpu_ratio` processor seconds: trust the latter on a busy machine.
"""

# diffusers exports its classes lazily, which type checkers take for private.
# pyright: reportPrivateImportUsage=false

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import Row, clocked, forget_peak, on_gpu, parser, peak_mb, report, without_missing
from bench.load import make_folder
from minsd.config import MODELS
from minsd.kernels import linear
from minsd.noise.initial import noise
from minsd.pipeline import load
from minsd.unet import UNet

PROMPT = "a photograph of a lighthouse at dusk, waves in the foreground"
SAMPLERS = {"ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}  # ours -> diffusers'

Run = Callable[[Tensor, int, str], Any]  # (noise, steps, sampler) -> images


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s that a large matrix product reaches on the device, the best of 20 runs. On
    a CPU the runs alternate between the two libraries of matrix products (PyTorch's and oneDNN)."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(clocked(device, (torch.matmul, linear)[i % 2], a, a)[1] for i in range(20))


def step_flops(model: str, size: int) -> int:
    """Returns the FLOPs of one guided sampling step of one image of size x size pixels, counted on
    the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    config = MODELS[model].unet
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(config)(torch.empty(2, 4, size // 8, size // 8), 500, torch.empty(2, 77, config.context_dim))
    return counter.get_total_flops()


def ours(folder: str, device: torch.device, dtype: torch.dtype, variant: str) -> Run:
    sd = load(folder, device, dtype)
    if variant == "eager":
        sd.use_graphs(False)
    if variant == "compiled":
        sd.compile()

    def run(start: Tensor, steps: int, sampler: str) -> Any:
        size = 8 * start.shape[-1]
        return sd([PROMPT] * len(start), noise=start, steps=steps, sampler=sampler, height=size, width=size)

    return run


def theirs(folder: str, device: torch.device, dtype: torch.dtype, variant: str) -> Run:
    import diffusers

    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True
    )
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if variant == "compiled":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune")

    def run(start: Tensor, steps: int, sampler: str) -> Any:
        size = 8 * start.shape[-1]
        pipe.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(pipe.scheduler.config)
        made = pipe(
            [PROMPT] * len(start),
            latents=start.to(device, dtype),
            num_inference_steps=steps,
            guidance_scale=7.5,
            height=size,
            width=size,
        )
        return made.images

    return run


def providers(folder: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Run]:
    """Returns a dict name -> function that draws images, for each provider (implementation to
    compare). The model of each is loaded from `folder` first. `compiled` adds the providers with
    torch.compile."""
    variants = ["compiled"] if compiled else []
    runs = {"minsd": ours(folder, device, dtype, "")}
    for variant in ["eager"] * on_gpu(device) + variants:
        runs[f"minsd {variant}"] = ours(folder, device, dtype, variant)
    for name in without_missing(["diffusers", *(f"diffusers {variant}" for variant in variants)]):
        runs[name] = theirs(folder, device, dtype, name.removeprefix("diffusers").strip())
    return runs


def measure(
    args: argparse.Namespace, runs: dict[str, Run], sampler: str, batch: int, flops: int, peak: float
) -> list[Row]:
    """Times the providers `runs` (name -> function that draws images) with one sampler and batch
    size. Returns one row per provider. `flops` are the FLOPs of a guided step of one image, and
    `peak` the FLOP/s that `matrix_peak` returned."""
    start = noise(range(batch), (4, args.size // 8, args.size // 8))
    first: dict[str, float] = {}
    memory: dict[str, int | str] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.runs + 1):
        for name, run in runs.items():
            if on_gpu(args.device):
                forget_peak(args.device)
            _, seconds, cpu_seconds = clocked(args.device, run, start, args.steps, sampler)
            if turn:
                times[name].append(seconds)
                cpu[name].append(cpu_seconds)
            else:
                first[name] = seconds
            # On a CPU all providers share a process, and so a peak.
            memory[name] = round(peak_mb(args.device)) if on_gpu(args.device) else ""
    rows = []
    for name in runs:
        seconds = statistics.median(times[name])
        rate = flops * args.steps * batch / seconds
        ratio, cpu_ratio = (
            round(statistics.median(of[name]) / statistics.median(of["diffusers"]), 3)
            if "diffusers" in of
            else ""
            for of in (times, cpu)
        )
        rows.append(
            {
                "model": args.model,
                "size": args.size,
                "steps": args.steps,
                "sampler": sampler,
                "batch": batch,
                "dtype": args.dtype,
                "provider": name,
                "seconds": round(seconds, 3),
                "it/s": round(args.steps * batch / seconds, 2),
                "first_seconds": round(first[name], 1),
                "ratio": ratio,
                "cpu_ratio": cpu_ratio,
                "peak_mb": memory[name],
                "tflops": round(rate / 1e12, 2),
                "of_peak": round(rate / peak, 3),
            }
        )
    return rows


def main() -> None:
    options = parser(__doc__, "end_to_end")
    options.add_argument("--model", default="sd15", choices=MODELS, help="its sizes (default: sd15)")
    options.add_argument("--size", type=int, default=512, help="pixels per side (default: 512)")
    options.add_argument("--steps", type=int, default=50, help="sampling steps (default: 50)")
    options.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS, default=["ddim"], help="default: ddim alone"
    )
    options.add_argument(
        "--batches", nargs="+", type=int, default=[1, 4, 16], help="images at once (default: 1 4 16)"
    )
    options.add_argument("--compile", action="store_true", help="also the compiled providers (minutes)")
    options.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: CUDA if there is a GPU)",
    )
    options.add_argument("--dtype", help="default: float16 on a GPU, float32 on a CPU")
    options.add_argument("--runs", type=int, default=3, help="besides the first (default: 3)")
    args = options.parse_args()
    args.dtype = args.dtype or ("float16" if on_gpu(args.device) else "float32")
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    peak = matrix_peak(device, dtype)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), args.model)
        runs = providers(folder, device, dtype, args.compile)
        flops = step_flops(args.model, args.size)
        for sampler in args.samplers:
            for batch in args.batches:
                rows += measure(args, runs, sampler, batch, flops, peak)
    report("end_to_end", rows, args.csv, args.device)


if __name__ == "__main__":
    main()
