"""InitNO (Guo et al., CVPR 2024, arXiv 2404.04650): its losses before and while denoising.

    initial noise     L = cross + conflict + background, the conflict only while cross <= 0.5
                      (variant "paper": L = cross + conflict)
    while denoising   L = cross in each update,
                      L = cross + conflict + (background + alignment) / 10 in repeated ones
    score of a seed   L = cross + conflict

with the terms of noise/losses.py, alignment to the running mean of the maps, 0.9 mean + 0.1 M. Steps
10 and 20 repeat until both are within limits. noise/initno.py optimises the noise with it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise import losses
from minsd.noise.drivers import Refining
from minsd.noise.look import Ask, Look, Told
from minsd.noise.objectives.common import need_subjects

CROSS_LIMIT = 0.2  # a noise is good enough if its response loss is below this
MASK = 0.5  # official variant: ignore the conflict loss while the response loss exceeds this


class InitNO:
    driver = "refine"

    def __init__(
        self, sd: Model, asks: Sequence[Ask], variant: str = "official", conflict_limit: float | None = None
    ):
        need_subjects(asks)
        self.official = variant == "official"
        self.means: dict[int, Tensor] = {}  # image -> running mean of its maps (S,h,w)
        conflict = sd.config.conflict_limit if conflict_limit is None else conflict_limit
        limits = {"cross": CROSS_LIMIT} | ({"self": conflict} if conflict < math.inf else {})
        self.how = Refining(repeats={10: limits, 20: limits})

    def begin(self) -> None:
        self.means.clear()

    def __call__(self, look: Look) -> tuple[Tensor, Told]:
        conflict = losses.self_conflict(look.claims, look.present)
        cross = losses.cross_response(look.maps, look.present)
        told = {"cross": cross, "self": conflict}
        if look.phase == "score":
            return cross + conflict, told
        if look.i is None:  # the initial noise
            used = conflict.where(cross <= MASK, 0.0) if self.official else conflict
            background = losses.clean_background(look.maps, look.present) if self.official else 0.0
            return cross + used + background, told | {"used": used}
        for b, maps in zip(look.rows, look.maps.detach()):
            self.means[b] = 0.9 * self.means.get(b, maps) + 0.1 * maps
        if look.phase == "update":
            return cross, told
        background = losses.clean_background(look.maps, look.present)
        drift = losses.alignment(look.maps, torch.stack([self.means[b] for b in look.rows]), look.present)
        return cross + 0.1 * background + 0.1 * drift + conflict, told
