"""Finds the tokens of a prompt's subjects, and computes their attention maps and five losses of
these maps.

Initial noise optimisation (InitNO: Guo et al., CVPR 2024, arXiv 2404.04650) and Attend-and-Excite
(Chefer et al., SIGGRAPH 2023, arXiv 2301.13826) predict from one UNet evaluation which subjects of
the prompt the image will show, and where. Two maps of each subject are used:

- M (h,w), from cross-attention C (h,w,77n). The start token and the last position are left out, C
  is sharpened over the tokens to softmax(100 C), the maps of the subject's tokens are averaged, and
  the mean is smoothed. The subject is expected to appear at the peak of M.
- A (h,w), the smoothed self-attention of the query at that peak. A is the region that the subject
  is expected to fill.

A `Look` (noise/look.py) gives both maps, differentiably, from one UNet evaluation that ends after
the last recording layer. Every loss takes the maps of a whole batch and returns one value per
image, (B,); lower is better. The images of a batch may have different numbers of subjects:
`present` (B,S) is True for those of the S subject slots that an image uses, and None means that all
are used. All functions also work in float64, and none loops over pixels.
"""

import math
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
    """Finds the subjects of a prompt: splits the prompt at "and", "with", BREAK and commas, and
    returns the last word of each part.

    A word that occurs more than once in the prompt is numbered: `cat#1` is the first occurrence of
    "cat", `cat#2` the second. Raises ValueError for a prompt without any word.
    """
    return [name for name, _ in _chosen(prompt)]


