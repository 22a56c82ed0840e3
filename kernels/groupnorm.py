"""GroupNorm and SiLU in two passes over x, and their gradient in two more: four Triton kernels.

GroupNorm (Wu & He 2018) and SiLU (Ramachandran et al. 2017) precede every convolution of a residual
block. PyTorch reads x for the statistics, reads and writes it to normalise, and reads and writes it
again for the SiLU. In this file the second pass normalises and applies the SiLU, which is optional.
It also adds the block's time embedding (one number per image and channel) before normalising:

    y = SiLU((x + add - mean) / sqrt(var + eps) * weight + bias)

where mean and var are taken over the channels and cells of a group. A program of each kernel takes
a chunk of a group's cells, or a smaller block of them:

    1 _statistics   a chunk   computes the chunk's mean, and M2 = sum (x - mean)^2
    2 _normalise    a block   computes y

The gradient is that of x alone, for frozen weights. With xhat = (x + add - mean) / sqrt(var + eps),
z = xhat weight + bias and s = sigmoid(z), the gradient of xhat is e = dy s (1 + z (1 - s)) weight,
or e = dy weight without SiLU. With means over the group,

    dx = (e - mean(e) - xhat mean(e xhat)) / sqrt(var + eps)

    3 _gradient_sums   a chunk   computes the chunk's sums of e and of e xhat
    4 _gradient        a block   computes dx

Both recompute z from x, so that only x and the results of kernel 1 are kept for them, while PyTorch
keeps x and the input of the SiLU.

A group is split into chunks because there are fewer groups (32 per image) than a GPU has
multiprocessors (132 on an H100). Where the mean is large, the difference of sum x^2 and n mean^2
would lose most digits. So the mean and M2 of each part are merged instead (Chan, Golub & LeVeque
1979). For parts a and b, with n = na + nb and delta = mean_b - mean_a,

    mean = mean_a + delta nb / n        M2 = M2_a + M2_b + delta^2 na nb / n

The order of merging is fixed, so repeated runs are bit-identical. The kernels accept x stored
channel by channel (NCHW) or cell by cell (channels_last, the layout that tensor-core convolutions
expect; PyTorch's own GroupNorm copies such an x to NCHW). y has the layout of x.

Evidence. Results agree with float64 in Triton's interpreter, and the 16-bit variants that the tests
compile keep their work in registers. The speed on a GPU is expected, not measured.
"""

# Triton's compiler gives kernels their types. Pyright takes a call from one kernel to another for a
# function that never returns, and refuses integers for arguments marked tl.constexpr.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Channels per block -> cells per block. Every entry is expected to be good, not measured on a GPU.
CELLS = {1: 2048, 2: 1024, 4: 512, 8: 512, 16: 256, 32: 128, 64: 64, 128: 32, 256: 16}
CHUNKS = 16  # per group, at most; expected, not measured on a GPU
WARPS = 4  # expected, not measured on a GPU


@triton.jit
def _block(
    X, Add,  # at the group's first channel: pointers to x and `add` (read with ADD) of one image
    cells,  # indices of a block of cells
    P, C, sx_c, sx_p,  # cells, channels; strides of x per channel and cell
    CG: tl.constexpr, BC: tl.constexpr,  # channels of the group, and the next power of two
    ADD: tl.constexpr, SUM: tl.constexpr,  # SUM: the dtype to compute in
):  # fmt: skip
    """Returns x + add of one group in dtype SUM (BC channels, cells), and the mask of entries that
    exist."""
    c = tl.arange(0, BC)[:, None]
    inside = (c < CG) & (cells[None, :] < P)
    x = tl.load(X + c * sx_c + cells[None, :] * sx_p, mask=inside, other=0.0).to(SUM)
    if ADD:
        x += tl.load(Add + c, mask=c < CG, other=0.0).to(SUM)
    return x, inside


