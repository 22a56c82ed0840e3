"""Where does a UNet evaluation's time go? Tables by kind of operation and by layer, and a trace for chrome://tracing or perfetto.

    python -m bench.profile [--model sd15] [--size 512] [--batch 2] [--trace FILE.json] [--csv]

Full size, random weights, one evaluation under torch.profiler after three to warm up. `self_ms` is time in a kind of
operation itself (on a GPU the kernels' own); `gap` is the time in which a GPU had nothing to do between kernels. Layers are
timed whole: a residual block, a transformer, a change of resolution.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench import on_gpu, print_table, wait, write_csv
from bench.unet import build
from minsd.config import MODELS
from minsd.kernels import onednn
from minsd.unet import Downsample, ResnetBlock, Transformer, Upsample

KINDS = {  # the first that is part of an operation's or kernel's name
    "attention": ("attention", "flash", "fmha", "softmax", "bmm"),
    "convolution": ("conv", "cudnn", "winograd", "implicit"),
    "norms": ("norm", "welford"),
    "linear": ("mm", "gemm", "linear", "cutlass"),
    "elementwise": ("silu", "gelu", "mul", "add", "elementwise"),
    "copies": ("copy", "cat", "to_", "clone", "memcpy", "contiguous"),
}


def kind_of(name: str) -> str:
    return next(
        (kind for kind, signs in KINDS.items() if any(sign in name.lower() for sign in signs)), "other"
    )


ATTENTION = "attention in blocks"  # whose products would count as linear layers


def within(event, name: str) -> bool:
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event is not None


def marked(f, name: str):
    def run(*args, **more):
        with record_function(name):
            return f(*args, **more)

    return run


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
    gpu = on_gpu(args.device)
    dtype = getattr(torch, args.dtype or ("float16" if gpu else "float32"))
    unet, config = build("minsd", args.model, dtype, args.device)
    onednn.attend = marked(onednn.attend, ATTENTION)
    layers = {
        name: m
        for name, m in unet.named_modules()
        if isinstance(m, (ResnetBlock, Transformer, Downsample, Upsample))
    }
    for name, layer in layers.items():
        layer.forward = marked(layer.forward, name)
    x = torch.randn(args.batch, 4, args.size // 8, args.size // 8, device=args.device, dtype=dtype)
    context = torch.randn(args.batch, 77, config.context_dim, device=args.device, dtype=dtype)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with torch.no_grad():
        keys = unet.text_kv(context)
        for _ in range(3):
            unet(x, 500, keys)
        with profile(activities=activities) as trace:
            unet(x, 500, keys)
            wait(args.device)
    if args.trace:
        trace.export_chrome_trace(args.trace)
    times, counts, gap = {}, {}, 0.0
    if gpu:
        on_device = (
            e
            for e in trace.events()
            if e.device_type == torch.autograd.DeviceType.CUDA and e.name not in layers
        )
        kernels = sorted(on_device, key=lambda e: e.time_range.start)  # layers' names are shown there, too
        for event in kernels:
            times[kind_of(event.name)] = times.get(kind_of(event.name), 0) + event.time_range.elapsed_us()
            counts[kind_of(event.name)] = counts.get(kind_of(event.name), 0) + 1
        gap = kernels[-1].time_range.end - kernels[0].time_range.start - sum(times.values())
    else:
        for event in trace.events():
            kind = (
                "attention"
                if within(event, ATTENTION)
                else "other"
                if event.name in layers
                else kind_of(event.name)
            )
            times[kind] = times.get(kind, 0) + event.self_cpu_time_total
            counts[kind] = counts.get(kind, 0) + 1
    total = sum(times.values()) + gap
    rows = [
        {
            "model": args.model,
            "size": args.size,
            "batch": args.batch,
            "dtype": str(dtype).removeprefix("torch."),
            "kind": kind,
            "self_ms": round(us / 1e3, 2),
            "share": round(us / total, 3),
            "calls": counts.get(kind, ""),
        }
        for kind, us in sorted({**times, "gap": gap}.items(), key=lambda pair: -pair[1])
        if us
    ]
    print_table(rows)
    print()
    whole = {
        e.key: e.device_time_total if gpu else e.cpu_time_total
        for e in trace.key_averages()
        if e.key in layers
    }
    print_table(
        [
            {
                "layer": name,
                "kind": type(layer).__name__,
                "ms": round(whole[name] / 1e3, 2),
                "share": round(whole[name] / total, 3),
            }
            for name, layer in layers.items()
        ]
    )
    if args.csv:
        print("written to", write_csv("profile", rows, args.device))


if __name__ == "__main__":
    main()
