"""Three drivers, which minimise an objective: `select`, `optimize` and `refine`.

    select      chooses the best of many noises, or searches near the best one so far
    optimize    descends the gradient on the initial noise
    refine      moves the latents in the steps of a run, before each noise prediction

A driver calls one or both of two functions, which `look.Lift` makes from any objective. A method
whose loss takes more than one UNet evaluation (noise/stability.py, noise/arrange.py) supplies its
own functions.

    score(x, rows) -> told                       values to report, by name: name -> (b,)
    slope(x, rows, ...) -> (told, gradient)      also the gradient (b,4,h,w) of "loss" in x

x (b,4,h,w) holds the noises or latents of some images of a batch, and `rows` (b,) the numbers of
these images in the batch. `told` has the value to minimise under "loss". Images of a batch do not
influence one another.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from minsd.guidance import Model, evaluations
from minsd.noise import losses
from minsd.noise.initial import noise as draw_noise
from minsd.noise.look import Told, finite, met
from minsd.noise.regularizers import REGULARIZERS, moments
from minsd.samplers.random import generators
from minsd.samplers.schedule import Refine, Timestep

Score = Callable[[Tensor, Tensor], Told]
Say = Callable[[int, str], None]  # (image, message); a message may be a `Step`
# (numbers of images whose values or gradients are not finite) -> a message that names them
NotFinite = Callable[[Sequence[int]], str]
NORMAL = (0.97, 1.03)  # |noise| / sqrt(d) for which the UNet still treats it as noise
SHARE = 0.02  # size of a step, as a fraction of the latents' norm, for gradients of unknown scale


class Step(str):
    """A progress message that also states how far the work is: `done` steps of at most `most`."""

    done: int
    most: int

    def __new__(cls, text: str, done: int, most: int) -> "Step":
        step = super().__new__(cls, text)
        step.done = done
        step.most = most
        return step


def prefixed(prefix: str, message: str) -> str:
    """Returns a progress message with `prefix` before its text. A Step stays a Step."""
    text = prefix + message
    return Step(text, message.done, message.most) if isinstance(message, Step) else text


def part_of(say: Callable[[str], None], k: int, n: int) -> Callable[[str], None]:
    """Returns a function to report the progress of part number `k` (from 0) of a work of `n` equal
    parts. It passes each message on to `say`. In a message that is a Step, the counts `done` and
    `most` of the part are first replaced by those of the whole work."""

    def said(message: str) -> None:
        if isinstance(message, Step):
            message = Step(message, k * message.most + message.done, n * message.most)
        say(message)

    return said


@contextmanager
def looks(sd: Model, most: int, say: Callable[[str], None] | None) -> Iterator[None]:
    """Within the `with` block, calls `say` with a Step (a progress message) before every UNet
    evaluation. The Step counts the rows (images in the UNet's batch) evaluated so far; `most` is
    the number of rows expected in the whole block. Does nothing if `say` is None."""
    begun = 0

    def begin(rows: int) -> None:
        nonlocal begun
        assert say is not None
        say(Step(f"look {begun + 1}/{most}", begun, most))
        begun += rows

    with evaluations(sd.unet, begin) if say is not None else nullcontext():
        yield


class Slope(Protocol):
    """The type of a function that evaluates an objective and its gradient. `Lift.slope` is one, and
    explains the parameters."""

    def __call__(
        self,
        x: Tensor,
        rows: Tensor,
        t: Timestep,
        i: int | None = None,
        phase: str = "update",
        limits: Mapping[str, float] | None = None,
    ) -> tuple[Told, Tensor]: ...


def values_of(told: Told) -> list[dict[str, float]]:
    """Converts `told`, a dict of name -> tensor (b,) with one value per image, to a list of b dicts
    of name -> number, one dict per image."""
    columns = torch.stack(list(told.values()), dim=1).tolist()
    return [dict(zip(told, row)) for row in columns]


def rounded(value: float) -> float | None:
    """Rounds a value for runs.jsonl, to five digits after the point. JSON has no NaN and no
    infinity, so None stands for them."""
    return round(value, 5) if math.isfinite(value) else None


def in_words(values: Mapping[str, float]) -> str:
    """Formats the values of an image, except "loss", as a text such as "cross 0.21 self 0.3". If
    there is no value but "loss", formats it alone."""
    shown = {name: value for name, value in values.items() if name != "loss"} or values
    return " ".join(f"{name} {value:.3g}" for name, value in shown.items())


def shares(gradient: Tensor, x: Tensor, share: float | None) -> Tensor:
    """Scales each image's gradient (B,4,h,w) to a norm of `share` times the norm of the image's
    latents x (B,4,h,w). If `share` is None, returns the gradient unchanged."""
    if share is None:
        return gradient
    size = gradient.flatten(1).norm(dim=1).clamp(min=1e-30)
    return gradient * (share * x.flatten(1).norm(dim=1) / size).view(-1, 1, 1, 1)


# --- refine --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refining:
    """Settings of `refine`, which moves the latents down a gradient in the first `until` steps of a
    run: once in each step, and repeatedly in the steps of `repeats`.

    `repeats` maps a step to limits (name of a value -> limit). At this step, an image with a value
    above its limit is moved repeatedly, at most `most` times, until no value is above its limit. If
    the limits are empty, every image is moved `most` times. `share`, if given, replaces `scale`:
    each update moves the latents by this fraction of their norm.
    """

    until: int = 25  # steps with updates
    scale: float | None = None  # size of a step; None: the model's `update_scale`
    decay: str = "sqrt"  # step i is scaled by sqrt(linspace(1, 1/2)[i]); or "none"
    repeats: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    most: int = 20
    extra_update: bool = True  # an image within the limits moves once more, as in Attend-and-Excite
    share: float | None = None

    def __post_init__(self) -> None:
        if self.decay not in ("sqrt", "none"):
            raise ValueError(f"decay must be sqrt or none, not {self.decay!r}")
        if self.until < 0 or self.most < 0:
            raise ValueError(f"until and most must be 0 or more, not {self.until} and {self.most}")
        _check_positive("lr", self.scale)
        _check_positive("share", self.share)


def _check_positive(name: str, value: float | None) -> None:
    """Raises ValueError if the value of the setting called `name` is below 0 or not finite. None,
    which means the default, is accepted."""
    if value is not None and not 0 <= value < math.inf:
        raise ValueError(f"{name} must be 0 or more, not {value}")


def refine(
    sd: Model,
    slope: Slope,
    how: Refining,
    count: int,
    *,
    begin: Callable[[], None] | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    karras: bool = False,
    record: "list[Result] | None" = None,
    not_finite: NotFinite | None = None,
    progress: Say | None = None,
) -> Refine:
    """Returns a function `refine(i, t, x) -> x` that updates the latents x of `count` images in
    step i, at timestep t. Every sampler takes such a function and calls it before each noise
    prediction. The update moves the latents down the gradient that `slope` computes; `how` has the
    settings.

    `begin` is called when a run begins. `steps`, `sampler` and `karras` are those of the run.
    `record`, if given, is a list with one Result per image; the first and the latest values of the
    image are stored in it. If an image's values or gradient are not finite, this update of the
    image is left out, with a warning. `not_finite(images)`, if given, returns the beginning of this
    warning, which names the images. `progress(b, message)` is called with the progress of image b.
    The returned function raises ValueError for a batch of other than `count` images.
    """
    n = len(losses.listed_timesteps(sd, steps, sampler, karras))
    scale = sd.config.update_scale if how.scale is None else how.scale
    sizes = scale * torch.linspace(1, 0.5, n).sqrt() if how.decay == "sqrt" else torch.full((n,), scale)
    moves = [1.0] * n if how.share is not None else sizes.tolist()

    def lost(rows: Sequence[int]) -> str:
        return f"losses are not finite in {sd.dtype}: images {', '.join(map(str, rows))}"

    return _Updates(slope, how, count, moves, begin, record, not_finite or lost, progress)


@dataclass
class _Updates:
    """The function that `refine` returns, as an object: calling it with (i, t, x) returns the
    updated latents x."""

    slope: Slope
    how: Refining
    count: int
    moves: list[float]  # the size of each step's update
    begin: Callable[[], None] | None
    record: "list[Result] | None"
    not_finite: NotFinite
    progress: Say | None

    def __call__(self, i: int, t: Timestep, x: Tensor) -> Tensor:
        if i >= self.how.until:
            return x
        if len(x) != self.count:
            sizes = f"{self.count} images, not {len(x)}"
            raise ValueError(f"these updates are for a batch of {sizes}: make new ones for each batch")
        if i == 0 and self.begin is not None:
            self.begin()
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32), copy=True)
        every = torch.arange(self.count, device=x.device)
        told, gradient = self.evaluate(x, every, i, t, "update")
        if i in self.how.repeats:
            rows = every[self.over(told, i)]
            if len(rows):
                self.repeat(x, rows, i, t)
                again, gradient[rows] = self.evaluate(x, rows, i, t, "update")
                for name, values in again.items():
                    told[name][rows] = values
        self.say(f"update at step {i}", every, told)
        return (x - self.moves[i] * gradient).to(dtype)

    def repeat(self, x: Tensor, rows: Tensor, i: int, t: Timestep) -> None:
        """Updates the latents of the images `rows` (b,) of the batch x repeatedly, in place. The
        updates of an image end once its values are within the limits of step i (after one more
        update if `how.extra_update` is True), and at the latest after `how.most` updates."""
        for turn in range(self.how.most):
            told, gradient = self.evaluate(x, rows, i, t, "repeat")
            beyond = self.over(told, i)
            resting = torch.zeros_like(beyond) if self.how.extra_update else ~beyond
            x[rows] -= self.moves[i] * gradient.masked_fill(resting[:, None, None, None], 0.0)
            self.say(f"refining at step {i} {turn + 1}/{self.how.most}", rows, told)
            rows = rows[beyond]
            if not len(rows):
                return

    def evaluate(self, x: Tensor, rows: Tensor, i: int, t: Timestep, phase: str) -> tuple[Told, Tensor]:
        """Evaluates the objective and its gradient for the images `rows` (b,) of the batch x, at
        step i and timestep t. Returns (told, gradient): the values to report as name -> (b,), and
        the gradient (b,4,h,w), scaled if the setting `share` is given. The gradient of an image is
        0 if its values or gradient are not finite. `phase` is "update" or "repeat" (see `Look`)."""
        told, gradient = self.slope(x[rows], rows, t, i, phase)
        fine = finite(told, gradient)
        if not fine.all():
            warnings.warn(
                f"{self.not_finite(rows[~fine].tolist())}; updates that are not finite are left out",
                stacklevel=3,
            )
        gradient = gradient.where(fine[:, None, None, None], 0.0)
        return told, shares(gradient, x[rows], self.how.share)

    def over(self, told: Told, i: int) -> Tensor:
        """Returns a boolean per image, (b,): True if one of its values in `told` is above the limit
        that `how.repeats[i]` sets, or if there are no limits."""
        exceeded = [told[name] > limit for name, limit in self.how.repeats[i].items()]
        if not exceeded:
            return torch.ones_like(told["loss"], dtype=torch.bool)
        return torch.stack(exceeded).any(dim=0)

    def say(self, where: str, rows: Tensor, told: Told) -> None:
        if self.progress is None and self.record is None:
            return
        for b, values in zip(rows.tolist(), values_of(told)):
            if self.record is not None:
                self.record[b].note_values(values)
            if self.progress is not None:
                self.progress(b, f"{where} {in_words(values)}")


# --- optimize ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizing:
    """Settings of `optimize`: gradient descent on the initial noise.

    If `lr` is None, the gradient is scaled to `share` times the noise's norm. `norm` sets the
    noise's norm after every step: "keep" to the norm of the starting noise, "unit" to sqrt(d), the
    norm of unit noise of d numbers. `clip` bounds the norm of each image's gradient. `jitter` is
    the variance of fresh noise that is added at every step. The optimisation of an image stops once
    its values are below all `limits` (name -> value).
    """

    steps: int = 50
    optimizer: str = "sgd"  # or "adam"
    lr: float | None = None
    share: float = SHARE
    momentum: float = 0.0
    nesterov: bool = False
    clip: float | None = None
    jitter: float = 0.0
    norm: str | None = "keep"  # or "unit", or None
    regularizer: str | None = None  # a name of REGULARIZERS; not part of the reported loss
    weight: float | None = None  # of the regularizer; None: its usual weight
    limits: Mapping[str, float] = field(default_factory=dict)
    keep: str = "best"  # which iterate to return: the "best" or the "last"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("optimizer", self.optimizer, ("sgd", "adam")),
            ("norm", self.norm, ("keep", "unit", None)),
            ("keep", self.keep, ("best", "last")),
            ("regularizer", self.regularizer, (*REGULARIZERS, None)),
        ):
            if value not in choices:
                known = ", ".join(str(choice or "none") for choice in choices)
                raise ValueError(f"{name} must be one of {known}, not {value!r}")
        if self.steps < 0:
            raise ValueError(f"steps must be 0 or more, not {self.steps}")
        for name in ("lr", "share", "clip", "jitter"):
            _check_positive(name, getattr(self, name))
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be 0 or more and below 1, not {self.momentum}")


@dataclass
class Result:
    """The result of `optimize` or `refine` for one image: the values of the objective before and
    after and, for `optimize`, the values of every iterate and the noise that was found."""

    noise: Tensor  # (1, 4, h, w) float32 (float64 in a float64 model) on the CPU
    loss: float = math.nan  # of this noise
    before: dict[str, float] = field(default_factory=dict)  # values of the starting noise, by name
    after: dict[str, float] = field(default_factory=dict)  # values of this noise, by name
    # For each iterate: its values by name, with "norm" (|noise| / sqrt(d)), "mean" and "std".
    history: list[dict[str, float]] = field(default_factory=list)
    met: bool | None = None  # whether the values are below all limits; None without limits
    note: str | None = None  # what went wrong

    def note_values(self, values: dict[str, float]) -> None:
        """Stores an image's values as `after`, and at the first call also as `before`."""
        self.before = self.before or values
        self.after = values


Describe = Callable[[int, int, list[dict[str, float]]], str]  # (step, steps, history) -> message


def _describe(step: int, steps: int, history: list[dict[str, float]]) -> str:
    """Formats an image's progress after `step` of `steps` steps, such as "optimize 7/50 loss 0.312
    best 0.287 cross 0.21 |x| 1.002". Here "cross" is a further value of the objective, and |x| the
    noise's norm, relative to that of unit noise. `history` holds the values of every iterate so
    far."""
    now = history[-1]
    best = min(h["loss"] for h in history)
    told = {name: v for name, v in now.items() if name not in ("loss", "norm", "mean", "std")}
    more = f" {in_words(told)}" if told else ""
    return f"optimize {step}/{steps} loss {now['loss']:.3g} best {best:.3g}{more} |x| {now['norm']:.3f}"


def optimize(
    slope: Callable[[Tensor, Tensor], tuple[Told, Tensor]],
    score: Score,
    start: Tensor,
    rows: Tensor,
    how: Optimizing,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    draws: Sequence[torch.Generator] | None = None,
    describe: Describe = _describe,
    not_finite: NotFinite | None = None,
    progress: Say | None = None,
) -> list[Result]:
    """Optimises initial noises by gradient descent, from `start` (b,4,h,w), with the settings
    `how`. `rows` (b,) holds each image's number in the batch. Returns one Result per image.

    `slope(x, rows)` returns (told, gradient). `told` is a dict of name -> (b,) with the value to
    minimise under "loss" and further values to report, and `gradient` (b,4,h,w) is that of the
    loss. `score(x, rows)` returns `told` alone; it is called for the last iterate, which needs no
    gradient. `draws` holds one random generator per image, which the setting `jitter` needs.

    If an image's values or gradient are not finite, its result is its starting noise, with a note
    and a warning. `not_finite([row])`, if given, returns the beginning of both. `progress(b,
    message)` is called with the progress of image b; `describe` makes the messages.
    """
    x = start.to(device, dtype)
    first = x
    state = _Descent(how, x)
    results = [Result(noise[None].cpu()) for noise in start]
    going = torch.ones(len(x), dtype=torch.bool, device=device)
    for step in range(how.steps + 1):
        last = step == how.steps
        told, gradient = (score(x, rows), torch.zeros_like(x)) if last else slope(x, rows)
        fine = finite(told, gradient)
        done = met(told, how.limits) if how.limits else torch.zeros_like(going)
        told = told | moments(x)
        for k, (values, healthy, ended, active) in enumerate(
            zip(values_of(told), fine.tolist(), done.tolist(), going.tolist())
        ):
            result = results[k]
            if result.note or not active:
                continue
            if not healthy:
                reason = f"the noise could not be optimised: not finite at step {step}"
                _fail(result, start[k], reason if not_finite is None else not_finite([int(rows[k])]))
                continue
            result.history.append(values)
            kept = {name: value for name, value in values.items() if name not in ("norm", "mean", "std")}
            result.before = result.before or kept
            better = last if how.keep == "last" else not values["loss"] >= result.loss
            if better or ended:
                # At step 0 nothing has changed: return the noise exactly as it was given.
                result.noise = (x if step else start)[k][None].cpu()
                result.loss = values["loss"]
                result.after = kept
            result.met = ended if how.limits else None
            if how.norm is None:
                _warn_of_norm(result.history)
            if progress is not None:
                message = describe(step, how.steps, result.history)
                progress(int(rows[k]), Step(message, step, how.steps))
        going = going & fine & ~done
        if last or not going.any():
            break
        gradient = gradient.where(going[:, None, None, None], 0.0)
        x = state.step(x, first, gradient, going, draws)
    return results


class _Descent:
    """The optimiser of `optimize`, SGD or Adam, with separate state for each image."""

    def __init__(self, how: Optimizing, x: Tensor):
        self.how = how
        self.velocity = torch.zeros_like(x)
        self.spread = torch.zeros_like(x)  # Adam's second moment
        self.count = 0

    def step(
        self,
        x: Tensor,
        start: Tensor,
        gradient: Tensor,
        going: Tensor,
        draws: Sequence[torch.Generator] | None,
    ) -> Tensor:
        """Returns x (b,4,h,w) after one step of the images for which `going` (b,) is True. The
        other images stay unchanged. `start` is the noise that the optimisation began from, and
        `gradient` that of the loss, both (b,4,h,w). `draws` holds one random generator per image
        for `jitter`."""
        how = self.how
        if how.regularizer is not None:
            pull, own = REGULARIZERS[how.regularizer]
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                [extra] = torch.autograd.grad(pull(leaf, start).sum(), leaf)
            gradient = gradient + (own if how.weight is None else how.weight) * extra
        if how.clip is not None:
            size = gradient.flatten(1).norm(dim=1)
            gradient = gradient * (how.clip / size.clamp(min=1e-30)).clamp(max=1).view(-1, 1, 1, 1)
        moved = x - self._direction(x, gradient)
        if how.jitter:
            assert draws is not None, "jitter needs a generator per image"
            z = torch.stack([torch.randn(x.shape[1:], generator=g) for g in draws])
            moved = moved + how.jitter**0.5 * z.to(moved)
        if how.norm is not None:
            d = x[0].numel()
            wanted = start.flatten(1).norm(dim=1) if how.norm == "keep" else d**0.5
            moved = moved * (wanted / moved.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
        return moved.where(going[:, None, None, None], x)

    def _direction(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Returns the step (b,4,h,w) to subtract from x, computed from the gradient, and updates
        the optimiser's state."""
        how = self.how
        if how.lr is None:
            gradient = shares(gradient, x, how.share)
        lr = 1.0 if how.lr is None else how.lr
        if how.optimizer == "adam":
            self.count += 1
            b1, b2 = 0.9, 0.999
            self.velocity = b1 * self.velocity + (1 - b1) * gradient
            self.spread = b2 * self.spread + (1 - b2) * gradient**2
            mean = self.velocity / (1 - b1**self.count)
            return lr * mean / ((self.spread / (1 - b2**self.count)).sqrt() + 1e-8)
        self.velocity = how.momentum * self.velocity + gradient
        return lr * (gradient + how.momentum * self.velocity if how.nesterov else self.velocity)


def _fail(result: Result, start: Tensor, reason: str) -> None:
    """Sets an image's result to `start` (4,h,w), the noise that its optimisation began from. Adds a
    note with the reason, and warns."""
    result.note = f"{reason}; the noise is left as it was"
    result.noise = start[None].cpu()
    result.after = result.before
    result.loss = result.before.get("loss", math.nan)
    warnings.warn(result.note, stacklevel=4)


def _warn_of_norm(history: list[dict[str, float]]) -> None:
    """Warns when the noise's norm leaves the range NORMAL, in which the UNet still treats it as
    noise, for the first time. `history` holds the values of every iterate so far, the norm among
    them."""
    low, high = NORMAL
    norms = [h["norm"] for h in history[1:]]
    outside = [norm for norm in norms if not low <= norm <= high]
    if len(outside) == 1 and outside[0] == norms[-1]:
        warnings.warn(
            f"at step {len(norms)} the norm of the noise is {norms[-1]:.3f} of unit noise's, "
            f"outside {low}..{high}: lower lr, or keep its norm",
            stacklevel=5,
        )


# --- select --------------------------------------------------------------------------------------


@dataclass
class Selection:
    """The noise chosen for one image, and the score of every candidate."""

    seed: int
    noise: Tensor  # (1, 4, h, w) float32 on the CPU
    score: float
    # Candidate -> score, in the order of the candidates. A candidate is a seed, or in a search the
    # tuple (round, k), or () for the noise that the search began from.
    scores: dict[Any, float]
    rows: int = 0  # UNet rows
    better: str = "low"  # or "high"
    path: list[list[int]] = field(
        default_factory=list
    )  # of a search: [round, k] of each neighbour it moved to

    @property
    def ranked(self) -> list[Any]:
        """The candidates in the order of their scores, the best first. Candidates without a score
        come last."""
        sign = 1 if self.better == "low" else -1
        return sorted(self.scores, key=lambda key: _rank(sign * self.scores[key]))


def _rank(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def select(
    score: Callable[[Tensor], Sequence[float]],
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    at_once: int,
    better: str = "low",
    known: Mapping[int, float] | None = None,
    worst: bool = False,
    advice: str = "try --dtype float32 or bfloat16",
    progress: Callable[[str], None] | None = None,
) -> Selection:
    """Chooses one image's noise: that of the seed among `seeds` whose noise has the best score. Of
    equal scores, the first is taken.

    `score(x)` returns the scores of noises x (k,4,h,w). `better` states whether "low" or "high"
    scores are better. `shape` is (4,h,w) of one noise. `at_once` noises are scored at a time.
    Scores that are given in `known` (seed -> score) are not computed again, and a repeated seed is
    scored once. `worst` chooses the worst seed instead, for experiments. `advice` is the end of the
    error message if no candidate has a score. `progress(message)` is called after every batch of
    noises, with a message such as "20/100 best 0.912 (seed 7)".

    Raises ValueError if `seeds` is empty, and FloatingPointError if every candidate's score is NaN.
    """
    if not len(seeds):
        raise ValueError("there are no seeds to select from: give at least one")
    wanted = list(dict.fromkeys(seeds))
    scores = dict(known or {})
    missing = [seed for seed in wanted if seed not in scores]
    take = max if (better == "high") != worst else min

    def chosen() -> int | None:
        scored = [seed for seed in wanted if not math.isnan(scores.get(seed, math.nan))]
        return take(scored, key=lambda seed: scores[seed]) if scored else None

    for begin in range(0, len(missing), at_once):
        part = missing[begin : begin + at_once]
        scores.update(zip(part, score(draw_noise(part, shape)), strict=True))
        seed = chosen()
        if progress is not None and seed is not None:
            done = sum(s in scores for s in wanted)
            name = "worst" if worst else "best"
            message = f"{done}/{len(wanted)} {name} {scores[seed]:.3f} (seed {seed})"
            progress(Step(message, done, len(wanted)))
    seed = chosen()
    if seed is None:
        raise FloatingPointError(f"no candidate has a score: sampling overflowed; {advice}")
    kept = {s: scores[s] for s in wanted}
    return Selection(seed, draw_noise([seed], shape), scores[seed], kept, better=better)


def neighbours(noise: Tensor, count: int, near: float, generator: torch.Generator) -> Tensor:
    """Returns `count` random noises (count,4,h,w) near a given `noise` (1,4,h,w). Each has the norm
    of `noise`, and the angle between the two has the cosine `near`.

    Each is |n| (c u + sqrt(1 - c^2) w) (Ma et al. 2025, arXiv 2501.09732), where n is `noise`, c is
    `near`, u the unit vector along n, and w a random unit vector orthogonal to u.
    """
    flat = noise.flatten().double()
    directions = torch.randn(count, *noise.shape[1:], generator=generator).flatten(1).double()
    found = [beside(flat, v, near) for v in directions]
    return torch.stack(found).view(count, *noise.shape[1:]).to(noise.dtype)


def beside(n: Tensor, v: Tensor, near: float) -> Tensor:
    """Rotates a noise n (d,) towards a direction v (d,), by an angle whose cosine is `near`. The
    norm stays the same."""
    u = n / n.norm()
    w = v - (v @ u) * u
    return n.norm() * (near * u + (1 - near**2) ** 0.5 * w / w.norm())


def search(
    score: Callable[[Tensor], Sequence[float]],
    seed: int,
    shape: Sequence[int],
    *,
    rounds: int = 4,
    count: int = 4,
    near: float = 0.95,
    better: str = "low",
    progress: Callable[[str], None] | None = None,
) -> Selection:
    """Searches for a better noise near the noise of `seed`, without gradients: zero-order search
    (Ma et al. 2025, arXiv 2501.09732).

    Each of `rounds` rounds scores `count` random noises near the best noise so far; `near` is the
    cosine of the angle between a new noise and the best one. If one of the new noises has a better
    score, the search moves to the best of them. All random directions come from the seed's
    generator, so `replay` can make the found noise again from the seed and `Selection.path`. The
    cost is 1 + rounds * count scores. `score`, `shape` and `better` are as in `select`.
    `progress(message)` is called after every round. Raises FloatingPointError if every score is
    NaN.
    """
    sign = 1 if better == "low" else -1
    [generator] = generators([seed])
    pivot = torch.randn(tuple(shape), generator=generator)[None]
    path: list[list[int]] = []
    scores: dict[Any, float] = {(): float(score(pivot)[0])}
    best = scores[()]
    for turn in range(rounds):
        around = neighbours(pivot, count, near, generator)
        values = [float(value) for value in score(around)]
        scores |= {(turn, k): value for k, value in enumerate(values)}
        k = min(range(count), key=lambda k: _rank(sign * values[k]))
        if _rank(sign * values[k]) < _rank(sign * best):
            best, pivot = values[k], around[k : k + 1]
            path.append([turn, k])
        if progress is not None:
            progress(Step(f"round {turn + 1}/{rounds} best {best:.3f}", turn + 1, rounds))
    if math.isnan(best):
        raise FloatingPointError(
            "no candidate has a score: sampling overflowed; try --dtype float32 or bfloat16"
        )
    return Selection(seed, pivot, best, scores, better=better, path=path)


def replay(
    seed: int, path: Sequence[Sequence[int]], shape: Sequence[int], *, rounds: int, count: int, near: float
) -> Tensor:
    """Makes the noise (1,4,h,w) that `search` found from `seed` again, without any score. `path` is
    the attribute `path` of the Selection that `search` returned; the other arguments are those
    given to `search`."""
    [generator] = generators([seed])
    pivot = torch.randn(tuple(shape), generator=generator)[None]
    taken = {turn: k for turn, k in path}
    for turn in range(rounds):
        around = neighbours(pivot, count, near, generator)
        if turn in taken:
            pivot = around[taken[turn]][None]
    return pivot


@dataclass
class Halving:
    """The seed that `halve` chose, and the scores of every stage."""

    seed: int
    stages: list[dict[int, float]]  # for each stage, seed -> score of the seeds that reached it


def halve(
    seeds: Sequence[int],
    stages: Sequence[tuple[Callable[[list[int]], Sequence[float]], int]],
    *,
    progress: Callable[[str], None] | None = None,
) -> Halving:
    """Chooses a seed in stages. Each stage scores the seeds that remain and drops the worst, so
    that an expensive score is computed for few seeds.

    A stage is a pair (score, keep): `score(seeds)` returns losses, lower is better, and the `keep`
    seeds with the lowest losses (at least one) reach the next stage. The seed with the lowest loss
    in the last stage is chosen. `progress(message)` is called after every stage. Raises ValueError
    if `seeds` is empty, and FloatingPointError if all losses of a stage are NaN.
    """
    if not len(seeds):
        raise ValueError("there are no seeds to select from: give at least one")
    left = list(dict.fromkeys(seeds))
    history = []
    for number, (score, keep) in enumerate(stages, 1):
        losses_of = dict(zip(left, map(float, score(left)), strict=True))
        if all(map(math.isnan, losses_of.values())):
            raise FloatingPointError("no candidate has a score: sampling overflowed; try --dtype float32")
        history.append(losses_of)
        left = sorted(left, key=lambda seed: _rank(losses_of[seed]))[: max(1, keep)]
        if progress is not None:
            message = f"stage {number}/{len(stages)} best {losses_of[left[0]]:.3f} (seed {left[0]})"
            progress(Step(message, number, len(stages)))
    return Halving(left[0], history)
