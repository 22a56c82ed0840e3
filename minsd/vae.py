"""The variational autoencoder between pictures and latents (Kingma & Welling 2014; Rombach et al. 2022, section 3.1).

Pictures (B,3,H,W) in -1..1 become latents (B,4,H/8,W/8) and back. Read from `VAE` at the bottom upwards.
Attribute names are those of diffusers' AutoencoderKL checkpoints, so a state dict loads without a table.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minsd.config import VAEConfig
from minsd.kernels import attention


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, around a skip; a 1x1 convolution on the skip where the width changes."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class MidAttention(nn.Module):
    """Single-head self-attention over all cells: the one place where the codec sees the whole picture."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        b, c, h, w = x.shape
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h*w, C)
        q, k, v = (f(y).unsqueeze(2) for f in (self.to_q, self.to_k, self.to_v))  # (B, h*w, 1 head, C)
        y, _ = attention(q, k, v)
        y = self.to_out[0](y.squeeze(2))
        return x + y.transpose(1, 2).reshape(b, c, h, w)


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([MidAttention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the checkpoints were trained


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """The resnets of one level, then (but at the last level) a change of resolution."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, *, down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        if down:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for resample in getattr(self, "downsamplers", None) or getattr(self, "upsamplers", None) or ():
            x = resample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, last = config.block_out_channels, config.norm_groups, len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Block(widths[max(i - 1, 0)], width, config.layers_per_block, groups, down=i < last)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)  # (B, 128, H, W)
        for block in self.down_blocks:
            x = block(x)  # ... (B, 512, H/8, W/8)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, last = config.block_out_channels[::-1], config.norm_groups, len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Block(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, up=i < last)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))  # (B, 512, h, w)
        for block in self.up_blocks:
            x = block(x)  # ... (B, 128, 8h, 8w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """`encode` and `decode` work in the checkpoint's own scale; `config.scaling_factor` is applied by the pipeline."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B,3,H,W) in -1..1, H and W multiples of 8 -> mean and log-variance of q(z|x), each (B,4,H/8,W/8)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # exp() of it stays finite in fp32

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B,4,h,w) -> pictures (B,3,8h,8w), about -1..1, not clipped."""
        return self.decoder(self.post_quant_conv(z))
