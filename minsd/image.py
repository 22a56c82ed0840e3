"""Pictures in and out: PIL <-> tensors, PNG files with their settings inside, contact sheets."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from minsd.config import SAMPLER_NAMES

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def to_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures of one size -> (B,3,H,W) float32 in -1..1."""
    if len({p.size for p in pictures}) != 1:
        raise ValueError(
            f"pictures of one batch must have one size, not {sorted({p.size for p in pictures})}"
        )
    pixels = np.stack([np.asarray(p.convert("RGB")) for p in pictures])  # (B, H, W, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def from_tensor(x: torch.Tensor) -> list[Image.Image]:
    """(B,3,H,W) about -1..1 -> pictures; values beyond are clipped."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture in the proportions of width x height, scaled to them (pixels)."""
    return ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.LANCZOS)


def parameters(settings: dict) -> str:
    """Settings in the text form that other Stable Diffusion tools write and read."""
    pairs = {
        "Steps": settings["steps"],
        "Sampler": SAMPLER_NAMES[settings["sampler"]] + " Karras" * bool(settings.get("karras")),
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": settings.get("model_hash"),
        "Model": Path(settings["model"]).name,
    }
    line = ", ".join(f"{key}: {value}" for key, value in pairs.items() if value is not None)
    negative = f"Negative prompt: {settings['negative_prompt']}\n" if settings["negative_prompt"] else ""
    return f"{settings['prompt']}\n{negative}{line}"


@contextlib.contextmanager
def locked(folder: Path):
    """The folder is this process's alone while the block runs, among minsd's processes and where the system can lock.
    Yields the lock's own file, open to read and write: it holds the name of the last picture placed."""
    with os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "r+") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a network file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file  # closing it ends the lock


@contextlib.contextmanager
def _temporary(picture: Image.Image, folder: Path, info=None):
    """A path beside its place with the picture in it, to be renamed within the block: whole or not at all."""
    handle, path = tempfile.mkstemp(suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG", pnginfo=info)
        os.chmod(path, 0o644)  # mkstemp makes it its owner's alone
        yield path
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        raise


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(picture, path.parent) as temporary:
        os.replace(temporary, path)


def save_numbered(picture: Image.Image, folder: Path, settings: dict) -> Path:
    """Write `NNNNN-SEED.png` with its settings; NNNNN goes on from the highest there. Whole or not at all.

    A folder may hold very many, so it is listed only where the lock's file does not name a picture that is still there."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("minsd", json.dumps(settings, ensure_ascii=False))
    info.add_itxt("parameters", parameters(settings))
    with _temporary(picture, folder, info) as temporary, locked(folder) as last:
        if not NUMBERED.match(name := last.read()) or not (folder / name).exists():
            name = max(filter(NUMBERED.match, os.listdir(folder)), key=number, default="-1-")
        path = folder / f"{number(name) + 1:05d}-{settings['seed']}.png"
        while path.exists():  # two processes that could not lock
            path = folder / f"{number(path.name) + 1:05d}-{settings['seed']}.png"
        (
            last.seek(0),
            last.write(path.name),
            last.truncate(),
            last.flush(),
        )  # killed now: it names what is not there
        os.replace(temporary, path)
    return path


NUMBERED = re.compile(r"\d+-\d+\.png$")


def number(name: str) -> int:
    """The NNNNN of a picture's file name."""
    return int(name.rpartition("-")[0])


def read_settings(path: Path) -> dict:
    """The settings inside a picture that minsd wrote. ValueError when there are none."""
    try:
        with Image.open(path) as picture:
            text = getattr(picture, "text", {})
            settings = json.loads(text["minsd"])
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except (OSError, SyntaxError):
        raise ValueError(f"{path} is not an image that can be read") from None
    except (KeyError, ValueError):
        raise ValueError(
            f"{path} carries no minsd settings: --like takes a PNG that minsd.generate wrote"
        ) from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} carries no minsd settings: --like takes a PNG that minsd.generate wrote")
    return settings


def contact_sheet(
    pictures: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None
) -> Image.Image:
    """Pictures of one size in rows, each with a line of caption below it."""
    w, h = pictures[0].size
    line = 14 if captions else 0
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (w + 4), rows * (h + line + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = (i % columns) * (w + 4) + 2, (i // columns) * (h + line + 4) + 2
        sheet.paste(picture, (x, y))
        if captions:
            draw.text((x, y + h + 1), captions[i], fill="black")
    return sheet
