"""Adapters other than plain LoRA, each defined by how it changes a layer's weight W:

    LoHa    (w1_a @ w1_b) * (w2_a @ w2_b)         (Hyeon-Woo et al. 2022, arXiv 2108.06098)
    LoKr    w1 (x) w2, the Kronecker product
    LoCon   up @ mid @ down, in Tucker form, for convolutions
    GLoRA   W @ a1 @ a2 + b1 @ b2                 (Chavan et al. 2023, arXiv 2306.07967)
    IA3     W times one number per row or column  (Liu et al. 2022, arXiv 2205.05638)
    full    the change itself, also of biases and norms
    DoRA    W plus any of these, each row (or column) set to the length that the file states, minus W
            (Liu et al. 2024, arXiv 2402.09353)

The changes of the first four are multiplied by alpha / rank. Tensors have the names that the
LyCORIS library (Yeh et al. 2024, arXiv 2309.14859) gives them; DoRA's may also have those of PEFT.
weights/lora.py finds the layers.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minsd.attention import Attention

Layer = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm
Change = Callable[[Tensor], Tensor]  # the weight -> its change

# A layer's name, then the tensor's role.
_ROLE = re.compile(
    r"(.+?)\.(?:(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|dora_scale|diff(?:_b)?|[wb]_norm"
    r"|on_input)|(lora_mid|[ab][12])\.weight|(lora_magnitude_vector)(?:\.default)?(?:\.weight)?)"
)


def roles(names: list[str]) -> dict[str, dict[str, str]]:
    """Finds, among the tensor names of a file, those of adapters other than plain LoRA (LoHa, LoKr,
    DoRA, ...). Returns a nested dict: layer name -> role -> tensor name. The role is the last part
    of a tensor's name, such as "hada_w1_a" or "dora_scale". It states what the tensor is for."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        m = _ROLE.fullmatch(name)
        if m is not None:
            found.setdefault(m[1], {})[m[2] or m[3] or m[4]] = name
    known = set(names)
    for layer, tensors in found.items():
        if "on_input" in tensors and f"{layer}.weight" in known:
            tensors["weight"] = f"{layer}.weight"
    return found


@dataclass(frozen=True)
class Dense:
    """The change that an adapter other than plain LoRA (LoHa, LoKr, DoRA, ...) makes to one layer.
    `change` is a function that takes the layer's weight and returns what to add to it. `bias` is
    what to add to the layer's bias, or None if the bias stays unchanged."""

    name: str
    module: Layer
    attention: Attention | None  # that may fuse this layer with others (`Attention.fuse`)
    change: Change
    bias: Tensor | None = None

    def delta(self) -> Tensor:
        """Returns the change of the layer's weight. The result has the weight's shape and device,
        and is float64 if the weight is, otherwise float32."""
        weight = self.module.weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.change(weight).reshape(weight.shape)

    def on(self, like: Tensor) -> "Dense":
        """Computes the change of the layer's weight and returns a copy of this object that keeps
        the result, in the dtype and on the device of `like`. Raises ValueError if the layer is a
        norm, because the change of a norm can only be merged into the weights."""
        if not isinstance(self.module, nn.Linear | nn.Conv2d):
            raise ValueError(
                f"an adapter of norms ({self.name}) acts on the whole image: give it with --lora"
            )
        delta = self.delta().to(like)
        bias = None if self.bias is None else self.bias.to(like)
        return replace(self, change=lambda weight: delta, bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns what the adapter adds to the layer's output for the layer's input x. A linear
        layer has inputs (B,...,in) and outputs (B,...,out). A convolution has inputs (B,in,h,w) and
        outputs (B,out,h',w'), where stride and padding determine the size h' x w'. Call the result
        of `on`, which has computed the weight's change already."""
        delta = self.change(self.module.weight)
        if isinstance(self.module, nn.Conv2d):
            return F.conv2d(x, delta, self.bias, self.module.stride, self.module.padding)
        return F.linear(x, delta, self.bias)


def read(
    path: Path,
    name: str,
    module: Layer,
    attention: Attention | None,
    tensors: Mapping[str, Tensor],
    alpha: Callable[[int], float],
) -> Dense:
    """Makes the change of one layer, a `Dense` object, from the tensors that an adapter's file has
    for the layer. `name` is the layer's name, `module` the layer, and `attention` the attention
    module that may fuse the layer with others, or None. `tensors` maps roles to tensors. Roles are
    those of the function `roles`, and "up" and "down" for the two matrices of a LoRA. `alpha(rank)`
    returns the layer's alpha if its matrices have that rank.

    Raises ValueError, naming the file `path`, if a tensor is missing or does not fit the layer.
    """
    t = {role: tensor for role, tensor in tensors.items() if role != "on_input"}
    if not all(tensor.is_floating_point() for tensor in t.values()):
        raise ValueError(f"{path}: {name!r} has tensors that are not of floating point numbers")
    on_input = "on_input" in tensors and bool(tensors["on_input"].count_nonzero())
    bias = t.get("b_norm", t.get("diff_b"))
    shape = module.weight.shape
    try:  # on the meta device this costs nothing, and it fails if a shape does not fit
        meta = {role: tensor.to("meta", torch.float32) for role, tensor in t.items()}
        trial = _change(meta, on_input, alpha)(torch.empty(shape, device="meta"))
        fits = trial.numel() == shape.numel() and (bias is None or _fits(bias, module))
    except KeyError as error:
        raise ValueError(f"{path} is a partial adapter: {name!r} has no {error}") from None
    except (RuntimeError, IndexError, TypeError, ValueError):
        fits = False
    if not fits:
        theirs = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in t.items())
        raise ValueError(
            f"{path} was made for another model: {name!r} has {theirs[:200]}, this model's layer"
            f" {tuple(shape)}"
        )

    def change(weight: Tensor) -> Tensor:
        return _change({role: tensor.to(weight) for role, tensor in t.items()}, on_input, alpha)(weight)

    return Dense(name, module, attention, change, bias)


