"""Attention that can also return where it attended, GroupNorm + SiLU, and Linear: the one door.

Networks import `attention`, `group_norm`, `Linear` and `linear` from here only.

`attention` returns the output and, with probs="mean", the map: the softmax averaged over heads,
differentiably and without storing every head's. Who computes it is the backend's choice:

    sdpa        PyTorch's fused attention, or on a CPU without gradients oneDNN's blocks (sdpa.py,
                onednn.py). A map is computed apart, from q and k, by triton or reference; the
                gradients of the two add up, since both are functions of the same q and k
    triton      kernels that return output and map together (flash.py); nothing of heads x N x M
    reference   plain PyTorch in bounded memory, on any device (reference.py)
    auto        one of these, by the table below

    map  device, dtype                              auto takes    evidence
    no   CPU, no gradient, bias or region,          sdpa: oneDNN  measured: 18 ms, PyTorch's 27 ms
         N*M*d >= 2^22
    no   otherwise on a CPU                         sdpa          measured
    no   CUDA                                       sdpa          expected, not measured on a GPU
    yes  CUDA from capability 8.0, float16 or       triton        expected, not measured on a GPU
         bfloat16, head dim in TRITON_HEAD_DIMS,
         shared memory enough (shared.py)
    yes  otherwise on CUDA                          reference     expected, not measured on a GPU
    yes  CPU                                        reference     measured: up to 20 % slower than
                                                                  with all heads' maps in memory

Measured means in float32, in bench/results/attention.csv (the times are for self-attention at 32x32
cells). On a GPU `python -m bench.attention` will decide; switches.py holds what a bench may turn
there. autograd.py gives triton and reference their gradients. Where Triton cannot launch a kernel
(no C compiler, for one), `auto` and `group_norm` use PyTorch after one warning (devices.py).

`group_norm` uses the kernels of groupnorm.py on CUDA where the weights are frozen, and PyTorch
elsewhere. `Linear` is an nn.Linear for frozen weights, faster on some CPUs (onednn.py).
"""

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import autograd, devices, sdpa, switches
from .checks import check, check_triton
from .devices import HAS_TRITON
from .onednn import Linear, linear

__all__ = ["BACKENDS", "HAS_TRITON", "TRITON_HEAD_DIMS", "Linear", "attention", "group_norm", "linear"]

BACKENDS = ("auto", "triton", "sdpa", "reference")
TRITON_HEAD_DIMS = (8, 16, 32, 40, 64, 80, 160)


def __getattr__(name: str) -> ModuleType:
    """`minsd.kernels.flash` and `.groupnorm` on first use: they import Triton."""
    if name in ("flash", "groupnorm"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    region: Tensor | None = None,
    probs: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T scale + bias) v per head and, on request, the softmax averaged over heads.

    q is (B,N,H,d), k and v are (B,M,H,d), as projections return them; views and any strides are
    accepted. `scale` defaults to d**-0.5. `bias` is added to the scores: floats that broadcast to
    (B,H,N,M), -inf hiding a key. It takes no gradient. A query with every key hidden gets 0 in
    output and map.

    Returns (out (B,N,H,d), None), or with probs="mean" (out, map (B,N,M)). The map is float32, or
    float64 for float64 inputs. Both are differentiable once. In float16, map gradients smaller than
    about 1e-7 underflow; multiply the loss first.

    Region attention: k and v (B,R,M,H,d) hold the keys and values of R texts, and `region` (B,N)
    integers gives each query its text. A query attends only to that text; if the number is outside
    0..R-1 it attends to nothing and gets 0. The map stays (B,N,M), over the keys of each query's
    own text. `bias` then broadcasts to (B,H,N,R*M).

    Raises ValueError for inputs that do not fit, and if `backend` cannot take them.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no attention backend is called {backend!r}; choose from {', '.join(BACKENDS)}")
    if probs not in (None, "mean"):
        raise ValueError(f"probs must be None or 'mean', not {probs!r}")
    texts, length = check(q, k, v, bias, region)
    if backend == "triton":
        check_triton(q, HAS_TRITON, TRITON_HEAD_DIMS)
    if region is not None:
        k = k.flatten(1, 2)  # (B, R*M, H, d)
        v = v.flatten(1, 2)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)

    if probs is None and backend in ("auto", "sdpa"):
        return sdpa.forward(q, k, v, factor, bias, region, length), None
    kernel = _map_kernel(q, backend)
    if backend == "sdpa":
        out = sdpa.forward(q, k, v, factor, bias, region, length)
        _, maps = autograd.apply(q, k, None, factor, bias, region, length, True, kernel)
    else:
        out, maps = autograd.apply(q, k, v, factor, bias, region, length, probs is not None, kernel)
    if probs is None:
        return out, None
    if region is not None:
        maps = maps.unflatten(2, (texts, length)).sum(dim=2)  # exact: 0 for every other text
    return out, maps


