"""Selects and optimises noise by inversion stability: how well inversion recovers the noise
(Qi, Bai, Xiong & Xie 2024, arXiv 2407.14041).

A noise is denoised to latents, the latents are inverted to a noise' by DDIM (samplers/ddim.py), and
noise' is compared with the noise. The stability score is

    s(noise) = cos(noise, noise'),   noise' = invert(denoise(noise, prompt)),

where the noises of each image are flattened to vectors. The VAE is not used. The paper claims that
noises of high s make better images; bench/stability.py counts whether they do. `select` takes the
best of many seeds. `optimize` descends J = 1 - s, with one of two gradients:

- "full" differentiates through denoising and inversion. Every step is checkpointed (Chen et al.
  2016), so memory holds the activations of one step and the latents between steps, whatever the
  number of steps.
- "detach" holds v = noise' / |noise'| constant. With u = noise / |noise| the gradient is then
  -(v - s u) / |noise|. It is perpendicular to the noise, and its norm is the sine of the angle
  between noise and noise', divided by |noise|. No network is differentiated.

The authors published no program. Where the paper leaves something open, minsd's choice is an
argument, and its default is documented there.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minsd import image
from minsd.config import check_size, overflow_advice
from minsd.guidance import Model, counted
from minsd.noise import drivers
from minsd.noise.drivers import Selection
from minsd.noise.initial import noise as draw_noise
from minsd.noise.look import Told
from minsd.samplers import SAMPLERS, check, ddim
from minsd.samplers.schedule import Predictor, Steps, Timestep

# The samplers whose steps are functions of x and t alone. The others cannot be inverted usefully.
MEMORYLESS = ("ddim", "euler", "heun")
PAPER_NUMBERS = 65_536  # size of the latents that the paper's learning rate of 100 is meant for


class Trip:
    """The round trip of unit noise through the model: noise is denoised to latents, and the latents
    are inverted to a noise again. The argument `rows` (b,) of the methods holds each image's number
    in the batch.

    `prompts` is one for all images, or a list with one per image. Denoising takes `steps` steps of
    `sampler` at `guidance_scale` (None: the model's, 7.5 for Stable Diffusion). Inversion takes the
    same number of DDIM steps at `guidance_invert`, without fixed-point iteration, which would
    recover every noise and so give all noises the same score.

    The constructor raises ValueError for a sampler that cannot be inverted, an `eta` other than 0,
    a number of steps that the schedule does not allow, a schedule that begins at zero terminal SNR,
    and guidance scales that are not finite.
    """

    def __init__(
        self,
        sd: Model,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str = "",
        steps: int = 10,
        guidance_scale: float | None = None,
        guidance_invert: float = 1.0,
        sampler: str = "ddim",
        eta: float = 0.0,
    ):
        check(sampler)
        if sampler not in MEMORYLESS or eta != 0:
            culprit = f"the sampler {sampler}" if sampler not in MEMORYLESS else f"eta {eta}"
            raise ValueError(
                "stability needs a sampler that can be inverted, but "
                f"{culprit} has noise or memory: use ddim at eta 0"
            )
        guidance_scale = sd.config.guidance(guidance_scale)
        if not math.isfinite(guidance_scale) or not math.isfinite(guidance_invert):
            scales = f"{guidance_scale} and {guidance_invert}"
            raise ValueError(f"guidance_scale and guidance_invert must be numbers, not {scales}")
        visited = sd.schedule.timesteps(steps)  # raises for a wrong number of steps
        sd.schedule.check_signal(
            visited, "inversion", "take another model, or choose noise by attention (--score attention)"
        )
        self.sd = sd
        self.steps = steps
        self.sampler = sampler
        self.guidance_scale = guidance_scale
        self.guidance_invert = guidance_invert
        # Both directions share this level, whatever the sampler's own.
        self.final = "zero" if sd.schedule.config.set_alpha_to_one else "abar0"
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        shared = len(set(prompts)) == 1
        self.cond = sd.encode_prompt(prompts[:1] if shared else prompts)  # (1 or B, 77, D)
        self.uncond = sd.encode_prompt([negative_prompt])  # (1, 77, D)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latents: float64 for a float64 network, otherwise float32. The network
        runs in its own precision."""
        return torch.promote_types(self.sd.dtype, torch.float32)

    def __call__(self, noise: Tensor, rows: Tensor, checkpointed: bool = False) -> Tensor:
        """Denoises `noise` (b,4,h,w) to latents, and inverts the latents. Returns the noise
        (b,4,h,w) that the inversion finds. `rows` (b,) holds each image's number in the batch. With
        `checkpointed`, activations are recomputed when the result is differentiated, which saves
        memory. The grad mode is not changed."""
        return self.up(self.down(noise, rows, checkpointed), rows, checkpointed)

    def down(self, noise: Tensor, rows: Tensor, checkpointed: bool = False) -> Tensor:
        """Denoises `noise` (b,4,h,w) to latents (b,4,h,w) and returns them. `rows` (b,) holds each
        image's number in the batch. With `checkpointed`, activations are recomputed when the result
        is differentiated, which saves memory."""
        predict = self._predictor(self.guidance_scale, rows, checkpointed)
        sample = SAMPLERS[self.sampler]
        return _last(sample(predict, noise, self.sd.schedule, self.steps, final=self.final))

    def up(self, latents: Tensor, rows: Tensor, checkpointed: bool = False, iterations: int = 0) -> Tensor:
        """Inverts `latents` (b,4,h,w) by DDIM to noise (b,4,h,w) and returns it. `rows` (b,) holds
        each image's number in the batch; `iterations` is the number of fixed-point iterations of
        each step (`ddim.invert`). With `checkpointed`, activations are recomputed when the result
        is differentiated, which saves memory."""
        predict = self._predictor(self.guidance_invert, rows, checkpointed)
        how = {"iterations": iterations, "final": self.final}
        return _last(ddim.invert(predict, latents, self.sd.schedule, self.steps, **how))

    def _predictor(self, scale: float, rows: Tensor, checkpointed: bool) -> Predictor:
        cond = self.cond if len(self.cond) == 1 else self.cond[rows]
        predict = self.sd.predictor(cond, self.uncond, scale)

        def in_network_dtype(x: Tensor, t: Timestep) -> Tensor:
            return predict(x.to(self.sd.dtype), t).to(x.dtype)

        def recomputed(x: Tensor, t: Timestep) -> Tensor:
            return checkpoint(in_network_dtype, x, t, use_reentrant=False)

        return recomputed if checkpointed else in_network_dtype


def _last(run: Steps) -> Tensor:
    return deque(run, maxlen=1)[0][2]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosine of the angle between a and b for each image, (B,). Both are (B,...), and
    the elements of an image are taken as one vector."""
    a, b = a.flatten(1), b.flatten(1)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))


# --- scores --------------------------------------------------------------------------------------


@dataclass
class Scores:
    """The inversion stability of several noises, and the number of UNet evaluations that the
    computation took."""

    scores: list[float]  # -1..1, one per noise; nan where sampling overflowed
    rows: int  # UNet evaluations: per noise and step 3 (4 with guidance both ways, 2 without)


@torch.no_grad()
def score(
    sd: Model,
    prompt: str | Sequence[str],
    noise: Tensor | Sequence[int],
    *,
    height: int | None = None,
    width: int | None = None,
    **trip: Any,
) -> Scores:
    """Computes the inversion stability s of noises: the cosine between a noise and the noise that
    DDIM inversion recovers from the latents denoised from it. `noise` holds K noises (K,4,h,w), or
    seeds, whose noises are made for images of height x width pixels (None: the model's size).

    `prompt` is one for all noises, or a list with one per noise. `trip` are the settings of `Trip`:
    `negative_prompt`, `steps` (10), `guidance_scale`, `guidance_invert` (1), `sampler` ("ddim") and
    `eta` (0). As many noises are processed at a time as `sd.batch_size` allows; scores depend on
    this number by no more than rounding.

    Raises ValueError, before any network runs, for settings that `Trip` refuses, and for prompts or
    shapes that do not fit.
    """
    noise = _noises(sd, prompt, noise, height, width)
    travel = Trip(sd, prompt, **trip)
    scores: list[float] = []
    size = sd.batch_size(8 * noise.shape[-2], 8 * noise.shape[-1])
    with counted(sd.unet) as rows:
        for part in torch.arange(len(noise)).split(size):
            x = noise[part].to(sd.device, travel.dtype)
            scores += cosine(x, travel(x, part)).clamp(-1, 1).tolist()  # rounding may exceed 1
    return Scores(scores, sum(rows))


def _noises(
    sd: Model,
    prompt: str | Sequence[str],
    noise: Tensor | Sequence[int],
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Returns the noises (B,4,h,w) that are given, or those of the given seeds for images of height
    x width pixels (None: the model's size). Raises ValueError for an image size or a shape that is
    not possible, and if `prompt` is a list without exactly one prompt per noise."""
    if not isinstance(noise, Tensor):
        height, width = height or sd.config.size, width or sd.config.size
        check_size(height, width)
        shape = (4, height // 8, width // 8)
        noise = draw_noise(list(noise), shape) if len(noise) else torch.empty(0, *shape)
    if noise.ndim != 4 or not len(noise):
        raise ValueError(f"noise must be of shape (images, 4, h, w), not {tuple(noise.shape)}")
    if not isinstance(prompt, str) and len(prompt) != len(noise):
        counts = f"{len(prompt)} for {len(noise)} noises"
        raise ValueError(f"give one prompt for all noises, or one prompt per noise, not {counts}")
    return noise


def select(
    sd: Model,
    prompt: str,
    seeds: Sequence[int],
    *,
    worst: bool = False,
    known: Mapping[int, float] | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: Callable[[str], None] | None = None,
    **trip: Any,
) -> Selection:
    """Chooses among `seeds` the one whose noise has the highest inversion stability or, if `worst`
    is True (for experiments), the lowest. Among equal scores the first seed is taken. Images have
    height x width pixels (None: the model's size).

    `known` holds scores (seed -> score) of the same prompt and settings, which are not computed
    again. A seed that is given twice is scored once. `progress(message)` is called after every
    batch with a message such as "20/100 best 0.912 (seed 7)". `trip` are the settings of `Trip`.

    Raises ValueError for settings that `Trip` refuses and for an image size that is not possible.
    Raises FloatingPointError if every candidate's score is NaN.
    """
    Trip(sd, prompt, **trip)  # raises its errors before any noise is scored
    height, width = height or sd.config.size, width or sd.config.size
    check_size(height, width)
    spent = 0

    def scored(noise: Tensor) -> list[float]:
        nonlocal spent
        result = score(sd, prompt, noise, **trip)
        spent += result.rows
        return result.scores

    chosen = drivers.select(
        scored,
        seeds,
        (4, height // 8, width // 8),
        at_once=sd.batch_size(height, width),
        better="high",
        known=known,
        worst=worst,
        advice=overflow_advice(sd.dtype),
        progress=progress,
    )
    chosen.rows = spent
    return chosen


def sheet(sd: Model, prompt: str, selection: Selection, count: int = 4, **how: Any) -> Image.Image:
    """Draws the images of the `count` best candidates of a selection and of the `count` worst.
    Returns a contact sheet of them with seeds and scores, the worst below the best. If there are no
    more than `count` candidates, the sheet has only the first row.

    `how` are settings of the images, passed to `sd(...)`.
    """
    best, worst = selection.ranked[:count], selection.ranked[-count:]
    seeds = list(dict.fromkeys(best + worst))
    drawn = dict(zip(seeds, sd(prompt, seeds, **how)))
    shown = best + worst if len(selection.scores) > count else best
    captions = [f"{s}: {selection.scores[s]:.3f}" for s in shown]
    return image.contact_sheet([drawn[s] for s in shown], len(best), captions)


# --- optimisation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Descent:
    """Settings of `optimize`: gradient descent with momentum on 1 - s, where s is the inversion
    stability. The constructor raises ValueError for a setting that is out of range.

    The paper's learning rate of 100 is for latents of 65,536 numbers. For latents of d numbers,
    gradients are proportional to 1 / sqrt(d) and |noise| to sqrt(d). A rate proportional to d
    therefore moves the noise by the same fraction of |noise| at every size, and is the default.

    The norm of unit noise is close to sqrt(d), but the descent may change the norm. A warning is
    given when |noise| / sqrt(d) leaves the range `drivers.NORMAL`. With `rescale`, the noise gets
    norm sqrt(d) again after every step.
    """

    mode: str = "full"  # or "detach": see the top of this file
    optimize_steps: int = 100
    lr: float | None = None  # None: the paper's 100, scaled to the size of the latents
    momentum: float = 0.5  # the paper's
    keep: str = "last"  # which iterate is the result: the "last" or the "best"
    rescale: bool = False
    # False saves one of the two forward passes of "full", if all activations fit into memory.
    checkpointed: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("full", "detach"):
            raise ValueError(f"mode must be 'full' or 'detach', not {self.mode!r}")
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep must be 'last' or 'best', not {self.keep!r}")
        if self.optimize_steps < 0:
            raise ValueError(f"optimize_steps must be 0 or more, not {self.optimize_steps}")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise ValueError(f"lr must be 0 or more, not {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be 0 or more and below 1, not {self.momentum}")


@dataclass
class Result:
    """The optimised noise of one image, and the inversion stability (score) of the noise before,
    during and after the optimisation."""

    noise: Tensor  # (1, 4, h, w) float32 (float64 in a float64 model) on the CPU
    score: float = math.nan  # of this noise
    before: float = math.nan  # of the noise that the optimisation began from
    # For each iterate: the score, norm (|noise| / sqrt(d)), mean and std.
    history: list[dict[str, float]] = field(default_factory=list)
    rows: float = 0  # UNet evaluations for this image, recomputed ones included
    note: str | None = None  # what went wrong, if anything


def optimize(
    sd: Model,
    prompt: str,
    seed: int | Tensor,
    *,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Result:
    """Optimises one noise for inversion stability: the noise of a seed, or a noise (1,4,h,w). Calls
    `optimize_batch`, which explains `settings`, with a batch of one. `progress(message)` is called
    after every step."""

    def report(b: int, message: str) -> None:
        if progress is not None:
            progress(message)

    noise = seed if isinstance(seed, Tensor) else [seed]
    return optimize_batch(sd, [prompt], noise, progress=report, **settings)[0]


def optimize_batch(
    sd: Model,
    prompts: str | Sequence[str],
    noise: Tensor | Sequence[int],
    *,
    height: int | None = None,
    width: int | None = None,
    progress: Callable[[int, str], None] | None = None,
    **settings: Any,
) -> list[Result]:
    """Optimises noises by gradient descent on 1 - s, where s is the inversion stability (see
    `score`). `noise` holds B noises (B,4,h,w), or seeds, whose noises are made for images of height
    x width pixels (None: the model's size). Returns one Result per image. A result does not depend
    on the other images of the batch.

    `settings` are fields of `Descent` and arguments of `Trip`. `progress(b, message)` is called
    after every step of image b with a message such as "step 7/100 score 0.912 best 0.934 norm 1.002
    mean 0.001 std 1.002".

    Raises ValueError, before any network runs, for settings that `Descent` or `Trip` refuses, and
    for prompts or shapes that do not fit. If the score or the gradient of an image is not finite,
    the image's result is the noise that the descent started from, with a note.
    """
    own = {f.name: settings.pop(f.name) for f in fields(Descent) if f.name in settings}
    how = Descent(**own)
    noise = _noises(sd, prompts, noise, height, width)
    trip = Trip(sd, prompts, **settings)
    size = sd.batch_size(8 * noise.shape[-2], 8 * noise.shape[-1])
    if how.mode == "full":
        size = max(1, size // 2)  # a gradient needs more memory than a guided step
    results: list[Result] = []
    for part in torch.arange(len(noise)).split(size):
        with counted(sd.unet) as rows:
            found = _descend(trip, how, noise[part], part, progress)
        for result in found:
            result.rows = sum(rows) / len(part)
        results += found
    return results


def _descend(
    trip: Trip, how: Descent, start: Tensor, rows: Tensor, progress: Callable[[int, str], None] | None
) -> list[Result]:
    """Optimises the noises `start` (b,4,h,w) in one batch. `rows` (b,) holds each image's number in
    the whole batch. Returns one Result per image, in which the number of UNet evaluations is not
    set."""

    def evaluate(x: Tensor, rows: Tensor, mode: str) -> tuple[Told, Tensor]:
        scores, gradient = gradients(trip, x, rows, mode, how.checkpointed)
        return {"loss": -scores, "score": scores}, gradient

    found = drivers.optimize(
        lambda x, rows: evaluate(x, rows, how.mode),
        lambda x, rows: evaluate(x, rows, "score")[0],
        start,
        rows,
        drivers.Optimizing(
            steps=how.optimize_steps,
            lr=100.0 * start[0].numel() / PAPER_NUMBERS if how.lr is None else how.lr,
            momentum=how.momentum,
            norm="unit" if how.rescale else None,
            keep=how.keep,
        ),
        device=trip.sd.device,
        dtype=trip.dtype,
        describe=_describe,
        progress=progress,
    )
    results = []
    for one in found:
        history = [{name: v for name, v in told.items() if name != "loss"} for told in one.history]
        before = one.before.get("score", math.nan)
        results.append(Result(one.noise, one.after.get("score", math.nan), before, history, note=one.note))
    return results


def _describe(step: int, steps: int, history: list[dict[str, float]]) -> str:
    now = history[-1]
    best = max(h["score"] for h in history)
    numbers = " ".join(f"{name} {now[name]:.3f}" for name in ("norm", "mean", "std"))
    return f"step {step}/{steps} score {now['score']:.3f} best {best:.3f} {numbers}"


def gradients(
    trip: Trip, x: Tensor, rows: Tensor, mode: str, checkpointed: bool = True
) -> tuple[Tensor, Tensor]:
    """Computes the inversion stability s of the noises x (b,4,h,w), and the gradient of 1 - s with
    respect to x. Returns (scores, gradient), (b,) and (b,4,h,w). `rows` (b,) holds each image's
    number in the batch.

    `mode` is "full" (differentiates through denoising and inversion), "detach" (holds the recovered
    noise constant), or "score" (the gradient is zero). With `checkpointed`, mode "full" recomputes
    activations instead of storing them.
    """
    if mode == "full":
        # The gradient of a cosine is so small that float16 would lose it.
        scale = 1024.0 if trip.sd.dtype == torch.float16 else 1.0
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            s = cosine(leaf, trip(leaf, rows, checkpointed))
            gradient = torch.autograd.grad(-scale * s.sum(), leaf)[0] / scale
        return s.detach().clamp(-1, 1), gradient
    with torch.no_grad():
        back = trip(x, rows)
        s = cosine(x, back)
        if mode == "score":
            return s.clamp(-1, 1), torch.zeros_like(x)
        size = x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # |noise|
        u = x / size
        v = back / back.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return s.clamp(-1, 1), -(v - s.view(-1, 1, 1, 1) * u) / size


# --- inversion of an image -----------------------------------------------------------------------


@dataclass
class Inversion:
    """The noise that DDIM inversion finds for an image, and the image that DDIM makes from this
    noise."""

    noise: Tensor  # (1, 4, h, w) float32 on the CPU; DDIM with the same settings gives the image
    picture: Image.Image  # the reconstruction
    psnr: float  # of the reconstruction against the image, dB
    codec_psnr: float  # of the image through the VAE alone, dB; an exact inversion reaches it
    rows: int  # UNet evaluations


@torch.no_grad()
def invert_picture(
    sd: Model,
    picture: Image.Image,
    prompt: str = "",
    *,
    negative_prompt: str = "",
    steps: int = 50,
    guidance_scale: float = 1.0,
    guidance_invert: float = 1.0,
    iterations: int = 0,
    height: int | None = None,
    width: int | None = None,
) -> Inversion:
    """Crops and scales an image to height x width pixels (None: the model's size), inverts it to
    noise by DDIM, and reconstructs the image from this noise by DDIM. `prompt` and
    `negative_prompt` are used in both directions, with `guidance_invert` in the inversion and
    `guidance_scale` in the reconstruction.

    `iterations` is the number of fixed-point iterations of each inversion step. With 25 steps or
    more they make the inversion more exact; with fewer, larger steps they diverge. If
    `guidance_scale` or `guidance_invert` is not 1, the reconstruction is poor.

    Raises ValueError, before any network runs, for an image size that is not possible, a negative
    number of iterations, and settings that `Trip` refuses.
    """
    height, width = height or sd.config.size, width or sd.config.size
    check_size(height, width)
    if iterations < 0:
        raise ValueError(f"iterations must be 0 or more, not {iterations}")
    picture = image.fit(picture, width, height)
    trip = Trip(
        sd,
        prompt,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_invert=guidance_invert,
    )
    row = torch.zeros(1, dtype=torch.long)
    with counted(sd.unet) as rows:
        latents = sd.encode(picture).to(trip.dtype)
        noise = trip.up(latents, row, iterations=iterations)
        x = trip.down(noise, row)
    coded = sd.decode(latents)[0]
    back = sd.decode(x)[0]
    picture = image.from_tensor(image.to_tensor([picture]))[0]  # in 8 bits, like `back` and `coded`
    return Inversion(noise.float().cpu(), back, psnr(back, picture), psnr(coded, picture), sum(rows))


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Returns the peak signal-to-noise ratio, in dB, of two 8-bit images of the same size. It is
    infinite if the images are equal."""
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))
