"""Matrix products on the CPU by oneDNN, where PyTorch gives them to a slower library: linear layers and attention.

PyTorch brings two: oneDNN for convolutions, and on x86 MKL for float32 matrix products, which leaves AVX-512 to Intel's own
processors. Measured on one core of an AMD EPYC (Zen 5), 8192 x 1280 times 1280 x 320: 105 GFLOP/s by MKL, 240 by oneDNN. The
operator called here is the one that PyTorch's own compiler puts in place of a linear layer. Where it is missing, under a
compiler, in forward mode or torch.func's transforms, which it does not know, and on any other device everything is PyTorch's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

ROWS = 16  # fewer are a vector's work, not a matrix's: nothing is gained
BLOCK = (
    1 << 19
)  # scores held at once by each thread: 2 MB, what caches hold (twice as many took twice as long on four threads)
LEAST = 1 << 22  # queries x keys x head dim from which attention in blocks of Python pays


def available(*tensors: Tensor | None) -> bool:
    """Whether these can go through oneDNN's operator, whatever their dtype."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and all(y is None or y.device.type == "cpu" for y in tensors)
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _grows(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted of any."""
    return torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in tensors)


def _product(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.t()), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear: x (...,i), weight (o,i), bias (o,) -> (...,o). The weight is frozen: only x gets a
    gradient here; in float32 alone, for 16 bits are PyTorch's oneDNN's already."""
    if not (
        x.dtype == weight.dtype == torch.float32
        and x.numel() >= ROWS * x.shape[-1] > 0
        and available(x, weight)
        and not _grows(weight, bias)
    ):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if _grows(x) else _product(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer whose weights are frozen."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` takes these, and is the faster for them."""
    size = q.shape[1] * k.shape[1] * q.shape[3]
    return size >= LEAST and q.dtype != torch.float64 and available(q) and not _grows(q, k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v: q (B,N,H,d), k and v (B,M,H,d) -> (B,N,H,d), without a gradient. A block of one head's rows at a
    time, so that its scores stay in the caches; in float32 within, for 16 bits too."""
    (b, n, h, d), m = q.shape, k.shape[1]
    out, step = q.new_empty(b, n, h, d), max(ROWS, BLOCK * torch.get_num_threads() // m)
    for i in range(b):
        for j in range(h):
            keys, values = k[i, :, j].float() * scale, v[i, :, j].t().float().contiguous()  # (M, d), (d, M)
            for start in range(0, n, step):
                rows = slice(start, start + step)
                p = _product(q[i, rows, j].float(), keys).softmax(dim=-1)  # (rows, M)
                out[i, rows, j] = _product(p, values)
    return out
