"""InitNO: a seed's noise optimised from attention maps (Guo et al., CVPR 2024, arXiv 2404.04650).

Where the network attends at the very first timestep largely determines which subjects an image will
show. InitNO shifts and scales a seed's noise by gradient descent on the losses of noise/losses.py,

    x = noise * exp(log_var / 2) + mu,

while KL(N(mu, exp(log_var)) || N(0, 1)) keeps x close to unit noise, which the network was trained
with. After a round of steps without success, the optimisation begins again from fresh noise.

`variant="official"` follows the published program: rounds from fresh noise, projection of the KL
divergence below its limit after every step, and a longer last try from the best round's noise.
`variant="paper"` follows the paper's text: the KL divergence is a term of the loss, and the result
is the best round's noise. One departure: a successful round is always kept, even if an earlier
failed round reached a lower loss.

`optimize` optimises the noise of one image, and is the simplest to read. `optimize_batch` does the
same for many images at once. `attention_scores` only computes the same losses for many seeds, which
is cheaper.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise import losses
from minsd.noise.drivers import Step, values_of
from minsd.noise.initial import noise as draw_noise
from minsd.noise.look import Ask, Lift, finite, met
from minsd.noise.losses import Subjects
from minsd.noise.objectives.initno import CROSS_LIMIT, InitNO
from minsd.samplers.random import generators

KL_TURNS = 20_000  # most steps of one projection (the original has no bound; up to 705 were needed)
KL_UNASKED = 32  # on a GPU, steps of a projection between two checks whether all images are done


def optimize(
    sd: Model,
    prompt: str,
    subjects: Subjects,
    seed: int,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    karras: bool = False,
    height: int | None = None,
    width: int | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> "Result":
    """Optimises a seed's noise by InitNO, so that every subject of the prompt gets attention.

    `subjects` are words of the prompt or token indices (0 is the start token), or None for the
    subjects that `losses.automatic_subjects` finds. `steps`, `sampler` and `karras` are those of
    the run that will draw the image; the losses are computed at the first timestep of this run.
    `height` and `width` are in pixels. `settings` are fields of `Settings`. `progress(message)` is
    called after every evaluation, with a message such as "round 2/5 step 7/10 cross 0.31 self
    0.22"; "cross" and "self" are the two losses of `Evaluation`, response and conflict.

    Raises ValueError, before any network runs, for wrong settings and for subjects that cannot be
    found. If a loss or gradient is not finite, the result is the seed's plain noise, with a note.
    """
    how = Settings(**settings)
    [generator] = generators([seed])
    evaluate = Evaluator(sd, [prompt], [subjects], how, steps, sampler, karras)
    shape = _latent_shape(sd, height, width)
    row = torch.zeros(1, dtype=torch.long, device=sd.device)  # of a batch of one
    x = best = z = torch.randn(shape, generator=generator)[None]  # the seed's own noise
    best_score = math.inf
    result = Result(z)
    for turn in range(1, how.tries + 1):
        if turn > how.rounds:  # the official variant's last try
            z = best
        elif turn > 1:
            z = torch.randn(shape, generator=generator)[None]
        gaussian = Gaussians(z.to(sd.device, evaluate.dtype), how.lr)
        for step in range(how.updates(turn) + 1):
            x = gaussian.apply(row)
            [found], gradient = evaluate(x, row)
            result.record(found, min(turn, how.rounds))
            if not found.finite:
                return result.failed(seed, sd.dtype)
            if progress is not None:
                progress(Step(how.message(turn, step, found), result.steps, how.evaluations))
            if found.met:
                return result.ended(x, True)
            if step < how.updates(turn):
                gaussian.descend(row, gradient, how)
            elif found.score < best_score:
                best_score = found.score
                best = z if how.official else x
    return result.ended(x if how.official else best, False)


@dataclass(frozen=True)
class Settings:
    """Settings of InitNO. The constructor raises ValueError for an unknown variant and for counts
    out of range."""

    variant: str = "official"  # or "paper"
    rounds: int = 5  # from fresh noise; 0 leaves the seed's noise as it is
    round_steps: int = 10  # UNet evaluations per round, at most
    last_steps: int = 50  # updates of the official variant's last try
    lr: float = 1e-2
    cross_limit: float = CROSS_LIMIT
    conflict_limit: float | None = None  # None: the model's own
    kl_limit: float = 1e-3  # the official variant's bound on the KL divergence
    kl_weight: float = 500.0  # the paper's weight of the KL divergence

    def __post_init__(self) -> None:
        if self.variant not in ("official", "paper"):
            raise ValueError(f"no variant is called {self.variant!r}; choose official or paper")
        if self.rounds < 0 or self.round_steps < 1 or self.last_steps < 0:
            raise ValueError(
                "rounds and last_steps must be 0 or more and round_steps 1 or more, not "
                f"{self.rounds}, {self.last_steps} and {self.round_steps}"
            )

    @property
    def official(self) -> bool:
        return self.variant == "official"

    @property
    def tries(self) -> int:
        """How many times the optimisation of an image may begin: once per round and, in the
        official variant, once more for the last try. It is 0 without rounds."""
        return self.rounds + self.official if self.rounds else 0

    @property
    def evaluations(self) -> int:
        """The number of UNet evaluations of all tries: the most that one image may take."""
        return sum(self.updates(turn) + 1 for turn in range(1, self.tries + 1))

    def updates(self, turn: int) -> int:
        """Returns how many times the noise is updated in try number `turn`, counted from 1 (a
        round, or the last try). One UNet evaluation precedes each update, and one more follows the
        last update."""
        return self.last_steps if turn > self.rounds else self.round_steps - 1

    def message(self, turn: int, step: int, found: "Evaluation") -> str:
        """Formats an image's losses `found`, in try number `turn` after `step` updates, as a line
        that shows the progress to the user."""
        where = f"round {turn}/{self.rounds} step {step + 1}/{self.round_steps}"
        if turn > self.rounds:
            where = f"last try step {step + 1}/{self.last_steps}"
            if step == self.last_steps:
                where = "last try, end"
        return f"{where} cross {found.cross:.2f} self {found.conflict:.2f}"


@dataclass
class Result:
    """One image's optimised noise, and how its optimisation went."""

    noise: Tensor  # (1, 4, h, w) on the CPU
    success: bool = False  # this noise met both limits
    rounds: int = 0  # rounds begun; the official variant's last try is not counted
    steps: int = 0  # UNet evaluations, most with a backward pass
    # "before" and "after" -> "cross" and "self"
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str | None = None  # what went wrong

    def record(self, evaluation: "Evaluation", round: int) -> None:
        """Counts an evaluation in round number `round`. Stores its losses if they and the gradient
        are finite."""
        self.steps += 1
        self.rounds = round
        if evaluation.finite:
            self.losses["after"] = {"cross": evaluation.cross, "self": evaluation.conflict}
            self.losses.setdefault("before", self.losses["after"])

    def ended(self, x: Tensor, success: bool) -> "Result":
        """Stores the final noise x (1,4,h,w) in this Result. `success` states whether both losses
        of this noise are below their limits, and is stored too. Returns this Result."""
        self.noise = x.cpu()
        self.success = success
        return self

    def failed(self, seed: int, dtype: torch.dtype) -> "Result":
        """Adds a note that a loss or gradient was not finite in `dtype`, and warns. Returns this
        Result, whose noise is still the plain noise of `seed`."""
        self.note = (
            f"the noise could not be optimised: the losses are not finite in {dtype}; "
            "the seed's own noise is kept"
        )
        warnings.warn(f"seed {seed}: {self.note}", stacklevel=3)
        return self


