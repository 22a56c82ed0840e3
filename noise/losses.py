"""What attention maps say about the picture to come: from the words asked about, to their maps, to five losses.

Initial noise optimisation (InitNO: Guo et al., CVPR 2024, arXiv 2404.04650) and Attend-and-Excite (Chefer et al.,
SIGGRAPH 2023, arXiv 2301.13826) ask the network once where it looks when it reads each subject of the prompt:

- cross-attention C (h,w,77), sharpened over tokens to softmax(100 C) without the start token and the last position, is
  each subject's map M (h,w), smoothed; its peak is where the subject would appear;
- self-attention at that peak, smoothed, is the region A (h,w) that the subject would claim.

`look` gives both, differentiably, from one early-stopped evaluation. Every loss takes them for a whole batch and returns
one value an image (B,). Images of a batch may ask about differently many subjects: `present` (B,S) says which of the S
rows are any. All of it works in float64 too, and nothing loops over pixels.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minsd.attention import AttentionRecorder
from minsd.guidance import Model
from minsd.samplers import timesteps
from minsd.text import TextEncoder

# --- subjects: words -> token positions -------------------------------------------------------------------------------


def automatic_subjects(prompt: str) -> list[str]:
    """The last word of each part of the prompt split at "and", "with" and commas; `cat#2` for a word's second occurrence."""
    words, subjects, last = [], [], None
    for word in [*re.findall(r",|[^\W_]+(?:['’-][^\W_]+)*", prompt), ","]:
        if word.lower() not in (",", "and", "with"):
            words.append(word.lower())
            last = word, words.count(word.lower())
        elif last is not None:
            subjects.append(last)
            last = None
    if not subjects:
        raise ValueError(
            f"the prompt {prompt!r} names nothing to attend to: give a prompt with a noun, or the subjects"
        )
    return [f"{word}#{nth}" if words.count(word.lower()) > 1 else word for word, nth in subjects]


def resolve(text: TextEncoder, prompt: str, subjects: str | Sequence[str | int] | None) -> list[list[int]]:
    """Token positions of each subject; no network runs.

    `subjects`: words of the prompt (a list, or one string with commas), token indices (0 is the start token), or None for
    `automatic_subjects`. ValueError when there is none, one is not in the prompt or given twice, or lies beyond what
    the text encoder reads. A warning says so when there is only one, which has nothing to conflict with.
    """
    if subjects is None:
        subjects = automatic_subjects(prompt)
    if isinstance(subjects, str):
        subjects = [word.strip() for word in subjects.split(",")]
    if not subjects:
        raise ValueError("there are no subjects: name at least one word of the prompt")
    last = len(text.ids(prompt)) - 2  # the end token comes after it
    places = []
    for subject in subjects:
        if isinstance(subject, str):
            places.append(text.positions(prompt, subject))
        elif not isinstance(subject, int) or isinstance(subject, bool):
            raise ValueError(f"a subject is a word of the prompt or a token index, not {subject!r}")
        elif not 1 <= subject <= last:
            raise ValueError(
                f"token index {subject} is outside the prompt, whose words are tokens 1 to {last} (--list-tokens)"
            )
        elif subject > text.max_length - 2:
            raise ValueError(
                f"token index {subject} lies beyond the {text.max_length} tokens the model reads: shorten the prompt"
            )
        else:
            places.append([subject])
        if places[-1] in places[:-1]:
            raise ValueError(f"subject {subject!r} is named twice")
    if len(places) == 1:
        # From here, whoever asked: Python then says it once, though several methods resolve the same subjects.
        warnings.warn(
            f"a single subject, {subjects[0]!r}: there is nothing it could conflict with, so that loss is 0",
            stacklevel=1,
        )
    return places


def selector(places: Sequence[Sequence[Sequence[int]]], length: int = 77) -> Tensor:
    """Token positions of each subject of each image -> weights (B,S,length) whose product with maps is their mean.

    An image with fewer than S subjects has rows of zeros for the rest.
    """
    select = torch.zeros(len(places), max(map(len, places)), length)
    for b, subjects in enumerate(places):
        for s, tokens in enumerate(subjects):
            select[b, s, list(tokens)] = 1 / len(tokens)
    return select


# --- maps -------------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """Where one evaluation looked, subject by subject: `maps` M and the self-attention `claims` A at their peaks, (B,S,h,w) each."""

    maps: Tensor
    claims: Tensor


