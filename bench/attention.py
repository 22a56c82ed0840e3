"""Attention that also gives head-mean probabilities: what do the ways to it cost, in time, memory and launches?

    python -m bench.attention [--device cuda] [--dtype float16] [--runs 20] [--csv]

Shapes are those of SD1.x at 512x512, 8 heads: 64x64, 32x32 and 16x16 cells (head dims 40, 80, 160), to themselves and to
77 words, for 1, 2 and 8 pictures; forward, and forward with backward; eager and, on a GPU, in a CUDA graph. On a CPU a
reduced form: float32, one picture, 32x32 and 16x16, one thread, and its processor time: what else the machine does counts less.

    sdpa_flash, sdpa_efficient, sdpa_math   PyTorch's attention, without maps: the floor
    blocks          minsd's on a CPU, without maps or gradients (kernels/onednn.py)
    flex            FlexAttention on identity values, one way to get at probabilities with a public fused kernel
    materialised    every probability in memory, differentiated by autograd: the research code's way
    reference       minsd's plain PyTorch in bounded memory
    fused           minsd's Triton kernels
    decoupled       PyTorch's attention for the output, minsd's map kernels from q and k

Every provider is checked against float64 in the same run, before it is timed. Providers take turns, so that a drifting
machine drifts for all; times are medians in microseconds. `extra_mb` is peak memory beyond inputs, outputs, maps and
gradients (GPU only). `roofline` is the least time the shape could take on an H100 (3 TB/s, 800 TFLOP/s) over the time taken.
`ratio` is to materialised.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import report
from minsd.kernels import attention, reference

HEADS = 8
HEAD_DIM = {64: 40, 32: 80, 16: 160}  # cells a side -> head dim
SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}


def with_sdpa(kind):
    def run(q, k, v):
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(
                1, 2
            ), None

    return run


def with_flex():
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention)

    def run(q, k, v):
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, N, d)
        eye = torch.eye(k.shape[2], device=q.device, dtype=q.dtype).expand(*k.shape[:2], -1, -1)
        return flex(q, k, v).transpose(1, 2), flex(q, k, eye).float().mean(dim=1)

    return run


def providers(device):
    every = {name: with_sdpa(kind) for name, kind in SDPA.items()}
    every["materialised"] = lambda q, k, v: reference.whole(q, k, v, q.shape[-1] ** -0.5)
    every["reference"] = lambda q, k, v: attention(q, k, v, probs="mean", backend="reference")
    every["decoupled"] = lambda q, k, v: attention(q, k, v, probs="mean", backend="sdpa")
    if device.type == "cuda":
        every["flex"] = with_flex()
        every["fused"] = lambda q, k, v: attention(q, k, v, probs="mean", backend="triton")
    else:
        del every["sdpa_efficient"]  # not on a CPU
        every["blocks"] = lambda q, k, v: attention(q, k, v, backend="sdpa")
    return every


def step(run, q, k, v, grads, backward):
    """-> out, maps and, with `backward`, the gradients of q, k, v (of q alone where k and v are frozen text)."""
    out, maps = run(q, k, v)
    if not backward:
        return out, maps
    leaves = [y for y in (q, k, v) if y.requires_grad]
    ends = [(y, g) for y, g in ((out, grads[0]), (maps, grads[1])) if y is not None]
    return out, maps, *torch.autograd.grad([y for y, _ in ends], leaves, [g for _, g in ends])


def errors(run, q, k, v, grads, backward):
    """The largest relative error of anything `step` gives, on the first picture, against float64."""
    some = [y[:1].detach() for y in (q, k, v)]
    needs = [y.requires_grad for y in (q, k, v)]
    ours = step(
        run,
        *(y.clone().requires_grad_(n and backward) for y, n in zip(some, needs)),
        [g[:1] for g in grads],
        backward,
    )
    exact = [y.double().requires_grad_(n and backward) for y, n in zip(some, needs)]
    only_out = ours[1] is None
    f = (
        (lambda *a: (reference.whole(*a, q.shape[-1] ** -0.5)[0], None))
        if only_out
        else (lambda *a: reference.whole(*a, q.shape[-1] ** -0.5))
    )
    truth = step(f, *exact, [g[:1].double() for g in grads], backward)
    pairs = [(a, b) for a, b in zip(ours, truth) if a is not None]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def captured(run):
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def launches(run):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(e.count for e in trace.key_averages())


def extra_mb(run, q):
    """Peak memory beyond what is there before and what is handed back."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    peak = torch.cuda.max_memory_allocated()
    results = sum(y.numel() * y.element_size() for y in kept if y is not None)
    return max(0.0, (peak - before - results) / 2**20)