class Evaluation(NamedTuple):
    """The losses of one image at one noise."""

    cross: float  # how little attention the most neglected subject gets
    conflict: float  # how far the regions of the subjects overlap
    score: float  # compares rounds that end with this evaluation; lower is better
    met: bool  # both losses are below their limits
    finite: bool  # losses and gradient are finite


class Evaluator:
    """Computes InitNO's losses of the images of a batch, and their gradients, at the first timestep
    of a run with the given `steps`, `sampler` and `karras`."""

    def __init__(
        self,
        sd: Model,
        prompts: Sequence[str],
        subjects: Sequence[Subjects],
        how: Settings,
        steps: int | None = None,
        sampler: str | None = None,
        karras: bool = False,
    ):
        asks = [Ask(prompt, 0, losses.resolve(sd.text, prompt, s)) for prompt, s in zip(prompts, subjects)]
        self.t = losses.listed_timesteps(sd, steps, sampler, karras)[0]
        self.official = how.official
        limit = sd.config.conflict_limit if how.conflict_limit is None else how.conflict_limit
        self.limits = {"cross": how.cross_limit, "self": limit}
        self.lift = Lift(sd, asks, InitNO(sd, asks, how.variant))
        self.dtype = self.lift.dtype  # of noises and their gradients

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[list[Evaluation], Tensor]:
        """Evaluates the losses at noises x (b,4,h,w) of some images, whose numbers in the batch are
        `rows` (b,). Returns (evaluations, gradient): one Evaluation per image, and the gradient
        (b,4,h,w) of the loss in x."""
        told, gradient = self.lift.slope(x, rows, self.t, limits=self.limits)
        flags = {"met": met(told, self.limits), "finite": finite(told, gradient)}
        evaluations = []
        for found in values_of(told | {name: flag.to(gradient) for name, flag in flags.items()}):
            # Official: if the response loss was too high for the conflict loss to count (used is
            # 0), 1 is added, so that any round in which the conflict loss counts is preferred.
            score = found["cross"] + found["used"] + (self.official and found["used"] <= 1e-6)
            ends = bool(found["met"]), bool(found["finite"])
            evaluations.append(Evaluation(found["cross"], found["self"], score, *ends))
        return evaluations, gradient