def smooth(maps: Tensor) -> Tensor:
    """(...,h,w) by a 3x3 kernel of weights exp(-(d / (2 * 0.5))^2) an axis (InitNO's; not the usual exp(-d^2 / 2s^2)),
    normalised to sum 1, edges reflected."""
    side = torch.exp(torch.tensor(-1.0, dtype=torch.float64)).item()
    middle, side = 1 / (1 + 2 * side), side / (1 + 2 * side)
    for axis in (-2, -1):  # shifted sums, not a convolution: that may round to TF32 on a GPU
        n = maps.shape[axis]
        before = maps.index_select(axis, torch.tensor([1, *range(n - 1)], device=maps.device))
        after = maps.index_select(axis, torch.tensor([*range(1, n), n - 2], device=maps.device))
        maps = middle * maps + side * (before + after)
    return maps


def subject_maps(cross: Tensor, select: Tensor) -> Tensor:
    """Cross-attention maps (B,h,w,77) and a `selector` (B,S,77) -> smoothed maps M (B,S,h,w) of the subjects."""
    sharp = (100 * cross[..., 1:-1]).softmax(dim=-1)  # (B, h, w, 75)
    return smooth(torch.einsum("bhwk,bsk->bshw", sharp, select[..., 1:-1].to(sharp)))


def peaks(maps: Tensor) -> Tensor:
    """Where each map (B,S,h,w) is largest: cell numbers (B,S), counted along the rows. No gradient."""
    return maps.detach().flatten(2).argmax(dim=-1)


def claims(self_maps: Tensor, at: Tensor) -> Tensor:
    """Self-attention maps (B,h,w,h*w) and cells (B,S) -> smoothed maps A (B,S,h,w) of the queries at those cells."""
    h, w, n = self_maps.shape[1:]
    rows = self_maps.flatten(1, 2).gather(1, at[:, :, None].expand(-1, -1, n))  # (B, S, h*w)
    return smooth(rows.unflatten(2, (h, w)))


def look(unet, x: Tensor, t: int | float, context: Tensor, select: Tensor) -> Look:
    """One evaluation of the conditional branch at latents x (B,4,h,w) and timestep t, which stops once it has its maps.

    context (B,77,D); select (B,S,77) from `selector`. The UNet runs in its own precision; the maps are float32 or float64.
    """
    record = AttentionRecorder(only=True)
    unet(x.to(context.dtype), t, context, record=record)
    maps = subject_maps(record.cross, select)
    return Look(maps, claims(record.self, peaks(maps)))


def differentiate(
    sd, x: Tensor, t: int | float, context: Tensor, select: Tensor, objective: Callable
) -> tuple[Tensor, Tensor]:
    """What an objective says at latents x (B,4,h,w), and its gradient in them, as many images at a time as fit.

    `objective(look, rows)` takes the Look of images `rows` and returns their losses (b,), or None where nothing needs a
    gradient, and what it has to tell of them, (b,n). Returns that, (B,n), and gradients (B,4,h,w) in x's dtype.
    """
    size = max(
        1, sd.batch_size(8 * x.shape[-2], 8 * x.shape[-1]) // 2
    )  # a gradient keeps more than a guided step does
    scale = (
        256.0 if context.dtype == torch.float16 else 1.0
    )  # gradients of maps are small enough to be lost in 16 bits
    told, gradients = [], []
    for rows in torch.arange(len(x), device=x.device).split(size):
        with torch.enable_grad():
            leaf = x[rows].detach().requires_grad_()
            loss, values = objective(look(sd.unet, leaf, t, context[rows], select[rows]), rows)
            gradient = (
                torch.zeros_like(leaf)
                if loss is None
                else torch.autograd.grad(scale * loss.sum(), leaf)[0] / scale
            )
        told.append(values.detach())
        gradients.append(gradient)
    return torch.cat(told), torch.cat(gradients)


def listed_timesteps(
    sd: Model, steps: int | None = None, sampler: str | None = None, karras: bool = False
) -> list[int | float]:
    """Every timestep that a run visits, in order. None: the model's own default."""
    steps = sd.config.steps if steps is None else steps
    return timesteps(sampler or sd.config.sampler, sd.schedule, steps, karras=karras)


# --- losses, one value an image ---------------------------------------------------------------------------------------


def _present(maps: Tensor, present: Tensor | None) -> Tensor:
    return maps.new_ones(maps.shape[:2], dtype=torch.bool) if present is None else present


def cross_response(maps: Tensor, present: Tensor | None = None) -> Tensor:
    """max over subjects of 1 - M at its peak: how little the most neglected subject is looked at. maps (B,S,h,w) -> (B,)."""
    highest = maps.flatten(2).gather(2, peaks(maps)[:, :, None])[:, :, 0]  # (B, S)
    return (1 - highest).masked_fill(~_present(maps, present), 0.0).max(dim=1).values


