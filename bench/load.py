"""How long does loading a full-size fp16 model take, and how much memory, against diffusers?

    python -m bench.load [--model sd15] [--dtype float32 float16] [--runs 3] [--csv]

The weights are random, and the same in both forms: a diffusers folder and a single file. Both are
made once, in a temporary folder (about 4 GB for SD1.5). Every load is a process of its own, and the
providers (implementations to compare) take turns. All of them end in the same dtype, and imports
finish before the clock starts. minsd identifies a single file by its hash, which it keeps in the
user's cache folder; the provider "minsd, new file" has to compute the hash.

`seconds_touched` includes reading every weight once, which brings in what was only memory-mapped.
`peak_anon_mb` is RssAnon, sampled every 2 ms: memory that no file backs, so it includes copies of
weights and not mapped weights. `bound_mb` is the limit set for loading: 1.2 x the weights in the
target dtype plus the largest tensor, in addition to what the process held before.
"""

# diffusers exports its classes lazily, which type checkers take for private.
# pyright: reportPrivateImportUsage=false

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import Row, in_own_process, parser, report, without_missing
from bench.unet import unet_settings
from minsd.config import MODELS, ModelConfig

if TYPE_CHECKING:
    import torch

XL_INDEX = {  # what SDXL's model_index.json has beside that of SD1
    "_class_name": "StableDiffusionXLPipeline",
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
FILE = "single.safetensors"
NEW_FILE = "minsd, new file"


def text_encoders(row: ModelConfig) -> dict[str, Any]:
    """Returns a dict folder name -> text encoder: transformers' text encoders with the sizes of the
    model `row`. SDXL has two."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    made: dict[str, Any] = {}
    for name, text in (("text_encoder", row.text), ("text_encoder_2", row.text_2)):
        if text is None:
            continue
        kind = CLIPTextModelWithProjection if text.projection_dim else CLIPTextModel
        config = CLIPTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_layers,
            num_attention_heads=text.num_heads,
            hidden_act=text.hidden_act,
            projection_dim=text.projection_dim or 512,
            bos_token_id=0,
            eos_token_id=text.eos_token_id,
            architectures=[kind.__name__],
        )
        made[name] = kind(config)
    return made


def config_files(row: ModelConfig) -> dict[str, dict[str, Any]]:
    """Returns a dict path in the model's folder -> contents, for the config files that diffusers
    needs for the UNet, the VAE and the scheduler of the model `row`."""
    unet = row.unet
    vae = row.vae
    schedule = row.schedule
    return {
        "unet/config.json": {"_class_name": "UNet2DConditionModel", **unet_settings(unet)},
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": vae.block_out_channels,
            "layers_per_block": vae.layers_per_block,
            "latent_channels": vae.latent_channels,
            "norm_num_groups": vae.norm_groups,
            "down_block_types": ("DownEncoderBlock2D",) * len(vae.block_out_channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(vae.block_out_channels),
            "sample_size": row.size,
            "scaling_factor": vae.scaling_factor,
            "force_upcast": vae.force_upcast,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "beta_schedule": schedule.beta_schedule,
            "clip_sample": False,
            "set_alpha_to_one": schedule.set_alpha_to_one,
            "steps_offset": schedule.steps_offset,
            "prediction_type": schedule.prediction_type,
            "timestep_spacing": schedule.timestep_spacing,
        },
    }


def make_folder(folder: Path, model: str) -> None:
    """Writes a folder of random fp16 weights with the sizes of `model`, in the form of diffusers.

    diffusers is not needed for this, because minsd's parameters have the same names as those of
    diffusers.
    """
    import torch
    from safetensors.torch import save_file

    from minsd.unet import UNet
    from minsd.vae import VAE
    from minsd.weights.load import SHAPES_FOLDER

    row = MODELS[model]
    # Every tensor repeats the same million numbers, because the time to load does not depend on them.
    numbers = (0.02 * torch.randn(2**20)).half()
    with torch.device("meta"):
        texts = text_encoders(row)
        networks = {"unet": UNet(row.unet), "vae": VAE(row.vae), **texts}
    for name, network in networks.items():
        (folder / name).mkdir(parents=True)
        state = {
            key: numbers.repeat(-(-p.numel() // len(numbers)))[: p.numel()].view(p.shape).clone()
            for key, p in network.named_parameters()
        }
        stem = "model" if name in texts else "diffusion_pytorch_model"
        save_file(state, folder / name / f"{stem}.safetensors", {"format": "pt"})
        if name in texts:
            texts[name].config.save_pretrained(folder / name)
    for name, settings in config_files(row).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(settings))
    shutil.copytree(SHAPES_FOLDER / "tokenizer", folder / "tokenizer")
    index = json.loads((SHAPES_FOLDER / "model_index.json").read_text())
    if row.text_2 is not None:
        shutil.copytree(SHAPES_FOLDER / "tokenizer", folder / "tokenizer_2")
        index = {key: value for key, value in index.items() if "safety" not in key} | XL_INDEX
    (folder / "model_index.json").write_text(json.dumps(index))


def make_file(path: Path, folder: Path) -> None:
    """Writes the weights in `folder` to a single file at `path`, with the tensor names of the
    original checkpoints. The names come from a test in tests/."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from safetensors.torch import load_file, save_file
    from test_single_file import as_original, as_original_xl  # pyright: ignore[reportMissingImports]

    if (folder / "text_encoder_2").is_dir():
        stems = ("diffusion_pytorch_model", "diffusion_pytorch_model", "model", "model")
        names = zip(("unet", "vae", "text_encoder", "text_encoder_2"), stems)
        states = [load_file(folder / part / f"{stem}.safetensors") for part, stem in names]
        save_file(as_original_xl(*states), path)
        return
    unet, vae = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    text = {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in load_file(folder / "text_encoder" / "model.safetensors").items()
    }
    save_file(as_original({"unet": unet, "vae": vae}, text), path)


# --- one load -------------------------------------------------------------------------------------


def anonymous_mb() -> float:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("this kernel does not report RssAnon: use Linux 4.5 or later")
    return int(found[1]) / 1024


@contextmanager
def watched() -> Iterator[Callable[[], float]]:
    """Measures the peak of anonymous memory (memory that no file backs) in MB within the `with`
    block. Yields a function that returns this peak once the block has ended."""
    peak = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        thread.join()


def with_diffusers(folder: Path, single: Path | None, dtype: "torch.dtype") -> Callable[[], list[Any]]:
    """Imports diffusers, and returns a function without arguments. The returned function loads the
    model in `dtype`, from `folder`, or from the file `single` if that is not None, and returns the
    list of the model's networks. Since the imports are already done, its time is that of loading
    alone."""
    import diffusers

    is_xl = (folder / "text_encoder_2").is_dir()
    pipeline: Any = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
    for name in ("AutoencoderKL", "DDIMScheduler", "UNet2DConditionModel"):
        getattr(diffusers, name)  # imports it

    how = {"torch_dtype": dtype, "local_files_only": True}

    def load() -> list[Any]:
        if single:
            pipe = pipeline.from_single_file(str(single), config=str(folder), **how)
        else:
            pipe = pipeline.from_pretrained(folder, **how)
        return [pipe.unet, pipe.vae, pipe.text_encoder] + ([pipe.text_encoder_2] if is_xl else [])

    return load


def with_minsd(
    folder: Path, single: Path | None, dtype: "torch.dtype", known: bool
) -> Callable[[], list[Any]]:
    """Imports minsd, and returns a function without arguments. The returned function loads the
    model in `dtype`, from `folder`, or from the file `single` if that is not None, and returns the
    list of the model's networks.

    minsd computes the hash of a single file when it loads the file, unless its cache folder holds
    the hash already. If `known` is False, there is no cache folder, so every load computes the
    hash.
    """
    import torch

    from minsd.text import TwoTextEncoders
    from minsd.weights.load import load_model

    # If the path of the cache folder is that of a file, no hash can be kept there.
    os.environ["XDG_CACHE_HOME"] = str(folder / ("cache" if known else "model_index.json"))
    tokenizer = folder / "tokenizer" if single else None

    def load() -> list[Any]:
        model = load_model(
            str(single or folder), device=torch.device("cpu"), dtype=dtype, tokenizer=tokenizer
        )
        second = [model.text.second.model] if isinstance(model.text, TwoTextEncoders) else []
        return [model.unet, model.vae, model.text.model, *second]

    return load


def worker(args: argparse.Namespace) -> None:
    """Loads the model once in this process, with the provider (implementation) of --worker, and
    prints the times and memory as JSON."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: F401

    folder = Path(args.folder)
    single = folder / FILE if args.layout == "file" else None
    dtype = getattr(torch, args.dtype[0])
    if args.worker == "diffusers":
        load = with_diffusers(folder, single, dtype)
    else:
        load = with_minsd(folder, single, dtype, known=args.worker != NEW_FILE)
    before = anonymous_mb()
    with watched() as peak:
        start = time.perf_counter()
        cpu = time.process_time()
        modules = load()
        seconds = time.perf_counter() - start
        cpu_seconds = time.process_time() - cpu
    tensors = [p for module in modules for p in module.parameters()]
    assert {p.dtype for p in tensors} <= {dtype, torch.float32}  # minsd keeps SDXL's VAE in float32
    check = sum(float(p.detach().abs().max()) for p in tensors)  # reads every weight
    touched = time.perf_counter() - start
    sizes = [p.numel() * p.element_size() / 2**20 for p in tensors]
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "touched": touched,
        "before_mb": before,
        "peak_mb": max(peak(), anonymous_mb()),
        "weights_mb": sum(sizes),
        "bound_mb": 1.2 * sum(sizes) + max(sizes),
        "check": check,
    }
    print(json.dumps(result))


# --- the table ------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path, layout: str, dtype: str) -> list[Row]:
    """Measures all providers (implementations to compare) for one layout of the weights, "folder"
    or "file", and one dtype. Returns one row per provider. Raises SystemExit if the providers hold
    different weights."""
    names = without_missing(["minsd", "diffusers"] + [NEW_FILE] * (layout == "file"))
    results: dict[str, list[Row]] = {name: [] for name in names}
    shared = ("--dtype", dtype, "--layout", layout, "--folder", str(folder))
    for run in range(args.runs + 1):  # the first warms the file cache for all
        for name, runs in results.items():
            result = in_own_process(*shared, "--worker", name)
            if run:
                runs.append(result)
    if len({run["check"] for runs in results.values() for run in runs}) > 1:
        sys.exit("the providers hold different weights")
    rows = []
    for name, runs in results.items():
        peers = results.get("diffusers", [])  # empty where diffusers is missing
        ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(runs, peers)]
        rows.append(
            {
                "model": args.model,
                "layout": layout,
                "file_dtype": "float16",
                "dtype": dtype,
                "provider": name,
                "seconds": round(statistics.median(run["seconds"] for run in runs), 3),
                "seconds_touched": round(statistics.median(run["touched"] for run in runs), 3),
                "time_ratio": round(statistics.median(ratios), 3) if ratios else "",
                "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in runs), 3),
                "peak_anon_mb": round(max(run["peak_mb"] for run in runs)),
                "anon_before_mb": round(runs[0]["before_mb"]),
                "weights_mb": round(runs[0]["weights_mb"]),
                "bound_mb": round(runs[0]["bound_mb"]),
            }
        )
    return rows


def main() -> None:
    options = parser(__doc__, "load")
    options.add_argument(
        "--model", default="sd15", choices=["sd14", "sd15", "sdxl"], help="whose sizes (default: sd15)"
    )
    options.add_argument(
        "--dtype",
        nargs="+",
        default=["float32", "float16"],
        help="dtypes to load into (default: float32 float16)",
    )
    options.add_argument("--runs", type=int, default=3, help="after one to warm up (default: 3)")
    for name in ("worker", "layout", "folder"):
        options.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        worker(args)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder, args.model)
        make_file(folder / FILE, folder)
        for layout in ("folder", "file"):
            for dtype in args.dtype:
                rows += measure(args, folder, layout, dtype)
    report("load", rows, args.csv)


if __name__ == "__main__":
    main()