class Gaussians:
    """The shift and scale of each image's noise, which InitNO optimises, and an Adam optimiser
    (Kingma & Ba 2015) with a separate state for each image.

    torch.optim.Adam is not used: it has one step count for a whole batch, and would move even
    images with a zero gradient, because their moments are not zero.
    """

    def __init__(self, noise: Tensor, lr: float, eps: float = 1e-3):
        self.noise = noise  # (B, 4, h, w): the fresh noise of each image's current try
        self.lr = lr
        self.eps = eps
        self.p = noise.new_zeros(len(noise), 2, *noise.shape[1:])  # (B, 2, 4, h, w): log_var, mu
        self.first = torch.zeros_like(self.p)
        self.second = torch.zeros_like(self.p)
        self.count = noise.new_zeros(len(noise))

    def restart(self, b: int, noise: Tensor) -> None:
        """Starts a new try for image number b, from `noise` (1,4,h,w), and resets the image's
        shift, scale and Adam state."""
        self.noise[b] = noise[0]
        for state in (self.p, self.first, self.second, self.count):
            state[b] = 0

    def apply(self, rows: Tensor) -> Tensor:
        """Returns the shifted and scaled noise x (b,4,h,w) of some images, whose numbers in the
        batch are `rows` (b,)."""
        log_var, mu = self.p[rows].unbind(1)
        return self.noise[rows] * (0.5 * log_var).exp() + mu

    def kl(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (kl, gradient) for some images, whose numbers in the batch are `rows` (b,): the
        KL divergence of each image's shift and scale from unit noise, (b,), and its gradient
        (b,2,4,h,w) with respect to log_var (the logarithm of the squared scale) and mu (the shift),
        in this order."""
        log_var, mu = self.p[rows].unbind(1)
        gradient = torch.stack([0.5 * (log_var.exp() - 1), mu], dim=1) / mu[0].numel()
        return losses.kl_divergence(mu, log_var), gradient

    def descend(self, rows: Tensor, gradient: Tensor, how: Settings) -> None:
        """Updates shift and scale of some images, whose numbers in the batch are `rows` (b,).
        `gradient` (b,4,h,w) is that of the loss with respect to the shifted and scaled noise.

        The KL divergence from unit noise is kept small too. The official variant reduces it to at
        most `how.kl_limit` after the update (`project`); the paper's variant adds it to the loss,
        with the weight `how.kl_weight`.
        """
        by_log_var = 0.5 * self.noise[rows] * (0.5 * self.p[rows, 0]).exp() * gradient
        by_both = torch.stack([by_log_var, gradient], dim=1)  # (b, 2, 4, h, w)
        if how.official:
            self._adam(rows, by_both)
            self.project(rows, how.kl_limit)
        else:
            self._adam(rows, by_both + how.kl_weight * self.kl(rows)[1])

    def project(self, rows: Tensor, limit: float) -> None:
        """Updates shift and scale by gradient descent on the KL divergence from unit noise alone,
        for the images whose numbers in the batch are `rows` (b,). The descent of an image ends once
        its divergence is at most `limit`. Warns if KL_TURNS steps are not enough."""
        if rows.is_cuda:
            done = self._project_unasked(rows, limit)
        else:
            done = self._project_each(rows, limit)
        if not done:
            warnings.warn(
                f"the noise's KL divergence is still above {limit} after {KL_TURNS} steps", stacklevel=4
            )

    def _project_each(self, rows: Tensor, limit: float) -> bool:
        """Does the work of `project` on a CPU: each step updates the shift and scale of only those
        images whose KL divergence is above `limit`. Returns True if the divergence of every image
        got to at most `limit`."""
        for _ in range(KL_TURNS):
            kl, gradient = self.kl(rows)
            over = kl > limit
            if not over.any():
                return True
            rows = rows[over]
            self._adam(rows, gradient[over])
        return False

    def _project_unasked(self, rows: Tensor, limit: float) -> bool:
        """Does the work of `project` on a GPU. Returns True if the KL divergence of every image got
        to at most `limit`.

        Each step is computed for all images, but changes only those whose divergence is above
        `limit`. Checking whether there is such an image makes the program wait for the GPU, so the
        check is made only in every KL_UNASKED-th step. A few steps may therefore change nothing at
        the end.
        """
        over = torch.ones_like(rows, dtype=torch.bool)
        for turn in range(KL_TURNS):
            kl, gradient = self.kl(rows)
            over = kl > limit
            if turn % KL_UNASKED == 0 and not over.any():
                return True
            self._adam(rows, gradient, over)
        return not over.any()

    def _adam(
        self, rows: Tensor, gradient: Tensor, where: Tensor | None = None, b1: float = 0.9, b2: float = 0.999
    ) -> None:
        """Takes one Adam step for the images whose numbers in the batch are `rows` (b,). If `where`
        (b,) is given, only images for which it is True are changed. `gradient` (b,2,4,h,w) is that
        with respect to log_var and mu; b1 and b2 are Adam's betas."""
        n = self.count[rows] + 1
        first = b1 * self.first[rows] + (1 - b1) * gradient
        second = b2 * self.second[rows] + (1 - b2) * gradient**2
        steps = n.view(-1, 1, 1, 1, 1)
        spread = (second / (1 - b2**steps)).sqrt() + self.eps
        p = self.p[rows] - self.lr * first / (1 - b1**steps) / spread
        for state, new in ((self.count, n), (self.first, first), (self.second, second), (self.p, p)):
            if where is not None:
                new = new.where(where.view(-1, *[1] * (new.ndim - 1)), state[rows])
            state[rows] = new


# --- many images at once -------------------------------------------------------------------------


class _Image:
    """The state of one image in `optimize_batch`. The state advances once per UNet evaluation."""

    def __init__(self, generator: torch.Generator, shape: tuple[int, ...], how: Settings):
        self.generator = generator
        self.shape = shape
        self.how = how
        self.turn = 1
        self.step = 0  # updates made in this try
        self.z = self.draw()  # the noise that this try began from
        self.best = self.z
        self.best_score = math.inf
        self.result = Result(self.z)
        self.done = not how.tries

    def draw(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator)[None]

    def end(self, x: Tensor, success: bool) -> None:
        self.result.ended(x, success)
        self.done = True

    def move_on(self, found: Evaluation, x: Tensor) -> None:
        """Advances the state after the evaluation `found` of the image's noise x (1,4,h,w).

        There are three outcomes. The image is finished, and the attribute `done` is True. Or the
        try goes on: the attribute `step` has increased by 1, and the caller has to update the
        noise. Or a new try begins: `step` is 0, and the attribute `z` holds the noise to begin
        from.
        """
        how = self.how
        if found.met:
            self.end(x, True)
        elif self.step < how.updates(self.turn):
            self.step += 1
        else:
            if found.score < self.best_score:
                self.best_score = found.score
                self.best = self.z if how.official else x
            if self.turn == how.tries:
                self.end(x if how.official else self.best, False)
                return
            self.turn += 1
            self.step = 0
            self.z = self.best if self.turn > how.rounds else self.draw()


def optimize_batch(
    sd: Model,
    prompts: Sequence[str],
    subjects: Sequence[Subjects],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    sampler: str | None = None,
    karras: bool = False,
    height: int | None = None,
    width: int | None = None,
    progress: Callable[[int, str], None] | None = None,
    **settings: Any,
) -> list[Result]:
    """Runs `optimize` for several images at once, with one prompt, one item of `subjects` and one
    seed per image. Returns one Result per image.

    The result of an image does not depend on the other images. `progress(b, message)` is called
    with the progress of image b. The other arguments are as in `optimize`. Raises ValueError if the
    numbers of prompts, subjects and seeds differ, and for wrong settings and subjects that cannot
    be found.
    """
    how = Settings(**settings)
    if not len(prompts) == len(subjects) == len(seeds):
        counts = f"{len(prompts)} prompts, {len(subjects)} subjects and {len(seeds)} seeds"
        raise ValueError(f"give one prompt, its subjects and one seed per image, not {counts}")
    shape = _latent_shape(sd, height, width)
    images = [_Image(generator, shape, how) for generator in generators(seeds)]
    evaluate = Evaluator(sd, prompts, subjects, how, steps, sampler, karras)
    noise = torch.cat([image.z for image in images]).to(sd.device, evaluate.dtype)
    gaussians = Gaussians(noise, how.lr)
    active = [b for b, image in enumerate(images) if not image.done]
    while active:
        rows = torch.tensor(active, device=sd.device)
        x = gaussians.apply(rows)
        evaluations, gradient = evaluate(x, rows)
        going = []  # positions in `active` of the images whose try goes on
        for k, (b, found) in enumerate(zip(active, evaluations)):
            image = images[b]
            image.result.record(found, min(image.turn, how.rounds))
            if not found.finite:
                image.result.failed(seeds[b], sd.dtype)
                image.done = True
                continue
            if progress is not None:
                message = how.message(image.turn, image.step, found)
                progress(b, Step(message, image.result.steps, how.evaluations))
            image.move_on(found, x[k : k + 1])
            if image.step and not image.done:
                going.append(k)
            elif not image.done:
                gaussians.restart(b, image.z)
        if going:
            gaussians.descend(rows[going], gradient[going], how)
        active = [b for b in active if not images[b].done]
    return [image.result for image in images]


def attention_scores(
    sd: Model,
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
    """Computes a score of each candidate noise: InitNO's response loss (how little attention the
    most neglected subject gets) plus its conflict loss (how far the subjects' regions overlap) at
    the first timestep of a run. Lower is better.

    `candidates` are seeds, or unit noises (K,4,h,w). The UNet is evaluated once per candidate, many
    at a time, with the prompt, without gradients, and only as far as the last attention map. The
    other arguments are as in `optimize`. Raises ValueError for an unknown sampler and for subjects
    that cannot be found.
    """
    one = Ask(prompt, 0, losses.resolve(sd.text, prompt, subjects))
    t = losses.listed_timesteps(sd, steps, sampler, karras)[0]
    noise = candidates
    if not isinstance(noise, Tensor):
        noise = draw_noise(noise, _latent_shape(sd, height, width))
    lift = Lift(sd, [one], InitNO(sd, [one]))
    rows = torch.zeros(len(noise), dtype=torch.long, device=sd.device)
    return lift.score(noise.to(sd.device), rows, t)["loss"].tolist()


def _latent_shape(sd: Model, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Returns the shape (4,h,w) of one image's latents for an image of height x width pixels (None:
    the model's size)."""
    return 4, (height or sd.config.size) // 8, (width or sd.config.size) // 8
