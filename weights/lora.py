"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685). An adapted weight is

    W' = W + scale * (alpha / rank) * up @ down

The files of three sources are read: kohya's (`lora_unet_*`, `lora_te_*`, with alphas), those of
diffusers and PEFT (`unet.*.lora_A.weight`, `*.to_q_lora.down.weight`, ...; a PEFT folder with its
adapter_config.json), and ComfyUI's (`diffusion_model.*`). UNet layers may also have the names of
the original code. Adapters of this kind change linear layers and convolutions of the UNet and of
the text encoders; weights/lycoris.py has the other kinds (LoHa, DoRA, ...). `read` checks every
tensor against the model. There are two ways to use an adapter:

    merge(...)    adds the change to the weights: no cost while sampling, the same scale
                  for every image, can be undone exactly
    per_row(...)  adds the change to the layers' outputs, at a scale for each row of a batch;
                  `by_region` does so for collages

For example:

    kept = merge([(read("style.safetensors", sd), 0.8)])
    images = sd("a red circle")
    unmerge(kept)
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minsd.adapters import Adapters, settings_of_rows
from minsd.attention import Attention
from minsd.files import parse_json, read_json
from minsd.weights import lycoris
from minsd.weights.ldm_keys import unet_layer
from minsd.weights.lycoris import Dense, Layer
from minsd.weights.safetensors_file import PICKLES, Tensors, read_metadata

Kept = dict[Layer, tuple[Tensor, Tensor | None]]  # the weights and biases before a merge
MERGED = "has_merged"  # set on a layer while an adapter is merged into it

# A layer's name, then which matrix ("down" or "up"), as written by kohya, PEFT, early diffusers and
# late diffusers.
_NAMES = re.compile(
    r"(.+?)(?:\.lora_(?P<kohya>down|up)|\.lora_(?P<peft>A|B)(?:\.default)?|[._]lora\.(?P<early>down|up)"
    r"|\.lora_linear_layer\.(?P<late>down|up))\.weight"
)
_PEFT_HALVES = {"A": "down", "B": "up"}
_OTHER_KINDS = {  # a pattern of tensor names -> the kind of file with such names
    r"^lora_controlnet$": "a control-lora, for --controlnet",
    r"(^|\.)oft_(blocks|diag)": "an OFT adapter",
    r"^emb_params$|^string_to_param|^clip_[lg]$": "a textual-inversion embedding, for --embedding",
}


class HasNetworks(Protocol):
    """A protocol: a model with a UNet `unet` and a text encoder `text`, such as `StableDiffusion`.
    This module uses no other part of a model."""

    @property
    def unet(self) -> Any: ...

    @property
    def text(self) -> Any: ...


class HasLoRA(Protocol):
    """A protocol: a region of a layout (noise/layout.py), of which this module uses only `lora`,
    the (file, scale) pairs of the region's LoRAs."""

    @property
    def lora(self) -> Sequence[tuple[Path, float]]: ...


@dataclass(frozen=True)
class LowRank:
    """The change that a LoRA makes to one layer. `down` and `up` are its two matrices, of rank r:
    (r,in) and (out,r) for a linear layer, (r,in,k,k) and (out,r,1,1) for a convolution with a
    kernel of k x k."""

    name: str
    module: Layer
    attention: Attention | None  # that may fuse this layer with others (`Attention.fuse`)
    down: Tensor
    up: Tensor
    factor: float  # alpha / rank
    bias: None = None  # unchanged

    def delta(self) -> Tensor:
        """Returns the change of the layer's weight, factor * up @ down. The result has the weight's
        shape and device, and is float64 if the weight is, otherwise float32."""
        weight = self.module.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        down, up = (half.to(weight.device, dtype).flatten(1) for half in (self.down, self.up))
        return self.factor * (up @ down).reshape(weight.shape)

    def on(self, like: Tensor) -> "LowRank":
        """Returns a copy of this change, with `down` and `up` in the dtype and on the device of
        `like`."""
        return replace(self, down=self.down.to(like), up=self.up.to(like))

    def __call__(self, x: Tensor) -> Tensor:
        """Returns what the LoRA adds to the layer's output for the layer's input x. A linear layer
        has inputs (B,...,in) and outputs (B,...,out). A convolution has inputs (B,in,h,w) and
        outputs (B,out,h',w'), where stride and padding determine the size h' x w'."""
        down, up = (half.to(x.device, x.dtype) for half in (self.down, self.up))
        if isinstance(self.module, nn.Conv2d):
            y = F.conv2d(x, down, stride=self.module.stride, padding=self.module.padding)
            return self.factor * F.conv2d(y, up)
        return self.factor * F.linear(F.linear(x, down), up)