@triton.jit
def _statistics(
    X,  # read: (B, C, P), P = h*w cells
    Add,  # read with ADD: (B, C), contiguous
    Mean, M2,  # written: (B, GROUPS, CHUNKS) float32, contiguous
    P, C, GROUPS, chunk,  # cells, channels, groups, cells per chunk
    sx_b, sx_c, sx_p,  # strides of X in elements: per image, channel, cell
    CG: tl.constexpr, BC: tl.constexpr,  # channels per group, and the next power of two
    BP: tl.constexpr,  # cells per block
    ADD: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Computes the mean and M2 of one chunk of one group, merged block by block."""
    s, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    X += b * sx_b + g * CG * sx_c
    Add += b * C + g * CG
    mean, m2, n = 0.0, 0.0, 0.0
    for start in range(s * chunk, tl.minimum((s + 1) * chunk, P), BP):
        cells = start + tl.arange(0, BP)
        x, inside = _block(X, Add, cells, P, C, sx_c, sx_p, CG, BC, ADD, Mean.dtype.element_ty)
        count = (tl.minimum(P - start, BP) * CG).to(tl.float32)
        here = tl.sum(x * inside) / count
        off = tl.where(inside, x - here, 0.0)
        delta, total = here - mean, n + count
        m2 += tl.sum(off * off) + delta * delta * n * count / total
        mean += delta * count / total
        n = total
    at = (b * GROUPS + g) * CHUNKS + s
    tl.store(Mean + at, mean)
    tl.store(M2 + at, m2)


@triton.jit
def _moments(
    Mean, M2,  # read: (B, GROUPS, CHUNKS), from `_statistics`
    at,  # index of this group's first chunk
    P, chunk, eps,  # cells, cells per chunk, added to the variance
    CG: tl.constexpr, CHUNKS: tl.constexpr,  # channels per group, chunks
):  # fmt: skip
    """Returns the mean and 1 / sqrt(var + eps) of a group, merged from all its chunks."""
    s = tl.arange(0, CHUNKS)
    count = tl.maximum(tl.minimum(P - s * chunk, chunk), 0).to(tl.float32)  # cells in each chunk
    part = count / P
    means = tl.load(Mean + at + s, mask=count > 0, other=0.0)
    mean = tl.sum(means * part)
    off = means - mean
    var = tl.sum(tl.load(M2 + at + s, mask=count > 0, other=0.0)) / (1.0 * P * CG) + tl.sum(off * off * part)
    return mean, tl.rsqrt(var + eps)


@triton.jit
def _normalise(
    X,  # read: (B, C, P), P = h*w cells
    Add,  # read with ADD: (B, C), contiguous
    Weight, Bias,  # read: (C,)
    Y,  # written: (B, C, P), with the strides of X
    Mean, M2,  # read: (B, GROUPS, CHUNKS) float32, from `_statistics`
    P, C, GROUPS, chunk, eps,  # cells, channels, groups, cells per chunk, added to the variance
    sx_b, sx_c, sx_p,  # strides of X in elements: per image, channel, cell
    CG: tl.constexpr, BC: tl.constexpr,  # channels per group, and the next power of two
    BP: tl.constexpr,  # cells per block
    ADD: tl.constexpr, SILU: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Computes y of one block of cells of one group. Each block merges the statistics of all chunks
    itself."""
    cells, g, b = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1), tl.program_id(2).to(tl.int64)
    mean, inverse = _moments(Mean, M2, (b * GROUPS + g) * CHUNKS, P, chunk, eps, CG, CHUNKS)
    X += b * sx_b + g * CG * sx_c
    x, inside = _block(X, Add + b * C + g * CG, cells, P, C, sx_c, sx_p, CG, BC, ADD, Mean.dtype.element_ty)
    c = tl.arange(0, BC)[:, None]
    weight = tl.load(Weight + g * CG + c, mask=c < CG, other=0.0).to(tl.float32)
    bias = tl.load(Bias + g * CG + c, mask=c < CG, other=0.0).to(tl.float32)
    y = (x - mean) * (inverse * weight) + bias
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    to = Y + b * sx_b + g * CG * sx_c + c * sx_c + cells[None, :] * sx_p
    tl.store(to, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _upstream(
    X, Add, Weight, Bias, dY,  # at the group's first channel: pointers, those with images at one image
    mean, inverse,  # of the group, from `_moments`
    cells,  # indices of a block of cells
    P, C, sx_c, sx_p,  # cells, channels; strides of x and dy per channel and cell
    CG: tl.constexpr, BC: tl.constexpr,  # channels of the group, and the next power of two
    ADD: tl.constexpr, SILU: tl.constexpr, SUM: tl.constexpr,  # SUM: the dtype to compute in
):  # fmt: skip
    """Returns the gradient e of xhat, and xhat (BC channels, cells each, 0 where no entry exists),
    and the mask of entries that exist."""
    x, inside = _block(X, Add, cells, P, C, sx_c, sx_p, CG, BC, ADD, SUM)
    c = tl.arange(0, BC)[:, None]
    weight = tl.load(Weight + c, mask=c < CG, other=0.0).to(SUM)
    xhat = tl.where(inside, (x - mean) * inverse, 0.0)
    e = tl.load(dY + c * sx_c + cells[None, :] * sx_p, mask=inside, other=0.0).to(SUM)
    if SILU:
        z = xhat * weight + tl.load(Bias + c, mask=c < CG, other=0.0).to(SUM)
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
    CG: tl.constexpr, BC: tl.constexpr,  # channels per group, and the next power of two
    BP: tl.constexpr,  # cells per block
    ADD: tl.constexpr, SILU: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Computes the sums of e and of e xhat over one chunk of one group, block by block."""
    s, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    mean, inverse = _moments(Mean, M2, (b * GROUPS + g) * CHUNKS, P, chunk, eps, CG, CHUNKS)
    X += b * sx_b + g * CG * sx_c
    dY += b * sx_b + g * CG * sx_c
    Add += b * C + g * CG
    Weight += g * CG
    Bias += g * CG
    sum_e, sum_ex = 0.0, 0.0
    for start in range(s * chunk, tl.minimum((s + 1) * chunk, P), BP):
        cells = start + tl.arange(0, BP)
        e, xhat, _ = _upstream(X, Add, Weight, Bias, dY, mean, inverse, cells,
                               P, C, sx_c, sx_p, CG, BC, ADD, SILU, Mean.dtype.element_ty)  # fmt: skip
        sum_e += tl.sum(e)
        sum_ex += tl.sum(e * xhat)
    to = (b * GROUPS + g) * CHUNKS + s
    tl.store(SumE + to, sum_e)
    tl.store(SumEX + to, sum_ex)


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
    CG: tl.constexpr, BC: tl.constexpr,  # channels per group, and the next power of two
    BP: tl.constexpr,  # cells per block
    ADD: tl.constexpr, SILU: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Computes dx of one block of cells of one group. Each block adds up the sums of all chunks
    itself."""
    cells, g, b = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1), tl.program_id(2).to(tl.int64)
    of = (b * GROUPS + g) * CHUNKS
    mean, inverse = _moments(Mean, M2, of, P, chunk, eps, CG, CHUNKS)
    s = tl.arange(0, CHUNKS)
    inside_chunks, size = s * chunk < P, 1.0 * P * CG
    mean_e = tl.sum(tl.load(SumE + of + s, mask=inside_chunks, other=0.0)) / size
    mean_ex = tl.sum(tl.load(SumEX + of + s, mask=inside_chunks, other=0.0)) / size
    X += b * sx_b + g * CG * sx_c
    dY += b * sx_b + g * CG * sx_c
    Add += b * C + g * CG
    Weight += g * CG
    Bias += g * CG
    e, xhat, inside = _upstream(X, Add, Weight, Bias, dY, mean, inverse, cells,
                                P, C, sx_c, sx_p, CG, BC, ADD, SILU, Mean.dtype.element_ty)  # fmt: skip
    dx = (e - mean_e - xhat * mean_ex) * inverse
    c = tl.arange(0, BC)[:, None]
    to = dX + b * sx_b + g * CG * sx_c + c * sx_c + cells[None, :] * sx_p
    tl.store(to, dx.to(dX.dtype.element_ty), mask=inside)


