"""Reads, checks and previews layouts. A layout has a caption for the whole image, and regions
(boxes or masks) with a caption each.

Two forms are read: a `layout.json`, whose keys are listed at `load`, and the folder that
NoiseCollage's program takes (Shirakawa & Uchida, CVPR 2024, arXiv 2403.03485). That folder holds
PALL/ for the whole image and P000/, P001/, ... for the regions. Each of these has a caption file,
and all but PALL have a mask. This module needs only numpy and Pillow, so that mistakes are found
before PyTorch is imported.

    layout = load("layout.json")     # reads the files, masks included; they are not read again
    sized = layout.sized(512, 512)   # each region's pixels on an image of that size
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from minsd import image
from minsd.adapters import LoRAReference, join_scale, split_scale
from minsd.config import CELL, CONTROL_SCALE_MOST, check_size
from minsd.files import encodable, read_json

CROP_MARGIN_MOST = 1000.0  # the largest crop margin (noise/collage.py), in sides of a region's box
WEIGHT_MOST = 1e6
MOST_REGIONS = 256  # of a layout; each region adds a UNet evaluation to every step
MOST_PIXELS = 2**29  # of all regions together, and of all masks together: half a gigabyte
TOP_KEYS = ("prompt", "negative_prompt", "width", "height", "regions")
REGION_KEYS = ("prompt", "box", "mask", "negative_prompt", "weight", "lora", "control_image", "control_scale")
CAPTIONS = ("self_caption.json", "blip_caption.json")
MASKS = ("bbox_mask_image.png", "mask_image.png")
CONTROLS = ("pose_image.png", "sketch_image.png", "canny_image.png")
# The colours of a preview's regions.
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")

Box = tuple[float, float, float, float]  # x0, y0, x1, y1: fractions if all are <= 1, else pixels


@dataclass(frozen=True)
class Region:
    """A part of the image with its own caption. Its place is given by a box or by a mask."""

    prompt: str
    box: Box | None = None  # as given
    mask: Path | None = None  # an image, white inside
    negative_prompt: str = ""
    weight: float = 1.0
    lora: tuple[LoRAReference, ...] = ()
    control_image: Path | None = None
    control_scale: float | None = None  # None: 1
    # The mask in the size of its file, boolean (H,W).
    mask_pixels: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class SizedRegion(Region):
    """A region on an image of known size. `pixels` is True for the image's pixels inside the
    region."""

    # (height, width) boolean, read-only.
    pixels: np.ndarray = field(kw_only=True, repr=False, compare=False)

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """The smallest box around the region, (x0, y0, x1, y1) in pixels, with x1 and y1
        exclusive."""
        return _bounds(self.pixels)


@dataclass(frozen=True)
class Layout:
    """The captions and regions of an image, as read from files. If `width` and `height` (pixels)
    are None, the image gets the model's own size."""

    prompt: str
    regions: tuple[Region, ...] = ()
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    control_image: Path | None = None  # the whole image's, in the folder form
    source: str = field(default="", compare=False)  # "layout.json: ", the beginning of errors

    @property
    def control_images(self) -> list[Path | None]:
        """The files of the control images: that of the whole image first, then one per region. An
        entry is None if there is no such image."""
        return [self.control_image, *(region.control_image for region in self.regions)]

    def sized(self, width: int, height: int) -> "SizedLayout":
        """Returns this layout on an image of width x height pixels, both multiples of 8.

        Raises ValueError for a size that is not possible, for too many regions, for a box that
        leaves the image, and for a region that is too small, which means that it fills less than
        half of every latent cell.
        """
        try:
            check_size(height, width)
        except ValueError as error:
            raise ValueError(f"{self.source}the layout's {error}") from None
        if len(self.regions) * width * height > MOST_PIXELS:
            most = MOST_PIXELS // (width * height)
            raise ValueError(
                f"{self.source}an image of {width}x{height} pixels can have at most {most} regions, "
                f"not {len(self.regions)}"
            )
        regions = []
        notes = []
        resized: dict[int, np.ndarray] = {}  # by the identity of the mask, which regions may share
        for k, region in enumerate(self.regions, 1):
            where = f"{self.source}region {k}"
            mask = region.mask_pixels
            if mask is None:
                pixels = _box_pixels(region.box, width, height, f"{where}: ")
            elif mask.shape == (height, width):
                pixels = mask.copy()
            else:
                size = f"{mask.shape[1]}x{mask.shape[0]}"
                notes.append(
                    f"region {k}: its mask of {size} pixels was resized to the image's {width}x{height}"
                )
                if id(mask) not in resized:
                    fitted = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
                    resized[id(mask)] = np.array(fitted)
                pixels = resized[id(mask)]
            _check_filled(pixels, region.box, where)
            pixels.flags.writeable = False
            regions.append(SizedRegion(**_values(region, Region), pixels=pixels))
        given = _values(self, Layout) | {"regions": tuple(regions), "width": width, "height": height}
        return SizedLayout(**given, notes=tuple(notes))


