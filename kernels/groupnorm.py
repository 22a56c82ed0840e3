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
    """Loads one block of x + add, (channels, cells), in dtype SUM. `c` and `cells` are the indices
    of the block's channels and cells, P is the number of cells of the image, and CB the number of
    channels to load. The indices may go beyond CB and P, because the sides of a block are powers of
    two.

    Returns (values, inside). `inside` is True for the entries that exist.
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
    """Computes the mean of x + add, and M2, the sum of squared deviations from this mean, over one
    chunk of the cells of a group. Does this for each of GB groups. The statistics of each channel
    are computed first, block of cells by block of cells; those of a group's channels are then
    merged."""
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
    """Returns (mean, inverse): the mean, and 1 / sqrt(var + eps), of the group of each of the
    block's channels, (channels, 1) each. Both are merged from the statistics of all chunks of the
    group."""
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
    """Computes y, the normalised x + add with SiLU if SILU is set, for one block of cells of GB
    groups. Each program merges the statistics of all chunks itself."""
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
    """Returns (e, xhat, inside) for one block of (channels, cells), in the notation at the head of
    this file: the gradient e with respect to xhat, the normalised xhat, and a mask that is True for
    the entries that exist. e and xhat are 0 elsewhere."""
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
    """Computes two sums over one chunk of the cells of a group: of e, the gradient of the
    normalised xhat, and of e xhat. Does this for each of GB groups. The sums of each channel are
    computed first, block of cells by block of cells; those of a group's channels are then added."""
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
    """Computes dx, the gradient of x, for one block of cells of GB groups. `_gradient_sums` leaves
    one pair of sums per chunk of a group. Each program of this kernel adds up those of all chunks
    again."""
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
    """Returns how many neighbouring groups one block of the kernels covers. This is 1 if x is not
    channels_last, or if the switch `wide_norm` is off.

    Otherwise it is the least power of two, up to 32, that divides `groups` and gives a block from
    WIDE to 128 channels, whose bytes (`itemsize` per element) are a multiple of 16. It is 1 if
    there is no such power.
    """
    cg = channels // groups
    if channels_last and switches.current.wide_norm:
        for gb in (1, 2, 4, 8, 16, 32):
            if WIDE <= gb * cg <= 128 and gb * cg * itemsize % 16 == 0 and groups % gb == 0:
                return gb
    return 1


def configuration(channels: int, groups: int, gb: int = 1) -> tuple[dict[str, int], dict[str, int]]:
    """Returns (constants, options) for launching the kernels: the values of their tl.constexpr
    arguments, and their compiler options. A group has channels / groups channels; `gb` is the
    number of groups per block."""
    cg = channels // groups
    bc = 1 << (gb * cg - 1).bit_length()  # the next power of two
    constants = {"CG": cg, "GB": gb, "BC": bc, "BP": CELLS[bc], "CHUNKS": CHUNKS}
    return constants, {"num_warps": WARPS}


def _launch(
    x: Tensor, groups: int, add: Tensor | None
) -> tuple[Grids, tuple[int, ...], tuple[int, ...], dict]:
    """Returns (grids, sizes, strides, constants), with which the kernels are launched for x
    (B,C,h,w).

    `grids` is a pair of launch grids. The first is for the kernels whose programs take a chunk of
    cells each, the second for those whose programs take a block of cells each. `sizes` and
    `strides` are positional arguments of the kernels, `constants` their keyword arguments.
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
    """Computes GroupNorm of x + add, followed by SiLU if `silu` is True.

    x is (B,C,h,w), contiguous or channels_last; weight and bias are (C,); add is (B,C), contiguous,
    or None. Returns (y, mean, m2): y (B,C,h,w) in the memory format of x, and the mean and M2 (sum
    of squared deviations) of each chunk of a group's cells, each (B,groups,CHUNKS), which
    `backward` needs.
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
    """Computes the gradient of x (B,C,h,w), in the memory format of x, from `dy`, the gradient of
    y. `mean` and `m2` are the results of `forward`; the other arguments are those of `forward`."""
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
    """Computes GroupNorm of x + add, followed by SiLU if `silu` is True. The result can be
    differentiated once, and in x alone.

    x is (B,C,h,w), weight and bias are (C,), add is (B,C) or None. Returns y (B,C,h,w) in the
    memory format of x, contiguous or channels_last; an x of any other strides is made contiguous
    first.
    """
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    add = None if add is None else add.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _GroupNorm.apply(x, add, weight, bias, groups, eps, silu)
    return forward(x, groups, weight, bias, eps, add, silu)[0]
