"""A collage of noise: each region's part of the candidate in which the network sees the region's caption there.

After Mao, Wang & Aizawa 2023 (arXiv 2305.03382 and 2312.08872), who move and collect blocks of noise: where things appear is
in the initial noise already, and the attention maps of the first timestep tell it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minsd.noise import losses
from minsd.noise.collage import direct_cells, stacked
from minsd.noise.initial import noise as draw_noise
from minsd.noise.layout import CELL, Layout, coverage


@dataclass
class Arrangement:
    """Noise put together for a layout, and from what."""

    noise: Tensor  # (1, 4, h, w) float32 on the CPU
    chosen: list[
        int
    ]  # which of the candidates, seeds or numbers from 0, the picture's and each region's part come from
    shares: list[
        float
    ]  # how much of the attention to a region's subjects fell into it, in the candidate taken, 0 to 1
    scores: list[float]  # of each candidate as a whole: the product of all regions' shares, 0 to 1
    rows: int  # UNet rows, which stop early


def caption_subjects(sd, layout: Layout) -> list[list]:
    """For each region where its caption names subjects, as `sd.text.positions` has it. ValueError for a caption with none."""
    found = []
    for k, region in enumerate(layout.regions, 1):
        try:
            found.append(
                [sd.text.positions(region.prompt, word) for word in losses.automatic_subjects(region.prompt)]
            )
        except ValueError as error:
            raise ValueError(f"region {k}: {error}") from None
    return found


@torch.no_grad()
def arrange(
    sd,
    layout: Layout,
    candidates: Sequence[int] | Tensor,
    *,
    steps: int | None = None,
    sampler: str | None = None,
) -> Arrangement:
    """Unit noise for a layout: cut from candidates, seeds or noises (K,4,h,w), those parts where its regions would appear anyway.

    At the first timestep of `steps` of a sampler the network is asked for each region's caption alone, on every candidate. The
    region takes its latent cells from the one whose attention to the caption's subjects (`losses.automatic_subjects`) falls into
    the region most; the rest of the picture comes from the one best for all of them, the greatest product of these shares.
    Where regions overlap the heaviest is on top, of equals the smallest. ValueError, before any network runs, for a layout
    without regions, captions without subjects, no candidates, or shapes that do not fit.
    """
    if layout.width is None:
        layout = layout.sized(sd.config.size, sd.config.size)
    if not layout.regions:
        raise ValueError("a layout without regions has nothing to arrange noise for: give it some")
    size = layout.height // CELL, layout.width // CELL
    given = candidates
    if not isinstance(given, Tensor):
        given = draw_noise(list(candidates), (4, *size)) if len(candidates) else torch.empty(0)
    if given.ndim != 4 or tuple(given.shape[2:]) != size or not len(given):
        raise ValueError(
            f"candidates must be seeds or noises (K,4,{size[0]},{size[1]}), at least one, not of shape {tuple(given.shape)}"
        )
    t = losses.listed_timesteps(sd, steps, sampler)[0]
    selects, shares = [losses.selector([places]) for places in caption_subjects(sd, layout)], []
    for region, select in zip(layout.regions, selects):
        context, inside = sd.encode_prompt(region.prompt), []
        for part in given.split(sd.batch_size(layout.height, layout.width)):
            wide = [y.expand(len(part), -1, -1) for y in (context, select.to(sd.device))]
            maps = losses.look(sd.unet, part.to(sd.device), t, *wide).maps  # (b, S, rows, columns)
            fill = coverage(region.pixels, CELL << sd.unet.grids(size).index(tuple(maps.shape[-2:])))
            inside.append(
                ((maps * torch.from_numpy(fill).to(maps)).sum((-2, -1)) / maps.sum((-2, -1))).mean(1)
            )  # (b,)
        shares.append(torch.cat(inside).cpu())
    shares = torch.stack(shares)  # (N, K)
    scores = shares.prod(0)  # (K,)
    bests = [int(scores.argmax()), *shares.argmax(1).tolist()]
    noise = given[bests[0]][None].clone()
    for k in stacked(layout.regions):
        cells = torch.from_numpy(direct_cells(layout.regions[k].pixels, CELL))
        noise[0, :, cells] = given[bests[k + 1]][:, cells]
    chosen = bests if isinstance(candidates, Tensor) else [list(candidates)[k] for k in bests]
    return Arrangement(
        noise, chosen, shares.amax(1).tolist(), scores.tolist(), len(given) * len(layout.regions)
    )