@dataclass(frozen=True)
class SizedLayout(Layout):
    """A layout on an image of known size. `notes` are lines for the user, which report masks that
    were resized."""

    regions: tuple[SizedRegion, ...] = ()
    width: int = field(kw_only=True)
    height: int = field(kw_only=True)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the content of a layout.json for this layout, with absolute file names. The
        control image of the whole image is left out, because layout.json has no key for it; only
        the folders of NoiseCollage's program can hold one."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": self.width,
            "height": self.height,
            "regions": [_region_json(region) for region in self.regions],
        }


def ensure_sized(layout: Layout, default: int) -> SizedLayout:
    """Returns the layout itself if it is a `SizedLayout`. Otherwise returns a copy of it sized for
    its width and height, or for `default` x `default` pixels if it has none."""
    if isinstance(layout, SizedLayout):
        return layout
    return layout.sized(layout.width or default, layout.height or default)


def load(source: str | Path | dict) -> Layout:
    """Reads a layout. `source` is the path of a layout.json or of a folder of NoiseCollage's
    program, or the content of a layout.json as a dict:

        {"prompt": "two shapes", "negative_prompt": "", "width": 512, "height": 512,
         "regions": [{"prompt": "a red circle", "box": [0, 0, 0.5, 1], "negative_prompt": "",
                      "weight": 1.0, "lora": ["FILE:0.8"], "control_image": "edges.png",
                      "control_scale": 1.0},
                     {"prompt": "a blue square", "mask": "square.png"}]}

    Only the prompts, and a box or a mask for each region, are required. A box is [x0, y0, x1, y1],
    in fractions of the image if no number is above 1, otherwise in pixels. A mask is an image,
    white inside the region. A LoRA is named as FILE or FILE:SCALE. Without width and height the
    image has the model's own size. A region's negative prompt defaults to the image's. File names
    are relative to the folder of the layout.json.

    Raises FileNotFoundError if a file is missing. Raises ValueError for content of any other form
    and, if the size of the image is stated, for regions that do not fit the image. Error messages
    are one line.
    """
    if isinstance(source, dict):
        return _from_dict(source, Path(), "the layout: ")
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    return _from_dict(_read_json(path), path.parent, f"{path}: ")