@dataclass(frozen=True)
class LoRA:
    """An adapter. `name` is its name, and `parts` has one item for each layer that the adapter
    changes."""

    name: str
    parts: tuple[LowRank | Dense, ...]


# --- reading --------------------------------------------------------------------------------------


def read(path: str | Path, sd: HasNetworks) -> LoRA:
    """Reads a LoRA, or an adapter of the related kinds in weights/lycoris.py, and finds the layers
    of the model `sd` that it changes. `path` is the adapter's file, or the folder with this file.

    Raises FileNotFoundError if there is no such file. Raises ValueError if the file holds no
    adapter, lacks one of the two matrices of a layer, or was made for another model. The error
    message is one line.
    """
    path = file_of(Path(path))
    tensors = Tensors(path, "", torch.float32)
    halves, alphas, others = _tensor_names(path, tensors)
    modules = _modules(sd)
    fused = fused_layers(sd.unet)
    parts = []
    default_alpha = _alphas(path, read_metadata(path))
    for key, names in (halves | others).items():
        target = _target(key, modules, sd.unet.config.layers_per_block)
        if target is None:
            _refuse_layer(path, key)
        name, module = target
        if key in others:
            given = halves.get(key, {}) | names
            alpha = partial(default_alpha, name)
            if key in alphas:
                number = _alpha(path, tensors, alphas[key])
                alpha = lambda rank, number=number: number  # noqa: E731
            content = {role: tensors[tensor] for role, tensor in given.items()}
            parts.append(lycoris.read(path, name, module, fused.get(module), content, alpha))
            continue
        if len(names) < 2:
            missing = ({"down", "up"} - names.keys()).pop()
            raise ValueError(f"{path} is a partial adapter: {key!r} has no {missing!r} half")
        if not isinstance(module, nn.Linear | nn.Conv2d):
            _refuse_layer(path, key)
        down, up = (tensors[names[half]] for half in ("down", "up"))
        _check(path, key, module, down, up)
        rank = len(down)
        alpha = _alpha(path, tensors, alphas[key]) if key in alphas else default_alpha(name, rank)
        # Files may hold `down` and `up` of a 1x1 convolution as matrices, and those of a linear
        # layer as convolutions.
        shape = module.weight.shape
        down = down.reshape(rank, *shape[1:])
        up = up.reshape(len(up), rank, *[1] * (len(shape) - 2))
        parts.append(LowRank(name, module, fused.get(module), down, up, alpha / rank))
    if lost := alphas.keys() - halves.keys() - others.keys():
        raise ValueError(f"{path} is a partial adapter: {min(lost)!r} has an alpha and no weights")
    if len({part.name for part in parts}) < len(parts):
        raise ValueError(f"{path} adapts a layer twice")
    generic = path.stem in ("pytorch_lora_weights", "adapter_model")
    return LoRA(path.parent.name if generic else path.stem, tuple(parts))


def fused_layers(unet: nn.Module) -> dict[nn.Module, Attention]:
    """Returns a dict that maps each layer for queries, keys or values in the UNet (to_q, to_k,
    to_v) to the attention module that contains the layer. Attention modules may compute such layers
    as one fused product (`Attention.fuse`)."""
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    return {
        layer: attention
        for attention in attentions
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    }


def _tensor_names(
    path: Path, header: Iterable[str]
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, dict[str, str]]]:
    """Sorts `header`, the tensor names of the adapter file `path`, by the layers that they belong
    to. Returns (halves, alphas, others):

    - halves: layer -> {"down": tensor name, "up": tensor name}, the two matrices of a LoRA
    - alphas: layer -> name of the tensor with the layer's alpha
    - others: layer -> {role: tensor name}, the tensors of other kinds of adapters; a role such as
      "hada_w1_a" states what a tensor is for (`lycoris.roles`)

    Raises ValueError if the file has no tensors, or a tensor that is not part of an adapter.
    """
    header = [name for name in header if not name.startswith("bundle_emb.")]
    if not header:
        raise ValueError(f"{path} is an empty adapter: it holds no tensors")
    for pattern, kind in _OTHER_KINDS.items():
        for name in header:
            if re.search(pattern, name):
                raise ValueError(f"{path} is {kind} ({name}); minsd's --lora does not read it")
    halves: dict[str, dict[str, str]] = {}
    alphas: dict[str, str] = {}
    others = lycoris.roles(header)
    sorted_already = {name for names in others.values() for name in names.values()}
    for name in header:
        if name in sorted_already:
            continue
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
    if not halves and not others:
        raise ValueError(f"{path} is an empty adapter: it holds no lora weights")
    return halves, alphas, others


