"""The variational autoencoder between images and latents (Kingma & Welling 2014; Rombach et al.
2022, section 3.1).

Images (B,3,H,W) in -1..1 become latents (B,4,H/8,W/8) and back. Start reading at `VAE` and go
upwards. Attribute names are those of diffusers' AutoencoderKL checkpoints, so a state dict loads
without a table.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minsd.config import VAEConfig
from minsd.kernels import attention, group_norm


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and convolution, plus a skip; the skip has a 1x1 convolution where the width
    changes."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(group_norm(x, self.norm1, silu=True))
        h = self.conv2(group_norm(h, self.norm2, silu=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class MidAttention(nn.Module):
    """Single-head self-attention over all cells: the one layer of the VAE that sees the whole
    image."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = group_norm(x, self.group_norm).flatten(2).transpose(1, 2)  # (B, h*w, C)
        q, k, v = (f(y).unsqueeze(2) for f in (self.to_q, self.to_k, self.to_v))  # (B, h*w, 1 head, C)
        y, _ = attention(q, k, v)
        y = self.to_out[0](y.squeeze(2))
        return x + y.transpose(1, 2).reshape(b, c, h, w)


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([MidAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the checkpoints were trained


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


Layer = ResnetBlock | Downsample | Upsample


class Level(nn.Module):
    """The residual blocks of one resolution, then, except at the last level, the change to the
    next."""

    def __init__(
        self, c_in: int, c_out: int, layers: int, groups: int, *, down: bool = False, up: bool = False
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)
        )
        if down:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def layers(self) -> list[Layer]:
        """In the order in which they run."""
        layers: list = [*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())]
        return layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        groups = config.norm_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block, groups, down=i < last)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, 128, H, W)
        for block in self.down_blocks:
            x = block(x)  # ... (B, 512, H/8, W/8)
        return self.conv_out(group_norm(self.mid_block(x), self.conv_norm_out, silu=True))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        groups = config.norm_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, up=i < last)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))  # (B, 512, h, w)
        for block in self.up_blocks:
            x = block(x)  # ... (B, 128, 8h, 8w)
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))


class VAE(nn.Module):
    """An empty network of the config's sizes. `encode` and `decode` work in the checkpoint's own
    scale; the pipeline applies `config.scaling_factor`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,H,W) in -1..1, H and W multiples of 8 -> mean and log-variance of q(z|x),
        each (B,4,H/8,W/8)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # exp() stays finite in float32

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B,4,h,w) -> images (B,3,8h,8w), about -1..1, not clipped."""
        return self.decoder(self.post_quant_conv(z))


# --- large images ---------------------------------------------------------------------------------
# The finest level holds about nine feature maps of block_out_channels[0] channels for every pixel
# at once (measured on a CPU: 4.5 GB in float32 at 1024x1024). Most of them exist only between two
# convolutions. Where memory is short, every convolution, with the norm and SiLU before it, runs in
# bands of rows. Only the input, the middle and the output of a residual block remain as whole maps.
# GroupNorm takes its statistics from the whole map and attention sees all cells, as always, so the
# result is the same to rounding and there are no seams to blend. (Tiles that are decoded apart,
# with their own statistics or those of a smaller image, differ visibly: by up to 150 of 255 on a
# sheet of shapes.)


def memory_needed(config: VAEConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """The approximate peak of bytes to encode or decode one image of height x width pixels; in
    bands it is 60 % of that."""
    return 9 * config.block_out_channels[0] * height * width * dtype.itemsize


def _in_bands(layer: Callable[[Tensor], Tensor], x: Tensor, scale: float = 1) -> Tensor:
    """layer(x) of (B,C,H,W), in sixteen bands of rows one after the other.

    The layer turns each row into `scale` rows, and sees at most two rows above and below.
    """
    height = x.shape[2]
    band = 2 * max(8, -(-height // 32))  # even, so that it can be halved
    out = None
    for top in range(0, height, band):
        bottom = min(top + band, height)
        first = max(top - 2, 0)
        y = layer(x[:, :, first : bottom + 2])
        start = int((top - first) * scale)
        y = y[:, :, start : start + int((bottom - top) * scale)]
        if out is None:
            out = y.new_empty(*y.shape[:2], int(height * scale), y.shape[3])
        out[:, :, int(top * scale) : int(bottom * scale)] = y
    assert out is not None
    return out


def _conv_in_bands(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(silu(norm(x))) of (B,C,H,W)."""
    per_group = x.shape[1] // norm.num_groups
    count = per_group * x.shape[2] * x.shape[3]
    exact = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(len(x), norm.num_groups, dtype=exact)  # (B, groups)
    squares = torch.zeros_like(total)
    around = None  # the mean of the first band: squares of large numbers would cancel
    for band in x.split(max(1, x.shape[2] // 16), dim=2):
        band = band.unflatten(1, (norm.num_groups, -1)).flatten(2).to(exact)  # (B, groups, n)
        if around is None:
            around = band.mean(2, keepdim=True)
        band = band - around
        total = total + band.sum(2)
        squares = squares + band.square().sum(2)
    assert around is not None
    mean = total / count
    scale = ((squares / count - mean.square()).clamp(min=0) + norm.eps).rsqrt()
    mean = mean + around[..., 0]
    shift = (-mean * scale).repeat_interleave(per_group, dim=1)  # (B, C)
    scale = scale.repeat_interleave(per_group, dim=1)
    shift = (shift * norm.weight + norm.bias)[..., None, None].to(exact)
    scale = (scale * norm.weight)[..., None, None].to(exact)
    return _in_bands(lambda band: conv(F.silu(band.to(exact) * scale + shift).to(x.dtype)), x)


def _layer_in_bands(layer: Layer, x: Tensor) -> Tensor:
    if not isinstance(layer, ResnetBlock):
        return _in_bands(layer, x, 0.5 if isinstance(layer, Downsample) else 2)
    h = _conv_in_bands(layer.norm1, layer.conv1, x)
    h = _conv_in_bands(layer.norm2, layer.conv2, h)
    h += x if layer.conv_shortcut is None else _in_bands(layer.conv_shortcut, x)
    return h


def _layers(levels: nn.ModuleList) -> Iterator[Layer]:
    """All layers of all levels, in the order in which they run."""
    for level in levels:
        assert isinstance(level, Level)
        yield from level.layers()


def decode_in_bands(vae: VAE, z: Tensor) -> Tensor:
    """As `VAE.decode`, latents (B,4,h,w) -> images (B,3,8h,8w), in 60 % of the memory (2.4 and 1.4
    GB at 768x768 in float32)."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))
    for layer in _layers(decoder.up_blocks):
        x = _layer_in_bands(layer, x)
    return _conv_in_bands(decoder.conv_norm_out, decoder.conv_out, x)


def encode_in_bands(vae: VAE, images: Tensor) -> Tensor:
    """As the mean of `VAE.encode`, images (B,3,H,W) -> (B,4,H/8,W/8), in less memory."""
    encoder = vae.encoder
    x = _in_bands(encoder.conv_in, images)
    for layer in _layers(encoder.down_blocks):
        x = _layer_in_bands(layer, x)
    x = encoder.conv_out(F.silu(encoder.conv_norm_out(encoder.mid_block(x))))
    return vae.quant_conv(x).chunk(2, dim=1)[0]
