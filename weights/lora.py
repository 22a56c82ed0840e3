"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W' = W + scale * (alpha / rank) * up @ down.

Files: kohya's (`lora_unet_*`, `lora_te_*`, with alphas) and those of diffusers and PEFT (`unet.*.lora_A.weight`,
`*.to_q_lora.down.weight`, ...; a PEFT folder with its adapter_config.json), for linear layers and convolutions of
the UNet and of the text encoder. `read` checks every tensor against the model; then either

    merge(...)     adds to the weights: no cost while sampling, the whole batch alike, undone to the bit
    per_row(...)   adds beside them, each row of a batch at its own scale: the passes of a collage (by_region)

    kept = merge([(read("style.safetensors", sd), 0.8)])
    images = sd("a red circle")
    unmerge(kept)
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from minsd.attention import Attention
from minsd.weights.safetensors_file import PICKLES, read_header

_NAMES = re.compile(  # the layer's name, then which half, by kohya, PEFT, and diffusers early and late
    r"(.+?)(?:\.lora_(?P<k>down|up)|\.lora_(?P<p>A|B)(?:\.default)?|[._]lora\.(?P<d>down|up)|\.lora_linear_layer\.(?P<l>down|up))\.weight"
)
_OTHER = {
    "lora_magnitude_vector": "a DoRA",
    "dora_scale": "a DoRA",
    "hada_": "a LoHa adapter",
    "lokr_": "a LoKr adapter",
    "lora_mid": "a LoCon in Tucker form",
}


