"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W' = W + scale * (alpha / rank) * up @
down.

Files: kohya's (`lora_unet_*`, `lora_te_*`, with alphas) and those of diffusers and PEFT
(`unet.*.lora_A.weight`, `*.to_q_lora.down.weight`, ...; a PEFT folder with its
adapter_config.json), for linear layers and convolutions of the UNet and of the text encoder. `read`
checks every tensor against the model. Then use either

    merge(...)     adds to the weights: costs nothing while sampling, same for every image, undone exactly
    per_row(...)   adds beside the weights, at a scale for each row of a batch; by_region: for collages

    kept = merge([(read("style.safetensors", sd), 0.8)])
    images = sd("a red circle")
    unmerge(kept)
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from minsd.adapters import Adapters, settings_of_rows
from minsd.attention import Attention
from minsd.weights.safetensors_file import PICKLES, read_header

Layer = nn.Linear | nn.Conv2d
MERGED = "has_merged"  # set on a layer while an adapter is merged into it

# A layer's name, then which half: by kohya, by PEFT, by early diffusers and by late diffusers.
_NAMES = re.compile(
    r"(.+?)(?:\.lora_(?P<kohya>down|up)|\.lora_(?P<peft>A|B)(?:\.default)?|[._]lora\.(?P<early>down|up)"
    r"|\.lora_linear_layer\.(?P<late>down|up))\.weight"
)
_PEFT_HALVES = {"A": "down", "B": "up"}
_OTHER_KINDS = {  # a pattern in tensor names -> the kind of adapter that has them
    r"lora_magnitude_vector|dora_scale": "a DoRA",
    r"hada_": "a LoHa adapter",
    r"lokr_": "a LoKr adapter",
    r"lora_mid": "a LoCon in Tucker form",
    r"\.on_input$": "an IA3 adapter",
    r"\.(diff|diff_b|w_norm|b_norm)$": "a LyCORIS adapter of full differences",
    r"^emb_params$|string_to_param|^clip_[lg]$": "a textual-inversion embedding",
    r"^bundle_emb\.": "a LoRA bundled with textual-inversion embeddings",
}


class HasNetworks(Protocol):
    """A `StableDiffusion`, of which only the networks are used here."""

    unet: Any
    text: Any


class HasLoRA(Protocol):
    """A layout's region (noise/layout.py), of which only the adapters are used here."""

    @property
    def lora(self) -> Sequence[tuple[Path, float]]: ...


