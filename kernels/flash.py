"""FlashAttention that also returns its probabilities averaged over heads, with a gradient.

FlashAttention (Dao et al. 2022; Dao 2023) keeps the softmax of one block of queries in registers
while it loops over the keys, and never writes anything of size heads x N x M. It therefore discards
the probabilities, which show where each image cell attends. The four Triton kernels of this file
also return these probabilities averaged over heads (the map), and still write nothing of size
heads x N x M.

With S = scale Q K^T + bias (per head) and P = softmax(S) by rows,

    out = P V            FlashAttention's output, (B, N, H, d)
    map = 1/H sum_h P    the addition, (B, N, M): one H-th of the size of all heads' probabilities

The loop that computes `out` cannot also compute the map, because a row's normaliser is known only
after the loop, and because the sum over heads would need the registers of other blocks. But the
forward kernel stores one number per row and head, the log-sum-exp lse = log sum_m exp(S_m), and
with it any block of P can be recomputed, normalised, in any order: P = exp(S - lse). So a second
kernel takes one (queries x keys) block of the map, recomputes S head by head, sums the P in
registers and writes the mean once. Repeated runs are bit-identical, because there are no atomics
and the order of summation is fixed.

The gradient. Let dO be the gradient of out and G that of the map. Both depend on P, so

    dP = dO V^T + G / H

where only the first term depends on the head. The gradient of a softmax row is dS = P (dP - D)
with D = sum_m P dP, that is

    D = sum_m P (dO V^T)  +  1/H sum_m P G  =  sum_d dO out  +  1/H sum_m P G

The first sum is FlashAttention's shortcut. Since P V is the stored `out`, the sum is a dot product
of two rows of d numbers. The second sum has no shortcut. It takes a loop over the keys, before a
second loop can form dS. (One loop for both, which subtracted sum(P dP) K at the end, would take the
difference of two large, nearly equal sums and lose most digits in 16 bits.) As in any attention,

    dQ = scale dS K      dK = scale dS^T Q      dV = P^T dO

    kernel       a program takes      loops over    and computes
    1 _forward   a block of queries   keys          out, lse
    2 _mean_map  a block of the map   heads         map
    3 _grad_q    a block of queries   keys, twice   D, then dQ
    4 _grad_kv   a block of keys      queries       dK, dV (skipped if not needed)

Details that matter. Exponentials are base 2, which is one instruction, so S is scaled by log2(e)
and lse is a base-2 logarithm. A row whose keys are all hidden has S = -inf everywhere; its lse is
set to +inf, so that every later P is 2^(-inf) = 0. Triton's blocks are powers of two, so a head dim
that is not one is split into two pieces (40 = 32 + 16 with 8 columns of zeros, 80 = 64 + 16,
160 = 128 + 32), because padding 80 to 128 would waste 37 % of every product. With `region`, row n
attends to key m only if m // length == region[n] (several texts concatenated).

Evidence. Outputs and gradients agree with float64 in Triton's interpreter. How many registers the
compiled kernels spill is stated at `BLOCKS`. The speed on a GPU is expected, not measured.
"""

# Triton's compiler gives kernels their types. Pyright takes a call from one kernel to another for a
# function that never returns.
# pyright: reportGeneralTypeIssues=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import switches

LOG2E = tl.constexpr(1.4426950408889634)

# head dim -> its two pieces; a second piece of 0 means none. No piece is narrower than 16, the
# least tl.dot takes.
PIECES = {8: (16, 0), 16: (16, 0), 32: (32, 0), 40: (32, 16), 64: (64, 0), 80: (64, 16), 160: (128, 32)}

