"""The variational autoencoder between pictures and latents (Kingma & Welling 2014; Rombach et al. 2022, section 3.1).

Pictures (B,3,H,W) in -1..1 become latents (B,4,H/8,W/8) and back. Read from `VAE` at the bottom upwards.
Attribute names are those of diffusers' AutoencoderKL checkpoints, so a state dict loads without a table.
"""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from minsd.config import VAEConfig
from minsd.kernels import attention, group_norm


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
        h = self.conv1(group_norm(x, self.norm1, silu=True))
        h = self.conv2(group_norm(h, self.norm2, silu=True))
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
        return self.conv_out(group_norm(self.mid_block(x), self.conv_norm_out, silu=True))


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
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))


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


# --- large pictures -------------------------------------------------------------------------------------------------
# The finest level holds about nine feature maps of block_out_channels[0] channels for every pixel at once (measured on a
# CPU: 4.5 GB in float32 at 1024x1024). Where memory would not do, a picture is coded in overlapping tiles of the size
# that VAEs were trained on. A tile of plain sky alone would be normalised into something else than sky beside a tree, so
# every GroupNorm takes its statistics from the whole picture made small; and over the overlap each tile fades into the
# next, so that no edge is left of what still differs (attention sees one tile).


def memory_needed(config: VAEConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that coding one picture of height x width pixels takes at its peak, about."""
    return 9 * config.block_out_channels[0] * height * width * dtype.itemsize


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of one size begin, evenly spread so that neighbours share at least `overlap`; the last ends at `size`."""
    count = max(1, -(-(size - overlap) // (tile - overlap)))
    return [round(i * (size - tile) / max(count - 1, 1)) for i in range(count)] if size > tile else [0]


def _fade(start: int, tile: int, size: int, overlap: int) -> torch.Tensor:
    """A tile's weight along one axis (tile,): full at the picture's own edges; elsewhere nothing in the outer quarter of the
    overlap, where the convolutions' padding shows, rising to full over the next half."""
    distance = 2 * (torch.arange(tile) + 0.5) - overlap / 2
    rise = distance if start > 0 else torch.full((tile,), float(overlap))
    fall = distance.flip(0) if start + tile < size else torch.full((tile,), float(overlap))
    return (torch.minimum(rise, fall) / overlap).clamp(0.0, 1.0)


@contextmanager
def _statistics_of(vae: nn.Module, run, x: torch.Tensor):
    """While the block runs, every GroupNorm of the VAE normalises by what it saw in run(x)."""
    norms = [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]
    seen = {}

    def look(norm, inputs):
        g = inputs[0].unflatten(1, (norm.num_groups, -1)).flatten(2).float()  # (B, groups, C/groups * h*w)
        var, mean = torch.var_mean(g, dim=2, correction=0)
        seen[norm] = mean, (var + norm.eps).rsqrt()

    def normalise(norm, x):
        mean, scale = (y.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)[..., None, None] for y in seen[norm])
        weight, bias = (p[:, None, None].float() for p in (norm.weight, norm.bias))
        return ((x.float() - mean) * (scale * weight) + bias).to(x.dtype)

    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        run(x)
        for handle in handles:
            handle.remove()
        for norm in seen:
            norm.forward = partial(normalise, norm)
        yield
    finally:
        for norm in seen:
            norm.__dict__.pop("forward", None)


def _tiled(vae, run, x: torch.Tensor, cell_in: int, cell_out: int, tile: int, overlap: int) -> torch.Tensor:
    """run(tile of x) for overlapping tiles, blended. A latent cell is `cell_in` wide in x and `cell_out` in the result."""
    height, width = (n // cell_in for n in x.shape[-2:])  # latent cells
    rows, columns = min(tile, height), min(tile, width)
    small = F.interpolate(x, size=(rows * cell_in, columns * cell_in), mode="nearest-exact")
    out = total = None
    with _statistics_of(vae, run, small):
        for top in _starts(height, tile, overlap):
            for left in _starts(width, tile, overlap):
                a, b = slice(top * cell_in, (top + rows) * cell_in), slice(left * cell_in, (left + columns) * cell_in)
                y = run(x[..., a, b]).float()
                if out is None:
                    shape = (*y.shape[:2], height * cell_out, width * cell_out)
                    out, total = y.new_zeros(shape), y.new_zeros(shape[2:])
                down = _fade(top * cell_out, rows * cell_out, height * cell_out, overlap * cell_out)
                across = _fade(left * cell_out, columns * cell_out, width * cell_out, overlap * cell_out)
                weight = (down[:, None] * across).to(y.device)
                a, b = slice(top * cell_out, (top + rows) * cell_out), slice(left * cell_out, (left + columns) * cell_out)
                out[..., a, b] += weight * y
                total[a, b] += weight
    return out / total


def decode_tiled(vae: VAE, z: torch.Tensor, tile: int = 64, overlap: int = 16) -> torch.Tensor:
    """As `VAE.decode`, in tiles of `tile` latent cells that share at least `overlap`. -> (B,3,8h,8w) float32."""
    return _tiled(vae, vae.decode, z, 1, 8, tile, overlap)


def encode_tiled(vae: VAE, images: torch.Tensor, tile: int = 64, overlap: int = 16) -> torch.Tensor:
    """As the mean of `VAE.encode`, in tiles. -> (B,4,H/8,W/8) float32."""
    return _tiled(vae, lambda x: vae.encode(x)[0], images, 8, 1, tile, overlap)
