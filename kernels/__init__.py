"""Attention that can also return its probabilities, GroupNorm with SiLU, and Linear.

Networks import `attention`, `group_norm`, `Linear` and `linear` from this module only.

`attention` returns the output and, with probs="mean", the map, which is the softmax averaged over
heads. The map is differentiable, and the probabilities of the single heads are not stored. The
argument `backend` chooses what computes them:

    sdpa        PyTorch's fused attention, or, on a CPU without gradients, oneDNN's products block
                by block (sdpa.py, onednn.py). If the map is wanted, triton or reference computes it
                separately from q and k; autograd adds the gradients of output and map
    triton      kernels that compute output and map (flash.py) and store nothing of size
                heads x N x M, for N queries and M keys
    reference   plain PyTorch in bounded memory, on any device (reference.py)
    auto        one of these three, or 16-bit products with all probabilities in memory
                (materialised.py), by the following table

    map  device, dtype                              auto takes    evidence
    no   CPU, no gradient, bias or region,          sdpa: oneDNN  measured: 18 ms, PyTorch's 27 ms
         N*M*d >= 2^22
    no   otherwise on a CPU                         sdpa          measured
    no   CUDA                                       sdpa          expected, not measured on a GPU
    yes  CUDA, float16 or bfloat16, fewer           materialised  expected: as fast in eager mode,
         probabilities than a switch (off: 0)                     slower in a CUDA graph
    yes  CUDA from capability 8.0, float16 or       triton        expected, not measured on a GPU
         bfloat16, head dim in TRITON_HEAD_DIMS,
         shared memory enough (shared.py)
    yes  otherwise on CUDA                          reference     expected, not measured on a GPU
    yes  CPU                                        reference     measured: up to 20 % slower than
                                                                  with all heads' maps in memory

"Measured" refers to float32 and bench/results/attention.csv; the times are for self-attention at
32x32 cells. On a GPU `python -m bench.attention` will decide, and switches.py holds the settings
that benches compare. autograd.py makes triton and reference differentiable. Where Triton cannot
launch a kernel, for example because there is no C compiler, `auto` and `group_norm` use PyTorch
after one warning (devices.py).

`group_norm` uses the kernels of groupnorm.py on CUDA if the weights are frozen, and PyTorch
otherwise. `Linear` is an nn.Linear for frozen weights that is faster on some CPUs (onednn.py).
"""

import importlib
import math
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
    """Imports `minsd.kernels.flash` or `minsd.kernels.groupnorm` on first use rather than with this
    package, because both import Triton. Raises AttributeError for any other name."""
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
    """Computes softmax(q k^T scale + bias) v per head and, on request, the softmax averaged over
    heads (the map).

    q is (B,N,H,d), k and v are (B,M,H,d), with any strides. `scale` defaults to d**-0.5. `bias` is
    added to the scores. It holds floats that broadcast to (B,H,N,M), -inf where a key is hidden,
    and takes no gradient. A query whose keys are all hidden gets 0 in output and map. `backend` is
    one of `BACKENDS`; the head of this file explains them.

    Returns (out, None) with the output (B,N,H,d), or with probs="mean" (out, map) with the map
    (B,N,M). The map is float32, or float64 for float64 inputs. Both can be differentiated once. In
    float16, map gradients smaller than about 1e-7 underflow to 0, so the caller should multiply the
    loss by a large factor.

    In region attention, k and v (B,R,M,H,d) hold the keys and values of R texts, and `region` (B,N)
    holds for each query the index of its text. The query attends only to that text. If the index is
    outside 0..R-1, the query attends to nothing and gets 0. The map stays (B,N,M), over the keys of
    each query's own text, and `bias` broadcasts to (B,H,N,R*M).

    Raises ValueError if the inputs do not fit one another, or if `backend` does not support them.
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
    kernel = _map_kernel(q, k, backend)
    if backend == "sdpa":
        plain = bias is None and region is None
        out, lse = _with_lse(q, k, v, factor, kernel) if plain else (None, None)
        if out is None:
            out = sdpa.forward(q, k, v, factor, bias, region, length)
        _, maps = autograd.apply(q, k, None, factor, bias, region, length, True, kernel, lse)
    else:
        out, maps = autograd.apply(q, k, v, factor, bias, region, length, probs is not None, kernel)
    if probs is None:
        return out, None
    if region is not None:
        maps = maps.unflatten(2, (texts, length)).sum(dim=2)  # exact: 0 for every other text
    return out, maps


def _with_lse(
    q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: str
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Computes attention by PyTorch's own operator, and keeps the log-sum-exp of the scores, from
    which the map kernel `kernel` can compute the map faster. Only "triton" can use it. q is
    (B,N,H,d); k and v are (B,M,H,d).

    Returns (out, lse): the output (B,N,H,d), and the base-2 log-sum-exp (B,H,N) of each row of
    scores. Returns (None, None) if `kernel` is not "triton", if the switch `shared_lse`
    (switches.py) is off, under torch.compile, or if PyTorch's operator does not return the
    log-sum-exp.
    """
    if not switches.current.shared_lse or kernel != "triton" or torch.compiler.is_compiling():
        return None, None
    found = sdpa.with_lse(q, k, v, scale)
    return (None, None) if found is None else (found[0], found[1] / math.log(2))


