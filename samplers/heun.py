"""Heun's second-order rule for dy/dsigma = eps (Karras et al. 2022, algorithm 1, without churn). A
step is first taken as Euler's, then taken again from its beginning with the mean of the slopes at
both ends. `samplers/__init__.py` explains the variables; `euler.begin` makes the first latents."""

from torch import Tensor

from . import euler
from .schedule import ZERO_SNR_SAMPLERS, Generators, Predictor, Refine, Schedule, Steps, Timestep, to_x, to_y


def timesteps(schedule: Schedule, steps: int, start: int = 0) -> list[Timestep]:
    """Lists the timesteps of a run as `euler.timesteps` does.

    Raises ValueError for a run that begins at zero terminal SNR. There the mean of the two slopes
    would multiply the difference between the clean latents predicted at the two ends of the first
    step by about 2048 / sigma of the step's end, which is 40 in a run of 25 steps.
    """
    visited = euler.timesteps(schedule, steps, start)
    schedule.check_signal(visited, "the sampler heun", f"take {ZERO_SNR_SAMPLERS}")
    return visited


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
    """Denoises unit noise x (B,4,h,w) with Heun's method. It calls `predict` twice in each step,
    but only once in the last one. predict(x, t) returns the noise in latents x at timestep t.
    Yields (i, t, x) after every step: the step's number, its timestep, and the latents. `init`,
    `start`, `refine` and `final` are explained in `samplers/__init__.py`; `generator` is
    ignored."""
    visited = timesteps(schedule, steps, start)
    sigmas = schedule.sigmas(visited, final)
    x = euler.begin(init, x, schedule, visited[0])
    for i, t in enumerate(visited):
        s, s_next = sigmas[i], sigmas[i + 1]
        if refine is not None:
            x = refine(i, t, x)
        y = to_y(x, s)
        slope = predict(x, t)
        y_next = y + (s_next - s) * slope
        if i + 1 < len(visited):
            slope_next = predict(to_x(y_next, s_next).to(x.dtype), visited[i + 1])
            y_next = y + (s_next - s) * (slope + slope_next) / 2
        x = to_x(y_next, s_next).to(x.dtype)
        yield i, t, x
