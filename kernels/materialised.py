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
    """Returns the matrix products a @ b, (B,H,n,m) in float32, for a (B,H,n,k) and b (B,H,k,m) in
    float16 or bfloat16."""
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
    """Computes attention with all probabilities in memory. q (B,N,H,d), k and v (B,M,H,d) are
    float16 or bfloat16; scores and probabilities are float32. The inputs are not checked.

    `bias`, if given, broadcasts to (B,H,N,M). `region` (B,N), if given, holds the index of each
    query's text; k and v then hold the keys and values of all texts, one text after another along
    M, with `length` keys per text.

    Returns (out, map, kept). `out` is (B,N,H,d) in the dtype of `v`, or empty if `v` is None. `map`
    is the softmax averaged over heads, (B,N,M) in float32, or empty if `probs` is False. `kept`
    holds the probabilities for `backward`, (B,H,N,M) in float32.
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
    """Computes the gradients of q, k and v. Returns (dq, dk, dv), each in the shape of its input.
    If `need_kv` is False, dk and dv are empty instead. If `v` is None, dv is empty.

    `grad_out` (B,N,H,d) and `grad_maps` (B,N,M) are the gradients of the output and of the map;
    None means zero. `kept` holds the probabilities (B,H,N,M), the third result of `forward`. q, k,
    v and `scale` are those of `forward`. `out`, `bias`, `region` and `length` are not read; every
    backend's `backward` has the same arguments.
    """
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