KERNELS = {
    "statistics": _statistics,
    "normalise": _normalise,
    "gradient_sums": _gradient_sums,
    "gradient": _gradient,
}
Grids = tuple[tuple[int, int, int], tuple[int, int, int]]


def configuration(channels: int, groups: int) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the kernels' constants for channels/groups channels per group, and their compiler
    options."""
    cg = channels // groups
    bc = 1 << (cg - 1).bit_length()  # the next power of two
    return {"CG": cg, "BC": bc, "BP": CELLS[bc], "CHUNKS": CHUNKS}, {"num_warps": WARPS}


def _launch(
    x: Tensor, groups: int, add: Tensor | None
) -> tuple[Grids, tuple[int, ...], tuple[int, ...], dict]:
    """Returns, for x (B,C,h,w), the grids by chunk and by block, and the kernels' sizes, strides
    and constants."""
    b, c, h, w = x.shape
    p = h * w
    constants, options = configuration(c, groups)
    block = constants["BP"]
    chunk = _blocks(_blocks(p, CHUNKS), block) * block  # whole blocks of cells
    grids = (_blocks(p, chunk), groups, b), (_blocks(p, block), groups, b)
    strides = x.stride(0), x.stride(1), 1 if x.is_contiguous() else c
    return grids, (p, c, groups, chunk), strides, {**constants, **options, "ADD": add is not None}


def _blocks(count: int, size: int) -> int:
    """Returns how many blocks of `size` cover `count`."""
    return -(-count // size)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32  # float64 only in the interpreter


def forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes GroupNorm of x + add, with SiLU on request.

    x (B,C,h,w), contiguous or channels_last, weight and bias (C,), add (B,C) contiguous or None.
    Returns y (B,C,h,w) in the memory format of x, and the means and M2 that `backward` needs.
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
    """Computes the gradient of x (B,C,h,w) from that of y, in the memory format of x."""
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
    """Computes GroupNorm of x + add, with SiLU on request. Differentiable once, in x alone.

    x (B,C,h,w), weight and bias (C,), add (B,C) or None. Returns y (B,C,h,w) in the memory format
    of x, contiguous or channels_last; an x of any other strides is made contiguous first.
    """
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    add = None if add is None else add.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _GroupNorm.apply(x, add, weight, bias, groups, eps, silu)
    return forward(x, groups, weight, bias, eps, add, silu)[0]
