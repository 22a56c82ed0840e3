"""Attention with all probabilities in memory and 16-bit products, for small maps on a GPU (the map
is the softmax averaged over heads).

If a map is so small that launching kernels takes longer than running them, a few matrix products
run as fast as the kernels of flash.py, and are launched faster. Operands are 16-bit, as in
flash.py. Scores, probabilities and every sum are float32, so no score is rounded to 16 bits. The
formulas of the gradient are derived in flash.py.
"""

import torch
from torch import Tensor

from .reference import probabilities

# PyTorch 2.8 and later can return a product of 16-bit matrices in float32, on CUDA only.
HAS_WIDE_PRODUCT = hasattr(torch.ops.aten.bmm, "dtype")


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Returns the matrix products a @ b in float32, for 16-bit a (B,H,n,k) and b (B,H,k,m)."""
    if a.is_cuda and HAS_WIDE_PRODUCT:
        product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, a.shape[:2])
    return a.float() @ b.float()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    bias: Tensor | None,
    region: Tensor | None,
    length: int,
    probs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes attention with all probabilities in memory. q, k and v are 16-bit, and so is the
    output; the scores and probabilities in between are float32. The inputs must have been checked.

    Arguments and results (out, map, kept) are those of `reference.forward`, except that `kept`,
    which `backward` needs, always holds the probabilities (B,H,N,M), float32.
    """
    s = _product(q.transpose(1, 2), k.permute(0, 2, 3, 1)) * scale  # (B, H, N, M)
    p = probabilities(s, bias, region, length)
    out = q.new_empty(0)
    if v is not None:
        out = (p.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2).contiguous()
    return out, p.mean(dim=1) if probs else p.new_empty(0), p


def backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k and v from the probabilities `kept`. Arguments and results are
    those of `reference.backward`."""
    p, heads = kept, q.shape[2]
    dk = q.new_empty(0)
    dv = torch.zeros_like(k) if need_kv and v is not None else q.new_empty(0)
    dp = p.new_zeros(())
    if grad_out is not None and v is not None:
        do = grad_out.transpose(1, 2)  # (B, H, N, d)
        dp = _product(do, v.permute(0, 2, 3, 1))  # (B, H, N, M)
        if need_kv:
            dv = (p.mT.to(do.dtype) @ do).transpose(1, 2)
    if grad_maps is not None:
        dp = dp + grad_maps[:, None] / heads
    ds = p * dp
    ds = torch.addcmul(ds, p, ds.sum(dim=-1, keepdim=True), value=-1)  # p (dp - sum(p dp))
    ds = ds.to(q.dtype)
    dq = (_product(ds, k.transpose(1, 2)) * scale).to(q.dtype).transpose(1, 2)
    if need_kv:
        dk = (_product(ds.mT, q.transpose(1, 2)) * scale).to(q.dtype).transpose(1, 2)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()
