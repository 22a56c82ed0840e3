"""Computes attention without probabilities, by PyTorch's scaled_dot_product_attention or, on a CPU,
by oneDNN (onednn.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, region: Tensor | None, length: int
) -> Tensor:
    """Computes attention on inputs already checked, and returns out (B,N,H,d), differentiable.

    Shapes are those of `minsd.kernels.attention`, except that the keys of several texts are
    concatenated: M = R * length.
    """
    if bias is None and region is None and onednn.attends(q, k, v):
        return onednn.attend(q, k, v, scale)
    if region is not None:
        text = torch.arange(k.shape[1], device=k.device) // length
        own = (text == region[:, :, None])[:, None]  # (B, 1, N, M)
        bias = torch.where(own, q.new_zeros(()) if bias is None else bias.to(q.dtype), -torch.inf)
    dead = None
    if bias is not None:
        bias = bias.to(q.dtype)
        # PyTorch gives NaN, and NaN gradients, for a row whose keys are all hidden.
        dead = (bias == -torch.inf).all(dim=-1, keepdim=True)
        # The mask is expanded over rows and keys only. PyTorch expands it over images and heads
        # itself; if that were done here, padding its rows for PyTorch's kernels (231 keys to 232)
        # would write a copy for every head.
        bias = bias.masked_fill(dead, 0.0).expand(-1, -1, q.shape[1], k.shape[1])
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    return out.transpose(1, 2)