def _fits(bias: Tensor, module: Layer) -> bool:
    return module.bias is not None and bias.shape == module.bias.shape


def _change(t: Mapping[str, Tensor], on_input: bool, alpha: Callable[[int], float]) -> Change:
    """Returns a function that takes a layer's weight and returns what the adapter adds to it. `t`
    maps roles (as in the function `roles`) to the adapter's tensors for this layer. `on_input` is
    for IA3 alone: True if there is one number per column (input) of the weight, False if per row
    (output). `alpha(rank)` returns the layer's alpha. Raises KeyError if a tensor is missing."""
    if "lora_magnitude_vector" in t or "dora_scale" in t:
        rest = {role: x for role, x in t.items() if role not in ("lora_magnitude_vector", "dora_scale")}
        return _dora(t, _change(rest, on_input, alpha))
    if "on_input" in t or "weight" in t:
        return lambda weight: weight * _along(t["weight"], weight, 1 if on_input else 0)
    for role in ("diff", "w_norm"):
        if role in t:
            return lambda weight: t[role]
    if not t.keys() - {"diff_b", "b_norm"}:
        return torch.zeros_like
    if "a1" in t:
        scale = alpha(len(t["a2"])) / len(t["a2"])
        a = t["a1"].flatten(1) @ t["a2"].flatten(1)  # (in, in)
        b = t["b1"].flatten(1) @ t["b2"].flatten(1)
        return lambda weight: scale * (torch.einsum("oi...,ij->oj...", weight, a) + b.reshape(weight.shape))
    if "lora_mid" in t:
        delta = _tucker(t["lora_mid"], t["up"].flatten(1).T, t["down"].flatten(1))
        rank = len(t["down"])
    elif any(role.startswith("hada_") for role in t):
        delta = _product(t, "hada_w1", "hada_t1") * _product(t, "hada_w2", "hada_t2")
        rank = len(t["hada_w1_b"])
    elif any(role.startswith("lokr_") for role in t):
        first = t["lokr_w1"] if "lokr_w1" in t else _product(t, "lokr_w1", "")
        second = t["lokr_w2"] if "lokr_w2" in t else _product(t, "lokr_w2", "lokr_t2")
        factored = [role for role in ("lokr_w1_b", "lokr_w2_b") if role in t]
        delta = torch.kron(first[(...,) + (None,) * (second.ndim - first.ndim)], second.contiguous())
        rank = len(t[factored[0]]) if factored else 0  # two whole factors are not scaled
    else:
        delta = t["up"].flatten(1) @ t["down"].flatten(1)
        rank = len(t["down"])
    scale = alpha(rank) / rank if rank else 1.0
    return lambda weight: scale * delta.reshape(weight.shape)


def _product(t: Mapping[str, Tensor], role: str, core: str) -> Tensor:
    """Returns the product of two matrices of an adapter, a = t[role + "_a"] and b = t[role + "_b"].
    If `t` has an item with the name `core`, returns the Tucker product of t[core], a and b
    (`_tucker`)."""
    a, b = t[f"{role}_a"], t[f"{role}_b"]
    if core in t:
        return _tucker(t[core], a, b)
    return (a.flatten(1) @ b.flatten(1)).reshape(len(a), *b.shape[1:])


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns the Tucker product (out,in,k,k) of `core` (r,r,k,k), a (r,out) and b (r,in): the sum
    over i and j of core[i,j] * a[i] * b[j]."""
    return torch.einsum("ij...,io,jn->on...", core, a, b)


def _dora(t: Mapping[str, Tensor], change: Change) -> Change:
    """Returns the function of DoRA that takes a layer's weight and returns what to add to it. DoRA
    adds `change(weight)` to the weight and then scales each row of the sum to a given length. The
    lengths are in `t`, which maps roles to the adapter's tensors. If they are the lengths of
    columns, the columns are scaled."""
    magnitude = t["lora_magnitude_vector"] if "lora_magnitude_vector" in t else t["dora_scale"]

    def normed(weight: Tensor) -> Tensor:
        by_row = "lora_magnitude_vector" in t or len(magnitude) == len(weight)
        axis = 0 if by_row else 1
        new = weight + change(weight)
        length = new.transpose(0, axis).flatten(1).norm(dim=1) + torch.finfo(new.dtype).eps
        return new * _along(magnitude, new, axis) / _along(length, new, axis) - weight

    return normed


def _along(values: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Reshapes `values` so that they can be multiplied with `weight`. `values` has one number per
    row of the weight if `axis` is 0, and one per column if `axis` is 1."""
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    return values.reshape(shape)
