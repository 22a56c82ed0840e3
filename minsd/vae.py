"""The variational autoencoder between images and latents (Kingma & Welling 2014; Rombach et al.
2022, section 3.1).

The encoder turns images (B,3,H,W) in -1..1 into latents (B,4,H/8,W/8), and the decoder turns
latents into images. Start reading at `VAE` and go upwards. Attribute names are those of diffusers'
AutoencoderKL checkpoints, so a state dict loads without translating names.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minsd.config import VAEConfig
from minsd.kernels import attention, group_norm


class ResnetBlock(nn.Module):
    """A residual block: twice norm, SiLU and convolution, and a skip connection. The skip
    connection is a 1x1 convolution if `c_in` and `c_out` differ, otherwise the identity."""

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
    """Self-attention with one head over all cells of a feature map. In no other layer of the VAE
    does a cell depend on the whole image, except for the statistics of norms."""

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
        # Each (B, h*w, 1 head, C).
        q, k, v = (f(y).unsqueeze(2) for f in (self.to_q, self.to_k, self.to_v))
        y, _ = attention(q, k, v)
        y = self.to_out[0](y.squeeze(2))
        return x + y.transpose(1, 2).reshape(b, c, h, w)


class MidBlock(nn.Module):
    """The VAE's layers at the coarsest resolution: a residual block, attention, and another
    residual block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([MidAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """A convolution that halves the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and bottom only, as in training


class Upsample(nn.Module):
    """Nearest-neighbour upsampling that doubles the resolution, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


Layer = ResnetBlock | Downsample | Upsample


class Level(nn.Module):
    """The residual blocks of one resolution level of the VAE. They are followed by a layer that
    halves the resolution if `down` is True, or doubles it if `up` is True."""

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
        """Returns the level's layers in the order in which they run."""
        layers: list = [*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())]
        return layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


class Encoder(nn.Module):
    """The encoder without its last convolution, `VAE.quant_conv`. It maps images (B,3,H,W) to
    (B,8,H/8,W/8): four channels for the mean of the latents, and four for their log-variance."""

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
    """The decoder without its first convolution, `VAE.post_quant_conv`. It maps latents (B,4,h,w)
    to images (B,3,8h,8w)."""

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
    """The variational autoencoder. The constructor makes it with the sizes in `config` and without
    trained weights. Its latents are not scaled: the pipeline multiplies them by
    `config.scaling_factor`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images (B,3,H,W) with values from -1 to 1, where H and W are multiples of 8.
        Returns (mean, logvar), the mean and the log-variance of the latents' distribution, each
        (B,4,H/8,W/8)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # exp() stays finite in float32

    def decode(self, z: Tensor) -> Tensor:
        """Decodes latents (B,4,h,w) into images (B,3,8h,8w). Values are about -1 to 1 and are not
        clipped."""
        return self.decoder(self.post_quant_conv(z))


# --- large images ---------------------------------------------------------------------------------
# The finest level holds about nine feature maps of block_out_channels[0] channels at full
# resolution at the same time (measured on a CPU: 4.5 GB in float32 at 1024x1024). Most of these
# maps exist only between two convolutions. Where memory is short, every convolution, with the norm
# and SiLU before it, runs in bands, which are strips of rows processed one after another. Only the
# input, the middle and the output of a residual block remain as whole maps. GroupNorm still takes
# its statistics from the whole map, and attention still covers all cells, so the result is the same
# up to rounding and there are no seams to blend. (Tiles that are decoded separately, with their own
# statistics or those of a smaller image, differ visibly, by up to 150 of 255 on an image of many
# shapes.)


def memory_needed(config: VAEConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """Estimates the peak memory, in bytes, that it takes to encode or decode one image of `height`
    x `width` pixels as a whole. Processing the image in bands (strips of rows, one after another)
    takes 60 % of this."""
    return 9 * config.block_out_channels[0] * height * width * dtype.itemsize


def _in_bands(layer: Callable[[Tensor], Tensor], x: Tensor, scale: float = 1) -> Tensor:
    """Computes layer(x) for x (B,C,H,W) in at most 16 bands, which are strips of rows, one after
    another. This takes less memory than all rows at once.

    `layer` turns each row into `scale` rows (0.5, 1 or 2). A row of its output may depend on the
    input row at the same place, on two rows above it and on two rows below it, and on no others.
    """
    height = x.shape[2]
    band = 2 * max(8, -(-height // 32))  # even, so that a Downsample can halve it
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
    """Computes conv(silu(norm(x))) for x (B,C,H,W) in bands (strips of rows, one after another),
    which takes less memory. The norm's mean and variance are still those of all rows."""
    per_group = x.shape[1] // norm.num_groups
    count = per_group * x.shape[2] * x.shape[3]
    exact = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(len(x), norm.num_groups, dtype=exact)  # (B, groups)
    squares = torch.zeros_like(total)
    # The mean of the first band. It is subtracted before squaring, because the difference of large
    # squares would lose precision.
    around = None
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
    """Computes layer(x) for x (B,C,H,W) in bands (strips of rows, one after another), which takes
    less memory. `layer` is any layer of a VAE's level. The two convolutions of a residual block are
    computed in bands separately."""
    if not isinstance(layer, ResnetBlock):
        return _in_bands(layer, x, 0.5 if isinstance(layer, Downsample) else 2)
    h = _conv_in_bands(layer.norm1, layer.conv1, x)
    h = _conv_in_bands(layer.norm2, layer.conv2, h)
    h += x if layer.conv_shortcut is None else _in_bands(layer.conv_shortcut, x)
    return h


def _layers(levels: nn.ModuleList) -> Iterator[Layer]:
    """Yields the layers of all `levels` of an encoder or decoder, in the order in which they
    run."""
    for level in levels:
        assert isinstance(level, Level)
        yield from level.layers()


def decode_in_bands(vae: VAE, z: Tensor) -> Tensor:
    """Does what `VAE.decode` does, in bands (strips of rows, one after another). Decodes latents
    (B,4,h,w) into images (B,3,8h,8w). This takes 60 % of the memory: 1.4 GB instead of 2.4 GB at
    768x768 pixels in float32."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))
    for layer in _layers(decoder.up_blocks):
        x = _layer_in_bands(layer, x)
    return _conv_in_bands(decoder.conv_norm_out, decoder.conv_out, x)


def encode_in_bands(vae: VAE, images: Tensor) -> Tensor:
    """Encodes images (B,3,H,W) in bands (strips of rows, one after another), which takes less
    memory than `VAE.encode`. Returns the mean of the latents' distribution, (B,4,H/8,W/8), which is
    the first result of `VAE.encode`."""
    encoder = vae.encoder
    x = _in_bands(encoder.conv_in, images)
    for layer in _layers(encoder.down_blocks):
        x = _layer_in_bands(layer, x)
    x = encoder.conv_out(F.silu(encoder.conv_norm_out(encoder.mid_block(x))))
    return vae.quant_conv(x).chunk(2, dim=1)[0]
