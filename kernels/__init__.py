"""Attention that can also tell where it looked: one entry, `attention()`, several backends."""

import torch.nn.functional as F

BACKENDS = ("auto", "triton", "sdpa", "reference")


def attention(q, k, v, *, scale=None, bias=None, probs=None, backend="auto"):
    """PLACEHOLDER signature, being written."""
    s = scale if scale is not None else q.shape[-1] ** -0.5
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=s
    ).transpose(1, 2)
    if probs is None:
        return out, None
    p = (q.transpose(1, 2).float() @ k.transpose(1, 2).float().transpose(-1, -2) * s).softmax(-1).mean(1)
    return out, p