# (queries per block, keys per block, warps, stages). The table is fixed, because the interpreter has
# no autotuning. Every entry is expected to be good, not measured on a GPU. All 350 16-bit variants
# that `auto` may choose were compiled for sm_80, 86, 89, 90 and 120 with Triton 3.6.0 and 3.7.1. They
# spill at most 64 bytes of a thread's registers, except the forward with a bias and no region on
# sm_120 with Triton 3.7.1, which spills up to 224.
Blocks = tuple[int, int, int, int]
BLOCKS: dict[str, Blocks] = {
    "forward": (64, 64, 4, 2),
    "mean_map": (32, 32, 4, 2),
    "grad_q": (64, 32, 4, 2),
    "grad_kv": (32, 64, 8, 2),
}
# Entries for head dims at which those of BLOCKS spill, because a thread holds more of a wide head.
BLOCKS_OF: dict[tuple[str, int], Blocks] = {
    ("forward", 160): (64, 32, 8, 2),
    ("grad_q", 80): (64, 32, 8, 2),
    ("grad_q", 160): (64, 16, 4, 2),
    ("grad_kv", 64): (32, 32, 4, 2),
    ("grad_kv", 80): (32, 32, 4, 2),
    ("grad_kv", 160): (64, 16, 4, 1),
}
MASKED_FORWARD: Blocks = (64, 32, 4, 2)  # because with a bias or a region 64 x 64 spills
WIDE_160: Blocks = (16, 32, 4, 1)  # float32, where larger blocks exceed most cards' shared memory
MAP_64: Blocks = (64, 64, 4, 2)
MAP_128: Blocks = (128, 64, 8, 2)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """Returns the matrix product a @ b, summed in float32.

    PRECISION is the input_precision of tl.dot, or "upcast". "upcast" converts the inputs to float32
    first. It is for bfloat16 in Triton's interpreter, which multiplies bfloat16 wrongly (triton
    #11584).
    """
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _rows(ptr, rows, count, stride, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Loads some rows of a (count, D) matrix that begins at the pointer `ptr`. `rows` holds the
    indices of these rows, and `stride` is the number of elements from one row of the matrix to the
    next.

    Returns the rows in two pieces: the first D0 columns, (rows, D0), and the next D1 columns,
    (rows, D1). D0 + D1 may exceed D, and indices may exceed count; entries outside the matrix are
    0. If D1 is 0 there is no second piece, and the first piece is returned twice.
    """
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
    """Stores rows in a (count, D) matrix that begins at the pointer `ptr`. `rows` holds their
    indices, and `stride` is the number of elements from one row of the matrix to the next. x0
    (rows, D0) holds the first D0 columns of the rows, x1 (rows, D1) the next D1 columns; x1 is
    ignored if D1 is 0. Entries outside the matrix are not stored."""
    inside = rows[:, None] < count
    c0 = tl.arange(0, D0)[None, :]
    tl.store(ptr + rows[:, None] * stride + c0, x0, mask=inside & (c0 < D))
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)[None, :]
        tl.store(ptr + rows[:, None] * stride + c1, x1, mask=inside & (c1 < D))


@triton.jit
def _product(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Returns the matrix product a b^T, (rows of a, rows of b). The columns of a are given in two
    pieces, a0 and a1, and those of b in b0 and b1, as `_rows` returns them. If D1 is 0, a0 and b0
    hold all columns, and a1 and b1 are ignored."""
    s = _dot(a0, tl.trans(b0), PRECISION)
    if D1 > 0:
        s += _dot(a1, tl.trans(b1), PRECISION)
    return s


@triton.jit
def _scores(
    q0, q1,  # (rows, D0), (rows, D1): the pieces of a block of queries
    k0, k1,  # (cols, D0), (cols, D1): the pieces of a block of keys
    rows, cols,  # indices of these queries (0 to N) and keys (0 to M)
    N, M, scale,
    bias, sb_n, sb_m,  # at this image and head: pointer, strides per query and key
    region, length,  # at this image: pointer to N text numbers; keys per text
    D1: tl.constexpr, BIAS: tl.constexpr, REGION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the scores log2(e) (scale q k^T + bias) of a block of queries and a block of keys,
    (rows, cols). The factor log2(e) makes exp2 of a score the exponential of the softmax. The
    scores of hidden keys are -inf.

    q is given in two pieces of columns, q0 and q1, and k in k0 and k1, as `_rows` returns them.
    `rows` and `cols` are the indices of the block's queries and keys, among the image's N queries
    and M keys. `bias` is a pointer, read only if BIAS is set; sb_n and sb_m are its strides per
    query and per key. `region` points to the index of each query's text, and is read only if REGION
    is set; `length` is the number of keys per text.
    """
    s = _product(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)  # (rows, cols)
    visible = cols[None, :] < M
    if BIAS:
        inside = (rows[:, None] < N) & visible
        block = tl.load(bias + rows[:, None] * sb_n + cols[None, :] * sb_m, mask=inside, other=0.0)
        s += block.to(tl.float32) * LOG2E
    if REGION:
        text = tl.load(region + rows, mask=rows < N, other=-1)
        visible = visible & ((cols // length)[None, :] == text[:, None])
    return tl.where(visible, s, -float("inf"))


@triton.jit
def _forward(
    Q, K, V,  # read: (B, N, H, D), (B, M, H, D), (B, M, H, D), each row of D contiguous
    Out,  # written with OUT: (B, N, H, D), contiguous
    Lse,  # written: (B, H, N) float32, contiguous
    bias,  # read with BIAS: (B, H, N, M), a stride of 0 along broadcast dimensions
    region,  # read with REGION: (B, N) int32, contiguous, the text of each query
    sq_b, sq_n, sq_h,  # strides of Q in elements: per image, query, head
    sk_b, sk_m, sk_h,  # strides of K: per image, key, head
    sv_b, sv_m, sv_h,  # strides of V: per image, key, head
    sb_b, sb_h, sb_n, sb_m,  # strides of bias: per image, head, query, key
    H, N, M, length, scale,  # heads, queries, keys, keys per text, factor of the scores
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,  # head dim and its pieces
    BN: tl.constexpr, BM: tl.constexpr,  # queries and keys per block
    BIAS: tl.constexpr, REGION: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A Triton kernel. Each program takes one block of BN queries of one head, and computes two
    results for them: the rows of the output, and lse, the base-2 log-sum-exp of each row of scores.
    If OUT is not set, it computes lse only, and neither reads V nor writes Out.

    The keys are read in blocks of BM. H, N and M are the numbers of heads, queries and keys, and
    `length` is the number of keys per text. D is the head dim; D0 and D1 are the widths of the two
    pieces into which it is split. Strides are named after the tensor and the dimension: sq_n is the
    stride of Q per query. BIAS and REGION state whether `bias` and `region` are given.
    """
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
        s = _scores(q0, q1, k0, k1, rows, cols, N, M, scale, bias, sb_n, sb_m, region, length,
                    D1, BIAS, REGION, PRECISION)  # fmt: skip
        new = tl.maximum(top, tl.max(s, axis=1))
        # While every key so far is hidden, new is -inf: subtracting 0 avoids inf - inf.
        base = tl.where(new == -float("inf"), 0.0, new)
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
    dead = total == 0.0  # every key is hidden
    lse = tl.where(dead, float("inf"), top + tl.log2(tl.where(dead, 1.0, total)))
    tl.store(Lse + (b * H + h) * N + rows, lse, mask=rows < N)
    if OUT:
        inverse = 1.0 / tl.where(dead, 1.0, total)
        o0 = (o0 * inverse[:, None]).to(Out.dtype.element_ty)
        o1 = (o1 * inverse[:, None]).to(Out.dtype.element_ty)
        _store(Out + (b * N * H + h) * D, rows, N, H * D, o0, o1, D, D0, D1)


@triton.jit
def _mean_map(
    Q, K,  # read: (B, N, H, D), (B, M, H, D), each row of D contiguous
    Map,  # written: (B, N, M) float32, contiguous
    Lse,  # read: (B, H, N) float32, from `_forward`
    bias,  # read with BIAS: (B, H, N, M), a stride of 0 along broadcast dimensions
    region,  # read with REGION: (B, N) int32, contiguous
    sq_b, sq_n, sq_h,  # strides of Q in elements: per image, query, head
    sk_b, sk_m, sk_h,  # strides of K: per image, key, head
    sb_b, sb_h, sb_n, sb_m,  # strides of bias: per image, head, query, key
    H, N, M, length, scale,  # heads, queries, keys, keys per text, factor of the scores
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,  # head dim and its pieces
    BN: tl.constexpr, BM: tl.constexpr,  # queries and keys per block
    BIAS: tl.constexpr, REGION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A Triton kernel. Each program computes one block of the map (the softmax averaged over
    heads), of BN queries and BM keys, from Q, K and the log-sum-exp that `_forward` stored in Lse.
    It adds up the heads in order, in registers."""
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
        s = _scores(q0, q1, k0, k1, rows, cols, N, M, scale, bias + h * sb_h, sb_n, sb_m, region, length,
                    D1, BIAS, REGION, PRECISION)  # fmt: skip
        mean += tl.exp2(s - lse[:, None])
    inside = (rows[:, None] < N) & (cols[None, :] < M)
    tl.store(Map + b * N * M + rows[:, None] * M + cols[None, :], mean / H, mask=inside)


@triton.jit
def _map_gradient(G, rows, cols, N, M, sg_n, sg_m, H):
    """Loads a block of G, the gradient of the map, and returns it divided by the number of heads H.
    This is the map's part of the gradient of the probabilities, and is the same for every head.

    `rows` and `cols` are the indices of the block's queries and keys. G is (N, M) with the strides
    sg_n and sg_m. Entries outside it are 0.
    """
    inside = (rows[:, None] < N) & (cols[None, :] < M)
    return tl.load(G + rows[:, None] * sg_n + cols[None, :] * sg_m, mask=inside, other=0.0) / H


@triton.jit
def _place(HEADS_FASTEST: tl.constexpr):
    """Returns (block, head, image), three indices: the part of the work that this program of a
    gradient kernel has to do. The launch grid, which `_grid` makes, is (heads, blocks, images) if
    HEADS_FASTEST is True, otherwise (blocks, heads, images)."""
    if HEADS_FASTEST:
        return tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    else:
        return tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)


@triton.jit
def _grad_q(
    Q, K, V,  # read: (B, N, H, D), (B, M, H, D), (B, M, H, D), each row of D contiguous
    Out,  # read with OUT: (B, N, H, D), contiguous, from `_forward`
    Lse,  # read: (B, H, N) float32, from `_forward`
    bias,  # read with BIAS: (B, H, N, M), a stride of 0 along broadcast dimensions
    region,  # read with REGION: (B, N) int32, contiguous
    dO,  # read with OUT: (B, N, H, D), gradient of out, each row of D contiguous
    G,  # read with MAP: (B, N, M) float32, gradient of the map
    dQ,  # written: (B, N, H, D), contiguous
    Dsum,  # written: (B, H, N) float32, the D of each row, for `_grad_kv`
    sq_b, sq_n, sq_h,  # strides of Q in elements: per image, query, head
    sk_b, sk_m, sk_h,  # strides of K: per image, key, head
    sv_b, sv_m, sv_h,  # strides of V: per image, key, head
    sb_b, sb_h, sb_n, sb_m,  # strides of bias: per image, head, query, key
    so_b, so_n, so_h,  # strides of dO: per image, query, head
    sg_b, sg_n, sg_m,  # strides of G: per image, query, key
    H, N, M, length, scale,  # heads, queries, keys, keys per text, factor of the scores
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,  # head dim and its pieces
    BN: tl.constexpr, BM: tl.constexpr,  # queries and keys per block
    HEADS_FASTEST: tl.constexpr,  # whether neighbouring programs are heads, or blocks
    BIAS: tl.constexpr, REGION: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A Triton kernel. Each program takes one block of BN queries of one head. It first computes,
    for each query, the sum over the keys of P dP, and writes it to Dsum for `_grad_kv`; P are the
    probabilities and dP their gradient. It then computes dQ, the gradient of Q. The head of this
    file derives both.

    OUT states whether the output has a gradient, dO, and MAP whether the map has a gradient, G.
    """
    block, h, b = _place(HEADS_FASTEST)
    rows = block * BN + tl.arange(0, BN)
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
            s = _scores(q0, q1, k0, k1, rows, cols, N, M, scale, bias, sb_n, sb_m, region, length,
                        D1, BIAS, REGION, PRECISION)  # fmt: skip
            dsum += tl.sum(tl.exp2(s - lse) * _map_gradient(G, rows, cols, N, M, sg_n, sg_m, H), axis=1)
    tl.store(Dsum + (b * H + h) * N + rows, dsum, mask=rows < N)

    dq0 = tl.zeros((BN, D0), tl.float32)
    dq1 = tl.zeros((BN, D1 if D1 > 0 else 16), tl.float32)
    for start in range(0, M, BM):
        cols = start + tl.arange(0, BM)
        k0, k1 = _rows(K, cols, M, sk_m, D, D0, D1)
        s = _scores(q0, q1, k0, k1, rows, cols, N, M, scale, bias, sb_n, sb_m, region, length,
                    D1, BIAS, REGION, PRECISION)  # fmt: skip
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
    Q, K, V,  # read: (B, N, H, D), (B, M, H, D), (B, M, H, D), each row of D contiguous
    Lse,  # read: (B, H, N) float32, from `_forward`
    bias,  # read with BIAS: (B, H, N, M), a stride of 0 along broadcast dimensions
    region,  # read with REGION: (B, N) int32, contiguous
    dO,  # read with OUT: (B, N, H, D), gradient of out, each row of D contiguous
    G,  # read with MAP: (B, N, M) float32, gradient of the map
    dK, dV,  # written, dV only with OUT: (B, M, H, D), contiguous
    Dsum,  # read: (B, H, N) float32, from `_grad_q`
    sq_b, sq_n, sq_h,  # strides of Q in elements: per image, query, head
    sk_b, sk_m, sk_h,  # strides of K: per image, key, head
    sv_b, sv_m, sv_h,  # strides of V: per image, key, head
    sb_b, sb_h, sb_n, sb_m,  # strides of bias: per image, head, query, key
    so_b, so_n, so_h,  # strides of dO: per image, query, head
    sg_b, sg_n, sg_m,  # strides of G: per image, query, key
    H, N, M, length, scale,  # heads, queries, keys, keys per text, factor of the scores
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,  # head dim and its pieces
    BN: tl.constexpr, BM: tl.constexpr,  # queries and keys per block
    HEADS_FASTEST: tl.constexpr,  # whether neighbouring programs are heads, or blocks
    BIAS: tl.constexpr, REGION: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A Triton kernel. Each program takes one block of BM keys of one head, and computes dK, the
    gradient of K. If OUT is set, it also computes dV, the gradient of V; otherwise it does not
    write dV. Dsum must hold the sums that `_grad_q` has computed.

    OUT states whether the output has a gradient, dO, and MAP whether the map has a gradient, G.
    """
    block, h, b = _place(HEADS_FASTEST)
    cols = block * BM + tl.arange(0, BM)
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
        # Rows past the end get lse = +inf, so that their P is 0.
        lse = tl.load(Lse + rows, mask=rows < N, other=float("inf"))[:, None]
        dsum = tl.load(Dsum + rows, mask=rows < N, other=0.0)[:, None]
        s = _scores(q0, q1, k0, k1, rows, cols, N, M, scale, bias, sb_n, sb_m, region, length,
                    D1, BIAS, REGION, PRECISION)  # fmt: skip
        p = tl.exp2(s - lse)
        dp = tl.zeros((BN, BM), tl.float32)
        if OUT:
            do0, do1 = _rows(dO, rows, N, so_n, D, D0, D1)
            transposed = tl.trans(p.to(do0.dtype))
            dv0 += _dot(transposed, do0, PRECISION)
            if D1 > 0:
                dv1 += _dot(transposed, do1, PRECISION)
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
# Whether TRITON_INTERPRET=1 was set when this file was imported.
INTERPRETED = not isinstance(_forward, triton.runtime.JITFunction)

# (queries per block, keys per block) -> number of programs along each axis
Grid = Callable[[int, int], tuple[int, int, int]]
Strides = tuple[int, ...]


def blocks(name: str, head_dim: int, wide: bool, masked: bool, pairs: int) -> Blocks:
    """Returns (queries per block, keys per block, warps, stages) for a kernel. `name` is a key of
    `KERNELS`. `wide` states whether the inputs are float32, `masked` whether there is a bias or a
    region. `pairs` is the number of queries times the number of keys."""
    if wide and head_dim == 160 and name != "mean_map":
        return WIDE_160
    if name == "forward" and masked and head_dim != 160:
        return MASKED_FORWARD
    if name == "mean_map" and not wide and not masked:
        if pairs >= switches.current.map_blocks_128:
            return MAP_128
        if pairs >= switches.current.map_blocks_64:
            return MAP_64
    return BLOCKS_OF.get((name, head_dim), BLOCKS[name])


def configuration(
    name: str, head_dim: int, *, wide: bool = False, masked: bool = False, pairs: int = 0
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns (constants, options) for launching a kernel: the values of its tl.constexpr arguments
    (block sizes, pieces of the head dim), and its compiler options. `name` is a key of `KERNELS`.
    `wide` states whether the inputs are float32, `masked` whether there is a bias or a region.
    `pairs` is the number of queries times the number of keys."""
    d0, d1 = PIECES[head_dim]
    bn, bm, warps, stages = blocks(name, head_dim, wide, masked, pairs)
    constants: dict[str, int] = {"D": head_dim, "D0": d0, "D1": d1, "BN": bn, "BM": bm}
    if name in ("grad_q", "grad_kv"):
        constants["HEADS_FASTEST"] = switches.current.heads_fastest
    return constants, {"num_warps": warps, "num_stages": stages}


def _precision(dtype: torch.dtype) -> str:
    """Returns the argument PRECISION of `_dot` for inputs of `dtype`. On a GPU this is "tf32" for
    float32 if PyTorch's own matrix products may use TF32, otherwise "ieee". In Triton's interpreter
    it is "upcast" for bfloat16, otherwise "ieee"."""
    if INTERPRETED:
        return "upcast" if dtype == torch.bfloat16 else "ieee"
    return "tf32" if dtype == torch.float32 and _tf32_is_allowed() else "ieee"


def _tf32_is_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # PyTorch 2.9 renamed the setting. Once the new name is set, reading the old raises RuntimeError.
    chosen = getattr(matmul, "fp32_precision", "none")
    return bool(chosen == "tf32" if chosen in ("tf32", "ieee") else matmul.allow_tf32)


def _launch(name: str, grid: Grid, q: Tensor, m: int, *args: Tensor | int | float, **flags: bool) -> None:
    """Launches the kernel called `name`, a key of `KERNELS`. grid(BN, BM) must return the launch
    grid for blocks of BN queries and BM keys. `q` (B,N,H,d) determines the device, dtype and head
    dim that the kernel is compiled for; `m` is the number of keys. `args` are the kernel's
    positional arguments, `q` included. `flags` are those of the kernel's flags that depend on the
    call, such as BIAS and REGION.

    Raises ValueError if `q` is not on a CUDA device, except in Triton's interpreter.
    """
    if not (q.is_cuda or INTERPRETED):
        raise ValueError(f"the triton backend needs CUDA tensors, not {q.device.type}; use backend='auto'")
    masked = flags["BIAS"] or flags["REGION"]
    constants, options = configuration(
        name, q.shape[-1], wide=q.dtype == torch.float32, masked=masked, pairs=q.shape[1] * m
    )
    kernel = KERNELS[name][grid(constants["BN"], constants["BM"])]
    with torch.cuda.device(q.device if q.is_cuda else -1):
        kernel(*args, **constants, **flags, PRECISION=_precision(q.dtype), **options)


def _blocks(count: int, size: int) -> int:
    """Returns how many blocks of `size` elements are needed to cover `count` elements."""
    return -(-count // size)


def _grid(blocks: int, heads: int, images: int) -> tuple[int, int, int]:
    """Returns the launch grid of a gradient kernel: (heads, blocks, images) if the switch
    `heads_fastest` (switches.py) is on, otherwise (blocks, heads, images). `blocks` is the number
    of blocks per head."""
    return (heads, blocks, images) if switches.current.heads_fastest else (blocks, heads, images)


def _contiguous_rows(x: Tensor) -> Tensor:
    """Returns `x` if its last stride is 1, which the kernels need, otherwise a contiguous copy of
    `x`. The strides of the other dimensions do not matter."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pointer(x: Tensor | None, otherwise: Tensor) -> Tensor:
    """Returns `x`, or `otherwise` if `x` is None. A kernel that will not read an argument still
    needs a pointer for it; `otherwise` may be any tensor on the device."""
    return otherwise if x is None else x


def _region_pointer(region: Tensor | None, otherwise: Tensor) -> Tensor:
    """Returns `region` (B,N) as contiguous int32, which the kernels expect, or `otherwise` if
    `region` is None. A kernel that will not read an argument still needs a pointer for it;
    `otherwise` may be any tensor on the device."""
    return otherwise if region is None else region.to(torch.int32).contiguous()


def _bias_strides(bias: Tensor | None, q: Tensor, k: Tensor) -> Strides:
    """Returns the four strides that `bias` has after it is expanded to (B,H,N,M), for q (B,N,H,d)
    and k (B,M,H,d). A stride is 0 along a dimension that is broadcast. All four are 0 if `bias` is
    None."""
    if bias is None:
        return (0, 0, 0, 0)
    return bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1]).stride()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    bias: Tensor | None,
    region: Tensor | None,
    length: int,
    probs: bool,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes attention with the Triton kernels. The inputs are not checked.

    q is (B,N,H,d); k and v are (B,M,H,d); `bias`, if given, broadcasts to (B,H,N,M). `region`
    (B,N), if given, holds the index of each query's text; k and v then hold the keys and values of
    all texts, one text after another along M, with `length` keys per text.

    Returns (out, map, lse). `out` is (B,N,H,d), or empty if `v` is None. `map` is the softmax
    averaged over heads, (B,N,M) in float32, or empty if `probs` is False. `lse` is the base-2
    log-sum-exp of each row of scores, (B,H,N) in float32, which `backward` needs.

    The argument `lse` may be given if `v` is None and the log-sum-exp is already known; it must be
    contiguous. It is then not computed again, and the returned lse is empty.

    Raises ValueError if the tensors are not on a CUDA device, except in Triton's interpreter.
    """
    q = _contiguous_rows(q)
    k = _contiguous_rows(k)
    v = None if v is None else _contiguous_rows(v)
    (b, n, h, d), m = q.shape, k.shape[1]
    out = torch.empty((b, n, h, d) if v is not None else 0, device=q.device, dtype=q.dtype)
    maps = torch.empty((b, n, m) if probs else 0, device=q.device, dtype=torch.float32)
    found = torch.empty((b, h, n) if lse is None else 0, device=q.device, dtype=torch.float32)

    flags = {"BIAS": bias is not None, "REGION": region is not None}
    hidden = _pointer(bias, q), _region_pointer(region, q)
    values = _pointer(v, k)
    sq, sk, sv = (y.stride()[:3] for y in (q, k, values))
    sb = _bias_strides(bias, q, k)
    sizes = h, n, m, length, scale

    def query_blocks(bn: int, bm: int) -> tuple[int, int, int]:
        return _blocks(n, bn), h, b

    def map_blocks(bn: int, bm: int) -> tuple[int, int, int]:
        return _blocks(m, bm), _blocks(n, bn), b

    if lse is None:
        arguments = q, k, values, out, found, *hidden, *sq, *sk, *sv, *sb, *sizes
        _launch("forward", query_blocks, q, m, *arguments, **flags, OUT=v is not None)
    if probs:
        arguments = q, k, maps, _pointer(lse, found), *hidden, *sq, *sk, *sb, *sizes
        _launch("mean_map", map_blocks, q, m, *arguments, **flags)
    return out, maps, found


def backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
    region: Tensor | None,
    length: int,
    need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k and v. Returns (dq, dk, dv), each in the shape of its input.
    If `need_kv` is False, dk and dv are empty instead. If `v` is None, dv is empty.

    `grad_out` (B,N,H,d) and `grad_maps` (B,N,M) are the gradients of the output and of the map;
    None means zero. `out` is the output of `forward`. `lse` (B,H,N) is the log-sum-exp that
    `forward` returned or was given. The other arguments are those of `forward`.
    """
    q = _contiguous_rows(q)
    k = _contiguous_rows(k)
    v = None if v is None else _contiguous_rows(v)
    grad_out = None if grad_out is None else _contiguous_rows(grad_out)
    (b, n, h, _), m = q.shape, k.shape[1]
    dq = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    dk = torch.empty(k.shape if need_kv else 0, device=q.device, dtype=q.dtype)
    dv = torch.empty(k.shape if need_kv and v is not None else 0, device=q.device, dtype=q.dtype)
    if grad_out is None:
        dv.zero_()  # the kernel will not write it
    dsum = torch.empty_like(lse)

    flags = {
        "BIAS": bias is not None,
        "REGION": region is not None,
        "OUT": grad_out is not None,
        "MAP": grad_maps is not None,
    }
    hidden = _pointer(bias, q), _region_pointer(region, q)
    values = _pointer(v, k)
    grads = _pointer(grad_out, q), _pointer(grad_maps, q)
    so = (0, 0, 0) if grad_out is None else grad_out.stride()[:3]
    sg = (0, 0, 0) if grad_maps is None else grad_maps.stride()
    sq, sk, sv = (y.stride()[:3] for y in (q, k, values))
    strides = *sq, *sk, *sv, *_bias_strides(bias, q, k), *so, *sg
    sizes = h, n, m, length, scale

    def query_blocks(bn: int, bm: int) -> tuple[int, int, int]:
        return _grid(_blocks(n, bn), h, b)

    def key_blocks(bn: int, bm: int) -> tuple[int, int, int]:
        return _grid(_blocks(m, bm), h, b)

    pointers = q, k, values, out, lse, *hidden, *grads, dq, dsum
    _launch("grad_q", query_blocks, q, m, *pointers, *strides, *sizes, **flags)
    if need_kv:
        pointers = q, k, values, lse, *hidden, *grads, dk, dv, dsum
        _launch("grad_kv", key_blocks, q, m, *pointers, *strides, *sizes, **flags)
    return dq, dk, dv
