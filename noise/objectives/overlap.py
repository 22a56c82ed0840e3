"""Attend-and-Excite with overlap or retention (Grimal et al., arXiv 2504.17525 and 2508.13866).

With M the subjects' sharpened, smoothed maps:

    excite    = max over subjects of max(0, 1 - max M_s)
    overlap   = mean over pairs of sum min(A, B) / sum (A + B)
    retention = mean over subjects of 1 - sum min(M_s, m_s) / sum (M_s + m_s),   m_s its region's mask
    L = (excite + overlap) / 2       or, with `half=False`, their sum

With `retention=True`, the term retention, which needs the regions of a layout, replaces overlap.
The second term is left out while excite exceeds `limit`. retention is at least 1/2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise import losses
from minsd.noise.drivers import Refining
from minsd.noise.look import Ask, Look, Told
from minsd.noise.objectives.common import Regions, need_subjects


def overlap(maps: Tensor, present: Tensor) -> Tensor:
    """Returns the overlap (B,) of the subjects' attention maps (B,S,h,w). For two subjects with the
    maps M and M' it is sum min(M, M') / sum (M + M'), and this is averaged over all pairs of
    subjects. `present` (B,S) is True for the subjects that an image has."""
    i, j = torch.triu_indices(maps.shape[1], maps.shape[1], offset=1, device=maps.device)
    a, b = maps[:, i], maps[:, j]
    both = present[:, i] & present[:, j]
    shared = torch.minimum(a, b).sum((2, 3)) / (a + b).sum((2, 3)).where(both, 1.0)
    return (shared * both).sum(dim=1) / both.sum(dim=1).clamp(min=1)


def retention(maps: Tensor, masks: Tensor) -> Tensor:
    """Returns the retention loss, a scalar, of one image's attention maps and region masks, each
    (S,h,w). It is low if each subject's map M fills its mask m: the mean over subjects of 1 - sum
    min(M, m) / sum (M + m)."""
    return (1 - torch.minimum(maps, masks).sum((1, 2)) / (maps + masks).sum((1, 2))).mean()


class Overlap:
    driver = "refine"
    how = Refining(decay="none")

    def __init__(
        self, sd: Model, asks: Sequence[Ask], half: bool = True, limit: float = 1.0, retention: bool = False
    ):
        need_subjects(asks)
        self.weight = 0.5 if half else 1.0
        self.limit = limit
        self.regions = Regions(sd, asks) if retention else None

    def __call__(self, look: Look) -> tuple[Tensor, Told]:
        excite = losses.cross_response(look.maps, look.present).clamp(min=0)
        if self.regions is None:
            second = overlap(look.maps, look.present)
        else:
            second = torch.stack([retention(*self.regions(look, k)) for k in range(len(look.x))])
        loss = self.weight * (excite + second.where(excite <= self.limit, 0.0))
        return loss, {"excite": excite, "second": second}
