"""The table `METHODS` of noise methods: name -> a function that finds the initial noise of a batch.

A method is a function `(sd, batch, say) -> Found`. It takes a `Batch`, whose images differ in
prompt, subjects and seed alone, and returns their unit noise. `say(message)` reports progress to
the user. To add a method, write it in a file of its own, call it from a function in this file, and
add this function to `METHODS`.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from minsd.guidance import Model
from minsd.noise import arrange, best, drivers, initno, stability
from minsd.noise import steer as steering
from minsd.noise.drivers import rounded
from minsd.noise.initial import noise as unit_noise
from minsd.noise.layout import SizedLayout

Say = Callable[[str], None]


@dataclass(frozen=True)
class Batch:
    """Images whose initial noise is found together, and the settings of the run that will then
    sample them."""

    prompts: list[str]
    seeds: list[int]
    subjects: list[list[str | int] | None]  # per image; None: not given
    negative_prompt: str
    guidance_scale: float
    steps: int
    sampler: str
    karras: bool
    height: int  # pixels
    width: int
    layout: SizedLayout | None = None
    score: str | None = None  # "attention" or "stability": how candidates are ranked
    candidates: list[list[int]] | None = None  # per image: the seeds to choose among, its own first
    optimize_steps: int = 100
    optimize_mode: str = "full"
    steer: steering.Run | None = None  # an objective to use instead of the score

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (4, h, w) of one image's latents."""
        return 4, self.height // 8, self.width // 8

    @property
    def size(self) -> dict[str, Any]:
        """The keyword arguments for the images' size, as the noise methods take them."""
        return {"height": self.height, "width": self.width}

    @property
    def guidance(self) -> dict[str, Any]:
        """The keyword arguments for guidance, as the noise methods take them."""
        return {"negative_prompt": self.negative_prompt, "guidance_scale": self.guidance_scale}

    @property
    def run(self) -> dict[str, Any]:
        """The keyword arguments for the steps of the run, as the noise methods take them."""
        return {"steps": self.steps, "sampler": self.sampler, "karras": self.karras}


class Found(NamedTuple):
    """The noise that a method found for a batch, and what to record and save for each image."""

    noise: Tensor  # (B, 4, h, w), unit normal unless the method optimised it
    notes: list[dict[str, Any]]  # per image: further settings to record, such as the chosen seed
    extras: list[dict[str, Image.Image | Tensor]]  # per image: further files to save, by name


Method = Callable[[Model, Batch, Say], Found]


def random(sd: Model, batch: Batch, say: Say) -> Found:
    """Returns, as `Found`, the plain noise of each image's own seed."""
    return Found(unit_noise(batch.seeds, batch.shape), _each(batch), _each(batch))


def select(sd: Model, batch: Batch, say: Say) -> Found:
    """Chooses the best of each image's candidate seeds and returns their noise. If the batch has an
    objective (`batch.steer`), the best seed is that with the lowest loss. Otherwise the seeds are
    ranked by attention or by inversion stability (`batch.score`)."""
    if batch.steer is not None:
        found = batch.steer.select(_candidates(batch), batch.shape, say)
        notes = []
        for seed, one, record in zip(batch.seeds, found, batch.steer.records):
            scores = one.scores if one.seed in one.scores else {one.seed: one.score}
            notes.append(
                _selection(seed, one.seed, scores.keys(), scores.values(), "low") | {"objective": record}
            )
        return Found(torch.cat([one.noise for one in found]), notes, _each(batch))
    if batch.score == "attention":
        seeds, notes = _best_by_attention(sd, batch, batch.layout, say)
        return Found(unit_noise(seeds, batch.shape), notes, _each(batch))
    asked = batch.size | batch.guidance
    seeds = []
    notes = []
    extras: list[dict[str, Image.Image | Tensor]] = []
    for k, (prompt, candidates) in enumerate(zip(batch.prompts, _candidates(batch))):
        told = drivers.part_of(say, k, len(batch.seeds))
        chosen = stability.select(sd, prompt, candidates, progress=told, **asked)
        seeds.append(chosen.seed)
        scores = chosen.scores
        notes.append(_selection(candidates[0], chosen.seed, scores.keys(), scores.values(), chosen.better))
        extras.append({"candidates": stability.sheet(sd, prompt, chosen, **asked, **batch.run)})
    return Found(unit_noise(seeds, batch.shape), notes, extras)


def optimize(sd: Model, batch: Batch, say: Say) -> Found:
    """Optimises the noise of each image's seed by gradient descent, and returns the optimised
    noise. The loss is the batch's objective (`batch.steer`) or, if there is none, 1 minus the
    inversion stability."""
    if batch.steer is not None:
        start = unit_noise(batch.seeds, batch.shape)
        found = batch.steer.optimize(start, _of_seeds(say, batch.seeds))
        records = [{"objective": record} for record in batch.steer.records]
        return Found(torch.cat([one.noise for one in found]), records, _each(batch))
    results = stability.optimize_batch(
        sd,
        batch.prompts,
        batch.seeds,
        mode=batch.optimize_mode,
        optimize_steps=batch.optimize_steps,
        progress=_of_seeds(say, batch.seeds),
        **batch.size,
        **batch.guidance,
    )
    notes = [{"stability": {"before": result.before, "after": result.score}} for result in results]
    return _optimised(results, notes, batch)


