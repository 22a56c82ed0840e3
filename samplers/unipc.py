"""UniPC of order 2 with B(h) = exp(h) - 1, called "bh2" (Zhao et al. 2023): a predictor, and a
corrector that costs no further network evaluation.

In the variables y and sigma (explained in `samplers/__init__.py`) a step from level s to level s'
is y' = (s'/s) y + (1 - s'/s) D, as for DPM++, where D estimates the clean latents. The prediction
at the end of a step, which the next step needs anyway, is used first to correct the latents there.
"""

import math

from torch import Tensor

from .schedule import Generators, Predictor, Refine, Schedule, Steps, Timestep, to_x, to_y


def timesteps(schedule: Schedule, steps: int, start: int = 0) -> list[Timestep]:
    """Lists the timesteps of a run, most noise first. The run has `steps` steps, but skips the
    first `start` of them."""
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
    """Denoises unit noise x (B,4,h,w) with UniPC. predict(x, t) returns the noise in latents x at
    timestep t. Yields (i, t, x) after every step: the step's number, its timestep, and the latents.
    `init`, `start`, `refine` and `final` are explained in `samplers/__init__.py`; `generator` is
    ignored. All steps are of second order, except the first and the last, which are of first
    order."""
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
    """Returns (a, b), the two weights of UniPC's corrector. The corrector takes a step again, with
    a better estimate of the clean latents: D + a (D' - D) / r + b (D'' - D). Here D is the
    prediction of the clean latents at the beginning of the step, D' the prediction one step
    earlier, and D'' the prediction at the end of the step.

    `h` is the length of the step in lambda = -log sigma. `r` is the place of D' relative to the
    beginning of the step, in units of `h`, and is negative. The weights solve a + b = phi / B and r
    a + b = 2 (phi / -h - 1/2) / B, with B = exp(-h) - 1 and phi = B / -h - 1 (theorem 3.1 of the
    UniPC paper).
    """
    b_h = math.expm1(-h)
    phi = b_h / -h - 1
    first = phi / b_h
    second = 2 * (phi / -h - 0.5) / b_h
    b = (second - r * first) / (1 - r)
    return first - b, b