def _refuse_layer(path: Path, key: str) -> NoReturn:
    """Always raises ValueError, because the model lacks the layer that the adapter's file `path`
    calls `key`. The error message states for what kind of model the file was probably made."""
    # Models before SDXL have one transformer block after another block, never several.
    sdxl = r"te2|text_encoder_2|clip_g|add_embedding|label_emb|transformer_blocks[._][1-9]"
    kind = "an SDXL model" if re.search(sdxl, key) else "another kind of model"
    raise ValueError(f"{path} was made for {kind}: this one has no layer {key!r}")


def file_of(path: Path) -> Path:
    """Returns the path of an adapter's file. `path` is this file, or the folder in which it lies.
    Raises FileNotFoundError if there is no such file, and ValueError if `path` is a pickle."""
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
    """Lists the layers of a model that adapters can change. Returns two nested dicts: network
    ("unet", "text_encoder" or "text_encoder_2") -> name of the layer in adapter files -> (minsd's
    name, layer). Every layer is listed under two names, because adapter files write a name with
    dots or, as kohya does, with underscores."""
    layers: dict[str, dict[str, tuple[str, Layer]]] = {}
    networks = {"unet": sd.unet, "text_encoder": sd.text.model}
    if hasattr(sd.text, "second"):  # SDXL
        networks["text_encoder_2"] = sd.text.second.model
    for network, module in networks.items():
        layers[network] = {}
        for full_name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
                name = full_name.removeprefix("text_model.")
                for form in (name, name.replace(".", "_")):
                    layers[network][form] = (f"{network}.{name}", layer)
    return layers


_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_model.": "text_encoder",
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}


def _target(
    key: str, modules: dict[str, dict[str, tuple[str, Layer]]], layers: int
) -> tuple[str, Layer] | None:
    """Finds the layer that an adapter's file calls `key`. Returns (minsd's name, layer), or None if
    the model has no such layer. `modules` is the result of `_modules`. `layers` is the number of
    residual blocks per level in the UNet's encoder half; it is needed for names of the original
    (LDM) layout."""
    key = key.removeprefix("base_model.model.")  # PEFT's own files
    network = "unet"
    for prefix, whose in _PREFIXES.items():
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            network = whose
            break
    key = re.sub(r"^text_model[._]", "", key).replace(".processor.", ".")
    key = re.sub(r"\.to_out$", ".to_out.0", key)
    if network != "unet":  # early diffusers used the names of its own attention class
        key = re.sub(r"\.to_([qkv])$", r".\1_proj", key).replace(".to_out.0", ".out_proj")
    found = modules.get(network, {})
    if network == "unet" and key not in found:
        key = unet_layer(key.replace(".", "_"), layers)
    return found.get(key)


def _check(path: Path, key: str, module: Layer, down: Tensor, up: Tensor) -> None:
    """Checks that the matrices `down` and `up` of a LoRA have floating point numbers and fit the
    layer `module`. Otherwise raises ValueError, naming the file `path` and the layer's name `key`
    in that file."""
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{path}: {key!r} is of {down.dtype}, not of floating point numbers")
    if down.ndim < 2 or up.ndim < 2:
        raise ValueError(f"{path}: {key!r} has matrices of shapes {tuple(down.shape)} and {tuple(up.shape)}")
    rank = len(down)
    weight = module.weight.shape  # (out, in) or (out, in, k, k)
    inputs = down[0].numel() if rank else 0
    if rank and up.flatten(1).shape == (weight[0], rank) and inputs == math.prod(weight[1:]):
        return
    theirs = f"{inputs} -> {len(up)}, rank {rank} and {up.flatten(1).shape[1]}"
    ours = f"{math.prod(weight[1:])} -> {weight[0]}"
    why = " (the text states of SD1.x have width 768, of SD2.x 1024, of SDXL 2048)" if "attn2" in key else ""
    raise ValueError(
        f"{path} was made for another model: {key!r} adapts {theirs}, this model's layer is {ours}{why}"
    )


