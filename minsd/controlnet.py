"""ControlNet (Zhang, Rao & Agrawala 2023, arXiv 2302.05543): a picture tells the UNet where things go.

A trainable copy of the UNet's way down and of its middle sees the latents, the text and a control image, and what each of
its layers makes, through a convolution that began at zero, is added to what the UNet's same layer keeps for its way up.
Attribute names are those of diffusers' ControlNetModel checkpoints; weights/control.py fills one from files.

    net = load_controlnet("control_v11p_sd15_canny", device="cpu", dtype=torch.float32)
    unet = Controlled(sd.unet, [Control(net, read_control_image("edges.png", 512, 512), scale=0.8)])
    predict = guidance.classifier_free(unet, cond, uncond, 7.5, sd.schedule)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import nn

from minsd import image
from minsd.config import UNetConfig
from minsd.unet import UNet, timestep_embedding

TIMESTEPS = 1000  # of training


class ControlImageEmbedding(nn.Module):
    """The control image at the size of the latents: eight convolutions, of which three halve it."""

    def __init__(self, channels: int, hidden: Sequence[int]):
        super().__init__()
        self.conv_in = nn.Conv2d(3, hidden[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for c, c_next in zip(hidden, hidden[1:]):
            self.blocks += [nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c_next, 3, padding=1, stride=2)]
        self.conv_out = nn.Conv2d(hidden[-1], channels, 3, padding=1)

    def forward(self, x):
        for conv in (self.conv_in, *self.blocks):
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(UNet):
    """A UNet without its way up: it returns what it would have kept for it. An empty network, as `UNet` is."""

    def __init__(self, config: UNetConfig, hidden: Sequence[int] = (16, 32, 96, 256), bgr: bool = False):
        super().__init__(config)
        del self.up_blocks, self.conv_norm_out, self.conv_out
        self.bgr = bgr  # the order in which its control images had their colours in training
        widths, n = config.block_out_channels, config.layers_per_block
        kept = [widths[0]]  # as in UNet.__init__
        for level, width in enumerate(widths):
            kept += [width] * (n + (level < len(widths) - 1))
        self.controlnet_cond_embedding = ControlImageEmbedding(widths[0], hidden)
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(c, c, 1) for c in kept)
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Control images (B,3,8h,8w) in 0..1 -> (B,C,h,w), the same at every step."""
        return self.controlnet_cond_embedding(pictures.flip(1) if self.bgr else pictures)

    def forward(self, x, t, context, embedded, *, region=None) -> tuple[list[torch.Tensor], torch.Tensor]:
        """x, t, context and region as `UNet.forward` takes them, `embedded` (B,C,h,w) from `embed`
        -> (what to add to each tensor that the UNet keeps, and to its middle): its `control`."""
        t = t.to(x.device).expand(len(x)) if torch.is_tensor(t) else torch.full((len(x),), t, device=x.device)
        temb = F.silu(
            self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(x.dtype))
        )  # (B, 4*C0)
        region_down, region_up = region if isinstance(region, tuple) else (region, region)

        x = self.conv_in(x) + embedded  # (B, C0, h, w)
        skips = [x]
        for block in self.down_blocks:
            for resnet, transformer in block.layers():
                x = resnet(x, temb)
                if transformer is not None:
                    x = transformer(x, context, region=region_down)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        x = self.mid_block.resnets[0](x, temb)
        x = self.mid_block.attentions[0](x, context, region=region_up)
        x = self.mid_block.resnets[1](x, temb)
        return [
            conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)
        ], self.controlnet_mid_block(x)


@dataclass(frozen=True)
class Control:
    """A ControlNet, what it looks at, and how much of it counts when.

    `pictures` (R,3,H,W) in 0..1 are control images, one for all rows of a batch (R = 1) or each row's own; `scale` a number
    or R of them. `start` and `end` are shares of the way from noise to picture, counted in training timesteps: with
    start 0.2 and end 0.8 it counts at 200 <= t < 800. That is the same share of the steps for evenly spaced ones.
    """

    net: ControlNet
    pictures: torch.Tensor
    scale: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if self.pictures is None:
            raise ValueError("a ControlNet needs a control image: give one (--control-image FILE)")
        if self.pictures.ndim != 4 or self.pictures.shape[1] != 3:
            raise ValueError(f"control images must be (B,3,H,W), not {tuple(self.pictures.shape)}")
        if not np.isfinite(self.scales).all() or len(self.scales) not in (1, len(self.pictures)):
            raise ValueError(
                f"a control scale must be a number, or one for each of {len(self.pictures)} control images, not {self.scale}"
            )
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"control start and end must be shares of the steps, 0 <= start < end <= 1, not {self.start} and {self.end}"
            )

    @property
    def scales(self) -> list[float]:
        return [float(s) for s in (self.scale if isinstance(self.scale, Sequence) else [self.scale])]

    def counts(self, t: int | float | torch.Tensor) -> bool:
        """Whether it has a say at timestep t (of a batch: at the first row's)."""
        t = float(t.flatten()[0] if torch.is_tensor(t) else t)
        to, fro = (round(TIMESTEPS * (1 - share), 6) for share in (self.end, self.start))
        return any(self.scales) and (to <= t or self.end == 1) and (t < fro or self.start == 0)


