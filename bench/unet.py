"""How fast is one UNet evaluation, and how much memory does it peak at, against diffusers?

    python -m bench.unet [--model sd15] [--size 512] [--batch 2] [--runs 5] [--device cuda --dtype float16] [--csv]
    python -m bench.unet --size 256 512 768 1024 --batch 1 2 4 --runs 2 --csv        # cost against size

Full-size networks with the same random weights, each in a process of its own so that its peak memory is its own; the
two take turns, so that a drifting machine drifts for both. Weights are counted in the memory. Each does what it does at a
later step of a run: minsd has the text's keys and values, diffusers computes them; on a GPU minsd replays a CUDA graph.
Times are medians; `cpu_seconds` (of all threads) leaves out waiting for a core on a busy machine, `time_ratio` is of
seconds, `cpu_ratio` of these. Several sizes also give `slope`, from size to size: the exponent of the time in the pixels.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys

from bench import clocked, forget_peak, on_gpu, peak_mb, report


def diffusers_unet(config):
    """diffusers' network of the same shape."""
    from diffusers import UNet2DConditionModel

    kinds = ["CrossAttn" if cross else "" for cross in config.cross_attention]
    return UNet2DConditionModel(
        sample_size=config.sample_size,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=[f"{k}DownBlock2D" for k in kinds],
        up_block_types=[f"{k}UpBlock2D" for k in reversed(kinds)],
        attention_head_dim=config.num_heads,
        cross_attention_dim=config.context_dim,
        use_linear_projection=config.linear_projection,
        upcast_attention=config.upcast_attention,
    )


def build(provider, model, dtype, device):
    """A network with random frozen weights; memory never holds two."""
    import torch

    from minsd.attention import Attention
    from minsd.config import MODELS
    from minsd.unet import UNet

    config = MODELS[model].unet
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet(config) if provider == "minsd" else diffusers_unet(config)
    unet = unet.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for name, p in sorted(unet.named_parameters()):
        p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(float(name.endswith("weight")))
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fuse()
    return unet, config


def worker(args):
    """Build; then for every line "size batch" on standard input one evaluation, its time, peak and checksum."""
    import torch

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    with torch.no_grad():
        unet, config = build(args.worker, args.model, dtype, device)
        if args.worker == "minsd" and device.type == "cuda":
            from minsd.graphs import Graphs

            unet.to(memory_format=torch.channels_last)
            unet.forward = Graphs(unet)
        known = {}
        for line in sys.stdin:
            size, batch = map(int, line.split())
            if (size, batch) not in known:
                generator, cells = torch.Generator().manual_seed(1), size // 8
                x = torch.randn(batch, 4, cells, cells, generator=generator).to(device, dtype)
                context = torch.randn(batch, 77, config.context_dim, generator=generator).to(device, dtype)
                t = torch.tensor(481, device=device)
                known = {
                    (size, batch): (x, 481, unet.text_kv(context))
                    if args.worker == "minsd"
                    else (x, t, context)
                }
            forget_peak(device)
            out, seconds, cpu = clocked(device, unet, *known[size, batch])
            out = out if torch.is_tensor(out) else out.sample
            check = out.float().abs().mean().item()
            print(
                json.dumps(
                    {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak_mb(device), "check": check}
                ),
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15")
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="pixels a side")
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="2 is one guided picture")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--warmup", type=int, default=2, help="evaluations of each shape before those that count"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--csv", action="store_true", help="append to bench/results/unet.csv")
    parser.add_argument("--worker", choices=["minsd", "diffusers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    workers = {
        name: subprocess.Popen(
            [sys.executable, "-m", "bench.unet", *sys.argv[1:], "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("minsd", "diffusers")
    }

    def ask(name, size, batch):
        workers[name].stdin.write(f"{size} {batch}\n")
        workers[name].stdin.flush()
        answer = workers[name].stdout.readline()
        if not answer:
            sys.exit(f"{name} failed at {size}x{size}, batch {batch}")
        return json.loads(answer)

    rows, before = [], {}
    for batch, size in itertools.product(args.batch, args.size):
        results = {name: [] for name in workers}
        for run in range(-args.warmup, args.runs):
            for name in workers:
                result = ask(name, size, batch)
                if run >= 0:
                    results[name].append(result)
        checks = {name: runs[0]["check"] for name, runs in results.items()}
        if abs(checks["minsd"] / checks["diffusers"] - 1) > (1e-4 if args.dtype == "float32" else 2e-2):
            sys.exit(f"the two do not compute the same: mean |eps| {checks}")
        for name, runs in results.items():
            seconds, cpu = (statistics.median(r[key] for r in runs) for key in ("seconds", "cpu_seconds"))
            ratios = [
                statistics.median(a[key] / b[key] for a, b in zip(runs, results["diffusers"]))
                for key in ("seconds", "cpu_seconds")
            ]
            last = before.get((name, batch))
            cost = seconds if on_gpu(args.device) else cpu
            slope = (
                math.log(cost / last[1]) / math.log((size / last[0]) ** 2)
                if last and size != last[0]
                else None
            )
            before[name, batch] = size, cost
            rows.append(
                {
                    "model": args.model,
                    "size": size,
                    "batch": batch,
                    "dtype": args.dtype,
                    "provider": name,
                    "seconds": round(seconds, 4),
                    "cpu_seconds": round(cpu, 4),
                    "peak_mb": round(max(r["peak_mb"] for r in runs)),
                    "time_ratio": round(ratios[0], 3),
                    "cpu_ratio": round(ratios[1], 3),
                    "slope": "" if slope is None else round(slope, 2),
                }
            )
    for process in workers.values():
        process.communicate()
    report("unet", rows, args.csv, args.device)


if __name__ == "__main__":
    main()
