"""Updates of the latents while denoising, so that no subject is forgotten.

Attend-and-Excite (Chefer et al., SIGGRAPH 2023, arXiv 2301.13826), and the version of it in
InitNO's published program. In each of the first 25 steps the latents move down the gradient of the
losses of noise/losses.py. At a few of these steps they are refined: moved again and again until
the subjects are attended to. Updates and refinements are one `refine(i, t, x)`, which any sampler
calls before its prediction. `watch` returns another `refine`, which changes nothing and records
maps for a `sheet` of heat maps.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from minsd.attention import AttentionRecorder
from minsd.guidance import Model
from minsd.image import contact_sheet
from minsd.noise import losses
from minsd.noise.initno import CROSS_LIMIT
from minsd.noise.losses import Subjects
from minsd.samplers.schedule import Refine, Timestep

UPDATED = 25  # steps with updates
REPEATS = 20  # UNet evaluations of one refinement, at most
# Steps with a refinement -> it ends once the response loss is no larger than this.
REFINED = {
    "official": {10: CROSS_LIMIT, 20: CROSS_LIMIT},
    "attend-and-excite": {0: 1 - 0.05, 10: 1 - 0.5, 20: 1 - 0.8},  # published as least attention
}


def updates(
    sd: Model,
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
    """A `refine` for one run of a batch. Give one prompt and its subjects per image.

    `subjects`: words, token indices, or None for the last word of each part of the prompt.
    `variant`: "official" for the updates of InitNO's program, or "attend-and-excite". `steps`,
    `sampler` and `karras` are those of the run. Step i moves the latents by scale *
    sqrt(linspace(1, 1/2)[i]) times the gradient. `scale` and `conflict_limit` default to the
    model's. `progress(b, message)` follows image b. An image whose losses are not finite goes on
    unchanged, with a warning.

    ValueError, before any network runs, for an unknown variant or sampler and for subjects that
    cannot be found; later, for a batch of another size.
    """
    if variant not in REFINED:
        raise ValueError(f"no variant is called {variant!r}; choose from {', '.join(REFINED)}")
    places = [losses.resolve(sd.text, *pair) for pair in zip(prompts, subjects, strict=True)]
    n = len(losses.listed_timesteps(sd, steps, sampler, karras))
    scale = sd.config.update_scale if scale is None else scale
    official = variant == "official"
    if conflict_limit is None:
        conflict_limit = sd.config.conflict_limit
    return _Updates(
        sd=sd,
        select=losses.selector(places).to(sd.device),
        context=sd.encode_prompt(prompts),
        official=official,
        sizes=(scale * torch.linspace(1, 0.5, n).sqrt()).tolist(),
        cross_limits=REFINED[variant],
        conflict_limit=conflict_limit if official else math.inf,
        progress=progress,
    )


@dataclass
class _Updates:
    """The `refine` that `updates` returns. The losses of b images are (b,2): response and
    conflict.
    """

    sd: Model
    select: Tensor  # (B, S, 77)
    context: Tensor  # (B, 77, D)
    official: bool
    sizes: list[float]  # of each step's update
    cross_limits: dict[int, float]  # of the steps with a refinement
    conflict_limit: float
    progress: Callable[[int, str], None] | None
    means: Tensor | None = None  # (B, S, h, w): running means of the maps in this run
    begun: Tensor | None = None  # (B,): whether an image has such a mean yet

    def __call__(self, i: int, t: Timestep, x: Tensor) -> Tensor:
        if i >= UPDATED:
            return x
        if len(x) != len(self.select):
            sizes = f"{len(self.select)} images, not {len(x)}"
            raise ValueError(f"these updates are for a batch of {sizes}: make new ones for each batch")
        if i == 0:
            self.means = self.begun = None
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32), copy=True)
        every = torch.arange(len(x), device=x.device)
        values, gradient = self.evaluate(x, t, every)
        if i in self.cross_limits:
            rows = every[self.over(values, i)]
            if len(rows):
                self.refine(i, t, x, rows)
                values[rows], gradient[rows] = self.evaluate(x, t, rows)
        self.report(f"update at step {i}", every, values)
        return (x - self.sizes[i] * gradient).to(dtype)

    def refine(self, i: int, t: Timestep, x: Tensor, rows: Tensor) -> None:
        """Moves images `rows` of x, in place, until their losses are within the limits of step i."""
        for repeat in range(REPEATS):
            values, gradient = self.evaluate(x, t, rows, whole=self.official)
            x[rows] -= self.sizes[i] * gradient  # one update follows success, as in both programs
            self.report(f"refining at step {i} {repeat + 1}/{REPEATS}", rows, values)
            rows = rows[self.over(values, i)]
            if not len(rows):
                return

    def evaluate(self, x: Tensor, t: Timestep, rows: Tensor, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Losses (b,2) of images `rows`, and the gradient in x (b,4,h,w), 0 where it is not
        finite.
        """

        def objective(look: losses.Look, part: Tensor) -> tuple[Tensor, Tensor]:
            return self.loss(look, rows[part], whole)

        values, gradient = losses.differentiate(
            self.sd, x[rows], t, self.context[rows], self.select[rows], objective
        )
        finite = values.isfinite().all(dim=1) & gradient.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            count = int((~finite).sum())
            warnings.warn(
                f"losses are not finite in {self.sd.dtype}: {count} images go on without this update",
                stacklevel=2,
            )
        return values, gradient.where(finite[:, None, None, None], 0.0)

    def loss(self, look: losses.Look, rows: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        """The loss (b,) of images `rows`, the response alone or the `whole` of InitNO's, and their
        losses."""
        some = self.select[rows].any(dim=-1)  # (b, S)
        cross = losses.cross_response(look.maps, some)
        conflict = losses.self_conflict(look.claims, some)
        loss = cross
        if self.official:
            means = self.averaged(rows, look.maps.detach())
        if whole:
            background: Tensor = losses.clean_background(look.maps, some)
            drift: Tensor = losses.alignment(look.maps, means, some)
            loss = cross + 0.1 * background + 0.1 * drift + conflict
        return loss, torch.stack([cross, conflict], dim=1)

    def averaged(self, rows: Tensor, maps: Tensor) -> Tensor:
        """Adds maps (b,S,h,w) of images `rows` to their running means, and returns these."""
        if self.means is None or self.begun is None:
            self.means = maps.new_zeros(len(self.select), *maps.shape[1:])
            self.begun = torch.zeros_like(self.select[:, 0, 0], dtype=torch.bool)
        previous = torch.where(self.begun[rows, None, None, None], self.means[rows], maps)
        means = 0.9 * previous + 0.1 * maps
        self.means[rows] = means
        self.begun[rows] = True
        return means

    def over(self, values: Tensor, i: int) -> Tensor:
        """Returns, per image (b,), whether its losses exceed a limit of step i's refinement."""
        return (values[:, 0] > self.cross_limits[i]) | (values[:, 1] > self.conflict_limit)

    def report(self, where: str, rows: Tensor, values: Tensor) -> None:
        if self.progress is not None:
            for b, (cross, conflict) in zip(rows.tolist(), values.tolist()):
                self.progress(b, f"{where} cross {cross:.2f} self {conflict:.2f}")


# --- heat maps -----------------------------------------------------------------------------------


@dataclass
class Frames:
    """The attention maps that `watch` recorded: (B,S,h,w) at each of `steps`."""

    places: list[list[list[int]]]  # token positions of each subject of each image
    steps: list[int] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)  # cross-attention to each subject
    self: list[Tensor] = field(default_factory=list)  # self-attention at that map's peak