def coverage(pixels: np.ndarray, cell: int) -> np.ndarray:
    """Returns the fraction of each cell that lies inside a mask `pixels` (H,W), as (h,w) float64. A
    cell is a square of `cell` pixels, cut at the image's edge."""
    high, wide = (-(-n // cell) for n in pixels.shape)
    padded = np.zeros((high * cell, wide * cell))
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    rows, columns = (np.minimum(cell, n - cell * np.arange(m)) for n, m in zip(pixels.shape, (high, wide)))
    return padded.reshape(high, cell, wide, cell).sum((1, 3)) / np.outer(rows, columns)


# --- preview --------------------------------------------------------------------------------------


def preview(layout: Layout, size: int = 512) -> Image.Image:
    """Draws a preview of a layout: the outline and caption of every region on an empty image, and a
    line of text per region below it. A latent cell has the colour of a region that fills it, and a
    paler shade if the region fills only part of the cell. `size` is the width and height of the
    image in pixels if the layout has none."""
    layout = ensure_sized(layout, size)
    scale = _enlargement(layout)
    colours = _colours(layout)
    lines = _legend(layout, colours)
    high = scale * layout.height
    out = Image.new("RGB", (max(scale * layout.width, 480), high + 16 * len(lines) + 8), "white")
    out.paste(_outlined(_shading(layout, colours, scale), layout), (0, 0))
    pen = ImageDraw.Draw(out)
    for i, (colour, line) in enumerate(lines):
        pen.text((4, high + 4 + 16 * i), _printable(line), fill=colour)
    return out


def overlay(picture: Image.Image, layout: SizedLayout) -> Image.Image:
    """Draws the outline and caption of every region over an image of the layout's size. The result
    is as large as a `preview`.
    """
    scale = _enlargement(layout)
    large = picture.convert("RGB").resize(
        (scale * layout.width, scale * layout.height), Image.Resampling.LANCZOS
    )
    return _outlined(large, layout)


def _enlargement(layout: SizedLayout) -> int:
    """Returns the factor, a whole number of at least 1, by which previews enlarge the image of the
    layout. The longer side of a preview gets about 640 pixels."""
    return max(1, round(640 / max(layout.width, layout.height)))


def _colours(layout: SizedLayout) -> list[str]:
    """Returns the colour of each region in previews."""
    return [COLOURS[k % len(COLOURS)] for k in range(len(layout.regions))]


def _outlined(large: Image.Image, layout: SizedLayout) -> Image.Image:
    """Draws the regions' outlines and captions on an image of `_enlargement` times the layout's
    size, and returns it.
    """
    scale = _enlargement(layout)
    pen = ImageDraw.Draw(large)
    pen.rectangle((0, 0, large.width - 1, large.height - 1), outline="black")
    for k, (region, colour) in enumerate(zip(layout.regions, _colours(layout)), 1):
        large.paste(colour, (0, 0), _outline(region, scale))
        x0, y0, *_ = region.bounds
        pen.text((scale * x0 + 5, scale * y0 + 4), _printable(f"{k} {region.prompt}"), fill=colour)
    return large


def _printable(text: str) -> str:
    """Replaces every character outside Latin-1, which a font may lack, by "?"."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _shading(layout: SizedLayout, colours: list[str], scale: int) -> Image.Image:
    shade = np.full((layout.height // CELL, layout.width // CELL, 3), 255.0)  # per latent cell
    for region, colour in zip(layout.regions, colours):
        filled = coverage(region.pixels, CELL)
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        shade += 0.3 * filled[..., None] * (rgb - shade)
    cells = shade.round().astype(np.uint8)
    return Image.fromarray(cells.repeat(scale * CELL, 0).repeat(scale * CELL, 1))


def _outline(region: SizedRegion, scale: int) -> Image.Image:
    """Returns a mask of the region's outline, for a preview that is `scale` times as large as the
    image. The outline is the outermost two preview pixels inside the region."""
    inside = np.pad(region.pixels, 1).repeat(scale, 0).repeat(scale, 1)
    inner = inside.copy()
    for axis in (0, 1):
        for step in (-2, 2):
            inner &= np.roll(inside, step, axis)
    return Image.fromarray((inside & ~inner)[scale:-scale, scale:-scale])


def _legend(layout: SizedLayout, colours: list[str]) -> list[tuple[str, str]]:
    """Returns the lines of text below a preview, each as (colour, text): the image's caption and
    size, a line per region, a line with the share of the image outside every region and the share
    inside more than one, and the layout's notes. `colours` holds one colour per region."""
    lines = [("black", f"0  {layout.prompt!r}, the whole picture, {layout.width}x{layout.height}")]
    times = np.zeros((layout.height, layout.width), np.uint16)  # in how many regions each pixel lies
    for k, (region, colour) in enumerate(zip(layout.regions, colours), 1):
        times += region.pixels
        x0, y0, x1, y1 = region.bounds
        kind = "box" if region.mask is None else "mask within"
        line = f"{k}  {region.prompt!r}, {kind} {x0},{y0} to {x1},{y1}, {100 * region.pixels.mean():.1f} %"
        if region.weight != 1:
            line += f", weight {region.weight:g}"
        if region.negative_prompt:
            line += f", not {region.negative_prompt!r}"
        lines.append((colour, line))
    outside = 100 * (1 - np.mean(times > 0))
    shared = 100 * np.mean(times > 1)
    lines.append(("black", f"outside every region {outside:.1f} %, in more than one {shared:.1f} %"))
    return lines + [("black", note) for note in layout.notes]


# --- regions' pixels ------------------------------------------------------------------------------


def _values(value: Region | Layout, kind: type[Region] | type[Layout]) -> dict[str, Any]:
    """Returns the fields of the dataclass `kind` as a dict of name -> value, with the values that
    the region or layout `value` has. `value` may be of a subclass of `kind`; its further fields are
    left out."""
    return {f.name: getattr(value, f.name) for f in fields(kind)}


def _bounds(pixels: np.ndarray) -> tuple[int, int, int, int]:
    rows = np.flatnonzero(pixels.any(1))
    columns = np.flatnonzero(pixels.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _in_fractions(box: Sequence[float]) -> bool:
    return max(box) <= 1


def _hint(box: Sequence[float] | None) -> str:
    """Returns the end of an error message about a box (x0, y0, x1, y1). A box is in fractions if no
    number is above 1, otherwise in pixels. If it is in pixels but has numbers that are not whole,
    it may have been meant in fractions, and the result is a hint. Otherwise, or if the box is None,
    the result is an empty string."""
    if box is None or _in_fractions(box) or all(v == int(v) for v in box):
        return ""
    return "; a number above 1 makes all four of a box pixels: fractions are 0 to 1"


def _check_box(box: Sequence[float], width: int | None, height: int | None, where: str) -> None:
    """Raises ValueError for a box (x0, y0, x1, y1) that has no width or height or negative numbers.
    A box is in fractions if no number is above 1, otherwise in pixels. If `width` and `height` are
    given, a box in pixels must also lie inside an image of that size. The error message begins with
    `where`."""
    x_most = math.inf if width is None else width
    y_most = math.inf if height is None else height
    inside = "the image" if width is None else f"an image of {width}x{height} pixels"
    if _in_fractions(box):
        x_most = y_most = 1
        inside = "fractions 0 to 1"
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= x_most and 0 <= y0 < y1 <= y_most):
        raise ValueError(
            f"{where}the box {list(box)} must have 0 <= x0 < x1 and 0 <= y0 < y1 "
            f"and lie inside {inside}{_hint(box)}"
        )


def _box_pixels(box: Box | None, width: int, height: int, where: str) -> np.ndarray:
    """Returns a boolean mask (height, width) of the pixels inside a box (x0, y0, x1, y1), in
    fractions or pixels, whose edges are rounded to whole pixels. Raises ValueError if `box` is None
    or leaves the image. The error message begins with `where`."""
    if box is None:
        raise ValueError(f"{where}give a box [x0, y0, x1, y1] or a mask file, one of the two")
    _check_box(box, width, height, where)
    sides = (width, height, width, height) if _in_fractions(box) else (1, 1, 1, 1)
    x0, y0, x1, y1 = (math.floor(v * side + 0.5) for v, side in zip(box, sides))
    pixels = np.zeros((height, width), bool)
    pixels[y0:y1, x0:x1] = True
    return pixels


def _check_filled(pixels: np.ndarray, box: Box | None, where: str) -> None:
    """Raises ValueError if a region with the mask `pixels` (H,W) is empty or fills less than half
    of every latent cell. `box` is the region's box or None, and `where` begins the message."""
    if not pixels.any():
        mend = "its mask needs white pixels inside"
        if box is not None:
            mend = f"its box {list(box)} must be at least a pixel wide and high"
        raise ValueError(f"{where} is empty: {mend}{_hint(box)}")
    if coverage(pixels, CELL).max() < 0.5:
        x0, y0, x1, y1 = _bounds(pixels)
        raise ValueError(
            f"{where} is too small: its {x1 - x0}x{y1 - y0} pixels, {int(pixels.sum())} in all, "
            "fill no latent cell of 8x8 pixels by half; 32 pixels within one cell are the least, "
            f"and a box of 11x11 is enough wherever it lies{_hint(box)}"
        )


class _Masks:
    """Reads the masks of one layout. Each file is read once, and the number of pixels of all masks
    together is limited."""

    def __init__(self) -> None:
        self.known: dict[Path, np.ndarray] = {}

    def read(self, path: Path, where: str) -> np.ndarray:
        """Reads the mask in a file as booleans (H,W). Raises FileNotFoundError if there is no such
        file, and ValueError if the file is no image or the layout's masks are too large together.
        Messages begin with `where`."""
        if path not in self.known:
            self.known[path] = _read_mask(path, where)
            if sum(mask.size for mask in self.known.values()) > MOST_PIXELS:
                raise ValueError(f"{where}the masks have more than {MOST_PIXELS:,} pixels in all")
        return self.known[path]


def _read_mask(path: Path, where: str) -> np.ndarray:
    try:
        picture = image.read(path, on="black", what="mask file")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}{error}") from None
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    mask = np.asarray(picture if picture.mode == "F" else picture.convert("L")) >= 128
    mask.flags.writeable = False
    return mask


# --- layout.json ----------------------------------------------------------------------------------


def _region_json(region: Region) -> dict[str, Any]:
    given: dict[str, Any] = {"prompt": region.prompt}
    if region.box is not None:
        given["box"] = list(region.box)
    elif region.mask is not None:
        given["mask"] = str(region.mask.resolve())
    given["negative_prompt"] = region.negative_prompt
    given["weight"] = region.weight
    given["control_scale"] = 1.0 if region.control_scale is None else region.control_scale
    given["lora"] = [join_scale(path.resolve(), scale) for path, scale in region.lora]
    if region.control_image is not None:
        given["control_image"] = str(region.control_image.resolve())
    return given


def _read_json(path: Path) -> Any:
    try:
        return read_json(path, unique=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no layout {path}") from None


def _from_dict(given: Any, folder: Path, where: str) -> Layout:
    _check_keys(given, TOP_KEYS, where)
    width, height = (_value(given, key, int, None, where) for key in ("width", "height"))
    if (width is None) != (height is None):
        raise ValueError(f"{where}give width and height, or neither")
    negative = _value(given, "negative_prompt", str, "", where)
    regions = _value(given, "regions", list, [], where)
    if len(regions) > MOST_REGIONS:
        raise ValueError(f"{where}a layout has at most {MOST_REGIONS} regions, not {len(regions)}")
    masks = _Masks()
    layout = Layout(
        _required(given, "prompt", where),
        tuple(_region(r, negative, folder, masks, f"{where}region {k}: ") for k, r in enumerate(regions, 1)),
        negative,
        source=where,
    )
    return layout if width is None else _of_size(layout, width, height)


def _of_size(layout: Layout, width: int, height: int) -> Layout:
    """Returns the layout with `width` and `height` (pixels) set. Raises ValueError if its regions
    do not fit an image of that size."""
    layout.sized(width, height)
    return replace(layout, width=width, height=height)


def _region(given: Any, negative: str, folder: Path, masks: "_Masks", where: str) -> Region:
    _check_keys(given, REGION_KEYS, where)
    if ("box" in given) == ("mask" in given):
        raise ValueError(f"{where}give a box [x0, y0, x1, y1] or a mask file, one of the two")
    box = _value(given, "box", list, None, where)
    mask = _file(given, "mask", folder, where)
    if box is not None:
        if not (len(box) == 4 and all(_is(v, float) for v in box)):
            raise ValueError(f"{where}a box is four numbers [x0, y0, x1, y1], not {json.dumps(box)}")
        _check_box(box, None, None, where)
    weight = float(_value(given, "weight", float, 1.0, where))
    if not 0 < weight <= WEIGHT_MOST:
        raise ValueError(f"{where}the weight must be more than 0 and at most {WEIGHT_MOST:g}, not {weight:g}")
    scale = _value(given, "control_scale", float, None, where)
    if scale is not None and abs(scale) > CONTROL_SCALE_MOST:
        most = f"{CONTROL_SCALE_MOST:g}"
        raise ValueError(f"{where}control_scale must be from -{most} to {most}, not {scale:g}")
    lora = _value(given, "lora", list, [], where)
    if not all(isinstance(name, str) and name for name in lora):
        raise ValueError(f"{where}lora is a list of files, each FILE or FILE:SCALE, not {json.dumps(lora)}")
    control = _file(given, "control_image", folder, where)
    if control is not None and not control.is_file():
        raise FileNotFoundError(f"{where}there is no control image {control}")
    return Region(
        _required(given, "prompt", where),
        None if box is None else tuple(box),
        mask,
        _value(given, "negative_prompt", str, negative, where),
        weight,
        _references(lora, folder, where),
        control,
        None if scale is None else float(scale),
        None if mask is None else masks.read(mask, where),
    )


def _references(names: Iterable[str], folder: Path, where: str) -> tuple[LoRAReference, ...]:
    try:
        references = [split_scale(name) for name in names]
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    return tuple((folder / path, scale) for path, scale in references)


def _check_keys(given: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(
            f"{where}this must be an object with the keys {', '.join(known)}, not {json.dumps(given)[:40]}"
        )
    for key in given:
        if key not in known:
            raise ValueError(f"{where}unknown key {key!r}; known are {', '.join(known)}")


def _is(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    if kind is float:  # neither nan nor beyond a float's range
        return isinstance(value, (int, float)) and abs(value) < 1e300
    return isinstance(value, kind)


def _value(given: dict[str, Any], key: str, kind: type, default: Any, where: str) -> Any:
    """Returns the value of `key` in `given`, or `default` if the key is missing. Raises ValueError
    if the value is not of the type `kind`. The message begins with `where`."""
    if key not in given:
        return default
    value = given[key]
    if not _is(value, kind):
        wanted = {int: "a whole number", float: "a number", str: "text", list: "a list"}[kind]
        raise ValueError(f"{where}{key!r} must be {wanted}, not {json.dumps(value)[:40]}")
    if kind is str and "prompt" in key and encodable(value) != value:
        raise ValueError(f"{where}{key!r} is not text in UTF-8")
    return value


def _file(given: dict[str, Any], key: str, folder: Path, where: str) -> Path | None:
    name = _value(given, key, str, None, where)
    return None if name is None else folder / name


def _required(given: dict[str, Any], key: str, where: str) -> str:
    if key not in given:
        raise ValueError(f"{where}there is no {key!r}")
    return _value(given, key, str, "", where)


# --- the published folder -------------------------------------------------------------------------


def _from_folder(folder: Path) -> Layout:
    """Reads a layout from a folder of NoiseCollage's program, which holds PALL/ for the whole image
    and P000/, P001/, ... for the regions (numbers may be missing). The image gets the size of the
    first region's mask. Raises FileNotFoundError if PALL, a caption or a mask is missing, and
    ValueError for anything else that is wrong."""
    whole = folder / "PALL"
    if not whole.is_dir():
        raise FileNotFoundError(
            f"{folder} has no folder PALL for the whole image: "
            "give a layout.json, or a folder with PALL, P000 ..."
        )
    parts = [part for part in folder.iterdir() if part.is_dir() and re.fullmatch(r"P[0-9]{1,9}", part.name)]
    if len(parts) > MOST_REGIONS:
        raise ValueError(f"{folder}: a layout has at most {MOST_REGIONS} regions, not {len(parts)}")
    regions = []
    masks = []
    reader = _Masks()
    for part in sorted(parts, key=lambda part: int(part.name[1:])):
        mask = _first(part, MASKS)
        if mask is None:
            raise FileNotFoundError(f"there is no mask file {part / MASKS[0]} (nor {MASKS[1]})")
        masks.append(reader.read(mask, ""))
        control = _first(part, CONTROLS)
        regions.append(Region(_caption(part), mask=mask, control_image=control, mask_pixels=masks[-1]))
    layout = Layout(
        _caption(whole), tuple(regions), control_image=_first(whole, CONTROLS), source=f"{folder}: "
    )
    if not masks:
        return layout
    height, width = masks[0].shape
    return _of_size(layout, width, height)


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _caption(folder: Path) -> str:
    path = _first(folder, CAPTIONS)
    if path is None:
        raise FileNotFoundError(f"there is no caption file {folder / CAPTIONS[0]} (nor {CAPTIONS[1]})")
    caption = _read_json(path)
    if not isinstance(caption, str) or encodable(caption) != caption:
        raise ValueError(f"{path} must hold one JSON string, the caption, not {json.dumps(caption)[:40]}")
    return caption
