"""The VAE against diffusers' on the same random weights, both ways."""

import pytest
import torch
from diffusers import AutoencoderKL

from minsd.config import VAEConfig
from minsd.vae import VAE

SHAPES = {"sd": (VAEConfig(), (1, 128, 96)), "small, odd sizes": (VAEConfig((16, 32, 64, 64), 1, 4, 8), (2, 88, 56))}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_parity(name):
    config, (batch, h, w) = SHAPES[name]
    levels = len(config.block_out_channels)
    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
    ).eval()
    with torch.device("meta"):
        ours = VAE(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    pictures, latents = torch.rand(batch, 3, h, w) * 2 - 1, torch.randn(batch, 4, h // 8, w // 8)
    posterior = theirs.encode(pictures).latent_dist
    mean, logvar = ours.encode(pictures)
    for a, b in ((mean, posterior.mean), (logvar, posterior.logvar), (ours.decode(latents), theirs.decode(latents).sample)):
        assert (a - b).norm() / b.norm() <= 1e-5
