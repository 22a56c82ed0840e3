"""Euler's rule for dy/dsigma = eps, plain and ancestral (Karras et al. 2022, algorithm 1 without
its second half; ancestral steps as in Song et al. 2021, written in sigma). The variables are
explained in `samplers/__init__.py`."""

from torch import Tensor

from .random import randn_like
from .schedule import Generators, Predictor, Refine, Schedule, Steps, Timestep, to_x, to_y


def timesteps(schedule: Schedule, steps: int, start: int = 0) -> list[Timestep]:
    """Lists the timesteps of a run, most noise first. The run has `steps` steps, but skips the
    first `start` of them. The timesteps are fractional if the schedule's spacing is linspace."""
    return schedule.timesteps(steps, fractional=True)[start:]


def begin(init: Tensor | None, noise: Tensor, schedule: Schedule, t: Timestep) -> Tensor:
    """Returns the latents (B,4,h,w) with which a run at timestep t begins. `noise` (B,4,h,w) is
    unit noise. For image-to-image, `init` (B,4,h,w) are the clean latents of an image; otherwise
    `init` is None.

    With `init`, the result is `init` with noise added up to the level of t. Without `init`, it
    depends on the schedule's timestep spacing, as in diffusers' classes for the methods of Euler
    and Heun. With leading spacing it is `noise` itself, as for other samplers. With linspace and
    trailing spacing it is sqrt(1 - abar) times `noise`, the noise that latents at t contain, where
    abar is the schedule's cumulative product of 1 - beta.
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
    """Denoises unit noise x (B,4,h,w) with Euler's method. predict(x, t) returns the noise in
    latents x at timestep t. Yields (i, t, x) after every step: the step's number, its timestep, and
    the latents. `init`, `start`, `refine` and `final` are explained in `samplers/__init__.py`;
    `generator` is ignored."""
    visited = timesteps(schedule, steps, start)
    sigmas = schedule.sigmas(visited, final)
    x = begin(init, x, schedule, visited[0])
    for i, t in enumerate(visited):
        if refine is not None:
            x = refine(i, t, x)
        y = to_y(x, sigmas[i]) + (sigmas[i + 1] - sigmas[i]) * predict(x, t)
        x = to_x(y, sigmas[i + 1]).to(x.dtype)
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
    """Denoises unit noise x (B,4,h,w) with the ancestral variant of Euler's method. Each step first
    goes below the noise level at which it is to end, and then adds fresh noise up to that level.
    The fresh noise is drawn from `generator`, a list with one generator per image. Raises
    ValueError without generators.

    predict(x, t) returns the noise in latents x at timestep t. Yields (i, t, x) after every step:
    the step's number, its timestep, and the latents. `init`, `start`, `refine` and `final` are
    explained in `samplers/__init__.py`.
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
        x = to_x(y, s_next).to(x.dtype)
        yield i, t, x
