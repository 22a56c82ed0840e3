"""Checks the inputs of `attention`. Each function raises ValueError, with a message of one line,
for inputs that do not fit one another."""

import torch
from torch import Tensor

from . import devices

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, region: Tensor | None) -> tuple[int, int]:
    """Checks the shapes, dtypes and devices of the inputs of `minsd.kernels.attention`. Returns
    (texts, length): the number of texts in k and v, which is 1 if `region` is None, and the number
    of keys per text. Raises ValueError if the inputs do not fit one another."""
    form = "(B,M,H,d)" if region is None else "(B,R,M,H,d)"
    if q.ndim != 4 or k.ndim != form.count(",") + 1 or k.shape != v.shape:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q must be (B,N,H,d), k and v {form}, not {shapes}")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[-2:]):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch, heads or head dim")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in FLOATS:
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if any(y is not None and y.device != q.device for y in (k, v, bias, region)):
        raise ValueError("q, k, v, bias and region must be on one device")
    length = k.shape[-3]
    if length == 0:
        raise ValueError("k and v hold no keys: M is 0")
    texts = 1
    if region is not None:
        texts = k.shape[1]
        _check_region(region, q)
    if bias is not None:
        _check_bias(bias, (q.shape[0], q.shape[2], q.shape[1], texts * length))
    return texts, length


def _check_region(region: Tensor, q: Tensor) -> None:
    integers = not region.dtype.is_floating_point and region.dtype != torch.bool
    if region.shape != q.shape[:2] or not integers:
        wanted = f"(B,N) = {tuple(q.shape[:2])} integers"
        raise ValueError(f"region must be {wanted}, not {tuple(region.shape)} of {region.dtype}")


def _check_bias(bias: Tensor, shape: tuple[int, int, int, int]) -> None:
    if bias.dtype not in FLOATS:
        raise ValueError(f"bias must hold floats (-inf hides a key), not {bias.dtype}")
    if bias.ndim != 4 or any(have not in (1, want) for have, want in zip(bias.shape, shape)):
        given = tuple(bias.shape)
        raise ValueError(f"bias must broadcast to (B,H,N,M) = {shape} with four dimensions, not {given}")
    if bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("bias takes no gradient here: pass bias.detach()")


def check_triton(q: Tensor, installed: bool, head_dims: tuple[int, ...]) -> None:
    """Raises ValueError if the triton backend cannot compute attention for q (B,N,H,d), because of
    its head dim d, its dtype or its device, or because Triton is missing. `installed` states
    whether the package triton is installed, and `head_dims` lists the supported values of d."""
    if not installed:
        remedy = "pip install triton, or use backend='sdpa'"
        raise ValueError(f"the triton backend needs the triton package (Linux): {remedy}")
    if q.shape[-1] not in head_dims:
        dims = ", ".join(map(str, head_dims))
        raise ValueError(f"the triton backend has head dims {dims}, not {q.shape[-1]}; use backend='auto'")
    if q.dtype == torch.float64:
        raise ValueError("the triton backend has no float64; use backend='reference'")
    if q.is_cuda:
        reason = devices.failure(q.device) or devices.short_of_memory(q.device, q.shape[-1], q.dtype)
        if reason is not None:
            raise ValueError(f"the triton backend cannot run: {reason}; use backend='auto'")
