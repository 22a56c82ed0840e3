"""Draws the figures of the README and of the chapters with Pillow alone: grids of images, heat maps,
and plots.

The code blocks of the chapters use these functions. `bench/pictures.py` lists all figures. Text is in
the font that Pillow contains, so figures look the same on every machine.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#efb118", "#a463f2", "#6cc5b0")
GREEN, RED = "#3ca951", "#d62728"  # frames of images that are right and wrong
SIDE = 96  # pixels of an image in a grid
GAP = 4

Point = tuple[float, float]


def font(size: int = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def grid(
    rows: Mapping[str, Sequence[Image.Image]],
    columns: Sequence[str] = (),
    *,
    frames: Mapping[str, Sequence[str | None]] | None = None,
    side: int = SIDE,
) -> Image.Image:
    """Arranges images in rows, each with its name on the left, below an optional row of column names.

    Images are scaled to `side` pixels. `frames` holds the colour of the frame around each image of a
    row, or None for no frame.
    """
    left = max(math.ceil(font().getlength(line)) for name in rows for line in name.split("\n")) + 10
    top = 20 if columns else 2
    step = side + GAP
    wide = max(len(images) for images in rows.values())
    out = Image.new("RGB", (left + wide * step, top + len(rows) * step), "white")
    pen = ImageDraw.Draw(out)
    for k, name in enumerate(columns):
        pen.text((left + k * step + side / 2, 3), name, fill="black", font=font(), anchor="ma")
    for j, (name, images) in enumerate(rows.items()):
        y = top + j * step
        pen.multiline_text((2, y + side / 2), name, fill="black", font=font(), anchor="lm")
        for k, image in enumerate(images):
            x = left + k * step
            out.paste(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, y))
            colour = None if frames is None or name not in frames else frames[name][k]
            if colour is not None:
                pen.rectangle((x - 1, y - 1, x + side, y + side), outline=colour, width=3)
    return out


def heat(values: Tensor, top: float | None = None, side: int = SIDE) -> Image.Image:
    """Draws a map (h,w) as an image: black at 0, then violet, red and yellow, and white at `top` (by
    default the map's own maximum). Maps that are to be compared need the same `top`."""
    v = (values.detach().float() / (top or float(values.max()) or 1.0)).clamp(0, 1)
    ramp = torch.tensor([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])
    at = v * (len(ramp) - 1)
    low = at.long().clamp(max=len(ramp) - 2)
    part = (at - low)[..., None]
    pixels = (1 - part) * ramp[low] + part * ramp[low + 1]  # (h, w, 3)
    image = Image.fromarray(pixels.round().to(torch.uint8).numpy())
    return image.resize((side, side), Image.Resampling.NEAREST)


def beside(images: Sequence[Image.Image], gap: int = 16) -> Image.Image:
    """Places images of any sizes side by side on white, with their tops aligned."""
    wide = sum(image.width for image in images) + gap * (len(images) - 1)
    out = Image.new("RGB", (wide, max(image.height for image in images)), "white")
    x = 0
    for image in images:
        out.paste(image, (x, 0))
        x += image.width + gap
    return out


def plot(
    lines: Mapping[str, Sequence[Point]],
    x: str,
    y: str,
    *,
    size: tuple[int, int] = (420, 260),
    logarithmic: bool = False,
    points: bool = False,
    bars: Mapping[str, Sequence[Point]] | None = None,
) -> Image.Image:
    """Plots lines, or single points if `points` is True. `x` and `y` are the labels of the axes.

    `lines` maps the name of each line to its (x, y) pairs. `bars` maps the same names to error
    bars: one (low, high) pair for each point of the line. `size` is (width, height) of the image in
    pixels. With `logarithmic` the x axis is logarithmic.
    """
    scale = math.log10 if logarithmic else float
    bars = bars or {}
    pairs = [(scale(px), py) for each in lines.values() for px, py in each]
    xs = [px for px, _ in pairs]
    ys = [py for _, py in pairs]
    ys += [end for each in bars.values() for pair in each for end in pair]
    x_axis = _range(xs, logarithmic)
    y_axis = _range(ys, False)
    left, right, top, bottom = 56, size[0] - 16, 24, size[1] - 44
    if points:
        right -= max(math.ceil(font(12).getlength(name)) for name in lines)
    out = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(out)

    def place(px: float, py: float) -> Point:
        across = (scale(px) - x_axis[0]) / (x_axis[1] - x_axis[0])
        up = (py - y_axis[0]) / (y_axis[1] - y_axis[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    for tick in _ticks(*y_axis):
        height = bottom - (tick - y_axis[0]) / (y_axis[1] - y_axis[0]) * (bottom - top)
        pen.line((left, height, right, height), fill="#dddddd")
        pen.text((left - 6, height), f"{tick:g}", fill="black", font=font(12), anchor="rm")
    for tick in _decades(*x_axis) if logarithmic else _ticks(*x_axis):
        across = place(tick, y_axis[0])[0]
        pen.line((across, bottom, across, bottom + 4), fill="black")
        pen.text((across, bottom + 6), f"{tick:g}", fill="black", font=font(12), anchor="ma")
    pen.line((left, top, left, bottom, right, bottom), fill="black")
    pen.text(((left + right) / 2, size[1] - 4), x, fill="black", font=font(12), anchor="md")
    pen.text((4, 4), y, fill="black", font=font(12))
    middle = (x_axis[0] + x_axis[1]) / 2
    sides = [
        [py for px, py in pairs if (px > middle) == at_right] or [y_axis[0]] for at_right in (False, True)
    ]
    legend_left = max(sides[0]) < max(sides[1])
    for k, (name, each) in enumerate(lines.items()):
        colour = COLOURS[k % len(COLOURS)]
        ends = [place(*point) for point in each]
        for (px, _), (low, high) in zip(each, bars.get(name, ())):
            pen.line((*place(px, low), *place(px, high)), fill=colour, width=2)
        if not points:
            pen.line(ends, fill=colour, width=2)
            where = (left + 8 if legend_left else right - 6, top + 4 + 16 * k)
            pen.text(where, name, fill=colour, font=font(12), anchor="la" if legend_left else "ra")
            continue
        for px, py in ends:
            pen.ellipse((px - 4, py - 4, px + 4, py + 4), fill=colour)
        where = (ends[-1][0] + 8, ends[-1][1])
        halo = {"stroke_width": 2, "stroke_fill": "white"}
        pen.text(where, name, fill=colour, font=font(12), anchor="lm", **halo)
    return out


def _range(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    """Returns (low, high), the ends of an axis that shows `values`, with a margin. A linear axis
    begins at 0 if the smallest value is not negative and is less than 60 % of the largest. With
    `logarithmic`, the values and the ends are logarithms."""
    low = min(values)
    high = max(values)
    pad = 0.06 * (high - low) or 1.0
    if not logarithmic and 0 <= low < 0.6 * high:
        return 0.0, high + pad
    return low - pad, high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Returns about five round numbers between two ends."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Returns the numbers 1, 2 and 5 times a power of ten whose logarithms lie between two ends."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [k * 10.0**p for p in powers for k in (1, 2, 5) if low <= math.log10(k * 10.0**p) <= high]
