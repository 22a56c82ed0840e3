"""DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): a second-order step from two predictions.

`samplers/__init__.py` explains the variables y and sigma; let lambda = -log sigma. A step goes from
y at level s to y' at level s'. If the predicted clean latents D were constant, the exact solution
would be y' = (s'/s) y + (1 - s'/s) D. The sampler extrapolates D from the present prediction and
the one before to the middle of the step in lambda.
"""

import math

from torch import Tensor

from .schedule import Generators, Predictor, Refine, Schedule, Steps, Timestep, to_x, to_y


def timesteps(schedule: Schedule, steps: int, start: int = 0, karras: bool = False) -> list[Timestep]:
    """Lists the timesteps of a run, most noise first. The run has `steps` steps, but skips the
    first `start` of them. If `karras` is True, the timesteps are those of Karras noise levels,
    which are fractional."""
    grid = schedule.karras_timesteps(steps) if karras else schedule.solver_timesteps(steps)
    return grid[start:]


def sample(
    predict: Predictor,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    karras: bool = False,
    init: Tensor | None = None,
    start: int = 0,
    generator: Generators | None = None,
    refine: Refine | None = None,
    final: str | None = None,
) -> Steps:
    """Denoises unit noise x (B,4,h,w) with DPM-Solver++(2M). predict(x, t) returns the noise in
    latents x at timestep t. Yields (i, t, x) after every step: the step's number, its timestep, and
    the latents. `init`, `start`, `refine` and `final` are explained in `samplers/__init__.py`;
    `generator` is ignored.

    If `karras` is True, the run has Karras noise levels: more of them where there is little noise.
    The first step is of first order. So is the last step if it ends without noise or if `steps` is
    less than 15, because second order would be unstable there.
    """
    visited = timesteps(schedule, steps, start, karras)
    sigmas = schedule.sigmas(visited, final)
    x = schedule.begin(init, x, visited[0])
    before = None
    for i, t in enumerate(visited):
        s, s_next = sigmas[i], sigmas[i + 1]
        if refine is not None:
            x = refine(i, t, x)
        y = to_y(x, s)
        clean = y - s * predict(x, t)
        d = clean
        last = i == len(visited) - 1
        if before is not None and not (last and (s_next == 0 or steps < 15)):
            # The length of the last step relative to this one, in lambda.
            r = math.log(sigmas[i - 1] / s) / math.log(s / s_next)
            d = clean + (clean - before) / (2 * r)
        x = to_x(s_next / s * y + (1 - s_next / s) * d, s_next).to(x.dtype)
        before = clean
        yield i, t, x
