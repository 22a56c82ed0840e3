"""NoiseCollage with ControlNet (Shirakawa & Uchida, CVPR 2024, section 3.4): every region's noise under its own control image.

The collage is that of noise/collage.py; here its pass k sees control image k at scale k, ControlNet's rows in one batch like
the UNet's. A control image says where things are, so cross-attention need not: it is masked only on request. Crops:

    fixed   every pass sees the whole latents
    flex    pass k sees the latents cut to its region's box, and its control image resized to that; its noise is pasted back
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minsd.controlnet import Control, Controlled, ControlNet, read_control_image
from minsd.guidance import Predictor
from minsd.noise import collage
from minsd.noise.layout import CELL, Layout, coverage


def read(layout: Layout, picture: str | Path | None = None, scale: float = 1.0) -> tuple[torch.Tensor, list[float]]:
    """Control images (N+1,3,H,W) in 0..1 and scales of a sized layout: the whole picture's (`picture`, or the layout's own),
    then each region's. A region without one takes the whole picture's; where that is missing too, it goes without, at scale 0.
    A region's scale is its `control_scale` times `scale`. ValueError where the layout has no control image at all."""
    whole = picture or layout.control_image
    paths = [whole, *(path or whole for path in layout.control_images[1:])]
    if not any(paths):
        raise ValueError("a ControlNet needs a control image: the layout names none for any region, nor is there one for the whole picture")
    none = torch.zeros(1, 3, layout.height, layout.width)
    pictures = torch.cat([none if path is None else read_control_image(path, layout.width, layout.height) for path in paths])
    scales = [1.0, *(1.0 if region.control_scale is None else region.control_scale for region in layout.regions)]
    return pictures, [0.0 if path is None else scale * mine for path, mine in zip(paths, scales)]


def predictor(
    sd, layout: Layout, net: ControlNet, pictures: torch.Tensor, scales: Sequence[float], *, crop: str = "fixed", start: float = 0.0,
    end: float = 1.0, masked: bool = False, tell: collage.Tell | None = None, **how,
) -> Predictor:
    """predict(x, t) -> eps (B,4,h,w) for a sized layout of N regions, its N+1 control images and scales as `read` gives them.

    `start` and `end`: as `minsd.controlnet.Control` has them. All else, of which `crop` "flex" takes only guidance_scale and
    background_weight, as `collage.predictor` has it. ValueError for what cannot be, before any network runs.
    """
    n, regions = len(layout.regions), [replace(region, control_image=None) for region in layout.regions]
    if crop not in ("fixed", "flex"):
        raise ValueError(f"no crop is called {crop!r}; choose from fixed, flex")
    if crop == "flex" and masked:
        raise ValueError("a flex crop shows each region by itself: there is nothing outside to mask")
    if layout.width is None or tuple(pictures.shape) != (n + 1, 3, layout.height, layout.width) or len(scales) != n + 1:
        raise ValueError(f"a layout of {n} regions needs {n + 1} control images of its size and as many scales")
    layout = replace(layout, control_image=None, regions=tuple(regions))  # these are seen to
    control = Control(net, pictures, list(scales), start, end)
    if crop == "flex":
        return _flex(sd, layout, control, tell, **how)
    sd, tell = _beside(sd, control, tell)
    return collage.predictor(sd, layout, masked=masked, tell=tell, **how)


def _beside(sd, control: Control, tell: collage.Tell | None):
    """The model with a ControlNet beside its UNet -> (model, what tells the ControlNet, and `tell`, of the rows' passes)."""
    sd = copy.copy(sd)
    sd.unet = unet = Controlled(sd.unet, [control])

    def both(passes):
        unet.index = passes
        if tell is not None:
            tell(passes)

    return sd, both


def _flex(sd, layout: Layout, control: Control, tell, *, guidance_scale=7.5, background_weight=0.1, seed=0) -> Predictor:
    """Each pass is a collage of its own, of no regions, the size of its crop. Nothing is drawn: any seed is the same."""
    fill = np.array([coverage(r.pixels, CELL) for r in layout.regions]).reshape(-1, layout.height // CELL, layout.width // CELL)
    merge = collage.merge_weights(fill, [background_weight, *(r.weight for r in layout.regions)])
    merge, runs = torch.from_numpy(merge).to(sd.device, sd.dtype), []  # (N+1, h, w)
    for k, whose in enumerate((layout, *layout.regions)):
        (x0, y0), (x1, y1) = (0, 0), (layout.width, layout.height)
        if k:  # whole cells around the region
            (x0, y0), (x1, y1) = ([v // CELL * CELL for v in whose.bounds[:2]], [-(-v // CELL) * CELL for v in whose.bounds[2:]])
        picture = control.pictures[k : k + 1]
        if (size := (y1 - y0, x1 - x0)) != tuple(picture.shape[-2:]):
            picture = F.interpolate(picture, size=size, mode="bilinear", antialias=True)
        mine, told = _beside(
            sd, replace(control, pictures=picture, scale=control.scale[k]), tell and (lambda passes, k=k: tell([k] * len(passes))),
        )
        alone = Layout(whose.prompt, (), whose.negative_prompt, x1 - x0, y1 - y0)
        place = slice(y0 // CELL, y1 // CELL), slice(x0 // CELL, x1 // CELL)
        runs.append((place, collage.predictor(mine, alone, guidance_scale=guidance_scale, tell=told)))

    def predict(x, t):
        total = torch.zeros_like(x)
        for m, (place, run) in zip(merge.to(x.dtype), runs):  # M_k is 0 beyond the crop
            total[(..., *place)] += m[place] * run(x[(..., *place)], t)
        return total

    return predict
