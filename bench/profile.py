"""Where does a UNet evaluation's time go? A table by kind of layer, and a trace for chrome://tracing or perfetto.

    python -m bench.profile [--model sd15] [--size 512] [--batch 2] [--trace FILE.json] [--csv]

Full size, random weights, one evaluation under torch.profiler after three to warm up. `self_ms` is time in a kind of
operation itself (on a GPU the kernels' own); `gap` is the time in which a GPU had nothing to do between kernels.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from bench import print_table, write_csv
from minsd.config import MODELS
from minsd.unet import UNet

KINDS = {  # the first that is part of an operation's or kernel's name
    "attention": ("attention", "flash", "fmha", "softmax", "bmm"), "convolution": ("conv", "cudnn", "winograd", "implicit"),
    "norms": ("norm", "welford"), "linear": ("mm", "gemm", "linear", "cutlass"),
    "elementwise": ("silu", "gelu", "mul", "add", "elementwise"),
    "copies": ("copy", "cat", "to_", "clone", "memcpy", "contiguous"),
}


def kind_of(name: str) -> str:
    return next((kind for kind, signs in KINDS.items() if any(sign in name.lower() for sign in signs)), "other")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15", choices=MODELS)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--trace", help="write the trace here")
    parser.add_argument("--csv", action="store_true", help="append to bench/results/profile.csv")
    args = parser.parse_args()
    on_gpu, config = args.device.startswith("cuda"), MODELS[args.model].unet
    dtype = getattr(torch, args.dtype or ("float16" if on_gpu else "float32"))
    with torch.device("meta"):
        unet = UNet(config)
    unet = unet.to(dtype).to_empty(device=args.device).requires_grad_(False)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.02)
    for module in unet.modules():
        if hasattr(module, "fuse"):
            module.fuse()
    x = torch.randn(args.batch, 4, args.size // 8, args.size // 8, device=args.device, dtype=dtype)
    context = torch.randn(args.batch, 77, config.context_dim, device=args.device, dtype=dtype)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.no_grad():
        keys = unet.keys(context)
        for _ in range(3):
            unet(x, 500, keys)
        with profile(activities=activities) as trace:
            unet(x, 500, keys)
            if on_gpu:
                torch.cuda.synchronize()
    if args.trace:
        trace.export_chrome_trace(args.trace)
    times, counts, gap = {}, {}, 0.0
    if on_gpu:
        kernels = sorted((e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA), key=lambda e: e.time_range.start)
        for event in kernels:
            times[kind_of(event.name)] = times.get(kind_of(event.name), 0) + event.time_range.elapsed_us()
            counts[kind_of(event.name)] = counts.get(kind_of(event.name), 0) + 1
        gap = kernels[-1].time_range.end - kernels[0].time_range.start - sum(times.values())
    else:
        for event in trace.key_averages():
            times[kind_of(event.key)] = times.get(kind_of(event.key), 0) + event.self_cpu_time_total
            counts[kind_of(event.key)] = counts.get(kind_of(event.key), 0) + event.count
    total = sum(times.values()) + gap
    rows = [
        {"model": args.model, "size": args.size, "batch": args.batch, "dtype": str(dtype).removeprefix("torch."), "kind": kind,
         "self_ms": round(us / 1e3, 2), "share": round(us / total, 3), "calls": counts.get(kind, "")}
        for kind, us in sorted({**times, "gap": gap}.items(), key=lambda pair: -pair[1]) if us
    ]
    print_table(rows)
    if args.csv:
        print("written to", write_csv("profile", rows, args.device))


if __name__ == "__main__":
    main()
