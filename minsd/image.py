"""Reads and writes images: PIL <-> tensors, PNG files with settings as metadata, contact sheets."""

import contextlib
import io
import json
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError

from minsd import files
from minsd.adapters import split_scale
from minsd.config import SAMPLER_NAMES

if TYPE_CHECKING:
    from torch import Tensor

SCALED = "minsd: values 0..255"  # key in the info of an "F" image from `levels`; resizing keeps it
# The formats that Pillow may try. Pillow decides by content, not by suffix, and some of its other
# formats run a program (EPS starts Ghostscript).
FORMATS = "PNG JPEG MPO WEBP AVIF JPEG2000 TIFF BMP DIB GIF PPM TGA QOI ICO SGI".split()


def read(path: str | Path, on: str | None = None, what: str = "image") -> Image.Image:
    """Reads an image file of any common kind. Returns an upright image without transparency. If the
    file has several frames, returns the first one and warns.

    The image has mode "RGB", or mode "F" (one channel, values 0 to 255) if the file is greyscale
    with more than 8 bits, as depth maps are. Transparent images are laid on a background of the
    colour `on`, such as "white". If `on` is None, the alpha channel is dropped instead, as in
    diffusers.

    Raises FileNotFoundError if the file is missing, and ValueError if it cannot be read. The error
    message is one line, and calls the file `what`, such as "control image".
    """
    Image.init()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise ValueError("it is a pipe or a device")  # reading could block for ever
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as picture:
            # The second image of a phone's MPO file does not count as a frame.
            frames = getattr(picture, "n_frames", 1) if picture.format != "MPO" else 1
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
    """Converts a Pillow image to mode "RGB". An image with one channel of more than 8 bits becomes
    mode "F" instead: one channel of floats, scaled so that black is 0 and white 255.

    In a 16-bit image, white is 65535. Other types (32-bit integers, floats) do not define white.
    There it is the end of the first range that holds all values of the image: 0 to 1 (floats only),
    0 to 255, 0 to 65535, 0 to 2^31 - 1 (integers only). Raises ValueError if no range holds them.

    `file_format` is Pillow's name of the file format that the image was read from. Give it if
    `picture.format` is no longer set.
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
    """Converts images of the same size to a tensor (B,3,H,W), float32, with values from -1 to 1.
    Raises ValueError if their sizes differ."""
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
    """Converts a tensor (B,3,H,W) with values from -1 to 1 to B images. Values beyond this range
    are clipped."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scales an image to `width` x `height` pixels. An image of other proportions is cropped first,
    by the same amount on opposite sides."""
    return ImageOps.fit(levels(picture), (width, height), Image.Resampling.LANCZOS)


def parameters(settings: dict[str, Any]) -> str:
    """Returns the settings of an image as text in the form of AUTOMATIC1111's web UI, which other
    Stable Diffusion programs read. `settings` is the dict that minsd writes into the image's
    metadata."""
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
        "Clip skip": settings.get("clip_skip"),
        "Denoising strength": settings.get("strength"),
        "ControlNet 0": control,
        "Model hash": settings.get("model_hash"),
        "Model": Path(settings["model"]).name,  # last: simple readers take the last Model they see
    }
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value is not None)
    negative = f"Negative prompt: {settings['negative_prompt']}\n" if settings["negative_prompt"] else ""
    return f"{' '.join([settings['prompt'], *map(_lora_tag, settings.get('lora') or ())])}\n{negative}{line}"


def _quoted(value: Any) -> str:
    """Returns `value` as text for the line of settings in the form of AUTOMATIC1111's web UI. A
    text with a comma, a colon, a quotation mark or a line break becomes a JSON string; any other
    stays as it is."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def _lora_tag(reference: str) -> str:
    """Converts `reference`, the text FILE:SCALE for a LoRA, to <lora:NAME:SCALE>, the form that
    other programs write in prompts."""
    path, scale = split_scale(reference)
    return f"<lora:{path.stem}:{scale:g}>"


