"""SynGen (Rassin et al., NeurIPS 2023, arXiv 2306.08877, section 3): bind attributes to their
nouns.

Each token's cross-attention is taken as a distribution over cells, and dist(a, b) = KL(a||b) / 2 +
KL(b||a) / 2 compares those of two tokens. A group consists of a noun v and its modifiers m; u are
the prompt's tokens outside the group.

    L = sum over groups, over m of dist(m, v) - (mean over u of dist(v, u) + mean of dist(m, u)) / 2

A noun without modifiers gives - mean of dist(v, u). For a word of several tokens, the largest of
their dist is taken. With `outside="groups"`, u are the tokens of the other groups alone. L has no
lower bound.
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
    """Returns dist(a, b) = KL(a||b) / 2 + KL(b||a) / 2 between each of the r tokens with the
    positions `rows` and all K tokens, (r,K). `maps` (K,h,w), with values above 0, are the tokens'
    attention maps, taken as distributions over cells."""
    p = maps.flatten(1)
    p = (p / p.sum(dim=1, keepdim=True)).clamp(min=torch.finfo(p.dtype).tiny)
    a, b = p[list(rows), None], p[None]
    return 0.5 * ((a - b) * (a.log() - b.log())).sum(dim=2)  # KL(a||b) + KL(b||a), halved


def binding(maps: Tensor, group: Group, outside: Sequence[int]) -> Tensor:
    """Returns one group's part of SynGen's loss, a scalar. It is low if the attention maps of the
    noun and its modifiers are alike, and unlike those of tokens outside the group. `group` has the
    token positions of the noun and the modifiers, `outside` those of the tokens outside the group,
    and `maps` (K,h,w) are the attention maps of all K tokens."""

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
