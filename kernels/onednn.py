"""Computes linear layers and attention on a CPU with oneDNN if PyTorch would use a slower library.

PyTorch contains two libraries: oneDNN for convolutions and, on x86, MKL for float32 matrix
products. MKL uses AVX-512 only on Intel's own processors. On one core of an AMD EPYC (Zen 5) the
product of 8192 x 1280 and 1280 x 320 ran at 105 GFLOP/s with MKL and at 240 with oneDNN (measured);
on Intel no gain is expected. This module calls the oneDNN operator that torch.compile substitutes
for a linear layer. It uses PyTorch's own product if that operator is missing or not supported, as
on other devices, under torch.compile, in forward-mode differentiation and in torch.func's
transforms.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

ROWS = 16  # the fewest rows for which oneDNN is faster
# Scores held at once per thread: 2 MB of float32, which fits into the caches. Twice as many scores
# took twice as long on four threads.
BLOCK = 1 << 19
LEAST = 1 << 22  # the smallest N*M*d at which the blocked loop is faster than PyTorch's attention


def available(*tensors: Tensor | None) -> bool:
    """Returns True if oneDNN's operator for linear layers can be used for `tensors`. For this they
    must all be on a CPU (None is ignored), PyTorch must have the operator, and oneDNN must be
    enabled. Under torch.compile, autocast, forward-mode differentiation and torch.func the result
    is False. Dtypes are not checked."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and all(y is None or y.device.type == "cpu" for y in tensors)
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in tensors)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x weight^T + bias with oneDNN. No gradient flows through it.

    x is (...,i), `weight` is (o,i), `bias` is (o,) or None, all of one dtype and on a CPU. The
    result is (...,o).
    """
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t()), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x weight^T + bias, as torch.nn.functional.linear does. x is (...,i), `weight` is
    (o,i), `bias` is (o,) or None. The result is (...,o).

    oneDNN computes it, which is faster on some CPUs, if the tensors are float32 and on a CPU, x has
    at least ROWS rows, and neither `weight` nor `bias` needs a gradient. PyTorch computes it
    otherwise. For 16-bit dtypes PyTorch itself uses oneDNN.
    """
    if not (
        x.dtype == weight.dtype == torch.float32
        and x.numel() >= ROWS * x.shape[-1] > 0
        and available(x, weight)
        and not _needs_grad(weight, bias)
    ):
        return F.linear(x, weight, bias)
    if _needs_grad(x):
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)


class Linear(nn.Linear):
    """An nn.Linear whose forward pass calls `linear`. If weight and bias need no gradient, this is
    faster on some CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Returns True if `attend` can compute attention of q (B,N,H,d), k and v (B,M,H,d), and is
    expected to be faster than PyTorch. It cannot if a gradient is needed, on devices other than a
    CPU, and for float64; it is expected to be faster if N*M*d is at least LEAST."""
    size = q.shape[1] * k.shape[1] * q.shape[3]
    return size >= LEAST and q.dtype != torch.float64 and available(q) and not _needs_grad(q, k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Computes softmax(scale q k^T) v on a CPU. No gradient flows through it. q is (B,N,H,d), k and
    v are (B,M,H,d). The result is (B,N,H,d) in the dtype of q.

    The queries of each head are processed in blocks, so that the scores of a block stay in the
    processor's caches. Products and sums are float32, also for 16-bit inputs.
    """
    (b, n, h, d), m = q.shape, k.shape[1]
    out = q.new_empty(b, n, h, d)
    step = max(ROWS, BLOCK * torch.get_num_threads() // m)
    for i in range(b):
        for j in range(h):
            keys = k[i, :, j].float() * scale  # (M, d)
            values = v[i, :, j].t().float().contiguous()  # (d, M)
            for start in range(0, n, step):
                rows = slice(start, start + step)
                p = product(q[i, rows, j].float(), keys).softmax(dim=-1)  # (rows, M)
                out[i, rows, j] = product(p, values)
    return out
