"""Images in and out: PIL <-> tensors, PNG files with settings as metadata, contact sheets."""

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError

from minsd.adapters import split_scale
from minsd.config import SAMPLER_NAMES

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


SCALED = "minsd: values 0..255"  # in the info of an "F" image that `levels` made; resizing keeps it
# What Pillow may try: image formats that people have, none that runs a program (EPS) or holds
# other data.
FORMATS = "PNG JPEG MPO WEBP AVIF JPEG2000 TIFF BMP DIB GIF PPM TGA QOI ICO SGI".split()


def read(path: str | Path, on: str | None = None, what: str = "image") -> Image.Image:
    """Reads an image file of any common kind: upright, the first frame, without transparency.

    The image is in "RGB"; or in "F" (one channel, values 0..255) where its greyscale is finer than
    8 bits, as in depth maps. `on`: a colour, such as "white", to lay transparent images on; None
    drops the alpha channel, as diffusers does. `what` names the file in errors. Warns where there
    are more frames. FileNotFoundError or ValueError, in one line, for anything that cannot be
    read.
    """
    Image.init()
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as picture:
            frames = (
                getattr(picture, "n_frames", 1) if picture.format != "MPO" else 1
            )  # a phone's second image
            if frames > 1:
                warnings.warn(f"{path} has {frames} frames or pages: the first is used", stacklevel=2)
            upright = ImageOps.exif_transpose(picture)
            if on is not None and upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, on), upright)
            return levels(upright, picture.format)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {what} {path}") from None
    except IsADirectoryError:
        raise ValueError(f"the {what} {path} is a folder") from None
    except UnidentifiedImageError:
        raise ValueError(f"the {what} {path} is not an image that can be read") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"the {what} {path} is not an image that can be read: {error}") from None


def levels(picture: Image.Image, file_format: str | None = None) -> Image.Image:
    """A Pillow image in "RGB"; in "F", values 0..255, where its one channel is finer than 8 bits.

    White is 65535 for 16-bit images. Wider types state no white, and programs write 8- and 16-bit
    values into them, so these take the smallest range that holds their values: 0..1 (floating
    point alone), 0..255, 0..65535, 0..2^31 - 1 (integers alone). ValueError for values that fit
    none. `file_format`: Pillow's name of the format that the image was read from, where the image
    itself has lost it.
    """
    if picture.info.get(SCALED):
        return picture
    if not picture.mode.startswith(("I", "F")):
        return picture.convert("RGB")
    values = np.asarray(picture).astype(np.float64)
    white = 65535.0
    if picture.mode in ("I", "F"):
        low = values.min()
        high = values.max()
        ranges = (1.0, 255.0, 65535.0) if picture.mode == "F" else (255.0, 65535.0, 2.0**31 - 1)
        if (file_format or picture.format) in ("PNG", "PPM"):  # 16 bits by definition
            ranges = (65535.0,)
        if not (0 <= low and high <= ranges[-1]):  # also where they are not finite
            raise ValueError(f"its values run from {low:g} to {high:g}: scale them to 0..{ranges[0]:g}")
        white = next(top for top in ranges if high <= top)
    scaled = Image.fromarray((values * (255 / white)).astype(np.float32))
    scaled.info[SCALED] = True
    return scaled


def to_tensor(pictures: Sequence[Image.Image]) -> "Tensor":
    """Images of one size -> (B,3,H,W) float32 in -1..1. ValueError where sizes differ."""
    import torch

    if len({p.size for p in pictures}) != 1:
        raise ValueError(f"images of one batch must have one size, not {sorted({p.size for p in pictures})}")
    pixels = []
    for picture in map(levels, pictures):
        values = np.asarray(
            picture
        )  # (H, W, 3) of 8 bits, or (H, W) of floats that resizing may take too far
        pixels.append(values if values.ndim == 3 else values.clip(0, 255)[..., None].repeat(3, -1))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def from_tensor(x: "Tensor") -> list[Image.Image]:
    """(B,3,H,W) in about -1..1 -> images; values outside are clipped."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """An image cropped about its centre to the proportions of width x height, and scaled to them
    (pixels).
    """
    return ImageOps.fit(levels(picture), (width, height), Image.Resampling.LANCZOS)


def parameters(settings: dict[str, Any]) -> str:
    """Settings in AUTOMATIC1111's text form, which other Stable Diffusion tools read and write."""
    control = None
    if settings.get("control_image"):
        net = Path(settings["controlnet"]).stem
        control = f"Module: none, Model: {net}, Weight: {settings['control_scale']}"
    pairs = {
        "Steps": settings["steps"],
        "Sampler": SAMPLER_NAMES[settings["sampler"]] + " Karras" * bool(settings.get("karras")),
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Denoising strength": settings.get("strength"),
        "ControlNet 0": control,
        "Model hash": settings.get("model_hash"),
        "Model": Path(settings["model"]).name,  # last: simple readers take the last Model they see
    }
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value is not None)
    negative = f"Negative prompt: {settings['negative_prompt']}\n" if settings["negative_prompt"] else ""
    return f"{' '.join([settings['prompt'], *map(_lora_tag, settings.get('lora') or ())])}\n{negative}{line}"


