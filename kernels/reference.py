"""Attention in plain PyTorch: the oracle of the other backends, and the CPU's way to probabilities."""

import torch


def whole(q, k, v, scale, bias=None, probs=False):
    """Softmax attention written out, every probability in memory. Shapes as in `minsd.kernels.attention`."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, N or M, d)
    s = (q * scale) @ k.transpose(-1, -2)  # (B, H, N, M)
    if bias is not None:
        s = s + bias
    p = s.float().softmax(dim=-1) if s.dtype != torch.float64 else s.softmax(dim=-1)
    if bias is not None:
        p = p.masked_fill((s == -torch.inf).all(-1, keepdim=True), 0.0)  # a row with nothing to look at gives 0
    out = (p.to(v.dtype) @ v).transpose(1, 2)  # (B, N, H, d)
    return out, p.mean(dim=1) if probs else None
