"""Makes unit normal noise from seeds, and reads and writes noise files.

Noise is always generated on the CPU in float32 with one generator per image. So it depends neither
on the device, nor on the precision, nor on the other images of a batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from minsd import files
from minsd.samplers.random import generators

SUFFIXES = (".safetensors", ".npy", ".pt", ".pth")
LARGEST_FILE = 2**32  # bytes: the noise of 64 images of 16384 pixels a side


def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Returns the unit normal noise of B seeds, (B, *shape), float32 on the CPU. `shape` is that of
    one image's latents, (4, h, w). Each seed has a random generator of its own.

    Raises ValueError for a seed outside 0 to 2^63 - 1.
    """
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators(seeds)])


def candidate_seeds(seed: int, count: int) -> list[int]:
    """Returns the `count` seeds among which the best noise for an image is chosen: the image's own
    `seed`, and count - 1 others derived from it.

    Derived seed number k is a 63-bit hash of `seed` and k. So images with different seeds share no
    candidate, and an image has the same candidates whatever other images are in the batch.
    """
    digests = (hashlib.sha256(f"{seed} {k}".encode()).digest() for k in range(1, count))
    return [seed, *(int.from_bytes(digest[:8], "big") >> 1 for digest in digests)]


def noise_files(path: Path) -> list[Path]:
    """Returns the noise files at a path: the file itself, or, for a folder, the noise files in it,
    sorted by name.

    Raises FileNotFoundError if the file does not exist or the folder holds no noise files.
    """
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no noise file {path}")
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise FileNotFoundError(f"the folder {path} holds no noise files ({', '.join(SUFFIXES)})")
    return found


def read_noise(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Reads initial noise (B,4,h,w), float32, from a noise file or from all noise files in a
    folder. `shape` is the shape (4, h, w) of one image's latents.

    A file holds the noise of one image, (4,h,w), or of several images, (images,4,h,w). In a
    .safetensors file this is a tensor called noise, in a .npy file the array, and in a .pt or .pth
    file a tensor; nothing else is unpickled. Raises FileNotFoundError if there is no such file, and
    ValueError if a file holds anything else.
    """
    return torch.cat([_checked(_read(file), file, shape) for file in noise_files(path)])


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata that `save_noise` wrote into a noise file, as a dict of name -> text;
    names are such as prompt, seed and init_noise. Returns an empty dict if the file has no metadata
    or is no .safetensors file."""
    from minsd.weights import safetensors_file

    return safetensors_file.read_metadata(path) if path.suffix == ".safetensors" else {}


def save_noise(noise: Tensor, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes noise (B,4,h,w) and its metadata to a .safetensors file that `read_noise` reads,
    replacing any file of that name.

    The file is written under a temporary name and then moved, so that no other program finds it
    incomplete. Its folder is created if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({"noise": noise.float().contiguous()}, dict(metadata) if metadata else None)
    with files.temporary(path.parent) as file:
        file.write(content)
        files.put(file, path)


def _read(path: Path) -> Tensor:
    """Reads the tensor of a noise file. Raises ValueError if the file is damaged, holds no noise,
    or is too large."""
    from minsd.weights.safetensors_file import read_header

    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} is larger than any noise: {path.stat().st_size / 2**30:.1f} GB")
    if path.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except Exception as error:  # NumPy's parser raises errors of many types
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is not a NumPy file of numbers: {reason}") from None
    if path.suffix in (".pt", ".pth"):
        return _read_pt(path)
    read_header(path)
    tensors = load_file(path)
    if list(tensors) != ["noise"]:
        held = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"{path} holds {held}; a noise file holds one tensor called noise")
    return tensors["noise"]


def _read_pt(path: Path) -> Tensor:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch and the unpickler raise errors of many types
        raise ValueError(
            f"{path} is not a PyTorch file that holds a tensor alone: save the noise by itself"
        ) from None
    if isinstance(held, dict) and len(held) == 1:
        (held,) = held.values()
    if not isinstance(held, Tensor):
        raise ValueError(f"{path} holds a {type(held).__name__}; a noise file holds one tensor")
    return held


def _checked(noise: Tensor, path: Path, shape: tuple[int, ...]) -> Tensor:
    """Returns `noise`, which is (4,h,w) or (B,4,h,w), as (B,4,h,w) float32. Raises ValueError,
    naming the file `path`, if the noise of an image is not of `shape` (4,h,w) or holds numbers that
    are not finite."""
    noise = noise[None] if noise.ndim == 3 else noise
    if noise.ndim != 4 or tuple(noise.shape[1:]) != shape or not len(noise):
        wanted = f"(images, {', '.join(map(str, shape))})"
        raise ValueError(
            f"{path} holds noise of shape {tuple(noise.shape)}; this model and size need {wanted}"
        )
    if noise.is_complex() or not noise.isfinite().all():
        raise ValueError(f"{path} holds noise that is not finite")
    return noise.float()
