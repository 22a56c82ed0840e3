"""Layouts: a caption for the whole picture, and one for each region of it. Read, checked and drawn here, without a model.

Two forms are read. A `layout.json`, whose keys `load` lists; and the folder that NoiseCollage's program takes (Shirakawa
& Uchida, CVPR 2024, arXiv 2403.03485): PALL/ for the whole picture, P000/, P001/ ... for regions, each with a caption file
and all but PALL with a mask. Only numpy and Pillow are needed, so that mistakes are found before anything heavy is imported.
"""

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CELL = 8  # pixels a side of a latent cell
TOP_KEYS = ("prompt", "negative_prompt", "width", "height", "regions")
REGION_KEYS = ("prompt", "box", "mask", "negative_prompt", "weight", "lora", "control_image", "control_scale")
CAPTIONS = ("self_caption.json", "blip_caption.json")
MASKS = ("bbox_mask_image.png", "mask_image.png")
CONTROLS = ("pose_image.png", "sketch_image.png", "canny_image.png")
COLOURS = (
    "#d62728",
    "#1f77b4",
    "#2ca02c",
    "#ff7f0e",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
)  # of a preview's regions


@dataclass(frozen=True)
class Region:
    """A part of the picture with its own caption: a box or a mask. `lora`, `control_image` and `control_scale` are for
    adapters and ControlNet."""

    prompt: str
    box: tuple[float, float, float, float] | None = (
        None  # x0, y0, x1, y1 as given: fractions when all are <= 1, else pixels
    )
    mask: Path | None = None  # a picture, white inside
    negative_prompt: str = ""
    weight: float = 1.0
    lora: tuple[tuple[Path, float], ...] = ()  # files and scales
    control_image: Path | None = None
    control_scale: float | None = None  # left out: 1
    drawn: np.ndarray | None = field(
        default=None, repr=False, compare=False
    )  # the mask as its file has it, boolean
    pixels: np.ndarray | None = field(
        default=None, repr=False, compare=False
    )  # (height, width) boolean, once the size is known

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 of the smallest box around the region, pixels, the last two exclusive."""
        rows, columns = np.flatnonzero(self.pixels.any(1)), np.flatnonzero(self.pixels.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class Layout:
    """Captions and regions. Width and height (pixels) may be open, for the model to say: `sized` settles them. `notes`
    say what was done to the input that its author may not expect."""

    prompt: str
    regions: tuple[Region, ...] = ()
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    control_image: Path | None = None  # the whole picture's, of the folder form
    notes: tuple[str, ...] = ()
    source: str = field(default="", compare=False)  # "layout.json: ", how errors begin

    @property
    def control_images(self) -> list[Path | None]:
        """The whole picture's, and each region's."""
        return [self.control_image, *(region.control_image for region in self.regions)]

    def sized(self, width: int, height: int) -> "Layout":
        """This layout on a picture of width x height pixels, multiples of 8: every region's `pixels` drawn.

        ValueError for boxes that leave the picture and for regions that fill no latent cell by half.
        """
        for name, value in (("width", width), ("height", height)):
            if value > 16384:
                raise ValueError(
                    f"{self.source}the layout's {name} must be at most 16384 pixels, not {value}"
                )
            if value < CELL or value % CELL:
                raise ValueError(
                    f"{self.source}the layout's {name} must be a positive multiple of {CELL}, not {value}"
                )
        notes, regions = list(self.notes), []
        for k, region in enumerate(self.regions, 1):
            if region.drawn is None:
                pixels = _box_pixels(region.box, width, height, f"{self.source}region {k}: ")
            elif region.drawn.shape == (height, width):
                pixels = region.drawn.copy()
            else:
                had = f"{region.drawn.shape[1]}x{region.drawn.shape[0]}"
                notes.append(
                    f"region {k}: its mask of {had} pixels was resized to the picture's {width}x{height}"
                )
                pixels = np.array(
                    Image.fromarray(region.drawn).resize((width, height), Image.Resampling.NEAREST)
                )
            _check_filled(pixels, region.box, f"{self.source}region {k}")
            pixels.flags.writeable = False
            regions.append(replace(region, pixels=pixels))
        return replace(
            self, width=width, height=height, regions=tuple(regions), notes=tuple(dict.fromkeys(notes))
        )


def load(source: str | Path | dict) -> Layout:
    """A layout from a layout.json, a folder of the published form, or what a layout.json would hold.

        {"prompt": "two shapes", "negative_prompt": "", "width": 512, "height": 512,
         "regions": [{"prompt": "a red circle", "box": [0, 0, 0.5, 1], "negative_prompt": "", "weight": 1.0, "lora": ["FILE:0.8"],
                      "control_image": "edges.png", "control_scale": 1.0},
                     {"prompt": "a blue square", "mask": "square.png"}]}

    Only the prompts, and a box or a mask for each region, must be there. Without width and height the model's own size is
    taken. A region's negative prompt, left out, is the picture's. File names count from where the layout.json is.
    ValueError or FileNotFoundError, in one line, for all else.
    """
    if isinstance(source, dict):
        return _from_dict(source, Path(), "the layout: ")
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    return _from_dict(_read_json(path), path.parent, f"{path}: ")


def coverage(pixels: np.ndarray, cell: int) -> np.ndarray:
    """The share of each cell (a square of `cell` pixels, cut at the picture's end) inside a mask (H,W) -> (h,w) float64."""
    high, wide = -(-pixels.shape[0] // cell), -(-pixels.shape[1] // cell)
    padded = np.zeros((high * cell, wide * cell))
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    rows, columns = (np.minimum(cell, n - cell * np.arange(m)) for n, m in zip(pixels.shape, (high, wide)))
    return padded.reshape(high, cell, wide, cell).sum((1, 3)) / np.outer(rows, columns)


def preview(layout: Layout, size: int = 512) -> Image.Image:
    """The layout drawn: every region's outline and caption, its latent cells shaded by how far it fills them, and below a
    line each on its place and share of the picture. `size`: the picture's sides where the layout leaves them open."""
    if layout.width is None:
        layout = layout.sized(size, size)
    scale = max(1, round(640 / max(layout.width, layout.height)))
    wide, high = scale * layout.width, scale * layout.height
    shade, colours = np.full((high, wide, 3), 255.0), []
    for k, region in enumerate(layout.regions):
        colours.append(colour := COLOURS[k % len(COLOURS)])
        filled = (
            coverage(region.pixels, CELL).repeat(scale * CELL, 0).repeat(scale * CELL, 1)[..., None]
        )  # (H, W, 1)
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        shade += 0.3 * filled * (rgb - shade)
    union = np.any([r.pixels for r in layout.regions], axis=0) if layout.regions else np.zeros(1, bool)
    twice = np.sum([r.pixels for r in layout.regions], axis=0) > 1 if layout.regions else union
    lines = [("black", f"0  {layout.prompt!r}, the whole picture, {layout.width}x{layout.height}")]
    for k, (region, colour) in enumerate(zip(layout.regions, colours), 1):
        x0, y0, x1, y1 = region.bounds
        kind = "box" if region.mask is None else "mask within"
        what = f"{k}  {region.prompt!r}, {kind} {x0},{y0} to {x1},{y1}, {100 * region.pixels.mean():.1f} %"
        what += f", weight {region.weight:g}" * (
            region.weight != 1
        ) + f", not {region.negative_prompt!r}" * bool(region.negative_prompt)
        lines.append((colour, what))
    lines.append(
        (
            "black",
            f"outside every region {100 * (1 - union.mean()):.1f} %, in more than one {100 * twice.mean():.1f} %",
        )
    )
    lines += [("black", note) for note in layout.notes]

    text = [
        (colour, line.encode("latin-1", "replace").decode("latin-1")) for colour, line in lines
    ]  # what any font has
    out = Image.new("RGB", (max(wide, 480), high + 16 * len(text) + 8), "white")
    out.paste(Image.fromarray(shade.round().astype(np.uint8)))
    pen = ImageDraw.Draw(out)
    pen.rectangle((0, 0, wide - 1, high - 1), outline="black")
    for k, (region, colour) in enumerate(zip(layout.regions, colours), 1):
        edge = np.pad(region.pixels, 1).repeat(scale, 0).repeat(scale, 1)
        inner = edge.copy()
        for axis in (0, 1):
            for step in (-2, 2):
                inner &= np.roll(edge, step, axis)
        rim = (edge & ~inner)[scale:-scale, scale:-scale]
        out.paste(colour, (0, 0), Image.fromarray(rim))
        x0, y0, *_ = region.bounds
        caption = f"{k} {region.prompt}".encode("latin-1", "replace").decode("latin-1")
        pen.text((scale * x0 + 5, scale * y0 + 4), caption, fill=colour)
    for i, (colour, line) in enumerate(text):
        pen.text((4, high + 4 + 16 * i), line, fill=colour)
    return out


# --- regions' pixels -------------------------------------------------------------------------------------------------


def _in_fractions(box) -> bool:
    return max(box) <= 1


def _hint(box) -> str:
    """What to add where a box fails that may have been meant in fractions."""
    if box is None or _in_fractions(box) or all(v == int(v) for v in box):
        return ""
    return "; a number above 1 makes all four of a box pixels: fractions are 0 to 1"


def _check_box(box, width: int | None, height: int | None, where: str) -> None:
    """What is wrong with a box in fractions can be seen before the picture's size is known, and most with one in pixels."""
    wide, high, inside = (
        width or math.inf,
        height or math.inf,
        f"a picture of {width}x{height} pixels" if width else "the picture",
    )
    if _in_fractions(box):
        wide, high, inside = 1, 1, "fractions 0 to 1"
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= wide and 0 <= y0 < y1 <= high):
        raise ValueError(
            f"{where}the box {list(box)} must have 0 <= x0 < x1 and 0 <= y0 < y1 and lie inside {inside}{_hint(box)}"
        )


def _box_pixels(box, width: int, height: int, where: str) -> np.ndarray:
    _check_box(box, width, height, where)
    x0, y0, x1, y1 = box
    if _in_fractions(box):
        x0, x1, y0, y1 = x0 * width, x1 * width, y0 * height, y1 * height
    x0, y0, x1, y1 = (math.floor(v + 0.5) for v in (x0, y0, x1, y1))
    pixels = np.zeros((height, width), bool)
    pixels[y0:y1, x0:x1] = True
    return pixels


def _check_filled(pixels: np.ndarray, box, where: str) -> None:
    if not pixels.any():
        why = (
            "its mask needs white pixels inside"
            if box is None
            else f"its box {list(box)} must be at least a pixel wide and high"
        )
        raise ValueError(f"{where} is empty: {why}{_hint(box)}")
    if coverage(pixels, CELL).max() < 0.5:
        x0, y0, x1, y1 = Region("", pixels=pixels).bounds
        size = f"{x1 - x0}x{y1 - y0} pixels, {int(pixels.sum())} in all,"
        raise ValueError(
            f"{where} is too small: its {size} fill no latent cell of 8x8 pixels by half; 32 pixels within one cell "
            f"are the least, and a box of 11x11 is enough wherever it lies{_hint(box)}"
        )


def _read_mask(path: Path, where: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L")) >= 128
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}there is no mask file {path}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"{where}the mask {path} is not a picture that can be read") from None


