"""DDIM (Song, Meng & Ermon 2021), and its inversion.

With eps the noise predicted at level abar = a, a step to the next level b mixes the clean latents
with the same noise again (equations 12 and 16):

    x0 = (x - sqrt(1 - a) eps) / sqrt(a)
    x' = sqrt(b) x0 + sqrt(1 - b - sigma^2) eps + sigma z
    sigma = eta sqrt((1 - b) / (1 - a)) sqrt(1 - a / b)

eta 0 adds no fresh noise z; eta 1 adds as much as DDPM.
"""

from torch import Tensor

from .random import randn_like
from .schedule import ZERO_SNR, Generators, Predictor, Refine, Schedule, Steps, Timestep, clean


def step(x: Tensor, eps: Tensor, a: float, b: float) -> Tensor:
    """Takes one deterministic DDIM step. Returns the latents at level abar = b, computed from the
    latents x at level abar = a and the noise eps predicted for x, both (B,4,h,w). A step with b > a
    denoises; a step with b < a inverts. Latents x at zero terminal SNR are all noise, so a step
    from there mixes the clean latents with x itself."""
    if a == ZERO_SNR:
        return b**0.5 * clean(x, eps, a) + (1 - b) ** 0.5 * x
    return ((b / a) ** 0.5 * x + ((1 - b) ** 0.5 - (b * (1 - a) / a) ** 0.5) * eps).to(x.dtype)


def timesteps(schedule: Schedule, steps: int, start: int = 0) -> list[Timestep]:
    """Lists the timesteps of a run of `steps` steps, most noise first, in the spacing stated by the
    schedule's config. The first `start` timesteps are left out."""
    return schedule.timesteps(steps)[start:]


def sample(
    predict: Predictor,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    init: Tensor | None = None,
    start: int = 0,
    generator: Generators | None = None,
    refine: Refine | None = None,
    final: str | None = None,
) -> Steps:
    """Denoises unit noise x (B,4,h,w) with DDIM's steps. Yields (i, t, x) after every step: the
    step's number, its timestep, and the latents. `samplers/__init__.py` explains the arguments that
    all samplers have in common.

    With `eta` above 0, each step adds fresh noise, drawn from `generator`, a list with one
    generator per image. Raises ValueError for an `eta` outside 0 to 1, and for an `eta` above 0
    without generators.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, not {eta}")
    visited = timesteps(schedule, steps, start)
    levels = [(schedule.abar(t), schedule.abar_below(t, steps, final)) for t in visited]
    x = schedule.begin(init, x, visited[0])
    for i, (t, (a, b)) in enumerate(zip(visited, levels)):
        if refine is not None:
            x = refine(i, t, x)
        eps = predict(x, t)
        if eta == 0:
            x = step(x, eps, a, b)
        else:
            x0 = clean(x, eps, a)
            if a == ZERO_SNR:
                eps, a = x, 0.0
            sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
            kept = max(1 - b - sigma**2, 0.0) ** 0.5  # not below 0 by rounding
            x = b**0.5 * x0 + kept * eps.to(x.dtype) + sigma * randn_like(generator, x)
        yield i, t, x


def invert(
    predict: Predictor,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    anchor: str = "target",
    iterations: int = 0,
    final: str | None = None,
) -> Steps:
    """Turns latents x (B,4,h,w) of an image into the noise from which DDIM makes them, by taking
    DDIM's steps in reverse order. Yields (i, t, x) after every step: the step's number, the
    timestep t that has been reached, and the latents at the level of t. `final` is the level of the
    given x: "abar0" (that of timestep 0), "zero" (no noise), or None for the model's own.

    Exact inversion of a step would need the noise eps predicted at the latents where the reversed
    step ends, which are not known yet. So eps is first predicted at the latents where the reversed
    step begins, with the timestep of its end (`anchor="target"`) or of its beginning ("source").
    Then eps is predicted again, `iterations` times, at the end found so far. If the steps are small
    enough for this to converge, the fixed point inverts the step exactly, provided that `predict`
    applies the same guidance when the image is made again.

    Reconstruction is best if `predict` applies no guidance. Raises ValueError for an unknown
    `anchor`, for negative `iterations`, and if the inversion would end at zero terminal SNR, where
    the predicted noise equals the latents and so does not determine them.
    """
    if anchor not in ("target", "source"):
        raise ValueError(f"anchor must be 'target' or 'source', not {anchor!r}")
    if iterations < 0:
        raise ValueError(f"iterations must be 0 or more, not {iterations}")
    visited = timesteps(schedule, steps)
    schedule.check_signal(visited, "inversion", "take another model")
    stride = schedule.config.num_train_timesteps // steps
    for i, t in enumerate(reversed(visited)):
        a = schedule.abar_below(t, steps, final)
        b = schedule.abar(t)
        end = step(x, predict(x, t if anchor == "target" else max(t - stride, 0)), a, b)
        for _ in range(iterations):
            end = step(x, predict(end, t), a, b)
        x = end
        yield i, t, x
