"""Attention that can also tell where it looked: one entry, `attention()`, and the choice of a backend.

    sdpa        PyTorch's fused attention; on a CPU, without gradients, in blocks by a faster product (onednn.py). With
                probabilities they are computed apart from q and k ("decoupled"): the gradients of the two add up, since
                both are functions of the same q and k.
    triton      our kernels (flash.py): output, head-mean probabilities and gradients, nothing of size heads x N x M
    reference   plain PyTorch in bounded memory (reference.py), on any device
    auto        without probabilities sdpa; with them triton where it runs in 16 bits, else reference

reference.py and flash.py offer the same two functions, `forward` and `backward`; they are joined to autograd here, twice.
In eager mode by an autograd.Function, which costs a quarter of a custom operator per call; under torch.compile by custom
operators, which the compiler sees as single nodes with known output shapes. There is no second derivative.

Below stands what else of a UNet has a kernel: `group_norm`, with the SiLU that mostly follows it (groupnorm.py).
"""

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import onednn, reference

BACKENDS = ("auto", "triton", "sdpa", "reference")
TRITON_HEAD_DIMS = (8, 16, 32, 40, 64, 80, 160)
HAS_TRITON = (
    importlib.util.find_spec("triton") is not None
)  # here, not when asked: a compiler cannot look into it
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    """softmax(q k^T scale + bias) v for each head, and on request the mean of the softmax over heads.

    q (B,N,H,d), k and v (B,M,H,d), as projections leave them: views and strides are welcome. `scale` defaults to d**-0.5.
    `bias` is added to the scores: floats that broadcast to (B,H,N,M), -inf hiding a key; it takes no gradient. A row
    with every key hidden gives 0 in out and map. Returns (out (B,N,H,d), None), or with `probs="mean"`
    (out, map (B,N,M) float32; float64 for float64). Both are differentiable, once; in float16 what a map's gradient makes of
    q and k is lost below about 1e-7: scale the loss.

    Region attention: with k and v (B,R,M,H,d), the keys and values of R texts, and `region` (B,N) integers, query n looks
    at text region[b,n] alone (at none, and gives 0, where that is outside 0..R-1). The map stays (B,N,M): each query's
    own text. `bias` then broadcasts to (B,H,N,R*M).
    """
    if backend not in BACKENDS:
        raise ValueError(f"no attention backend is called {backend!r}; choose from {', '.join(BACKENDS)}")
    if probs not in (None, "mean"):
        raise ValueError(f"probs must be None or 'mean', not {probs!r}")
    texts, length = _check(q, k, v, bias, region)
    if region is not None:
        k, v = k.flatten(1, 2), v.flatten(1, 2)  # (B, R*M, H, d)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)

    if backend == "triton":
        _check_triton(q)
    kernel = (
        "triton" if backend == "triton" or (backend != "reference" and _triton_is_fast(q)) else "reference"
    )
    if backend in ("triton", "reference") or (backend == "auto" and probs):
        out, maps = _differentiable(q, k, v, scale, bias, region, length, probs is not None, kernel)
    else:
        out, maps = _sdpa(q, k, v, scale, bias, region, length), None
        if probs:
            _, maps = _differentiable(q, k, None, scale, bias, region, length, True, kernel)
    if probs and region is not None:
        maps = maps.unflatten(2, (texts, length)).sum(dim=2)  # the other texts' columns are exact zeros
    return out, maps if probs else None


def _check(q, k, v, bias, region):
    """Raises ValueError for inputs that do not fit; returns (texts, keys in each)."""
    several = region is not None
    if q.ndim != 4 or k.ndim != 4 + several or k.shape != v.shape:
        form = "(B,R,M,H,d)" if several else "(B,M,H,d)"
        raise ValueError(
            f"q must be (B,N,H,d), k and v {form}, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[-2:]):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch, heads or head dim")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in FLOATS:
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device or any(
        y is not None and y.device != q.device for y in (bias, region)
    ):
        raise ValueError("q, k, v, bias and region must be on one device")
    texts, length = (k.shape[1], k.shape[2]) if several else (1, k.shape[1])
    if length == 0:
        raise ValueError("there are no keys to look at: M is 0")
    if several and (
        region.shape != q.shape[:2] or region.dtype.is_floating_point or region.dtype == torch.bool
    ):
        raise ValueError(
            f"region must be (B,N) = {tuple(q.shape[:2])} integers, not {tuple(region.shape)} of {region.dtype}"
        )
    if bias is not None:
        full = (q.shape[0], q.shape[2], q.shape[1], texts * length)
        if bias.dtype not in FLOATS:
            raise ValueError(f"bias must hold floats (-inf hides a key), not {bias.dtype}")
        if bias.ndim != 4 or any(have not in (1, want) for have, want in zip(bias.shape, full)):
            raise ValueError(
                f"bias must broadcast to (B,H,N,M) = {full} with four dimensions, not {tuple(bias.shape)}"
            )
        if bias.requires_grad and torch.is_grad_enabled():
            raise ValueError("bias takes no gradient here: pass bias.detach()")
    return texts, length


def _has_triton() -> bool:
    return HAS_TRITON


def _check_triton(q):
    if not _has_triton():
        raise ValueError(
            "the triton backend needs the triton package (Linux): pip install triton, or take backend='sdpa'"
        )
    if q.shape[-1] not in TRITON_HEAD_DIMS:
        dims = ", ".join(map(str, TRITON_HEAD_DIMS))
        raise ValueError(f"the triton backend has head dims {dims}, not {q.shape[-1]}; take backend='auto'")
    if q.dtype == torch.float64:
        raise ValueError("the triton backend has no float64; take backend='reference'")


