"""GroupNorm and SiLU in two passes over x, and their gradient in two more: four Triton kernels.

GroupNorm (Wu & He 2018) and SiLU (Ramachandran et al. 2017) precede every convolution of a residual
block. PyTorch reads x for the statistics, reads and writes x to normalise, and reads and writes the
result again for the SiLU. In this file the second pass normalises and applies the SiLU, which is
optional. It also adds the block's time embedding (one number per image and channel) before
normalising:

    y = SiLU((x + add - mean) / sqrt(var + eps) * weight + bias)

where mean and var are taken over the channels and cells of a group. Each program of a kernel takes
either a chunk (a large part of a group's cells) or a block (a small part, which fits into
registers), of one or several groups:

    1 _statistics   a chunk   computes the chunk's mean, and M2 = sum (x - mean)^2
    2 _normalise    a block   computes y

The gradient is that of x alone, for frozen weights. With xhat = (x + add - mean) / sqrt(var + eps),
z = xhat weight + bias and s = sigmoid(z), the gradient of xhat is e = dy s (1 + z (1 - s)) weight,
or e = dy weight without SiLU. With means over the group,

    dx = (e - mean(e) - xhat mean(e xhat)) / sqrt(var + eps)

    3 _gradient_sums   a chunk   computes the chunk's sums of e and of e xhat
    4 _gradient        a block   computes dx

Kernels 3 and 4 recompute z from x, so that only x and the results of kernel 1 are kept for them,
while PyTorch keeps x and the input of the SiLU.

A group is split into chunks because there are fewer groups (32 per image) than a GPU has
multiprocessors (132 on an H100). If the mean is large, the difference of sum x^2 and n mean^2 would
lose most digits. So the mean and M2 of each part are merged instead (Chan, Golub & LeVeque 1979).
For parts a and b, with n = na + nb and delta = mean_b - mean_a,

    mean = mean_a + delta nb / n        M2 = M2_a + M2_b + delta^2 na nb / n

The order of merging is fixed, so repeated runs are bit-identical. The kernels accept x stored
channel by channel (NCHW) or cell by cell (channels_last, the layout that tensor-core convolutions
expect; PyTorch's own GroupNorm copies such an x to NCHW). y has the layout of x. In channels_last
the 10 channels of a group are 20 bytes of a cell's row, too few for a wide load, so one program may
take several neighbouring groups (`wide_norm` in switches.py).

Evidence. Results agree with float64 in Triton's interpreter. The variants for SD's channels,
compiled for sm_80, 86, 89, 90 and 120, spill at most 8 bytes of a thread's registers. The speed on
a GPU is expected, not measured.
"""

# Triton's compiler gives kernels their types. Pyright takes a call from one kernel to another for a
# function that never returns, and refuses integers for arguments marked tl.constexpr.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import switches

# Channels per block -> cells per block. Every entry is expected to be good, not measured on a GPU.
CELLS = {1: 2048, 2: 1024, 4: 512, 8: 512, 16: 256, 32: 128, 64: 64, 128: 32, 256: 16}
CHUNKS = 16  # per group, at most; expected, not measured on a GPU
WARPS = 4  # expected, not measured on a GPU
WIDE = 32  # channels that a block of several groups has at least; expected, not measured on a GPU


@triton.jit
def _block(
    X, Add,  # at the block's first channel: pointers to x and `add` (read with ADD) of one image
    c, cells,  # indices of the block's channels and cells
    P, sx_c, sx_p,  # cells; strides of x per channel and cell
    CB: tl.constexpr, ADD: tl.constexpr, SUM: tl.constexpr,  # channels of the block; dtype to compute in
):  # fmt: skip
    """Loads a block of x + add from one image, (channels, cells), and converts it to dtype SUM. A
    cell is one of the image's P = h*w positions. `c` and `cells` are the indices of the block's
    channels and cells; `c` counts from the channel to which X and Add point. sx_c and sx_p are the
    strides of x per channel and per cell. `add` is read only if ADD is set.

    Returns (values, inside). `inside` is True where the channel index is below CB and the cell
    index below P. Elsewhere no number exists, because the sides of a block are powers of two.
    """
    inside = (c[:, None] < CB) & (cells[None, :] < P)
    x = tl.load(X + c[:, None] * sx_c + cells[None, :] * sx_p, mask=inside, other=0.0).to(SUM)
    if ADD:
        x += tl.load(Add + c, mask=c < CB, other=0.0).to(SUM)[:, None]
    return x, inside