def _quoted(value: Any) -> str:
    """A value as it stands in `parameters`: a JSON string where it holds what separates values."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def _lora_tag(reference: str) -> str:
    """FILE:SCALE as other tools write it in a prompt: <lora:NAME:SCALE>."""
    path, scale = split_scale(reference)
    return f"<lora:{path.stem}:{scale:g}>"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[TextIO]:
    """Holds an exclusive lock on the folder among minsd processes; a no-op where the system cannot
    lock.

    Yields the lock's file, open for reading and writing. It holds the name of the last image saved.
    """
    with os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "r+") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a network file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file  # closing it ends the lock


@contextlib.contextmanager
def _temporary(
    picture: Image.Image, folder: Path, info: PngImagePlugin.PngInfo | None = None
) -> Iterator[str]:
    """Writes a PNG to a temporary file. The block renames it; an error in the block deletes it."""
    handle, path = tempfile.mkstemp(suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG", pnginfo=info)
        os.chmod(path, 0o644)  # mkstemp gives access to its owner alone
        yield path
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        raise


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all. Its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(picture, path.parent) as temporary:
        os.replace(temporary, path)


def save_numbered(
    picture: Image.Image,
    folder: Path,
    settings: dict[str, Any],
    before: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Writes `NNNNN-SEED.png` with its settings, NNNNN one above the highest there. Whole or not at
    all.

    SEED is the seed asked for, which a selection may not have chosen. `before(path)` is called
    just before the image appears: files that belong to it are then never missing.

    The folder may be very full. It is listed only where the lock's file names no image that still
    exists.
    """
    info = PngImagePlugin.PngInfo()
    info.add_itxt("minsd", json.dumps(settings, ensure_ascii=False))
    info.add_itxt("parameters", parameters(settings))
    with _temporary(picture, folder, info) as temporary, locked(folder) as last:
        name = last.read()
        if not NUMBERED.match(name) or not (folder / name).exists():
            name = max(filter(NUMBERED.match, os.listdir(folder)), key=number, default="-1-")
        seed = settings.get("asked_seed", settings["seed"])
        path = folder / f"{number(name) + 1:05d}-{seed}.png"
        while path.exists():  # where two processes could not lock
            path = folder / f"{number(path.name) + 1:05d}-{seed}.png"
        # A kill after this leaves a lock file that names a missing image: the next run lists the
        # folder.
        last.seek(0)
        last.write(path.name)
        last.truncate()
        last.flush()
        before(path)
        os.replace(temporary, path)
    return path


NUMBERED = re.compile(r"\d+-\d+\.png$")


def number(name: str) -> int:
    """The NNNNN of an image's file name."""
    return int(name.rpartition("-")[0])


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of an image that minsd wrote, from its metadata. ValueError where there are
    none.
    """
    read(path)
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            settings = json.loads(getattr(picture, "text", {})["minsd"])
    except (UnidentifiedImageError, KeyError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} carries no minsd settings: --like takes a PNG that minsd.generate wrote")
    return settings


def contact_sheet(
    pictures: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None
) -> Image.Image:
    """Images of one size in rows, with a line of caption below each."""
    w, h = pictures[0].size
    line = 14 if captions else 0
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (w + 4), rows * (h + line + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x = (i % columns) * (w + 4) + 2
        y = (i // columns) * (h + line + 4) + 2
        sheet.paste(picture, (x, y))
        if captions:
            draw.text((x, y + h + 1), captions[i], fill="black")
    return sheet
