"""Seeds to unit noise. Always drawn on the CPU in float32, one generator per image: an image's noise depends neither
on the device, nor on the precision, nor on the other images of its batch."""

from collections.abc import Sequence

import torch


def noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Unit normal noise (B, *shape), float32 on the CPU; `shape` is that of one image's latents, (4, h, w)."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators(seeds)])


def generators(seeds: Sequence[int], skip: Sequence[int] | None = None) -> list[torch.Generator]:
    """One CPU generator per seed. With `skip`, each has already drawn noise of that shape, as `noise` does: what an
    image draws later goes on from there and repeats nothing."""
    out = []
    for seed in seeds:
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"a seed must be a whole number from 0 to 2^63 - 1, not {seed!r}")
        g = torch.Generator().manual_seed(seed)
        if skip is not None:
            torch.randn(tuple(skip), generator=g)
        out.append(g)
    return out


def draw(generator: Sequence[torch.Generator] | None, like: torch.Tensor) -> torch.Tensor:
    """Fresh unit noise of the shape, device and dtype of `like` (B,...), image b's from generator b."""
    if not isinstance(generator, Sequence) or len(generator) != len(like):
        have = len(generator) if isinstance(generator, Sequence) else "none" if generator is None else "a single one"
        raise ValueError(f"this sampler draws noise: give one generator per image, {len(like)}, not {have}")
    drawn = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generator])
    return drawn.to(like.device, like.dtype)