@triton.jit
def _statistics(
    X,  # read: (B, C, P), P = h*w cells
    Add,  # read with ADD: (B, C), contiguous
    Mean, M2,  # written: (B, GROUPS, CHUNKS) float32, contiguous
    P, C, GROUPS, chunk,  # cells, channels, groups, cells per chunk
    sx_b, sx_c, sx_p,  # strides of X in elements: per image, channel, cell
    CG: tl.constexpr, GB: tl.constexpr,  # channels per group, groups per block
    BC: tl.constexpr, BP: tl.constexpr,  # channels (a power of two, CG * GB or more) and cells per block
    ADD: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A Triton kernel. Each program takes one chunk of the cells (`chunk` of the image's P
    positions) and GB neighbouring groups of CG channels. For each of these groups it writes two
    numbers, taken over the chunk's cells and the group's channels: to Mean the mean of x + add, and
    to M2 the sum of squared deviations from this mean.

    The chunk is read in blocks of BC channels and BP cells. Add is read only if ADD is set.
    """
    s, g, b = tl.program_id(0), tl.program_id(1) * GB, tl.program_id(2).to(tl.int64)
    SUM: tl.constexpr = Mean.dtype.element_ty
    c = tl.arange(0, BC)
    X += b * sx_b + g * CG * sx_c
    Add += b * C + g * CG
    mean = tl.zeros((BC,), SUM)
    m2 = tl.zeros((BC,), SUM)
    n = 0.0  # cells so far
    for start in range(s * chunk, tl.minimum((s + 1) * chunk, P), BP):
        cells = start + tl.arange(0, BP)
        x, inside = _block(X, Add, c, cells, P, sx_c, sx_p, CG * GB, ADD, SUM)
        count = tl.minimum(P - start, BP).to(tl.float32)
        here = tl.sum(tl.where(inside, x, 0.0), axis=1) / count
        off = tl.where(inside, x - here[:, None], 0.0)
        delta, total = here - mean, n + count
        m2 += tl.sum(off * off, axis=1) + delta * delta * n * count / total
        mean += delta * count / total
        n = total
    for j in tl.static_range(GB):
        own = c // CG == j
        group = tl.sum(tl.where(own, mean, 0.0)) / CG
        off = mean - group
        at = (b * GROUPS + g + j) * CHUNKS + s
        tl.store(Mean + at, group)
        tl.store(M2 + at, tl.sum(tl.where(own, m2 + off * off * n, 0.0)))


@triton.jit
def _moments(
    Mean, M2,  # read: (GB, CHUNKS), from `_statistics`, at the block's first group
    c,  # indices of the block's channels
    P, chunk, eps,  # cells, cells per chunk, added to the variance
    CG: tl.constexpr, GB: tl.constexpr, CHUNKS: tl.constexpr,  # channels per group, groups, chunks
):  # fmt: skip
    """Returns (mean, inverse), each (channels, 1): for each channel of a block, the mean of its
    group, and 1 / sqrt(var + eps) with the variance of its group. `c` holds the channels' indices,
    which count from the block's first channel.

    The block covers GB groups of CG channels. Mean and M2 point to the results of `_statistics` for
    the first of these groups, one per chunk. P is the number of cells (positions) per image,
    `chunk` the number of cells per chunk.
    """
    s = tl.arange(0, CHUNKS)
    count = tl.maximum(tl.minimum(P - s * chunk, chunk), 0).to(tl.float32)  # cells in each chunk
    part = count / P
    mean = tl.zeros_like(c).to(Mean.dtype.element_ty)
    inverse = mean
    for j in tl.static_range(GB):
        means = tl.load(Mean + j * CHUNKS + s, mask=count > 0, other=0.0)
        group = tl.sum(means * part)
        off = means - group
        m2 = tl.sum(tl.load(M2 + j * CHUNKS + s, mask=count > 0, other=0.0))
        var = m2 / (1.0 * P * CG) + tl.sum(off * off * part)
        own = c // CG == j
        mean = tl.where(own, group, mean)
        inverse = tl.where(own, tl.rsqrt(var + eps), inverse)
    return mean[:, None], inverse[:, None]


@triton.jit
def _normalise(
    X,  # read: (B, C, P), P = h*w cells
    Add,  # read with ADD: (B, C), contiguous
    Weight, Bias,  # read: (C,)
    Y,  # written: (B, C, P), with the strides of X
    Mean, M2,  # read: (B, GROUPS, CHUNKS) float32, from `_statistics`
    P, C, GROUPS, chunk, eps,  # cells, channels, groups, cells per chunk, added to the variance
    sx_b, sx_c, sx_p,  # strides of X in elements: per image, channel, cell
    CG: tl.constexpr, GB: tl.constexpr,  # channels per group, groups per block
    BC: tl.constexpr, BP: tl.constexpr,  # channels (a power of two, CG * GB or more) and cells per block
    ADD: tl.constexpr, SILU: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A Triton kernel. It computes Y, which is x + add, normalised, multiplied by the weight, plus
    the bias, and followed by SiLU if SILU is set. Each program takes one block of BP cells
    (positions of the image) and GB neighbouring groups of CG channels. It first merges the
    statistics of all chunks of these groups, which `_statistics` has written to Mean and M2."""
    cells, b = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(2).to(tl.int64)
    g = tl.program_id(1) * GB
    c = tl.arange(0, BC)
    at = (b * GROUPS + g) * CHUNKS
    mean, inverse = _moments(Mean + at, M2 + at, c, P, chunk, eps, CG, GB, CHUNKS)
    X += b * sx_b + g * CG * sx_c
    x, inside = _block(X, Add + b * C + g * CG, c, cells, P, sx_c, sx_p, CG * GB, ADD, Mean.dtype.element_ty)
    weight = tl.load(Weight + g * CG + c, mask=c < CG * GB, other=0.0).to(tl.float32)[:, None]
    bias = tl.load(Bias + g * CG + c, mask=c < CG * GB, other=0.0).to(tl.float32)[:, None]
    y = (x - mean) * (inverse * weight) + bias
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    to = Y + b * sx_b + g * CG * sx_c + c[:, None] * sx_c + cells[None, :] * sx_p
    tl.store(to, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _upstream(
    X, Add, Weight, Bias, dY,  # at the block's first channel: pointers, those with images at one image
    mean, inverse,  # of each channel's group, from `_moments`
    c, cells,  # indices of the block's channels and cells
    P, sx_c, sx_p,  # cells; strides of x and dy per channel and cell
    CB: tl.constexpr,  # channels of the block
    ADD: tl.constexpr, SILU: tl.constexpr, SUM: tl.constexpr,  # SUM: the dtype to compute in
):  # fmt: skip
    """Returns (e, xhat, inside) for a block of (channels, cells); a cell is one of the image's P =
    h*w positions. xhat is the normalised x + add, before weight and bias, and e is the gradient
    with respect to xhat. `inside` is True where the channel index is below CB and the cell index
    below P; elsewhere e and xhat are 0.

    `c` and `cells` are the indices of the block's channels and cells; `c` counts from the channel
    to which the pointers point. `mean` and `inverse` are the results of `_moments`. SUM is the
    dtype to compute in.
    """
    x, inside = _block(X, Add, c, cells, P, sx_c, sx_p, CB, ADD, SUM)
    weight = tl.load(Weight + c, mask=c < CB, other=0.0).to(SUM)[:, None]
    xhat = tl.where(inside, (x - mean) * inverse, 0.0)
    e = tl.load(dY + c[:, None] * sx_c + cells[None, :] * sx_p, mask=inside, other=0.0).to(SUM)
    if SILU:
        z = xhat * weight + tl.load(Bias + c, mask=c < CB, other=0.0).to(SUM)[:, None]
        s = 1.0 / (1.0 + tl.exp(-z))
        e *= s * (1.0 + z * (1.0 - s))
    return e * weight, xhat, inside


@triton.jit
def _gradient_sums(
    X,  # read: (B, C, P), P = h*w cells
    Add,  # read with ADD: (B, C), contiguous
    Weight, Bias,  # read: (C,)
    dY,  # read: (B, C, P), the gradient of y, with the strides of X
    Mean, M2,  # read: (B, GROUPS, CHUNKS) float32, from `_statistics`
    SumE, SumEX,  # written: (B, GROUPS, CHUNKS) float32
    P, C, GROUPS, chunk, eps,  # cells, channels, groups, cells per chunk, added to the variance
    sx_b, sx_c, sx_p,  # strides of X and dY in elements: per image, channel, cell
    CG: tl.constexpr, GB: tl.constexpr,  # channels per group, groups per block
    BC: tl.constexpr, BP: tl.constexpr,  # channels (a power of two, CG * GB or more) and cells per block
    ADD: tl.constexpr, SILU: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A Triton kernel. Each program takes one chunk of the cells (`chunk` of the image's P
    positions) and GB neighbouring groups of CG channels. For each of these groups it writes two
    sums over the chunk's cells and the group's channels: of e to SumE, and of e xhat to SumEX. xhat
    is the normalised x + add, before weight and bias, and e is the gradient with respect to
    xhat."""
    s, g, b = tl.program_id(0), tl.program_id(1) * GB, tl.program_id(2).to(tl.int64)
    SUM: tl.constexpr = Mean.dtype.element_ty
    c = tl.arange(0, BC)
    at = (b * GROUPS + g) * CHUNKS
    mean, inverse = _moments(Mean + at, M2 + at, c, P, chunk, eps, CG, GB, CHUNKS)
    X += b * sx_b + g * CG * sx_c
    dY += b * sx_b + g * CG * sx_c
    Add += b * C + g * CG
    Weight += g * CG
    Bias += g * CG
    sum_e = tl.zeros((BC,), SUM)
    sum_ex = tl.zeros((BC,), SUM)
    for start in range(s * chunk, tl.minimum((s + 1) * chunk, P), BP):
        cells = start + tl.arange(0, BP)
        e, xhat, _ = _upstream(X, Add, Weight, Bias, dY, mean, inverse, c, cells,
                               P, sx_c, sx_p, CG * GB, ADD, SILU, SUM)  # fmt: skip
        sum_e += tl.sum(e, axis=1)
        sum_ex += tl.sum(e * xhat, axis=1)
    for j in tl.static_range(GB):
        own = c // CG == j
        to = at + j * CHUNKS + s
        tl.store(SumE + to, tl.sum(tl.where(own, sum_e, 0.0)))
        tl.store(SumEX + to, tl.sum(tl.where(own, sum_ex, 0.0)))


@triton.jit
def _gradient(
    X,  # read: (B, C, P), P = h*w cells
    Add,  # read with ADD: (B, C), contiguous
    Weight, Bias,  # read: (C,)
    dY,  # read: (B, C, P), the gradient of y, with the strides of X
    dX,  # written: (B, C, P), with the strides of X
    Mean, M2,  # read: (B, GROUPS, CHUNKS) float32, from `_statistics`
    SumE, SumEX,  # read: (B, GROUPS, CHUNKS) float32, from `_gradient_sums`
    P, C, GROUPS, chunk, eps,  # cells, channels, groups, cells per chunk, added to the variance
    sx_b, sx_c, sx_p,  # strides of X, dY and dX in elements: per image, channel, cell
    CG: tl.constexpr, GB: tl.constexpr,  # channels per group, groups per block
    BC: tl.constexpr, BP: tl.constexpr,  # channels (a power of two, CG * GB or more) and cells per block
    ADD: tl.constexpr, SILU: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A Triton kernel. It computes dX, the gradient of x. Each program takes one block of BP cells
    (positions of the image) and GB neighbouring groups of CG channels. It first adds up the sums of
    all chunks of these groups, which `_gradient_sums` has written to SumE and SumEX."""
    cells, b = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(2).to(tl.int64)
    g = tl.program_id(1) * GB
    SUM: tl.constexpr = Mean.dtype.element_ty
    c = tl.arange(0, BC)
    at = (b * GROUPS + g) * CHUNKS
    mean, inverse = _moments(Mean + at, M2 + at, c, P, chunk, eps, CG, GB, CHUNKS)
    s = tl.arange(0, CHUNKS)
    inside_chunks, size = s * chunk < P, 1.0 * P * CG
    mean_e = tl.zeros((BC,), SUM)
    mean_ex = tl.zeros((BC,), SUM)
    for j in tl.static_range(GB):
        of = at + j * CHUNKS + s
        own = c // CG == j
        mean_e = tl.where(own, tl.sum(tl.load(SumE + of, mask=inside_chunks, other=0.0)) / size, mean_e)
        mean_ex = tl.where(own, tl.sum(tl.load(SumEX + of, mask=inside_chunks, other=0.0)) / size, mean_ex)
    X += b * sx_b + g * CG * sx_c
    dY += b * sx_b + g * CG * sx_c
    Add += b * C + g * CG
    Weight += g * CG
    Bias += g * CG
    e, xhat, inside = _upstream(X, Add, Weight, Bias, dY, mean, inverse, c, cells,
                                P, sx_c, sx_p, CG * GB, ADD, SILU, SUM)  # fmt: skip
    dx = (e - mean_e[:, None] - xhat * mean_ex[:, None]) * inverse
    to = dX + b * sx_b + g * CG * sx_c + c[:, None] * sx_c + cells[None, :] * sx_p
    tl.store(to, dx.to(dX.dtype.element_ty), mask=inside)


KERNELS = {
    "statistics": _statistics,
    "normalise": _normalise,
    "gradient_sums": _gradient_sums,
    "gradient": _gradient,
}
Grids = tuple[tuple[int, int, int], tuple[int, int, int]]


def groups_per_block(channels: int, groups: int, channels_last: bool, itemsize: int) -> int:
    """Returns how many neighbouring groups one block of the kernels covers. `channels` and `groups`
    are those of the norm, `itemsize` is the number of bytes per element, and `channels_last` states
    the memory format of the input.

    Returns 1 if `channels_last` is False, or if the switch `wide_norm` (switches.py) is off.
    Otherwise returns the smallest of 1, 2, 4, 8, 16 and 32 that meets three conditions: it divides
    `groups`, the block has at least WIDE and at most 128 channels, and the bytes of these channels
    are a multiple of 16. Returns 1 if none of them does.
    """
    cg = channels // groups
    if channels_last and switches.current.wide_norm:
        for gb in (1, 2, 4, 8, 16, 32):
            if WIDE <= gb * cg <= 128 and gb * cg * itemsize % 16 == 0 and groups % gb == 0:
                return gb
    return 1


def configuration(channels: int, groups: int, gb: int = 1) -> tuple[dict[str, int], dict[str, int]]:
    """Returns (constants, options) for launching any of the kernels: the values of its tl.constexpr
    arguments for sizes, and its compiler options. `channels` and `groups` are those of the norm;
    `gb` is the number of groups per block."""
    cg = channels // groups
    bc = 1 << (gb * cg - 1).bit_length()  # the next power of two
    constants = {"CG": cg, "GB": gb, "BC": bc, "BP": CELLS[bc], "CHUNKS": CHUNKS}
    return constants, {"num_warps": WARPS}


def _launch(
    x: Tensor, groups: int, add: Tensor | None
) -> tuple[Grids, tuple[int, ...], tuple[int, ...], dict]:
    """Returns (grids, sizes, strides, constants), the arguments for launching the kernels on x
    (B,C,h,w).

    `grids` holds two launch grids: one for `_statistics` and `_gradient_sums`, whose programs take
    one chunk of cells each, and one for `_normalise` and `_gradient`, whose programs take one block
    of cells each. `sizes` is (cells per image, channels, groups, cells per chunk). `strides` are
    those of x per image, channel and cell. `constants` are keyword arguments: sizes of blocks,
    compiler options, and ADD, which is True if `add` is given.
    """
    b, c, h, w = x.shape
    p = h * w
    nchw = x.is_contiguous()
    gb = groups_per_block(c, groups, not nchw, x.element_size())
    constants, options = configuration(c, groups, gb)
    block = constants["BP"]
    chunk = _blocks(_blocks(p, CHUNKS), block) * block  # whole blocks of cells
    grids = (_blocks(p, chunk), groups // gb, b), (_blocks(p, block), groups // gb, b)
    strides = x.stride(0), x.stride(1), 1 if nchw else c
    return grids, (p, c, groups, chunk), strides, {**constants, **options, "ADD": add is not None}


def _blocks(count: int, size: int) -> int:
    """Returns how many blocks of `size` elements are needed to cover `count` elements."""
    return -(-count // size)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32  # float64 only in the interpreter


def forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes GroupNorm of x + add, followed by SiLU if `silu` is True, without autograd. x is
    (B,C,h,w), contiguous or channels_last. `weight` and `bias` are (C,). `add` is (B,C) and
    contiguous, or None.

    Returns (y, mean, m2). y is (B,C,h,w) in the memory format of x. `mean` and `m2` are
    (B,groups,CHUNKS), for `backward`: the h*w cells are split into at most CHUNKS chunks, and for
    each group and chunk `mean` holds the mean, and `m2` the sum of squared deviations from it.
    """
    (by_chunk, by_block), sizes, strides, constants = _launch(x, groups, add)
    y = torch.empty_like(x)
    mean = torch.empty(x.shape[0], groups, CHUNKS, device=x.device, dtype=_sum_dtype(x))
    m2 = torch.empty_like(mean)
    added = x if add is None else add  # not read without ADD
    with torch.cuda.device(x.device if x.is_cuda else -1):
        _statistics[by_chunk](x, added, mean, m2, *sizes, *strides, **constants)
        _normalise[by_block](
            x, added, weight, bias, y, mean, m2, *sizes, eps, *strides, **constants, SILU=silu
        )
    return y, mean, m2


def backward(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    silu: bool,
    mean: Tensor,
    m2: Tensor,
) -> Tensor:
    """Returns the gradient of x, (B,C,h,w) in the memory format of x. `dy` (B,C,h,w) is the
    gradient of y, the first result of `forward`. `mean` and `m2` are the second and third results
    of `forward`. The other arguments are those that were passed to `forward`."""
    (by_chunk, by_block), sizes, strides, constants = _launch(x, groups, add)
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    dx = torch.empty_like(x)
    sum_e, sum_ex = torch.empty_like(mean), torch.empty_like(mean)
    inputs = x, x if add is None else add, weight, bias, dy
    with torch.cuda.device(x.device if x.is_cuda else -1):
        _gradient_sums[by_chunk](
            *inputs, mean, m2, sum_e, sum_ex, *sizes, eps, *strides, **constants, SILU=silu
        )
        _gradient[by_block](
            *inputs, dx, mean, m2, sum_e, sum_ex, *sizes, eps, *strides, **constants, SILU=silu
        )
    return dx


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        groups, eps, silu = ctx.rest = rest
        y, mean, m2 = forward(x, groups, weight, bias, eps, add, silu)
        ctx.save_for_backward(x, add, weight, bias, mean, m2)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, add, weight, bias, mean, m2 = ctx.saved_tensors
        groups, eps, silu = ctx.rest
        return backward(dy, x, groups, weight, bias, eps, add, silu, mean, m2), *(None,) * 6


def apply(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None, silu: bool
) -> Tensor:
    """Computes GroupNorm of x + add, followed by SiLU if `silu` is True. The result has a first
    derivative with respect to x, and no other derivative.

    x is (B,C,h,w), `weight` and `bias` are (C,), `add` is (B,C) or None. Returns y (B,C,h,w). If x
    is contiguous or channels_last, y has the same memory format; otherwise y is contiguous.
    """
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    add = None if add is None else add.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _GroupNorm.apply(x, add, weight, bias, groups, eps, silu)
    return forward(x, groups, weight, bias, eps, add, silu)[0]