@dataclass(frozen=True)
class LowRank:
    """The change of one layer: down (r,in) and up (out,r), of convolutions (r,in,k,k),
    (out,r,1,1)."""

    name: str
    module: Layer
    attention: Attention | None  # whose fused projections the layer is part of
    down: Tensor
    up: Tensor
    factor: float  # alpha / rank

    def delta(self) -> Tensor:
        """The change of the weight, in its shape and on its device, in float32 or better."""
        weight = self.module.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        down, up = (half.to(weight.device, dtype).flatten(1) for half in (self.down, self.up))
        return self.factor * (up @ down).reshape(weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """The change of the layer's output at its input x: (B,...,in) -> (B,...,out), of
        convolutions (B,in,h,w) -> (B,out,h',w').
        """
        down, up = (half.to(x.device, x.dtype) for half in (self.down, self.up))
        if isinstance(self.module, nn.Conv2d):
            y = F.conv2d(x, down, stride=self.module.stride, padding=self.module.padding)
            return self.factor * F.conv2d(y, up)
        return self.factor * F.linear(F.linear(x, down), up)


@dataclass(frozen=True)
class LoRA:
    name: str
    parts: tuple[LowRank, ...]


# --- reading --------------------------------------------------------------------------------------


def read(path: str | Path, sd: HasNetworks) -> LoRA:
    """The adapter in a file (or folder), for the networks of `sd` (`sd.unet`, `sd.text.model`).

    FileNotFoundError or ValueError, in one line, for a file that is missing, is not a LoRA, lacks
    one of its halves, is empty, or was made for another model.
    """
    path = _file(Path(path))
    halves, alphas = _tensor_names(path, read_header(path))
    modules = _modules(sd)
    fused = fused_layers(sd.unet)
    parts = []
    with safe_open(path, framework="pt", device="cpu") as file:
        default_alpha = _alphas(path, file.metadata() or {})
        for key, names in halves.items():
            if len(names) < 2:
                missing = ({"down", "up"} - names.keys()).pop()
                raise ValueError(f"{path} is a partial adapter: {key!r} has no {missing!r} half")
            target = _target(key, modules)
            if target is None:
                _refuse_layer(path, key)
            name, module = target
            down, up = (file.get_tensor(names[half]) for half in ("down", "up"))
            _check(path, key, module, down, up)
            rank = len(down)
            alpha = float(file.get_tensor(alphas[key])) if key in alphas else default_alpha(name, rank)
            # Files may hold a 1x1 convolution's halves as matrices, a linear layer's as
            # convolutions.
            shape = module.weight.shape
            down = down.reshape(rank, *shape[1:])
            up = up.reshape(len(up), rank, *[1] * (len(shape) - 2))
            parts.append(LowRank(name, module, fused.get(module), down, up, alpha / rank))
    if lost := alphas.keys() - halves.keys():
        raise ValueError(f"{path} is a partial adapter: {min(lost)!r} has an alpha and no weights")
    if len({part.name for part in parts}) < len(parts):
        raise ValueError(f"{path} adapts a layer twice")
    generic = path.stem in ("pytorch_lora_weights", "adapter_model")
    return LoRA(path.parent.name if generic else path.stem, tuple(parts))


def fused_layers(unet: nn.Module) -> dict[nn.Module, Attention]:
    """The attention module of every projection that may be fused with others."""
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    return {
        layer: attention
        for attention in attentions
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    }


def _tensor_names(path: Path, header: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """-> the tensors' names by layer and half ("down", "up"), and those of the alphas by layer."""
    if not header:
        raise ValueError(f"{path} is an empty adapter: it holds no tensors")
    for pattern, kind in _OTHER_KINDS.items():
        for name in header:
            if re.search(pattern, name):
                raise ValueError(f"{path} is {kind} ({name}); minsd reads plain LoRA")
    halves: dict[str, dict[str, str]] = {}
    alphas: dict[str, str] = {}
    for name in header:
        if name.endswith(".alpha"):
            alphas[re.sub(r"([._]lora|\.lora_linear_layer)?\.alpha$", "", name)] = name
            continue
        m = _NAMES.fullmatch(name)
        if m is None:
            raise ValueError(
                f"{path} holds {name!r}, which is no part of a LoRA: "
                "a model's own weights, or another kind of adapter?"
            )
        half = m["kohya"] or m["early"] or m["late"] or _PEFT_HALVES[m["peft"]]
        halves.setdefault(m[1], {})[half] = name
    if not halves:
        raise ValueError(f"{path} is an empty adapter: it holds no lora weights")
    return halves, alphas


def _refuse_layer(path: Path, key: str) -> NoReturn:
    if re.search(r"diffusion_model|(input|middle|output)_blocks?[_.]", key):
        raise ValueError(
            f"{path} names the model's layers as the original Stable Diffusion code does ({key!r});"
            " minsd's LoRA reader knows diffusers' and kohya's names"
        )
    kind = "an SDXL model" if re.search(r"lora_te2|text_encoder_2", key) else "another kind of model"
    raise ValueError(f"{path} was made for {kind}: this one has no layer {key!r}")


def _file(path: Path) -> Path:
    """The adapter's file: `path`, or the one in the folder `path`."""
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


def _modules(sd: HasNetworks) -> dict[str, dict[str, tuple[str, Layer]]]:
    """(name, layer) of each network's layers that can be adapted, by the names in files: with dots,
    or kohya's underscores."""
    layers: dict[str, dict[str, tuple[str, Layer]]] = {}
    for network, module in (("unet", sd.unet), ("text_encoder", sd.text.model)):
        layers[network] = {}
        for full_name, layer in module.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                name = full_name.removeprefix("text_model.")
                for form in (name, name.replace(".", "_")):
                    layers[network][form] = (f"{network}.{name}", layer)
    return layers


_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_model.": "text_encoder",
}


def _target(key: str, modules: dict[str, dict[str, tuple[str, Layer]]]) -> tuple[str, Layer] | None:
    """(name, layer) that a file's key refers to; None where the model has no such layer."""
    key = key.removeprefix("base_model.model.")  # PEFT's own files
    network = "unet"
    for prefix, whose in _PREFIXES.items():
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            network = whose
            break
    key = re.sub(r"^text_model[._]", "", key).replace(".processor.", ".")
    key = re.sub(r"\.to_out$", ".to_out.0", key)
    if network == "text_encoder":  # early diffusers used its own attention's names here
        key = re.sub(r"\.to_([qkv])$", r".\1_proj", key).replace(".to_out.0", ".out_proj")
    return modules[network].get(key)


def _check(path: Path, key: str, module: Layer, down: Tensor, up: Tensor) -> None:
    """ValueError where the two halves do not fit their layer."""
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{path}: {key!r} is of {down.dtype}, not of floating point numbers")
    rank = len(down)
    weight = module.weight.shape  # (out, in) or (out, in, k, k)
    inputs = down[0].numel() if rank else 0
    if rank and up.flatten(1).shape == (weight[0], rank) and inputs == math.prod(weight[1:]):
        return
    theirs = f"{inputs} -> {len(up)}, rank {rank} and {up.flatten(1).shape[1]}"
    ours = f"{math.prod(weight[1:])} -> {weight[0]}"
    why = " (the text states of SD1.x have width 768, of SD2.x 1024)" if "attn2" in key else ""
    raise ValueError(
        f"{path} was made for another model: {key!r} adapts {theirs}, this model's layer is {ours}{why}"
    )


def _alphas(path: Path, metadata: dict[str, str]) -> Callable[[str, int], float]:
    """-> alpha(name, rank) of layers without an alpha tensor: from the PEFT configuration in the
    file's metadata or beside the file, else the rank itself, a factor of 1."""
    config: Any = {}
    beside = path.parent / "adapter_config.json"
    try:
        if "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
        elif path.stem == "adapter_model" and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: its adapter configuration cannot be read: {error}") from None

    def alpha(name: str, rank: int) -> float:
        network, _, layer = name.partition(".")
        own = {key.removeprefix(f"{network}."): value for key, value in config.items()}
        value = own.get("lora_alpha", rank)
        for pattern, special in (own.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('text_model.')})", layer):
                value = special
        return value * rank**0.5 if own.get("use_rslora") else value

    return alpha


