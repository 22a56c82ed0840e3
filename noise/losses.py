"""From the words of a prompt to their attention maps, and from the maps to five losses.

Initial noise optimisation (InitNO: Guo et al., CVPR 2024, arXiv 2404.04650) and Attend-and-Excite
(Chefer et al., SIGGRAPH 2023, arXiv 2301.13826) predict from one UNet evaluation which subjects of
the prompt the image will show, and where:

- cross-attention C (h,w,77n) without the start token and the last position, sharpened over tokens to
  softmax(100 C) and smoothed, is each subject's map M (h,w). The subject would appear at its peak;
- self-attention at that peak, smoothed, is the region A (h,w) that the subject claims.

A `Look` (noise/look.py) has both, differentiably, from one early-stopped evaluation. Every loss
takes them for a whole batch and returns one value per image, (B,). The images of a batch may have
different numbers of subjects: `present` (B,S) marks which of the S subject slots are used in each
image. All of it also works in float64, and nothing loops over pixels.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.samplers import timesteps
from minsd.samplers.schedule import Timestep
from minsd.text import TextEncoder
from minsd.words import Finder, Word, split, words

CHUNK = 77  # tokens that the text encoder reads at once
Subjects = str | Sequence[str | int] | None  # as `resolve` takes them

# --- subjects: words -> token positions ----------------------------------------------------------


def automatic_subjects(prompt: str) -> list[str]:
    """Returns the last word of each part of the prompt, split at "and", "with", BREAK and commas.

    A word that occurs more than once is numbered: `cat#1` is its first occurrence, `cat#2` its
    second. ValueError for a prompt without any word.
    """
    return [name for name, _ in _chosen(prompt)]


def _chosen(prompt: str) -> list[tuple[str, Word]]:
    """The names of the automatic subjects, and where they stand."""
    chosen: list[Word] = []
    last = None
    for word in [*words(prompt), Word(",", 0, 0)]:
        if word.text not in (",", "and", "with") and prompt[word.start : word.end] != "BREAK":
            last = word
        elif last is not None:
            chosen.append(last)
            last = None
    if not chosen:
        raise ValueError(
            f"the prompt {prompt!r} names nothing to attend to: name the subjects, or give a noun"
        )
    finder = Finder(prompt)
    named: list[tuple[str, Word]] = []
    for word in chosen:
        name = prompt[word.start : word.end]
        starts = [start for start, _ in finder.occurrences(name)]
        number = f"#{starts.index(word.start) + 1}" if len(starts) > 1 else ""
        named.append((name + number, word))
    return named


def resolve(text: TextEncoder, prompt: str, subjects: Subjects) -> list[list[int]]:
    """Finds the token positions of each subject. No network runs.

    `subjects`: words of the prompt (a list, or one string with commas), token indices (0 is the
    start token), or None for `automatic_subjects`. ValueError if there is none, and for a subject
    that is not in the prompt or given twice. Warns about a single subject, which has nothing to
    conflict with.
    """
    if subjects is None:
        subjects = automatic_subjects(prompt)
    if isinstance(subjects, str):
        subjects = split(subjects)
    if not subjects:
        raise ValueError("there are no subjects: name at least one word of the prompt")
    places: list[list[int]] = []
    for subject in subjects:
        if isinstance(subject, str):
            place = text.positions(prompt, subject)
        else:
            place = [_index(text, prompt, subject)]
        if place in places:
            raise ValueError(f"subject {subject!r} is named twice")
        places.append(place)
    if len(places) == 1:
        # From this line (stacklevel 1), Python shows it once, although several methods resolve
        # subjects.
        warnings.warn(
            f"a single subject, {subjects[0]!r}: with nothing to conflict with, that loss is 0", stacklevel=1
        )
    return places


def _index(text: TextEncoder, prompt: str, index: int) -> int:
    """Returns a token index that belongs to a word of the prompt; ValueError for any other."""
    if not isinstance(index, int) or isinstance(index, bool):
        raise ValueError(f"a subject is a word of the prompt or a token index, not {index!r}")
    places = text.places(prompt)
    if index not in places:
        last = places[-1] if places else 0
        raise ValueError(
            f"token index {index} is outside the prompt, whose words are tokens 1 to {last} (--list-tokens)"
        )
    return index


def selector(places: Sequence[Sequence[Sequence[int]]], length: int | None = None) -> Tensor:
    """Token positions of each subject of each image -> weights (B,S,length).

    Their product with the maps of all tokens is the mean of each subject's maps. An image with
    fewer than S subjects has rows of zeros for the rest. `length` defaults to that of the chunks of
    77 tokens up to the last position.
    """
    if length is None:
        last = max(token for subjects in places for tokens in subjects for token in tokens)
        length = CHUNK * (last // CHUNK + 1)
    select = torch.zeros(len(places), max(map(len, places)), length)
    for b, subjects in enumerate(places):
        for s, tokens in enumerate(subjects):
            select[b, s, list(tokens)] = 1 / len(tokens)
    return select


# --- maps ----------------------------------------------------------------------------------------


def smooth(maps: Tensor) -> Tensor:
    """Maps (...,h,w) smoothed by a 3x3 kernel with reflected edges. An axis of a single cell has that
    cell as its own neighbour on both sides.

    Its weights along each axis are exp(-(d / (2 * 0.5))^2), normalised to sum 1. This is InitNO's
    kernel, not the usual Gaussian exp(-d^2 / 2s^2).
    """
    total = 1 + 2 * math.exp(-1)
    middle = 1 / total
    side = math.exp(-1) / total
    for axis in (-2, -1):  # shifted sums: a convolution may round to TF32 on a GPU
        n = maps.shape[axis]
        index = torch.arange(n, device=maps.device)  # indices in a list would wait for the GPU
        before = maps.index_select(axis, (index - 1).abs().clamp(max=n - 1))  # 1, 0, 1, ..., n-2
        after = maps.index_select(axis, (n - 1 - (n - 2 - index).abs()).clamp(min=0))  # 1, ..., n-1, n-2
        maps = middle * maps + side * (before + after)
    return maps


def mean_maps(maps: Tensor, select: Tensor) -> Tensor:
    """Maps of all tokens (B,h,w,K), a `selector` (B,S,k), k <= K -> each subject's mean (B,S,h,w)."""
    return torch.einsum("bhwk,bsk->bshw", maps[..., : select.shape[-1]], select.to(maps))


