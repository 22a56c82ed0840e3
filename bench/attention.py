"""Attention that also returns head-mean probabilities: what do its implementations cost?

In time, memory and kernel launches:

    python -m bench.attention [--device cuda] [--dtype float16] [--runs 20] [--csv]
    python -m bench.attention --sides 16 32 --batches 1 --providers fused materialised    # a part

Rows are written as each setting is finished, so a run that is cut off keeps them. The shapes are
those of SD1.x at 512x512 with 8 heads: 64x64, 32x32 and 16x16 cells (head dims 40, 80, 160),
attending to themselves and to 77 words, for 1, 2 and 8 images; forward, and forward with backward;
eager and, on a GPU, in a CUDA graph. On a CPU the bench is reduced: float32, one image, 32x32 and
16x16 cells, one thread, and processor time instead of elapsed time, because other work on the
machine affects it less. The providers (implementations to compare) are

    sdpa_flash, sdpa_efficient, sdpa_cudnn, sdpa_math
                    PyTorch's attention, without maps: the lower bound
    blocks          minsd's on a CPU, without maps or gradients (kernels/onednn.py)
    flex            FlexAttention with an identity matrix as values: a public fused kernel (up to
                    256 keys: the values of a head are as wide as there are keys)
    lse_sum         PyTorch's flash attention for the output and the log-sum-exp, then
                    exp(q k - lse) summed head after head under torch.compile: the strongest public
                    recipe (forward only)
    materialised    all probabilities in memory, differentiated by autograd: research code
    reference       minsd's plain PyTorch, in bounded memory
    fused           minsd's Triton kernels
    decoupled       PyTorch's attention for the output, minsd's map kernels from q and k
    small, fused_heads_apart, fused_small_blocks, decoupled_one_lse
                    auto, fused or decoupled with another value of a switch (kernels/switches.py)

Every provider is checked against float64 before it is timed. Providers take turns, so that a drift
of the machine affects all of them; times are medians in microseconds. `extra_mb` is the peak memory
beyond inputs, outputs, maps and gradients (GPU only). `roofline` is the least time that the shape
could take on an H100 (3 TB/s, 800 TFLOP/s), divided by the time taken. `ratio` is the time divided
by that of materialised.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import Row, on_gpu, parser, print_table, write_csv
from minsd.kernels import attention, reference, switches

HEADS = 8
HEAD_DIM = {64: 40, 32: 80, 16: 160}  # cells per side -> head dim
WORDS = 77
FLEX_KEYS = 256  # at most: its values are an identity matrix of so many columns
SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
WITHOUT_MAPS = (*SDPA, "blocks")

# q (B,N,H,d), k and v (B,M,H,d) -> output (B,N,H,d), and head-mean probabilities (B,N,M) or None
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Case:
    """One case to measure: a shape, forward or forward with backward, and with or without a CUDA
    graph."""

    side: int  # latent cells
    is_self: bool
    batch: int  # images
    backward: bool
    graph: bool  # replayed as a CUDA graph

    @property
    def keys(self) -> int:
        return self.side**2 if self.is_self else WORDS

    def row(self, dtype: torch.dtype) -> Row:
        return {
            "cells": f"{self.side}x{self.side}",
            "kind": "self" if self.is_self else "cross",
            "batch": self.batch,
            "pass": "forward+backward" if self.backward else "forward",
            "mode": "graph" if self.graph else "eager",
            "dtype": str(dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    grads: tuple[Tensor, Tensor]  # of the output and of the maps
    backward: bool


# --- providers ------------------------------------------------------------------------------------


def with_sdpa(kind: SDPBackend) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, N, d)
        with sdpa_kernel(kind):
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2), None

    return run


def with_flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if k.shape[1] > FLEX_KEYS:
            raise ValueError(f"values as wide as {k.shape[1]} keys do not fit a kernel")
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, N, d)
        eye = torch.eye(k.shape[2], device=q.device, dtype=q.dtype).expand(*k.shape[:2], -1, -1)
        return flex(q, k, v).transpose(1, 2), flex(q, k, eye).float().mean(dim=1)

    return run


def with_lse_sum() -> Attention:
    """Returns an attention function that computes the mean of the probabilities over heads by
    adding one head after another. The probabilities of a head are exp(q k / sqrt(d) - lse), where
    lse is the log-sum-exp of the scores."""

    def mean(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        total = torch.zeros(q.shape[0], q.shape[2], k.shape[2], device=q.device)
        for h in range(q.shape[1]):
            scores = (q[:, h] @ k[:, h].mT).float() * q.shape[-1] ** -0.5
            total = total + (scores - lse[:, h, :, None]).exp()
        return total / q.shape[1]

    compiled: Any = torch.compile(mean, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if q.requires_grad:
            raise ValueError("the log-sum-exp of this operator has no gradient")
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, N, d)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        return out.transpose(1, 2), compiled(q, k, lse)

    return run


def materialised(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return reference.whole(q, k, v, q.shape[-1] ** -0.5)


def with_backend(backend: str, probs: str | None = "mean") -> Attention:
    return lambda q, k, v: attention(q, k, v, probs=probs, backend=backend)


# Provider -> the switches that differ for it.
SWITCHED: dict[str, dict[str, int | bool]] = {
    "small": {"materialise_below": 1 << 62},
    "fused_heads_apart": {"heads_fastest": False},
    "fused_small_blocks": {"map_blocks_64": 1 << 62, "map_blocks_128": 1 << 62},
    "decoupled_one_lse": {"shared_lse": True},
}


def providers(device: torch.device, names: Sequence[str] | None = None) -> dict[str, Attention]:
    """Returns a dict name -> attention function of the providers (implementations to compare) that
    can run on the device. With `names`, returns only the providers among them."""
    every: dict[str, Attention] = {name: with_sdpa(kind) for name, kind in SDPA.items()}
    every["materialised"] = materialised
    every["reference"] = with_backend("reference")
    every["decoupled"] = with_backend("sdpa")
    if on_gpu(device):
        every["flex"] = with_flex()
        every["lse_sum"] = with_lse_sum()
        every["fused"] = with_backend("triton")
        every["small"] = with_backend("auto")
        every["fused_heads_apart"] = every["fused_small_blocks"] = every["fused"]
        every["decoupled_one_lse"] = every["decoupled"]
    else:
        del every["sdpa_efficient"]  # PyTorch does not have these two on a CPU
        del every["sdpa_cudnn"]
        every["blocks"] = with_backend("sdpa", probs=None)
    return {name: attend for name, attend in every.items() if names is None or name in names}


# --- one provider on one case ---------------------------------------------------------------------


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    n, m, d = case.side**2, case.keys, HEAD_DIM[case.side]
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, needs_grad: bool) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype).requires_grad_(needs_grad)

    q = draw(case.batch, n, HEADS, d, needs_grad=case.backward)
    # the text's keys and values are frozen
    k = draw(case.batch, m, HEADS, d, needs_grad=case.backward and case.is_self)
    v = draw(case.batch, m, HEADS, d, needs_grad=case.backward and case.is_self)
    of_out = torch.randn(case.batch, n, HEADS, d, generator=g).to(device, dtype)
    of_maps = torch.randn(case.batch, n, m, generator=g).to(device)
    return Inputs(q, k, v, (of_out, of_maps), case.backward)


def step(run: Attention, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Runs the attention function `run` once on the inputs. Returns (output, maps). If the inputs
    are for a backward case, the gradients of q, k and v follow, or that of q alone if k and v come
    from text."""
    out, maps = run(inputs.q, inputs.k, inputs.v)
    if not inputs.backward:
        return out, maps
    leaves = [y for y in (inputs.q, inputs.k, inputs.v) if y.requires_grad]
    ends = [(y, g) for y, g in zip((out, maps), inputs.grads) if y is not None]
    return out, maps, *torch.autograd.grad([y for y, _ in ends], leaves, [g for _, g in ends])


