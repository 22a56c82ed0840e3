"""DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): a second-order step out of two predicted clean pictures.

In y and sigma (explained in `samplers/__init__.py`) and with lambda = -log sigma, the exact solution under a clean
picture D that did not change is y' = (s'/s) y + (1 - s'/s) D. D is extrapolated to the middle of the step in lambda
from this prediction and the one before.
"""

import math

from .schedule import Schedule, to_x, to_y


def timesteps(schedule: Schedule, steps: int, karras: bool = False) -> list[int | float]:
    """The timesteps of a run, most noise first; fractional under `karras`."""
    return schedule.karras_timesteps(steps) if karras else schedule.solver_timesteps(steps)


def sample(
    predict, x, schedule, steps, *, karras=False, init=None, start=0, generator=None, refine=None, final=None
):
    """Unit noise x (B,4,h,w) -> latents. First order at the first step and at the last where it ends at sigma 0 or the
    run is shorter than 15 steps: extrapolation would not be stable there. `karras` spaces the levels closer together
    where there is little noise (`Schedule.karras_timesteps`)."""
    visited = timesteps(schedule, steps, karras)[start:]
    sigmas = schedule.sigmas(visited, final)
    x = schedule.begin(init, x, visited[0])
    before = None
    for i, t in enumerate(visited):
        s, s_next = sigmas[i], sigmas[i + 1]
        if refine is not None:
            x = refine(i, t, x)
        y = to_y(x, s)
        clean = y - s * predict(x, t)
        d, last = clean, i == len(visited) - 1
        if before is not None and not (last and (s_next == 0 or steps < 15)):
            r = math.log(sigmas[i - 1] / s) / math.log(
                s / s_next
            )  # the step before against this one, in lambda
            d = clean + (clean - before) / (2 * r)
        x = to_x(s_next / s * y + (1 - s_next / s) * d, s_next)
        before = clean
        yield i, t, x