def _chosen(prompt: str) -> list[tuple[str, Word]]:
    """Finds the subjects of a prompt as `automatic_subjects` does. Returns (name, word) pairs: the
    name that `automatic_subjects` returns, and the `Word`, which holds the subject's place in the
    prompt."""
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
    """Finds the tokens of a prompt's subjects. Returns one list of token positions per subject.
    Runs no network.

    `subjects` are words of the prompt (a list, or one string with commas), token indices (0 is the
    start token), or None for `automatic_subjects`. Raises ValueError if there are no subjects, and
    for a subject that is not in the prompt or is given twice.
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
    return places


def _index(text: TextEncoder, prompt: str, index: int) -> int:
    """Returns the token index `index` after checking that it belongs to a word of the prompt.
    Raises ValueError if it does not."""
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
    """Returns weights (B,S,length) that select the tokens of each subject: multiplied with the maps
    of all tokens, they give the mean map of each subject's tokens. `places` holds, for each image,
    the token positions of each subject.

    S is the largest number of subjects of an image. An image with fewer has rows of zeros for the
    rest. `length` defaults to the smallest multiple of 77 (a chunk) that includes all positions.
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
    """Smooths maps (...,h,w) by a 3x3 kernel with reflected edges. If an axis has a single cell,
    that cell counts as its own neighbour on both sides.

    At distance d along an axis the kernel's weight is exp(-(d / (2 s))^2) with s = 0.5, normalised
    to sum 1. This is InitNO's kernel, not the usual Gaussian exp(-d^2 / (2 s^2)).
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
    """Averages the maps of each subject's tokens. `maps` (B,h,w,K) are those of all K tokens, and
    `select` (B,S,k) is the result of `selector`, for the first k of them (k <= K). Returns
    (B,S,h,w)."""
    return torch.einsum("bhwk,bsk->bshw", maps[..., : select.shape[-1]], select.to(maps))


def subject_maps(cross: Tensor, select: Tensor) -> Tensor:
    """Returns the subjects' maps M (B,S,h,w), which show where each subject gets attention. `cross`
    (B,h,w,77n) is recorded cross-attention C to the n chunks of 77 tokens. `select` (B,S,77m), the
    result of `selector`, may cover only the first m chunks (m <= n).

    First, C is sharpened over the tokens to softmax(100 C), without the first and the last position
    of each chunk. Then the maps of each subject's tokens are averaged, and the mean is smoothed.
    """
    sharp = (100 * inner(cross)).softmax(dim=-1)  # (B, h, w, 75n)
    return smooth(mean_maps(sharp, inner(select)))


def inner(tokens: Tensor) -> Tensor:
    """Returns `tokens` (...,K) without the first and the last position of every chunk of 77. If K
    is less than 77, all K positions count as one chunk."""
    chunks = max(1, tokens.shape[-1] // CHUNK)
    return tokens.unflatten(-1, (chunks, -1))[..., 1:-1].flatten(-2)


def peaks(maps: Tensor) -> Tensor:
    """Returns the index (B,S) of the cell with the largest value in each map (B,S,h,w), with cells
    numbered row by row. Has no gradient."""
    return maps.detach().flatten(2).argmax(dim=-1)


def claims(self_maps: Tensor, at: Tensor) -> Tensor:
    """Returns the subjects' maps A (B,S,h,w), which show the region that each subject is expected
    to fill. `self_maps` (B,h,w,h*w) is recorded self-attention, and `at` (B,S) holds the index of
    one cell per subject, at which the subject's map M is largest (see `peaks`). A is the smoothed
    self-attention of the query at this cell."""
    h, w, n = self_maps.shape[1:]
    rows = self_maps.flatten(1, 2).gather(1, at[:, :, None].expand(-1, -1, n))  # (B, S, h*w)
    return smooth(rows.unflatten(2, (h, w)))


def listed_timesteps(
    sd: Model, steps: int | None = None, sampler: str | None = None, karras: bool = False
) -> list[Timestep]:
    """Returns every timestep of a run, in order. If `steps` or `sampler` is None, the model's
    default is taken; `karras` selects Karras noise levels. Raises ValueError for an unknown sampler
    and for a number of steps that the sampler cannot take."""
    steps = sd.config.steps if steps is None else steps
    return timesteps(sampler or sd.config.sampler, sd.schedule, steps, karras=karras)


# --- losses, one value per image -----------------------------------------------------------------


def _present(maps: Tensor, present: Tensor | None) -> Tensor:
    return maps.new_ones(maps.shape[:2], dtype=torch.bool) if present is None else present


def cross_response(maps: Tensor, present: Tensor | None = None) -> Tensor:
    """Returns InitNO's response loss (B,) of the subjects' maps M (B,S,h,w) (see `subject_maps`).
    The loss is large if one of the subjects gets little attention: it is the maximum over the
    subjects of 1 - max(M). `present` (B,S) is True for the subjects that an image has; None means
    all."""
    highest = maps.flatten(2).gather(2, peaks(maps)[:, :, None])[:, :, 0]  # (B, S)
    return (1 - highest).masked_fill(~_present(maps, present), 0.0).max(dim=1).values


def self_conflict(claims: Tensor, present: Tensor | None = None) -> Tensor:
    """Returns InitNO's conflict loss (B,) of the subjects' maps (B,S,h,w) that the function
    `claims` returns. The loss measures how far the regions of the subjects overlap. For two
    subjects with the maps A and A' it is sum(min(A, A')) / sum(A + A'); this is averaged over all
    pairs of subjects, and 0 for a single subject. `present` (B,S) is True for the subjects that an
    image has; None means all."""
    present = _present(claims, present)
    i, j = torch.triu_indices(claims.shape[1], claims.shape[1], offset=1, device=claims.device)
    a, b = claims[:, i], claims[:, j]  # (B, pairs, h, w)
    both = present[:, i] & present[:, j]  # (B, pairs)
    overlap = torch.minimum(a, b).sum(dim=(2, 3)) / ((a + b).sum(dim=(2, 3)) + 1e-6)
    return (overlap * both).sum(dim=1) / both.sum(dim=1).clamp(min=1)


def clean_background(maps: Tensor, present: Tensor | None = None) -> Tensor:
    """Returns a loss (B,) of the subjects' maps M (B,S,h,w) (see `subject_maps`) that is large if a
    subject gets attention in more than one place. `present` (B,S) is True for the subjects that an
    image has; None means all.

    The cells of a map at or above Otsu's threshold that are connected to the map's peak form the
    main part. The loss is the largest value of M outside the main part, summed over the subjects. A
    value counts only if it exceeds the smallest value inside the main part.
    """
    with torch.no_grad():
        part = component(maps >= otsu(maps)[:, :, None, None].to(maps.dtype) / 255, peaks(maps))
    inside = maps.masked_fill(~part, torch.inf).flatten(2).amin(dim=2)  # (B, S)
    outside = maps.masked_fill(part, -torch.inf).flatten(2).amax(dim=2)  # -inf: nothing is outside
    return outside.where((outside > inside) & _present(maps, present), 0.0).sum(dim=1)


def alignment(maps: Tensor, running: Tensor, present: Tensor | None = None) -> Tensor:
    """Returns a loss (B,) that is large if attention moves: the mean absolute difference between
    the subjects' maps M (B,S,h,w) and their running mean over the steps so far (`running`, of the
    same shape), summed over the subjects. `present` (B,S) is True for the subjects that an image
    has; None means all.

    InitNO's published program averages the maps of all tokens over the steps. Since selecting and
    smoothing are linear, averaging the maps of the subjects gives the same result.
    """
    return ((maps - running).abs().mean(dim=(2, 3)) * _present(maps, present)).sum(dim=1)


def kl_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    """Returns KL(N(mu, exp(log_var)) || N(0, 1)), averaged over the elements of each image, (B,).
    `mu` and `log_var` are (B,...)."""
    return -0.5 * (1 + log_var - mu**2 - log_var.exp()).flatten(1).mean(dim=1)


# --- image processing, exact ---------------------------------------------------------------------


def otsu(maps: Tensor) -> Tensor:
    """Returns Otsu's threshold (1979) of each map. `maps` are (...,h,w) with values in 0..1; the
    thresholds are integers from 0 to 255, in a tensor of the leading shape (...).

    Values are scaled by 255 and truncated to 256 levels. Each level splits the cells into two
    classes: up to the level, and above it. The threshold is the first level at which the variance
    between the classes is largest, or 0 if all cells have the same level.

    Let n0 of the N cells be in the lower class and n1 in the upper one, and let the levels of the
    lower class sum to S0 and all levels to S. Up to a constant, the variance is (N S0 - n0 S)^2 /
    (n0 n1). It is computed from whole numbers by one division. So equally good splits have exactly
    equal variances, and the first of them is well defined.
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
    """Returns, for each mask (B,S,h,w), the mask of those cells that are connected to the cell with
    index `at` (B,S) by steps up, down, left and right within the mask. The result is empty if the
    mask is False at that cell.

    The component grows from the cell by one ring of neighbours at a time. `asking` is the number of
    rings between two checks whether the component is complete; it does not change the result. By
    default it is 8 on a GPU, where every check makes the program wait for the GPU, and 1 elsewhere.
    """
    asking = asking or (8 if mask.is_cuda else 1)
    part = torch.zeros_like(mask).flatten(2).scatter(2, at[:, :, None], True).view_as(mask) & mask
    while True:  # a few rings for a blob, up to h*w for a spiral
        before = part
        for _ in range(asking):
            part = _ring(part) & mask
        if torch.equal(part, before):
            return part


def _ring(part: Tensor) -> Tensor:
    """Returns a mask (...,h,w) with the cells above, below, left and right of its True cells
    added."""
    spread = part.clone()
    spread[..., 1:, :] |= part[..., :-1, :]
    spread[..., :-1, :] |= part[..., 1:, :]
    spread[..., 1:] |= part[..., :-1]
    spread[..., :-1] |= part[..., 1:]
    return spread