def _alphas(path: Path, metadata: dict[str, str]) -> Callable[[str, int], float]:
    """Returns a function alpha(name, rank), for layers that have no tensor with their alpha in the
    file `path`. `name` is the layer's name in minsd and `rank` the rank of its LoRA. A LoRA's
    change is multiplied by alpha / rank.

    The function takes alphas from PEFT's configuration, which is part of the file's `metadata` or
    lies beside the file as adapter_config.json. If there is no configuration, alpha is the rank.
    Raises ValueError if the configuration cannot be read.
    """
    config: Any = {}
    beside = path.parent / "adapter_config.json"
    try:
        if "lora_adapter_metadata" in metadata:
            config = parse_json(metadata["lora_adapter_metadata"])
        elif path.stem == "adapter_model" and beside.is_file():
            config = read_json(beside)
        if not isinstance(config, dict):
            raise ValueError("not an object")
        names = ("unet", "text_encoder", "text_encoder_2")
        networks = {network: _alpha_config(config, network) for network in names}
    except ValueError as error:
        raise ValueError(f"{path}: its adapter configuration cannot be read: {error}") from None

    def alpha(name: str, rank: int) -> float:
        network, _, layer = name.partition(".")
        default, by_layer, root = networks[network]
        value = rank if default is None else default
        for ending, special in by_layer.items():  # of several endings that fit, PEFT takes the first
            if f"^.{layer}".endswith(ending):
                value = special
                break
        return value * rank**0.5 if root else value

    return alpha


def _alpha_config(config: dict[str, Any], network: str) -> tuple[float | None, dict[str, float], bool]:
    """Reads from PEFT's configuration what it states about the alphas of one network ("unet",
    "text_encoder" or "text_encoder_2"). Returns (default, by_layer, root):

    - default: the alpha of all layers that are not in by_layer, or None if none is stated
    - by_layer: ending of a layer's name -> alpha of the layers with such names
    - root: True if every alpha is to be multiplied by sqrt(rank)

    PEFT takes the keys of alpha_pattern for regular expressions. Here they must be plain layer
    names (a ^ in front marks a whole name), because a regular expression from a stranger could run
    for ever. Raises ValueError for any other key.
    """
    own = {key.removeprefix(f"{network}."): value for key, value in config.items()}
    patterns = own.get("alpha_pattern")
    root = own.get("use_rslora")
    if not isinstance(patterns, dict | None) or not isinstance(root, bool | None):
        raise ValueError("alpha_pattern must be an object, and use_rslora true or false")
    by_layer = {}
    for pattern, value in (patterns or {}).items():
        whole = "^" if pattern.startswith("^") else ""
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".").removeprefix("text_model.")
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"alpha_pattern has {pattern[:80]!r}, which is not the name of a layer")
        by_layer[f"{whole}.{name}"] = _number(value)
    default = own.get("lora_alpha", own.get("alpha"))  # the latter of LoHa and LoKr
    return None if default is None else _number(default), by_layer, bool(root)


