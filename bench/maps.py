"""What does a step of noise optimisation cost: a UNet evaluation with maps, a loss, its gradient?

    python -m bench.maps [--model sd15] [--size 512] [--runs 3] [--csv]
    python -m bench.maps --device cuda --dtype float16 --csv

The variants run on the same random weights, each in a process of its own, so that each has a peak
of memory (weights included) of its own. Each variant differs from the one before by one change, and
in float32 all must agree in the loss and in the gradient with respect to the latents. In 16 bits
rounding decides between nearly equal peaks, so the difference is only reported:

    research        as the published programs do it: every layer keeps its probabilities; the whole
                    network runs and is differentiated, weights included
    frozen          no gradients of weights
    early_stop      in addition, the UNet ends after the last layer that records
    minsd           in addition, only recording layers compute probabilities, in bounded memory (on
                    a GPU: the Triton kernels), and linear layers on a CPU are oneDNN's
    graphs          in addition, evaluation and gradient are replayed from CUDA graphs (GPU only)

On a CPU one thread is used. Times are medians. On a busy machine trust `cpu_seconds`, which leaves
out waiting for a core. The first step of a process is left out, or the first two for `graphs`,
where the second captures the graphs, unless there are no others.
"""

import argparse
import json
import statistics
import sys
from typing import TYPE_CHECKING, Any

from bench import Row, clocked, in_own_process, on_gpu, parser, peak_mb, report
from bench.unet import build, context_rows
from minsd.config import MODELS

if TYPE_CHECKING:
    from torch import Tensor

    from minsd.unet import UNet

VARIANTS = ("research", "frozen", "early_stop", "minsd", "graphs")
PRODUCT = ("minsd", "graphs")


def materialised(q: "Tensor", k: "Tensor", v: "Tensor", **_: Any) -> "tuple[Tensor, Tensor]":
    """Computes attention with all probabilities in memory. Returns (output, maps): the output
    (B,N,H,d), and the probabilities averaged over heads (B,N,M)."""
    from minsd.kernels import reference

    return reference.whole(q, k, v, q.shape[-1] ** -0.5)


def step(unet: "UNet", x: "Tensor", context: "Tensor", only: bool) -> float:
    """Evaluates the UNet on latents `x`, computes a loss like InitNO's from the attention maps of
    two words, and differentiates the loss. Returns the loss as a number. The loss is small if the
    two words are attended to at different places. If `only` is True, the UNet stops after the last
    layer whose maps are recorded."""
    import torch

    from minsd.attention import AttentionRecorder
    from minsd.graphs import differentiating

    record = AttentionRecorder(only=only)
    with differentiating(unet):  # changes nothing without graphs
        unet(x, 981, context, record=record)
    words = record.cross[..., [2, 5]].mul(100).softmax(-1).flatten(1, 2)  # (B, h*w, 2)
    peak, place = words.max(dim=1)  # (B, 2)
    claims = record.self.flatten(1, 2)[0, place[0]]  # (2, h*w)
    loss = (1 - peak).max() + claims.amin(dim=0).sum() / claims.sum()
    scale = 256.0 if context.dtype == torch.float16 else 1.0  # as in noise/losses.py
    (scale * loss).backward()
    return loss.item()


def worker(args: argparse.Namespace) -> None:
    """Times the variant of --worker in this process and prints the result as JSON."""
    import torch

    from minsd import attention
    from minsd.graphs import use_graphs
    from minsd.kernels import onednn

    torch.set_num_threads(1)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    unet = build(args.model, dtype, device, as_loaded=args.worker in PRODUCT)
    if args.worker not in PRODUCT:
        for module in unet.modules():
            if isinstance(module, attention.Attention):
                module.fused = None  # projections one by one, from weights that can take gradients
        attention.Attention.attend = staticmethod(materialised)
        onednn.available = lambda *tensors: False
    unet.requires_grad_(args.worker == "research")
    if args.worker == "graphs":
        use_graphs(unet)
    generator = torch.Generator().manual_seed(1)
    cells = args.size // 8
    noise = torch.randn(1, 4, cells, cells, generator=generator).to(device, dtype)
    rows = context_rows(unet.config)
    context = torch.randn(1, rows, unet.config.context_dim, generator=generator).to(device, dtype)
    only = args.worker in ("early_stop", *PRODUCT)
    seconds = []
    for _ in range(args.runs):
        unet.zero_grad(set_to_none=True)
        x = noise.clone().requires_grad_()
        loss, *spent = clocked(device, step, unet, x, context, only)
        seconds.append(spent)
        assert x.grad is not None
        result = {"loss": loss, "gradient": x.grad.flatten().tolist()}
    warm = seconds[2 if args.worker == "graphs" else 1 :] or seconds
    print(json.dumps({"seconds": warm, "peak_mb": peak_mb(device), **result}))


def compare(args: argparse.Namespace, results: dict[str, Row]) -> list[Row]:
    """Returns one row per variant, from the measured values in `results`. Raises SystemExit if, in
    float32, the loss or gradient of a variant differs from that of the variant `research`."""
    import torch

    research = results["research"]
    truth = torch.tensor(research["gradient"])
    rows = []
    for name, result in results.items():
        error = ((torch.tensor(result["gradient"]) - truth).norm() / truth.norm()).item()
        same = error < 1e-3 and abs(result["loss"] - research["loss"]) < 1e-2
        if args.dtype == "float32" and not same:
            sys.exit(f"{name} does not compute the same: gradient error {error:.1e}, loss {result['loss']}")
        rows.append(
            {
                "model": args.model,
                "size": args.size,
                "dtype": args.dtype,
                "variant": name,
                "seconds": round(result["seconds"], 3),
                "cpu_seconds": round(result["cpu_seconds"], 3),
                "peak_mb": round(result["peak_mb"]),
                "times_faster": round(research["seconds"] / result["seconds"], 2),
                "gradient_error": f"{error:.1e}",
            }
        )
    return rows


def main() -> None:
    options = parser(__doc__, "maps")
    options.add_argument("--model", default="sd15", choices=MODELS, help="its sizes (default: sd15)")
    options.add_argument("--size", type=int, default=512, help="pixels per side (default: 512)")
    options.add_argument("--runs", type=int, default=3, help="steps per variant (default: 3)")
    options.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    options.add_argument("--dtype", default="float32", help="float32 (the default), float16, ...")
    options.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        worker(args)
        return

    import torch

    torch.set_num_threads(1)  # as in the workers, for the CSV's device column
    results = {}
    for name in VARIANTS if on_gpu(args.device) else VARIANTS[:-1]:
        result = in_own_process("--worker", name)
        seconds, cpu_seconds = zip(*result["seconds"])
        result["seconds"] = statistics.median(seconds)
        result["cpu_seconds"] = statistics.median(cpu_seconds)
        results[name] = result
        print(f"{name}: {result['seconds']:.3f} s", file=sys.stderr, flush=True)
    report("maps", compare(args, results), args.csv, args.device)


if __name__ == "__main__":
    main()
