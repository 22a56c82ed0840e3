"""UniPC of order 2 with B(h) = exp(h) - 1, "bh2" (Zhao et al. 2023): a predictor, and a corrector that costs nothing.

Written in y and sigma (explained in `samplers/__init__.py`) like DPM++: y' = (s'/s) y + (1 - s'/s) D. The prediction
made at the end of a step, needed for the next one anyway, first corrects that step's end.
"""

import math

from .schedule import Schedule, to_x, to_y


def timesteps(schedule: Schedule, steps: int) -> list[int]:
    """The timesteps of a run, most noise first."""
    return schedule.solver_timesteps(steps)


def sample(predict, x, schedule, steps, *, init=None, start=0, generator=None, refine=None, final=None):
    """Unit noise x (B,4,h,w) -> latents. First order at the first step and the last."""
    visited = timesteps(schedule, steps)[start:]
    sigmas = schedule.sigmas(visited, final)
    x = schedule.begin(init, x, visited[0])
    y_last, clean, before = (
        None,
        None,
        None,
    )  # where the last step began, the clean pictures predicted there and earlier
    for i, t in enumerate(visited):
        s, s_next = sigmas[i], sigmas[i + 1]
        y_refined = 0
        if refine is not None:
            refined = refine(i, t, x)
            y_refined = to_y(
                refined - x, s
            )  # what it changed; the corrector below starts from the step's beginning
            x = refined
        now = to_y(x, s) - s * predict(x, t)
        y = to_y(x, s)
        if i > 0:
            ratio = s / sigmas[i - 1]
            if i == 1:
                d = clean + 0.5 * (now - clean)
            else:  # fit the two differences, as the predictor of that step saw them and as the new prediction does
                h = math.log(sigmas[i - 1] / s)
                r = math.log(sigmas[i - 2] / sigmas[i - 1]) / -h
                a, b = _corrector_weights(r, h)
                d = clean + a * (before - clean) / r + b * (now - clean)
            y = ratio * y_last + (1 - ratio) * d + y_refined
        d = now
        if 0 < i < len(visited) - 1:
            r = math.log(sigmas[i - 1] / s) / -math.log(s / s_next)
            d = now + 0.5 * (clean - now) / r
        ratio = s_next / s
        x = to_x(ratio * y + (1 - ratio) * d, s_next)
        y_last, before, clean = y, clean, now
        yield i, t, x


def _corrector_weights(r: float, h: float) -> tuple[float, float]:
    """The weights of the differences at r (behind) and 1 (the step's end): the solution of
    [[1, 1], [r, 1]] (a, b) = (phi_2, 2 phi_3) h-scaled by B(h), theorem 3.1."""
    b_h = math.expm1(-h)
    phi = b_h / -h - 1
    first = phi / b_h
    second = 2 * (phi / -h - 0.5) / b_h
    b = (second - r * first) / (1 - r)
    return first - b, b
