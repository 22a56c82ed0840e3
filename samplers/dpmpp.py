"""DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): a second-order step from two predictions.

In y and sigma (explained in `samplers/__init__.py`) and with lambda = -log sigma, the exact
solution for clean latents D that stay constant is y' = (s'/s) y + (1 - s'/s) D. D is extrapolated
to the middle of the step in lambda from this prediction and the one before.
"""

import math

from torch import Tensor

from .schedule import Generators, Predictor, Refine, Schedule, Steps, Timestep, to_x, to_y


def timesteps(schedule: Schedule, steps: int, start: int = 0, karras: bool = False) -> list[Timestep]:
    """Lists the timesteps of a run without its first `start` steps, most noise first. With `karras`
    they are fractional."""
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
    """Denoises unit noise x (B,4,h,w), and yields as every sampler does (`samplers/__init__.py`).

    The first step is of first order. The last step is of first order too if it ends at sigma 0 or
    if the run has fewer than 15 steps, because extrapolation would be unstable there. `karras`
    places more levels where there is little noise (`Schedule.karras_timesteps`).
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
