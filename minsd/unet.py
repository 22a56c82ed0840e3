"""The noise-predicting network of Stable Diffusion 1.x, 2.x and XL (Rombach et al. 2022; Ho et al.
2020; Podell et al. 2023).

The network alternates residual blocks and transformer blocks. The encoder half halves the
resolution from level to level and keeps each layer's output (the skips). After the middle block,
the decoder half doubles the resolution from level to level and concatenates a skip before each
residual block. Read from `UNet` at the bottom upwards. Attribute names are those of diffusers'
UNet2DConditionModel checkpoints, so a state dict loads without translating names.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minsd.attention import Attention, AttentionRecorder
from minsd.config import CELL, DISTILLED_SCALE, UNetConfig
from minsd.kernels import Linear, group_norm

Grid = tuple[int, int]  # rows and columns of a level's cells
# For SDXL only: the pooled text state (B,P), and six numbers on the image's size (B,6); see
# `UNet.split`.
Whole = tuple[Tensor, Tensor]
# Keys and values of each cross-attention layer, (B,77n,heads,d) each. For SDXL also the `Whole` of
# the context, whose key is the module `add_embedding`.
TextKV = dict[nn.Module, tuple[Tensor, Tensor]]
# The number of the text that each cell attends to: grid of a level -> integers (B, rows*columns).
CellTexts = dict[Grid, Tensor]
# The tensors that a ControlNet adds: a list with one tensor per skip, and one tensor for the output
# of the middle block.
Residuals = tuple[list[Tensor], Tensor]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Embeds timesteps t (B,). Returns (B,dim) float32: the cosines and then the sines of t f, for
    `dim/2` frequencies f that fall from 1 towards 1/10000."""
    frequencies = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000.0) / (dim // 2)))
    angles = t.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(guidance_scale: float, dim: int) -> Tensor:
    """Embeds a guidance scale, for a distilled network that takes it as an input (Luo et al. 2023,
    section 4.1). Returns (1,dim) float32: the sines and then the cosines of 1000 (scale - 1) f, for
    `dim/2` frequencies f that fall from 1 to 1/10000."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half) * (-math.log(10000.0) / max(half - 1, 1)))
    angles = (guidance_scale - 1) * 1000.0 * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between them, for the output (B,dim) of `timestep_embedding`. The
    result is (B,dim_out). If `dim_cond` is not 0, there may be a second input `cond` (B,dim_cond).
    It is projected to the width `dim` and added to the first input."""

    def __init__(self, dim: int, dim_out: int, dim_cond: int = 0):
        super().__init__()
        if dim_cond:
            self.cond_proj = Linear(dim_cond, dim, bias=False)
        self.linear_1 = Linear(dim, dim_out)
        self.linear_2 = Linear(dim_out, dim_out)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """A residual block: twice norm, SiLU and convolution, and a skip connection. A projection of
    the time embedding, one number per channel, is added after the first convolution."""

    def __init__(self, c_in: int, c_out: int, dim_time: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, c_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = Linear(dim_time, c_out)
        self.norm2 = nn.GroupNorm(config.norm_groups, c_out, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(group_norm(x, self.norm1, silu=True))
        h = self.conv2(group_norm(h, self.norm2, self.time_emb_proj(temb), silu=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class GEGLU(nn.Module):
    """A gated linear layer (Shazeer 2020): x A * GELU(x B), where A and B map the width `dim` to
    `dim_out`, each with a bias."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = Linear(dim, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """The feed-forward part of a transformer block: a GEGLU from the width `dim` to 4 `dim`, and a
    linear layer back to `dim`."""

    def __init__(self, dim: int):
        super().__init__()
        # In checkpoints dropout is layer 1. The identity takes that place, so that names match.
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, and a feed-forward part. Each of the three has a
    layer norm before it and a residual connection around it."""

    def __init__(self, dim: int, num_heads: int, context_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | TextKV,
        grid: Grid,
        record: AttentionRecorder | None,
        region: Tensor | None,
    ) -> Tensor:
        x = x + self.attn1(self.norm1(x), grid=grid, record=record)  # (B, h*w, C)
        text = context[self.attn2] if isinstance(context, dict) else context
        x = x + self.attn2(self.norm2(x), text, grid=grid, record=record, region=region)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks for one level of the UNet. They run on the cells of a feature map
    (B,C,h,w), between a projection before the first block and one after the last. The input is
    added to the result."""

    def __init__(self, level: int, config: UNetConfig):
        super().__init__()
        dim = config.block_out_channels[level]
        depth = config.transformer_depth[level]
        self.norm = nn.GroupNorm(config.norm_groups, dim, eps=1e-6)
        self.linear = config.linear_projection
        self.proj_in = Linear(dim, dim) if self.linear else nn.Conv2d(dim, dim, 1)
        blocks = [TransformerBlock(dim, config.num_heads[level], config.context_dim) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = Linear(dim, dim) if self.linear else nn.Conv2d(dim, dim, 1)

    def forward(
        self,
        x: Tensor,
        context: Tensor | TextKV,
        record: AttentionRecorder | None = None,
        region: CellTexts | None = None,
    ) -> Tensor:
        grid = (x.shape[-2], x.shape[-1])  # (h, w)
        cells = None if region is None else region[grid]  # (B, h*w)
        h = group_norm(x, self.norm)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, h*w, C)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context, grid, record, cells)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
        h = h if self.linear else self.proj_out(h)
        return x + h


class Downsample(nn.Module):
    """A convolution that halves the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to `size` (rows, columns), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Grid) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Module):
    """The layers of one resolution level of the UNet, under the attribute names that checkpoints
    have. This class only holds the layers; the methods of `UNet` run them."""

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[Transformer],
        downsampler: Downsample | None = None,
        upsampler: Upsample | None = None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:  # as in checkpoints, levels without attention do not have this attribute
            self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Returns an iterator over pairs (residual block, transformer), in the order in which they
        run. The transformer is None at a level without attention."""
        return zip(self.resnets, getattr(self, "attentions", None) or [None] * len(self.resnets))


if TYPE_CHECKING:

    class Blocks(nn.ModuleList):
        """A ModuleList whose items have the type Block, for type checkers."""

        def __iter__(self) -> Iterator[Block]: ...
else:
    Blocks = nn.ModuleList


class UNet(nn.Module):
    """The network that predicts the noise (or v, which depends on the checkpoint) in latents. The
    constructor makes it without trained weights. Use `minsd.load` for one with trained weights,
    which are frozen."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        n = config.layers_per_block
        last = len(widths) - 1
        dim_time = 4 * widths[0]

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, dim_time, config)

        def transformers(level: int, count: int) -> list[Transformer]:
            if not config.cross_attention[level]:
                return []
            return [Transformer(level, config) for _ in range(count)]

        self.time_embedding = TimestepEmbedding(widths[0], dim_time, config.guidance_dim)
        self.guidance: Tensor | None = None  # (1,guidance_dim), of a distilled network
        dim_whole = config.pooled_dim + 6 * config.size_dim
        self.add_embedding = TimestepEmbedding(dim_whole, dim_time) if config.pooled_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        self.down_blocks = Blocks()
        skips = skip_channels(config)
        c = widths[0]
        for level, width in enumerate(widths):
            resnets = [resnet(c if i == 0 else width, width) for i in range(n)]
            down = Downsample(width) if level < last else None
            self.down_blocks.append(Block(resnets, transformers(level, n), downsampler=down))
            c = width

        self.mid_block = Block([resnet(c, c), resnet(c, c)], [Transformer(last, config)])

        self.up_blocks = Blocks()
        for level, width in reversed(list(enumerate(widths))):
            resnets = [resnet((c if i == 0 else width) + skips.pop(), width) for i in range(n + 1)]
            up = Upsample(width) if level > 0 else None
            self.up_blocks.append(Block(resnets, transformers(level, n + 1), upsampler=up))
            c = width

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

        # The number of transformer blocks of each level, finest first.
        depths = zip(config.cross_attention, config.transformer_depth)
        self.attention_blocks = [(2 * n + 1) * on * depth for on, depth in depths]
        self.attention_blocks[-1] += config.transformer_depth[last]  # those of the middle block

    def guidance_of(self, guidance_scale: float) -> Tensor:
        """Embeds a guidance scale for the method `guide`. Returns (1,guidance_dim), in the
        network's dtype and on its device."""
        return guidance_embedding(guidance_scale, self.config.guidance_dim).to(self.conv_in.weight)

    def guide(self, embedding: Tensor) -> None:
        """Sets the guidance scale of a distilled network for all later evaluations. `embedding` is
        what `guidance_of` returns for that scale. It is copied into a tensor that stays in place,
        because CUDA graphs read the scale from this tensor's memory."""
        if self.guidance is None:
            self.guidance = embedding.clone()
        else:
            self.guidance.copy_(embedding)

    def grids(self, size: Grid) -> list[Grid]:
        """Returns the grid of cells (rows, columns) of each level of the UNet, the finest first,
        for latents of `size` (rows, columns)."""
        return [
            (-(-size[0] // 2**i), -(-size[1] // 2**i)) for i in range(len(self.config.block_out_channels))
        ]

    def text_kv(self, context: Tensor) -> TextKV:
        """Computes the keys and values of every cross-attention layer for the text states `context`
        (B,77n,D). Returns a dict of layer -> (keys, values), which can be passed to `forward` as
        `context`. It depends on neither x nor t, so compute it once per run.

        For SDXL, `context` has one row more, and the dict also holds what this row describes: the
        pooled text state and six numbers on the image's size.
        """
        text, whole = self.split(context)
        known: TextKV = {m: m.kv(text) for m in self.modules() if isinstance(m, Attention) and m.is_cross}
        if whole is not None and self.add_embedding is not None:
            known[self.add_embedding] = whole
        return known

    def split(self, context: Tensor | TextKV) -> tuple[Any, Whole | None]:
        """Splits a context, or the dict that `text_kv` makes of it. Returns (text, whole). `text`
        is the part for cross-attention. `whole` is, for SDXL, the pair of the pooled text state and
        six numbers on the image's size, and None for other models. Raises ValueError if the context
        has a wrong number of rows."""
        add = self.add_embedding
        if isinstance(context, dict):
            return context, None if add is None else context[add]
        if context.shape[-2] % 77 != (add is not None):
            kinds = (
                "a context has 77 text states",
                "SDXL's context has 77 text states and a row for the whole",
            )
            made = kinds[add is not None]
            raise ValueError(f"{made} (sd.encode_prompt makes it), not {context.shape[-2]} rows")
        if add is None:
            return context, None
        row = context[:, -1] if context.ndim == 3 else context[:, 0, -1]  # with R texts: of the first
        p = self.config.pooled_dim
        return context[..., :-1, :], (row[:, :p], row[:, p : p + 6])

    def embed_whole(self, x: Tensor, whole: Whole) -> Tensor:
        """Embeds what SDXL's context states about the whole: `whole` is the pair of the pooled text
        state and six numbers on the image's size. If the six numbers are all zero, the size of the
        latents x is used. Returns (B,4*C0), to be added to the time embedding, where C0 is the
        channel count of the finest level."""
        pooled, size = whole
        own = torch.zeros(6, device=x.device)  # the latents' own size, for rows that state none
        own[0::4], own[1::4] = (CELL * side for side in x.shape[-2:])
        size = torch.where(size.any(dim=1, keepdim=True), size.float(), own)  # (B, 6)
        size = timestep_embedding(size.flatten(), self.config.size_dim).view(len(size), -1)
        assert self.add_embedding is not None
        return self.add_embedding(torch.cat([pooled, size.to(x.dtype)], dim=1))

    def forward(
        self,
        x: Tensor,
        t: int | float | Tensor,
        context: Tensor | TextKV,
        *,
        record: AttentionRecorder | None = None,
        region: CellTexts | tuple[CellTexts, CellTexts] | None = None,
        control: Residuals | None = None,
    ) -> Tensor | None:
        """Predicts the noise or v (B,4,h,w) in latents x (B,4,h,w), where h and w may be any
        numbers.

        `t` is a training timestep, or a tensor (B,) of timesteps. `context` is text states
        (B,77n,D), for SDXL with one row more (minsd/text.py), or what `text_kv` makes of them.
        `record` collects attention maps. If `record.only` is set, the evaluation ends after the
        last layer that records, and returns None.

        `region` is for a context with R texts per image, (B,R,77n,D), and states which text each
        cell attends to. It is a dict whose keys are the grids (rows, columns) of the levels with
        cross-attention and of the middle block. The values are integers (B, rows*columns) from 0 to
        R - 1, the number of each cell's text. `region` can also be a pair of such dicts, for the
        encoder half and for the rest of the network.

        `control` is what a ControlNet returns: a list with one tensor for each skip, in the order
        in which the encoder half makes the skips, and one tensor for the output of the middle
        block. They are added to the skips and to that output.
        """
        if record is not None:
            record.begin(self.grids((x.shape[-2], x.shape[-1])), self.attention_blocks)
        region_down, region_up = region if isinstance(region, tuple) else (region, region)

        context, whole = self.split(context)
        x, skips, temb = self.encode(x, t, context, record, region_down, whole=whole)
        if record is not None and record.done:
            return None

        x = self.middle(x, temb, context, record, region_up)  # (B, C, h/8, w/8) in SD1.x
        if record is not None and record.done:
            return None
        if control is not None:
            skips = [skip + residual for skip, residual in zip(skips, control[0], strict=True)]
            x = x + control[1]

        for block in self.up_blocks:
            for resnet, transformer in block.layers():
                x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
                if transformer is not None:
                    x = transformer(x, context, record, region_up)
                    if record is not None and record.done:
                        return None
            for upsample in block.upsamplers:
                x = upsample(x, skips[-1].shape[-2:])  # (B, C, 2h, 2w), or one less for odd skips
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))

    def encode(
        self,
        x: Tensor,
        t: int | float | Tensor,
        context: Tensor | TextKV,
        record: AttentionRecorder | None = None,
        region: CellTexts | None = None,
        add: Tensor | None = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Runs the encoder half on latents x (B,4,h,w) at timestep t. Returns (features, skips,
        temb): the feature map of the coarsest level, the list of skips, and the time embedding
        (B,4*C0), where C0 is the channel count of the finest level.

        `context` and `whole` are the two results of `split`. `record` collects attention maps.
        `region` is a dict as in `forward`. `add` (B,C0,h,w) is added to the first feature map; a
        ControlNet passes its embedded control image here.
        """
        t = t.to(x.device).expand(len(x)) if torch.is_tensor(t) else torch.full((len(x),), t, device=x.device)
        told = timestep_embedding(t, self.config.block_out_channels[0]).to(x.dtype)
        if self.config.guidance_dim and self.guidance is None:
            self.guide(self.guidance_of(DISTILLED_SCALE))
        temb = self.time_embedding(told, None if self.guidance is None else self.guidance.to(x))
        temb = temb if whole is None else temb + self.embed_whole(x, whole)
        temb = F.silu(temb)  # computed once, since every resnet block needs it

        x = self.conv_in(x)  # (B, C0, h, w)
        if add is not None:
            x = x + add
        skips = [x]
        for block in self.down_blocks:
            for resnet, transformer in block.layers():
                x = resnet(x, temb)
                if transformer is not None:
                    x = transformer(x, context, record, region)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)  # (B, C, h/2, w/2)
                skips.append(x)
        return x, skips, temb

    def middle(
        self,
        x: Tensor,
        temb: Tensor,
        context: Tensor | TextKV,
        record: AttentionRecorder | None = None,
        region: CellTexts | None = None,
    ) -> Tensor:
        """Runs the middle block on x, a feature map of the coarsest level, and returns a feature
        map of the same shape. `temb`, the time embedding, is a result of `encode`. `context`,
        `record` and `region` are those of `encode`."""
        x = self.mid_block.resnets[0](x, temb)
        x = self.mid_block.attentions[0](x, context, record, region)
        return self.mid_block.resnets[1](x, temb)


def skip_channels(config: UNetConfig) -> list[int]:
    """Returns the channel counts of the skips of a UNet with `config`, in the order in which the
    encoder half makes the skips."""
    widths = config.block_out_channels
    channels = [widths[0]]
    for level, width in enumerate(widths):
        channels += [width] * (config.layers_per_block + (level < len(widths) - 1))
    return channels
