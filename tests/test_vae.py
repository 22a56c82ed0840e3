"""The VAE against diffusers' on the same random weights, both ways."""

import pytest
import torch
from diffusers import AutoencoderKL

from minsd.config import VAEConfig
from minsd.vae import VAE, decode_tiled, encode_tiled

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


@torch.no_grad()
def test_tiles_leave_no_seam(shapes):
    """A picture four times as large as a tile: near what the whole gives, and no rougher at the edges of tiles than there."""
    vae, n = shapes.vae, 40
    row = torch.linspace(-1, 1, 8 * n)
    picture = torch.stack([0.8 + 0.1 * row.expand(8 * n, -1), 0.8 - 0.1 * row[:, None].expand(-1, 8 * n), 0.8 + 0 * row.expand(8 * n, -1)])
    picture[:, 100:180, 120:230] = torch.tensor([0.7, -0.6, -0.6])[:, None, None]  # a red box across the tiles' edges
    z = vae.encode(picture[None])[0]
    tiled_z = encode_tiled(vae, picture[None], tile=20, overlap=6)
    assert tiled_z.shape == z.shape and (tiled_z - z).norm() / z.norm() < 0.15
    whole, tiled = vae.decode(z), decode_tiled(vae, z, tile=20, overlap=6)
    assert (whole - tiled).abs().mean() < 0.01
    inside = (tiled - whole)[..., 110:170, 130:220]  # of the box: tiles end at rows and columns 160 and 140
    lines = [inside.mean(dim=axis).diff(dim=-1).abs().max() for axis in (-1, -2)]
    assert max(lines) < 0.008  # 0.025 where the padding of a tile's border shows


@torch.no_grad()
def test_one_tile_is_the_whole(shapes):
    z = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decode_tiled(shapes.vae, z, tile=20, overlap=4), shapes.vae.decode(z))
