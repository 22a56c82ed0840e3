"""ControlNet (Zhang, Rao & Agrawala 2023, arXiv 2302.05543): a control image determines the layout.

A trainable copy of the UNet's encoder half and middle takes the latents, the text and a control
image. The output of each layer of the copy goes through a convolution that was zero when its
training began, and is added to the matching skip of the UNet. Attribute names are those of
diffusers' ControlNetModel checkpoints; weights/controlnet.py loads the weights from files.

    net = load_controlnet("control_v11p_sd15_canny", device="cpu", dtype=torch.float32)
    unet = Controlled(sd.unet, [Control(net, read_control_image("edges.png", 512, 512), scale=0.8)])
    predict = guidance.classifier_free(unet, cond, uncond, 7.5, sd.schedule)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minsd import image
from minsd.adapters import Adapters, settings_of_rows
from minsd.attention import AttentionRecorder
from minsd.config import CELL, UNetConfig
from minsd.unet import CellTexts, Residuals, TextKV, UNet, skip_channels


class ControlImageEmbedding(nn.Module):
    """A stack of convolutions that brings a control image (B,3,8h,8w) to the size of latents. The
    result is (B,channels,h,w). `hidden` lists the channel counts at the resolutions on the way, the
    finest first. There must be four of them, because the size is halved three times."""

    def __init__(self, channels: int, hidden: Sequence[int]):
        super().__init__()
        self.conv_in = nn.Conv2d(3, hidden[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for c, c_next in zip(hidden, hidden[1:]):
            self.blocks += [nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c_next, 3, padding=1, stride=2)]
        self.conv_out = nn.Conv2d(hidden[-1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv_in, *self.blocks):
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(UNet):
    """A UNet without its decoder half. It turns a control image into residuals: tensors that are
    added to a UNet's skips and to the output of its middle block. The constructor makes the network
    without trained weights; weights/controlnet.py loads them from files."""

    def __init__(self, config: UNetConfig, hidden: Sequence[int] = (16, 32, 96, 256), bgr: bool = False):
        super().__init__(config)
        del self.up_blocks, self.conv_norm_out, self.conv_out
        self.bgr = bgr  # whether control images had the channel order BGR in training
        widths = config.block_out_channels
        self.controlnet_cond_embedding = ControlImageEmbedding(widths[0], hidden)
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(c, c, 1) for c in skip_channels(config))
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)

    def embed(self, pictures: Tensor) -> Tensor:
        """Embeds control images (B,3,8h,8w), with values from 0 to 1, for latents (B,4,h,w).
        Returns (B,C0,h,w), where C0 is the channel count of the UNet's finest level. The result is
        the same at every denoising step, so compute it once."""
        return self.controlnet_cond_embedding(pictures.flip(1) if self.bgr else pictures)

    def forward(
        self,
        x: Tensor,
        t: int | float | Tensor,
        context: Tensor | TextKV,
        embedded: Tensor,
        *,
        region: CellTexts | tuple[CellTexts, CellTexts] | None = None,
    ) -> Residuals:
        """Returns (residuals, middle), the tensors to add inside a UNet: a list with one tensor for
        each skip, and one tensor for the output of the middle block. `UNet.forward` takes this pair
        as its argument `control`.

        `x`, `t`, `context` and `region` are those of `UNet.forward`. `embedded` (B,C0,h,w) are the
        control images after `embed`.
        """
        region_down, region_up = region if isinstance(region, tuple) else (region, region)
        context, whole = self.split(context)
        x, skips, temb = self.encode(x, t, context, region=region_down, add=embedded, whole=whole)
        x = self.middle(x, temb, context, region=region_up)
        residuals = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return residuals, self.controlnet_mid_block(x)


@dataclass(frozen=True)
class Control:
    """A ControlNet together with its control images, its scale, and the part of a run in which it
    acts.

    `pictures` (R,3,H,W), with values from 0 to 1, are one control image for all rows of a batch (R
    = 1) or one for each row. `scale` multiplies what the ControlNet adds to the UNet. It is one
    number, or a sequence of R numbers.

    `start` and `end` are fractions of the way from noise (0) to image (1). They count training
    timesteps, of which the model has `num_train_timesteps`: with 1000 of them, start 0.2 and end
    0.8 mean that the ControlNet acts at timesteps 200 <= t < 800.

    The constructor raises ValueError if there is no control image or one has a wrong shape, if the
    number of scales is wrong, or if `start` and `end` are not 0 <= start < end <= 1.
    """

    net: ControlNet
    pictures: Tensor
    scale: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.pictures is None:
            raise ValueError("a ControlNet needs a control image: give one (--control-image FILE)")
        if self.pictures.ndim != 4 or self.pictures.shape[1] != 3:
            raise ValueError(f"control images must be (B,3,H,W), not {tuple(self.pictures.shape)}")
        if not np.isfinite(self.scales).all() or len(self.scales) not in (1, len(self.pictures)):
            raise ValueError(
                f"a control scale must be a number, or one for each of {len(self.pictures)} control images, "
                f"not {self.scale}"
            )
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                "control start and end must be fractions of the steps, 0 <= start < end <= 1, "
                f"not {self.start} and {self.end}"
            )

    @property
    def scales(self) -> list[float]:
        scales = self.scale if isinstance(self.scale, Sequence) else [self.scale]
        return [float(scale) for scale in scales]

    def is_active(self, t: int | float | Tensor) -> bool:
        """Returns True if the ControlNet acts at timestep t: if t is in the part of the run from
        `start` to `end`, and not all scales are 0. If t is a tensor (B,), its first number
        decides."""
        t = float(t.flatten()[0]) if torch.is_tensor(t) else float(t)
        low, high = (self.num_train_timesteps * (1 - fraction) for fraction in (self.end, self.start))
        started = self.start == 0 or t < round(high, 6)
        ended = self.end < 1 and t < round(low, 6)
        return any(self.scales) and started and not ended


class Controlled:
    """A UNet together with ControlNets, to be called in place of the UNet. What several ControlNets
    add to the UNet is summed. If `unet` is a `Controlled` itself, its ControlNets are left out.

    If `adapters` is None, and a ControlNet has R control images, row i of a batch uses image i
    modulo R, so both halves of guidance use the same images. `adapters` is for images made from
    several captions, with one UNet evaluation (pass) per caption. It states which pass each row
    belongs to, and a row of pass k uses image k modulo R. Outside a `with adapters.rows(...)` block
    no ControlNet acts.

    The constructor raises ValueError if a ControlNet was made for another model family (SD1.x,
    SD2.x, SDXL). Calls raise ValueError if the size of the control images does not fit the latents.
    """

    def __init__(
        self, unet: "UNet | Controlled", controls: Sequence[Control], adapters: Adapters | None = None
    ):
        self.unet: UNet = unet.unet if isinstance(unet, Controlled) else unet
        self.controls = list(controls)
        self.adapters = adapters
        self._embedded: dict[int, Tensor] = {}  # position in `controls` -> embedded images
        self._chosen: dict[tuple, tuple[Tensor, Tensor]] = {}
        for control in self.controls:
            _check_family(control.net.config, self.unet.config)

    def __getattr__(self, name: str) -> Any:  # config, grids, ... are the UNet's
        if name == "unet":  # not set yet while `copy` makes a copy
            raise AttributeError(name)
        return getattr(self.unet, name)

    def text_kv(self, context: Tensor) -> TextKV:
        """Computes the keys and values of the text states `context` (B,77n,D) for every
        cross-attention layer of the UNet and of the ControlNets. Returns a dict of layer -> (keys,
        values), as `UNet.text_kv` does."""
        found = self.unet.text_kv(context)
        for control in self.controls:
            found |= control.net.text_kv(context)
        return found

    def __call__(
        self,
        x: Tensor,
        t: int | float | Tensor,
        context: Tensor | TextKV,
        *,
        record: AttentionRecorder | None = None,
        region: CellTexts | tuple[CellTexts, CellTexts] | None = None,
    ) -> Tensor | None:
        """Predicts the noise or v in latents x, after adding the ControlNets' outputs inside the
        UNet. Arguments and result are those of `UNet.forward`."""
        total: list[Tensor] | None = None
        for number, control in enumerate(self.controls):
            if not control.is_active(t):
                continue
            images = settings_of_rows(len(x), len(control.pictures), self.adapters, "control images")
            if images is None:
                continue
            index, scale = self._of_rows(number, images, x)
            skips, middle = control.net(x, t, context, self._embedding(number, x)[index], region=region)
            scaled = [scale * y for y in (*skips, middle)]
            total = scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]
        residuals = None if total is None else (total[:-1], total[-1])
        return self.unet(x, t, context, record=record, region=region, control=residuals)

    def _of_rows(self, number: int, images: list[int], x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (index, scale) for the rows of a batch and one ControlNet, that at position
        `number` in `controls`. `index` (B,) has the index of the control image of each row, as a
        tensor of the list `images`. `scale` (B,1,1,1) has the scale of each row. Both are on x's
        device.

        The two tensors are kept and reused, because copying them to a GPU at every step would make
        the program wait.
        """
        key = (number, x.device, x.dtype, *images)
        if key not in self._chosen:
            scales = self.controls[number].scales
            scale = torch.tensor([scales[k % len(scales)] for k in images]).to(x.device, x.dtype)
            self._chosen[key] = torch.tensor(images, device=x.device), scale[:, None, None, None]
        return self._chosen[key]

    def _embedding(self, number: int, x: Tensor) -> Tensor:
        """Returns the embedded control images (R,C0,h,w) of one ControlNet, that at position
        `number` in `controls`. C0 is the channel count of the UNet's finest level. The images are
        embedded once, by the first call. Raises ValueError if their height and width are not 8
        times those of the latents x."""
        control = self.controls[number]
        height, width = control.pictures.shape[-2:]
        if (height, width) != (CELL * x.shape[-2], CELL * x.shape[-1]):
            size = f"{CELL * x.shape[-1]}x{CELL * x.shape[-2]}"
            raise ValueError(f"a control image of {width}x{height} pixels does not fit an image of {size}")
        if number not in self._embedded:
            self._embedded[number] = control.net.embed(control.pictures.to(x.device, x.dtype))
        return self._embedded[number].to(x.device, x.dtype)