# --- layout.json -----------------------------------------------------------------------------------------------------


def _read_json(path: Path):
    def once(pairs):
        keys = [key for key, _ in pairs]
        if again := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"{path}: the key {again!r} is there twice in one object")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no layout {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path} has brackets within brackets, too many") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None


def _from_dict(given, folder: Path, where: str) -> Layout:
    _check_keys(given, TOP_KEYS, where)
    size = [_value(given, key, int, None, where) for key in ("width", "height")]
    if (size[0] is None) != (size[1] is None):
        raise ValueError(f"{where}give width and height, or neither")
    negative = _value(given, "negative_prompt", str, "", where)
    regions = _value(given, "regions", list, [], where)
    layout = Layout(
        _required(given, "prompt", where),
        tuple(_region(r, negative, folder, f"{where}region {k}: ") for k, r in enumerate(regions, 1)),
        negative,
        source=where,
    )
    return layout if size[0] is None else layout.sized(*size)


def _region(given, negative: str, folder: Path, where: str) -> Region:
    _check_keys(given, REGION_KEYS, where)
    if ("box" in given) == ("mask" in given):
        raise ValueError(f"{where}give a box [x0, y0, x1, y1] or a mask file, one of the two")
    box, mask = _value(given, "box", list, None, where), _value(given, "mask", str, None, where)
    if box is not None and not (len(box) == 4 and all(_is(v, float) for v in box)):
        raise ValueError(f"{where}a box is four numbers [x0, y0, x1, y1], not {json.dumps(box)}")
    if box is not None:
        _check_box(box, None, None, where)
    weight, scale = (
        float(_value(given, "weight", float, 1.0, where)),
        _value(given, "control_scale", float, None, where),
    )
    if weight <= 0:
        raise ValueError(f"{where}the weight must be more than 0, not {weight:g}")
    lora = _value(given, "lora", list, [], where)
    if not all(isinstance(name, str) and name for name in lora):
        raise ValueError(f"{where}lora is a list of files, each FILE or FILE:SCALE, not {json.dumps(lora)}")
    lora = tuple((folder / path, by) for path, by in map(split_scale, lora))
    control = _value(given, "control_image", str, None, where)
    if control is not None and not (folder / control).is_file():
        raise FileNotFoundError(f"{where}there is no control image {folder / control}")
    mask = None if mask is None else folder / mask
    return Region(
        _required(given, "prompt", where),
        None if box is None else tuple(box),
        mask,
        _value(given, "negative_prompt", str, negative, where),
        weight,
        lora,
        None if control is None else folder / control,
        None if scale is None else float(scale),
        None if mask is None else _read_mask(mask, where),
    )


