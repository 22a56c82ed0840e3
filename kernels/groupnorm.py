"""GroupNorm and SiLU in two passes over x, for inference: two Triton kernels.

GroupNorm (Wu & He 2018) and SiLU (Ramachandran et al. 2017) precede every convolution of a residual
block. PyTorch reads x for the statistics, reads and writes it to normalise, and reads and writes it
again for the SiLU. Here the second pass does both, and also adds the block's time embedding (one
number per image and channel) before normalising. The SiLU is optional:

    y = SiLU((x + add - mean) / sqrt(var + eps) * weight + bias)

with mean and var over the channels and cells of a group.

    1 _statistics   one chunk of a group's cells:  their mean, and M2 = sum (x - mean)^2
    2 _normalise    one block of a group's cells:  y

A group is split into chunks because there are fewer groups (32 per image) than a GPU has processors
(132 on an H100). Sums of squares would cancel where the mean is large, so the means and M2 of parts
are merged instead (Chan, Golub & LeVeque 1979): with n = na + nb and delta = mean_b - mean_a,

    mean = mean_a + delta nb / n        M2 = M2_a + M2_b + delta^2 na nb / n

in a fixed order, so repeated runs are bit-identical. Both kernels accept any strides: x may be
stored channel by channel (NCHW) or cell by cell (channels_last, the layout that tensor-core
convolutions expect; PyTorch's own GroupNorm copies such an x to NCHW). y has the layout of x.

Evidence. Results agree with float64 in Triton's interpreter, and the 16-bit variants that the tests
compile for sm_90 keep their work in registers. The speed on a GPU is expected, not measured.
"""

# Triton's compiler gives kernels their types. Pyright takes a call from one kernel to another for a
# function that never returns, and refuses integers for arguments marked tl.constexpr.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

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
    ADD: tl.constexpr,
):  # fmt: skip
    """x + add of one group in float32 (channels BC, cells), and the mask of those that exist."""
    c = tl.arange(0, BC)[:, None]
    inside = (c < CG) & (cells[None, :] < P)
    x = tl.load(X + c * sx_c + cells[None, :] * sx_p, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(Add + c, mask=c < CG, other=0.0).to(tl.float32)
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
    """One chunk of one group: its mean and M2, merged block by block."""
    s, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    X += b * sx_b + g * CG * sx_c
    Add += b * C + g * CG
    mean, m2, n = 0.0, 0.0, 0.0
    for start in range(s * chunk, tl.minimum((s + 1) * chunk, P), BP):
        cells = start + tl.arange(0, BP)
        x, inside = _block(X, Add, cells, P, C, sx_c, sx_p, CG, BC, ADD)
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
    """One block of cells of one group: y. Each block merges the statistics of all chunks itself."""
    cells, g, b = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = tl.arange(0, CHUNKS)
    at = (b * GROUPS + g) * CHUNKS + s
    count = tl.maximum(tl.minimum(P - s * chunk, chunk), 0).to(tl.float32)  # cells in each chunk
    part = count / P
    means = tl.load(Mean + at, mask=count > 0, other=0.0)
    mean = tl.sum(means * part)
    off = means - mean
    var = tl.sum(tl.load(M2 + at, mask=count > 0, other=0.0)) / (1.0 * P * CG) + tl.sum(off * off * part)

    X += b * sx_b + g * CG * sx_c
    x, inside = _block(X, Add + b * C + g * CG, cells, P, C, sx_c, sx_p, CG, BC, ADD)
    c = tl.arange(0, BC)[:, None]
    weight = tl.load(Weight + g * CG + c, mask=c < CG, other=0.0).to(tl.float32)
    bias = tl.load(Bias + g * CG + c, mask=c < CG, other=0.0).to(tl.float32)
    y = (x - mean) * (tl.rsqrt(var + eps) * weight) + bias
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    to = Y + b * sx_b + g * CG * sx_c + c * sx_c + cells[None, :] * sx_p
    tl.store(to, y.to(Y.dtype.element_ty), mask=inside)


KERNELS = {"statistics": _statistics, "normalise": _normalise}


def configuration(channels: int, groups: int) -> tuple[dict[str, int], dict[str, int]]:
    """The kernels' constants for channels/groups channels per group, and their compiler options."""
    cg = channels // groups
    bc = 1 << (cg - 1).bit_length()  # the next power of two
    return {"CG": cg, "BC": bc, "BP": CELLS[bc], "CHUNKS": CHUNKS}, {"num_warps": WARPS}


def forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None, silu: bool
) -> Tensor:
    """GroupNorm of x + add, with SiLU on request; without gradients.

    x (B,C,h,w), weight and bias (C,), add (B,C) or None. Returns y (B,C,h,w) in the memory format
    of x, contiguous or channels_last; an x of any other strides is made contiguous first.
    """
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    b, c, h, w = x.shape
    p = h * w
    y = torch.empty_like(x)
    constants, options = configuration(c, groups)
    constants["ADD"] = add is not None
    block = constants["BP"]
    chunk = triton.cdiv(triton.cdiv(p, CHUNKS), block) * block  # whole blocks of cells
    mean = torch.empty(b, groups, CHUNKS, device=x.device, dtype=torch.float32)
    m2 = torch.empty_like(mean)
    added = x if add is None else add.contiguous()  # not read without ADD
    sizes = p, c, groups, chunk
    strides = x.stride(0), x.stride(1), 1 if x.is_contiguous() else c
    with torch.cuda.device(x.device if x.is_cuda else -1):
        _statistics[triton.cdiv(p, chunk), groups, b](
            x, added, mean, m2, *sizes, *strides, **constants, **options
        )
        _normalise[triton.cdiv(p, block), groups, b](
            x, added, weight, bias, y, mean, m2, *sizes, eps, *strides, **constants, SILU=silu, **options
        )
    return y