def save(picture: Image.Image, path: Path) -> None:
    """Writes an image to the PNG file `path`. Creates the file's folder if it is missing. If
    writing is interrupted, no incomplete file is left at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.temporary(path.parent) as file:
        picture.save(file, format="PNG")
        files.put(file, path)


def save_numbered(
    picture: Image.Image,
    folder: Path,
    settings: dict[str, Any],
    before: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Writes an image to a PNG file in `folder`, with `settings` as metadata. If writing is
    interrupted, no incomplete file is left. Returns the file's path.

    The file is called NNNNN-SEED.png. NNNNN is one above the highest number in the folder. SEED is
    the seed that the user asked for, even if minsd has chosen the noise of another seed instead.

    `before(path)` is called just before the file appears under its name. Use it to save other files
    that belong to the image, so that the image is never there without them.
    """
    with written(picture, folder, settings) as file:
        return place(file, folder, settings, before)


@contextlib.contextmanager
def written(picture: Image.Image, folder: Path, settings: dict[str, Any]) -> Iterator[BinaryIO]:
    """Writes an image, with `settings` as metadata, to a temporary PNG file in `folder`. Yields the
    open file. At the end of the `with` block the file is deleted, unless the function `place` has
    given it its final name."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, files.dumps(settings))
    info.add_itxt("parameters", files.encodable(parameters(settings)))
    with files.temporary(folder) as file:
        picture.save(file, format="PNG", pnginfo=info)
        yield file


def place(
    file: BinaryIO,
    folder: Path,
    settings: dict[str, Any],
    before: Callable[[Path], None] = lambda path: None,
    synced: bool = False,
) -> Path:
    """Gives a temporary PNG file (from `written`) its final name in `folder`, and returns its path.
    The name is NNNNN-SEED.png: NNNNN is one above the highest number in the folder, and SEED is the
    seed that the user asked for, according to `settings`. `before(path)` is called just before the
    file gets this name. Set `synced` if the file has been synced to the disk already.

    The highest number is read from the folder's lock file, which contains the name of the last
    image, because listing a folder of millions of images is slow. The folder is listed only if the
    last image is unknown or missing.
    """
    with files.locked(folder) as last:
        name = "" if last is None else last.read(300).decode("ascii", "replace")
        if not COUNTED.fullmatch(name) or not (folder / name).exists():
            name = max(filter(COUNTED.fullmatch, os.listdir(folder)), key=number, default="-1-")
        seed = settings.get("asked_seed", settings["seed"])
        free = number(name)
        while True:
            free += 1
            path = folder / f"{free:05d}-{seed}.png"
            if os.path.lexists(path):  # without locks, two processes may save at the same time
                continue
            if last is not None:
                # After a kill here the lock file names a missing image, and the next run lists
                # the folder.
                last.seek(0)
                last.write(path.name.encode())
                last.truncate()
                last.flush()
            before(path)
            with contextlib.suppress(FileExistsError):
                files.put(file, path, replace=False, synced=synced)
                return path


CHUNK = "minsd"  # the keyword of the PNG text chunk that holds an image's settings
# File names of images. minsd writes no name with more digits.
NUMBERED = re.compile(r"\d{1,15}-\d{1,19}\.png", re.ASCII)
# Names from which the numbering continues. They have fewer digits, so new names match NUMBERED.
COUNTED = re.compile(r"\d{1,12}-\d{1,19}\.png", re.ASCII)


def number(name: str) -> int:
    """Returns the number NNNNN in an image's file name NNNNN-SEED.png."""
    return int(name.rpartition("-")[0])


