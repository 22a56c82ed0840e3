"""CONFORM (Meral et al., CVPR 2024, arXiv 2312.06059) makes the attention maps of a group (a noun
with its modifiers) alike, and those of different groups unlike.

The smoothed maps of every word of every group, now and at the step before, are vectors; s(a, b) is
the cosine of two. For every ordered pair (a, p) of one group, with n the vectors of other groups,

    L = mean over (a, p) of - log( e^{s(a,p)/T} / (e^{s(a,p)/T} + sum over n of e^{s(a,n)/T}) )

If there are no pairs (every group has a single word, at the first step), L has no gradient. Then,
and always with `form="pairs"`, another loss is used:

    L = mean over pairs of a group of max(0, 1 - s) + mean over pairs of two groups of s where s > 0

With `repeats`, updates are repeated 20 times at steps 0, 10 and 20.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise.drivers import Refining
from minsd.noise.look import Ask, Look
from minsd.noise.objectives.common import Earlier, check_choice, need_groups

SMALLEST_T = 1e-6  # far below it, 1 / T is beyond float32


def contrastive(vectors: Tensor, labels: Tensor, t: float = 0.5, form: str = "ntxent") -> Tensor:
    """Returns CONFORM's loss L, a scalar, which is low if flattened attention maps of the same
    group are alike and those of different groups are not. `vectors` (n,d) holds n such maps, and
    `labels` (n,) the number of each map's group. `t` is the temperature T of the loss, and `form`
    is "ntxent" or "pairs" (the head of this file has both formulas)."""
    unit = vectors / (vectors.norm(dim=1, keepdim=True) + 1e-12)
    s = unit @ unit.T
    same = labels[:, None] == labels
    pairs = same & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    if form == "ntxent" and pairs.any():
        a, p = pairs.nonzero(as_tuple=True)
        # With e^{s(a,p)/T} divided out, L = log(e^0 + sum over n of e^{(s(a,n) - s(a,p))/T}), whose
        # logsumexp overflows at no T.
        gaps = ((s[a] - s[a, p, None]) / t).masked_fill(same[a], -torch.inf)
        return torch.nn.functional.pad(gaps, (1, 0)).logsumexp(dim=1).mean()
    near = (1 - s[pairs]).clamp(min=0)
    far = s[~same & (s > 0)]
    return sum((part.mean() for part in (near, far) if part.numel()), 0 * vectors.sum())


class Contrast:
    driver = "refine"

    def __init__(
        self, sd: Model, asks: Sequence[Ask], t: float = 0.5, form: str = "ntxent", repeats: bool = False
    ):
        check_choice("form", form, ("ntxent", "pairs"))
        if not t >= SMALLEST_T:
            raise ValueError(f"t must be {SMALLEST_T:g} or more, not {t:g}")
        need_groups(asks)
        self.t, self.form, self.earlier = t, form, Earlier()
        self.begin = self.earlier.clear
        self.how = Refining(repeats={0: {}, 10: {}, 20: {}} if repeats else {})

    def __call__(self, look: Look) -> Tensor:
        return torch.stack([self.of(look, k, row) for k, row in enumerate(look.rows)])

    def of(self, look: Look, k: int, row: int) -> Tensor:
        words = [(word, g) for g, (mods, noun) in enumerate(look.asks[k].groups) for word in (*mods, noun)]
        now = look.maps_of(k, [word for word, _ in words], sharp=False).flatten(1)  # (n, h*w)
        vectors = torch.cat([now, *self.earlier.step(row, look.i, now)])
        labels = torch.tensor([g for _, g in words] * (len(vectors) // len(now)), device=now.device)
        return contrastive(vectors, labels, self.t, self.form)
