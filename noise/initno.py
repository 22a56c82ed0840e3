"""Initial noise optimisation (InitNO: Guo et al., CVPR 2024, arXiv 2404.04650): noise that attends to every subject.

One look at where the network attends at the very first timestep tells much of which subjects a picture will have. InitNO
shifts and scales a seed's noise, x = noise * exp(log_var / 2) + mu, by gradient descent on the losses of noise/losses.py,
while KL(N(mu, exp(log_var)) || N(0, 1)) keeps x what the network knows as noise. After a round of steps without
success it begins again from fresh noise.

`variant="official"` does what the published program does (rounds from fresh noise, KL projected after every step, a
longer last try from the best round's noise), `variant="paper"` what the paper's text says (KL inside the objective, the
best of the rounds). One departure: a round that succeeds is kept, even where a failed one had scored below it.

`attention_scores` is our cheaper cousin: rank seeds by the same look and take the best.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minsd.noise import losses
from minsd.noise.initial import noise as draw_noise
from minsd.samplers.random import generators

Subjects = str | Sequence[str | int] | None  # as `losses.resolve` takes them
CROSS_LIMIT = 0.2  # the response loss below which a noise will do
MASK = 0.5  # the conflict counts only once every subject is attended to at least this little
KL_TURNS = 20_000  # of the projection, at most (the original has no bound; 705 have been seen)


@dataclass
class Result:
    """One image's optimised noise, and how it went."""

    noise: Tensor  # (1, 4, h, w) on the CPU
    success: bool  # the noise returned met both limits
    rounds: int  # begun; the last try from the best round's noise is not counted
    steps: int  # looks at the network, most with a gradient
    losses: dict[str, dict[str, float]]  # "before" and "after" -> "cross" and "self"
    note: str | None = None  # what went wrong