def seconds(run, device):
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def least_seconds(batch, n, m, d, itemsize, is_self, backward):
    """Roofline: products out, S (2 forward; 2 more to remake S and dP, 1 for dQ, 2 for dK and dV) and every tensor once."""
    products = 2 + (5 if is_self else 3) * backward
    flops = 2 * products * batch * HEADS * n * m * d
    rows = (
        2 * n + 2 * m + backward * (3 * n + (4 if is_self else 2) * m)
    )  # q out k v; then q do dq k v (dk dv)
    moved = batch * HEADS * d * rows * itemsize + batch * n * m * 4 * (1 + backward)
    return max(flops / 800e12, moved / 3e12)


def measure(side, is_self, batch, backward, graph, device, dtype, runs):
    n, d = side * side, HEAD_DIM[side]
    m = n if is_self else 77
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, n, HEADS, d, generator=g).to(device, dtype).requires_grad_(backward)
    k, v = (
        torch.randn(batch, m, HEADS, d, generator=g).to(device, dtype).requires_grad_(backward and is_self)
        for _ in range(2)
    )
    grads = (
        torch.randn(batch, n, HEADS, d, generator=g).to(device, dtype),
        torch.randn(batch, n, m, generator=g).to(device),
    )
    tolerance = 5e-6 if dtype == torch.float32 else 2e-2
    ready, rows = {}, {}
    for name, f in providers(device).items():
        if name == "blocks" and backward:
            continue
        row = {
            "cells": f"{side}x{side}",
            "kind": "self" if is_self else "cross",
            "batch": batch,
            "pass": "forward+backward" if backward else "forward",
            "mode": "graph" if graph else "eager",
            "dtype": str(dtype).removeprefix("torch."),
            "provider": name,
            "maps": name not in (*SDPA, "blocks"),
        }

        def run(f=f):
            return step(f, q, k, v, grads, backward)

        try:
            error = errors(f, q, k, v, grads, backward)
            if not error < tolerance:
                raise ArithmeticError(f"wrong by {error:.1e}")
            for _ in range(3):
                run()
            row |= {"error": f"{error:.0e}", "launches": "", "extra_mb": ""}
            if device.type == "cuda":
                row |= {"launches": launches(run), "extra_mb": round(extra_mb(run, q), 2)}
            ready[name], rows[name] = captured(run) if graph else run, row
        except (
            RuntimeError,
            ArithmeticError,
            ValueError,
        ) as reason:  # a provider may not offer a shape: say so, go on
            print(
                f"left out: {row['cells']} {row['kind']} batch {batch} {row['pass']} {row['mode']} {name}:",
                str(reason).splitlines()[0][:120],
                flush=True,
            )
    times = {name: [] for name in ready}
    for _ in range(runs):
        for name, run in ready.items():
            times[name].append(seconds(run, device))
    least = least_seconds(batch, n, m, d, q.element_size(), is_self, backward)
    for name, row in rows.items():
        median = statistics.median(times[name])
        row["us"] = round(median * 1e6, 1)
        row["ratio"] = (
            round(median / statistics.median(times["materialised"]), 3) if "materialised" in times else ""
        )
        row["roofline"] = round(least / median, 3) if device.type == "cuda" else ""
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="float16 on a GPU, float32 on a CPU unless given")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--csv", action="store_true", help="append to bench/results/attention.csv")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype or ("float16" if on_gpu else "float32"))
    rows = []
    for side in (64, 32, 16) if on_gpu else (32, 16):
        for is_self in (True, False):
            for batch in (1, 2, 8) if on_gpu else (1,):
                for backward in (False, True):
                    for graph in (False, True) if on_gpu else (False,):
                        rows += measure(side, is_self, batch, backward, graph, device, dtype, args.runs)
    report("attention", rows, args.csv, args.device)


if __name__ == "__main__":
    main()
