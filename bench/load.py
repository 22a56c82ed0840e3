"""How long does loading a full-size fp16 folder take, and how much memory does it peak at, against diffusers?

    python -m bench.load [--model sd15] [--dtype float32] [--runs 3] [--csv]

The folder holds random fp16 weights, made once in a temporary folder (about 2 GB for SD1.5). Every load is a process of
its own, the two taking turns. RssAnon is memory that no file backs: mapped weights do not count in it, copies do; it is
sampled every 2 ms. `bound_mb` is what the checkpoint specification allows minsd: 1.2 x the weights in the target dtype
plus the largest tensor, and beside it stands what the process held before loading began.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench import print_table, write_csv


def make_folder(folder: Path, model: str) -> None:
    """A diffusers folder of random fp16 weights in the size of `model`, written by diffusers' own classes."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from minsd.config import MODELS
    from minsd.weights.load import SHAPES_FOLDER

    row = MODELS[model]
    kinds = ["CrossAttn" if cross else "" for cross in row.unet.cross_attention]
    build = {
        "unet": lambda: UNet2DConditionModel(
            sample_size=row.unet.sample_size, block_out_channels=row.unet.block_out_channels,
            down_block_types=[f"{k}DownBlock2D" for k in kinds], up_block_types=[f"{k}UpBlock2D" for k in reversed(kinds)],
            attention_head_dim=row.unet.num_heads, cross_attention_dim=row.unet.context_dim,
            use_linear_projection=row.unet.linear_projection,
        ),
        "vae": lambda: AutoencoderKL(
            block_out_channels=row.vae.block_out_channels, layers_per_block=2, latent_channels=4, norm_num_groups=32,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=row.size,
        ),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(
            vocab_size=row.text.vocab_size, hidden_size=row.text.hidden_size, intermediate_size=row.text.intermediate_size,
            num_hidden_layers=row.text.num_layers, num_attention_heads=row.text.num_heads, hidden_act=row.text.hidden_act,
        )),
    }
    for name, make in build.items():
        with torch.device("meta"):
            module = make()
        module = module.half().to_empty(device="cpu")
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.02)
        module.save_pretrained(folder / name)
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    shutil.copytree(SHAPES_FOLDER / "tokenizer", folder / "tokenizer")
    shutil.copy(SHAPES_FOLDER / "model_index.json", folder / "model_index.json")


def anonymous_mb() -> float:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def worker(args):
    import torch

    dtype, folder = getattr(torch, args.dtype), args.folder
    if args.worker == "minsd":
        import transformers  # noqa: F401  imports are not loading

        from minsd.weights.load import load_model

        def load():
            return load_model(folder, device=torch.device("cpu"), dtype=dtype)
    else:
        from diffusers import StableDiffusionPipeline

        def load():
            return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)

    before, peak, done = anonymous_mb(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    modules = (model.unet, model.vae, model.text.model if args.worker == "minsd" else model.text_encoder)
    tensors = [p for m in modules for p in m.parameters()]
    # Touch every weight: what was only mapped is read now, as the first step would.
    total = sum(float(p.float().abs().max()) for p in tensors)
    weights = sum(p.numel() * p.element_size() for p in tensors) / 2**20
    largest = max(p.numel() * p.element_size() for p in tensors) / 2**20
    print(json.dumps({
        "seconds": seconds, "touched": time.perf_counter() - start, "before_mb": before, "peak_mb": max(peak[0], anonymous_mb()),
        "weights_mb": weights, "bound_mb": 1.2 * weights + largest, "check": total,
    }))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--csv", action="store_true", help="append to bench/results/load.csv")
    parser.add_argument("--worker", choices=["minsd", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    results = {"minsd": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), args.model)
        for run in range(args.runs + 1):  # the first warms the file cache for both
            for name, runs in results.items():
                out = subprocess.run(
                    [sys.executable, "-m", "bench.load", *sys.argv[1:], "--worker", name, "--folder", folder],
                    capture_output=True, text=True,
                )
                if out.returncode:
                    sys.exit(out.stderr)
                if run:
                    runs.append(json.loads(out.stdout.splitlines()[-1]))
    rows = [{
        "model": args.model, "file_dtype": "float16", "dtype": args.dtype, "provider": name,
        "seconds": round(statistics.median(r["seconds"] for r in runs), 3),
        "seconds_touched": round(statistics.median(r["touched"] for r in runs), 3),
        "time_ratio": round(statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs, results["diffusers"])), 3),
        "peak_anon_mb": round(max(r["peak_mb"] for r in runs)), "anon_before_mb": round(runs[0]["before_mb"]),
        "weights_mb": round(runs[0]["weights_mb"]), "bound_mb": round(runs[0]["bound_mb"]),
    } for name, runs in results.items()]
    print_table(rows)
    if args.csv:
        print("written to", write_csv("load", rows))


if __name__ == "__main__":
    main()