def attention_scores(
    sd,
    prompt: str,
    subjects: Subjects,
    candidates: Sequence[int] | Tensor,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    karras: bool = False,
    height: int | None = None,
    width: int | None = None,
) -> list[float]:
    """L_cross + L_self of each candidate at the first timestep: the lower, the better its picture's chances.

    `candidates` are seeds, or unit noises (K,4,h,w). No step is taken and nothing differentiated: one early-stopped
    evaluation of the conditional branch each, many at once. Other arguments and ValueErrors as in `optimize`.
    """
    select = losses.selector([losses.resolve(sd.text, prompt, subjects)])
    t = losses.listed_timesteps(sd, steps, sampler, karras)[0]
    height, width = height or sd.config.size, width or sd.config.size
    noise = (
        candidates if isinstance(candidates, Tensor) else draw_noise(candidates, (4, height // 8, width // 8))
    )
    context, scores = sd.encode_prompt(prompt), []
    with torch.no_grad():
        for x in noise.split(sd.batch_size(8 * noise.shape[-2], 8 * noise.shape[-1])):
            wide = [y.expand(len(x), -1, -1) for y in (context, select.to(sd.device))]
            seen = losses.look(sd.unet, x.to(sd.device), t, *wide)
            scores.append(losses.cross_response(seen.maps) + losses.self_conflict(seen.claims))
    return torch.cat(scores).tolist()


def optimize(
    sd,
    prompt: str,
    subjects: Subjects,
    seed: int,
    *,
    progress: Callable[[str], None] | None = None,
    **options,
) -> Result:
    """A seed's noise, optimised until the prompt's subjects are attended to.

    `subjects`: words of the prompt or token indices (0 is the start token), or None to take the last word of each of its
    parts. Options, progress messages and errors: see `optimize_batch`, of which this is a batch of one.
    """
    tell = None if progress is None else lambda b, message: progress(message)
    return optimize_batch(sd, [prompt], [subjects], [seed], progress=tell, **options)[0]


def optimize_batch(
    sd,
    prompts: Sequence[str],
    subjects: Sequence[Subjects],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    sampler: str | None = None,
    karras: bool = False,
    height: int | None = None,
    width: int | None = None,
    variant: str = "official",
    rounds: int = 5,
    round_steps: int = 10,
    last_steps: int = 50,
    lr: float = 1e-2,
    cross_limit: float = CROSS_LIMIT,
    conflict_limit: float | None = None,
    kl_limit: float = 1e-3,
    kl_weight: float = 500.0,
    progress: Callable[[int, str], None] | None = None,
) -> list[Result]:
    """One Result an image; each stops, begins again and falls back on its own, whatever the others of its batch do.

    Prompts, subjects and seeds are lists of one length. `steps`, `sampler` and `karras` are those of the run to come: they
    say which timestep is its first. Height and width in pixels. `conflict_limit` defaults to the model's. `kl_limit` bounds
    the official variant's projection, `kl_weight` is the paper's. With 0 rounds a seed's noise comes back as it is.
    `progress(b, message)` follows image b: "round 2/5 step 7/10 cross 0.31 self 0.22".

    ValueError, before any network runs, for subjects that cannot be found. A loss or gradient that is not finite gives the
    seed's plain noise, and a note.
    """
    if variant not in ("official", "paper"):
        raise ValueError(f"no variant is called {variant!r}; choose official or paper")
    if rounds < 0 or round_steps < 1 or last_steps < 0:
        raise ValueError(
            f"rounds and their steps are counts: not {rounds} rounds of {round_steps} steps, then {last_steps}"
        )
    if not len(prompts) == len(subjects) == len(seeds):
        raise ValueError(
            f"one prompt, its subjects and one seed an image: not {len(prompts)}, {len(subjects)} and {len(seeds)}"
        )
    official, limits = (
        variant == "official",
        (cross_limit, sd.config.conflict_limit if conflict_limit is None else conflict_limit),
    )
    select = losses.selector([losses.resolve(sd.text, *pair) for pair in zip(prompts, subjects)]).to(
        sd.device
    )
    t = losses.listed_timesteps(sd, steps, sampler, karras)[0]
    wide = torch.promote_types(sd.dtype, torch.float32)
    shape = (4, (height or sd.config.size) // 8, (width or sd.config.size) // 8)
    images = [_Image(g, shape) for g in generators(seeds)]
    noise = torch.cat([image.plain for image in images]).to(
        sd.device, wide
    )  # (B, 4, h, w), of each image's current round
    if rounds == 0:
        return [image.result(False) for image in images]
    context = sd.encode_prompt(prompts)  # (B, 77, D)
    gaussians = Gaussians(noise, lr)

    def objective(seen: losses.Look, rows: Tensor):
        some = select[live[rows]].any(dim=-1)  # (b, S)
        cross, conflict = losses.cross_response(seen.maps, some), losses.self_conflict(seen.claims, some)
        used = conflict.where(cross <= MASK, 0.0) if official else conflict
        loss = cross + used + losses.clean_background(seen.maps, some) if official else cross + used
        met = (cross < limits[0]) & (conflict < limits[1])
        return None if met.all() else loss, torch.stack([cross, conflict, used, loss], dim=1)

    active = list(range(len(images)))
    while active:
        live = torch.tensor(active, device=sd.device)
        x = gaussians.apply(noise, live)
        told, gradient = losses.differentiate(sd, x, t, context[live], select[live], objective)
        finite = (told.isfinite().all(dim=1) & gradient.flatten(1).isfinite().all(dim=1)).tolist()
        going = []  # places in `active`
        for k, (b, (cross, conflict, *_)) in enumerate(zip(active, told.tolist())):
            image = images[b]
            image.looks += 1
            if finite[k]:
                image.seen["after"] = {"cross": cross, "self": conflict}
                image.seen.setdefault("before", image.seen["after"])
            else:
                image.note = f"the noise could not be optimised: the losses are not finite in {sd.dtype}; the seed's own noise is kept"
                warnings.warn(f"seed {seeds[b]}: {image.note}", stacklevel=2)
                image.done = image.result(False)
                continue
            if cross < limits[0] and conflict < limits[1]:
                image.done = image.result(True, x[k])
            elif image.last and image.step == last_steps:
                image.done = image.result(False, x[k])
            else:
                going.append(k)
            if progress is not None:
                length = last_steps if image.last else round_steps
                where = "last try" if image.last else f"round {image.round}/{rounds}"
                where += f" step {image.step + 1}/{length}" if image.step < length else ", its end"
                progress(b, f"{where} cross {cross:.2f} self {conflict:.2f}")
        if going:
            rows = live[going]
            gaussians.step(rows, gradient[going], noise, 0.0 if official else kl_weight)
            if official:
                gaussians.project(rows, kl_limit)
        for k in going:
            b, image, (cross, _, used, _) = active[k], images[active[k]], told[k].tolist()
            image.step += 1
            if image.last or image.step < round_steps:
                continue
            score = cross + used + (used <= 1e-6 if official else 0)
            if (
                score < image.score
            ):  # the official variant returns to the noise drawn, the paper keeps what was made of it
                image.score, image.best = score, noise[b].clone() if official else x[k]
            if image.round < rounds:
                noise[b] = image.draw().to(noise)[0]
                image.round, image.step = image.round + 1, 0
            elif official:
                noise[b], image.last, image.step = image.best, True, 0
            else:
                image.done = image.result(False, image.best)
            gaussians.reset(b)
        active = [b for b in active if images[b].done is None]
    return [image.done for image in images]


@dataclass
class _Image:
    """Where one image of a batch is in its rounds."""

    generator: torch.Generator
    shape: tuple[int, ...]
    round: int = 1
    step: int = 0  # updates made in this round
    last: bool = False  # the rounds have failed; this is the last try
    looks: int = 0
    score: float = math.inf  # of the best round so far
    best: Tensor | None = None
    seen: dict = field(default_factory=dict)
    note: str | None = None
    done: Result | None = None

    def __post_init__(self):
        self.plain = self.draw()  # the seed's own noise

    def draw(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator)[None]

    def result(self, success: bool, x: Tensor | None = None) -> Result:
        noise = self.plain if x is None else x[None].cpu()
        return Result(noise, success, self.round if self.looks else 0, self.looks, self.seen, self.note)


class Gaussians:
    """The shift and scale of each image's noise, and Adam (Kingma & Ba 2015) with a state and step count for each.

    torch.optim.Adam shares one count over a batch, and its moments with the images that should not move in a step.
    """

    def __init__(self, like: Tensor, lr: float, eps: float = 1e-3):
        self.lr, self.eps = lr, eps
        self.p = like.new_zeros(len(like), 2, *like.shape[1:])  # (B, 2, 4, h, w): log_var, mu
        self.first, self.second, self.count = (
            torch.zeros_like(self.p),
            torch.zeros_like(self.p),
            like.new_zeros(len(like)),
        )

    def reset(self, b: int) -> None:
        for state in (self.p, self.first, self.second, self.count):
            state[b] = 0

    def apply(self, noise: Tensor, rows: Tensor) -> Tensor:
        log_var, mu = self.p[rows].unbind(1)
        return noise[rows] * (0.5 * log_var).exp() + mu

    def kl(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """KL divergences (b,) of rows and their gradients (b,2,4,h,w)."""
        log_var, mu = self.p[rows].unbind(1)
        return losses.kl_divergence(mu, log_var), torch.stack([0.5 * (log_var.exp() - 1), mu], dim=1) / mu[
            0
        ].numel()

    def step(self, rows: Tensor, gradient: Tensor, noise: Tensor, kl_weight: float) -> None:
        """One step down a loss whose gradient in x is given, plus kl_weight times the KL divergence."""
        by_log_var = 0.5 * noise[rows] * (0.5 * self.p[rows, 0]).exp() * gradient
        self._adam(rows, torch.stack([by_log_var, gradient], dim=1) + kl_weight * self.kl(rows)[1])

    def project(self, rows: Tensor, limit: float) -> None:
        """Steps on the KL divergence alone, for each image while it is above the limit."""
        for _ in range(KL_TURNS):
            kl, gradient = self.kl(rows)
            over = kl > limit
            if not over.any():
                return
            rows = rows[over]
            self._adam(rows, gradient[over])
        warnings.warn(
            f"the noise's KL divergence is still above {limit} after {KL_TURNS} steps; left there",
            stacklevel=3,
        )

    def _adam(self, rows: Tensor, gradient: Tensor, b1: float = 0.9, b2: float = 0.999) -> None:
        self.count[rows] += 1
        self.first[rows] = b1 * self.first[rows] + (1 - b1) * gradient
        self.second[rows] = b2 * self.second[rows] + (1 - b2) * gradient**2
        n = self.count[rows].view(-1, 1, 1, 1, 1)
        spread = (self.second[rows] / (1 - b2**n)).sqrt() + self.eps
        self.p[rows] -= self.lr * self.first[rows] / (1 - b1**n) / spread
