"""Seeds to unit noise, and noise files.

Noise is always drawn on the CPU in float32 with one generator per image. It depends neither on the
device, nor on the precision, nor on the other images of a batch.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minsd.samplers.random import generators


def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Unit normal noise (B, *shape), float32 on the CPU. `shape` is one image's latents, (4, h, w).

    ValueError for a seed outside 0 to 2^63 - 1.
    """
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators(seeds)])


def read_noise(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Initial noise (B,4,h,w), float32, from a safetensors file. `shape` is one image's, (4, h, w).

    FileNotFoundError if there is no such file; ValueError if it holds anything else.
    """
    from safetensors.torch import load_file

    from minsd.weights.safetensors_file import read_header

    if not path.is_file():
        raise FileNotFoundError(f"there is no noise file {path}")
    read_header(path)
    tensors = load_file(path)
    if list(tensors) != ["noise"]:
        held = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"{path} holds {held}; a noise file holds one tensor called noise")
    noise = tensors["noise"].float()
    if noise.ndim != 4 or tuple(noise.shape[1:]) != shape:
        wanted = f"(images, {', '.join(map(str, shape))})"
        raise ValueError(
            f"{path} holds noise of shape {tuple(noise.shape)}; this model and size need {wanted}"
        )
    if not noise.isfinite().all():
        raise ValueError(f"{path} holds noise that is not finite")
    return noise


def save_noise(noise: Tensor, path: Path) -> None:
    """Write noise (B,4,h,w) to a file that `read_noise` reads, replacing any file of that name.

    The file appears whole or not at all.
    """
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    save_file({"noise": noise.float().contiguous()}, temporary)
    os.replace(temporary, path)