def initno_method(sd: Model, batch: Batch, say: Say) -> Found:
    """Runs InitNO (noise/initno.py), which optimises the noise of each image's seed, and returns
    the optimised noise. If `batch.score` is "attention", InitNO does not start from the image's own
    seed, but from the candidate seed with the best attention score."""
    seeds = batch.seeds
    notes = _each(batch)
    if batch.score == "attention":
        seeds, notes = _best_by_attention(sd, batch, None, say)
    results = initno.optimize_batch(
        sd, batch.prompts, batch.subjects, seeds, progress=_of_seeds(say, seeds), **batch.run, **batch.size
    )
    for note, result in zip(notes, results):
        note["initno"] = {
            "success": result.success,
            "rounds": result.rounds,
            "steps": result.steps,
            "losses": result.losses,
        }
    return _optimised(results, notes, batch)


def best_method(sd: Model, batch: Batch, say: Say) -> Found:
    """Chooses the best of each image's candidate seeds by the method of noise/best.py, and returns
    their noise. All candidates are scored by attention at the first timestep. The candidates with
    the best scores are then drafted (sampled for part of the steps), one after the other, until a
    draft is good enough. If none is, the candidate with the best draft is taken."""
    found = best.choose(
        sd,
        batch.prompts,
        batch.subjects,
        _candidates(batch),
        batch.shape,
        best.Course(batch.steps, batch.sampler, batch.karras, batch.guidance_scale, batch.negative_prompt),
        progress=_of_seeds(say, batch.seeds),
    )
    notes = []
    for asked, one in zip(batch.seeds, found):
        note = _selection(asked, one.seed, one.scores.keys(), one.scores.values(), "low")
        drafts = [{"seed": seed, "cross": rounded(cross)} for seed, cross in one.drafts.items()]
        notes.append(note | {"drafts": drafts, "met": one.met})
    return Found(unit_noise([one.seed for one in found], batch.shape), notes, _each(batch))


METHODS: dict[str, Method] = {
    "random": random,
    "initno": initno_method,
    "select": select,
    "optimize": optimize,
    "best": best_method,
}


# --- what they share --------------------------------------------------------------------------------------


def _of_seeds(say: Say, seeds: Sequence[int]) -> Callable[[int, str], None]:
    """Returns a function (b, message) that passes the message on to `say`, with the seed of image b
    before it."""
    return lambda b, message: say(drivers.prefixed(f"seed {seeds[b]}: ", message))


def _each(batch: Batch) -> list[dict]:
    return [{} for _ in batch.seeds]


def _candidates(batch: Batch) -> list[list[int]]:
    assert batch.candidates is not None, "a batch of a method that ranks candidates has some"
    return batch.candidates


def _selection(
    asked: int, seed: int, candidates: Iterable[int], scores: Iterable[float], better: str
) -> dict[str, Any]:
    """Makes the settings that record the choice of a seed, as a dict: the seed `asked` for, the
    chosen `seed`, and each of the `candidates` with its score. If `better` is "low", the scores are
    recorded as losses; if it is "high", as values to maximise."""
    return {
        "asked_seed": asked,
        "seed": seed,
        "candidates": [{"seed": s, "score": rounded(x)} for s, x in zip(candidates, scores)],
        "score_is": "loss" if better == "low" else "value",
    }


def _best_by_attention(
    sd: Model, batch: Batch, layout: SizedLayout | None, say: Say
) -> tuple[list[int], list[dict[str, Any]]]:
    """Chooses the best candidate seed of each image by attention. Returns (seeds, notes): the
    chosen seeds, and for each image the settings that record the choice.

    If `layout` has regions, the score of a candidate is that of `arrange.arrange`: how much of the
    attention to each caption's subjects falls inside the caption's region (higher is better).
    Otherwise it is `initno.attention_scores`, a loss that is high if a subject of the prompt gets
    little attention (lower is better). The UNet is evaluated on each candidate once, or once per
    region of the layout, and only as far as the last attention map.
    """
    chosen = []
    notes = []
    every = zip(batch.prompts, batch.subjects, _candidates(batch))
    for k, (prompt, subjects, candidates) in enumerate(every):
        told = drivers.part_of(say, k, len(batch.seeds))
        if layout is not None and layout.regions:
            with drivers.looks(sd, len(candidates) * len(layout.regions), told):
                scores = arrange.arrange(
                    sd, layout, candidates, steps=batch.steps, sampler=batch.sampler
                ).scores
            better = "high"
        else:
            with drivers.looks(sd, len(candidates), told):
                scores = initno.attention_scores(sd, prompt, subjects, candidates, **batch.run, **batch.size)
            better = "low"
        best = max(scores) if better == "high" else min(scores)
        chosen.append(candidates[scores.index(best)])
        notes.append(_selection(candidates[0], chosen[-1], candidates, scores, better))
        say(f"seed {chosen[-1]} has the best of {len(scores)} scores, {best:.3f}")
    return chosen, notes


def _optimised(results: Sequence[Any], notes: list[dict[str, Any]], batch: Batch) -> Found:
    for result in results:
        if result.note:
            warnings.warn(result.note, stacklevel=3)
    return Found(torch.cat([result.noise for result in results]), notes, _each(batch))