class Controlled:
    """A UNet with ControlNets beside it, to be called in its place: several add up.

    The rows of a batch take the control images in turn, over and over: with an image for each of R pictures, rows b and
    R + b (the halves of guidance) take image b. Where `index`, B integers, is set, row b of the next batches takes image
    index[b]. A UNet that has ControlNets beside it already exchanges them for these. Raises ValueError for a ControlNet
    made for another family, and for images that do not fit the latents.
    """

    def __init__(self, unet: "UNet | Controlled", controls: Sequence[Control]):
        self.unet, self.controls, self.embedded = (
            unet.unet if isinstance(unet, Controlled) else unet,
            list(controls),
            {},
        )
        self.index: Sequence[int] | None = None
        for control in self.controls:
            theirs, ours = control.net.config, unet.config
            if theirs.context_dim != ours.context_dim:
                raise ValueError(
                    f"the ControlNet was made for text states of width {theirs.context_dim} and the model's have {ours.context_dim} "
                    "(SD1.x: 768, SD2.x: 1024): take the one for this model's family"
                )
            if (theirs.block_out_channels, theirs.layers_per_block) != (
                ours.block_out_channels,
                ours.layers_per_block,
            ):
                widths = f"{theirs.block_out_channels} channels, the model has {ours.block_out_channels}"
                raise ValueError(f"the ControlNet was made for a network with {widths}")

    def __getattr__(self, name):  # config, grids, ... are the UNet's
        if name == "unet":
            raise AttributeError(name)
        return getattr(self.unet, name)

    def keys(self, context: torch.Tensor) -> dict:
        """As `UNet.keys`, those of the ControlNets included."""
        return {
            m: kv
            for net in (self.unet, *(control.net for control in self.controls))
            for m, kv in net.keys(context).items()
        }

    def __call__(self, x, t, context, *, record=None, region=None):
        total = None
        for number, control in enumerate(self.controls):
            if not control.counts(t):
                continue
            added = control.net(x, t, context, self._embedding(number, x), region=region)
            scale = self._for_rows(torch.tensor(control.scales), x)[:, None, None, None]  # (B, 1, 1, 1)
            added = [scale * y for y in (*added[0], added[1])]
            total = added if total is None else [a + b for a, b in zip(total, added, strict=True)]
        return self.unet(
            x,
            t,
            context,
            record=record,
            region=region,
            control=None if total is None else (total[:-1], total[-1]),
        )

    def _embedding(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The control image of each row of x, embedded once a run."""
        control = self.controls[number]
        if (h := control.pictures.shape[-2], w := control.pictures.shape[-1]) != (
            8 * x.shape[-2],
            8 * x.shape[-1],
        ):
            raise ValueError(
                f"a control image of {w}x{h} pixels does not fit a picture of {8 * x.shape[-1]}x{8 * x.shape[-2]}"
            )
        if number not in self.embedded:
            self.embedded[number] = control.net.embed(control.pictures.to(x.device, x.dtype))  # (R, C, h, w)
        return self._for_rows(self.embedded[number], x)

    def _for_rows(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """One row of y (R,...) for each row of x (B,...)."""
        if len(x) % len(y) if self.index is None else len(x) != len(self.index):
            told = "" if self.index is None else f" (of which {len(self.index)} were told theirs)"
            raise ValueError(
                f"{len(y)} control images for a batch of {len(x)} rows{told}: give one, or one a row"
            )
        rows = torch.tensor([b % len(y) for b in self.index or range(len(x))])
        return y.to(x.device, x.dtype)[rows.to(x.device)]


def read_control_image(path: str | Path, width: int, height: int) -> torch.Tensor:
    """A control image as it is (edges, a pose, ...: nothing is detected here), cut and scaled to width x height pixels if it
    has another size -> (1,3,height,width) in 0..1. FileNotFoundError or ValueError, in one line."""
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no control image {path}") from None
    except (UnidentifiedImageError, OSError):
        raise ValueError(f"the control image {path} is not a picture that can be read") from None
    picture = picture if picture.size == (width, height) else image.fit(picture, width, height)
    return (image.to_tensor([picture]) + 1) / 2
