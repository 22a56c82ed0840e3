"""Divide & Bind (Li et al., BMVC 2023, arXiv 2307.10864), from the paper alone.

    L = - min over subjects s of TV(M_s) + lambda sum over (modifier r, noun s) of JSD(M_r, M_s)
    TV(M) = sum |M[i+1,j] - M[i,j]| + sum |M[i,j+1] - M[i,j]|
    JSD(p, q) = KL(p||m) / 2 + KL(q||m) / 2 with m = (p + q) / 2

with M the sharpened, smoothed maps. For JSD a map becomes a distribution over cells by its sum or,
with `softmax`, by a softmax, which is nearly flat on maps of 0 to 1. TV has no natural limit: the
number of updates is fixed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise.drivers import Refining
from minsd.noise.look import Ask, Look, Told
from minsd.noise.objectives.common import need_subjects


def variation(maps: Tensor) -> Tensor:
    """Returns the total variation of each map (...,h,w): the sum of the absolute differences of
    neighbouring cells. The result has the leading shape (...)."""
    return maps.diff(dim=-2).abs().sum((-2, -1)) + maps.diff(dim=-1).abs().sum((-2, -1))


def divergence(a: Tensor, b: Tensor, softmax: bool = False) -> Tensor:
    """Returns the Jensen-Shannon divergence, a scalar, of two attention maps (h,w), each made a
    distribution over cells: by a softmax if `softmax` is True, otherwise by dividing it by its
    sum."""
    flat = torch.stack([a.flatten(), b.flatten()])
    p = flat.softmax(dim=1) if softmax else flat / flat.sum(dim=1, keepdim=True)
    p = p.clamp(min=torch.finfo(p.dtype).tiny)
    m = p.mean(dim=0)
    return 0.5 * (p * (p.log() - m.log())).sum()


class DivideAndBind:
    driver = "refine"
    how = Refining()

    def __init__(self, sd: Model, asks: Sequence[Ask], weight: float = 1.0, softmax: bool = False):
        self.weight, self.softmax = weight, softmax
        need_subjects(asks)

    def __call__(self, look: Look) -> tuple[Tensor, Told]:
        attend = -variation(look.maps).masked_fill(~look.present, torch.inf).min(dim=1).values
        bind = torch.stack([self.bound(look, k) for k in range(len(look.x))])
        return attend + self.weight * bind, {"attend": attend, "bind": bind}

    def bound(self, look: Look, k: int) -> Tensor:
        """Returns the sum, over all (modifier, noun) pairs in the prompt of image k of `look`, of
        the Jensen-Shannon divergence of the two words' attention maps."""
        pairs = [(modifier, g.noun) for g in look.asks[k].groups for modifier in g.modifiers]
        maps = [look.maps_of(k, pair) for pair in pairs]
        parts = [divergence(two[0], two[1], self.softmax) for two in maps]
        return sum(parts, 0 * look.maps[k].sum())
