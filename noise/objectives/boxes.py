"""BoxDiff (Xie et al., ICCV 2023, arXiv 2307.10816): subjects in the boxes of a layout.

With M a subject's sharpened, smoothed attention map, m its region's mask, and top(k, .) the mean of
the k largest values, k = max(1, floor(P sum m)), and k' the same number for 1 - m:

    L = sum over subjects of inner + outer + corner_x + corner_y
    inner = 1 - top(k, M m),   outer = top(k', M (1 - m))
    corner_x = mean over columns of |max over rows of M - max over rows of m| w

w is 1 within L columns of the box's first column and of the one after its last, else 0; corner_y is
the same for rows. With `repeats`, updates are repeated at steps 0, 10 and 20, on the largest inner
term.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise.drivers import Refining
from minsd.noise.look import Ask, Look, Told
from minsd.noise.objectives.common import Regions

P, L = 0.2, 1


def terms(maps: Tensor, mask: Tensor, p: float = P, reach: int = L) -> tuple[Tensor, Tensor, Tensor]:
    """Returns BoxDiff's three loss terms of a subject: (inner, outer, corner_x + corner_y), all
    scalars. `maps` (h,w) is the subject's attention map, and `mask` (h,w), of 0 and 1, its region.

    inner is 1 minus the mean of the largest values of the map inside the mask, and outer the mean
    of the largest values outside. Each mean is over the fraction `p` of the cells there. The corner
    terms compare the maximum of the map in each column and row with that of the mask, but only in
    columns and rows within `reach` cells of the region's edges. The head of this file has the
    formulas.
    """
    k, rest = (max(1, int(p * float(part.sum()))) for part in (mask, 1 - mask))
    inner = 1 - (maps * mask).flatten().topk(k).values.mean()
    outer = (maps * (1 - mask)).flatten().topk(rest).values.mean()
    corner = 0 * inner
    for axis in (0, 1):  # the maximum over rows leaves columns, and vice versa
        q = mask.amax(dim=axis)
        cells = torch.arange(len(q), device=q.device)
        first, last = q.nonzero()[0], q.nonzero()[-1] + 1
        near = ((cells - first).abs() <= reach) | ((cells - last).abs() <= reach)
        corner = corner + ((maps.amax(dim=axis) - q).abs() * near).mean()
    return inner, outer, corner


class Boxes:
    driver = "refine"

    def __init__(self, sd: Model, asks: Sequence[Ask], repeats: bool = False):
        limits = {0: {"inner": 0.95}, 10: {"inner": 0.5}, 20: {"inner": 0.2}}
        self.how = Refining(repeats=limits if repeats else {})
        self.regions = Regions(sd, asks)

    def __call__(self, look: Look) -> tuple[Tensor, Told]:
        found = []
        for k in range(len(look.x)):
            maps, masks = self.regions(look, k)
            # A region smaller than half a cell of the map takes the cells that it covers most.
            filled = masks >= masks.amax(dim=(1, 2), keepdim=True).clamp(max=0.5)
            filled = filled & (masks > 0) & ((masks > 0.5) | (masks.amax(dim=(1, 2), keepdim=True) <= 0.5))
            parts = torch.stack([torch.stack(terms(*pair)) for pair in zip(maps, filled.to(maps))])
            found.append(torch.stack([parts[:, 0].max(), *parts.sum(dim=0)]))
        worst, inner, outer, corner = torch.stack(found).unbind(dim=1)
        told = {"inner": worst, "outer": outer, "corner": corner}
        return (worst if look.phase == "repeat" else inner + outer + corner), told
