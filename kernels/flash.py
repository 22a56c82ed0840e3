"""FlashAttention that also returns the mean of its probabilities over heads, with a gradient: four Triton kernels.

Dao et al. 2022 and Dao 2023 keep the softmax of one block of queries in registers and walk over the keys; nothing of
size heads x N x M is ever written. What one image cell looked at is exactly what they throw away. It comes back like so.

With S = scale Q K^T + bias (per head) and P = softmax(S) by rows,

    out = P V            FlashAttention's output
    map = 1/H sum_h P    what this file adds: (B, N, M), one H-th of what "return the probabilities" costs

The map cannot be had in the forward walk: while it runs, no row knows its normaliser yet, and summing over heads would
need other blocks' registers. But the forward kernel leaves behind one number a row and head, the log-sum-exp
lse = log sum_m exp(S_m), and with it any block of P can be made again, finished, in any order: P = exp(S - lse). So a
second kernel takes one (queries x keys) block of the map, recomputes S head after head, adds the P up in registers and
writes the mean once. No atomics, a fixed order of summing: the same bits every time.

The gradient. Let dO be that of out and G that of the map. P feeds both, so

    dP = dO V^T + G / H

where only the first term depends on the head. Through a softmax row, dS = P (dP - D) with D = sum_m P dP, that is

    D = sum_m P (dO V^T)  +  1/H sum_m P G  =  sum_d dO out  +  1/H sum_m P G

The first sum is FlashAttention's trick: P V is `out`, known, so it is a product of two rows of d numbers. The second has no
such shortcut: it needs a walk over the keys before dS can be formed. (Folding both into one walk, as sum(P dP) K
subtracted at the end, subtracts two large nearly equal sums; in 16 bits little is left. Two walks it is.) Then, as ever,

    dQ = scale dS K      dK = scale dS^T Q      dV = P^T dO

    1 _forward   a block of queries walks over the keys:          out, lse
    2 _mean_map  a block of the map walks over the heads:         map
    3 _grad_q    a block of queries walks over the keys, twice:   D, then dQ
    4 _grad_kv   a block of keys walks over the queries:          dK, dV (left out where neither is wanted)

Details that matter. Exponentials are base 2 (one instruction): S is scaled by log2(e) and lse is a base-2 logarithm.
A row whose keys are all hidden has S = -inf everywhere; its lse is set to +inf, so that every later P is 2^(-inf) = 0.
Head dims that are not powers of two lie in two pieces (40 = 32 + 16 with 8 columns of zeros, 80 = 64 + 16,
160 = 128 + 32) because Triton's blocks are powers of two: padding 80 to 128 would waste 37 % of every product. With
`region`, row n sees key m only if m // length == region[n] (several texts laid end to end).
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# head dim -> its two pieces; a second of 0 is none. Blocks are at least 16 wide: tl.dot's smallest.
PIECES = {8: (16, 0), 16: (16, 0), 32: (32, 0), 40: (32, 16), 64: (64, 0), 80: (64, 16), 160: (128, 32)}

# kernel -> (queries, keys) in a block, warps, stages. Static: the interpreter has no autotuning, a table can be read, and
# the sm_90 compile test proves that none of these spills registers. To be tuned where there is a GPU.
BLOCKS = {
    "forward": (64, 64, 4, 2),
    "mean_map": (32, 32, 4, 2),
    "grad_q": (64, 32, 4, 2),
    "grad_kv": (32, 64, 8, 2),
}
BLOCKS_160 = {**BLOCKS, "forward": (64, 32, 4, 2)}  # 64 x 64 spills there, with a bias and a region


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b summed in float32. The interpreter multiplies bf16 wrongly (triton #11584): "upcast" is for it."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _rows(ptr, rows, count, stride, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of a (count, D) matrix as two pieces (rows, D0), (rows, D1), zeros outside; the second is the first if D1 is 0."""
    inside = rows[:, None] < count
    c0 = tl.arange(0, D0)[None, :]
    first = tl.load(ptr + rows[:, None] * stride + c0, mask=inside & (c0 < D), other=0.0)
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)[None, :]
        return first, tl.load(ptr + rows[:, None] * stride + c1, mask=inside & (c1 < D), other=0.0)
    else:
        return first, first


@triton.jit
def _store(ptr, rows, count, stride, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    inside = rows[:, None] < count
    c0 = tl.arange(0, D0)[None, :]
    tl.store(ptr + rows[:, None] * stride + c0, x0, mask=inside & (c0 < D))
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)[None, :]
        tl.store(ptr + rows[:, None] * stride + c1, x1, mask=inside & (c1 < D))


