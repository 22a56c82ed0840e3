"""Random numbers for samplers and initial noise: one CPU generator per image.

The noise is drawn on the CPU, so that an image's noise depends neither on the device nor on the
precision nor on the other images of the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .schedule import Generators


def generators(seeds: Sequence[int], skip: Sequence[int] | None = None) -> list[torch.Generator]:
    """Makes one random generator on the CPU for each seed. Raises ValueError for a seed outside 0
    to 2^63 - 1.

    Use `skip` if initial noise was drawn from the same seeds elsewhere. `skip` is the shape (4,h,w)
    of that noise for one image. Each generator then skips as many random numbers, so that noise
    drawn from it does not repeat the initial noise.
    """
    out = []
    for seed in seeds:
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"a seed must be a whole number from 0 to 2^63 - 1, not {seed!r}")
        g = torch.Generator().manual_seed(seed)
        if skip is not None:
            torch.randn(tuple(skip), generator=g)
        out.append(g)
    return out


def randn_like(generator: Generators | None, like: Tensor) -> Tensor:
    """Draws normally distributed noise of unit variance, with the shape (B,...), the device and the
    dtype of `like`. `generator` is a list of B generators: the noise of image b is drawn from
    generator b. Raises ValueError if there is not one generator per image."""
    needed = f"this sampler draws noise: give one generator per image, {len(like)} in all"
    if generator is None:
        raise ValueError(f"{needed}; there is none")
    if not isinstance(generator, Sequence) or len(generator) != len(like):
        given = len(generator) if isinstance(generator, Sequence) else "a single generator"
        raise ValueError(f"{needed}, not {given}")
    drawn = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generator])
    return drawn.to(like.device, like.dtype)