def split_scale(text: str) -> tuple[Path, float]:
    """ "style.safetensors:0.8" -> the file and 0.8 (1 where none is said)."""
    m = re.fullmatch(r"(.+?)(?::([-+]?[\d.]+(?:e[-+]?\d+)?))?", text)
    try:
        return Path(m[1]), 1.0 if m[2] is None else float(m[2])
    except (TypeError, ValueError):
        raise ValueError(
            f"a LoRA is given as FILE or FILE:SCALE, such as style.safetensors:0.8, not {text!r}"
        ) from None


def _check_keys(given, known: tuple[str, ...], where: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(
            f"{where}this must be an object with the keys {', '.join(known)}, not {json.dumps(given)[:40]}"
        )
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{where}unknown key {unknown[0]!r}; known are {', '.join(known)}")


def _is(value, kind: type) -> bool:
    if kind is float:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        )  # not nan, nor past a float
    return isinstance(value, kind) and not isinstance(value, bool)


def _value(given: dict, key: str, kind: type, default, where: str):
    if key not in given:
        return default
    if not _is(given[key], kind):
        wanted = {int: "a whole number", float: "a number", str: "text", list: "a list"}[kind]
        raise ValueError(f"{where}{key!r} must be {wanted}, not {json.dumps(given[key])[:40]}")
    return given[key]