@triton.jit
def _product(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over both pieces: (rows of a, rows of b)."""
    s = _dot(a0, tl.trans(b0), PRECISION)
    if D1 > 0:
        s += _dot(a1, tl.trans(b1), PRECISION)
    return s


@triton.jit
def _scores(
    q0,
    q1,
    k0,
    k1,
    rows,
    cols,
    N,
    M,
    scale,
    bias,
    sb_n,
    sb_m,
    region,
    length,
    D1: tl.constexpr,
    BIAS: tl.constexpr,
    REGION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 scores log2(e) (scale q k^T + bias) of a block, -inf where a query may not look."""
    s = _product(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)  # (rows, cols)
    seen = cols[None, :] < M
    if BIAS:
        inside = (rows[:, None] < N) & seen
        s += (
            tl.load(bias + rows[:, None] * sb_n + cols[None, :] * sb_m, mask=inside, other=0.0).to(tl.float32)
            * LOG2E
        )
    if REGION:
        text = tl.load(region + rows, mask=rows < N, other=-1)
        seen = seen & ((cols // length)[None, :] == text[:, None])
    return tl.where(seen, s, -float("inf"))


@triton.jit
def _forward(
    Q,
    K,
    V,
    Out,
    Lse,
    bias,
    region,
    sq_b,
    sq_n,
    sq_h,
    sk_b,
    sk_m,
    sk_h,
    sv_b,
    sv_m,
    sv_h,
    sb_b,
    sb_h,
    sb_n,
    sb_m,
    H,
    N,
    M,
    length,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BIAS: tl.constexpr,
    REGION: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries of one head: out and lse. Without OUT, lse alone."""
    rows, h, b = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1), tl.program_id(2).to(tl.int64)
    K += b * sk_b + h * sk_h
    V += b * sv_b + h * sv_h
    bias += b * sb_b + h * sb_h
    region += b * N
    q0, q1 = _rows(Q + b * sq_b + h * sq_h, rows, N, sq_n, D, D0, D1)

    top = tl.full((BN,), -float("inf"), tl.float32)  # largest score so far
    total = tl.zeros((BN,), tl.float32)  # sum of 2^(score - top)
    o0 = tl.zeros((BN, D0), tl.float32)
    o1 = tl.zeros((BN, D1 if D1 > 0 else 16), tl.float32)
    for start in range(0, M, BM):
        cols = start + tl.arange(0, BM)
        k0, k1 = _rows(K, cols, M, sk_m, D, D0, D1)
        s = _scores(
            q0,
            q1,
            k0,
            k1,
            rows,
            cols,
            N,
            M,
            scale,
            bias,
            sb_n,
            sb_m,
            region,
            length,
            D1,
            BIAS,
            REGION,
            PRECISION,
        )
        new = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new == -float("inf"), 0.0, new)  # nothing seen yet: keep inf - inf out of it
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        top = new
        if OUT:
            v0, v1 = _rows(V, cols, M, sv_m, D, D0, D1)
            p = p.to(v0.dtype)
            o0 = o0 * shrink[:, None] + _dot(p, v0, PRECISION)
            if D1 > 0:
                o1 = o1 * shrink[:, None] + _dot(p, v1, PRECISION)
    dead = total == 0.0  # no key at all
    lse = tl.where(dead, float("inf"), top + tl.log2(tl.where(dead, 1.0, total)))
    tl.store(Lse + (b * H + h) * N + rows, lse, mask=rows < N)
    if OUT:
        share = 1.0 / tl.where(dead, 1.0, total)
        o0 = (o0 * share[:, None]).to(Out.dtype.element_ty)
        o1 = (o1 * share[:, None]).to(Out.dtype.element_ty)
        _store(Out + (b * N * H + h) * D, rows, N, H * D, o0, o1, D, D0, D1)


@triton.jit
def _mean_map(
    Q,
    K,
    Map,
    Lse,
    bias,
    region,
    sq_b,
    sq_n,
    sq_h,
    sk_b,
    sk_m,
    sk_h,
    sb_b,
    sb_h,
    sb_n,
    sb_m,
    H,
    N,
    M,
    length,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BIAS: tl.constexpr,
    REGION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of the map: heads in order, summed in registers."""
    cols, rows = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    b = tl.program_id(2).to(tl.int64)
    Q += b * sq_b
    K += b * sk_b
    bias += b * sb_b
    region += b * N
    mean = tl.zeros((BN, BM), tl.float32)
    for h in range(0, H):
        q0, q1 = _rows(Q + h * sq_h, rows, N, sq_n, D, D0, D1)
        k0, k1 = _rows(K + h * sk_h, cols, M, sk_m, D, D0, D1)
        lse = tl.load(Lse + (b * H + h) * N + rows, mask=rows < N, other=float("inf"))
        s = _scores(
            q0,
            q1,
            k0,
            k1,
            rows,
            cols,
            N,
            M,
            scale,
            bias + h * sb_h,
            sb_n,
            sb_m,
            region,
            length,
            D1,
            BIAS,
            REGION,
            PRECISION,
        )
        mean += tl.exp2(s - lse[:, None])
    inside = (rows[:, None] < N) & (cols[None, :] < M)
    tl.store(Map + b * N * M + rows[:, None] * M + cols[None, :], mean / H, mask=inside)


@triton.jit
def _map_gradient(G, rows, cols, N, M, sg_n, sg_m, H):
    inside = (rows[:, None] < N) & (cols[None, :] < M)
    return tl.load(G + rows[:, None] * sg_n + cols[None, :] * sg_m, mask=inside, other=0.0) / H


@triton.jit
def _grad_q(
    Q,
    K,
    V,
    Out,
    Lse,
    bias,
    region,
    dO,
    G,
    dQ,
    Dsum,
    sq_b,
    sq_n,
    sq_h,
    sk_b,
    sk_m,
    sk_h,
    sv_b,
    sv_m,
    sv_h,
    sb_b,
    sb_h,
    sb_n,
    sb_m,
    so_b,
    so_n,
    so_h,
    sg_b,
    sg_n,
    sg_m,
    H,
    N,
    M,
    length,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BIAS: tl.constexpr,
    REGION: tl.constexpr,
    OUT: tl.constexpr,
    MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries of one head: D (kept for `_grad_kv`) and dQ. OUT and MAP: which of dO and G there are."""
    rows, h, b = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1), tl.program_id(2).to(tl.int64)
    K += b * sk_b + h * sk_h
    V += b * sv_b + h * sv_h
    bias += b * sb_b + h * sb_h
    region += b * N
    G += b * sg_b
    q0, q1 = _rows(Q + b * sq_b + h * sq_h, rows, N, sq_n, D, D0, D1)
    lse = tl.load(Lse + (b * H + h) * N + rows, mask=rows < N, other=float("inf"))[:, None]

    dsum = tl.zeros((BN,), tl.float32)
    if OUT:
        do0, do1 = _rows(dO + b * so_b + h * so_h, rows, N, so_n, D, D0, D1)
        out0, out1 = _rows(Out + (b * N * H + h) * D, rows, N, H * D, D, D0, D1)
        dsum += tl.sum(do0.to(tl.float32) * out0.to(tl.float32), axis=1)
        if D1 > 0:
            dsum += tl.sum(do1.to(tl.float32) * out1.to(tl.float32), axis=1)
    if MAP:
        for start in range(0, M, BM):
            cols = start + tl.arange(0, BM)
            k0, k1 = _rows(K, cols, M, sk_m, D, D0, D1)
            s = _scores(
                q0,
                q1,
                k0,
                k1,
                rows,
                cols,
                N,
                M,
                scale,
                bias,
                sb_n,
                sb_m,
                region,
                length,
                D1,
                BIAS,
                REGION,
                PRECISION,
            )
            dsum += tl.sum(tl.exp2(s - lse) * _map_gradient(G, rows, cols, N, M, sg_n, sg_m, H), axis=1)
    tl.store(Dsum + (b * H + h) * N + rows, dsum, mask=rows < N)

    dq0 = tl.zeros((BN, D0), tl.float32)
    dq1 = tl.zeros((BN, D1 if D1 > 0 else 16), tl.float32)
    for start in range(0, M, BM):
        cols = start + tl.arange(0, BM)
        k0, k1 = _rows(K, cols, M, sk_m, D, D0, D1)
        s = _scores(
            q0,
            q1,
            k0,
            k1,
            rows,
            cols,
            N,
            M,
            scale,
            bias,
            sb_n,
            sb_m,
            region,
            length,
            D1,
            BIAS,
            REGION,
            PRECISION,
        )
        dp = tl.zeros((BN, BM), tl.float32)
        if OUT:
            v0, v1 = _rows(V, cols, M, sv_m, D, D0, D1)
            dp += _product(do0, do1, v0, v1, D1, PRECISION)
        if MAP:
            dp += _map_gradient(G, rows, cols, N, M, sg_n, sg_m, H)
        ds = (tl.exp2(s - lse) * (dp - dsum[:, None])).to(k0.dtype)
        dq0 += _dot(ds, k0, PRECISION)
        if D1 > 0:
            dq1 += _dot(ds, k1, PRECISION)
    dq0 = (dq0 * scale).to(dQ.dtype.element_ty)
    dq1 = (dq1 * scale).to(dQ.dtype.element_ty)
    _store(dQ + (b * N * H + h) * D, rows, N, H * D, dq0, dq1, D, D0, D1)


@triton.jit
def _grad_kv(
    Q,
    K,
    V,
    Lse,
    bias,
    region,
    dO,
    G,
    dK,
    dV,
    Dsum,
    sq_b,
    sq_n,
    sq_h,
    sk_b,
    sk_m,
    sk_h,
    sv_b,
    sv_m,
    sv_h,
    sb_b,
    sb_h,
    sb_n,
    sb_m,
    so_b,
    so_n,
    so_h,
    sg_b,
    sg_n,
    sg_m,
    H,
    N,
    M,
    length,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BIAS: tl.constexpr,
    REGION: tl.constexpr,
    OUT: tl.constexpr,
    MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys of one head: dK, and with OUT dV."""
    cols, h, b = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1), tl.program_id(2).to(tl.int64)
    Q += b * sq_b + h * sq_h
    dO += b * so_b + h * so_h
    bias += b * sb_b + h * sb_h
    region += b * N
    G += b * sg_b
    Lse += (b * H + h) * N
    Dsum += (b * H + h) * N
    k0, k1 = _rows(K + b * sk_b + h * sk_h, cols, M, sk_m, D, D0, D1)
    if OUT:
        v0, v1 = _rows(V + b * sv_b + h * sv_h, cols, M, sv_m, D, D0, D1)
        dv0 = tl.zeros((BM, D0), tl.float32)
        dv1 = tl.zeros((BM, D1 if D1 > 0 else 16), tl.float32)
    dk0 = tl.zeros((BM, D0), tl.float32)
    dk1 = tl.zeros((BM, D1 if D1 > 0 else 16), tl.float32)
    for start in range(0, N, BN):
        rows = start + tl.arange(0, BN)
        q0, q1 = _rows(Q, rows, N, sq_n, D, D0, D1)
        lse = tl.load(Lse + rows, mask=rows < N, other=float("inf"))[
            :, None
        ]  # +inf: rows past the end give P = 0
        dsum = tl.load(Dsum + rows, mask=rows < N, other=0.0)[:, None]
        s = _scores(
            q0,
            q1,
            k0,
            k1,
            rows,
            cols,
            N,
            M,
            scale,
            bias,
            sb_n,
            sb_m,
            region,
            length,
            D1,
            BIAS,
            REGION,
            PRECISION,
        )
        p = tl.exp2(s - lse)
        dp = tl.zeros((BN, BM), tl.float32)
        if OUT:
            do0, do1 = _rows(dO, rows, N, so_n, D, D0, D1)
            turned = tl.trans(p.to(do0.dtype))
            dv0 += _dot(turned, do0, PRECISION)
            if D1 > 0:
                dv1 += _dot(turned, do1, PRECISION)
            dp += _product(do0, do1, v0, v1, D1, PRECISION)
        if MAP:
            dp += _map_gradient(G, rows, cols, N, M, sg_n, sg_m, H)
        ds = tl.trans((p * (dp - dsum)).to(q0.dtype))
        dk0 += _dot(ds, q0, PRECISION)
        if D1 > 0:
            dk1 += _dot(ds, q1, PRECISION)
    at = (b * M * H + h) * D
    dk0 = (dk0 * scale).to(dK.dtype.element_ty)
    dk1 = (dk1 * scale).to(dK.dtype.element_ty)
    _store(dK + at, cols, M, H * D, dk0, dk1, D, D0, D1)
    if OUT:
        _store(dV + at, cols, M, H * D, dv0.to(dV.dtype.element_ty), dv1.to(dV.dtype.element_ty), D, D0, D1)


KERNELS = {"forward": _forward, "mean_map": _mean_map, "grad_q": _grad_q, "grad_kv": _grad_kv}
INTERPRETED = not isinstance(
    _forward, triton.runtime.JITFunction
)  # TRITON_INTERPRET=1 when this file was imported


def configuration(name: str, head_dim: int) -> tuple[dict, dict]:
    """A kernel's constants (block sizes, the pieces of the head dim) and its compiler options."""
    d0, d1 = PIECES[head_dim]
    bn, bm, warps, stages = (BLOCKS_160 if head_dim == 160 else BLOCKS)[name]
    return {"D": head_dim, "D0": d0, "D1": d1, "BN": bn, "BM": bm}, {"num_warps": warps, "num_stages": stages}


def _launch(name, blocks, like, *args, **flags):
    """Run a kernel on `blocks(queries, keys in a block)` programs. `like` is q: its device, dtype and head dim decide."""
    if not (like.is_cuda or INTERPRETED):
        raise ValueError(
            f"the triton backend needs tensors on a CUDA device, not on {like.device}; take backend='auto'"
        )
    constants, options = configuration(name, like.shape[-1])
    precision = (
        "tf32"
        if like.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 and not INTERPRETED
        else "ieee"
    )
    if INTERPRETED and like.dtype == torch.bfloat16:
        precision = "upcast"
    with torch.cuda.device(like.device if like.is_cuda else -1):
        KERNELS[name][blocks(constants["BN"], constants["BM"])](
            *args, **constants, **flags, PRECISION=precision, **options
        )


def _inner(x):
    """The kernels take any strides but the last, which must be 1."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _bias(bias, q, k):
    """A pointer and four strides, 0 where the bias is broadcast."""
    if bias is None:
        return q, (0, 0, 0, 0)
    return bias, bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1]).stride()


def _region(region, q):
    return q if region is None else region.to(torch.int32).contiguous()


def forward(q, k, v, scale, bias, region, length, probs):
    """-> (out (B,N,H,d), map (B,N,M) float32, lse (B,H,N) float32). `v` None: no out; not `probs`: no map; they are empty."""
    q, k, v = _inner(q), _inner(k), _inner(v)
    (b, n, h, d), m = q.shape, k.shape[1]
    out = torch.empty((b, n, h, d) if v is not None else 0, device=q.device, dtype=q.dtype)
    maps = torch.empty((b, n, m) if probs else 0, device=q.device, dtype=torch.float32)
    lse = torch.empty(b, h, n, device=q.device, dtype=torch.float32)
    flags = {"BIAS": bias is not None, "REGION": region is not None}
    bias, sb = _bias(bias, q, k)
    region, some_v = _region(region, q), k if v is None else v
    sizes = h, n, m, length, scale
    _launch(
        "forward",
        lambda bn, bm: (triton.cdiv(n, bn), h, b),
        q,
        q,
        k,
        some_v,
        out,
        lse,
        bias,
        region,
        *q.stride()[:3],
        *k.stride()[:3],
        *some_v.stride()[:3],
        *sb,
        *sizes,
        **flags,
        OUT=v is not None,
    )
    if probs:
        _launch(
            "mean_map",
            lambda bn, bm: (triton.cdiv(m, bm), triton.cdiv(n, bn), b),
            q,
            q,
            k,
            maps,
            lse,
            bias,
            region,
            *q.stride()[:3],
            *k.stride()[:3],
            *sb,
            *sizes,
            **flags,
        )
    return out, maps, lse


def backward(grad_out, grad_maps, q, k, v, out, lse, scale, bias, region, length, keys):
    """-> gradients of q, k and v in their shapes; those of k and v are empty unless `keys`."""
    q, k, v, grad_out = _inner(q), _inner(k), _inner(v), _inner(grad_out)
    (b, n, h, _), m = q.shape, k.shape[1]
    dq = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    dk = torch.empty(k.shape if keys else 0, device=q.device, dtype=q.dtype)
    dv = torch.zeros if grad_out is None else torch.empty
    dv = dv(k.shape if keys and v is not None else 0, device=q.device, dtype=q.dtype)
    dsum = torch.empty_like(lse)
    flags = {
        "BIAS": bias is not None,
        "REGION": region is not None,
        "OUT": grad_out is not None,
        "MAP": grad_maps is not None,
    }
    bias, sb = _bias(bias, q, k)
    region, some_v = _region(region, q), k if v is None else v
    do, so = (q, (0, 0, 0)) if grad_out is None else (grad_out, grad_out.stride()[:3])
    g, sg = (q, (0, 0, 0)) if grad_maps is None else (grad_maps, grad_maps.stride())
    strides = *q.stride()[:3], *k.stride()[:3], *some_v.stride()[:3], *sb, *so, *sg
    sizes = h, n, m, length, scale
    _launch(
        "grad_q",
        lambda bn, bm: (triton.cdiv(n, bn), h, b),
        q,
        q,
        k,
        some_v,
        out,
        lse,
        bias,
        region,
        do,
        g,
        dq,
        dsum,
        *strides,
        *sizes,
        **flags,
    )
    if keys:
        _launch(
            "grad_kv",
            lambda bn, bm: (triton.cdiv(m, bm), h, b),
            q,
            q,
            k,
            some_v,
            lse,
            bias,
            region,
            do,
            g,
            dk,
            dv,
            dsum,
            *strides,
            *sizes,
            **flags,
        )
    return dq, dk, dv
