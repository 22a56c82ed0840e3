"""GroupNorm and SiLU in two passes over x (Wu & He 2018; Ramachandran et al. 2017): two Triton kernels, inference only.

Half of a UNet's elementwise work is this pair, before every convolution of a residual block: PyTorch reads x for the
statistics, reads and writes it to normalise, and reads and writes it again for the SiLU. Here the second pass does both, and
takes along what the block adds beforehand, the time embedding (one number a picture and channel). The SiLU may be left out:

    y = SiLU((x + add - mean) / sqrt(var + eps) * weight + bias)        mean, var over the channels and cells of a group

    1 _statistics   a share of a group's cells:  their mean, and M2 = sum (x - mean)^2
    2 _normalise    a block of a group's cells:  y

A group is cut in shares because there are too few groups (32 a picture) for a GPU's 132 processors. Sums of squares would
cancel where the mean is large, so means and M2 of parts are joined instead (Chan, Golub & LeVeque 1979): with n = na + nb
and delta = mean_b - mean_a,

    mean = mean_a + delta nb / n        M2 = M2_a + M2_b + delta^2 na nb / n

in a fixed order: the same bits every time. Both kernels take any strides, so x may lie channel by channel (NCHW) or cell by
cell (channels_last, which convolutions on tensor cores want and PyTorch's own GroupNorm copies away); y lies as x does.
"""

import torch
import triton
import triton.language as tl

CELLS = {
    1: 2048,
    2: 1024,
    4: 512,
    8: 512,
    16: 256,
    32: 128,
    64: 64,
    128: 32,
    256: 16,
}  # cells in a block, by its channels
SHARES = 16  # of a group's cells, at most


@triton.jit
def _block(X, Add, cells, P, C, sx_c, sx_p, CG: tl.constexpr, BC: tl.constexpr, ADD: tl.constexpr):
    """(channels BC, cells) of one group in float32, and which of them exist. Pointers are at the group's first channel."""
    c = tl.arange(0, BC)[:, None]
    inside = (c < CG) & (cells[None, :] < P)
    x = tl.load(X + c * sx_c + cells[None, :] * sx_p, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(Add + c, mask=c < CG, other=0.0).to(tl.float32)
    return x, inside


@triton.jit
def _statistics(
    X,
    Add,
    Mean,
    M2,
    P,
    C,
    GROUPS,
    share,
    sx_b,
    sx_c,
    sx_p,
    CG: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    ADD: tl.constexpr,
    SHARES: tl.constexpr,
):
    """One share of one group: its mean and M2, joined block by block."""
    s, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    X += b * sx_b + g * CG * sx_c
    Add += b * C + g * CG
    mean, m2, n = 0.0, 0.0, 0.0
    for start in range(s * share, tl.minimum((s + 1) * share, P), BP):
        cells = start + tl.arange(0, BP)
        x, inside = _block(X, Add, cells, P, C, sx_c, sx_p, CG, BC, ADD)
        count = (tl.minimum(P - start, BP) * CG).to(tl.float32)
        here = tl.sum(x * inside) / count
        off = tl.where(inside, x - here, 0.0)
        delta, total = here - mean, n + count
        m2 += tl.sum(off * off) + delta * delta * n * count / total
        mean += delta * count / total
        n = total
    at = (b * GROUPS + g) * SHARES + s
    tl.store(Mean + at, mean)
    tl.store(M2 + at, m2)


@triton.jit
def _normalise(
    X,
    Add,
    Weight,
    Bias,
    Y,
    Mean,
    M2,
    P,
    C,
    GROUPS,
    share,
    eps,
    sx_b,
    sx_c,
    sx_p,
    CG: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    ADD: tl.constexpr,
    SILU: tl.constexpr,
    SHARES: tl.constexpr,
):
    """One block of cells of one group. The group's mean and variance are put together from its shares by every block anew."""
    cells, g, b = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = tl.arange(0, SHARES)
    at = (b * GROUPS + g) * SHARES + s
    count = tl.maximum(tl.minimum(P - s * share, share), 0).to(tl.float32)  # cells in each share
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
    tl.store(
        Y + b * sx_b + g * CG * sx_c + c * sx_c + cells[None, :] * sx_p, y.to(Y.dtype.element_ty), mask=inside
    )


KERNELS = {"statistics": _statistics, "normalise": _normalise}
INTERPRETED = not isinstance(
    _statistics, triton.runtime.JITFunction
)  # TRITON_INTERPRET=1 when this file was imported


def configuration(channels: int, groups: int) -> tuple[dict, dict]:
    """The kernels' constants for a group of channels/groups channels, and their compiler options."""
    cg = channels // groups
    bc = triton.next_power_of_2(cg)
    return {"CG": cg, "BC": bc, "BP": CELLS[bc], "SHARES": SHARES}, {"num_warps": 4}


def forward(x, groups, weight, bias, eps, add, silu):
    """x (B,C,h,w) in either memory format, weight and bias (C,), add (B,C) or None -> y as x. No gradients."""
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    b, c, h, w = x.shape
    p, y = h * w, torch.empty_like(x)
    constants, options = configuration(c, groups)
    share = triton.cdiv(triton.cdiv(p, SHARES), constants["BP"]) * constants["BP"]  # cells, whole blocks
    mean = torch.empty(b, groups, SHARES, device=x.device, dtype=torch.float32)
    m2, some = torch.empty_like(mean), x if add is None else add.contiguous()
    sx = x.stride(0), x.stride(1), 1 if x.is_contiguous() else c  # the last: from a cell to the next
    constants |= {"ADD": add is not None}
    with torch.cuda.device(x.device if x.is_cuda else -1):
        _statistics[triton.cdiv(p, share), groups, b](
            x, some, mean, m2, p, c, groups, share, *sx, **constants, **options
        )
        _normalise[triton.cdiv(p, constants["BP"]), groups, b](
            x,
            some,
            weight,
            bias,
            y,
            mean,
            m2,
            p,
            c,
            groups,
            share,
            eps,
            *sx,
            **constants,
            SILU=silu,
            **options,
        )
    return y
