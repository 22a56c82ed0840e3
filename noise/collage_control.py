"""NoiseCollage with ControlNet (Shirakawa & Uchida, CVPR 2024, section 3.4): one image per region.

The collage is that of noise/collage.py. Here its pass k has control image k at scale k, and the
ControlNet's rows run in one batch like the UNet's. Since the control image fixes positions,
cross-attention is unmasked by default. A cropped pass gets the matching crop of its control image.
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
    """Reads the control images (N+1,3,H,W) in 0..1 and their scales: first the whole image's
    (`picture`, or the layout's own), then each region's.

    A region without a control image takes the whole image's. If that is missing too, the region
    has scale 0, which means none. A region's scale is its `control_scale` times `scale`.
    ValueError where the layout has no control image at all.
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
    """Returns predict(x, t) -> eps (B,4,h,w) for a layout of N regions, with N+1 control images
    and scales as `read` returns them.

    `start` and `end` as in `minsd.controlnet.Control`, everything else as in `collage.predictor`.
    ValueError, before any network runs, for settings that do not fit.
    """
    layout = ensure_sized(layout, sd.config.size)
    n = len(layout.regions)
    if tuple(pictures.shape) != (n + 1, 3, layout.height, layout.width) or len(scales) != n + 1:
        raise ValueError(
            f"a layout of {n} regions needs {n + 1} control images of its size and as many scales"
        )
    # Without its own control images, so that the collage does not warn that they are unused.
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
    """Returns a copy of the model whose UNet is evaluated together with a ControlNet."""
    beside = copy.copy(sd)
    beside.unet = Controlled(sd.unet, [control], adapters)
    return beside
