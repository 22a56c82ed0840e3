"""Chooses a seed whose image is likely to show every subject, at little cost. Many seeds are
ranked, a few are drafted (sampled for a few steps), and one is drawn:

    1. rank    orders the candidates (seeds) by InitNO's attention score, for which each candidate
               takes one UNet evaluation that stops after the attention maps
    2. draft   in that order, runs a tenth of the run's steps from each candidate and evaluates the
               response loss (`losses.cross_response`, how little attention the most neglected
               subject gets); stops at the first candidate with a loss below LIMIT; if there is
               none, takes the candidate with the lowest loss
    3. draw    runs all steps from the chosen seed

Attention maps predict the image less well at the first timestep than after a few steps. A subject
that is neglected then hardly ever appears in the image. So most images need a single draft, and a
noise that would fail costs a tenth of a run instead of a whole run. (Verified drafts are an old
idea; Flash-BoN, arXiv 2607.04461, argues for them by wall-clock time.) The constants were chosen on
the embedded model: of 18 of its images with two subjects, those that show both had a response loss
of at most 0.15 after a tenth of the steps, and the others of at least 0.48. bench/results/README.md
lists the success rate and cost of this method.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise import drivers, initno, losses
from minsd.noise.drivers import Step
from minsd.noise.initial import noise as draw_noise
from minsd.noise.look import Ask, Course, Lift
from minsd.noise.losses import Subjects
from minsd.noise.objectives.initno import InitNO
from minsd.samplers import SAMPLERS
from minsd.samplers.random import generators
from minsd.samplers.schedule import Timestep

CANDIDATES = 8  # seeds to rank, per image
DRAFTS = 6  # at most, per image
PART = 0.1  # length of a draft, as a fraction of the run's steps
LIMIT = 0.3  # a draft is good enough if its response loss is below this


@dataclass
class Best:
    """The result of `choose` for one image: the chosen seed, and the scores of the image's
    candidate seeds. A draft is the first few steps of a run from a candidate's noise."""

    seed: int
    scores: dict[int, float]  # seed -> attention score at the first timestep
    drafts: dict[int, float] = field(default_factory=dict)  # seed -> response loss of its draft
    met: bool = False  # whether the chosen seed's draft was good enough


def check_steps(steps: int) -> None:
    """Raises ValueError if a run has fewer than two steps. A draft is the first steps of a run, and
    at least one step has to follow it."""
    if steps < 2:
        raise ValueError(
            "--init-noise best drafts the first steps of a run: give 2 --steps or more, or use select"
        )


def draft(
    sd: Model, prompts: Sequence[str], noise: Tensor, seeds: Sequence[int], stop: int, course: Course
) -> tuple[Tensor, Timestep]:
    """Runs the first `stop` steps of a run from `noise` (B,4,h,w). `course` holds the settings of
    the run; `prompts` and `seeds` have one item per image. The seeds are for samplers that add
    noise. Returns (x, t): the latents (B,4,h,w) after these steps, and the timestep of the next
    step."""
    visited = losses.listed_timesteps(sd, course.steps, course.sampler, course.karras)
    cond, uncond = sd.encode_prompt(list(prompts)), sd.encode_prompt([course.negative_prompt])
    predict = sd.predictor(cond, uncond, course.guidance_scale)
    options: dict[str, Any] = {"karras": True} if course.karras else {}
    x = noise.to(sd.device, sd.dtype)
    draws = generators(seeds, skip=noise.shape[1:])
    walk = SAMPLERS[course.sampler](predict, x, sd.schedule, course.steps, generator=draws, **options)
    for _, (_, _, x) in zip(range(stop), walk):  # noqa: B007
        pass
    return x, visited[stop]


@torch.no_grad()
def choose(
    sd: Model,
    prompts: Sequence[str],
    subjects: Sequence[Subjects],
    candidates: Sequence[Sequence[int]],
    shape: Sequence[int],
    course: Course,
    *,
    drafts: int = DRAFTS,
    limit: float = LIMIT,
    part: float = PART,
    progress: Callable[[int, str], None] | None = None,
) -> list[Best]:
    """Chooses each image's seed among its `candidates`, which are lists of seeds, one list per
    image. Returns one `Best` per image.

    First, all candidates of an image are ranked by `initno.attention_scores` at the first timestep.
    Then drafts are made from the candidates, the best-ranked first. A draft is the beginning of a
    run with the settings `course`: the fraction `part` of its steps. It is judged by its response
    loss, which is high if a subject gets little attention. An image gets at most `drafts` drafts,
    and none after a draft with a response loss below `limit`. The seed of the draft with the lowest
    response loss is chosen. Drafts of different images run in one batch.

    `subjects` has one item per image: words of the prompt, token indices, or None to find the
    subjects in the prompt (`losses.resolve`). `shape` is (4,h,w) of one image's noise. `progress(b,
    message)` is called with the progress of image b. Raises ValueError, before any network runs,
    for subjects that cannot be found and for a run of one step.
    """
    check_steps(course.steps)
    places = [losses.resolve(sd.text, *pair) for pair in zip(prompts, subjects, strict=True)]
    asks = [Ask(prompt, 0, tokens) for prompt, tokens in zip(prompts, places)]
    lift = Lift(sd, asks, InitNO(sd, asks))
    run: dict[str, Any] = {"steps": course.steps, "sampler": course.sampler, "karras": course.karras}
    stop = min(max(1, round(part * course.steps)), course.steps - 1)
    found = []
    for b, (prompt, words, seeds) in enumerate(zip(prompts, subjects, candidates, strict=True)):
        noise = draw_noise(list(seeds), shape)
        say = None if progress is None else partial(progress, b)
        with drivers.looks(sd, len(seeds), say and drivers.part_of(say, b, len(prompts))):
            scores = dict(zip(seeds, initno.attention_scores(sd, prompt, words, noise, **run)))
        found.append(Best(min(scores, key=scores.__getitem__), scores))
    going = list(range(len(found)))
    for turn in range(drafts):
        going = [b for b in going if not found[b].met and turn < len(found[b].scores)]
        if not going:
            break
        tried = [sorted(found[b].scores, key=found[b].scores.__getitem__)[turn] for b in going]
        noise = draw_noise(tried, shape)
        x, t = draft(sd, [prompts[b] for b in going], noise, tried, stop, course)
        told = lift.score(x.to(lift.dtype), torch.tensor(going, device=sd.device), t, stop)
        for b, seed, cross in zip(going, tried, told["cross"].tolist()):
            one = found[b]
            one.drafts[seed] = cross
            one.met = cross < limit
            one.seed = min(one.drafts, key=one.drafts.__getitem__)
            if progress is not None:
                progress(b, Step(f"draft {turn + 1}/{drafts} cross {cross:.3g}", turn + 1, drafts))
    return found
