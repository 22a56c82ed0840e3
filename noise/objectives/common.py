"""Helpers of several objectives: checks of subjects and groups, and the regions of a layout."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minsd.config import CELL
from minsd.guidance import Model
from minsd.noise import losses
from minsd.noise.layout import coverage
from minsd.noise.look import Ask, Look
from minsd.words import occurrences


def need_subjects(asks: Sequence[Ask]) -> None:
    """Raises ValueError if the prompt of an image names no subjects. `asks` holds one Ask per
    image."""
    for ask in asks:
        if not ask.subjects:
            raise ValueError(f"the prompt {ask.prompt!r} names nothing to attend to: name the subjects")


def need_groups(asks: Sequence[Ask]) -> None:
    """Raises ValueError if the prompt of an image has no groups of a noun with its modifiers.
    `asks` holds one Ask per image."""
    for ask in asks:
        if not ask.groups:
            raise ValueError(f"no nouns are found in {ask.prompt!r}: give --pairs 'red circle; blue square'")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError if `value`, given for the setting `name`, is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, not {value!r}")


class Earlier:
    """Stores one tensor per image from the last evaluation in the previous step of the run."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.last: dict[int, tuple[int, Tensor]] = {}  # image -> its latest step and tensor
        self.before: dict[int, list[Tensor]] = {}

    def step(self, row: int, i: int | None, now: Tensor) -> list[Tensor]:
        """Stores `now`, the tensor of image number `row` at step i, in place of one stored at the
        same step. Returns a list with one detached tensor: the last one that was stored for this
        image before step i. The list is empty if there is no such tensor. If `i` is None (before
        the run), nothing is stored and the list is empty."""
        if i is None:  # before the run there are no steps
            return []
        if row in self.last and self.last[row][0] != i:
            self.before[row] = [self.last[row][1]]
        self.last[row] = i, now.detach()
        return self.before.get(row, [])


class Regions:
    """The subjects that the captions of a layout's regions name, with their token positions in the
    whole prompt and the masks of their regions."""

    def __init__(self, sd: Model, asks: Sequence[Ask]):
        self.found = [regions_of(sd, ask) for ask in asks]

    def __call__(self, look: Look, k: int) -> tuple[Tensor, Tensor]:
        """Returns (maps, masks), each (S,h,w), for image k of `look` (k counts from 0): the
        cross-attention maps of its S subjects, and for each subject the fraction of each cell that
        lies in the subject's region."""
        found = self.found[look.rows[k]]
        maps = look.maps_of(k, [tokens for tokens, _ in found])
        cell = CELL * look.x.shape[-2] // maps.shape[-2]  # pixels
        masks = [torch.from_numpy(coverage(pixels, cell)).to(maps) for _, pixels in found]
        return maps, torch.stack(masks)


def regions_of(sd: Model, ask: Ask) -> list[tuple[list[int], np.ndarray]]:
    """Returns (positions, pixels) for each subject that the captions of the layout's regions name:
    the subject's token positions in the whole prompt, and the mask (H,W) of its region.

    If the prompt contains a word several times, the n-th region that names this word gets its n-th
    occurrence. Raises ValueError if there are no regions, or if a caption's subject is not in the
    prompt.
    """
    if ask.layout is None or not ask.layout.regions:
        raise ValueError("this objective needs the regions of a layout: give --layout FILE")
    found = []
    times: dict[str, int] = {}
    for region in ask.layout.regions:
        for word in losses.automatic_subjects(region.prompt):
            times[word] = times.get(word, 0) + 1
            several = len(occurrences(ask.prompt, word)) > 1
            name = f"{word}#{times[word]}" if several else word
            found.append((sd.text.positions(ask.prompt, name), region.pixels))
    return found