@dataclass(frozen=True)
class Part:
    """What one layer of a model has added: down (r,in) and up (out,r), for convolutions (r,in,k,k) and (out,r,1,1)."""

    name: str
    module: nn.Module
    attention: Attention | None  # whose fused projections the layer is part of
    down: torch.Tensor
    up: torch.Tensor
    factor: float  # alpha / rank

    def delta(self) -> torch.Tensor:
        """What is added to the weight, in its shape and on its device, in float32 or better."""
        weight = self.module.weight
        down, up = (
            y.to(weight.device, torch.promote_types(weight.dtype, torch.float32)).flatten(1)
            for y in (self.down, self.up)
        )
        return self.factor * (up @ down).reshape(weight.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output at its input x."""
        down, up = (y.to(x.device, x.dtype) for y in (self.down, self.up))
        if isinstance(self.module, nn.Conv2d):
            y = F.conv2d(F.conv2d(x, down, stride=self.module.stride, padding=self.module.padding), up)
        else:
            y = F.linear(F.linear(x, down), up)
        return self.factor * y


@dataclass(frozen=True)
class LoRA:
    name: str
    parts: tuple[Part, ...]


def read(path: str | Path, sd) -> LoRA:
    """An adapter's file (or folder) for the networks of `sd` (`sd.unet`, `sd.text.model`).

    FileNotFoundError or ValueError, in one line, for what is not there, is no LoRA, has lost a part, holds nothing, or was
    made for another model.
    """
    path = _file(Path(path))
    header = read_header(path)
    if not header:
        raise ValueError(f"{path} is an empty adapter: it holds no tensors")
    for sign, what in _OTHER.items():
        if name := next((name for name in header if sign in name), None):
            raise ValueError(f"{path} is {what} ({name}); minsd takes plain LoRA")
    found, alphas = {}, {}
    for name in header:
        if name.endswith(".alpha"):
            alphas[re.sub(r"([._]lora|\.lora_linear_layer)?\.alpha$", "", name)] = name
        elif m := _NAMES.fullmatch(name):
            which = m["k"] or m["d"] or m["l"] or {"A": "down", "B": "up"}[m["p"]]
            found.setdefault(m[1], {})[which] = name
        else:
            raise ValueError(
                f"{path} holds {name!r}, which is no part of a LoRA: a model's own weights, or another kind of adapter?"
            )
    if not found:
        raise ValueError(f"{path} is an empty adapter: it holds no lora weights")
    modules, parts = _modules(sd), []
    fused = {
        layer: m for m in sd.unet.modules() if isinstance(m, Attention) for layer in (m.to_q, m.to_k, m.to_v)
    }
    with safe_open(path, framework="pt", device="cpu") as file:
        set_alpha = _alphas(path, file.metadata() or {})
        for key, names in found.items():
            if len(names) < 2:
                missing = ({"down", "up"} - names.keys()).pop()
                raise ValueError(f"{path} is a partial adapter: {key!r} has no {missing!r} half")
            if (target := _target(key, modules)) is None:
                xl = re.search(r"lora_te2|text_encoder_2|(input|middle|output)_blocks?_", key)
                kind = "an SDXL model" if xl else "another kind of model"
                raise ValueError(f"{path} was made for {kind}: this one has no layer {key!r}")
            name, module = target
            down, up = (file.get_tensor(names[which]) for which in ("down", "up"))
            _check(path, key, module, down, up)
            alpha = float(file.get_tensor(alphas[key])) if key in alphas else set_alpha(name, len(down))
            shape = module.weight.shape  # files hold 1x1 convolutions as matrices, and the other way round
            down, up = (
                down.reshape(len(down), *shape[1:]),
                up.reshape(len(up), len(down), *[1] * (len(shape) - 2)),
            )
            parts.append(Part(name, module, fused.get(module), down, up, alpha / len(down)))
    if lost := alphas.keys() - found.keys():
        raise ValueError(f"{path} is a partial adapter: {min(lost)!r} has an alpha and no weights")
    if len({part.name for part in parts}) < len(parts):
        raise ValueError(f"{path} adapts a layer twice")
    return LoRA(
        path.parent.name if path.stem in ("pytorch_lora_weights", "adapter_model") else path.stem,
        tuple(parts),
    )


def _file(path: Path) -> Path:
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when opened: get the LoRA's .safetensors version instead"
        )
    if path.is_dir():
        for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(
            f"the folder {path} holds no LoRA (pytorch_lora_weights.safetensors or adapter_model.safetensors)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no LoRA {path}: give a .safetensors file or its folder")
    return path


def _modules(sd) -> dict[str, dict[str, nn.Module]]:
    """The layers that can be adapted, by the names that files use: dots or, as kohya does, underlines in between."""
    layers = {}
    for network, module in (("unet", sd.unet), ("text_encoder", sd.text.model)):
        named = [
            (name.removeprefix("text_model."), m)
            for name, m in module.named_modules()
            if isinstance(m, (nn.Linear, nn.Conv2d))
        ]
        layers[network] = {
            form: (f"{network}.{name}", m) for name, m in named for form in (name, name.replace(".", "_"))
        }
    return layers


def _target(key: str, modules: dict) -> tuple[str, nn.Module] | None:
    """(name, layer) that a key of a file speaks of; None where the model has none."""
    key = key.removeprefix("base_model.model.")  # PEFT's own files
    network = "unet"
    for prefix, whose in (
        ("lora_unet_", "unet"),
        ("lora_te_", "text_encoder"),
        ("lora_te1_", "text_encoder"),
        ("unet.", "unet"),
        ("text_encoder.", "text_encoder"),
        ("text_model.", "text_encoder"),
    ):
        if key.startswith(prefix):
            key, network = key[len(prefix) :], whose
            break
    key = re.sub(r"^text_model[._]", "", key).replace(".processor.", ".")
    key = re.sub(r"\.to_out$", ".to_out.0", key)
    if network == "text_encoder":  # diffusers once named these after its own attention
        key = re.sub(r"\.to_([qkv])$", r".\1_proj", key).replace(".to_out.0", ".out_proj")
    return modules[network].get(key)


def _check(path, key, module, down, up) -> None:
    """Raises where a part does not fit its layer."""
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{path}: {key!r} is of {down.dtype}, not of floating point numbers")
    weight = module.weight.shape  # (out, in) or (out, in, k, k)
    fits = (
        up.flatten(1).shape == (weight[0], len(down))
        and down[0].numel() == math.prod(weight[1:])
        and len(down) > 0
    )
    if not fits:
        theirs = f"{down[0].numel() if len(down) else 0} -> {len(up)}, rank {len(down)} and {up.flatten(1).shape[1]}"
        why = " (the text states of SD1.x have width 768, of SD2.x 1024)" if "attn2" in key else ""
        ours = f"{weight[1:].numel()} -> {weight[0]}"
        raise ValueError(
            f"{path} was made for another model: {key!r} adapts {theirs}, this model's layer is {ours}{why}"
        )


def _alphas(path: Path, metadata: dict):
    """-> alpha(name, rank) for files whose alphas are not tensors: from the PEFT configuration in the file's metadata or beside
    it, else the rank itself, a factor of 1."""
    config, beside = {}, path.parent / "adapter_config.json"
    try:
        if "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
        elif path.stem == "adapter_model" and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: its adapter configuration cannot be read: {error}") from None

    def alpha(name, rank):
        network, _, layer = name.partition(".")
        mine = {key.removeprefix(f"{network}."): value for key, value in config.items()}
        value = mine.get("lora_alpha", rank)
        for pattern, special in (mine.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('text_model.')})", layer):
                value = special
        return value * rank**0.5 if mine.get("use_rslora") else value

    return alpha


# --- use --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(scaled: Sequence[tuple[LoRA, float]]) -> dict[nn.Module, torch.Tensor]:
    """Add adapters, (LoRA, scale) pairs, to the weights, in place; -> the old weights, for `unmerge`.

    Keeping them takes the memory of the adapted weights once more, and puts them back to the bit. Subtracting again would
    not: in float16 every merge would leave its rounding behind. Text states and predictors made before hold on to the old
    weights: encode the prompt and make the predictor afterwards.
    """
    _check_scales([scale for _, scale in scaled])
    sums: dict[nn.Module, list[tuple[Part, float]]] = {}
    for lora, scale in scaled:
        for part in lora.parts:
            sums.setdefault(part.module, []).append((part, scale))
    if any(getattr(module, "has_merged", False) for module in sums):
        raise ValueError(
            "an adapter is merged into this model already: unmerge it first, or merge all of them together"
        )
    kept = {}
    for module, parts in sums.items():
        kept[module], module.has_merged = module.weight.clone(), True
        module.weight.copy_(
            module.weight + sum(scale * part.delta() for part, scale in parts)
        )  # may be a view: in place
    return kept


@torch.no_grad()
def unmerge(kept: dict[nn.Module, torch.Tensor]) -> None:
    """Put back what `merge` returned."""
    for module, weight in kept.items():
        module.weight.copy_(weight)
        module.has_merged = False


class Rows:
    """Which scale each row of the next batches takes: number index[b] for row b, or all in turn where it is None."""

    def __init__(self):
        self.index: Sequence[int] | None = None


@contextmanager
def per_row(scaled: Sequence[tuple[LoRA, Sequence[float]]]):
    """Within the `with` block each row of a batch has the adapters at its own scales: (LoRA, R scales) pairs.

    Rows take the R scales in turn, over and over, so with R pictures rows b and R + b (the halves of guidance) take scale b;
    every batch must then have a multiple of R rows, that of the text states too: give each row its own. The text encoder's
    parts act on the prompts encoded within the block, one a row. Batches of another make set `index` of the yielded `Rows`.
    """
    for _, scales in scaled:
        _check_scales(scales)
    if len({len(scales) for _, scales in scaled}) > 1:
        raise ValueError("adapters by row need the same number of scales each")
    by_module: dict[nn.Module, list[tuple[Part, Sequence[float]]]] = {}
    for lora, scales in scaled:
        for part in lora.parts:
            like = part.module.weight  # moved there once: a copy at every call would have the device wait
            by_module.setdefault(part.module, []).append(
                (replace(part, down=part.down.to(like), up=part.up.to(like)), scales)
            )
    chosen, known = Rows(), {}  # known: by scales and rows of the batch

    def rows_of(scales, x, out):
        """The rows of x to adapt (None: all of them), and their scales."""
        key = (id(scales), len(x), out.ndim, None if chosen.index is None else tuple(chosen.index))
        if key not in known:
            if chosen.index is not None and len(chosen.index) != len(x):
                raise ValueError(
                    f"adapters by row were told of {len(chosen.index)} rows, and the batch has {len(x)}"
                )
            if chosen.index is None and len(x) % len(scales):
                raise ValueError(
                    f"{len(scales)} scales of adapters for a batch of {len(x)} rows: the batch must be a multiple"
                )
            each = [scales[b % len(scales)] for b in chosen.index or range(len(x))]
            rows = [b for b, scale in enumerate(each) if scale]
            scale = torch.tensor([each[b] for b in rows], dtype=out.dtype, device=out.device)
            index = None if len(rows) == len(x) else torch.tensor(rows, dtype=torch.long, device=out.device)
            known[key] = index, scale.view(-1, *[1] * (out.ndim - 1))
        return known[key]

    def hook(module, inputs, out):
        x = inputs[0]
        if chosen.index is not None and not len(chosen.index):  # told of no rows: the adapters rest
            return out
        for part, scales in by_module[module]:
            rows, scale = rows_of(scales, x, out)
            if rows is None:
                out = out + scale * part(x)
            elif len(rows):  # the others cost nothing
                out = out.index_add(0, rows, scale * part(x[rows]))
        return out

    with ExitStack() as stack:
        for module in by_module:
            stack.callback(module.register_forward_hook(hook).remove)
        # Fused projections are one product that passes the layers by. Their weights are views, so the layers can do alone.
        for attention in {
            part.attention: None for lora, _ in scaled for part in lora.parts if part.attention is not None
        }:
            stack.callback(setattr, attention, "fused", attention.fused)
            attention.fused = None
        yield chosen


@contextmanager
def by_region(regions, adapters: Mapping[Path, LoRA]):
    """Within the `with` block, each region of a layout (noise/layout.py) has the adapters that its `lora` names, and the rest of
    the picture none: yields the `tell` that the collage's predictor must be given, None where no region has any."""
    files = dict.fromkeys(path for region in regions for path, _ in region.lora)
    scaled = [
        (
            adapters[path],
            [0.0, *(sum(scale for name, scale in region.lora if name == path) for region in regions)],
        )
        for path in files
    ]
    with per_row(scaled) as rows:
        yield partial(setattr, rows, "index") if files else None


def _check_scales(scales: Sequence[float]) -> None:
    for scale in scales:
        if not math.isfinite(scale):
            raise ValueError(f"the scale of a LoRA must be a number, not {scale}")
