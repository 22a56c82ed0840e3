"""Attention in plain PyTorch: the oracle of the other backends, and the CPU's way to probabilities."""

import torch


def whole(q, k, v, scale, bias=None, probs=False):
    """Softmax attention written out, every probability in memory. Shapes as in `minsd.kernels.attention`."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, N or M, d)
    s = (q * scale) @ k.transpose(-1, -2)  # (B, H, N, M)
    s = s.float() if s.dtype in (torch.float16, torch.bfloat16) else s
    dead = None
    if bias is not None:
        s = s + bias
        dead = (s == -torch.inf).all(dim=-1, keepdim=True)  # (B, H, N, 1): rows with nothing to look at give 0
        s = s.masked_fill(dead, 0.0)  # before the softmax: it would give NaN there, and its gradient too
    p = s.softmax(dim=-1)
    if dead is not None:
        p = p.masked_fill(dead, 0.0)
    out = (p.to(v.dtype) @ v).transpose(1, 2)  # (B, N, H, d)
    return out, p.mean(dim=1) if probs else None
