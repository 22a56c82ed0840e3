"""Computes attention without returning probabilities, by PyTorch's scaled_dot_product_attention or,
on a CPU, by oneDNN (onednn.py)."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import onednn, switches

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _order(q: Tensor) -> AbstractContextManager[object]:
    """Returns a context manager. If q is on CUDA and the switch `cudnn_first` (switches.py) is on,
    PyTorch tries cuDNN's attention before its other kernels within the `with` block. Otherwise the
    context manager changes nothing."""
    if q.is_cuda and switches.current.cudnn_first:
        return sdpa_kernel(CUDNN_FIRST, set_priority=True)
    return nullcontext()


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, region: Tensor | None, length: int
) -> Tensor:
    """Computes attention without the map. Returns the output (B,N,H,d), which autograd can
    differentiate. The inputs are not checked.

    q is (B,N,H,d); k and v are (B,M,H,d); `bias`, if given, broadcasts to (B,H,N,M). `region`
    (B,N), if given, holds the index of each query's text; k and v then hold the keys and values of
    all texts, one text after another along M, with `length` keys per text.
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
        # For a row whose keys are all hidden, PyTorch gives NaN, and NaN gradients.
        dead = (bias == -torch.inf).all(dim=-1, keepdim=True)
        # The mask is expanded over rows and keys only. PyTorch expands it over images and heads
        # itself; if that were done here, padding its rows for PyTorch's kernels (231 keys to 232)
        # would write a copy for every head.
        bias = bias.masked_fill(dead, 0.0).expand(-1, -1, q.shape[1], k.shape[1])
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    with _order(q):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    return out.transpose(1, 2)


def with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Computes attention without bias or region, by the operator that PyTorch's
    scaled_dot_product_attention would choose. q is (B,N,H,d), k and v are (B,M,H,d).

    Returns (out, lse). `out` is the output (B,N,H,d), which autograd can differentiate. `lse` is
    the natural log-sum-exp of each row of scores, (B,H,N) in float32, detached. Returns None if the
    operator does not return the log-sum-exp.
    """
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    aten = torch.ops.aten
    with _order(q):
        choice = SDPBackend(aten._fused_sdp_choice(q, k, v, scale=scale))
    if choice == SDPBackend.FLASH_ATTENTION and q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    elif choice == SDPBackend.FLASH_ATTENTION:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif choice == SDPBackend.CUDNN_ATTENTION:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    else:
        return None
    lse = lse.detach().float().reshape(q.shape[:3])  # cuDNN's is (B, H, N, 1)
    return out.transpose(1, 2), lse.contiguous()
