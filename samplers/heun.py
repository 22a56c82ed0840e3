"""Heun's second-order rule for dy/dsigma = eps (Karras et al. 2022, algorithm 1, without churn). A
step is first taken as Euler's, then taken again from its beginning with the mean of the slopes at
both ends. `samplers/__init__.py` explains the variables; `euler.begin` makes the first latents."""

from torch import Tensor

from .euler import begin, timesteps
from .schedule import Generators, Predictor, Refine, Schedule, Steps, to_x, to_y


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
    x = begin(init, x, schedule, visited[0])
    for i, t in enumerate(visited):
        s, s_next = sigmas[i], sigmas[i + 1]
        if refine is not None:
            x = refine(i, t, x)
        y = to_y(x, s)
        slope = predict(x, t)
        y_next = y + (s_next - s) * slope
        if i + 1 < len(visited):
            slope_next = predict(to_x(y_next, s_next), visited[i + 1])
            y_next = y + (s_next - s) * (slope + slope_next) / 2
        x = to_x(y_next, s_next)
        yield i, t, x