# --- use ------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(scaled: Sequence[tuple[LoRA, float]]) -> dict[Layer, Tensor]:
    """Add adapters, (LoRA, scale) pairs, to the weights in place; -> the old weights, for
    `unmerge`.

    The old weights take as much memory as the adapted layers, and restore them exactly; subtracting
    again would not, since each merge in float16 leaves a rounding error. Text states and predictors
    made before the merge hold on to the old weights: encode the prompt and make the predictor
    afterwards. ValueError where an adapter is merged already.
    """
    _check_scales([scale for _, scale in scaled])
    changes: dict[Layer, list[tuple[LowRank, float]]] = {}
    for lora, scale in scaled:
        for part in lora.parts:
            changes.setdefault(part.module, []).append((part, scale))
    if any(getattr(layer, MERGED, False) for layer in changes):
        raise ValueError(
            "an adapter is merged into this model already: unmerge it first, or merge all of them together"
        )
    kept = {}
    for layer, parts in changes.items():
        kept[layer] = layer.weight.clone()
        setattr(layer, MERGED, True)
        # In place: the weight may be a view of a fused projection.
        layer.weight.copy_(layer.weight + sum(scale * part.delta() for part, scale in parts))
    return kept


@torch.no_grad()
def unmerge(kept: dict[Layer, Tensor]) -> None:
    """Restore the weights that `merge` returned."""
    for layer, weight in kept.items():
        layer.weight.copy_(weight)
        setattr(layer, MERGED, False)


