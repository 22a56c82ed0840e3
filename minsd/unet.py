"""The noise-predicting network of Stable Diffusion 1.x and 2.x (Rombach et al. 2022; Ho et al. 2020).

A U of residual blocks with transformer blocks between them: down the levels keeping what each layer made, through the
middle, and up again with the kept tensors joined on. Read from `UNet` at the bottom upwards. Attribute names are those
of diffusers' UNet2DConditionModel checkpoints, so a state dict loads without a table.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minsd.attention import Attention, AttentionRecorder
from minsd.config import UNetConfig
from minsd.kernels import Linear, group_norm


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoids of t (B,) at `dim/2` frequencies from 1 to 1/10000, cosines first -> (B, dim) float32."""
    frequencies = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000.0) / (dim // 2)))
    angles = t.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.linear_1 = Linear(dim, dim_out)
        self.linear_2 = Linear(dim_out, dim_out)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, around a skip; the time embedding shifts every channel in between."""

    def __init__(self, c_in: int, c_out: int, dim_time: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, c_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = Linear(dim_time, c_out)
        self.norm2 = nn.GroupNorm(config.norm_groups, c_out, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, temb):
        h = self.conv1(group_norm(x, self.norm1, silu=True))
        h = self.conv2(group_norm(h, self.norm2, self.time_emb_proj(temb), silu=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class GEGLU(nn.Module):
    """A linear layer gated by another (Shazeer 2020)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = Linear(dim, 2 * dim_out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)]
        )  # [1]: dropout's place

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Cells look at one another, then at the text, then think."""

    def __init__(self, dim: int, num_heads: int, context_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x, context, grid, record, region):
        x = x + self.attn1(self.norm1(x), grid=grid, record=record)  # (B, h*w, C)
        context = context[self.attn2] if isinstance(context, dict) else context
        x = x + self.attn2(self.norm2(x), context, grid=grid, record=record, region=region)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A transformer block on the cells of a feature map, between two projections, around a skip."""

    def __init__(self, dim: int, num_heads: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, dim, eps=1e-6)
        self.linear = config.linear_projection
        self.proj_in = Linear(dim, dim) if self.linear else nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, num_heads, config.context_dim)])
        self.proj_out = Linear(dim, dim) if self.linear else nn.Conv2d(dim, dim, 1)

    def forward(self, x, context, record=None, region=None):
        grid = tuple(x.shape[-2:])  # (h, w)
        if region is not None:
            region = region[grid]  # (B, h*w)
        h = group_norm(x, self.norm)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, h*w, C)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context, grid, record, region)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
        h = h if self.linear else self.proj_out(h)
        return x + h


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Module):
    """One level's layers by name. Their order of running is written out in `UNet.forward`, where it can be seen whole."""

    def __init__(self, resnets, attentions, downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:  # absent, not empty, at levels without: as in the checkpoints
            self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def layers(self):
        """(resnet, transformer or None) pairs."""
        return zip(self.resnets, getattr(self, "attentions", None) or [None] * len(self.resnets))


class UNet(nn.Module):
    """Predicts the noise (or v, by the checkpoint) in latents. An empty network: `minsd.load` fills and freezes one."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, n = config.block_out_channels, config.layers_per_block
        last, dim_time = len(widths) - 1, 4 * widths[0]

        def resnet(c_in, c_out):
            return ResnetBlock(c_in, c_out, dim_time, config)

        def transformers(level, count):
            if not config.cross_attention[level]:
                return []
            return [Transformer(widths[level], config.num_heads[level], config) for _ in range(count)]

        self.time_embedding = TimestepEmbedding(widths[0], dim_time)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips, c = [widths[0]], widths[0]  # channels of every tensor kept on the way down; channels now
        for level, width in enumerate(widths):
            resnets = [resnet(c if i == 0 else width, width) for i in range(n)]
            down = Downsample(width) if level < last else None
            self.down_blocks.append(Block(resnets, transformers(level, n), downsampler=down))
            skips += [width] * (n + (level < last))
            c = width

        self.mid_block = Block([resnet(c, c), resnet(c, c)], [Transformer(c, config.num_heads[-1], config)])

        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            resnets = [resnet((c if i == 0 else width) + skips.pop(), width) for i in range(n + 1)]
            up = Upsample(width) if level > 0 else None
            self.up_blocks.append(Block(resnets, transformers(level, n + 1), upsampler=up))
            c = width

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

        attention_blocks = [(2 * n + 1) * on for on in config.cross_attention]
        attention_blocks[-1] += 1  # the middle's
        self.attention_blocks = attention_blocks  # transformer blocks at each level

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(rows, columns) of every level, finest first, for latents of `size`."""
        return [(-(-size[0] // 2**i), -(-size[1] // 2**i)) for i in range(len(self.down_blocks))]

    def keys(self, context: torch.Tensor) -> dict[Attention, tuple[torch.Tensor, torch.Tensor]]:
        """What every attention layer makes of the text states (B,77,D). It does not depend on x or t: `forward` takes it in
        place of the context, so that a run of many steps computes it once."""
        return {m: m.kv(context) for m in self.modules() if isinstance(m, Attention) and m.is_cross}

    def forward(
        self,
        x: torch.Tensor,
        t: int | float | torch.Tensor,
        context: torch.Tensor | dict,
        *,
        record: AttentionRecorder | None = None,
        region: dict[tuple[int, int], torch.Tensor] | tuple[dict, dict] | None = None,
        control: tuple[list[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor | None:
        """x (B,4,h,w) latents, t a training timestep or (B,) of them, context (B,77,D) text states or their `keys`
        -> (B,4,h,w).

        `record` collects attention maps on the way; with `record.only` the pass ends after the last layer that records
        and returns None. h and w may be any size: the way up takes each size from what was kept on the way down.

        With `region`, context is (B,R,77,D), R texts for each picture, and every cell looks at one of them:
        `region[grid]` is (B, rows*columns) integers 0..R-1 for the grid of each level with cross-attention (`grids`). Of a
        pair of such dicts the first serves the way down, the second the middle and the way up.
        `control` is what a ControlNet adds: one tensor for each skip, in the order of `skips` below, and one for the middle.
        """
        if record is not None:
            record.begin(self.grids(x.shape[-2:]), self.attention_blocks)
        t = t.to(x.device).expand(len(x)) if torch.is_tensor(t) else torch.full((len(x),), t, device=x.device)
        temb = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(x.dtype))
        temb = F.silu(temb)  # every resnet applies it first: once here  # (B, 4*C0)
        region_down, region_up = region if isinstance(region, tuple) else (region, region)

        x = self.conv_in(x)  # (B, C0, h, w)
        skips = [x]
        for block in self.down_blocks:
            for resnet, transformer in block.layers():
                x = resnet(x, temb)
                if transformer is not None:
                    x = transformer(x, context, record, region_down)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)  # (B, C, h/2, w/2)
                skips.append(x)
        if record is not None and record.done:
            return None

        x = self.mid_block.resnets[0](x, temb)
        x = self.mid_block.attentions[0](x, context, record, region_up)
        x = self.mid_block.resnets[1](x, temb)
        if record is not None and record.done:
            return None
        if control is not None:
            skips = [skip + add for skip, add in zip(skips, control[0], strict=True)]
            x = x + control[1]

        for block in self.up_blocks:
            for resnet, transformer in block.layers():
                x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
                if transformer is not None:
                    x = transformer(x, context, record, region_up)
                    if record is not None and record.done:
                        return None
            for upsample in block.upsamplers:
                x = upsample(x, skips[-1].shape[-2:])  # (B, C, 2h, 2w), or one less where the size was odd
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))
