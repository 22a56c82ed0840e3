"""Euler's rule for dy/dsigma = eps, plain and ancestral (Karras et al. 2022, algorithm 1 without its second half;
ancestral steps as in Song et al. 2021, written in sigma). The variables are explained in `samplers/__init__.py`."""

from .random import randn_like
from .schedule import Schedule, to_x, to_y


def timesteps(schedule: Schedule, steps: int) -> list[int | float]:
    """The timesteps of a run, most noise first; fractional where the model's spacing is linspace."""
    return schedule.timesteps(steps, fractional=True)


def sample(predict, x, schedule, steps, *, init=None, start=0, generator=None, refine=None, final=None):
    """Unit noise x (B,4,h,w) -> latents: along the tangent from each level to the next."""
    visited = timesteps(schedule, steps)[start:]
    sigmas = schedule.sigmas(visited, final)
    x = schedule.begin(init, x, visited[0])
    for i, t in enumerate(visited):
        if refine is not None:
            x = refine(i, t, x)
        y = to_y(x, sigmas[i]) + (sigmas[i + 1] - sigmas[i]) * predict(x, t)
        x = to_x(y, sigmas[i + 1])
        yield i, t, x


def sample_ancestral(
    predict, x, schedule, steps, *, init=None, start=0, generator=None, refine=None, final=None
):
    """As `sample`, but each step goes further down and climbs back with fresh noise from `generator`, one an image."""
    visited = timesteps(schedule, steps)[start:]
    sigmas = schedule.sigmas(visited, final)
    x = schedule.begin(init, x, visited[0])
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
