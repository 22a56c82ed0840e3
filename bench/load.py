"""How long does loading a full-size fp16 model take, and how much memory does it peak at, against diffusers?

    python -m bench.load [--model sd15] [--dtype float32 float16] [--runs 3] [--csv]

The weights are random and the same in both layouts, a diffusers folder and a single file, made once in a temporary folder
(about 4 GB for SD1.5). Every load is a process of its own, providers taking turns, and ends in the same dtype for both;
imports come before the clock starts. minsd names a single file by its hash, which it keeps in the user's cache folder: the
provider "minsd, new file" has to compute it. `seconds_touched` goes on until every weight was read once: what was only
mapped is read then. RssAnon is memory that no file backs: mapped weights do not count in it, copies do; it is sampled every
2 ms. `bound_mb` is what the checkpoint specification allows: 1.2 x the weights in the target dtype plus the largest tensor,
beside what the process held before loading began.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench import in_own_process, report
from bench.unet import diffusers_unet

FILE = "single.safetensors"


def make_folder(folder: Path, model: str) -> None:
    """A diffusers folder of random fp16 weights in the size of `model`, written by diffusers' own classes."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    from minsd.config import MODELS
    from minsd.weights.load import SHAPES_FOLDER

    row, numbers = MODELS[model], (0.02 * torch.randn(2**20)).half()
    build = {
        "unet": lambda: diffusers_unet(row.unet),
        "vae": lambda: AutoencoderKL(
            block_out_channels=row.vae.block_out_channels,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=32,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            sample_size=row.size,
        ),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=row.text.vocab_size,
                hidden_size=row.text.hidden_size,
                intermediate_size=row.text.intermediate_size,
                num_hidden_layers=row.text.num_layers,
                num_attention_heads=row.text.num_heads,
                hidden_act=row.text.hidden_act,
            )
        ),
    }
    for name, make in build.items():
        with torch.device("meta"):
            module = make()
        module = module.half().to_empty(device="cpu")
        for p in (
            module.parameters()
        ):  # the same million numbers over and over: what they are costs nothing to load
            p.data = numbers.repeat(-(-p.numel() // len(numbers)))[: p.numel()].view(p.shape)
        module.save_pretrained(folder / name)
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    shutil.copytree(SHAPES_FOLDER / "tokenizer", folder / "tokenizer")
    shutil.copy(SHAPES_FOLDER / "model_index.json", folder / "model_index.json")


def make_file(path: Path, folder: Path) -> None:
    """The folder's weights in the original layout, whose names the test of single files knows."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from safetensors.torch import load_file, save_file
    from test_single_file import as_original

    unet, vae = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    text = load_file(folder / "text_encoder" / "model.safetensors").items()
    text = {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in text
    }
    save_file(as_original({"unet": unet, "vae": vae}, text), path)


def anonymous_mb() -> float:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def worker(args):
    """One load in this process -> a line of JSON. Both providers have imported all they need before the clock starts."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: F401

    (dtype,), folder = (getattr(torch, name) for name in args.dtype), Path(args.folder)
    single = folder / FILE if args.layout == "file" else None
    if args.worker == "diffusers":
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401

        def load():
            if single:
                return StableDiffusionPipeline.from_single_file(
                    single, config=str(folder), torch_dtype=dtype, local_files_only=True
                )
            return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    else:
        from minsd.weights.load import load_model

        # a file instead of a folder: nothing can be kept there
        os.environ["XDG_CACHE_HOME"] = str(
            folder / ("model_index.json" if args.worker == "minsd, new file" else "cache")
        )

        def load():
            return load_model(
                str(single or folder),
                device=torch.device("cpu"),
                dtype=dtype,
                tokenizer=single and folder / "tokenizer",
            )

    before, peak, done = anonymous_mb(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    start, used = time.perf_counter(), time.process_time()
    model = load()
    seconds, used = time.perf_counter() - start, time.process_time() - used
    done.set()
    thread.join()
    modules = (model.unet, model.vae, model.text_encoder if args.worker == "diffusers" else model.text.model)
    tensors = [p for m in modules for p in m.parameters()]
    assert {p.dtype for p in tensors} == {dtype}
    total = sum(float(p.detach().abs().max()) for p in tensors)
    weights = sum(p.numel() * p.element_size() for p in tensors) / 2**20
    largest = max(p.numel() * p.element_size() for p in tensors) / 2**20
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": used,
                "touched": time.perf_counter() - start,
                "before_mb": before,
                "peak_mb": max(peak[0], anonymous_mb()),
                "weights_mb": weights,
                "bound_mb": 1.2 * weights + largest,
                "check": total,
            }
        )
    )


def measure(args, folder: Path, layout: str, dtype: str) -> list[dict]:
    """Rows of the table: one for each provider."""
    results = {"minsd": [], "diffusers": []} | ({"minsd, new file": []} if layout == "file" else {})
    for run in range(args.runs + 1):  # the first warms the file cache for all
        for name, runs in results.items():
            told = in_own_process(
                "--dtype", dtype, "--layout", layout, "--worker", name, "--folder", str(folder)
            )
            if run:
                runs.append(told)
    assert len({r["check"] for runs in results.values() for r in runs}) == 1, (
        "the providers hold different weights"
    )
    return [
        {
            "model": args.model,
            "layout": layout,
            "file_dtype": "float16",
            "dtype": dtype,
            "provider": name,
            "seconds": round(statistics.median(r["seconds"] for r in runs), 3),
            "seconds_touched": round(statistics.median(r["touched"] for r in runs), 3),
            "time_ratio": round(
                statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs, results["diffusers"])), 3
            ),
            "cpu_seconds": round(statistics.median(r["cpu_seconds"] for r in runs), 3),
            "peak_anon_mb": round(max(r["peak_mb"] for r in runs)),
            "anon_before_mb": round(runs[0]["before_mb"]),
            "weights_mb": round(runs[0]["weights_mb"]),
            "bound_mb": round(runs[0]["bound_mb"]),
        }
        for name, runs in results.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15", choices=["sd14", "sd15"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--csv", action="store_true", help="append to bench/results/load.csv")
    for name in ("worker", "layout", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), args.model)
        make_file(Path(folder) / FILE, Path(folder))
        rows = [
            row
            for layout in ("folder", "file")
            for dtype in args.dtype
            for row in measure(args, folder, layout, dtype)
        ]
    report("load", rows, args.csv)


if __name__ == "__main__":
    main()