def _number(value: object) -> float:
    """Returns `value`, an alpha from a configuration, unchanged. Raises ValueError if it is not a
    finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ValueError(f"an alpha must be a number, not {ascii(value)[:80]}")
    return value


def _alpha(path: Path, tensors: Tensors, name: str) -> float:
    """Returns the alpha that the tensor called `name` holds. Raises ValueError, naming the file
    `path`, if the tensor does not hold exactly one finite number."""
    tensor = tensors[name]
    if tensor.numel() != 1 or tensor.is_complex() or not tensor.isfinite().all():
        raise ValueError(f"{path}: {name!r} must hold one number")
    return float(tensor)


# --- use ------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(scaled: Sequence[tuple[LoRA, float]]) -> Kept:
    """Adds adapters to the weights of the layers that they change, in place. `scaled` lists (LoRA,
    scale) pairs. Returns the weights and biases from before the merge, as a dict of layer ->
    (weight, bias or None), which `unmerge` takes. These copies need as much memory as the layers'
    own weights.

    Text states and predictors that were made before a merge contain results of the old weights, so
    make them again after it. Raises ValueError if a layer already has a merged adapter, or if a
    scale is not finite.
    """
    _check_scales([scale for _, scale in scaled])
    changes: dict[Layer, list[tuple[LowRank | Dense, float]]] = {}
    for lora, scale in scaled:
        for part in lora.parts:
            changes.setdefault(part.module, []).append((part, scale))
    if any(getattr(layer, MERGED, False) for layer in changes):
        raise ValueError(
            "an adapter is merged into this model already: unmerge it first, or merge all of them together"
        )
    kept: Kept = {}
    for layer, parts in changes.items():
        kept[layer] = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
        setattr(layer, MERGED, True)
        # The copy is in place because the weight may be a view of a fused projection's buffer.
        layer.weight.copy_(layer.weight + sum(scale * part.delta() for part, scale in parts))
        for part, scale in parts:
            if part.bias is not None and layer.bias is not None:
                layer.bias.add_(scale * part.bias.to(layer.bias))
    return kept


@torch.no_grad()
def unmerge(kept: Kept) -> None:
    """Undoes a merge exactly. `kept` is the result of `merge`: the weights and biases from before
    it, which the layers now get back."""
    for layer, (weight, bias) in kept.items():
        layer.weight.copy_(weight)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
        setattr(layer, MERGED, False)


class _RowScales:
    """One adapter's scales for the rows of a batch. The method `of` makes tensors of them, and
    reuses these tensors while the rows have the same scales."""

    def __init__(self, scales: Sequence[float], adapters: Adapters | None):
        self.scales = list(scales)
        self.adapters = adapters
        self.known: dict[tuple, tuple[Tensor | None, Tensor]] = {}

    def of(self, x: Tensor, out: Tensor) -> tuple[Tensor | None, Tensor] | None:
        """Returns (rows, scales) for an adapted layer with the input x and the output `out`. `rows`
        holds the indices of the rows of the batch whose scale is not 0, or is None if this is every
        row. `scales` has one scale for each such row, in a shape that can be multiplied with rows
        of `out`. Returns None instead of the pair if the adapter must not act, because no block of
        `adapters.rows` is open."""
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
    """Within the `with` block, adds what adapters contribute to the outputs of layers, with a
    separate scale for each row of a batch. `scaled` lists (LoRA, scales) pairs. All lists of scales
    have the same length R.

    Row i of a batch uses scale i modulo R. With guidance, a batch has R rows without the prompt and
    then R rows with it, so both halves use the same scales. The number of rows must be a multiple
    of R, and text states must have as many rows as the batch. Prompts that are encoded within the
    block are adapted too, prompt i like row i.

    `adapters` is for collages, in which one batch holds several passes (a pass is a UNet evaluation
    with one caption). It states the pass that each row belongs to, and a row of pass k uses scale k
    modulo R. No row is adapted outside a block of `adapters.rows`.

    Raises ValueError if the lists of scales differ in length, or, when a layer runs, if their
    length does not fit the batch.
    """
    for _, scales in scaled:
        _check_scales(scales)
    if len({len(scales) for _, scales in scaled}) > 1:
        raise ValueError("adapters by row need the same number of scales each")
    by_layer: dict[nn.Module, list[tuple[LowRank | Dense, _RowScales]]] = {}
    for lora, scales in scaled:
        row_scales = _RowScales(scales, adapters)
        for part in lora.parts:
            like = part.module.weight  # moved once, so that the GPU waits for no copy at every call
            part = part.on(like)
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
            elif len(rows):  # rows at scale 0 are skipped
                out = out.index_add(0, rows, scale * part(x[rows]))
        return out

    with ExitStack() as stack:
        for layer in by_layer:
            stack.callback(layer.register_forward_hook(hook).remove)
        # A fused projection is one product that calls no layer, so no hook would run. The layers'
        # weights are views of the fused buffer, so the layers also work without fusing.
        attentions = (part.attention for parts in by_layer.values() for part, _ in parts)
        for attention in dict.fromkeys(a for a in attentions if a is not None):
            stack.callback(setattr, attention, "fused", attention.fused)
            attention.fused = None
        yield


@contextmanager
def by_region(regions: Sequence[HasLoRA], loaded: Mapping[Path, LoRA]) -> Iterator[Adapters | None]:
    """Within the `with` block, adapts each region of a layout (noise/layout.py) with the LoRAs in
    the region's `lora`. The rest of the image is not adapted. `loaded` maps the file of each LoRA
    to the loaded LoRA. Yields the `Adapters` object to pass to `collage.predictor`, or None if no
    region has a LoRA."""
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
