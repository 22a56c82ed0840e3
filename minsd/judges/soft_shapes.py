"""A differentiable reward for the embedded model: how well an image shows the shapes of its prompt.

It is a reward and no judge. Images whose noise was optimised for it are judged by
weights/shapes/detector.py, which counts pixels and shares no computation with this file.

Every pixel is divided among the colours of the palette and the background, in parts that add up
to 1: m_c = softmax over colours of -|pixel - colour|^2 / (2 SIGMA^2). The background's colour is the
mean of the top and bottom rims. For a template T (how much of each cell an outline covers, at one
place, size and angle) and a colour c, with sums over cells,

    iou(c, T) = sum m_c T / (sum m_c / n + sum T - sum m_c T),
    fit(c, s) = mean of iou(c, T) over the templates of shape s, weighted by softmax(iou / SHARP),
    right(c, s) = fit(c, s) softmax over shapes(fit(c, .) / SHARP)[s],

where n is the number of subjects that the prompt asks for in colour c. The reward of a prompt with
the subjects (c_k, s_k) is

    mean over k of log(LEAST + right(c_k, s_k))  -  other,

where `other` is the fraction of the drawn area in colours that the prompt does not name. The
logarithm makes the most neglected subject count most; without it, optimisation improved one subject
at the cost of the other. A subject without a colour may have any; its m_c is the sum over colours.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from minsd.judges.shapes import read_caption
from minsd.weights.shapes.data import COLOURS, SHAPES, outline

SIGMA = 0.12  # of colours in 0..1; the nearest two of the palette are 0.3 apart
SHARP = 0.03
LEAST = 0.02  # bounds the reward of a missing subject, to log LEAST
CELL = 4  # pixels per cell of the grid on which shapes are compared
RADII = (16.0, 18.5, 21.5, 25.0, 29.0, 33.5)  # pixels, those of the training set
TURNS = (-0.1, 0.0, 0.1)  # radians


@cache
def templates() -> Tensor:
    """Returns a template for each of the 6 geometric shapes at 18 combinations of 6 sizes and 3
    angles, (6,18,19,19) float64. A template is a grid of 19 x 19 cells of CELL x CELL pixels. Each
    number is the fraction of the cell that is inside the shape's outline, which is in the middle of
    the grid."""
    side = 2 * int(np.ceil(RADII[-1] * 1.1 / CELL)) + 1
    fine = 8  # supersampling
    out = []
    for shape in SHAPES:
        for radius in RADII:
            for turn in TURNS:
                canvas = Image.new("L", (side * fine, side * fine))
                points = outline(shape, turn) * (radius / CELL * fine) + side * fine / 2
                ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], fill=255)
                out.append(np.asarray(canvas.reduce(fine), np.float64) / 255)
    return torch.tensor(np.array(out)).view(len(SHAPES), -1, side, side)


def colours(images: Tensor) -> Tensor:
    """Divides each pixel of images (B,3,H,W) in 0..1 among the 8 colours of the palette and the
    background. Returns the fractions (B,9,H,W), the background last, which add up to 1 for each
    pixel."""
    palette = torch.tensor(list(COLOURS.values())).to(images) / 255
    rim = torch.cat([images[..., :2, :].flatten(2), images[..., -2:, :].flatten(2)], dim=2).mean(2)
    every = torch.cat([palette.expand(len(images), -1, -1), rim[:, None]], dim=1)  # (B, 9, 3)
    distance = (images[:, None] - every[..., None, None]).square().sum(2)
    return (-distance / (2 * SIGMA**2)).softmax(dim=1)


def fits(masks: Tensor, counts: Tensor) -> Tensor:
    """Compares each of K masks (K,h,w), in 0..1, with the templates of each of the 6 shapes at all
    places. Returns (K,6), the intersection over union of mask and template, as a softmax-weighted
    mean in which the best sizes, angles and places count most. `counts` (K,) is the number of
    objects that each mask should show; a mask's area is divided by it, since a template is one
    object."""
    kernels = templates().to(masks)
    side = kernels.shape[-1]
    overlap = conv2d(masks[:, None], kernels.view(-1, 1, side, side), padding=side // 2)
    area = kernels.sum((2, 3)).view(1, -1, 1, 1)
    mass = (masks.sum((1, 2)) / counts).view(-1, 1, 1, 1)
    iou = (overlap / (mass + area - overlap)).view(len(masks), len(SHAPES), -1)
    return (iou * (iou / SHARP).softmax(dim=2)).sum(2)


def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Returns a differentiable reward (B,) for images (B,3,H,W) in 0..1 and their prompts. A higher
    reward means that the image shows the shapes of its prompt, in their colours, more clearly. The
    maximum is log(1 + LEAST). Every prompt must be a caption of geometric shapes, such as "a red
    circle and a star"; otherwise ValueError is raised."""
    parts = avg_pool2d(colours(images), CELL)
    drawn = 1 - parts[:, -1]
    out = []
    for part, area, prompt in zip(parts, drawn, prompts):
        wanted = subjects(prompt)
        each = [colour for colour, _ in wanted]
        masks = torch.stack([area if colour is None else part[colour] for colour in each])
        counts = torch.tensor([each.count(colour) for colour in each]).to(masks)
        fit = fits(masks, counts)
        k, shape = torch.arange(len(wanted)), [shape for _, shape in wanted]
        right = fit[k, shape] * (fit / SHARP).softmax(dim=1)[k, shape]
        named = {colour for colour in each if colour is not None}
        others = [c for c in range(len(COLOURS)) if c not in named and None not in each]
        other = part[others].sum() / area.sum().clamp(min=1)
        out.append((LEAST + right).log().mean() - other)
    return torch.stack(out)


def subjects(prompt: str) -> list[tuple[int | None, int]]:
    """Returns the geometric shapes that a prompt names, as a list of (colour, shape). Both are
    indices: `colour` into COLOURS, or None if the prompt gives the shape no colour, and `shape`
    into SHAPES. The prompt must be a caption of geometric shapes, such as "a red circle and a
    star"; otherwise ValueError is raised."""
    asked = read_caption(prompt)
    if asked is None:
        raise ValueError(f"the reward soft-shapes needs a prompt such as 'a red circle', not {prompt!r}")
    names = list(COLOURS)
    return [
        (names.index(one["color"]) if "color" in one else None, SHAPES.index(one["class"]))
        for one in asked["include"]
    ]
