"""Sampling of latent consistency models (Luo et al. 2023, algorithm 3): jump to the clean latents,
add noise, jump again."""

from torch import Tensor

from .random import randn_like
from .schedule import Generators, Predictor, Refine, Schedule, Steps, Timestep, clean

TRAINED_STEPS = 50  # DDIM steps in the distillation of consistency models
SIGMA_DATA = 0.5  # of the boundary condition, as distilled
TIMESTEP_SCALING = 10.0  # of the boundary condition, as distilled


def timesteps(schedule: Schedule, steps: int, start: int = 0) -> list[Timestep]:
    """Lists the timesteps of a run, most noise first. The run has `steps` steps, but skips the
    first `start` of them. All timesteps are among the 50 at which latent consistency models are
    distilled. Raises ValueError if `steps` is less than 1 or more than 50."""
    if not 1 <= steps <= TRAINED_STEPS:
        raise ValueError(f"the lcm sampler takes 1 to {TRAINED_STEPS} steps, not {steps}")
    stride = schedule.config.num_train_timesteps // TRAINED_STEPS
    trained = [stride * (k + 1) - 1 for k in reversed(range(TRAINED_STEPS))]
    return [trained[i * TRAINED_STEPS // steps] for i in range(start, steps)]


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
    """Denoises unit noise x (B,4,h,w) with a latent consistency model. `steps` is from 1 to 50; the
    models are made for 1 to 8. predict(x, t) returns the noise in latents x at timestep t. Yields
    (i, t, x) after every step: the step's number, its timestep, and the latents. `init`, `start`
    and `refine` are explained in `samplers/__init__.py`.

    After every step but the last, fresh noise is added. It is drawn from `generator`, a list with
    one generator per image. A run always ends without noise. Raises ValueError if `final` asks for
    another end ("abar0"), or if fresh noise is needed and there are no generators.
    """
    if final not in (None, "zero"):
        raise ValueError(f"the lcm sampler ends at the clean latents: final must be 'zero', not {final!r}")
    visited = timesteps(schedule, steps, start)
    x = schedule.begin(init, x, visited[0])
    for i, t in enumerate(visited):
        a = schedule.abar(t)
        if refine is not None:
            x = refine(i, t, x)
        x0 = clean(x, predict(x, t), a)
        # The consistency function must return its input at t = 0. These weights ensure it.
        scaled = t * TIMESTEP_SCALING
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        x = x0 = skip * x + out * x0
        if i + 1 < len(visited):
            b = schedule.abar(visited[i + 1])
            x = b**0.5 * x0 + (1 - b) ** 0.5 * randn_like(generator, x)
        yield i, t, x
