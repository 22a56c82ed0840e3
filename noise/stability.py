"""Noise that inversion finds again: selection and optimisation by inversion stability (Qi, Bai, Xiong & Xie 2024, arXiv 2407.14041).

Denoise a noise to latents, invert these by DDIM (samplers/ddim.py), and compare what comes out with what went in:

    s(noise) = cos(noise, noise'),   noise' = invert(denoise(noise, prompt)),

each image's latents flattened; the VAE has no part in it. The paper's claim is that noises of high s make better pictures;
bench/stability.py counts whether they do. `select` takes the best of many seeds. `optimize` descends J = 1 - s, with the gradient

- "full": of the whole way there and back. Every step is checkpointed (Chen et al. 2016): kept are one step's activations
  and the latents between steps, whatever the number of steps;
- "detach": with v = noise' / |noise'| held constant, which with u = noise / |noise| is -(v - s u) / |noise|. It is perpendicular
  to the noise, its norm is the sine of the angle over |noise|, and nothing is differentiated.

The paper published no program. Where its text is silent, what we chose is an argument, and its default is named there.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minsd import image
from minsd.config import check_size
from minsd.guidance import counted
from minsd.noise.initial import noise as draw_noise
from minsd.samplers import SAMPLERS, check, ddim

MEMORYLESS = (
    "ddim",
    "euler",
    "heun",
)  # each step a function of x and t alone: the others have no inverse to speak of
PAPER_NUMBERS = 65_536  # in the latents that the paper's learning rate of 100 was meant for
NORMAL = (0.97, 1.03)  # |noise| / sqrt(d), within which it still looks to the network like noise


class Trip:
    """There and back for some prompts: unit noise (B,4,h,w) -> latents -> the noise that inversion finds.

    prompts: one for every image, or one each. Down in `steps` of `sampler` at `guidance_scale` (None: the model's, 7.5
    for Stable Diffusion), up by plain DDIM inversion in as many at `guidance_invert`. Never by fixed points: these
    bring every noise back. `eta` must be 0.
    """

    def __init__(
        self,
        sd,
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
            what = f"the sampler {sampler}" if sampler not in MEMORYLESS else f"eta {eta}"
            raise ValueError(
                f"stability needs a sampler that can be inverted, but {what} has noise or memory: use ddim at eta 0"
            )
        guidance_scale = sd.config.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(guidance_scale) or not math.isfinite(guidance_invert):
            raise ValueError(f"guidance must be a number, not {guidance_scale} down and {guidance_invert} up")
        sd.schedule.timesteps(steps)  # refuses what is no number of steps
        self.sd, self.steps, self.sampler, self.scales = sd, steps, sampler, (guidance_scale, guidance_invert)
        self.final = (
            "zero" if sd.schedule.config.set_alpha_to_one else "abar0"
        )  # both ways, whatever the sampler's own
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.cond = sd.encode_prompt(prompts[:1] if len(set(prompts)) == 1 else prompts)  # (1 or B, 77, D)
        self.uncond = sd.encode_prompt([negative_prompt])  # (1, 77, D)

    @property
    def wide(self) -> torch.dtype:
        """What latents are kept in: float32, or float64 where the network has it. The network runs in its own."""
        return torch.promote_types(self.sd.dtype, torch.float32)

    def __call__(self, noise: Tensor, rows: Tensor, checkpointed: bool = False) -> Tensor:
        """noise' (b,4,h,w) of images `rows`, whose noise (b,4,h,w) is given. The grad mode is the caller's."""
        return self.up(self.down(noise, rows, checkpointed), rows, checkpointed)

    def down(self, noise: Tensor, rows: Tensor, checkpointed: bool = False) -> Tensor:
        predict = self._predictor(self.scales[0], rows, checkpointed)
        return _end(SAMPLERS[self.sampler](predict, noise, self.sd.schedule, self.steps, final=self.final))

    def up(self, latents: Tensor, rows: Tensor, checkpointed: bool = False, iterations: int = 0) -> Tensor:
        predict = self._predictor(self.scales[1], rows, checkpointed)
        return _end(
            ddim.invert(
                predict, latents, self.sd.schedule, self.steps, iterations=iterations, final=self.final
            )
        )

    def _predictor(self, scale: float, rows: Tensor, checkpointed: bool):
        cond, dtype = self.cond if len(self.cond) == 1 else self.cond[rows], self.sd.dtype
        predict = self.sd.predictor(cond, self.uncond, scale)

        def wide(x, t):
            return predict(x.to(dtype), t).to(x.dtype)

        return (lambda x, t: checkpoint(wide, x, t, use_reentrant=False)) if checkpointed else wide


def _end(run: Iterator[tuple[int, int, Tensor]]) -> Tensor:
    return deque(run, maxlen=1)[0][2]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of each image's latents (B,...) as one vector -> (B,)."""
    a, b = a.flatten(1), b.flatten(1)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    scores: list[float]  # -1..1, one a noise; not a number where sampling overflowed
    rows: int  # UNet rows: 3 T a noise under guidance down alone, 4 T both ways, 2 T without


