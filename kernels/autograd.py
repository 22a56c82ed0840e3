"""Makes the backends that return maps (reference.py, materialised.py and flash.py) differentiable.

All have functions `forward` and `backward` with the same arguments. Autograd reaches them in two
ways. In eager mode it is an autograd.Function, because custom operators would add about 0.1 ms to
each forward and backward (measured on a CPU). Under torch.compile it is a pair of custom operators,
which the compiler treats as single nodes of known output shapes. There is no second derivative.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import materialised, reference

Three = tuple[Tensor, Tensor, Tensor]


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    bias: Tensor | None,
    region: Tensor | None,
    length: int,
    probs: bool,
    kernel: str,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes attention and, if `probs` is True, the map, which is the softmax averaged over
    heads. Both have first derivatives. `kernel`, the backend, is "reference", "materialised" or
    "triton". The inputs are not checked.

    q is (B,N,H,d); k and v are (B,M,H,d). The scores are `scale` q.k, to which `bias` is added if it
    is given; it broadcasts to (B,H,N,M). If `region` (B,N) is given, k and v hold several texts, one
    after another along M, with `length` keys each, and query n of image b attends only to the text
    with the number region[b,n]. Without `region`, `length` is ignored.

    Returns (out, map). `out` is (B,N,H,d), or empty if `v` is None. The map is (B,N,M), with zeros at
    keys of other texts, or empty if `probs` is False.

    `lse` (B,H,N) is log2 of the sum of exp(score) over the keys of each query, if it is already
    known; "triton" then does not compute it again. It may be given only if `kernel` is "triton" and
    `v` is None, and is ignored under torch.compile.
    """
    arguments = q, k, v, scale, bias, region, length, probs, kernel
    if torch.compiler.is_compiling():
        out, maps, _ = forward_op(*arguments)
    else:
        out, maps, _ = _Attention.apply(*arguments, lse)
    return out, maps


def _module(kernel: str) -> ModuleType:
    if kernel == "reference":
        return reference
    if kernel == "materialised":
        return materialised
    from . import flash  # imports Triton

    return flash


def _save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    """Stores in the autograd context `ctx` what `_gradients` needs. `inputs` are the arguments of
    `apply` without `lse`. `output` is (out, map, kept), the result of the backend's function
    `forward`; `kept` is the tensor that the backend's function `backward` needs."""
    q, k, v, scale, bias, region, length, _, kernel = inputs
    out, _, kept = output
    ctx.save_for_backward(q, k, v, bias, region, out, kept)
    ctx.constants = scale, length, kernel
    ctx.set_materialize_grads(False)  # None instead of zeros: backward skips what has no gradient


def _gradients(
    ctx: Any, grad_out: Tensor | None, grad_maps: Tensor | None, run: Callable[..., Three]
) -> tuple[Tensor | None, ...]:
    """Returns a tuple with the gradient of each argument of `apply` except `lse`, or None for an
    argument that needs no gradient. `grad_out` and `grad_maps` are the gradients of the output and
    of the map; None means zero. `run` is called to compute the gradients of q, k and v. It takes
    the arguments of a backend's function `backward`, and then the name of the backend."""
    q, k, v, bias, region, out, kept = ctx.saved_tensors
    scale, length, kernel = ctx.constants
    if not out.numel():
        grad_out = None
    if grad_out is None and grad_maps is None:
        return (None,) * 9
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    need_kv = need_k or need_v
    dq, dk, dv = run(grad_out, grad_maps, q, k, v, out, kept, scale, bias, region, length, need_kv, kernel)
    needed = dq if need_q else None, dk if need_k else None, dv if need_v else None
    return *needed, *(None,) * 6


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Three:
        *arguments, kernel, lse = inputs
        more = () if lse is None else (lse,)
        out, maps, kept = _module(kernel).forward(*arguments, *more)
        _save(ctx, inputs[:-1], (out, maps, kept if lse is None else lse))
        ctx.mark_non_differentiable(kept)
        return out, maps, kept

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grads[0], grads[1], _backward), None


def _backward(*args: Any) -> Three:
    return _module(args[-1]).backward(*args[:-1])


@torch.library.custom_op(
    "minsd::attention_forward",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor? v, float scale, Tensor? bias, Tensor? region, int length,"
        " bool probs, str kernel) -> (Tensor, Tensor, Tensor)"
    ),
)
def forward_op(*args: Any) -> Three:
    return _module(args[-1]).forward(*args[:-1])


@torch.library.custom_op(
    "minsd::attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor? grad_out, Tensor? grad_maps, Tensor q, Tensor k, Tensor? v, Tensor out, Tensor kept,"
        " float scale, Tensor? bias, Tensor? region, int length, bool need_kv, str kernel)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def backward_op(*args: Any) -> Three:
    return _backward(*args)


@forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    bias: Tensor | None,
    region: Tensor | None,
    length: int,
    probs: bool,
    kernel: str,
) -> Three:
    b, n, h, _ = q.shape
    m = k.shape[1]
    dtype = reference.compute_dtype(q.dtype)
    kept = (0,)
    if kernel == "triton":
        kept = (b, h, n)
    elif kernel == "materialised" or reference.keeps(b, h, n, m):
        kept = (b, h, n, m)
    return (
        q.new_empty(q.shape if v is not None else (0,)),
        q.new_empty((b, n, m) if probs else (0,), dtype=dtype),
        q.new_empty(kept, dtype=dtype),
    )


@backward_op.register_fake
def _(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    out: Tensor,
    kept: Tensor,
    scale: float,
    bias: Tensor | None,
    region: Tensor | None,
    length: int,
    need_kv: bool,
    kernel: str,
) -> Three:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape if need_kv else (0,)),
        k.new_empty(k.shape if need_kv and v is not None else (0,)),
    )


def _op_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grads[0], grads[1], backward_op)


def _op_save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    _save(ctx, inputs, output)


forward_op.register_autograd(_op_gradients, setup_context=_op_save)
