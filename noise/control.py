"""NoiseCollage with ControlNet (Shirakawa & Uchida, CVPR 2024, section 3.4): every region's noise under its own control image.

As in noise/collage.py, eps = sum_k M_k (u_k + g (c_k - u_k)), but pass k sees control image k at scale k, and all its cells look
at caption k: a control image says where things are, so cross-attention need not be masked. Crops:

    fixed   every pass sees the whole latents; all rows go through ControlNet and UNet in one batch
    flex    pass k sees the latents cut to its region's box, and its control image resized to that; its noise is pasted back
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minsd.controlnet import Control, Controlled, ControlNet, read_control_image
from minsd.guidance import Predictor, classifier_free, eps_from_output
from minsd.noise.collage import merge_weights
from minsd.noise.layout import CELL, Layout, coverage


def read(layout: Layout, picture: str | Path | None = None, scale: float = 1.0) -> tuple[torch.Tensor, list[float]]:
    """Control images (N+1,3,H,W) in 0..1 and scales of a sized layout: the whole picture's (`picture`, or the layout's own),
    then each region's. A region without one takes the whole picture's; where that is missing too, it goes without, at scale 0.
    A region's scale is its `control_scale` times `scale`. ValueError where the layout has no control image at all."""
    whole = picture or layout.control_image
    paths = [whole, *(region.control_image or whole for region in layout.regions)]
    if not any(paths):
        raise ValueError("a ControlNet needs a control image: the layout names none for any region, nor is there one for the whole picture")
    none = torch.zeros(1, 3, layout.height, layout.width)
    pictures = torch.cat([none if path is None else read_control_image(path, layout.width, layout.height) for path in paths])
    scales = [1.0, *(region.control_scale for region in layout.regions)]
    return pictures, [0.0 if path is None else scale * mine for path, mine in zip(paths, scales)]


def predictor(
    sd, layout: Layout, net: ControlNet, pictures: torch.Tensor, scales: Sequence[float], *, crop: str = "fixed",
    guidance_scale: float = 7.5, background_weight: float = 0.1, start: float = 0.0, end: float = 1.0,
) -> Predictor:
    """predict(x, t) -> eps (B,4,h,w) for a sized layout of N regions, its N+1 control images and scales as `read` gives them.

    `start` and `end`: as `minsd.controlnet.Control` has them. ValueError for what cannot be, before any network runs.
    """
    regions = layout.regions
    if crop not in ("fixed", "flex"):
        raise ValueError(f"no crop is called {crop!r}; choose from fixed, flex")
    if layout.width is None or tuple(pictures.shape) != (len(regions) + 1, 3, layout.height, layout.width) or len(scales) != len(pictures):
        raise ValueError(f"a layout of {len(regions)} regions needs {len(regions) + 1} control images of its size and as many scales")
    fill = np.stack([coverage(r.pixels, CELL) for r in regions]) if regions else np.zeros((0, layout.height // CELL, layout.width // CELL))
    merge = torch.from_numpy(merge_weights(fill, [background_weight, *(r.weight for r in regions)])).to(sd.device, sd.dtype)  # (N+1, h, w)
    control = Control(net, pictures, list(scales), start, end)
    captions, negatives = ([whose(layout), *map(whose, regions)] for whose in (lambda p: p.prompt, lambda p: p.negative_prompt))
    if crop == "flex":
        return _flex(sd, layout, control, merge, captions, negatives, guidance_scale)
    return _fixed(sd, layout, control, merge, captions, negatives, guidance_scale)


def _fixed(sd, layout, control, merge, captions, negatives, guidance_scale) -> Predictor:
    texts, passes = (captions, len(captions)) if guidance_scale == 1 else (negatives + captions, len(captions))
    unet = Controlled(sd.unet, [control])
    keys = unet.keys(sd.encode_prompt(texts))
    limit = 2 * sd.batch_size(layout.height, layout.width)  # rows at once

    def predict(x, t):
        which = torch.arange(len(texts) * len(x)).split(limit)
        eps = []
        for rows in which:
            text, image = rows // len(x), (rows % len(x)).to(x.device)
            unet.index = (text % passes).tolist()
            mine = {m: (k[text.to(k.device)], v[text.to(v.device)]) for m, (k, v) in keys.items()}
            eps.append(eps_from_output(unet(x[image], t, mine), x[image], t, sd.schedule))
        eps = torch.cat(eps).unflatten(0, (len(texts), len(x)))  # (rows, B, 4, h, w)
        u, c = eps[:-passes], eps[-passes:]
        eps = u + guidance_scale * (c - u) if len(u) else c
        return (merge.to(x.dtype)[:, None, None] * eps).sum(0)

    return predict


def _flex(sd, layout, control, merge, captions, negatives, guidance_scale) -> Predictor:
    runs = []
    for k, bounds in enumerate([(0, 0, layout.width, layout.height), *(r.bounds for r in layout.regions)]):
        (x0, y0), (x1, y1) = (v // CELL for v in bounds[:2]), (-(-v // CELL) for v in bounds[2:])  # whole cells around the region
        size = CELL * (y1 - y0), CELL * (x1 - x0)
        picture = control.pictures[k : k + 1]
        if picture.shape[-2:] != size:
            picture = F.interpolate(picture, size=size, mode="bilinear", antialias=True)
        unet = Controlled(sd.unet, [replace(control, pictures=picture, scale=control.scale[k])])
        texts = sd.encode_prompt([captions[k]]), sd.encode_prompt([negatives[k]])
        runs.append((slice(y0, y1), slice(x0, x1), classifier_free(unet, *texts, guidance_scale, sd.schedule)))

    def predict(x, t):
        total = torch.zeros_like(x)
        for m, (rows, columns, run) in zip(merge.to(x.dtype), runs):  # M_k is 0 beyond the crop
            total[..., rows, columns] += m[rows, columns] * run(x[..., rows, columns], t)
        return total

    return predict
