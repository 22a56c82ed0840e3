"""GroupNorm(x + add) and SiLU in two kernels against float64.

They run on a GPU if there is one, else in Triton's interpreter through test_kernels_interpreter.py.
Tests that need no kernel run in any case.
"""

import os

import numpy as np
import pytest
import torch

from minsd import kernels
from minsd.config import MODELS, ModelConfig, UNetConfig, VAEConfig
from minsd.kernels import group_norm
from minsd.noise.initial import noise
from minsd.pipeline import StableDiffusion
from minsd.unet import UNet
from minsd.vae import VAE

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
here = pytest.mark.skipif(
    not INTERPRETING and not torch.cuda.is_available(), reason="needs a CUDA device (or TRITON_INTERPRET=1)"
)
# B, C, h, w, groups: odd sizes; SD's finest level (10 channels per group) with a ragged last block;
# one cell; one channel per group
SHAPES = [(2, 12, 7, 9, 4), (1, 40, 23, 25, 4), (2, 32, 1, 1, 8), (1, 4, 40, 60, 4)]


def exact(x, norm, add, silu=True):
    x = x.double() if add is None else x.double() + add.double()[:, :, None, None]
    g = x.unflatten(1, (norm.num_groups, -1)).flatten(2)  # (B, groups, C/groups * cells)
    g = (g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, correction=0) + norm.eps).sqrt()
    y = g.view(x.shape) * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    return y * y.sigmoid() if silu else y


def case(shape, dtype, device, mean=0.0, eps=1e-5):
    b, c, h, w, groups = shape
    g = torch.Generator().manual_seed(0)
    norm = torch.nn.GroupNorm(groups, c, eps=eps).requires_grad_(False)
    norm.weight.normal_(1, 0.5, generator=g)
    norm.bias.normal_(0, 0.5, generator=g)
    x, add = torch.randn(b, c, h, w, generator=g) + mean, torch.randn(b, c, generator=g)
    return x.to(device, dtype), norm.to(device, dtype), add.to(device, dtype)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def fused(monkeypatch):
    """Always take the kernels, on a CPU by the interpreter. The shapes of x in order of the calls."""
    calls = []

    def can(x, norm, add):
        calls.append(tuple(x.shape))
        return True

    monkeypatch.setattr(kernels, "norm_is_fused", can)
    return calls


@here
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)], ids=str
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, layout, dtype, tolerance, fused):
    x, norm, add = case(shape, dtype, DEVICE)
    x = x.contiguous(memory_format=layout)
    for more, silu in ((add, True), (None, False)):
        y = group_norm(x, norm, more, silu=silu)
        assert relative(y, exact(x, norm, more, silu)) < tolerance
        assert y.dtype == dtype and y.stride() == x.stride()
    assert fused


@here
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_gradient_against_float64(shape, layout, dtype, tolerance, fused):
    x, norm, add = case(shape, dtype, DEVICE)
    if shape == (2, 32, 1, 1, 8) and dtype != torch.float32:
        tolerance *= 4  # of four numbers a group, little is left once mean and slope are taken out
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(x.shape, generator=g).to(DEVICE, dtype)
    leaf = x.contiguous(memory_format=layout).requires_grad_()
    truth = x.double().requires_grad_()
    for more, silu in ((add, True), (None, False)):
        (ours,) = torch.autograd.grad(group_norm(leaf, norm, more, silu=silu), leaf, dy)
        (expected,) = torch.autograd.grad(exact(truth, norm, more, silu), truth, dy.double())
        assert relative(ours, expected) < tolerance
        assert ours.dtype == dtype and ours.stride() == leaf.stride()


@pytest.mark.skipif(not INTERPRETING, reason="needs no kernel but the interpreter's, in float64")
@pytest.mark.parametrize("silu", [True, False])
def test_gradcheck(silu, fused, monkeypatch):
    """In float64: two blocks in a chunk, a ragged chunk, and any strides of x and dy; in
    channels_last two groups in a block."""
    for channels in (2, 4):
        monkeypatch.setitem(kernels.groupnorm.CELLS, channels, 2)
    monkeypatch.setattr(kernels.groupnorm, "WIDE", 4)
    monkeypatch.setattr(kernels.groupnorm, "CHUNKS", 2)
    x, norm, add = case((1, 4, 1, 5, 2), torch.float64, DEVICE)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        for more, turned in ((add, False), (None, True)):

            def f(y, more=more, turned=turned):
                y = group_norm(y.transpose(2, 3) if turned else y, norm, more, silu=silu)
                return y.transpose(2, 3) if turned else y

            assert torch.autograd.gradcheck(f, leaf, atol=1e-6, fast_mode=True)
    (dx,) = torch.autograd.grad(group_norm(leaf, norm, add).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@here
@pytest.mark.parametrize("shape, gb", [((1, 40, 5, 9, 4), 4), ((1, 48, 5, 9, 8), 8)])
def test_groups_side_by_side_give_what_each_gives_alone(shape, gb, fused):
    """Of 10 channels a group, and of 6, which fill 32 channels and 16 bytes with eight groups."""
    x, norm, add = case(shape, torch.float16, DEVICE)
    assert kernels.groupnorm.groups_per_block(shape[1], shape[-1], True, 2) == gb
    assert kernels.groupnorm.groups_per_block(shape[1], shape[-1], False, 2) == 1
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, x.dtype)

    def both():
        leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = group_norm(leaf, norm, add, silu=True)
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]

    wide = both()
    with kernels.switches.use(wide_norm=False):
        narrow = both()
    assert all(relative(a, b) < 1e-3 for a, b in zip(wide, narrow))


