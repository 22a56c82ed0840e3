"""Attention in plain PyTorch: the oracle of the other backends, and the CPU's way to probabilities in bounded memory.

`whole` is the definition, differentiated by autograd. `forward` and `backward` compute the same a few rows at a time and
hold at most `LIMIT` probabilities: softmax rows are independent, so nothing is approximated. Formulas: kernels/flash.py.
They are written by hand because checkpointing each chunk instead leaves the allocator holding gigabytes. Probabilities
that fit the limit whole are kept for the backward pass; of others each chunk is made once more.
"""

import torch

LIMIT = 1 << 22  # probabilities held at once: 16 MB of float32; the usual recorded layers fit whole


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _softmax(q, k, scale, bias, region, length):
    """q (B,H,n,d), k (B,H,M,d) -> (B,H,n,M); a row with every key hidden is 0."""
    s = (q * scale) @ k.transpose(-1, -2)  # (B, H, n, M)
    if bias is not None:
        s = s + bias.to(s.dtype)
    if region is not None:
        text = torch.arange(k.shape[2], device=k.device) // length  # (M,): the text each key belongs to
        s = s.masked_fill((text != region[:, :, None])[:, None], -torch.inf)
    if bias is None and region is None:
        return s.softmax(dim=-1)
    dead = (s == -torch.inf).all(
        dim=-1, keepdim=True
    )  # masked before and after: softmax would give NaN, values and gradients
    return s.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)


def whole(q, k, v, scale, bias=None, region=None, length=0):
    """Every probability in memory, any dtype. Shapes and meaning as in `minsd.kernels.attention`, with the texts of a
    region attention laid end to end in k and v (`length` keys each). Returns (out (B,N,H,d), maps (B,N,M))."""
    wide = _wide(q.dtype)
    p = _softmax(q.transpose(1, 2).to(wide), k.transpose(1, 2).to(wide), scale, bias, region, length)
    return (p @ v.transpose(1, 2).to(wide)).transpose(1, 2).to(q.dtype), p.mean(dim=1)


def _heads_first(*tensors):
    """(B,N,H,d) -> (B,H,N,d) in the dtype that sums are made in; None stays None."""
    return [None if y is None else y.transpose(1, 2).to(_wide(y.dtype)).contiguous() for y in tensors]


def _chunks(q, k, bias, region):
    """Yields (rows, and what bias and region say of these rows). q (B,H,N,d)."""
    b, h, n, _ = q.shape
    step = max(1, LIMIT // (b * h * k.shape[2]))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield (
            rows,
            (
                bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows],
                region if region is None else region[:, rows],
            ),
        )


def forward(q, k, v, scale, bias, region, length, probs):
    """-> (out (B,N,H,d), maps (B,N,M), kept), each empty where it was not asked for (`v` None: no out). `kept`, for the
    backward pass, has the probabilities (B,H,N,M) where `keeps` says so."""
    dtype, (b, n, h, d), m = q.dtype, q.shape, k.shape[1]
    q, k, v = _heads_first(q, k, v)
    out = q.new_empty((b, n, h, d) if v is not None else 0, dtype=dtype)
    maps = q.new_empty((b, n, m) if probs else 0)
    for rows, hidden in _chunks(q, k, bias, region):
        p = _softmax(q[:, :, rows], k, scale, *hidden, length)  # (B, H, n, M)
        if v is not None:
            out[:, rows] = (p @ v).transpose(1, 2)
        if probs:
            maps[:, rows] = p.mean(dim=1)
    return out, maps, p if keeps(b, h, n, m) else q.new_empty(0)


def keeps(b: int, h: int, n: int, m: int) -> bool:
    return b * h * n * m <= LIMIT


def backward(grad_out, grad_maps, q, k, v, out, kept, scale, bias, region, length, keys):
    """-> gradients of q, k and v in their shapes; those of k and v are empty unless `keys`."""
    dtype, heads = q.dtype, q.shape[2]
    q, k, v, do = _heads_first(q, k, v, grad_out)
    dq = torch.empty_like(q)
    dk = torch.zeros_like(k) if keys else q.new_empty(0)
    dv = torch.zeros_like(v) if keys and v is not None else q.new_empty(0)
    for rows, hidden in _chunks(q, k, bias, region):
        p = kept if kept.numel() else _softmax(q[:, :, rows], k, scale, *hidden, length)
        dp = 0.0 if do is None else do[:, :, rows] @ v.transpose(-1, -2)  # (B, H, n, M)
        if grad_maps is not None:
            dp = dp + grad_maps[:, None, rows] / heads
        ds = p * dp
        ds = torch.addcmul(ds, p, ds.sum(dim=-1, keepdim=True), value=-1)  # p (dp - sum(p dp))
        dq[:, :, rows] = ds @ k * scale
        if keys:
            dk += ds.transpose(-1, -2) @ q[:, :, rows] * scale
            if v is not None and do is not None:
                dv += p.transpose(-1, -2) @ do[:, :, rows]
    return tuple(
        y.transpose(1, 2).to(dtype).contiguous() if y.ndim == 4 else y.to(dtype) for y in (dq, dk, dv)
    )