def subject_maps(cross: Tensor, select: Tensor) -> Tensor:
    """Cross-attention (B,h,w,77n), a `selector` (B,S,77m), m <= n -> smoothed maps M (B,S,h,w) of
    subjects. In each of the n chunks the start token and the last position are left out."""
    sharp = (100 * inner(cross)).softmax(dim=-1)  # (B, h, w, 75n)
    return smooth(mean_maps(sharp, inner(select)))


def inner(tokens: Tensor) -> Tensor:
    """Leaves out the first and the last position of every chunk of 77 (one chunk, if shorter)."""
    chunks = max(1, tokens.shape[-1] // CHUNK)
    return tokens.unflatten(-1, (chunks, -1))[..., 1:-1].flatten(-2)


def peaks(maps: Tensor) -> Tensor:
    """Flat index (B,S) of the largest cell of each map (B,S,h,w), row by row. No gradient."""
    return maps.detach().flatten(2).argmax(dim=-1)


def claims(self_maps: Tensor, at: Tensor) -> Tensor:
    """Self-attention (B,h,w,h*w) of the queries at cells (B,S) -> smoothed maps A (B,S,h,w)."""
    h, w, n = self_maps.shape[1:]
    rows = self_maps.flatten(1, 2).gather(1, at[:, :, None].expand(-1, -1, n))  # (B, S, h*w)
    return smooth(rows.unflatten(2, (h, w)))


def listed_timesteps(
    sd: Model, steps: int | None = None, sampler: str | None = None, karras: bool = False
) -> list[Timestep]:
    """Every timestep of a run, in order; None means the model's default. Errors as in `timesteps`."""
    steps = sd.config.steps if steps is None else steps
    return timesteps(sampler or sd.config.sampler, sd.schedule, steps, karras=karras)


# --- losses, one value per image -----------------------------------------------------------------


def _present(maps: Tensor, present: Tensor | None) -> Tensor:
    return maps.new_ones(maps.shape[:2], dtype=torch.bool) if present is None else present


def cross_response(maps: Tensor, present: Tensor | None = None) -> Tensor:
    """How little attention the most neglected subject gets. maps M (B,S,h,w) -> (B,).

    The maximum over subjects of 1 - M at its peak.
    """
    highest = maps.flatten(2).gather(2, peaks(maps)[:, :, None])[:, :, 0]  # (B, S)
    return (1 - highest).masked_fill(~_present(maps, present), 0.0).max(dim=1).values


def self_conflict(claims: Tensor, present: Tensor | None = None) -> Tensor:
    """How far the regions A that subjects claim overlap. claims (B,S,h,w) -> (B,).

    The mean over pairs of sum(min(A, A')) / sum(A + A'); 0 for a single subject.
    """
    present = _present(claims, present)
    i, j = torch.triu_indices(claims.shape[1], claims.shape[1], offset=1, device=claims.device)
    a, b = claims[:, i], claims[:, j]  # (B, pairs, h, w)
    both = present[:, i] & present[:, j]  # (B, pairs)
    overlap = torch.minimum(a, b).sum(dim=(2, 3)) / ((a + b).sum(dim=(2, 3)) + 1e-6)
    return (overlap * both).sum(dim=1) / both.sum(dim=1).clamp(min=1)


def clean_background(maps: Tensor, present: Tensor | None = None) -> Tensor:
    """The strongest response outside each peak's own part. maps (B,S,h,w) -> (B,).

    It is summed over subjects. The part: cells above Otsu's threshold that are connected to the
    peak. A response outside counts only if it exceeds the weakest one inside.
    """
    with torch.no_grad():
        part = component(maps >= otsu(maps)[:, :, None, None].to(maps.dtype) / 255, peaks(maps))
    inside = maps.masked_fill(~part, torch.inf).flatten(2).amin(dim=2)  # (B, S)
    outside = maps.masked_fill(part, -torch.inf).flatten(2).amax(dim=2)  # -inf: nothing is outside
    return outside.where((outside > inside) & _present(maps, present), 0.0).sum(dim=1)


def alignment(maps: Tensor, running: Tensor, present: Tensor | None = None) -> Tensor:
    """How far maps M (B,S,h,w) are from their running mean over the steps so far. -> (B,).

    The mean absolute difference, summed over subjects. (The original averages the maps of all
    tokens. Selecting and smoothing are linear, so the subjects' own maps suffice.)
    """
    return ((maps - running).abs().mean(dim=(2, 3)) * _present(maps, present)).sum(dim=1)


def kl_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mu, exp(log_var)) || N(0, 1)), mean over an image's elements. (B,...) each -> (B,)."""
    return -0.5 * (1 + log_var - mu**2 - log_var.exp()).flatten(1).mean(dim=1)