@torch.no_grad()
def score(
    sd,
    prompt: str | Sequence[str],
    noise: Tensor | Sequence[int],
    *,
    height: int | None = None,
    width: int | None = None,
    **trip,
) -> Scores:
    """The inversion stability of noises (K,4,h,w), or of seeds (height and width in pixels are theirs).

    prompt: one for all or one each. `trip`: `negative_prompt`, `steps` (10), `guidance_scale`, `guidance_invert` (1),
    `sampler` ("ddim"), `eta` (0); see `Trip`, and for its errors, which come before any network runs. As many noises at a
    time as `sd.batch_size` says; how many does not change the scores beyond rounding.
    """
    noise, _ = _noises(sd, prompt, noise, height, width)
    trip, found = Trip(sd, prompt, **trip), []
    with counted(sd.unet) as rows:
        for part in torch.arange(len(noise)).split(sd.batch_size(8 * noise.shape[-2], 8 * noise.shape[-1])):
            x = noise[part].to(sd.device, trip.wide)
            found += cosine(x, trip(x, part)).clamp(-1, 1).tolist()  # rounding leaves the interval
    return Scores(found, sum(rows))


def _noises(sd, prompt, noise, height=None, width=None) -> tuple[Tensor, int]:
    """Noises or seeds -> noises (B,4,h,w) and how many. ValueError where prompts or shapes do not fit."""
    if not isinstance(noise, Tensor):
        height, width = height or sd.config.size, width or sd.config.size
        check_size(height, width)
        noise = (
            draw_noise(list(noise), (4, height // 8, width // 8)) if len(noise) else torch.empty(0, 4, 1, 1)
        )
    if noise.ndim != 4 or not len(noise):
        raise ValueError(f"noise must be of shape (images, 4, h, w), at least one, not {tuple(noise.shape)}")
    if not isinstance(prompt, str) and len(prompt) != len(noise):
        raise ValueError(
            f"one prompt for all noises or one each: not {len(prompt)} prompts for {len(noise)} noises"
        )
    return noise, len(noise)


@dataclass
class Selection:
    """The seed taken, and every candidate's score."""

    seed: int
    noise: Tensor  # (1, 4, h, w) float32 on the CPU
    score: float
    scores: dict[int, float]  # seed -> score, in the order of the candidates
    rows: int  # UNet rows spent

    @property
    def ranked(self) -> list[int]:
        """Seeds, the most stable first; those without a score last."""
        return sorted(self.scores, key=lambda seed: _rank(self.scores[seed]), reverse=True)


def _rank(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def select(
    sd,
    prompt: str,
    seeds: Sequence[int],
    *,
    worst: bool = False,
    known: Mapping[int, float] | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: Callable[[str], None] | None = None,
    **trip,
) -> Selection:
    """The most stable of some seeds' noises, or the least (`worst`, for experiments). Equal scores: the first.

    `known` scores (seed -> score, of the same prompt and settings) are not computed again, nor is a seed given twice.
    `progress(message)` after every batch: "20/100 best 0.912 (seed 7)". `trip` and errors as in `score`; FloatingPointError
    where no candidate has a score.
    """
    if not len(seeds):
        raise ValueError("there are no seeds to select from: give at least one")
    Trip(sd, prompt, **trip)  # its errors come first
    known, shape = dict(known or {}), {"height": height, "width": width}
    open_seeds = [seed for seed in dict.fromkeys(seeds) if seed not in known]
    rows, size = 0, sd.batch_size(height or sd.config.size, width or sd.config.size)
    take, word = (min, "worst") if worst else (max, "best")

    def chosen() -> int | None:
        return take(
            (s for s in dict.fromkeys(seeds) if not math.isnan(known.get(s, math.nan))),
            key=known.get,
            default=None,
        )

    for at in range(0, len(open_seeds), size):
        part = open_seeds[at : at + size]
        result = score(sd, prompt, part, **shape, **trip)
        known.update(zip(part, result.scores))
        rows += result.rows
        if progress is not None and (seed := chosen()) is not None:
            done = sum(s in known for s in dict.fromkeys(seeds))
            progress(f"{done}/{len(dict.fromkeys(seeds))} {word} {known[seed]:.3f} (seed {seed})")
    if (seed := chosen()) is None:
        raise FloatingPointError(
            f"no candidate has a score: sampling in {sd.dtype} overflowed; try --dtype float32 or bfloat16"
        )
    noise, _ = _noises(sd, prompt, [seed], height, width)
    return Selection(seed, noise, known[seed], {s: known[s] for s in seeds}, rows)


def sheet(sd, prompt: str, selection: Selection, count: int = 4, **how) -> Image.Image:
    """The pictures of the `count` best and, in the row below, worst candidates, each with seed and score. `how` goes to `sd`."""
    best, worst = selection.ranked[:count], selection.ranked[-count:]
    seeds = list(dict.fromkeys(best + worst))
    drawn = dict(zip(seeds, sd(prompt, seeds, **how)))
    shown = best + worst if len(selection.scores) > count else best
    return image.contact_sheet(
        [drawn[s] for s in shown], len(best), [f"{s}: {selection.scores[s]:.3f}" for s in shown]
    )


# --- optimisation -----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """One image's optimised noise, and how it went."""

    noise: Tensor  # (1, 4, h, w) float32 (float64 in a float64 model) on the CPU
    score: float  # of this noise
    before: float  # of the noise it began from
    history: list[dict[str, float]] = field(
        default_factory=list
    )  # every iterate's score, norm (|noise| / sqrt(d)), mean, std
    rows: float = 0  # UNet rows spent on this image, recomputed ones included
    note: str | None = None  # what went wrong


def optimize(
    sd, prompt: str, seed: int | Tensor, *, progress: Callable[[str], None] | None = None, **options
) -> Result:
    """A seed's noise, or a noise (1,4,h,w), made more stable. Options, progress and errors: see `optimize_batch`."""
    tell = None if progress is None else lambda b, message: progress(message)
    return optimize_batch(
        sd, [prompt], seed if isinstance(seed, Tensor) else [seed], progress=tell, **options
    )[0]


def optimize_batch(
    sd,
    prompts: str | Sequence[str],
    noise: Tensor | Sequence[int],
    *,
    mode: str = "full",
    optimize_steps: int = 100,
    lr: float | None = None,
    momentum: float = 0.5,
    keep: str = "last",
    rescale: bool = False,
    checkpointed: bool = True,
    height: int | None = None,
    width: int | None = None,
    progress: Callable[[int, str], None] | None = None,
    **trip,
) -> list[Result]:
    """Gradient descent on 1 - s from noises (B,4,h,w) or seeds; a Result each, independent of the others of the batch.

    `mode`: "full" or "detach" (see the top of this file). SGD with the paper's `momentum`; `lr` is by default the paper's 100,
    for latents of 65,536 numbers, scaled to these: gradients go with 1 / sqrt(d) and |noise| with sqrt(d), so that an lr in
    proportion to d moves the noise by the same share of itself. The noise may leave the sphere of radius sqrt(d) where unit
    noise lives: a warning says so outside 0.97..1.03 of it, and `rescale` puts it back after every step. `keep`: the "last"
    iterate, or the "best". `checkpointed=False` keeps all activations of "full": faster by a forward pass, if they fit.
    `trip`: as in `score`.

    `progress(b, message)` follows image b: "step 7/100 score 0.912 best 0.934 norm 1.002 mean 0.001 std 1.002". ValueError for a
    caller's errors, before any network runs. A score or gradient that is not finite gives back the noise begun from, with a note.
    """
    if mode not in ("full", "detach"):
        raise ValueError(f"mode must be 'full' or 'detach', not {mode!r}")
    if keep not in ("last", "best"):
        raise ValueError(f"keep must be 'last' or 'best', not {keep!r}")
    if optimize_steps < 0 or not ((lr is None or 0 <= lr < math.inf) and 0 <= momentum < 1):
        raise ValueError(
            f"{optimize_steps} steps at lr {lr}, momentum {momentum}: steps and lr must be 0 or more, momentum in 0..1"
        )
    noise, count = _noises(sd, prompts, noise, height, width)
    lr = 100.0 * noise[0].numel() / PAPER_NUMBERS if lr is None else lr
    trip = Trip(sd, prompts, **trip)
    size = sd.batch_size(8 * noise.shape[-2], 8 * noise.shape[-1])
    size = max(1, size // 2) if mode == "full" else size  # a gradient keeps more than a guided step does
    results = []
    for part in torch.arange(count).split(size):
        with counted(sd.unet) as rows:
            results += _descend(
                trip,
                noise[part],
                part,
                mode,
                optimize_steps,
                lr,
                momentum,
                keep,
                rescale,
                checkpointed,
                progress,
            )
        for result in results[-len(part) :]:
            result.rows = sum(rows) / len(part)
    return results


def _descend(
    trip, start, part, mode, optimize_steps, lr, momentum, keep, rescale, checkpointed, progress
) -> list[Result]:
    x = start.to(trip.sd.device, trip.wide)
    root, velocity = x[0].numel() ** 0.5, torch.zeros_like(x)
    results = [Result(s[None].cpu(), math.nan, math.nan) for s in start]
    warned = [False] * len(x)
    for step in range(optimize_steps + 1):
        last = step == optimize_steps  # it is only scored
        scores, gradient = gradients(trip, x, part, "score" if last else mode, checkpointed)
        finite = scores.isfinite() & gradient.flatten(1).isfinite().all(dim=1)
        told = torch.stack(
            [scores, x.flatten(1).norm(dim=1) / root, x.flatten(1).mean(dim=1), x.flatten(1).std(dim=1)],
            dim=1,
        )
        for k, (result, (s, norm, mean, std)) in enumerate(zip(results, told.tolist())):
            if result.note:
                continue
            if not finite[k]:
                result.note = f"the noise could not be optimised: not finite in {trip.sd.dtype} at step {step}; it is left as it was"
                warnings.warn(result.note, stacklevel=4)
                result.noise, result.score = start[k][None].cpu(), result.before
                continue
            result.history.append({"score": s, "norm": norm, "mean": mean, "std": std})
            result.before = s if step == 0 else result.before
            if keep == "last" and last or keep == "best" and not s <= result.score:
                result.noise, result.score = (
                    (x if step else start)[k][None].cpu(),
                    s,
                )  # untouched noise comes back as it is
            if step and not NORMAL[0] <= norm <= NORMAL[1] and not warned[k]:
                warned[k] = True
                message = f"at step {step} the noise's norm is {norm:.3f} of unit noise's, outside {NORMAL[0]}..{NORMAL[1]}"
                warnings.warn(f"{message}: a smaller lr, or rescale, keeps it there", stacklevel=4)
            if progress is not None:
                best = max(h["score"] for h in result.history)
                message = f"step {step}/{optimize_steps} score {s:.3f} best {best:.3f} norm {norm:.3f} mean {mean:.3f} std {std:.3f}"
                progress(int(part[k]), message)
        if last:
            return results
        gradient[~finite] = 0
        velocity = momentum * velocity + gradient
        x = x - lr * velocity
        if rescale:
            x = x * (root / x.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)


def gradients(
    trip: Trip, x: Tensor, rows: Tensor, mode: str, checkpointed: bool = True
) -> tuple[Tensor, Tensor]:
    """Scores (b,) of noises x (b,4,h,w) and the gradient of 1 - s in each, by `mode`; zero for "score"."""
    if mode == "full":
        scale = (
            1024.0 if trip.sd.dtype == torch.float16 else 1.0
        )  # the gradient of a cosine is lost in 16 bits
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
        u, v = x / size, back / back.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return s.clamp(-1, 1), -(v - s.view(-1, 1, 1, 1) * u) / size


# --- the inversion of a picture -----------------------------------------------------------------------------------------


@dataclass
class Inversion:
    """A picture's noise, and what becomes of it on the way back."""

    noise: Tensor  # (1, 4, h, w) float32 on the CPU: from it, DDIM with the same settings makes the reconstruction
    picture: Image.Image  # the reconstruction
    psnr: float  # of the reconstruction against the picture, dB
    codec_psnr: float  # of the picture through the VAE alone: what an exact inversion would reach
    rows: int


@torch.no_grad()
def invert_picture(
    sd,
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
    """A picture, cut and scaled to height x width pixels -> the noise that makes it, and its reconstruction, both by DDIM.

    `iterations` of the fixed point at every step make the inversion more nearly exact where steps are small: from some 25 on;
    among few large ones they diverge. Guidance up or down other than 1 reconstructs badly. ValueError, before any network
    runs, for numbers that make no sense.
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
        latents = sd.encode(picture).to(trip.wide)
        noise = trip.up(latents, row, iterations=iterations)
        x = trip.down(noise, row)
    coded, back = sd.decode(latents)[0], sd.decode(x)[0]
    return Inversion(noise.float().cpu(), back, psnr(back, picture), psnr(coded, picture), sum(rows))


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures of one size, dB; infinite where they are equal."""
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))
