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
from PIL import Image, ImageDraw
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
    prompt, token indices, or None for the last word of each part of the prompt (commas, "and" and
    "with" separate the parts). `variant` is "official" for the updates of InitNO's program, or
    "attend-and-excite". `steps`, `sampler` and `karras` are those of the run.

    Step i moves the latents by scale * sqrt(linspace(1, 1/2)[i]) times the gradient. In some steps
    updates are repeated while a loss is above its limit. In the official variant one of these is
    the conflict loss, which measures how far the subjects' regions overlap; its limit is
    `conflict_limit`. If `scale` or `conflict_limit` is None, the model's default is taken.
    `progress(b, message)` is called with the progress of image b. If an image's losses or gradient
    are not finite, that update of the image is left out, with a warning.

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
    """The attention maps of a batch that `watch` recorded. For each of the recorded `steps` there
    is one tensor of cross-attention maps and one of self-attention maps, both (B,S,h,w). An image
    has a map for each of its subjects; S is the largest number of subjects of an image."""

    places: list[list[list[int]]]  # token positions of each subject of each image
    steps: list[int] = field(default_factory=list)
    timesteps: list[Timestep] = field(default_factory=list)
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

    Each recorded step costs one UNet evaluation with the prompt; it ends once the attention maps
    are recorded. Recording does not change x. `before`, if given, is another such function, such as
    the result of `updates`; it is called first, and its changes to x are kept. `prompts`,
    `subjects`, `steps`, `sampler` and `karras` are as in `updates`. Raises ValueError for an
    unknown sampler and for subjects that cannot be found.
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
            frames.timesteps.append(t)
            frames.cross.append(cross.cpu())
            frames.self.append(claims.cpu())
        return x

    return refine, frames


def ramp(values: Tensor) -> Image.Image:
    """Returns an image (h,w) of values in 0..1: dark blue at 0, then violet and red, and yellow at
    1. Values outside are clipped."""
    v = values.float().clamp(0, 1)
    red = (2 * v).clamp(0, 1)
    green = (2 * v - 1).clamp(0, 1)
    blue = (1 - 2 * (v - 0.3).abs()).clamp(0, 1)
    colours = (255 * torch.stack([red, green, blue], dim=-1)).round().to(torch.uint8)  # (h, w, 3)
    return Image.fromarray(colours.numpy())


def heat(values: Tensor, picture: Image.Image, top: float | None = None) -> Image.Image:
    """Blends a map (h,w) over a grey version of the image, in the colours of `ramp`. `top` is the
    value of the brightest colour; None: the map's maximum."""
    top = float(values.max()) if top is None else top
    colours = ramp(values / max(top, 1e-12)).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.7)


TITLES = {
    "cross": "Cross-attention: where, and how strongly, each subject's word is attended to",
    "self": "Self-attention of the place that attends most to the word: the region that the subject claims",
}
LEAST = 128  # pixels: the side of a tile that its caption fits
LINE = 16  # pixels: the height of a line of text


def sheet(picture: Image.Image, frames: Frames, b: int, names: Sequence[str]) -> Image.Image:
    """Makes a sheet of heat maps of image number b, with a column per recorded step: first a row of
    cross-attention maps per subject, then a row of self-attention maps per subject. `picture` is
    the image itself, over which the maps are drawn.

    All cross-attention maps have the same colour scale, which is shown as a bar, and so have all
    self-attention maps. So the maps of a neglected subject stay dark. `names` are the subjects'
    names. Each map's caption gives the step, the timestep and the map's maximum.
    """
    scale = max(1.0, LEAST / min(picture.size))
    picture = picture.resize((round(scale * picture.width), round(scale * picture.height)))
    parts: list[Image.Image] = []
    for kind, maps in (("cross", frames.cross), ("self", frames.self)):
        top = max((float(m[b, : len(names)].max()) for m in maps), default=0.0)
        parts.append(_title(TITLES[kind], top))
        for s, name in enumerate(names):
            steps = zip(frames.steps, frames.timesteps, maps)
            captions = [f"step {i}, t {t:.0f}: {m[b, s].max():.3f}" for i, t, m in steps]
            tiles = [heat(m[b, s], picture, top) for m in maps]
            parts += [_line(name), contact_sheet(tiles, len(tiles), captions)]
    out = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    y = 0
    for part in parts:
        out.paste(part, (0, y))
        y += part.height
    return out


def _line(text: str) -> Image.Image:
    """Returns a line of text as an image."""
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), text)
    line = Image.new("RGB", (round(box[2]) + 8, LINE), "white")
    ImageDraw.Draw(line).text((2, 2), text, fill="black")
    return line


def _title(text: str, top: float) -> Image.Image:
    """Returns the title of a kind of maps, with the colour bar of values from 0 to `top` below."""
    texts = [_line(text), _line("0"), _line(f"{top:.3f}, the largest of all these maps")]
    bar = ramp(torch.linspace(0, 1, 128)[None].expand(LINE - 4, -1))
    width = max(texts[0].width, texts[1].width + bar.width + texts[2].width)
    out = Image.new("RGB", (width, 3 * LINE), "white")
    out.paste(texts[0], (0, LINE // 2))
    x = 0
    for part in (texts[1], bar, texts[2]):
        out.paste(part, (x, 3 * LINE // 2 + 2))
        x += part.width
    return out
