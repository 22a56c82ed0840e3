"""Where does the time of a UNet evaluation go, by kind of operation and by layer?

    python -m bench.profile [--model sd15] [--size 512] [--batch 2] [--trace FILE.json] [--csv]

One evaluation on random weights under torch.profiler, after three to warm up. `self_ms` is the time
of a kind of operation itself, without the operations that it calls (on a GPU, the time of the
kernels); `gap` is the time between kernels in which a GPU was idle. The second table gives the time
of whole layers: residual blocks, transformers, changes of resolution. A single evaluation is timed,
so on a busy machine the layers' times say little. A transformer's time includes its linear layers
and norms; "attention" in the first table is the attention products alone. `--trace` writes a file
for chrome://tracing or ui.perfetto.dev.
"""

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from bench import Row, on_gpu, parser, print_table, wait, write_csv
from bench.unet import build, context_rows
from minsd.config import MODELS
from minsd.kernels import onednn
from minsd.unet import Downsample, ResnetBlock, Transformer, Upsample

# Kind -> parts of the names of operations and kernels. The first kind that fits counts.
KINDS = {
    "attention": ("attention", "flash", "fmha", "softmax", "bmm"),
    "convolution": ("conv", "cudnn", "winograd", "implicit"),
    "norms": ("norm", "welford"),
    "linear": ("mm", "gemm", "linear", "cutlass"),
    "elementwise": ("silu", "gelu", "mul", "add", "elementwise"),
    "copies": ("copy", "cat", "to_", "clone", "memcpy", "contiguous"),
}
Times = tuple[dict[str, float], Counter[str]]  # microseconds and number of events by kind
# An event around oneDNN's attention. Without it, the attention's products would count as linear.
ATTENTION = "attention in blocks"


def kind_of(name: str) -> str:
    for kind, signs in KINDS.items():
        if any(sign in name.lower() for sign in signs):
            return kind
    return "other"


def within(event: Any, name: str) -> bool:
    """Returns whether an event of the profiler is called `name`, or runs inside an event that is
    called `name`."""
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event is not None


def marked(f: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Returns a function that calls f, and that the profile shows as an event called `name`."""

    def run(*args: Any, **more: Any) -> Any:
        with record_function(name):
            return f(*args, **more)

    return run


def trace_of(args: argparse.Namespace) -> tuple[profile, dict[str, nn.Module]]:
    """Profiles one UNet evaluation. Returns (profile, layers), where layers is a dict name ->
    layer. The profile contains an event of the same name for each of these layers."""
    gpu = on_gpu(args.device)
    dtype = getattr(torch, args.dtype)
    unet = build(args.model, dtype, args.device)
    onednn.attend = marked(onednn.attend, ATTENTION)
    kinds = (ResnetBlock, Transformer, Downsample, Upsample)
    layers: dict[str, nn.Module] = {
        name: layer for name, layer in unet.named_modules() if isinstance(layer, kinds)
    }
    for name, layer in layers.items():
        layer.forward = marked(layer.forward, name)
    x = torch.randn(args.batch, 4, args.size // 8, args.size // 8, device=args.device, dtype=dtype)
    context = torch.randn(
        args.batch, context_rows(unet.config), unet.config.context_dim, device=args.device, dtype=dtype
    )
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above its "USDT: ..." lines on stderr
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with torch.no_grad():
        keys = unet.text_kv(context)
        for _ in range(3):
            unet(x, 500, keys)
        with profile(activities=activities) as trace:
            unet(x, 500, keys)
            wait(args.device)
    return trace, layers


def times_on_gpu(trace: profile, layers: dict[str, nn.Module]) -> Times:
    """Returns (times, counts) of the GPU kernels in the profile, two dicts by kind of operation:
    microseconds, and the number of kernels. The kind "gap" in `times` is the idle time between
    kernels. Events that are named in `layers` are left out."""
    cuda = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
    events = [e for e in trace.events() or () if e.device_type == cuda]
    kernels = [e for e in events if e.name not in layers]  # the layers' marks appear there, too
    if not kernels:
        sys.exit("the profiler saw no kernel: CUPTI is missing, or this container may not use it")
    kernels.sort(key=lambda event: event.time_range.start)
    times: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for event in kernels:
        times[kind_of(event.name)] += event.time_range.elapsed_us()
        counts[kind_of(event.name)] += 1
    whole = kernels[-1].time_range.end - kernels[0].time_range.start
    times["gap"] = whole - sum(times.values())
    return times, counts


def times_on_cpu(trace: profile, layers: dict[str, nn.Module]) -> Times:
    """Returns (times, counts) of the operations in the profile, two dicts by kind of operation:
    microseconds, and the number of operations. Events that are named in `layers` count as "other".
    """
    times: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for event in trace.events() or ():
        kind = "other" if event.name in layers else kind_of(event.name)
        if within(event, ATTENTION):
            kind = "attention"
        times[kind] += event.self_cpu_time_total
        counts[kind] += 1
    return times, counts


def tables(
    args: argparse.Namespace, trace: profile, layers: dict[str, nn.Module]
) -> tuple[list[Row], list[Row]]:
    """Returns two tables from the profile: the times by kind of operation, and the times of
    `layers` (name -> layer)."""
    gpu = on_gpu(args.device)
    times, counts = (times_on_gpu if gpu else times_on_cpu)(trace, layers)
    total = sum(times.values())
    by_kind = [
        {
            "model": args.model,
            "size": args.size,
            "batch": args.batch,
            "dtype": args.dtype,
            "kind": kind,
            "self_ms": round(us / 1e3, 2),
            "share": round(us / total, 3),
            "calls": counts[kind] or "",
        }
        for kind, us in sorted(times.items(), key=lambda pair: -pair[1])
        if us
    ]
    by_layer = []
    events = {event.key: event for event in trace.key_averages()}
    for name, layer in layers.items():
        us = events[name].device_time_total if gpu else events[name].cpu_time_total
        kind = type(layer).__name__
        by_layer.append(
            {"layer": name, "kind": kind, "ms": round(us / 1e3, 2), "share": round(us / total, 3)}
        )
    return by_kind, by_layer


def main() -> None:
    options = parser(__doc__, "profile")
    options.add_argument("--model", default="sd15", choices=MODELS, help="its sizes (default: sd15)")
    options.add_argument("--size", type=int, default=512, help="pixels per side (default: 512)")
    options.add_argument(
        "--batch", type=int, default=2, help="UNet rows; 2, the default, is one guided image"
    )
    options.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: CUDA if there is a GPU)",
    )
    options.add_argument("--dtype", help="default: float16 on a GPU, float32 on a CPU")
    options.add_argument("--trace", help="write the trace to this file")
    args = options.parse_args()
    args.dtype = args.dtype or ("float16" if on_gpu(args.device) else "float32")
    trace, layers = trace_of(args)
    if args.trace:
        trace.export_chrome_trace(args.trace)
    by_kind, by_layer = tables(args, trace, layers)
    print_table(by_kind)
    print()
    print_table(by_layer)
    if args.csv:
        print("written to", write_csv("profile", by_kind, args.device))


if __name__ == "__main__":
    main()