@here
def test_a_large_mean_does_not_cancel(fused):
    """Means of 1000 standard deviations: a sum of squares would leave no digit of the variance."""
    x, norm, _ = case((1, 8, 30, 40, 2), torch.float32, DEVICE, mean=1000.0)
    # float32 stores x to 6e-5 of a standard deviation.
    assert relative(group_norm(x, norm, silu=True), exact(x, norm, None)) < 1e-4


@here
def test_same_bits_every_time_and_any_strides(fused):
    x, norm, add = case((2, 12, 7, 9, 4), torch.float16, DEVICE)
    first = group_norm(x, norm, add, silu=True)
    assert all(torch.equal(group_norm(x, norm, add, silu=True), first) for _ in range(5))
    transposed = x.transpose(2, 3)
    assert torch.equal(group_norm(transposed, norm, add), group_norm(transposed.contiguous(), norm, add))


@here
def test_the_same_image_as_without(fused, monkeypatch):
    unet = UNetConfig(
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention=(True, False),
        num_heads=(2, 2),
        context_dim=8,
        norm_groups=2,
        sample_size=8,
    )
    vae = VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=2)
    torch.manual_seed(0)
    sd = StableDiffusion(ModelConfig("tiny", unet=unet, vae=vae), UNet(unet), VAE(vae), None)
    for network in (sd.unet, sd.vae):
        network.requires_grad_(False).to(DEVICE)
    context, start = torch.randn(2, 77, 8, device=DEVICE), noise([1, 2], (4, 8, 8))

    made = []

    def draw():
        latents = sd.denoise(sd.predictor(context, context.flip(0), 5.0), start, steps=2, sampler="ddim")
        made.append(len(fused))
        return latents, [np.asarray(picture).astype(int) for picture in sd.decode(latents)]

    latents, pictures = draw()
    # per step: two in each of 8 residual blocks, one in each of 4 transformers, one at the end
    assert made == [2 * (2 * 8 + 4 + 1)] and len(fused) > made[0]
    monkeypatch.setattr(kernels, "norm_is_fused", lambda *args: False)
    plain, expected = draw()
    assert 0 < relative(latents, plain) < 1e-5
    assert all(np.abs(a - b).max() <= 2 for a, b in zip(pictures, expected)) and np.std(expected[0]) > 10


@pytest.mark.skipif(INTERPRETING, reason="needs no kernel")
def test_without_kernels_it_is_pytorch_with_gradients():
    x, norm, add = case((2, 12, 7, 9, 4), torch.float64, "cpu")
    assert relative(group_norm(x, norm, add, silu=True), exact(x, norm, add)) < 1e-12
    leaf = x.requires_grad_()
    (ours,) = torch.autograd.grad(group_norm(leaf, norm, add, silu=True).square().sum(), leaf)
    (truth,) = torch.autograd.grad(exact(leaf, norm, add).square().sum(), leaf)
    assert relative(ours, truth) < 1e-12


@pytest.mark.skipif(INTERPRETING, reason="needs no kernel")
def test_where_the_kernels_are_taken(monkeypatch):
    """Only on CUDA, never where a gradient would be lost. Stand-ins claim to be on CUDA."""
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(kernels.devices, "failure", lambda device: None)
    x, norm, add = case((2, 12, 7, 9, 4), torch.float32, "cpu")
    assert not kernels.norm_is_fused(x, norm, add)

    class OnCuda(torch.Tensor):
        is_cuda = True

    on = x.as_subclass(OnCuda)
    assert kernels.norm_is_fused(on, norm, add) and kernels.norm_is_fused(on, norm, None)
    leaf = on.clone().as_subclass(OnCuda).requires_grad_()
    assert not kernels.norm_is_fused(leaf, norm, add)  # small and eager
    with kernels.switches.in_a_graph():
        assert kernels.norm_is_fused(leaf, norm, add)
    for least, taken in ((leaf.numel(), True), (leaf.numel() + 1, False), (None, False)):
        with kernels.switches.use(norm_gradient_from=least):
            assert kernels.norm_is_fused(leaf, norm, add) == taken
            assert kernels.norm_is_fused(on, norm, add)
    with torch.no_grad():
        assert kernels.norm_is_fused(on.clone().as_subclass(OnCuda).requires_grad_(), norm, add)
    with kernels.switches.in_a_graph():
        assert not kernels.norm_is_fused(on, norm, add.requires_grad_())
    add.requires_grad_(False)
    with kernels.switches.in_a_graph():
        assert not kernels.norm_is_fused(leaf, norm.requires_grad_(), add)
    norm.requires_grad_(False)
    with torch.autograd.forward_ad.dual_level():
        assert not kernels.norm_is_fused(on, norm, add)
    assert not kernels.norm_is_fused(on.double(), norm.double(), None)
    sd15 = MODELS["sd15"].unet
    assert max(sd15.block_out_channels) * 2 // sd15.norm_groups <= 256
