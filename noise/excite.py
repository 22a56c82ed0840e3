"""Updates of the latents while denoising, so that no subject is forgotten.

Two methods: Attend-and-Excite (Chefer et al., SIGGRAPH 2023, arXiv 2301.13826), and the variant of
Attend-and-Excite in InitNO's published program. The driver `refine` (noise/drivers.py) minimises
their objectives (noise/objectives/excite.py, initno.py). `updates` returns a function
`refine(i, t, x)`, which any sampler calls before each noise prediction. `watch` returns such a
function that changes nothing, and records attention maps for a `sheet` of heat maps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from minsd.attention import AttentionRecorder
from minsd.guidance import Model
from minsd.image import contact_sheet
from minsd.noise import drivers, losses
from minsd.noise.look import Ask, Lift
from minsd.noise.losses import Subjects
from minsd.noise.objectives.excite import Excite
from minsd.noise.objectives.initno import InitNO
from minsd.samplers.schedule import Refine, Timestep

VARIANTS = ("official", "attend-and-excite")


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
    """Returns a function `refine(i, t, x) -> x` that updates the latents x of a batch in the steps
    of one run, so that no subject is neglected. Samplers take such a function and call it before
    each noise prediction.

    `prompts` and `subjects` have one item per image. The subjects of an image are words of its
    prompt, token indices, or None for the last word of each part of the prompt. `variant` is
    "official" for the updates of InitNO's program, or "attend-and-excite". `steps`, `sampler` and
    `karras` are those of the run. Step i moves the latents by scale * sqrt(linspace(1, 1/2)[i])
    times the gradient. In the official variant, `conflict_limit` is the limit of the conflict loss,
    which measures how far the subjects' regions overlap. If `scale` or `conflict_limit` is None,
    the model's default is taken. `progress(b, message)` is called with the progress of image b. If
    an image's losses or gradient are not finite, that update of the image is left out, with a
    warning.

    Raises ValueError, before any network runs, for an unknown variant or sampler and for subjects
    that cannot be found. The returned function raises ValueError for a batch of another size.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no variant is called {variant!r}; choose from {', '.join(VARIANTS)}")
    places = [losses.resolve(sd.text, *pair) for pair in zip(prompts, subjects, strict=True)]
    asks = [Ask(prompt, 0, tokens) for prompt, tokens in zip(prompts, places)]
    if variant == "official":
        objective = InitNO(sd, asks, conflict_limit=conflict_limit)
    else:
        objective = Excite(sd, asks)
    lift = Lift(sd, asks, objective)
    how = replace(objective.how, scale=scale)
    run = {"steps": steps, "sampler": sampler, "karras": karras}
    return drivers.refine(sd, lift.slope, how, len(asks), begin=lift.begin, progress=progress, **run)


# --- heat maps -----------------------------------------------------------------------------------


@dataclass
class Frames:
    """The attention maps of a batch that `watch` recorded, one tensor (B,S,h,w) for each of
    `steps`, with up to S subjects per image."""

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
    """Returns (refine, frames): a function `refine(i, t, x) -> x` that records attention maps at
    `count` steps spread over the run, and the `Frames` in which it stores them. Samplers take such
    a function and call it before each noise prediction.

    Each recorded step costs one UNet evaluation with the prompt, which stops after the attention
    maps. Recording does not change x. `before`, if given, is another such function, such as the
    result of `updates`; it is called first, and its changes to x are kept. `prompts`, `subjects`,
    `steps`, `sampler` and `karras` are as in `updates`. Raises ValueError for an unknown sampler
    and for subjects that cannot be found.
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
                # Unsharpened probabilities: a sharpened map shows little but its peak.
                cross = losses.mean_maps(record.cross, select)
                peaks = losses.peaks(losses.subject_maps(record.cross, select))
                claims = losses.claims(record.self, peaks)
            frames.steps.append(i)
            frames.cross.append(cross.cpu())
            frames.self.append(claims.cpu())
        return x

    return refine, frames


def heat(values: Tensor, picture: Image.Image) -> Image.Image:
    """Makes a heat map: blends a map `values` (h,w), in colour, over a grey version of the image.
    The map is dark blue at 0, then violet and red, and yellow at its maximum."""
    v = (values / values.max().clamp(min=1e-12)).float()
    red = (2 * v).clamp(0, 1)
    green = (2 * v - 1).clamp(0, 1)
    blue = (1 - 2 * (v - 0.3).abs()).clamp(0, 1)
    ramp = (255 * torch.stack([red, green, blue], dim=-1)).round().to(torch.uint8)  # (h, w, 3)
    colours = Image.fromarray(ramp.numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.6)


def sheet(picture: Image.Image, frames: Frames, b: int, names: Sequence[str]) -> Image.Image:
    """Makes a sheet with the heat maps of image number b, whose finished image is `picture`. Each
    subject has a row of cross-attention and a row of self-attention maps; each recorded step has a
    column. `names` are the subjects' captions."""
    tiles: list[Image.Image] = []
    captions: list[str] = []
    for s, name in enumerate(names):
        for kind, maps in (("cross", frames.cross), ("self", frames.self)):
            tiles += [heat(m[b, s], picture) for m in maps]
            captions += [f"{name} {kind} {i}" for i in frames.steps]
    return contact_sheet(tiles, len(frames.steps), captions)
