"""Attention in plain PyTorch: its definition, and a form in bounded memory.

`whole` is the definition, differentiated by autograd; the other backends are tested against it.
`forward` and `backward` compute the same output, map and gradients, a few rows at a time, and hold
at most `LIMIT` probabilities. Rows of a softmax are independent, so nothing is approximated.
flash.py derives the formulas of `backward`. Autograd with a checkpoint per block of rows would not
need these formulas, but made the allocator hold gigabytes. `forward` keeps the probabilities if
their number is within the limit; otherwise `backward` recomputes them block by block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# The most probabilities held at once. It is 16 MB of float32, which the self-attention of 8 images
# with 8 heads at 16x16 cells fills.
LIMIT = 1 << 22


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which scores, probabilities and sums are computed for inputs of `dtype`:
    float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _softmax(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None, region: Tensor | None, length: int
) -> Tensor:
    """Returns the attention probabilities (B,H,n,M) of n queries, q (B,H,n,d), and M keys, k
    (B,H,M,d). A query whose keys are all hidden has probabilities 0. `bias`, `region` and `length`
    are passed on to `probabilities`."""
    return probabilities((q * scale) @ k.transpose(-1, -2), bias, region, length)


def probabilities(s: Tensor, bias: Tensor | None, region: Tensor | None, length: int) -> Tensor:
    """Returns the softmax over the keys of s + bias, (B,H,n,M). s (B,H,n,M) holds the scores of n
    queries and M keys; `bias` broadcasts to it, or is None. A query whose keys all have the score
    -inf has probabilities 0.

    `region` (B,n), if given, holds the index of each query's text. The M keys are then those of all
    texts, one text after another, with `length` keys per text; the keys of other texts are hidden
    from the query.
    """
    if bias is not None:
        s = s + bias.to(s.dtype)
    if region is not None:
        text = torch.arange(s.shape[3], device=s.device) // length  # (M,): the text of each key
        s = s.masked_fill((text != region[:, :, None])[:, None], -torch.inf)
    if bias is None and region is None:
        return s.softmax(dim=-1)
    # Such rows are filled before the softmax as well, since -inf throughout would give NaN values
    # and gradients.
    dead = (s == -torch.inf).all(dim=-1, keepdim=True)
    return s.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)


def whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    region: Tensor | None = None,
    length: int = 0,
) -> tuple[Tensor, Tensor]:
    """Computes attention with all probabilities in memory, by operations that autograd can
    differentiate any number of times. Inputs may have any floating-point dtype.

    q is (B,N,H,d); k and v are (B,M,H,d); `bias`, if given, broadcasts to (B,H,N,M). `region`
    (B,N), if given, holds the index of each query's text; k and v then hold the keys and values of
    all texts, one text after another along M, with `length` keys per text.

    Returns (out, map). `out` is (B,N,H,d) in the dtype of q. The map is the softmax averaged over
    heads, (B,N,M); it is float64 for float64 inputs, otherwise float32.
    """
    dtype = compute_dtype(q.dtype)
    p = _softmax(q.transpose(1, 2).to(dtype), k.transpose(1, 2).to(dtype), scale, bias, region, length)
    return (p @ v.transpose(1, 2).to(dtype)).transpose(1, 2).to(q.dtype), p.mean(dim=1)


def _heads_first(y: Tensor) -> Tensor:
    """Returns y (B,N,H,d) as a contiguous tensor (B,H,N,d). Float64 stays float64; any other dtype
    becomes float32."""
    return y.transpose(1, 2).to(compute_dtype(y.dtype)).contiguous()


def _chunks(
    q: Tensor, k: Tensor, bias: Tensor | None, region: Tensor | None
) -> Iterator[tuple[slice, Tensor | None, Tensor | None]]:
    """Splits the N queries of q (B,H,N,d) into blocks. A block is as large as possible without its
    probabilities, for all images, heads and keys, being more than `LIMIT` numbers; it has at least
    one query. k is (B,H,M,d).

    Yields (rows, bias_rows, region_rows) for each block: the slice of its queries, and the parts of
    `bias` and `region` for these queries, or None where `bias` or `region` is None.
    """
    b, h, n, _ = q.shape
    step = max(1, LIMIT // (b * h * k.shape[2]))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        bias_rows = bias
        if bias is not None and bias.shape[2] > 1:  # 1: shared by all rows
            bias_rows = bias[:, :, rows]
        yield rows, bias_rows, None if region is None else region[:, rows]


def keeps(b: int, h: int, n: int, m: int) -> bool:
    """Returns True if `forward` keeps all probabilities for `backward`. It does so if their number
    b*h*n*m is at most `LIMIT`, for b images, h heads, n queries and m keys."""
    return b * h * n * m <= LIMIT


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
    """Computes attention block by block, with at most `LIMIT` probabilities in memory at a time.
    The inputs are not checked.

    q is (B,N,H,d); k and v are (B,M,H,d); `bias`, if given, broadcasts to (B,H,N,M). `region`
    (B,N), if given, holds the index of each query's text; k and v then hold the keys and values of
    all texts, one text after another along M, with `length` keys per text.

    Returns (out, map, kept). `out` is (B,N,H,d) in the dtype of q, or empty if `v` is None. `map`
    is the softmax averaged over heads, (B,N,M), or empty if `probs` is False; it is float64 for
    float64 inputs, otherwise float32. `kept`, for `backward`, holds all probabilities (B,H,N,M), or
    is empty if there are more than `LIMIT`.
    """
    dtype = q.dtype
    (b, n, h, d), m = q.shape, k.shape[1]
    q = _heads_first(q)
    k = _heads_first(k)
    v = None if v is None else _heads_first(v)
    out = q.new_empty((b, n, h, d) if v is not None else 0, dtype=dtype)
    maps = q.new_empty((b, n, m) if probs else 0)
    p = q.new_empty(0)
    for rows, bias_rows, region_rows in _chunks(q, k, bias, region):
        p = _softmax(q[:, :, rows], k, scale, bias_rows, region_rows, length)  # (B, H, n, M)
        if v is not None:
            out[:, rows] = (p @ v).transpose(1, 2)
        if probs:
            maps[:, rows] = p.mean(dim=1)
    return out, maps, p if keeps(b, h, n, m) else q.new_empty(0)


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
    None means zero. `kept` is the third result of `forward`. The other arguments are those of
    `forward`, except `out`, which is not read; flash.py's `backward`, which has the same arguments,
    needs it.
    """
    dtype, heads = q.dtype, q.shape[2]
    q = _heads_first(q)
    k = _heads_first(k)
    v = None if v is None else _heads_first(v)
    do = None if grad_out is None else _heads_first(grad_out)
    dq = torch.empty_like(q)
    dk = torch.zeros_like(k) if need_kv else q.new_empty(0)
    dv = torch.zeros_like(v) if need_kv and v is not None else q.new_empty(0)
    for rows, bias_rows, region_rows in _chunks(q, k, bias, region):
        if kept.numel():
            p = kept
        else:
            p = _softmax(q[:, :, rows], k, scale, bias_rows, region_rows, length)
        dp = 0.0 if do is None or v is None else do[:, :, rows] @ v.transpose(-1, -2)  # (B, H, n, M)
        if grad_maps is not None:
            dp = dp + grad_maps[:, None, rows] / heads
        ds = p * dp
        ds = torch.addcmul(ds, p, ds.sum(dim=-1, keepdim=True), value=-1)  # p (dp - sum(p dp))
        dq[:, :, rows] = ds @ k * scale
        if need_kv:
            dk += ds.transpose(-1, -2) @ q[:, :, rows] * scale
            if v is not None and do is not None:
                dv += p.transpose(-1, -2) @ do[:, :, rows]
    dq, dk, dv = (y.transpose(1, 2) if y.ndim == 4 else y for y in (dq, dk, dv))
    return dq.to(dtype).contiguous(), dk.to(dtype).contiguous(), dv.to(dtype).contiguous()