def _check_family(theirs: UNetConfig, ours: UNetConfig) -> None:
    """Raises ValueError if a ControlNet does not fit a UNet, because the width of the text states,
    the channel counts or the number of layers per block differ. `theirs` is the ControlNet's config
    and `ours` the UNet's."""
    if theirs.context_dim != ours.context_dim:
        raise ValueError(
            f"the ControlNet was made for text states of width {theirs.context_dim} and the model's have "
            f"{ours.context_dim} (SD1.x: 768, SD2.x: 1024, SDXL: 2048): take the one for this model's family"
        )
    sizes = [f"{c.block_out_channels} channels in blocks of {c.layers_per_block}" for c in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the ControlNet was made for a network with {sizes[0]}, the model has {sizes[1]}")


def read_control_image(path: str | Path, width: int, height: int) -> Tensor:
    """Reads a control image, such as edges or a pose, from a file. Returns a tensor
    (1,3,height,width) with values from 0 to 1. The file must be a control image already: no edges
    or poses are detected in it.

    An image of another size is scaled and cropped to `width` x `height` pixels. Raises
    FileNotFoundError if the file is missing, and ValueError if it cannot be read. The error message
    is one line.
    """
    picture = image.read(path, what="control image")
    if picture.size != (width, height):
        picture = image.fit(picture, width, height)
    return (image.to_tensor([picture]) + 1) / 2
