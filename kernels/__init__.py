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
    """Imports the submodule `flash` or `groupnorm` when it is first read as an attribute of
    `minsd.kernels`, and returns it. The package itself does not import these two, because they
    import Triton. Raises AttributeError for any other name."""
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
    """Computes softmax(scale q k^T + bias) v for each head and, on request, the map, which is the
    softmax averaged over heads.

    q is (B,N,H,d), k and v are (B,M,H,d), for B images, N queries, M keys, H heads and head dim d.
    They may have any strides. `scale` defaults to d**-0.5. `bias` holds floats, broadcasts to
    (B,H,N,M) and must not require a gradient; a bias of -inf hides a key from a query. A query
    whose keys are all hidden gets 0 in output and map. `backend` is one of `BACKENDS`, which the
    head of this file explains.

    Returns (out, map). `out` is (B,N,H,d). The map is (B,N,M) if `probs` is "mean", and None if
    `probs` is None. It is float64 for float64 inputs, otherwise float32. Output and map have first
    derivatives only. For float16 inputs, gradients of the map smaller than about 1e-7 underflow to
    0, so the caller should multiply the loss by a large factor.

    If `region` (B,N) is given, k and v are (B,R,M,H,d), the keys and values of R texts, and
    `region` holds the index of one text for each query. The query attends to this text only; an
    index outside 0..R-1 hides all keys. The map stays (B,N,M), over the keys of each query's own
    text. `bias` then broadcasts to (B,H,N,R*M).

    Raises ValueError if an argument has a wrong value, if the tensors do not fit one another, or if
    `backend` does not support them.
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
    """Computes attention by PyTorch's own operator, and keeps the log-sum-exp of each row of
    scores, with which the Triton kernels compute the map faster. `kernel` names what will compute
    the map: "triton", "materialised" or "reference". q is (B,N,H,d); k and v are (B,M,H,d).

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
    """Chooses what computes the map (the softmax averaged over heads) for q (B,N,H,d) and k
    (B,M,H,d). Returns "triton", "materialised" or "reference".

    If `backend` is "triton" or "reference", returns `backend`. If it is "auto" or "sdpa", the table
    at the head of this file decides. This table gives "triton" for 16-bit inputs only, because
    Triton's matrix products would use TF32 for float32.
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
    `add` (B,C), if given, holds one number per image and channel.

    Triton kernels compute the result if `norm_is_fused` returns True, otherwise PyTorch does. The
    result of the Triton kernels has a first derivative with respect to x, and no other derivative.
    """
    if norm_is_fused(x, norm, add):
        from . import groupnorm  # imports Triton

        return groupnorm.apply(x, norm.num_groups, norm.weight, norm.bias, norm.eps, add, silu)
    y = norm(x if add is None else x + add[:, :, None, None])
    return F.silu(y) if silu else y


def norm_is_fused(x: Tensor, norm: nn.GroupNorm, add: Tensor | None) -> bool:
    """Returns True if `group_norm` computes these arguments with its Triton kernels, False if it
    leaves them to PyTorch. The kernels are expected to be faster, but this was not measured on a
    GPU.

    True needs an affine norm, a CUDA device on which Triton works, dtypes and a group size that the
    kernels support, and fewer than 2**31 numbers per image. If gradients are on, no tensor but x
    may need one, and an x that needs one must not be small (`norm_gradient_from` in switches.py).
    The result is False if `norm` has hooks or a replaced forward, under forward-mode
    differentiation and torch.func, and under torch.compile, which fuses addition, norm and SiLU
    itself.
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
    """Returns True if the kernels of `group_norm` can compute every gradient that is needed, that
    is, if no gradient is needed, or only that of x, and x is large enough (`norm_gradient_from` in
    switches.py) for the kernels to be faster. `tensors` are all inputs of the norm, x included.
    Returns False under forward-mode differentiation and torch.func."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    if not torch.is_grad_enabled():
        return True
    if any(y.requires_grad for y in tensors if y is not x):
        return False
    least = switches.current.norm_gradient_from
    return not x.requires_grad or (least is not None and x.numel() >= least)


def _is_watched(norm: nn.GroupNorm) -> bool:
    """Returns True if `norm` has a hook or a replaced forward. The Triton kernels would call
    neither."""
    hooks = norm._forward_pre_hooks, norm._forward_hooks, norm._backward_pre_hooks, norm._backward_hooks
    return any(hooks) or "forward" in norm.__dict__ or bool(nn.modules.module._has_any_global_hook())
