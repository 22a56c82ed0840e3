"""UniPC of order 2, B(h) = exp(h) - 1 ("bh2"; Zhao et al. 2023): predictor and free corrector.

Written in y and sigma (explained in `samplers/__init__.py`) like DPM++, a step is
y' = (s'/s) y + (1 - s'/s) D. The prediction at the end of a step, which the next step needs anyway,
first corrects the latents there.
"""

import math

from torch import Tensor

from .schedule import Generators, Predictor, Refine, Schedule, Steps, Timestep, to_x, to_y


def timesteps(schedule: Schedule, steps: int, start: int = 0) -> list[Timestep]:
    """Lists the timesteps of a run without its first `start` steps, most noise first."""
    return schedule.solver_timesteps(steps)[start:]


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
    """Denoises unit noise x (B,4,h,w), and yields as every sampler does (`samplers/__init__.py`).
    The first and the last step are of first order."""
    visited = timesteps(schedule, steps, start)
    sigmas = schedule.sigmas(visited, final)
    x = schedule.begin(init, x, visited[0])
    y_last = x  # where the last step began
    clean = before = x  # the clean latents predicted there, and one step earlier
    for i, t in enumerate(visited):
        s, s_next = sigmas[i], sigmas[i + 1]
        y_refined = 0.0  # the change made by refine, which the corrector adds to its own step
        if refine is not None:
            refined = refine(i, t, x)
            y_refined = to_y(refined - x, s)
            x = refined
        y = to_y(x, s)
        now = y - s * predict(x, t)
        if i > 0:
            ratio = s / sigmas[i - 1]
            if i == 1:
                d = clean + 0.5 * (now - clean)
            else:  # fit both differences: the one that step's predictor used, and the new one
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
        x = to_x(ratio * y + (1 - ratio) * d, s_next).to(x.dtype)
        y_last, before, clean = y, clean, now
        yield i, t, x


def _corrector_weights(r: float, h: float) -> tuple[float, float]:
    """Returns (a, b), the corrector's weights of two differences to the clean latents predicted at
    the step's beginning: a belongs to the prediction one step earlier (its difference divided by
    r), b to the prediction at the step's end.

    `h` is the length of the step in lambda. `r` (negative) is the place of the earlier prediction
    on a scale on which the step goes from 0 to 1. The weights solve [[1, 1], [r, 1]] (a, b) =
    (phi_2, 2 phi_3), scaled by h and B(h) (theorem 3.1).
    """
    b_h = math.expm1(-h)
    phi = b_h / -h - 1
    first = phi / b_h
    second = 2 * (phi / -h - 0.5) / b_h
    b = (second - r * first) / (1 - r)
    return first - b, b
