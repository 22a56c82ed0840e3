"""Judges layouts by CLIP, as NoiseCollage's evaluation does (Shirakawa and Uchida 2024, arXiv
2403.03485): the contents of each region's box, centred on a white square, are compared with the
region's caption.

`region_clip` is the mean cosine over regions, and `nearest_own` the fraction of regions to which
their own caption is nearer than any other caption.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minsd.judges import Judged, pixels
from minsd.judges.clip import Clip, h14, network, tokenizer
from minsd.judges.objects import Asked, Box, boxes_of

SIDE = 512  # pixels of the square that a region is shown on


def on_white(image: Image.Image, box: Box) -> Image.Image:
    """Cuts a box, (x0, y0, x1, y1) in pixels, out of an image. Returns this part in the middle of a
    white square, resized to SIDE x SIDE pixels."""
    part = image.convert("RGB").crop([round(v) for v in box])  # type: ignore[arg-type]
    side = max(part.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


class Regions:
    """A judge that compares each region of a layout with the region's caption by CLIP. Its columns
    are region_clip, the mean cosine of a region and its caption, and nearest_own, the fraction of
    regions to which their own caption is nearest of all captions."""

    def __init__(self, identity: dict[str, Any], clip: Clip):
        self.identity = identity
        self.clip = clip

    @torch.no_grad()
    def pictures(
        self, images: Sequence[Image.Image], prompts: Sequence[str], asked: Sequence[Asked | None]
    ) -> list[Judged]:
        """Judges RGB images, and returns one result per image. `asked[i]["layout"]` is the layout
        of image i. If an image has no layout, or a region of it has no box, the result has no
        values. `prompts` are ignored."""
        return [self._judge(image, (item or {}).get("layout")) for image, item in zip(images, asked)]

    def _judge(self, image: Image.Image, layout: Mapping[str, Any] | None) -> Judged:
        boxes = boxes_of(layout, *image.size) if layout else []
        if not layout or not boxes:
            return Judged({}, reason="the prompt has no layout of boxes")
        parts = [on_white(image, box) for box in boxes]
        vectors = self.clip.images(pixels.pil(parts, self.clip.size))
        texts = self.clip.texts([region["prompt"] for region in layout["regions"]]).to(vectors)
        cosines = vectors @ texts.T  # (regions, captions)
        own = cosines.diag()
        nearest = (cosines.argmax(1).cpu() == torch.arange(len(parts))).float().mean()
        return Judged({"region_clip": float(own.mean()), "nearest_own": float(nearest)})


def build(
    identity: dict[str, Any], *, files: Mapping[str, Path], device: torch.device | str, dtype: torch.dtype
) -> Regions:
    """Loads the judge "region_clip". `files` maps the key "clip-b32" to the path of CLIP's weights.
    `identity` is the dict with the judge's name, weights, dtype and options that is written into
    every line of scores."""
    path = files["clip-b32"]
    return Regions(identity, Clip(network(path, h14()), tokenizer(path.parent), device, dtype))