def self_conflict(claims: Tensor, present: Tensor | None = None) -> Tensor:
    """How far the regions A (B,S,h,w) that subjects claim overlap: mean over pairs of sum(min(A, A')) / sum(A + A'); 0 for
    a single subject. -> (B,)."""
    present = _present(claims, present)
    i, j = torch.triu_indices(claims.shape[1], claims.shape[1], offset=1, device=claims.device)
    a, b, both = claims[:, i], claims[:, j], present[:, i] & present[:, j]  # (B, pairs, h, w), (B, pairs)
    overlap = torch.minimum(a, b).sum(dim=(2, 3)) / ((a + b).sum(dim=(2, 3)) + 1e-6)
    return (overlap * both).sum(dim=1) / both.sum(dim=1).clamp(min=1)


def clean_background(maps: Tensor, present: Tensor | None = None) -> Tensor:
    """Sum over subjects of the strongest response outside the peak's own part of the picture, where it exceeds the weakest
    inside. The part: cells above Otsu's threshold that are connected to the peak. maps (B,S,h,w) -> (B,)."""
    with torch.no_grad():
        part = component(maps >= otsu(maps)[:, :, None, None].to(maps.dtype) / 255, peaks(maps))
    inside = maps.masked_fill(~part, torch.inf).flatten(2).amin(dim=2)  # (B, S)
    outside = (
        maps.masked_fill(part, -torch.inf).flatten(2).amax(dim=2)
    )  # -inf where the part is the whole map
    return outside.where((outside > inside) & _present(maps, present), 0.0).sum(dim=1)


def alignment(maps: Tensor, running: Tensor, present: Tensor | None = None) -> Tensor:
    """Mean absolute difference of M (B,S,h,w) and its running mean over the steps so far, summed over subjects. -> (B,).
    (The original averages the maps of all tokens; selecting and smoothing are linear, so the subjects' own suffice.)"""
    return ((maps - running).abs().mean(dim=(2, 3)) * _present(maps, present)).sum(dim=1)


def kl_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    """Of N(mu, exp(log_var)) from N(0, 1), mean over a noise's elements: (B,...) each -> (B,)."""
    return -0.5 * (1 + log_var - mu**2 - log_var.exp()).flatten(1).mean(dim=1)


# --- the two pieces of image processing, exact ------------------------------------------------------------------------


def otsu(maps: Tensor) -> Tensor:
    """Otsu's threshold (1979) of each map (...,h,w) in 0..1 at 256 levels, values scaled by 255 and truncated: the first
    level whose split into "up to it" and "above it" has the largest variance between classes, 0 where nothing can be
    split. -> (...) integers.

    With n0 of the N cells in the lower class and S0 of the sum S, that variance is (N S0 - n0 S)^2 / (n0 n1) up to a
    constant: whole numbers and one division, so equal splits are exactly equal and "first" is well defined.
    """
    levels = (maps.detach() * 255).long().clamp(0, 255).flatten(-2)  # (..., N)
    counts = torch.zeros(*levels.shape[:-1], 256, dtype=torch.long, device=maps.device)
    counts.scatter_add_(-1, levels, torch.ones_like(levels))
    n0 = counts.cumsum(-1)
    sum0 = (counts * torch.arange(256, device=maps.device)).cumsum(-1)
    n, total = n0[..., -1:], sum0[..., -1:]
    wide = torch.float32 if maps.device.type == "mps" else torch.float64
    between = (n * sum0 - n0 * total).to(wide) ** 2 / (n0 * (n - n0)).clamp(min=1).to(wide)
    best = between.amax(-1, keepdim=True)
    return (between == best).long().argmax(-1)  # an unsplit map is all zeros: its first level is 0


def component(mask: Tensor, at: Tensor) -> Tensor:
    """The 4-connected part of each mask (B,S,h,w) that holds cell `at` (B,S), as a mask; empty where that cell is not in it."""
    part = torch.zeros_like(mask).flatten(2).scatter(2, at[:, :, None], True).view_as(mask) & mask
    while True:  # grows by a ring of neighbours a turn: a few turns for a blob, h*w for the worst of spirals
        spread = part.clone()
        spread[..., 1:, :] |= part[..., :-1, :]
        spread[..., :-1, :] |= part[..., 1:, :]
        spread[..., 1:] |= part[..., :-1]
        spread[..., :-1] |= part[..., 1:]
        spread &= mask
        if torch.equal(spread, part):
            return part
        part = spread
