"""Updates of the latents while denoising, so that no subject is forgotten on the way.

Attend-and-Excite (Chefer et al., SIGGRAPH 2023, arXiv 2301.13826), and what InitNO's published program made of it: in
each of the first 25 steps the latents move down the gradient of the losses of noise/losses.py, and at a few steps they do
so again and again until the subjects are attended to. Both are a `refine(i, t, x)`, which any sampler calls before its
prediction. `watch` is another, which moves nothing and keeps maps for a `sheet` of heat maps.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from minsd.attention import AttentionRecorder
from minsd.image import contact_sheet
from minsd.noise import losses
from minsd.noise.initno import CROSS_LIMIT, Subjects

UPDATED, REPEATS = 25, 20  # steps with updates; evaluations of a refinement, at most
# At which steps a refinement goes on while the response loss exceeds what.
REFINED = {
    "official": {10: CROSS_LIMIT, 20: CROSS_LIMIT},
    "attend-and-excite": {0: 1 - 0.05, 10: 1 - 0.5, 20: 1 - 0.8},  # published as the least attention wanted
}

Refine = Callable[[int, int | float, Tensor], Tensor]


def updates(
    sd,
    prompts: Sequence[str],
    subjects: Sequence[Subjects],
    *,
    variant: str = "official",
    steps: int | None = None,
    sampler: str | None = None,
    karras: bool = False,
    scale: float | None = None,
    conflict_limit: float | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Refine:
    """A `refine` for one run of a batch: prompts and subjects (words, token indices, or None) are lists, one an image.

    `variant`: "official", as InitNO's program updates, or "attend-and-excite". `steps`, `sampler` and `karras` are those of the
    run; step i moves by scale * sqrt(linspace(1, 1/2)[i]) times the gradient. `scale` and `conflict_limit` default to the model's.
    `progress(b, message)` follows image b. An image whose losses are not finite is left as it is, with a warning.
    ValueError, before any network runs, for subjects that cannot be found.
    """
    if variant not in REFINED:
        raise ValueError(f"no variant is called {variant!r}; choose from {', '.join(REFINED)}")
    full = variant == "official"
    select = losses.selector(
        [losses.resolve(sd.text, *pair) for pair in zip(prompts, subjects, strict=True)]
    ).to(sd.device)
    present, context = select.any(dim=-1), sd.encode_prompt(prompts)  # (B, S), (B, 77, D)
    n = len(losses.listed_timesteps(sd, steps, sampler, karras))
    sizes = ((sd.config.update_scale if scale is None else scale) * torch.linspace(1, 0.5, n).sqrt()).tolist()
    limit = (sd.config.conflict_limit if conflict_limit is None else conflict_limit) if full else math.inf
    running: dict[int, Tensor] = {}  # image -> the running mean of its subjects' maps (S, h, w)

    def objective(seen: losses.Look, rows: Tensor, whole: bool):
        some = present[rows]
        cross, conflict = losses.cross_response(seen.maps, some), losses.self_conflict(seen.claims, some)
        loss = cross
        if full:
            for b, maps in zip(rows.tolist(), seen.maps.detach()):
                running[b] = 0.9 * running.get(b, maps) + 0.1 * maps
        if whole:
            mean = torch.stack([running[b] for b in rows.tolist()])
            loss = (
                cross
                + 0.1 * losses.clean_background(seen.maps, some)
                + 0.1 * losses.alignment(seen.maps, mean, some)
                + conflict
            )
        return loss, torch.stack([cross, conflict], dim=1)

    def evaluate(x: Tensor, t, rows: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        """Losses (b,2) of images `rows`, and the gradient in x (b,4,h,w), zero where it is not finite."""
        told, gradient = losses.differentiate(
            sd, x[rows], t, context[rows], select[rows], lambda seen, part: objective(seen, rows[part], whole)
        )
        fine = told.isfinite().all(dim=1) & gradient.flatten(1).isfinite().all(dim=1)
        if not fine.all():
            warnings.warn(
                f"losses that are not finite in {sd.dtype}: {int((~fine).sum())} images go on without this update",
                stacklevel=2,
            )
        return told, gradient.where(fine[:, None, None, None], 0.0)

    def over(told: Tensor, cross_limit: float) -> Tensor:
        return (told[:, 0] > cross_limit) | (told[:, 1] > limit)

    def refine(i: int, t: int | float, x: Tensor) -> Tensor:
        if i >= UPDATED:
            return x
        if len(x) != len(prompts):
            raise ValueError(
                f"these updates are for a batch of {len(prompts)} images, not {len(x)}: make them anew for each batch"
            )
        if i == 0:
            running.clear()
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        every = torch.arange(len(x), device=x.device)
        told, gradient = evaluate(x, t, every, False)
        if i in REFINED[variant]:
            refined = rows = every[over(told, REFINED[variant][i])]
            for repeat in range(REPEATS):
                if not len(rows):
                    break
                seen, slope = evaluate(x, t, rows, full)
                x[rows] -= sizes[i] * slope  # one update follows success, as in both programs
                if progress is not None:
                    for b, (cross, conflict) in zip(rows.tolist(), seen.tolist()):
                        progress(
                            b,
                            f"refining at step {i} {repeat + 1}/{REPEATS} cross {cross:.2f} self {conflict:.2f}",
                        )
                rows = rows[over(seen, REFINED[variant][i])]
            if len(refined):
                told[refined], gradient[refined] = evaluate(x, t, refined, False)
        if progress is not None:
            for b, (cross, conflict) in enumerate(told.tolist()):
                progress(b, f"update at step {i} cross {cross:.2f} self {conflict:.2f}")
        return (x - sizes[i] * gradient).to(dtype)

    return refine


# --- heat maps --------------------------------------------------------------------------------------------------------


@dataclass
class Frames:
    """What `watch` kept: at each of `steps`, maps (B,S,h,w) of cross-attention and of self-attention at its peak."""

    places: list[list[list[int]]]  # token positions of each subject of each image
    steps: list[int] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)
    self: list[Tensor] = field(default_factory=list)


def watch(
    sd,
    prompts: Sequence[str],
    subjects: Sequence[Subjects],
    *,
    steps: int | None = None,
    sampler: str | None = None,
    karras: bool = False,
    count: int = 8,
    before: Refine | None = None,
) -> tuple[Refine, Frames]:
    """A `refine` that changes nothing (beyond `before`, another one that it calls first), and the Frames it fills at `count`
    steps spread over the run: one early-stopped evaluation of the conditional branch each."""
    places = [losses.resolve(sd.text, *pair) for pair in zip(prompts, subjects, strict=True)]
    select, context, frames = losses.selector(places).to(sd.device), sd.encode_prompt(prompts), Frames(places)
    n = len(losses.listed_timesteps(sd, steps, sampler, karras))
    kept = {round(k * (n - 1) / max(count - 1, 1)) for k in range(count)}

    def refine(i: int, t: int | float, x: Tensor) -> Tensor:
        x = x if before is None else before(i, t, x)
        if i in kept:
            record = AttentionRecorder(only=True)
            with torch.no_grad():
                sd.unet(x, t, context, record=record)
                # The probabilities themselves: sharpened, a map shows little but its peak.
                cross = torch.einsum("bhwk,bsk->bshw", record.cross, select.to(record.cross))
                frames.cross.append(cross.cpu())
                frames.self.append(
                    losses.claims(record.self, losses.peaks(losses.subject_maps(record.cross, select))).cpu()
                )
            frames.steps.append(i)
        return x

    return refine, frames


def heat(values: Tensor, picture: Image.Image) -> Image.Image:
    """A map (h,w) over a picture in grey: dark blue where it is 0, by violet and red to yellow at its largest."""
    v = (values / values.max().clamp(min=1e-12)).float()
    ramp = torch.stack(
        [(2 * v).clamp(0, 1), (2 * v - 1).clamp(0, 1), (1 - 2 * (v - 0.3).abs()).clamp(0, 1)], dim=-1
    )  # (h, w, 3)
    colours = Image.fromarray((255 * ramp).round().to(torch.uint8).numpy()).resize(
        picture.size, Image.Resampling.BICUBIC
    )
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.6)


def sheet(picture: Image.Image, frames: Frames, b: int, names: Sequence[str]) -> Image.Image:
    """Image b's heat maps over its picture: a row of cross- and one of self-attention a subject, a column a step kept."""
    pictures, captions = [], []
    for s, name in enumerate(names):
        for kind, maps in (("cross", frames.cross), ("self", frames.self)):
            pictures += [heat(m[b, s], picture) for m in maps]
            captions += [f"{name} {kind} {i}" for i in frames.steps]
    return contact_sheet(pictures, len(frames.steps), captions)
