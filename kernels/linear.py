"""x W^T + b on the CPU by oneDNN: the half of a UNet's products that PyTorch gives to a slower library.

PyTorch brings two: oneDNN for convolutions, and on x86 MKL for float32 matrix products, which leaves AVX-512 to Intel's own
processors. Measured on one core of an AMD EPYC (Zen 5), 8192 x 1280 times 1280 x 320: 105 GFLOP/s by MKL, 240 by oneDNN. The
operator called here is the one that PyTorch's own compiler puts in place of a linear layer; where it is missing, or for
anything but float32 on a CPU, `linear` is PyTorch's. The weight is frozen: only x gets a gradient.
"""

import torch
import torch.nn.functional as F
from torch import nn

ROWS = 16  # fewer are a vector's work, not a matrix's: nothing is gained


def _fast(x, weight, bias) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() >= ROWS * x.shape[-1] > 0
        and not (torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)))
        and torch._C._get_mkldnn_enabled() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


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


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As torch.nn.functional.linear: x (...,i), weight (o,i), bias (o,) -> (...,o)."""
    if not _fast(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer whose weights are frozen."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)
