"""The VAE against diffusers' on the same random weights: encoding, decoding, and both in bands."""

import copy

import pytest
import torch
from conftest import Live
from diffusers import AutoencoderKL

from minsd.config import VAEConfig
from minsd.vae import VAE, decode_in_bands, encode_in_bands, memory_needed

SHAPES = {
    "sd": (VAEConfig(), (1, 128, 96)),
    "small, odd sizes": (VAEConfig((16, 32, 64, 64), 1, 4, 8), (2, 88, 56)),
}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_parity(name):
    config, (batch, h, w) = SHAPES[name]
    levels = len(config.block_out_channels)
    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    ).eval()
    with torch.device("meta"):
        ours = VAE(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    pictures, latents = torch.rand(batch, 3, h, w) * 2 - 1, torch.randn(batch, 4, h // 8, w // 8)
    posterior = theirs.encode(pictures).latent_dist
    mean, logvar = ours.encode(pictures)
    for a, b in (
        (mean, posterior.mean),
        (logvar, posterior.logvar),
        (ours.decode(latents), theirs.decode(latents).sample),
    ):
        assert (a - b).norm() / b.norm() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 40), (44, 17)])  # latent cells
def test_bands_are_the_whole(shapes, size):
    """No seams, and the statistics of the whole map: the same numbers, to rounding."""
    vae = copy.deepcopy(shapes.vae).double()
    z = torch.randn(2, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(z)
    torch.testing.assert_close(decode_in_bands(vae, z), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(encode_in_bands(vae, whole), vae.encode(whole)[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_bands_take_less_memory():
    # At these sizes the finest maps take more memory than attention scores, which are not in bands.
    vae = VAE(VAEConfig((32, 64, 64, 64), 2, 4, 8))
    z = torch.zeros(1, 4, 32, 32)
    images = torch.zeros(1, 3, 256, 256)

    def peak(code, x):
        with Live() as live:
            code(x)
        return live.peak

    assert peak(lambda z: decode_in_bands(vae, z), z) < 0.75 * peak(vae.decode, z)
    assert peak(lambda x: encode_in_bands(vae, x), images) < 0.75 * peak(vae.encode, images)
    assert peak(vae.decode, z) < memory_needed(vae.config, 256, 256, torch.float32)
