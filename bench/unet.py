"""How fast is one UNet evaluation, and how much memory does it peak at, against diffusers?

    python -m bench.unet [--model sd15] [--size 512] [--batch 2] [--runs 5] [--csv]
    python -m bench.unet --device cuda --dtype float16 --csv
    python -m bench.unet --size 256 512 768 1024 --batch 1 2 4 --runs 2 --csv    # cost against size
    python -m bench.unet --model shapes --size 128                               # a quick try

Both networks have the same random weights. Each runs in a process of its own, so that each has a
peak of memory (weights included) of its own. The two take turns, so that a drift of the machine
affects both. Each does the work of a step after the first one of a run: minsd has the text's keys
and values already, and diffusers computes them. On a GPU minsd replays a CUDA graph.

Times are medians. `cpu_seconds` is the processor time of all threads, without waiting for a core:
trust it on a busy machine. `time_ratio` compares seconds, and `cpu_ratio` processor seconds. With
several sizes, `slope` is the exponent of the cost in the number of pixels, from the previous size
to this one.
"""

# diffusers exports its classes lazily, which type checkers take for private.
# pyright: reportPrivateImportUsage=false

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from bench import Row, clocked, forget_peak, on_gpu, parser, peak_mb, report, without_missing
from minsd.config import MODELS, UNetConfig

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel
    from torch import nn

    from bench import Device
    from minsd.pipeline import StableDiffusion
    from minsd.unet import UNet

PROVIDERS = ("minsd", "diffusers")


def unet_settings(config: UNetConfig) -> dict[str, Any]:
    """Returns the settings of a UNet under the names that they have in diffusers' config.json."""
    kinds = ["CrossAttn" if cross else "" for cross in config.cross_attention]
    xl = {}
    if config.pooled_dim:
        xl = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.size_dim,
            "projection_class_embeddings_input_dim": config.pooled_dim + 6 * config.size_dim,
        }
    return {
        "sample_size": config.sample_size,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "attention_head_dim": config.num_heads,
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": config.transformer_depth,
        "use_linear_projection": config.linear_projection,
        "upcast_attention": config.upcast_attention,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        **xl,
    }


def diffusers_unet(config: UNetConfig) -> "UNet2DConditionModel":
    """Returns diffusers' UNet with the sizes of `config`, without trained weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**unet_settings(config))


def build(model: str, dtype: "torch.dtype", device: "Device", as_loaded: bool = True) -> "UNet":
    """Returns minsd's UNet with the sizes of `model` and random frozen weights. If `as_loaded` is
    True, it has the memory layout that `minsd.load` gives to a UNet."""
    import torch

    from minsd.attention import Attention
    from minsd.unet import UNet

    with torch.device("meta"):
        unet = UNet(MODELS[model].unet)
    fill(unet, dtype, device)
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fuse()
    if as_loaded and on_gpu(device):
        unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return unet


def random_model(
    model: str, dtype: "torch.dtype", device: "Device", text: Any, as_loaded: bool = True
) -> "StableDiffusion":
    """Returns a model with the sizes of `model`: a UNet with random frozen weights, the object
    `text` in place of the text encoder, and no VAE.

    If `as_loaded` is True, a model on a GPU is set up as by `minsd.load`, with CUDA graphs.
    """
    from minsd.pipeline import StableDiffusion

    vae: Any = None
    sd = StableDiffusion(MODELS[model], build(model, dtype, device, as_loaded), vae, text)
    if as_loaded and on_gpu(device):
        sd.use_graphs()
    return sd


def build_diffusers(model: str, dtype: "torch.dtype", device: "Device") -> "UNet2DConditionModel":
    """Returns diffusers' UNet with the sizes of `model` and the same random weights as the UNet
    that `build` returns."""
    import torch

    with torch.device("meta"):
        unet = diffusers_unet(MODELS[model].unet)
    fill(unet, dtype, device)
    return unet


def fill(network: "nn.Module", dtype: "torch.dtype", device: "Device") -> None:
    """Allocates memory for a network on the meta device, and fills it with random frozen weights.

    Networks with the same parameter names get the same weights.
    """
    import torch

    torch.manual_seed(0)
    network.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for name, p in sorted(network.named_parameters()):
        if p.ndim > 1:
            p.normal_(0, 0.02)
        else:
            p.fill_(float(name.endswith("weight")))  # norms: 1; biases: 0


def context_rows(config: UNetConfig) -> int:
    """Returns the number of rows of a UNet's context: 77 text states, and for SDXL one more row,
    which holds the pooled text state and the image's size numbers."""
    return 78 if config.pooled_dim else 77


def evaluation(args: argparse.Namespace, size: int, batch: int, unet: "nn.Module") -> tuple[Any, ...]:
    """Returns the positional arguments for one evaluation of `unet`, minsd's or diffusers', at this
    size in pixels and this batch size. The numbers are the same for both."""
    import torch

    from minsd.unet import UNet

    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    config = MODELS[args.model].unet
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, size // 8, size // 8, generator=generator).to(device, dtype)
    context = torch.randn(batch, context_rows(config), config.context_dim, generator=generator)
    context = context.to(device, dtype)
    context[:, 77:, config.pooled_dim :] = 0  # the latents' own size
    if isinstance(unet, UNet):
        return x, 481, unet.text_kv(context)
    t = torch.tensor(481, device=device)
    if not config.pooled_dim:
        return x, t, context
    numbers = torch.tensor([[size, size, 0, 0, size, size]] * batch, device=device)
    added = {"text_embeds": context[:, 77, : config.pooled_dim], "time_ids": numbers}
    return x, t, context[:, :77], None, None, None, None, added


