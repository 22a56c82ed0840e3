"""Composes initial noise for a layout (noise/layout.py) from several candidate noises.

The initial noise largely decides where things appear, and the attention maps of the first timestep
predict where. So each region is filled with the noise of the candidate whose cells in this region
attend most to the region's caption. Follows Mao, Wang & Aizawa 2023 (arXiv 2305.03382 and
2312.08872), who move and collect blocks of noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minsd.config import CELL
from minsd.guidance import Model
from minsd.noise import losses
from minsd.noise.collage import direct_cells, stacked
from minsd.noise.initial import noise as draw_noise
from minsd.noise.layout import Layout, SizedLayout, SizedRegion, coverage, ensure_sized
from minsd.noise.look import Ask, Lift, Look


@dataclass
class Arrangement:
    """The result of `arrange`: the initial noise composed for a layout, the candidate noise from
    which each part of it was copied, and the candidates' scores."""

    noise: Tensor  # (1, 4, h, w) float32 on the CPU
    # The candidates of the background and then of each region: seeds, or indices from 0 into the
    # given noises.
    chosen: list[int]
    # For each region, in its candidate: the part of the attention to the region's subjects that
    # falls inside the region.
    fractions: list[float]
    scores: list[float]  # of each candidate as a whole: the product of all regions' fractions
    rows: int  # UNet evaluations; each ends after the last layer whose attention is recorded


def caption_subjects(sd: Model, layout: Layout) -> list[list[list[int]]]:
    """Finds the subjects of each region's caption: the words that `losses.automatic_subjects`
    returns. Returns one list per region. It holds, for each subject, the list of the subject's
    token positions in the caption. Raises ValueError for a caption without subjects, and for a
    subject that has no token positions of its own."""
    found = []
    for k, region in enumerate(layout.regions, 1):
        try:
            subjects = losses.automatic_subjects(region.prompt)
            found.append([sd.text.positions(region.prompt, subject) for subject in subjects])
        except ValueError as error:
            raise ValueError(f"region {k}: {error}") from None
    return found


@torch.no_grad()
def arrange(
    sd: Model,
    layout: Layout,
    candidates: Sequence[int] | Tensor,
    *,
    steps: int | None = None,
    sampler: str | None = None,
) -> Arrangement:
    """Composes the initial noise of one image for a layout, which gives regions of the image a
    caption each. `candidates` are seeds, or unit noises (K,4,h,w); each part of the new noise is
    copied from one of them.

    The UNet is evaluated on every candidate once per region, with the region's caption as the
    prompt, at the first timestep of a run of `steps` steps with `sampler` (None: the model's
    defaults). Each evaluation gives a fraction: how much of the attention to the caption's subjects
    (the words that `losses.automatic_subjects` returns) falls inside the region. Each region is
    filled from the candidate with the largest fraction, and the background from the candidate with
    the greatest product of the fractions of all regions. Where regions overlap, the region with the
    greatest weight is copied; of regions with equal weights, the smallest.

    Raises ValueError, before any network runs, for a layout without regions, a caption without
    subjects, no candidates, or shapes that do not fit.
    """
    layout = ensure_sized(layout, sd.config.size)
    if not layout.regions:
        raise ValueError("a layout without regions has nothing to arrange noise for: give it some")
    given = _noises(layout, candidates)
    fractions = attended(sd, layout, given, steps=steps, sampler=sampler)  # (N, K)
    scores = fractions.prod(0)  # (K,)
    background = int(scores.argmax())
    best = fractions.argmax(1).tolist()
    noise = given[background][None].clone()
    for k in stacked(layout.regions):
        cells = torch.from_numpy(direct_cells(layout.regions[k].pixels, CELL))
        noise[0, :, cells] = given[best[k]][:, cells]
    chosen = [background, *best]
    if not isinstance(candidates, Tensor):
        chosen = [candidates[k] for k in chosen]
    rows = len(given) * len(layout.regions)
    return Arrangement(noise, chosen, fractions.amax(1).tolist(), scores.tolist(), rows)


@torch.no_grad()
def attended(
    sd: Model, layout: SizedLayout, noise: Tensor, *, steps: int | None = None, sampler: str | None = None
) -> Tensor:
    """Measures how much of the attention falls inside the regions. `noise` holds K noises
    (K,4,h,w). Returns a fraction for each of N regions and each noise, (N,K): the part of the
    attention to the subjects of the region's caption that falls inside the region, averaged over
    the subjects.

    The UNet is evaluated on each noise with each caption, at the first timestep of a run of `steps`
    steps with `sampler` (None: the model's defaults). Raises ValueError, before any network runs,
    for a caption without subjects.
    """
    t = losses.listed_timesteps(sd, steps, sampler)[0]
    subjects = caption_subjects(sd, layout)
    parts = [
        _inside(sd, layout, region, places, noise, t) for region, places in zip(layout.regions, subjects)
    ]
    return torch.stack(parts)


def _noises(layout: SizedLayout, candidates: Sequence[int] | Tensor) -> Tensor:
    """Returns the noises (K,4,h,w) of the candidates, which are seeds or the noises themselves.
    Raises ValueError if there are no candidates, or if their noises do not have the layout's
    size."""
    shape = (4, layout.height // CELL, layout.width // CELL)
    given = candidates
    if not isinstance(given, Tensor):
        given = draw_noise(list(given), shape) if len(given) else torch.empty(0)
    if given.ndim != 4 or given.shape[2:] != shape[1:] or not len(given):
        raise ValueError(
            f"candidates must be seeds or noises (K,4,{shape[1]},{shape[2]}), at least one, "
            f"not of shape {tuple(given.shape)}"
        )
    return given


def _inside(
    sd: Model,
    layout: SizedLayout,
    region: SizedRegion,
    subjects: list[list[int]],
    given: Tensor,
    t: int | float,
) -> Tensor:
    """Evaluates the UNet on K noises `given` (K,4,h,w) at timestep `t`, with the caption of
    `region` as the prompt. Returns (K,): for each noise, the fraction of the attention to the
    caption's subjects that falls inside the region, averaged over the subjects. `subjects` holds
    the token positions of each subject. `layout` is the layout that the region belongs to."""

    def fraction(look: Look) -> Tensor:
        look.read("cross", "self")  # both kinds, so that rounding is as in earlier versions
        maps = look.maps  # (b, S, rows, columns)
        level = sd.unet.grids(tuple(given.shape[2:])).index(tuple(maps.shape[-2:]))
        fill = torch.from_numpy(coverage(region.pixels, CELL << level)).to(maps)
        return ((maps * fill).sum((-2, -1)) / maps.sum((-2, -1))).mean(1)  # (b,)

    lift = Lift(sd, [Ask(region.prompt, 0, subjects)], fraction)
    rows = torch.zeros(len(given), dtype=torch.long, device=sd.device)
    return lift.score(given.to(sd.device), rows, t)["loss"].cpu()