# --- settings inside images -------------------------------------------------------------------------------


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings that minsd has written into an image's metadata. Also decodes the whole
    image, to find damage. Raises FileNotFoundError if there is no file, and ValueError if the file
    cannot be read or has no settings."""
    read(path)
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            text = getattr(picture, "text", {})[CHUNK]
    except (OSError, KeyError, ValueError):
        raise ValueError(
            f"{path} carries no minsd settings: --like takes a PNG that minsd.generate wrote"
        ) from None
    return _parsed(text, path)


def verified(path: Path, whole: bool = False) -> dict[str, Any]:
    """Checks that a file is a complete image by minsd, and returns the settings in its metadata.
    Raises ValueError or OSError if it is not.

    The check covers the PNG's signature, its chunks and their checksums, and the image's size,
    which must be that in the settings. In a file of more than 256 KiB, the checksums of image data
    are checked in the first and the last chunk only, because an interrupted write damages the end.
    The pixels are decoded if `whole` is True, or if the settings are compressed, which they are
    only if another program has saved the image again.
    """
    size, text = _scan(path)
    settings = read_settings(path) if whole or text is None else _parsed(text, path)
    if (settings.get("width"), settings.get("height")) != size:
        raise ValueError(f"{path} is an image of {size[0]}x{size[1]}, and its settings state another size")
    return settings


def _parsed(text: str | bytes, path: Path) -> dict[str, Any]:
    """Parses `text`, the settings in an image's metadata. Raises ValueError, naming the image
    `path`, if they are not a JSON object."""
    try:
        settings = files.parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} carries no minsd settings that can be read: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} carries no minsd settings: they are not a JSON object")
    return settings


SMALL = 2**18  # bytes; smaller PNGs are checked whole
LONGEST_TEXT = 2**26  # bytes of a chunk
MOST_CHUNKS = 100_000  # Pillow writes about 64 kB of image data per chunk


def _scan(path: Path) -> tuple[tuple[int, int], bytes | None]:
    """Checks that a file is a complete PNG, without decoding the pixels. Returns (size, text): the
    image's (width, height), and the text of minsd's settings in the metadata. `text` is None if the
    settings are compressed or missing. Raises ValueError if the file is not a complete PNG."""
    with open(path, "rb", opener=files.without_blocking) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        small = status.st_size <= SMALL
        try:
            return _walk(io.BytesIO(file.read()) if small else file, status.st_size)
        except (struct.error, ValueError) as error:
            raise ValueError(f"{path} is not a complete PNG: {error}") from None


def _walk(file: BinaryIO, size: int) -> tuple[tuple[int, int], bytes | None]:
    """Reads and checks the chunks of a PNG. `file` is open and has `size` bytes. Returns
    (dimensions, text): the image's (width, height), and the text of minsd's settings in the
    metadata. `text` is None if the settings are compressed or missing. Raises struct.error or
    ValueError if the file is not a complete PNG."""
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        raise ValueError("it lacks a PNG's signature")
    dimensions = None
    text = None
    data = []  # offsets of the chunks of image data
    for _ in range(MOST_CHUNKS):
        place = file.tell()
        length, kind = struct.unpack(">I4s", file.read(8))
        if place + 12 + length > size:
            raise ValueError("it is cut off")
        if kind == b"IDAT":
            data.append(place)
        if kind == b"IDAT" and size > SMALL:
            file.seek(length + 4, os.SEEK_CUR)
            continue
        content = _content(file, place)
        if place == 8:
            dimensions = struct.unpack(">II", content[:8]) if kind == b"IHDR" else None
        if kind == b"iTXt" and content.startswith(CHUNK.encode() + b"\0\0\0"):  # not compressed
            text = content[len(CHUNK) + 3 :].split(b"\0", 2)[-1]
        if kind == b"IEND":
            break
    if dimensions is None or not data or kind != b"IEND":
        raise ValueError("it has no header, no image data or no end")
    if size > SMALL:
        for place in {data[0], data[-1]}:
            _content(file, place)
    return dimensions, text


def _content(file: BinaryIO, place: int) -> bytes:
    """Returns the content of one chunk of a PNG, the chunk that starts at the offset `place` of
    `file`. Raises ValueError if its checksum is wrong or it is too long."""
    file.seek(place)
    length, kind = struct.unpack(">I4s", file.read(8))
    if length > LONGEST_TEXT:
        raise ValueError("a chunk is too long")
    content = file.read(length)
    if struct.unpack(">I", file.read(4))[0] != zlib.crc32(content, zlib.crc32(kind)):
        raise ValueError("a checksum is wrong")
    return content


def contact_sheet(
    pictures: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None
) -> Image.Image:
    """Arranges images of the same size on one sheet, with `columns` images in each row. `captions`,
    if given, has one text for each image, which is written below the image in one line. Returns the
    sheet."""
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