def worker(args: argparse.Namespace) -> None:
    """Builds the network of the provider --worker (minsd or diffusers) and, for every line "size
    batch" on standard input, evaluates it once.

    Prints the time, peak memory and mean |eps| of each evaluation as JSON.
    """
    import torch

    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    with torch.no_grad():
        if args.worker == "diffusers":
            unet = build_diffusers(args.model, dtype, device)
        else:
            unet = build(args.model, dtype, device)
            if device.type == "cuda":
                from minsd.graphs import Graphs

                unet.forward = Graphs(unet)
        inputs: dict[tuple[int, int], tuple[Any, ...]] = {}  # of the last shape
        for line in sys.stdin:
            size, batch = map(int, line.split())
            if (size, batch) not in inputs:
                inputs = {(size, batch): evaluation(args, size, batch, unet)}
            forget_peak(device)
            out, seconds, cpu_seconds = clocked(device, unet, *inputs[size, batch])
            eps = out if torch.is_tensor(out) else out.sample
            answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak_mb(device)}
            print(json.dumps(answer | {"check": eps.float().abs().mean().item()}), flush=True)


class Provider:
    """A process that holds the network of one provider (minsd or diffusers) and evaluates it on
    request."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "bench.unet", *sys.argv[1:], "--worker", name]
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def evaluate(self, size: int, batch: int) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{size} {batch}\n")
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} failed at {size}x{size}, batch {batch}")
        return json.loads(answer)

    def end(self) -> None:
        self.process.communicate()


def measure(args: argparse.Namespace, providers: list[Provider], size: int, batch: int) -> list[Row]:
    """Measures all providers (minsd, diffusers) at one size and batch size. Returns one row per
    provider, without the column `slope`. Raises SystemExit if the providers do not compute the
    same."""
    results: dict[str, list[dict[str, float]]] = {provider.name: [] for provider in providers}
    for run in range(-args.warmup, args.runs):
        for provider in providers:
            result = provider.evaluate(size, batch)
            if run >= 0:
                results[provider.name].append(result)
    checks = {name: runs[0]["check"] for name, runs in results.items()}
    if len(checks) == len(PROVIDERS) and abs(checks["minsd"] / checks["diffusers"] - 1) > (
        1e-4 if args.dtype == "float32" else 2e-2
    ):
        sys.exit(f"the two do not compute the same: mean |eps| {checks}")
    rows = []
    for name, runs in results.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds")}
        peers = results.get("diffusers", [])  # empty where diffusers is missing
        ratios = {
            key: round(statistics.median(a[key] / b[key] for a, b in zip(runs, peers)), 3) if peers else ""
            for key in ("seconds", "cpu_seconds")
        }
        rows.append(
            {
                "model": args.model,
                "size": size,
                "batch": batch,
                "dtype": args.dtype,
                "provider": name,
                "seconds": round(medians["seconds"], 4),
                "cpu_seconds": round(medians["cpu_seconds"], 4),
                "peak_mb": round(max(run["peak_mb"] for run in runs)),
                "time_ratio": ratios["seconds"],
                "cpu_ratio": ratios["cpu_seconds"],
            }
        )
    return rows


def slopes(rows: list[Row], device: str) -> list[Row]:
    """Returns the rows with `slope` as their last column: the exponent of the cost in the number of
    pixels, from the previous size to this one. The column is empty for the first size of each batch
    size. `device` determines which time is the cost: seconds on a GPU, processor seconds on a CPU.
    """
    cost = "seconds" if on_gpu(device) else "cpu_seconds"
    last: dict[tuple[str, int], Row] = {}
    out = []
    for row in rows:
        before = last.get((row["provider"], row["batch"]))
        slope: float | str = ""
        if before and before["size"] != row["size"]:
            pixels = (row["size"] / before["size"]) ** 2
            slope = round(math.log(row[cost] / before[cost]) / math.log(pixels), 2)
        last[row["provider"], row["batch"]] = row
        out.append({**row, "slope": slope})
    return out


def main() -> None:
    options = parser(__doc__, "unet")
    options.add_argument("--model", default="sd15", choices=MODELS, help="its sizes (default: sd15)")
    options.add_argument("--size", type=int, nargs="+", default=[512], help="pixels per side (512)")
    options.add_argument(
        "--batch", type=int, nargs="+", default=[2], help="UNet rows; 2 (the default) is one guided image"
    )
    options.add_argument("--runs", type=int, default=5, help="evaluations per shape (default: 5)")
    options.add_argument(
        "--warmup", type=int, default=2, help="evaluations of each shape before these (default: 2)"
    )
    options.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    options.add_argument("--dtype", default="float32", help="float32 (the default), float16, ...")
    options.add_argument("--worker", choices=PROVIDERS, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        worker(args)
        return
    providers = [Provider(name) for name in without_missing(PROVIDERS)]
    rows = []
    for batch, size in itertools.product(args.batch, args.size):
        rows += measure(args, providers, size, batch)
    for provider in providers:
        provider.end()
    report("unet", slopes(rows, args.device), args.csv, args.device)


if __name__ == "__main__":
    main()