def error(run: Attention, inputs: Inputs) -> float:
    """Returns the largest relative error, compared with float64, of the tensors that `step` returns
    for the attention function `run` and the first image of the inputs."""

    def first(exact: bool) -> Inputs:
        def copy(y: Tensor) -> Tensor:
            one = y[:1].detach().clone()
            return one.double() if exact else one

        q, k, v = (copy(y).requires_grad_(y.requires_grad) for y in (inputs.q, inputs.k, inputs.v))
        of_out, of_maps = (copy(g) for g in inputs.grads)
        return Inputs(q, k, v, (of_out, of_maps), inputs.backward)

    ours = step(run, first(exact=False))
    with_maps = ours[1] is not None

    def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, maps = materialised(q, k, v)
        return out, maps if with_maps else None

    truth = step(exact, first(exact=True))
    pairs = [(a, b) for a, b in zip(ours, truth) if a is not None and b is not None]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Captures `run` in a CUDA graph. Returns a function that replays the graph."""
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


def launches(run: Callable[[], Any]) -> int:
    """Returns the number of GPU kernels that a call of `run` launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages())


def extra_mb(run: Callable[[], tuple[Tensor | None, ...]]) -> float:
    """Returns the peak of GPU memory during a call of `run`, in MB, beyond the memory allocated
    before the call and the tensors that the call returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    peak = torch.cuda.max_memory_allocated()
    results = sum(y.numel() * y.element_size() for y in kept if y is not None)
    return max(0.0, (peak - before - results) / 2**20)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Calls `run` once and returns its time: processor seconds on a CPU, elapsed seconds on a
    GPU."""
    if not on_gpu(device):
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def least_seconds(case: Case, itemsize: int) -> float:
    """Returns the least number of seconds that a case could take on an H100 (roofline): the time of
    all matrix products, or of reading or writing every tensor once, whichever is longer. `itemsize`
    is the number of bytes per element.

    In the forward pass, the products are S = QK and the output; in the backward pass, S again, dP,
    and one for each gradient (dQ, dK, dV).
    """
    n, m, d = case.side**2, case.keys, HEAD_DIM[case.side]
    products = 2
    rows = 2 * n + 2 * m  # q, out; k, v
    if case.backward:
        products += 5 if case.is_self else 3
        rows += 3 * n + (4 if case.is_self else 2) * m  # q, dout, dq; k, v (dk, dv)
    flops = 2 * products * case.batch * HEADS * n * m * d
    maps = case.batch * n * m * 4 * (1 + case.backward)
    moved = case.batch * HEADS * d * rows * itemsize + maps
    return max(flops / 800e12, moved / 3e12)