# --- image processing, exact ---------------------------------------------------------------------


def otsu(maps: Tensor) -> Tensor:
    """Otsu's threshold (1979) of each map (...,h,w) in 0..1 -> (...) integers, 0 to 255.

    Values are scaled by 255 and truncated to 256 levels. The threshold is the first level whose
    split into "up to it" and "above it" has the largest variance between classes, or 0 if no split
    exists.

    With n0 of the N cells in the lower class and S0 of the sum S, that variance is, up to a
    constant, (N S0 - n0 S)^2 / (n0 n1). It takes whole numbers and one division, so equally good
    splits have exactly equal variances, and "first" is well defined.
    """
    levels = (maps.detach() * 255).long().clamp(0, 255).flatten(-2)  # (..., N)
    counts = torch.zeros(*levels.shape[:-1], 256, dtype=torch.long, device=maps.device)
    counts.scatter_add_(-1, levels, torch.ones_like(levels))
    n0 = counts.cumsum(-1)
    sum0 = (counts * torch.arange(256, device=maps.device)).cumsum(-1)
    n, total = n0[..., -1:], sum0[..., -1:]
    dtype = torch.float32 if maps.device.type == "mps" else torch.float64
    between = (n * sum0 - n0 * total).to(dtype) ** 2 / (n0 * (n - n0)).clamp(min=1).to(dtype)
    best = between.amax(-1, keepdim=True)
    return (between == best).long().argmax(-1)  # without a split: level 0


def component(mask: Tensor, at: Tensor, asking: int | None = None) -> Tensor:
    """The 4-connected part of each mask (B,S,h,w) that holds cell `at` (B,S), as a mask.

    It is empty if the mask does not hold that cell. `asking`: how many rings it grows between two
    questions whether it is complete. A GPU waits for each question, so there it is 8, elsewhere 1;
    rings after the last change nothing.
    """
    asking = asking or (8 if mask.is_cuda else 1)
    part = torch.zeros_like(mask).flatten(2).scatter(2, at[:, :, None], True).view_as(mask) & mask
    while True:  # it grows by its neighbours: a few turns for a blob, up to h*w for a spiral
        before = part
        for _ in range(asking):
            part = _ring(part) & mask
        if torch.equal(part, before):
            return part


def _ring(part: Tensor) -> Tensor:
    """A mask (...,h,w) and its neighbours above, below and on both sides."""
    spread = part.clone()
    spread[..., 1:, :] |= part[..., :-1, :]
    spread[..., :-1, :] |= part[..., 1:, :]
    spread[..., 1:] |= part[..., :-1]
    spread[..., :-1] |= part[..., 1:]
    return spread