class _RowScales:
    """The scale of one adapter in each row of a batch, as tensors that are made once per form of
    batch."""

    def __init__(self, scales: Sequence[float], adapters: Adapters | None):
        self.scales = list(scales)
        self.adapters = adapters
        self.known: dict[tuple, tuple[Tensor | None, Tensor]] = {}

    def of(self, x: Tensor, out: Tensor) -> tuple[Tensor | None, Tensor] | None:
        """For a layer's input and output: the rows to adapt (None: all of them) and their scales,
        shaped to multiply `out`; None while the adapter does nothing."""
        choice = settings_of_rows(len(x), len(self.scales), self.adapters, "scales of adapters")
        if choice is None:
            return None
        key = (*choice, out.ndim)
        if key not in self.known:
            each = [self.scales[k] for k in choice]
            rows = [b for b, scale in enumerate(each) if scale]
            scale = torch.tensor([each[b] for b in rows], dtype=out.dtype, device=out.device)
            index = None if len(rows) == len(x) else torch.tensor(rows, dtype=torch.long, device=out.device)
            self.known[key] = index, scale.view(-1, *[1] * (out.ndim - 1))
        return self.known[key]


@contextmanager
def per_row(
    scaled: Sequence[tuple[LoRA, Sequence[float]]], adapters: Adapters | None = None
) -> Iterator[None]:
    """Within the `with` block each row of a batch has the adapters, (LoRA, R scales) pairs, at its
    own scales.

    The rows take the R scales in turn, over and over, so with R images rows b and R + b (the two
    halves of guidance) take scale b. Every batch must have a multiple of R rows, and so must its
    text states: give each row its own. The text encoder's layers act on prompts encoded within the
    block, one per row. With `adapters` the rows take the scales of their passes instead, and
    outside a block of `adapters.rows` nothing is adapted.
    """
    for _, scales in scaled:
        _check_scales(scales)
    if len({len(scales) for _, scales in scaled}) > 1:
        raise ValueError("adapters by row need the same number of scales each")
    by_layer: dict[nn.Module, list[tuple[LowRank, _RowScales]]] = {}
    for lora, scales in scaled:
        row_scales = _RowScales(scales, adapters)
        for part in lora.parts:
            like = part.module.weight  # moved there once: the GPU would wait for a copy at every call
            part = replace(part, down=part.down.to(like), up=part.up.to(like))
            by_layer.setdefault(part.module, []).append((part, row_scales))

    def hook(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        x = inputs[0]
        for part, row_scales in by_layer[module]:
            chosen = row_scales.of(x, out)
            if chosen is None:
                continue
            rows, scale = chosen
            if rows is None:
                out = out + scale * part(x)
            elif len(rows):  # rows at scale 0 cost nothing
                out = out.index_add(0, rows, scale * part(x[rows]))
        return out

    with ExitStack() as stack:
        for layer in by_layer:
            stack.callback(layer.register_forward_hook(hook).remove)
        # A fused projection is one product that calls no layer. The weights are views of it, so the
        # layers can work alone.
        attentions = (part.attention for parts in by_layer.values() for part, _ in parts)
        for attention in dict.fromkeys(a for a in attentions if a is not None):
            stack.callback(setattr, attention, "fused", attention.fused)
            attention.fused = None
        yield


@contextmanager
def by_region(regions: Sequence[HasLoRA], loaded: Mapping[Path, LoRA]) -> Iterator[Adapters | None]:
    """Within the `with` block, each region of a layout (noise/layout.py) has the adapters that its
    `lora` names, and the rest of the image none. Yields the `Adapters` that the collage's predictor
    must be given; None where no region has any."""
    paths = dict.fromkeys(path for region in regions for path, _ in region.lora)
    if not paths:
        yield None
        return
    adapters = Adapters()
    scaled = []
    for path in paths:
        scales = [sum(scale for name, scale in region.lora if name == path) for region in regions]
        scaled.append((loaded[path], [0.0, *scales]))
    with per_row(scaled, adapters):
        yield adapters


def _check_scales(scales: Sequence[float]) -> None:
    for scale in scales:
        if not math.isfinite(scale):
            raise ValueError(f"the scale of a LoRA must be a number, not {scale}")