def _map_kernel(q: Tensor, backend: str) -> str:
    """Which of "triton" and "reference" computes the map (see the table above).

    `auto` never takes the kernels for float32: exact products are preferred to TF32's.
    """
    if backend in ("triton", "reference"):
        return backend
    fast = (
        HAS_TRITON
        and q.is_cuda
        and torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] in TRITON_HEAD_DIMS
        and devices.failure(q.device) is None  # late: it may launch a kernel
        and devices.short_of_memory(q.device, q.shape[-1], q.dtype) is None
    )
    return "triton" if fast else "reference"


def group_norm(x: Tensor, norm: nn.GroupNorm, add: Tensor | None = None, *, silu: bool = False) -> Tensor:
    """norm(x + add), followed by SiLU if `silu`: x (B,C,h,w) -> (B,C,h,w).

    `add` (B,C), if given, is one number per image and channel. Differentiable: by the kernels once,
    and by x alone; where another gradient is needed PyTorch computes it (`norm_is_fused`).
    """
    if norm_is_fused(x, norm, add):
        from . import groupnorm  # imports Triton

        return groupnorm.apply(x, norm.num_groups, norm.weight, norm.bias, norm.eps, add, silu)
    y = norm(x if add is None else x + add[:, :, None, None])
    return F.silu(y) if silu else y


def norm_is_fused(x: Tensor, norm: nn.GroupNorm, add: Tensor | None) -> bool:
    """Whether `group_norm` takes its kernels: on CUDA, unless any but x needs a gradient.

    Not under torch.compile, which fuses the three operations itself, nor if `norm` has hooks or a
    replaced forward, nor for an image of 2**31 numbers or more. That the kernels are faster is
    expected, not measured on a GPU.
    """
    tensors = [y for y in (x, add, norm.weight, norm.bias) if y is not None]
    return (
        HAS_TRITON
        and x.is_cuda
        and torch.version.hip is None
        and norm.affine
        and norm.num_channels // norm.num_groups <= 256
        and len({y.dtype for y in tensors}) == 1
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and not torch.compiler.is_compiling()
        and _gradient_is_ours(x, tensors)
        and x.shape[1:].numel() < 2**31  # the kernels count within an image in 32 bits
        and not _is_watched(norm)
        and devices.failure(x.device) is None  # last: it may launch a kernel
    )


def _gradient_is_ours(x: Tensor, tensors: list[Tensor]) -> bool:
    """Whether the kernels can give every gradient that is needed, and no other transform is
    active.
    """
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    if not torch.is_grad_enabled():
        return True
    if any(y.requires_grad for y in tensors if y is not x):
        return False
    return switches.current.norm_gradient or not x.requires_grad


def _is_watched(norm: nn.GroupNorm) -> bool:
    """Whether calling `norm` would run someone's hook or replacement, which the kernels would not."""
    hooks = norm._forward_pre_hooks, norm._forward_hooks, norm._backward_pre_hooks, norm._backward_hooks
    return any(hooks) or "forward" in norm.__dict__ or bool(nn.modules.module._has_any_global_hook())
