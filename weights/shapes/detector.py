"""Finds the coloured shapes in an image from its pixels alone, without a trained model.

The pixels that differ from the background form bodies, which are connected groups of pixels. A
body's colour is the nearest colour of the palette. Its shape is that of the template (an outline of
`data.outline` at one angle) that overlaps the body most, after both are brought to the same centre
and area. `judge` compares the bodies with the objects of a caption. The thresholds allow for the
loss of detail in the VAE: with FOREGROUND = 30 and IOU = 0.70 nearly all true images are still
judged right after encoding and decoding (README.md has the figures, false accepts included).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .data import COLOURS, SHAPES, outline

FOREGROUND = 30  # 8-bit RGB distance from the background, above which a pixel is part of a body
IOU = 0.70  # intersection over union with the best template, below which a body is malformed
SPECK = 40  # pixels: smaller bodies are ignored
FAR = 85  # 8-bit RGB distance from the nearest palette colour, beyond which a body has no colour
SECOND = 0.22  # fraction of a body in a second colour that makes it a hybrid
# Cells per side of the grid on which shapes are compared. Shapes have a mean radius of a quarter of
# a side there.
GRID = 40
NEGLECT = frozenset(("missing", "hybrid", "mixed", "wrong colour"))
# Kinds of failure, the most serious first. "hybrid" is a body of two colours, "mixed" a subject
# drawn with the shape or colour of another subject.
KINDS = ("missing", "hybrid", "mixed", "wrong colour", "wrong shape", "malformed", "doubled", "extra")
PALETTE = np.array(list(COLOURS.values()), np.float32)
NAMES = tuple(COLOURS)

Subject = tuple[str | None, str]  # colour (None: any), shape


@dataclass(frozen=True)
class Found:
    """One body that was found in an image. A body is a connected group of pixels that differ from
    the background. It is compared with templates of all shapes. `shape` is the shape whose template
    overlaps the body most, and `iou` is the intersection over union of that template and the
    body."""

    colours: tuple[str, ...]  # one; two for a hybrid; none if all palette colours are far
    shape: str
    iou: float
    area: int  # pixels
    centre: tuple[float, float]  # x, y, pixels
    box: tuple[float, float, float, float] = (0, 0, 0, 0)  # x0, y0, x1, y1, pixels, end exclusive

    @property
    def whole(self) -> bool:
        """Returns True if the body has exactly one colour and overlaps the template of its shape
        well enough (`iou` >= IOU)."""
        return len(self.colours) == 1 and self.iou >= IOU


@dataclass(frozen=True)
class Verdict:
    """The result of comparing an image with the objects that were asked for.

    `found` are all bodies (connected groups of pixels) in the image. `subjects_failed` is the
    number of objects that were asked for but not found. `failures` has one kind of failure, an item
    of `KINDS`, for each object that was not found, and then one for each body that was not asked
    for.

    `strict` is True if the image has exactly the objects that were asked for. `no_neglect` is True
    if no object is missing, merged with another object, or in a wrong colour; badly drawn shapes
    and surplus objects are allowed.
    """

    found: tuple[Found, ...]
    failures: tuple[str, ...]
    subjects_failed: int

    @property
    def strict(self) -> bool:
        return not self.failures

    @property
    def no_neglect(self) -> bool:
        return not NEGLECT & set(self.failures)

    @property
    def kind(self) -> str:
        """Returns the most serious of the failures, an item of `KINDS`, or "right" if there is no
        failure."""
        return min(self.failures, key=KINDS.index, default="right")


def bodies(mask: np.ndarray) -> list[np.ndarray]:
    """Splits a boolean mask (H,W) into its connected groups of pixels, where a pixel touches its 4
    neighbours. Returns one mask (H,W) for each group, the largest group first. Groups of fewer than
    SPECK pixels are left out."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest label beside it, until nothing changes
        padded = np.pad(labels, 1)
        spread = np.maximum.reduce(
            [labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        spread[~mask] = 0
        if (spread == labels).all():
            break
        labels = spread
    names, sizes = np.unique(labels[mask], return_counts=True)
    return [labels == names[i] for i in np.argsort(-sizes) if sizes[i] >= SPECK]


def _normalised(mask: np.ndarray) -> np.ndarray:
    """Moves and scales the mask (H,W) of a body into a grid (GRID,GRID), so that bodies of
    different place and size can be compared. In the grid the body's centroid is in the middle, and
    its area is that of a circle with a radius of GRID/4 cells."""
    rows, columns = np.nonzero(mask)
    scale = (len(rows) / np.pi) ** 0.5 / (GRID / 4)  # pixels per cell
    at = (np.arange(GRID) - (GRID - 1) / 2) * scale
    i, j = (np.rint(at + centre).astype(int) for centre in (rows.mean(), columns.mean()))
    inside = ((i >= 0) & (i < mask.shape[0]))[:, None] & ((j >= 0) & (j < mask.shape[1]))
    return mask[i.clip(0, mask.shape[0] - 1)][:, j.clip(0, mask.shape[1] - 1)] & inside


@cache
def templates() -> np.ndarray:
    """Returns the templates that bodies are compared with: for every shape in `SHAPES` the mask of
    its outline, rotated by five angles, in a grid as `_normalised` makes it. The result has the
    shape (shapes,angles,GRID,GRID). The angles cover those of the training set."""
    out = []
    for shape in SHAPES:
        out.append([])
        for turn in np.linspace(-0.15, 0.15, 5):
            canvas = Image.new("1", (400, 400))
            ImageDraw.Draw(canvas).polygon([tuple(p) for p in outline(shape, turn) * 120 + 200], fill=1)
            out[-1].append(_normalised(np.asarray(canvas)))
    return np.array(out)


def shape_of(mask: np.ndarray) -> tuple[str, float]:
    """Finds the shape of a body from its mask (H,W). Returns (shape, iou): the shape whose template
    overlaps the body most, and the intersection over union of that template and the body."""
    body = _normalised(mask)
    overlap = (templates() & body).sum((2, 3)) / (templates() | body).sum((2, 3))  # (shapes, turns)
    best = overlap.max(1)
    return SHAPES[int(best.argmax())], float(best.max())


def _inner(mask: np.ndarray) -> np.ndarray:
    """Returns the mask (H,W) of a body without its outermost pixels, whose colours mix with the
    background. If too few pixels would remain, returns the mask unchanged."""
    padded = np.pad(mask, 1)
    inner = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner if inner.sum() >= SPECK // 2 else mask


def find(picture: np.ndarray | Image.Image) -> list[Found]:
    """Finds the bodies in an image with a light background. A body is a connected group of pixels
    that differ from the background. The image is a PIL image or an array (H,W,3) of 8-bit RGB.
    Returns the bodies, the largest first. A group of pixels counts as two bodies if it consists of
    two well-drawn shapes of different colours that touch."""
    array = np.asarray(picture.convert("RGB")) if isinstance(picture, Image.Image) else picture
    pixels = array.astype(np.float32)
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    rim = np.concatenate([side.reshape(-1, 3) for side in sides])
    foreground = np.linalg.norm(pixels - np.median(rim, 0), axis=-1) > FOREGROUND
    distance = np.linalg.norm(pixels[:, :, None] - PALETTE, axis=-1)  # (H, W, colours)
    nearest = distance.argmin(-1)
    found = []
    for mask in bodies(foreground):
        inner = _inner(mask)
        counts = np.bincount(nearest[inner], minlength=len(PALETTE))
        first, second = np.argsort(-counts)[:2]
        # A body of two colours is a hybrid, unless it is two well-drawn objects that touch.
        if counts[second] >= SECOND * inner.sum():
            # Every pixel is assigned to the nearer of the two colours. This includes the rim's
            # pixels, which have neither colour.
            own = distance[..., first] <= distance[..., second]
            parts = [max(bodies(mask & side), key=np.sum, default=None) for side in (own, ~own)]
            parts = [part for part in parts if part is not None]
            if len(parts) == 2 and all(shape_of(part)[1] >= IOU + 0.1 for part in parts):
                found += [_found(pixels, part, None) for part in parts]
                continue
            found.append(_found(pixels, mask, tuple(NAMES[k] for k in (first, second))))
        else:
            found.append(_found(pixels, mask, None))
    return found


def _found(pixels: np.ndarray, mask: np.ndarray, colours: tuple[str, ...] | None) -> Found:
    """Describes one body in an image. `pixels` (H,W,3) is the image, and `mask` (H,W) states which
    pixels belong to the body. `colours` are the body's colours. If this is None, the body gets the
    palette colour nearest to its median colour, or no colour if none is near."""
    if colours is None:
        distance = np.linalg.norm(np.median(pixels[_inner(mask)], 0) - PALETTE, axis=-1)
        colours = (NAMES[int(distance.argmin())],) if distance.min() <= FAR else ()
    rows, columns = np.nonzero(mask)
    centre = (float(columns.mean()), float(rows.mean()))
    x0, y0, x1, y1 = map(float, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return Found(colours, *shape_of(mask), int(mask.sum()), centre, (x0, y0, x1, y1))


def judge(picture: np.ndarray | Image.Image, subjects: Sequence[Subject]) -> Verdict:
    """Compares an image with the objects that it should show, and returns the verdict. The image is
    a PIL image or an array (H,W,3) of 8-bit RGB. `subjects` are the objects as (colour, shape)
    pairs; if the colour is None, any colour is right."""
    found = find(picture)
    left = list(found)
    missed = []
    for colour, shape in subjects:
        match = next((f for f in left if f.whole and f.shape == shape and colour in (None, *f.colours)), None)
        if match is None:
            missed.append((colour, shape))
        else:
            left.remove(match)
    failures = []
    for subject in missed:
        body, kind = _explain(subject, left, subjects)
        if body is not None:
            left.remove(body)
        failures.append(kind)
    for body in left:
        twice = any(
            body.whole and body.shape == shape and colour in (None, *body.colours)
            for colour, shape in subjects
        )
        if twice:
            failures.append("doubled")
        else:
            failures.append("hybrid" if len(body.colours) == 2 else "extra")
    return Verdict(tuple(found), tuple(failures), len(missed))


def _explain(subject: Subject, left: list[Found], subjects: Sequence[Subject]) -> tuple[Found | None, str]:
    """Explains why `subject`, a (colour, shape) pair, was not found in an image. `left` holds the
    bodies of the image that match no subject, and `subjects` all subjects that were asked for.
    Returns (body, kind): the body that was probably drawn in place of the subject, or None if there
    is none, and the kind of failure, an item of `KINDS`."""
    colour, shape = subject
    others = [s for s in subjects if s != subject]
    for body in left:
        if len(body.colours) == 2 and colour in body.colours:
            return body, "hybrid"
    for body in left:  # in the subject's colour: badly drawn, or with another shape
        if colour in body.colours:
            if body.iou < IOU:
                return body, "malformed"
            return body, "mixed" if body.shape in [s for _, s in others] else "wrong shape"
    for body in left:  # in the subject's shape, but with another colour
        if body.iou >= IOU and body.shape == shape and len(body.colours) < 2:
            return body, "mixed" if set(body.colours) & {c for c, _ in others} else "wrong colour"
    if colour is None and left:
        return left[0], "malformed" if left[0].iou < IOU else "wrong shape"
    return None, "missing"