def _map_kernel(q: Tensor, k: Tensor, backend: str) -> str:
    """Chooses what computes the map (the softmax averaged over heads) of q (B,N,H,d) and k
    (B,M,H,d), by the table at the head of this file. Returns "triton", "materialised" or
    "reference".

    If `backend` is "triton" or "reference", that is the choice. Otherwise "triton" is never chosen
    for float32, because Triton's matrix products would use TF32 there.
    """
    if backend in ("triton", "reference"):
        return backend
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return "reference"
    b, n, h, _ = q.shape
    if b * h * n * k.shape[1] < switches.current.materialise_below:
        return "materialised"
    fast = (
        HAS_TRITON
        and torch.version.hip is None
        and q.shape[-1] in TRITON_HEAD_DIMS
        and devices.failure(q.device) is None  # after the cheap checks: it may launch a kernel
        and devices.short_of_memory(q.device, q.shape[-1], q.dtype) is None
    )
    return "triton" if fast else "reference"


def group_norm(x: Tensor, norm: nn.GroupNorm, add: Tensor | None = None, *, silu: bool = False) -> Tensor:
    """Computes norm(x + add), followed by SiLU if `silu` is True. x and the result are (B,C,h,w).

    `add` (B,C), if given, holds one number per image and channel. On CUDA, Triton kernels compute
    the result, which can then be differentiated once, and in x alone. PyTorch computes it if any
    other gradient is needed, and in the other cases that `norm_is_fused` lists.
    """
    if norm_is_fused(x, norm, add):
        from . import groupnorm  # imports Triton

        return groupnorm.apply(x, norm.num_groups, norm.weight, norm.bias, norm.eps, add, silu)
    y = norm(x if add is None else x + add[:, :, None, None])
    return F.silu(y) if silu else y


def norm_is_fused(x: Tensor, norm: nn.GroupNorm, add: Tensor | None) -> bool:
    """Returns True if `group_norm` uses its Triton kernels for these arguments. They are meant for
    CUDA tensors of which at most x needs a gradient. They are expected to be faster than PyTorch,
    but this was not measured on a GPU.

    Even then, PyTorch computes the result in these cases: under torch.compile, which fuses
    addition, norm and SiLU itself; if `norm` has hooks or a replaced forward; if an image has 2**31
    numbers or more; if x needs a gradient and is small (`norm_gradient_from` in switches.py); and
    if the kernels do not support the dtypes, the groups or the device.
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
        and devices.failure(x.device) is None  # after the cheap checks: it may launch a kernel
    )


def _gradient_is_ours(x: Tensor, tensors: list[Tensor]) -> bool:
    """Returns True if no gradient is needed, or only that of x, and the kernels of `group_norm` can
    compute it. `tensors` are all tensors that take part, x included. Returns False under
    forward-mode differentiation and torch.func, and if x needs a gradient but is too small for the
    kernels to be faster."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    if not torch.is_grad_enabled():
        return True
    if any(y.requires_grad for y in tensors if y is not x):
        return False
    least = switches.current.norm_gradient_from
    return not x.requires_grad or (least is not None and x.numel() >= least)


def _is_watched(norm: nn.GroupNorm) -> bool:
    """Returns True if `norm` has a hook or a replaced forward, which `group_norm`'s kernels would
    not call."""
    hooks = norm._forward_pre_hooks, norm._forward_hooks, norm._backward_pre_hooks, norm._backward_hooks
    return any(hooks) or "forward" in norm.__dict__ or bool(nn.modules.module._has_any_global_hook())
