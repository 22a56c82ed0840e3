"""From prompt to pixels: how long does a picture take, against diffusers, at full size with random weights?

    python -m bench.end_to_end [--model sd15] [--size 512] [--steps 50] [--samplers ddim dpmpp_2m] [--batches 1 4 16] [--compile] [--csv]

Text encoding, guided sampling and decoding are timed, loading is not; every provider draws the same prompt from the same
noise with the same sampler, and its first picture (which warms it, or compiles) is reported apart. Providers take turns.
On a GPU in float16, on a CPU in float32 by default; there a reduced form says what the full one would:
`--size 256 --steps 4 --batches 1`.

    minsd                as it is: on a GPU by CUDA graphs
    minsd eager          without (on a CPU there are none)
    minsd compiled       `sd.compile()`
    diffusers            StableDiffusionPipeline with its default attention (PyTorch's)
    diffusers compiled   its UNet under torch.compile, max-autotune, channels_last

`it/s` are sampling steps of one picture a second, decoding and text included. `tflops` counts the UNet's products
(torch.utils.flop_counter), `of_peak` is their share of what this machine's matrix product reaches in this dtype.
`ratio` is of seconds, `cpu_ratio` of processor seconds, which on a busy machine leave out waiting for a core.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

import minsd
from bench import clocked, forget_peak, on_gpu, peak_mb, report
from bench.load import make_folder
from minsd.config import MODELS
from minsd.kernels import linear
from minsd.noise.initial import noise
from minsd.unet import UNet

PROMPT = "a photograph of a lighthouse at dusk, waves in the foreground"


def matrix_peak(device, dtype) -> float:
    """FLOP/s of a large matrix product here, the best of some."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return (
        2 * n**3 / min(clocked(device, (torch.matmul, linear)[i % 2], a, a)[1] for i in range(20))
    )  # on a CPU two libraries


def step_flops(model: str, size: int) -> int:
    """FLOPs of one guided step of one picture, counted on tensors without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    config = MODELS[model].unet
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(config)(torch.empty(2, 4, size // 8, size // 8), 500, torch.empty(2, 77, config.context_dim))
    return counter.get_total_flops()


def ours(folder, device, dtype, how):
    sd = minsd.load(folder, device, dtype)
    if how == "eager":
        sd.use_graphs(False)
    if how == "compiled":
        sd.compile()

    def run(start, steps, sampler):
        size = 8 * start.shape[-1]
        return sd([PROMPT] * len(start), noise=start, steps=steps, sampler=sampler, height=size, width=size)

    return run


def theirs(folder, device, dtype, how):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(
        device
    )
    pipe.set_progress_bar_config(disable=True)
    if how == "compiled":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune")
    classes = {"ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}

    def run(start, steps, sampler):
        pipe.scheduler, size = classes[sampler].from_config(pipe.scheduler.config), 8 * start.shape[-1]
        latents = start.to(device, dtype)
        return pipe(
            [PROMPT] * len(start),
            latents=latents,
            num_inference_steps=steps,
            guidance_scale=7.5,
            height=size,
            width=size,
        ).images

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samplers", nargs="+", choices=("ddim", "dpmpp_2m"), default=["ddim"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--compile", action="store_true", help="the compiled providers too: minutes each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--csv", action="store_true", help="append to bench/results/end_to_end.csv")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float16" if device.type == "cuda" else "float32"))
    peak, rows = matrix_peak(device, dtype), []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), args.model)
        hows = [""] + ["eager"] * (device.type == "cuda") + ["compiled"] * args.compile
        runs = {f"minsd {how}".strip(): ours(folder, device, dtype, how) for how in hows}
        runs |= {
            f"diffusers {how}".strip(): theirs(folder, device, dtype, how) for how in hows if how != "eager"
        }
        flops = step_flops(args.model, args.size)
        for sampler in args.samplers:
            for batch in args.batches:
                start = noise(range(batch), (4, args.size // 8, args.size // 8))
                first, times, cpu, memory = {}, {name: [] for name in runs}, {name: [] for name in runs}, {}
                for turn in range(args.runs + 1):
                    for name, run in runs.items():
                        if on_gpu(device):
                            forget_peak(device)
                        _, seconds, cpu_seconds = clocked(device, run, start, args.steps, sampler)
                        if turn:
                            times[name].append(seconds)
                            cpu[name].append(cpu_seconds)
                        else:
                            first[name] = seconds
                        memory[name] = (
                            round(peak_mb(device)) if on_gpu(device) else ""
                        )  # on a CPU all providers share a process
                for name in runs:
                    seconds = statistics.median(times[name])
                    rate = flops * args.steps * batch / seconds
                    rows.append(
                        {
                            "model": args.model,
                            "size": args.size,
                            "steps": args.steps,
                            "sampler": sampler,
                            "batch": batch,
                            "dtype": str(dtype).removeprefix("torch."),
                            "provider": name,
                            "seconds": round(seconds, 3),
                            "it/s": round(args.steps * batch / seconds, 2),
                            "first_seconds": round(first[name], 1),
                            "ratio": round(seconds / statistics.median(times["diffusers"]), 3),
                            "cpu_ratio": round(
                                statistics.median(cpu[name]) / statistics.median(cpu["diffusers"]), 3
                            ),
                            "peak_mb": memory[name],
                            "tflops": round(rate / 1e12, 2),
                            "of_peak": round(rate / peak, 3),
                        }
                    )
    report("end_to_end", rows, args.csv, args.device)


if __name__ == "__main__":
    main()