def _triton_is_fast(q) -> bool:
    """Where `auto` takes the kernels. 16-bit only: in float32 plain PyTorch's exact products are what is wanted.

    An expectation from the roofline, not yet a measurement: `python -m bench.attention` is what settles it.
    """
    return (
        q.is_cuda
        and torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] in TRITON_HEAD_DIMS
        and _has_triton()
    )


def _sdpa(q, k, v, scale, bias, region, length):
    if bias is None and region is None and onednn.attends(q, k, v):
        return onednn.attend(q, k, v, scale)
    if region is not None:
        text = torch.arange(k.shape[1], device=k.device) // length
        own = (text == region[:, :, None])[:, None]  # (B, 1, N, M)
        zeros = q.new_zeros(()) if bias is None else bias.to(q.dtype)
        bias = torch.where(own, zeros, -torch.inf)
    if bias is not None:
        bias = bias.to(q.dtype)
        dead = (bias == -torch.inf).all(dim=-1, keepdim=True)  # PyTorch gives NaN there, and NaN gradients
        bias = bias.masked_fill(dead, 0.0).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if bias is not None:
        out = out.masked_fill(dead, 0.0)
    return out.transpose(1, 2)  # (B, N, H, d)


def _module(kernel: str):
    return reference if kernel == "reference" else importlib.import_module(".flash", __name__)


def _differentiable(*args):
    out, maps, _ = forward_op(*args) if torch.compiler.is_compiling() else _Attention.apply(*args)
    return out, maps


def _save(ctx, inputs, output):
    q, k, v, scale, bias, region, length, _, kernel = inputs
    out, _, kept = output
    ctx.save_for_backward(q, k, v, bias, region, out, kept)
    ctx.rest = scale, length, kernel
    ctx.set_materialize_grads(False)  # "no gradient" is worth knowing: whole loops are left out


def _gradients(ctx, grad_out, grad_maps, run):
    q, k, v, bias, region, out, kept = ctx.saved_tensors
    scale, length, kernel = ctx.rest
    if not out.numel():
        grad_out = None
    if grad_out is None and grad_maps is None:
        return (None,) * 9
    keys = any(ctx.needs_input_grad[1:3])
    dq, dk, dv = run(grad_out, grad_maps, q, k, v, out, kept, scale, bias, region, length, keys, kernel)
    need = ctx.needs_input_grad
    return dq if need[0] else None, dk if need[1] else None, dv if need[2] else None, *(None,) * 6


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _module(inputs[-1]).forward(*inputs[:-1])
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_maps, _):
        return _gradients(ctx, grad_out, grad_maps, lambda *args: _module(args[-1]).backward(*args[:-1]))


@torch.library.custom_op(
    "minsd::attention_forward",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor? v, float scale, Tensor? bias, Tensor? region, int length, bool probs, str kernel)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def forward_op(q, k, v, scale, bias, region, length, probs, kernel):
    return _module(kernel).forward(q, k, v, scale, bias, region, length, probs)


@torch.library.custom_op(
    "minsd::attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor? grad_out, Tensor? grad_maps, Tensor q, Tensor k, Tensor? v, Tensor out, Tensor kept, float scale, Tensor? bias,"
        " Tensor? region, int length, bool keys, str kernel) -> (Tensor, Tensor, Tensor)"
    ),
)
def backward_op(grad_out, grad_maps, q, k, v, out, kept, scale, bias, region, length, keys, kernel):
    return _module(kernel).backward(
        grad_out, grad_maps, q, k, v, out, kept, scale, bias, region, length, keys
    )


@forward_op.register_fake
def _(q, k, v, scale, bias, region, length, probs, kernel):
    b, n, h, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    whole = (b, h, n, k.shape[1])
    kept = (b, h, n) if kernel == "triton" else whole if reference.keeps(*whole) else (0,)
    return (
        q.new_empty(q.shape if v is not None else (0,)),
        q.new_empty((b, n, k.shape[1]) if probs else (0,), dtype=wide),
        q.new_empty(kept, dtype=wide),
    )


@backward_op.register_fake
def _(grad_out, grad_maps, q, k, v, out, kept, scale, bias, region, length, keys, kernel):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape if keys else (0,)),
        k.new_empty(k.shape if keys and v is not None else (0,)),
    )


forward_op.register_autograd(
    lambda ctx, grad_out, grad_maps, _: _gradients(ctx, grad_out, grad_maps, backward_op),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
)


def group_norm(x: Tensor, norm: nn.GroupNorm, add: Tensor | None = None, *, silu: bool = False) -> Tensor:
    """norm(x + add), and SiLU of it: x (B,C,h,w), add (B,C), one number a picture and channel, or None.

    On CUDA by the kernels of groupnorm.py, but where a gradient is wanted, which they have not, and under a compiler, which
    joins the three by itself.
    """
    if _norm_is_fused(x, norm, add):
        fused = importlib.import_module(".groupnorm", __name__)
        return fused.forward(x, norm.num_groups, norm.weight, norm.bias, norm.eps, add, silu)
    y = norm(x if add is None else x + add[:, :, None, None])
    return F.silu(y) if silu else y


def _norm_is_fused(x, norm, add) -> bool:
    tensors = [y for y in (x, add, norm.weight, norm.bias) if y is not None]
    return (
        x.is_cuda
        and torch.version.hip is None
        and norm.affine
        and norm.num_channels // norm.num_groups <= 256
        and len({y.dtype for y in tensors}) == 1
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and not (torch.is_grad_enabled() and any(y.requires_grad for y in tensors))
        and not torch.compiler.is_compiling()
        and _has_triton()
        and not norm._forward_pre_hooks
        and "forward" not in norm.__dict__  # someone watches it, or took its place
    )