def _required(given: dict, key: str, where: str) -> str:
    if key not in given:
        raise ValueError(f"{where}there is no {key!r}")
    return _value(given, key, str, None, where)


# --- the published folder --------------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> Layout:
    """PALL/ and P000/, P001/ ...: the picture is as large as the first region's mask. Gaps in the numbers do no harm."""
    whole = folder / "PALL"
    if not whole.is_dir():
        raise FileNotFoundError(
            f"{folder} has no folder PALL for the whole picture: give a layout.json, or a folder with PALL, P000 ..."
        )
    parts = sorted(
        (p for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"P\d+", p.name)),
        key=lambda p: int(p.name[1:]),
    )
    regions = []
    for part in parts:
        mask = _first(part, MASKS)
        if mask is None:
            raise FileNotFoundError(f"there is no mask file {part / MASKS[0]} (nor {MASKS[1]})")
        regions.append(
            Region(
                _caption(part), mask=mask, control_image=_first(part, CONTROLS), drawn=_read_mask(mask, "")
            )
        )
    layout = Layout(
        _caption(whole), tuple(regions), control_image=_first(whole, CONTROLS), source=f"{folder}: "
    )
    if not regions:
        return layout
    height, width = regions[0].drawn.shape
    return layout.sized(width, height)


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _caption(folder: Path) -> str:
    path = _first(folder, CAPTIONS)
    if path is None:
        raise FileNotFoundError(f"there is no caption file {folder / CAPTIONS[0]} (nor {CAPTIONS[1]})")
    caption = _read_json(path)
    if not isinstance(caption, str):
        raise ValueError(f"{path} must hold one JSON string, the caption, not {json.dumps(caption)[:40]}")
    return caption


SizedLayout = Layout


def layout_json(layout: Layout) -> dict:
    """What a layout.json with this in it would hold; file names are absolute."""
    regions = []
    for r in layout.regions:
        place = {"box": list(r.box)} if r.box is not None else {"mask": str(r.mask.resolve())}
        more = {"negative_prompt": r.negative_prompt, "weight": r.weight}
        more["control_scale"] = 1.0 if r.control_scale is None else r.control_scale
        more["lora"] = [f"{path.resolve()}:{scale}" for path, scale in r.lora]
        if r.control_image is not None:
            more["control_image"] = str(r.control_image.resolve())
        regions.append({"prompt": r.prompt, **place, **more})
    return {
        "prompt": layout.prompt,
        "negative_prompt": layout.negative_prompt,
        "width": layout.width,
        "height": layout.height,
        "regions": regions,
    }


Layout.to_json = lambda self: layout_json(self)
