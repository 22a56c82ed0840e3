"""Euler's rule for dy/dsigma = eps, plain and ancestral (Karras et al. 2022, algorithm 1 without
its second half; ancestral steps as in Song et al. 2021, written in sigma). The variables are
explained in `samplers/__init__.py`."""

from torch import Tensor

from .random import randn_like
from .schedule import Generators, Predictor, Refine, Schedule, Steps, Timestep, to_x, to_y


def timesteps(schedule: Schedule, steps: int, start: int = 0) -> list[Timestep]:
    """Lists the timesteps of a run of `steps` steps, most noise first, without the first `start` of
    them. If the schedule has linspace spacing, the timesteps are fractional."""
    return schedule.timesteps(steps, fractional=True)[start:]


def begin(init: Tensor | None, noise: Tensor, schedule: Schedule, t: Timestep) -> Tensor:
    """Returns the latents (B,4,h,w) with which a run starts at timestep t. `noise` (B,4,h,w) is
    unit noise. `init` holds the clean latents of an image for image-to-image, and is None
    otherwise.

    With `init`, the result is the usual mixture of `init` and `noise` at the level of t. Without
    `init`, the result depends on the schedule's timestep spacing, as in diffusers' classes for
    Euler's and Heun's rules. Linspace and trailing runs start from y = sigma noise, that is, from
    pure noise at exactly the level of t, which in variance-preserving scale is sqrt(1 - abar)
    noise. Leading runs start from unit noise itself, as the runs of all other samplers do.
    """
    if init is None and schedule.config.timestep_spacing != "leading":
        return (1 - schedule.abar(t)) ** 0.5 * noise
    return schedule.begin(init, noise, t)


def sample(
    predict: Predictor,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    init: Tensor | None = None,
    start: int = 0,
    generator: Generators | None = None,
    refine: Refine | None = None,
    final: str | None = None,
) -> Steps:
    """Denoises unit noise x (B,4,h,w) with Euler's rule, which follows the tangent from each level
    to the next. Yields (i, t, x) after every step: the step's number, its timestep, and the
    latents. `samplers/__init__.py` explains the arguments."""
    visited = timesteps(schedule, steps, start)
    sigmas = schedule.sigmas(visited, final)
    x = begin(init, x, schedule, visited[0])
    for i, t in enumerate(visited):
        if refine is not None:
            x = refine(i, t, x)
        y = to_y(x, sigmas[i]) + (sigmas[i + 1] - sigmas[i]) * predict(x, t)
        x = to_x(y, sigmas[i + 1])
        yield i, t, x


def sample_ancestral(
    predict: Predictor,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    init: Tensor | None = None,
    start: int = 0,
    generator: Generators | None = None,
    refine: Refine | None = None,
    final: str | None = None,
) -> Steps:
    """Denoises unit noise x (B,4,h,w) with Euler's rule and fresh noise in every step. Each step
    first goes to a noise level below the one at which it ends, and then adds noise to reach that.
    Yields (i, t, x) after every step: the step's number, its timestep, and the latents.
    `samplers/__init__.py` explains the arguments.

    The noise is drawn from `generator`, a list with one generator per image. Raises ValueError
    without generators.
    """
    visited = timesteps(schedule, steps, start)
    sigmas = schedule.sigmas(visited, final)
    x = begin(init, x, schedule, visited[0])
    for i, t in enumerate(visited):
        s, s_next = sigmas[i], sigmas[i + 1]
        up = (s_next**2 * (s**2 - s_next**2) / s**2) ** 0.5  # the posterior's standard deviation
        down = (s_next**2 - up**2) ** 0.5
        if refine is not None:
            x = refine(i, t, x)
        y = to_y(x, s) + (down - s) * predict(x, t)
        if up > 0:
            y = y + up * randn_like(generator, x)
        x = to_x(y, s_next)
        yield i, t, x