# --- the table ------------------------------------------------------------------------------------


def prepare(name: str, attend: Attention, case: Case, inputs: Inputs) -> tuple[Row, Callable[[], Any]]:
    """Checks the results of a provider (an implementation called `name`, with the function
    `attend`) on a case, and warms it up. Returns (row, run): the row of the table without times,
    and the function to time. Raises ArithmeticError if the results are wrong."""
    dtype = inputs.q.dtype
    device = inputs.q.device

    changes = SWITCHED.get(name, {})

    def run() -> tuple[Tensor | None, ...]:
        with switches.use(**changes):
            return step(attend, inputs)

    with switches.use(**changes):
        wrong = error(attend, inputs)
    if not wrong < (5e-6 if dtype == torch.float32 else 2e-2):
        raise ArithmeticError(f"wrong by {wrong:.1e}")
    for _ in range(3):
        run()
    row = case.row(dtype) | {"provider": name, "maps": name not in WITHOUT_MAPS}
    row |= {"error": f"{wrong:.0e}", "launches": "", "extra_mb": ""}
    if on_gpu(device):
        row |= {"launches": launches(run), "extra_mb": round(extra_mb(run), 2)}
    return row, captured(run) if case.graph else run


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, runs: int, names: Sequence[str] | None
) -> list[Row]:
    """Times all providers (implementations to compare) on a case, or those in `names` if given,
    `runs` times each. Returns one row for each provider that supports the case."""
    torch._dynamo.reset()  # its limit of recompilations counts over cases
    inputs = inputs_of(case, device, dtype)
    rows: dict[str, Row] = {}
    ready: dict[str, Callable[[], Any]] = {}
    for name, attend in providers(device, names).items():
        if name == "blocks" and case.backward:
            continue
        try:
            rows[name], ready[name] = prepare(name, attend, case, inputs)
        except Exception as reason:  # a provider may not offer this shape; libraries say so in many ways
            where = " ".join(str(value) for value in list(case.row(dtype).values())[:5])
            told = next(iter(str(reason).splitlines()), type(reason).__name__)
            print(f"left out: {where} {name}:", told[:120], flush=True)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(runs):
        for name, run in ready.items():
            times[name].append(seconds(run, device))
    medians = {name: statistics.median(of) for name, of in times.items()}
    least = least_seconds(case, inputs.q.element_size())
    for name, row in rows.items():
        base = medians.get("materialised")
        row["us"] = round(medians[name] * 1e6, 1)
        row["ratio"] = round(medians[name] / base, 3) if base else ""
        row["roofline"] = round(least / medians[name], 3) if on_gpu(device) else ""
    return list(rows.values())


def main() -> None:
    options = parser(__doc__, "attention")
    options.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: CUDA if there is a GPU)",
    )
    options.add_argument("--dtype", help="default: float16 on a GPU, float32 on a CPU")
    options.add_argument("--runs", type=int, default=20, help="steps per provider (default: 20)")
    options.add_argument(
        "--sides", nargs="+", type=int, choices=HEAD_DIM, help="latent cells per side (default: all)"
    )
    options.add_argument("--batches", nargs="+", type=int, help="images (default: 1 2 8; on a CPU 1)")
    options.add_argument("--providers", nargs="+", help="default: all that the device has")
    args = options.parse_args()
    device = torch.device(args.device)
    gpu = on_gpu(device)
    if args.providers and not providers(device, args.providers):
        options.error(f"--providers takes {', '.join(providers(device))}")
    if not gpu:
        torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype or ("float16" if gpu else "float32"))
    cases = itertools.product(
        args.sides or ((64, 32, 16) if gpu else (32, 16)),
        (True, False),
        args.batches or ((1, 2, 8) if gpu else (1,)),
        (False, True),
        (False, True) if gpu else (False,),
    )
    rows = []
    for case in cases:
        found = measure(Case(*case), device, dtype, args.runs, args.providers)
        rows += found
        if args.csv and found:
            write_csv("attention", found, args.device)
    print_table(rows)


if __name__ == "__main__":
    main()
