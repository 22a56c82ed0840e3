"""NoiseCollage with ControlNet (Shirakawa & Uchida, CVPR 2024, section 3.4): every region's noise under its own control image.

The collage is that of noise/collage.py; here its pass k sees control image k at scale k, ControlNet's rows in one batch like
the UNet's. A control image says where things are, so cross-attention need not: it is masked only on request. Where passes
see crops of the latents, each sees the same part of its control image: that, too, is in the picture's places.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minsd.controlnet import Control, Controlled, ControlNet, read_control_image
from minsd.guidance import Predictor
from minsd.noise import collage
from minsd.noise.layout import CELL, Layout


def read(
    layout: Layout, picture: str | Path | None = None, scale: float = 1.0
) -> tuple[torch.Tensor, list[float]]:
    """Control images (N+1,3,H,W) in 0..1 and scales of a sized layout: the whole picture's (`picture`, or the layout's own),
    then each region's. A region without one takes the whole picture's; where that is missing too, it goes without, at scale 0.
    A region's scale is its `control_scale` times `scale`. ValueError where the layout has no control image at all."""
    whole = picture or layout.control_image
    paths = [whole, *(path or whole for path in layout.control_images[1:])]
    if not any(paths):
        raise ValueError(
            "a ControlNet needs a control image: the layout names none for any region, nor is there one for the whole picture"
        )
    none = torch.zeros(1, 3, layout.height, layout.width)
    pictures = torch.cat(
        [none if path is None else read_control_image(path, layout.width, layout.height) for path in paths]
    )
    scales = [
        1.0,
        *(1.0 if region.control_scale is None else region.control_scale for region in layout.regions),
    ]
    return pictures, [0.0 if path is None else scale * mine for path, mine in zip(paths, scales)]


def predictor(
    sd,
    layout: Layout,
    net: ControlNet,
    pictures: torch.Tensor,
    scales: Sequence[float],
    *,
    start: float = 0.0,
    end: float = 1.0,
    masked: bool = False,
    tell: collage.Tell | None = None,
    **how,
) -> Predictor:
    """predict(x, t) -> eps (B,4,h,w) for a sized layout of N regions, its N+1 control images and scales as `read` gives them.

    `start` and `end`: as `minsd.controlnet.Control` has them. All else as `collage.predictor` has it. ValueError for what cannot
    be, before any network runs.
    """
    n, regions = len(layout.regions), [replace(region, control_image=None) for region in layout.regions]
    if (
        layout.width is None
        or tuple(pictures.shape) != (n + 1, 3, layout.height, layout.width)
        or len(scales) != n + 1
    ):
        raise ValueError(
            f"a layout of {n} regions needs {n + 1} control images of its size and as many scales"
        )
    layout = replace(layout, control_image=None, regions=tuple(regions))  # these are seen to
    control = Control(net, pictures, list(scales), start, end)

    def cut(k: int, place: collage.Place):
        rows, columns = (slice(CELL * part.start, CELL * part.stop) for part in place[1:])
        mine, tell_net = _beside(
            sd, replace(control, pictures=pictures[k : k + 1, :, rows, columns], scale=control.scale[k]), None
        )
        return mine, lambda passes: (tell_net([0] * len(passes)), tell and tell(passes))

    beside, told = _beside(sd, control, tell)
    return collage.predictor(beside, layout, masked=masked, tell=told, cut=cut, **how)


def _beside(sd, control: Control, tell: collage.Tell | None):
    """The model with a ControlNet beside its UNet -> (model, what tells the ControlNet, and `tell`, of the rows' passes)."""
    sd = copy.copy(sd)
    sd.unet = unet = Controlled(sd.unet, [control])

    def both(passes):
        unet.index = passes
        if tell is not None:
            tell(passes)

    return sd, both
