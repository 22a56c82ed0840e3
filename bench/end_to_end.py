"""From prompt to pixels: how long does a picture take, against diffusers, at full size with random weights?

    python -m bench.end_to_end [--model sd15] [--size 512] [--steps 50] [--samplers ddim dpmpp_2m] [--batches 1 4 16] [--compile] [--csv]

Text encoding, guided sampling and decoding are timed, loading is not; every provider draws the same prompt from the same
noise with the same sampler, and its first picture (which warms it, or compiles) is reported apart. Providers take turns.
On a GPU in float16, on a CPU in float32 by default; there a reduced form says what the full one would:
`--size 256 --steps 4 --batches 1`.

    minsd             as it is
    minsd compiled    `sd.compile()`
    diffusers         StableDiffusionPipeline with its default attention (PyTorch's)
    diffusers compiled   its UNet under torch.compile, max-autotune, channels_last

`it/s` are sampling steps of one picture a second, decoding and text included. `tflops` counts the UNet's products
(torch.utils.flop_counter), `of_peak` is their share of what this machine's matrix product reaches in this dtype.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import minsd
from bench import print_table, write_csv
from bench.load import make_folder
from minsd.noise.initial import noise

PROMPT = "a photograph of a lighthouse at dusk, waves in the foreground"


def matrix_peak(device, dtype) -> float:
    """FLOP/s of a large matrix product here, the best of some."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_flops(sd, size: int) -> float:
    """FLOPs of one guided step of one picture."""
    from torch.utils.flop_counter import FlopCounterMode

    context = sd.encode_prompt([PROMPT])
    x = torch.randn(1, 4, size // 8, size // 8, device=sd.device, dtype=sd.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sd.unet(x, 500, context)
    return 2 * counter.get_total_flops()


def ours(folder, device, dtype, compiled):
    sd = minsd.load(folder, device, dtype)
    if compiled:
        sd.compile()

    def run(start, steps, sampler):
        size = 8 * start.shape[-1]
        return sd([PROMPT] * len(start), noise=start, steps=steps, sampler=sampler, height=size, width=size)
    return run


def theirs(folder, device, dtype, compiled):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune")
    classes = {"ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}

    def run(start, steps, sampler):
        pipe.scheduler, size = classes[sampler].from_config(pipe.scheduler.config), 8 * start.shape[-1]
        latents = start.to(device, dtype)
        return pipe([PROMPT] * len(start), latents=latents, num_inference_steps=steps, guidance_scale=7.5, height=size, width=size).images
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
        providers = {"minsd": (ours, False), "diffusers": (theirs, False)}
        if args.compile:
            providers |= {"minsd compiled": (ours, True), "diffusers compiled": (theirs, True)}
        runs = {name: make(folder, device, dtype, compiled) for name, (make, compiled) in providers.items()}
        flops = step_flops(minsd.load(folder, device, dtype), args.size)
        for sampler in args.samplers:
            for batch in args.batches:
                start = noise(range(batch), (4, args.size // 8, args.size // 8))
                first, times, memory = {}, {name: [] for name in runs}, {}
                for turn in range(args.runs + 1):
                    for name, run in runs.items():
                        if device.type == "cuda":
                            torch.cuda.reset_peak_memory_stats()
                        wait(device)
                        begin = time.perf_counter()
                        run(start, args.steps, sampler)
                        wait(device)
                        seconds = time.perf_counter() - begin
                        if turn:
                            times[name].append(seconds)
                        else:
                            first[name] = seconds
                        memory[name] = round(torch.cuda.max_memory_allocated() / 2**20) if device.type == "cuda" else ""
                for name in runs:
                    seconds = statistics.median(times[name])
                    rate = flops * args.steps * batch / seconds
                    rows.append({
                        "model": args.model, "size": args.size, "steps": args.steps, "sampler": sampler, "batch": batch,
                        "dtype": str(dtype).removeprefix("torch."), "provider": name, "seconds": round(seconds, 3),
                        "it/s": round(args.steps * batch / seconds, 2), "first_seconds": round(first[name], 1),
                        "ratio": round(seconds / statistics.median(times["diffusers"]), 3), "peak_mb": memory[name],
                        "tflops": round(rate / 1e12, 2), "of_peak": round(rate / peak, 3),
                    })
    print_table(rows)
    if args.csv:
        print("written to", write_csv("end_to_end", rows, args.device))


if __name__ == "__main__":
    main()