def watch(
    sd: Model,
    prompts: Sequence[str],
    subjects: Sequence[Subjects],
    *,
    steps: int | None = None,
    sampler: str | None = None,
    karras: bool = False,
    count: int = 8,
    before: Refine | None = None,
) -> tuple[Refine, Frames]:
    """Returns (refine, frames): a `refine` that records attention maps at `count` steps spread
    over the run, and the Frames that it fills.

    Each of these steps costs one early-stopped UNet evaluation under the prompt. `before`, another
    `refine`, is called first and its changes are kept; `watch` itself changes nothing. Other
    arguments and ValueErrors as in `updates`.
    """
    places = [losses.resolve(sd.text, *pair) for pair in zip(prompts, subjects, strict=True)]
    n = len(losses.listed_timesteps(sd, steps, sampler, karras))
    kept = {round(k * (n - 1) / max(count - 1, 1)) for k in range(count)}
    select = losses.selector(places).to(sd.device)
    context = sd.encode_prompt(prompts)
    frames = Frames(places)

    def refine(i: int, t: Timestep, x: Tensor) -> Tensor:
        if before is not None:
            x = before(i, t, x)
        if i in kept:
            record = AttentionRecorder(only=True)
            with torch.no_grad():
                sd.unet(x, t, context, record=record)
                # The probabilities themselves: sharpened, a map shows little but its peak.
                cross = losses.mean_maps(record.cross, select)
                peaks = losses.peaks(losses.subject_maps(record.cross, select))
                claims = losses.claims(record.self, peaks)
            frames.steps.append(i)
            frames.cross.append(cross.cpu())
            frames.self.append(claims.cpu())
        return x

    return refine, frames


def heat(values: Tensor, picture: Image.Image) -> Image.Image:
    """A map (h,w) over an image in grey: dark blue at 0, then violet and red, yellow at its
    maximum."""
    v = (values / values.max().clamp(min=1e-12)).float()
    red = (2 * v).clamp(0, 1)
    green = (2 * v - 1).clamp(0, 1)
    blue = (1 - 2 * (v - 0.3).abs()).clamp(0, 1)
    ramp = (255 * torch.stack([red, green, blue], dim=-1)).round().to(torch.uint8)  # (h, w, 3)
    colours = Image.fromarray(ramp.numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.6)


def sheet(picture: Image.Image, frames: Frames, b: int, names: Sequence[str]) -> Image.Image:
    """Heat maps of image b: a row of cross- and one of self-attention per subject, a column per
    step."""
    tiles: list[Image.Image] = []
    captions: list[str] = []
    for s, name in enumerate(names):
        for kind, maps in (("cross", frames.cross), ("self", frames.self)):
            tiles += [heat(m[b, s], picture) for m in maps]
            captions += [f"{name} {kind} {i}" for i in frames.steps]
    return contact_sheet(tiles, len(frames.steps), captions)
