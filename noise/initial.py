"""Seeds to unit noise, and noise in files. Always drawn on the CPU in float32, one generator per image: an image's noise
depends neither on the device, nor on the precision, nor on the other images of its batch."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from minsd.samplers.random import generators


def noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Unit normal noise (B, *shape), float32 on the CPU; `shape` is that of one image's latents, (4, h, w)."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators(seeds)])


def read_noise(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Initial noise (B,4,h,w), float32, from a safetensors file; `shape` is that of one picture's latents, (4, h, w).
    FileNotFoundError where there is no such file, ValueError where it holds anything else."""
    from safetensors.torch import load_file

    from minsd.weights.safetensors_file import read_header

    if not path.is_file():
        raise FileNotFoundError(f"there is no noise file {path}")
    read_header(path)
    tensors = load_file(path)
    if list(tensors) != ["noise"]:
        raise ValueError(
            f"{path} holds {', '.join(sorted(tensors)[:3])}; a noise file holds one tensor called noise"
        )
    noise = tensors["noise"].float()
    if noise.ndim != 4 or tuple(noise.shape[1:]) != shape:
        wanted = f"(pictures, {', '.join(map(str, shape))})"
        raise ValueError(
            f"{path} holds noise of shape {tuple(noise.shape)}; this model and size need {wanted}"
        )
    if not noise.isfinite().all():
        raise ValueError(f"{path} holds noise that is not finite")
    return noise


def save_noise(noise: torch.Tensor, path: Path) -> None:
    """The file that `read_noise` reads, of noise (B,4,h,w): whole or not at all, in place of one that is there."""
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    save_file({"noise": noise.float().contiguous()}, temporary)
    os.replace(temporary, path)
