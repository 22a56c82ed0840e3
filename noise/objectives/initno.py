"""InitNO (Guo et al., CVPR 2024, arXiv 2404.04650): its losses before and while denoising.

    initial noise     L = cross + conflict + background, the conflict only while cross <= 0.5
                      (variant "paper": L = cross + conflict)
    while denoising   L = cross in each update,
                      L = cross + conflict + (background + alignment) / 10 in repeated ones
    score of a seed   L = cross + conflict

with the terms of noise/losses.py, alignment to the running mean of the maps, 0.9 mean + 0.1 M.
"""

import math
import warnings
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
        for ask in asks:
            if len(ask.subjects) == 1:
                # With stacklevel 1 Python shows a text once, although a run makes several InitNO.
                text = f"{ask.prompt!r} has a single subject, so InitNO's loss of conflicts is 0"
                warnings.warn(text, stacklevel=1)
        self.official, self.count = variant == "official", len(asks)
        conflict = sd.config.conflict_limit if conflict_limit is None else conflict_limit
        limits = {"cross": CROSS_LIMIT} | ({"self": conflict} if conflict < math.inf else {})
        self.how = Refining(repeats={10: limits, 20: limits})  # repeat until within the limits
        self.begin()

    def begin(self) -> None:
        self.means: Tensor | None = None  # (B,S,h,w): running means of the maps, NaN before the first

    def __call__(self, look: Look) -> tuple[Tensor, Told]:
        conflict = losses.self_conflict(look.claims, look.present)
        cross = losses.cross_response(look.maps, look.present)
        told = {"cross": cross, "self": conflict}
        if look.phase == "score":
            return cross + conflict, told
        if look.i is None:  # the initial noise
            if not self.official:
                return cross + conflict, told | {"used": conflict}
            used = conflict.where(cross <= MASK, 0.0)
            return cross + used + losses.clean_background(look.maps, look.present), told | {"used": used}
        maps = look.maps.detach()
        if self.means is None:
            self.means = maps.new_full((self.count, *maps.shape[1:]), torch.nan)
        earlier = self.means[look.index]
        self.means[look.index] = mean = 0.9 * earlier.where(~earlier.isnan(), maps) + 0.1 * maps
        if look.phase == "update":
            return cross, told
        background = losses.clean_background(look.maps, look.present)
        drift = losses.alignment(look.maps, mean, look.present)
        return cross + 0.1 * background + 0.1 * drift + conflict, told
