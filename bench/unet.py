"""How fast is one UNet evaluation, and how much memory does it peak at, against diffusers?

    python -m bench.unet [--model sd15] [--size 512] [--batch 2] [--runs 5] [--device cuda --dtype float16] [--csv]

Full-size networks with the same random weights, each in a process of its own so that its peak memory is its own; the
two take turns, so that a drifting machine drifts for both. Weights are counted in the memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from bench import peak_rss_mb, print_table, write_csv


def build(provider, model, dtype, device):
    """A network with random frozen weights; memory never holds two."""
    import torch

    from minsd.attention import Attention
    from minsd.config import MODELS
    from minsd.unet import UNet

    config = MODELS[model].unet
    torch.manual_seed(0)
    if provider == "minsd":
        with torch.device("meta"):
            unet = UNet(config)
    else:
        from diffusers import UNet2DConditionModel

        kinds = ["CrossAttn" if cross else "" for cross in config.cross_attention]
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                sample_size=config.sample_size, block_out_channels=config.block_out_channels,
                layers_per_block=config.layers_per_block, down_block_types=[f"{k}DownBlock2D" for k in kinds],
                up_block_types=[f"{k}UpBlock2D" for k in reversed(kinds)], attention_head_dim=config.num_heads,
                cross_attention_dim=config.context_dim, use_linear_projection=config.linear_projection,
                upcast_attention=config.upcast_attention,
            )
    unet = unet.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for name, p in sorted(unet.named_parameters()):
        p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(float(name.endswith("weight")))
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fuse()
    return unet, config


def worker(args):
    """Build, warm up, then time one evaluation whenever a line arrives on standard input."""
    import torch

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    with torch.no_grad():
        unet, config = build(args.worker, args.model, dtype, device)
        cells = args.size // 8
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(args.batch, 4, cells, cells, generator=generator).to(device, dtype)
        context = torch.randn(args.batch, 77, config.context_dim, generator=generator).to(device, dtype)
        t = 481 if args.worker == "minsd" else torch.tensor(481, device=device)

        def run():
            out = unet(x, t, context)
            return out if torch.is_tensor(out) else out.sample

        for _ in range(2):
            out = run()
        checksum = out.float().abs().mean().item()
        print(json.dumps({"ready": checksum}), flush=True)
        for _ in sys.stdin:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_rss_mb()
            print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": peak}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--batch", type=int, default=2, help="2 is one guided picture")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--csv", action="store_true", help="append to bench/results/unet.csv")
    parser.add_argument("--worker", choices=["minsd", "diffusers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    workers, results, checks = {}, {}, {}
    for name in ("minsd", "diffusers"):
        workers[name] = subprocess.Popen(
            [sys.executable, "-m", "bench.unet", *sys.argv[1:], "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        checks[name], results[name] = json.loads(workers[name].stdout.readline())["ready"], []
    if abs(checks["minsd"] / checks["diffusers"] - 1) > (1e-4 if args.dtype == "float32" else 2e-2):
        sys.exit(f"the two do not compute the same: mean |eps| {checks}")
    for _ in range(args.runs):
        for name, process in workers.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            results[name].append(json.loads(process.stdout.readline()))
    for process in workers.values():
        process.communicate()
    rows = []
    for name, runs in results.items():
        rows.append({
            "model": args.model, "size": args.size, "batch": args.batch, "dtype": args.dtype, "provider": name,
            "seconds": round(statistics.median(r["seconds"] for r in runs), 4), "peak_mb": round(max(r["peak_mb"] for r in runs)),
            "time_ratio": round(statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs, results["diffusers"])), 3),
        })
    print_table(rows)
    if args.csv:
        print("written to", write_csv("unet", rows, args.device))


if __name__ == "__main__":
    main()
