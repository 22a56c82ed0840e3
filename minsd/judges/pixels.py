"""Preprocesses images for judges, in two ways: from PIL images, for reported numbers, and
differentiably, from tensors.

`pil` is CLIP's own preprocessing (Radford et al. 2021), bit for bit that of transformers' processor
without torchvision. `tensor` approximates `pil` in torch: antialiased bicubic, clamped and rounded
to 8 bits, with the gradient passed through the rounding unchanged. `letterbox` is HPSv2's
preprocessing (Wu et al. 2023), which keeps the whole image and pads it with black; it is the same
for PIL images and tensors.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, per channel of pixels in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)


def to_pixels(images: Sequence[Image.Image]) -> list[Tensor]:
    """Returns each image as a tensor (3,H,W) of float32 in 0..1."""
    arrays = [np.array(image.convert("RGB")) for image in images]
    return [torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in arrays]


def normalise(pixels: Tensor) -> Tensor:
    """Normalises pixels (B,3,H,W) in 0..1 for CLIP: subtracts CLIP's mean of each channel, and
    divides by CLIP's standard deviation of the channel."""
    mean, std = (
        torch.tensor(v, dtype=pixels.dtype, device=pixels.device)[:, None, None] for v in (MEAN, STD)
    )
    return (pixels - mean) / std


def sides(width: int, height: int, size: int) -> tuple[int, int]:
    """Returns the (width, height) that an image has after it is scaled so that its shorter side has
    `size` pixels. The longer side is rounded down."""
    short, long = sorted((width, height))
    other = int(size * long / short)
    return (size, other) if width <= height else (other, size)


def pil(images: Sequence[Image.Image], size: int) -> Tensor:
    """Prepares images for CLIP: resizes the shorter side to `size` pixels with Pillow, in 8 bits,
    crops the middle square, and normalises. The images may have different sizes. Returns
    (B,3,size,size) float32."""
    out = []
    for image in images:
        small = image.convert("RGB").resize(sides(*image.size, size), Image.Resampling.BICUBIC)
        left, top = ((side - size) // 2 for side in small.size)
        square = np.array(small.crop((left, top, left + size, top + size)))
        scaled = (square.astype(np.float64) * (1 / 255)).astype(np.float32)
        values = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        out.append(torch.from_numpy(values).permute(2, 0, 1))
    return torch.stack(out)


def tensor(pixels: Tensor, size: int, rounding: bool = True) -> Tensor:
    """Prepares pixels (B,3,H,W) in 0..1 for CLIP as `pil` does, but differentiably: resizes the
    shorter side to `size` pixels, crops the middle square, and normalises. Returns (B,3,size,size).
    If `rounding` is True, the resized pixels are rounded to 8 bits, and the gradient is passed
    through the rounding unchanged.

    The result differs from that of `pil` by a seventh of an 8-bit step on average, because it is
    resized with antialiasing; without, it would be twelve steps.
    """
    width, height = sides(pixels.shape[-1], pixels.shape[-2], size)
    small = interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)
    small = small.clamp(0, 1)
    if rounding:
        small = small + ((small * 255).round() / 255 - small).detach()
    left, top = (width - size) // 2, (height - size) // 2
    return normalise(small[..., top : top + size, left : left + size])


def letterbox(pixels: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Prepares pixels (B,3,H,W) in 0..1 for HPSv2, differentiably: resizes the longer side to
    `size` pixels by bicubic interpolation, pads the shorter side with black to a square, and
    normalises. `antialias` is passed on to the interpolation. Returns (B,3,size,size)."""
    height, width = pixels.shape[-2:]
    long = max(height, width)
    new = round(height * size / long), round(width * size / long)
    small = interpolate(pixels, new, mode="bicubic", antialias=antialias, align_corners=False)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    bands = (left, size - new[1] - left, top, size - new[0] - top)
    return normalise(pad(small, bands))
