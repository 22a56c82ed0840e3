"""SynGen (Rassin et al., NeurIPS 2023, arXiv 2306.08877, section 3): bind attributes to their nouns.

Each token's cross-attention is taken as a distribution over cells. With dist(a, b) = KL(a||b) / 2 +
KL(b||a) / 2, and u the prompt's tokens outside a group of a noun v and modifiers m,

    L = sum over groups, over m of dist(m, v) - (mean over u of dist(v, u) + mean of dist(m, u)) / 2

A noun without modifiers gives - mean of dist(v, u). A word of several tokens takes the largest
dist of them. `outside="groups"` takes u from the other groups alone. L has no lower bound.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise.drivers import Refining
from minsd.noise.look import Ask, Look
from minsd.noise.objectives.common import check_choice, need_groups
from minsd.noise.pairs import Group


def distances(maps: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns dist (r,K) between r tokens `rows` and all K tokens, from maps (K,h,w) above 0."""
    p = maps.flatten(1)
    p = (p / p.sum(dim=1, keepdim=True)).clamp(min=torch.finfo(p.dtype).tiny)
    a, b = p[list(rows), None], p[None]
    return 0.5 * ((a - b) * (a.log() - b.log())).sum(dim=2)  # KL(a||b) + KL(b||a), halved


def binding(maps: Tensor, group: Group, outside: Sequence[int]) -> Tensor:
    """Returns one group's part of L, from maps (K,h,w) of all tokens and the positions u
    outside."""

    def dist(word: Sequence[int], others: Sequence[int]) -> Tensor:
        return distances(maps, word)[:, list(others)].max(dim=0).values

    loss = 0 * maps.sum()
    for m in group.modifiers:
        loss = loss + dist(m, group.noun).max()
        if outside:
            loss = loss - (dist(group.noun, outside).mean() + dist(m, outside).mean()) / 2
    return loss - dist(group.noun, outside).mean() if outside and not group.modifiers else loss


class SynGen:
    driver = "refine"
    how = Refining(decay="none")

    def __init__(self, sd: Model, asks: Sequence[Ask], outside: str = "words"):
        check_choice("outside", outside, ("words", "groups"))
        need_groups(asks)
        self.words = outside == "words"
        self.places = [set(sd.text.places(ask.prompt)) for ask in asks]

    def __call__(self, look: Look) -> Tensor:
        return torch.stack([self.of(*each) for each in zip(look.cross, look.rows, look.asks)])

    def of(self, cross: Tensor, row: int, ask: Ask) -> Tensor:
        maps = cross.movedim(-1, 0)  # (K, h, w), the start token at 0
        tokens = [{t for word in (*g.modifiers, g.noun) for t in word} for g in ask.groups]
        every = self.places[row] if self.words else set().union(*tokens)
        parts = [binding(maps, g, sorted(every - own)) for g, own in zip(ask.groups, tokens)]
        return torch.stack(parts).sum()
