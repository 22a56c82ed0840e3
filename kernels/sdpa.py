"""Attention without probabilities: PyTorch's scaled_dot_product_attention, or oneDNN's blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, region: Tensor | None, length: int
) -> Tensor:
    """Attention on inputs already checked: shapes as in `minsd.kernels.attention` -> out (B,N,H,d).

    The keys of several texts are concatenated: M = R * length. Differentiable by autograd.
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
        # Over rows and keys, as the mask must be read; not over heads and images, which PyTorch
        # can do without memory, but not once a row was padded for its kernels (231 keys to 232).
        bias = bias.masked_fill(dead, 0.0).expand(-1, -1, q.shape[1], k.shape[1])
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    return out.transpose(1, 2)
