"""What does one step of noise optimisation cost: attention maps of one UNet evaluation, a loss, its gradient in the latents?

    python -m bench.maps [--model sd15] [--size 512] [--runs 3] [--device cuda --dtype float16] [--csv]

Four ways on the same random full-size weights, each in a process of its own so that its peak memory (weights counted) is
its own. They differ by one thing from line to line, and must agree in the loss and the gradient:

    research        as the published programs do it: every layer keeps its probabilities, the whole network runs and is
                    differentiated, weights included
    frozen          the same without gradients of weights
    early_stop      and the UNet ends after the last layer that records
    minsd           and only recording layers compute probabilities, in bounded memory (on a GPU: the Triton kernels), and
                    a CPU's linear layers are oneDNN's

On a CPU one thread is used. Times are medians; on a busy machine they and their ratios are vague, and `cpu_seconds`, which
leaves out waiting for a core, is the better guide. The first step of a process is counted only if it is the only one.
"""

import argparse
import json
import statistics
import sys

from bench import clocked, in_own_process, peak_mb, report
from bench.unet import build

VARIANTS = ("research", "frozen", "early_stop", "minsd")


def materialised(q, k, v, **_):
    from minsd.kernels import reference

    return reference.whole(q, k, v, q.shape[-1] ** -0.5)


def step(unet, x, context, only):
    """Maps -> a scalar after InitNO's: two words should be looked at somewhere, and not from the same place."""
    from minsd.attention import AttentionRecorder

    record = AttentionRecorder(only=only)
    unet(x, 981, context, record=record)
    words = record.cross[..., [2, 5]].mul(100).softmax(-1).flatten(1, 2)  # (B, h*w, 2)
    peak, place = words.max(dim=1)  # (B, 2)
    seen = record.self.flatten(1, 2)[0, place[0]]  # (2, h*w)
    loss = (1 - peak).max() + seen.amin(dim=0).sum() / seen.sum()
    loss.backward()
    return loss.item()


def worker(args):
    import torch

    from minsd import attention
    from minsd.kernels import onednn

    torch.set_num_threads(1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    unet, config = build("minsd", args.model, dtype, device)
    if args.worker != "minsd":
        for module in unet.modules():
            if isinstance(module, attention.Attention):
                module.fused = None  # one product a projection, and weights that can take gradients
        attention.Attention.attend, onednn.available = staticmethod(materialised), lambda *tensors: False
    unet.requires_grad_(args.worker == "research")
    generator, cells = torch.Generator().manual_seed(1), args.size // 8
    noise = torch.randn(1, 4, cells, cells, generator=generator).to(device, dtype)
    context = torch.randn(1, 77, config.context_dim, generator=generator).to(device, dtype)
    only, seconds = args.worker in ("early_stop", "minsd"), []
    for _ in range(args.runs):
        unet.zero_grad(set_to_none=True)
        x = noise.clone().requires_grad_()
        loss, *spent = clocked(device, step, unet, x, context, only)
        seconds.append(spent)
    told = {
        "seconds": seconds[1:] or seconds,
        "peak_mb": peak_mb(device),
        "loss": loss,
        "gradient": x.grad.flatten().tolist(),
    }
    print(json.dumps(told))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--runs", type=int, default=3, help="steps a variant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--csv", action="store_true", help="append to bench/results/maps.csv")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    import torch

    torch.set_num_threads(1)  # as the workers: the CSV says so
    results, rows = {}, []
    for name in VARIANTS:
        results[name] = result = in_own_process("--worker", name)
        result["seconds"], result["cpu_seconds"] = (
            statistics.median(column) for column in zip(*result["seconds"])
        )
        print(f"{name}: {result['seconds']:.3f} s", file=sys.stderr, flush=True)
    truth, base = torch.tensor(results["research"]["gradient"]), results["research"]["seconds"]
    for name, result in results.items():
        error = ((torch.tensor(result["gradient"]) - truth).norm() / truth.norm()).item()
        if not (
            error < (1e-3 if args.dtype == "float32" else 0.1)
            and abs(result["loss"] - results["research"]["loss"]) < 1e-2
        ):
            sys.exit(
                f"{name} does not compute the same: relative gradient error {error:.1e}, loss {result['loss']}"
            )
        rows.append(
            {
                "model": args.model,
                "size": args.size,
                "dtype": args.dtype,
                "variant": name,
                "seconds": round(result["seconds"], 3),
                "cpu_seconds": round(result["cpu_seconds"], 3),
                "peak_mb": round(result["peak_mb"]),
                "times_faster": round(base / result["seconds"], 2),
                "gradient_error": f"{error:.1e}",
            }
        )
    report("maps", rows, args.csv, args.device)


if __name__ == "__main__":
    main()
