"""Sampling of latent consistency models (Luo et al. 2023, algorithm 3): jump to the clean latents, add noise, jump again."""

from .random import randn_like
from .schedule import Schedule

TRAINED_STEPS = 50  # the DDIM grid that consistency models are distilled on
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of the boundary condition, as distilled


def timesteps(schedule: Schedule, steps: int) -> list[int]:
    """The timesteps of a run, most noise first. ValueError for more steps than the grid of distillation has."""
    if not 1 <= steps <= TRAINED_STEPS:
        raise ValueError(f"the lcm sampler takes 1 to {TRAINED_STEPS} steps, not {steps}")
    stride = schedule.config.num_train_timesteps // TRAINED_STEPS
    trained = [stride * (k + 1) - 1 for k in range(TRAINED_STEPS)][::-1]
    return [trained[i * TRAINED_STEPS // steps] for i in range(steps)]


def sample(predict, x, schedule, steps, *, init=None, start=0, generator=None, refine=None, final=None):
    """Unit noise x (B,4,h,w) -> latents, in 1 to 50 steps (made for 1 to 8); draws from `generator`, one an image. It
    always ends at the clean latents."""
    if final not in (None, "zero"):
        raise ValueError(
            f"the lcm sampler ends at the clean latents: final must be 'zero' or left out, not {final!r}"
        )
    visited = timesteps(schedule, steps)[start:]
    x = schedule.begin(init, x, visited[0])
    for i, t in enumerate(visited):
        a = schedule.abar(t)
        if refine is not None:
            x = refine(i, t, x)
        clean = (x - (1 - a) ** 0.5 * predict(x, t)) / a**0.5
        # At t = 0 the consistency function must return its input: these weights see to it.
        scaled = t * TIMESTEP_SCALING
        skip, out = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        clean = skip * x + out * clean
        b = schedule.abar(visited[i + 1]) if i + 1 < len(visited) else 1.0
        x = b**0.5 * clean + (1 - b) ** 0.5 * randn_like(generator, x) if b < 1 else clean
        yield i, t, x
