"""NoiseCollage with a ControlNet (Shirakawa & Uchida, CVPR 2024, section 3.4): a control image for
each region.

The collage is that of noise/collage.py. In pass k (the UNet evaluation for caption k) the
ControlNet is given control image k at scale k. All rows of the ControlNet run as one batch, like
those of the UNet. Since control images fix positions, cross-attention is not masked by default. A
pass that sees only a crop of the latents gets the same crop of its control image.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minsd.adapters import Adapters
from minsd.config import CELL
from minsd.controlnet import Control, Controlled, ControlNet, read_control_image
from minsd.guidance import Model, Predictor
from minsd.noise import collage
from minsd.noise.layout import Layout, SizedLayout, ensure_sized


def read(
    layout: SizedLayout, picture: str | Path | None = None, scale: float = 1.0
) -> tuple[Tensor, list[float]]:
    """Reads the control images of a layout of N regions. Returns (pictures, scales): the control
    images (N+1,3,H,W) with values in 0..1, and a list with the scale of each. The first is that of
    the whole image: the file `picture` if given, otherwise the layout's. The others are those of
    the regions.

    A region without a control image gets that of the whole image. If there is none either, the
    region gets zeros with scale 0, which means no control. The scale of the whole image is `scale`,
    and that of a region is its `control_scale` (1 if None) times `scale`. Raises ValueError if
    there is no control image at all.
    """
    whole = picture or layout.control_image
    paths = [whole, *(path or whole for path in layout.control_images[1:])]
    if not any(paths):
        raise ValueError(
            "a ControlNet needs a control image: the layout names none for any region, "
            "and there is none for the whole image"
        )
    none = torch.zeros(1, 3, layout.height, layout.width)
    pictures = [
        none if path is None else read_control_image(path, layout.width, layout.height) for path in paths
    ]
    own = [1.0, *(1.0 if r.control_scale is None else r.control_scale for r in layout.regions)]
    scales = [0.0 if path is None else scale * mine for path, mine in zip(paths, own)]
    return torch.cat(pictures), scales


def predictor(
    sd: Model,
    layout: Layout,
    net: ControlNet,
    pictures: Tensor,
    scales: Sequence[float],
    *,
    start: float = 0.0,
    end: float = 1.0,
    masked: bool = False,
    adapters: Adapters | None = None,
    **how: Any,
) -> Predictor:
    """Returns the predictor of a collage with the ControlNet `net`: the function predict(x, t) ->
    eps that a sampler calls, x and eps being (B,4,h,w). `pictures` (N+1,3,H,W) and `scales` are the
    results of `read` for the layout of N regions.

    The ControlNet acts between the fractions `start` and `end` of the way from noise to image,
    measured in training timesteps. `masked`, `adapters` and the further arguments `how` are passed
    to `collage.predictor`. Raises ValueError, before any network runs, for settings that do not
    fit.
    """
    layout = ensure_sized(layout, sd.config.size)
    n = len(layout.regions)
    if tuple(pictures.shape) != (n + 1, 3, layout.height, layout.width) or len(scales) != n + 1:
        raise ValueError(
            f"a layout of {n} regions needs {n + 1} control images of its size and as many scales"
        )
    # The layout's control images are removed: the collage would warn that they are not used.
    regions = tuple(replace(region, control_image=None) for region in layout.regions)
    layout = replace(layout, control_image=None, regions=regions)
    timesteps = sd.schedule.config.num_train_timesteps
    control = Control(net, pictures, list(scales), start, end, timesteps)
    adapters = Adapters() if adapters is None else adapters

    def cut(k: int, place: collage.Place) -> Model:
        _, *cells = place
        rows, columns = (slice(CELL * part.start, CELL * part.stop) for part in cells)
        picture = pictures[k : k + 1, :, rows, columns]
        return _beside(sd, replace(control, pictures=picture, scale=scales[k]), adapters)

    beside = _beside(sd, control, adapters)
    return collage.predictor(beside, layout, masked=masked, adapters=adapters, cut=cut, **how)


def _beside(sd: Model, control: Control, adapters: Adapters) -> Model:
    """Returns a copy of the model `sd` in which every UNet evaluation includes the ControlNet of
    `control`. The UNet's batch may hold several passes of a collage, each with its own caption and
    control image; `adapters` tells the ControlNet which rows of the batch belong to which pass."""
    beside = copy.copy(sd)
    beside.unet = Controlled(sd.unet, [control], adapters)
    return beside
