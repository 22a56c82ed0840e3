"""DDIM (Song, Meng & Ermon 2021), and its inversion.

With eps the predicted noise at abar_t, the clean latents are x0 = (x - sqrt(1 - abar_t) eps) / sqrt(abar_t); a step to
the next level b mixes them with the same noise again: x' = sqrt(b) x0 + sqrt(1 - b - sigma^2) eps + sigma z (equation
12). sigma = eta sqrt((1 - b) / (1 - a)) sqrt(1 - a / b): none at eta 0, that of DDPM at eta 1 (equation 16).
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from .random import randn_like
from .schedule import Schedule


def step(x: torch.Tensor, eps: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """One deterministic step from level abar = a to level b, in either direction."""
    return (b / a) ** 0.5 * x + ((1 - b) ** 0.5 - (b * (1 - a) / a) ** 0.5) * eps


def timesteps(schedule: Schedule, steps: int) -> list[int]:
    """The timesteps of a run, most noise first."""
    return schedule.timesteps(steps)


def sample(
    predict: Callable,
    x: torch.Tensor,
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    init: torch.Tensor | None = None,
    start: int = 0,
    generator: Sequence[torch.Generator] | None = None,
    refine: Callable | None = None,
    final: str | None = None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Unit noise x (B,4,h,w) -> latents, in `steps` steps. `eta` in 0..1 draws fresh noise from `generator`, one an image."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, not {eta}")
    visited = timesteps(schedule, steps)[start:]
    levels = [(schedule.abar(t), schedule.abar_below(t, steps, final)) for t in visited]
    x = schedule.begin(init, x, visited[0])
    for i, (t, (a, b)) in enumerate(zip(visited, levels)):
        if refine is not None:
            x = refine(i, t, x)
        eps = predict(x, t)
        if eta == 0:
            x = step(x, eps, a, b)
        else:
            sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
            x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
            x = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * eps + sigma * randn_like(generator, x)
        yield i, t, x


def invert(
    predict: Callable,
    x: torch.Tensor,
    schedule: Schedule,
    steps: int,
    *,
    anchor: str = "target",
    iterations: int = 0,
    final: str | None = None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Latents x (B,4,h,w) -> the noise DDIM would have made them from: the same steps backwards, least noise first.

    A step needs eps where it ends, which is not known yet. It is predicted at the latents where it begins, with the timestep
    where it ends (`anchor="target"`) or where it begins ("source"). Each of `iterations` then predicts anew, at the end found so
    far: a fixed point is an exact inversion, under the same guidance both ways, where the steps are small enough to converge.

    Guidance is `predict`'s: none reconstructs best. Yields `(i, t, x)`, t the timestep that x has reached.
    """
    if anchor not in ("target", "source"):
        raise ValueError(f"anchor must be 'target' or 'source', not {anchor!r}")
    if iterations < 0:
        raise ValueError(f"iterations must be 0 or more, not {iterations}")
    stride = schedule.config.num_train_timesteps // steps
    for i, t in enumerate(reversed(timesteps(schedule, steps))):
        a, b = schedule.abar_below(t, steps, final), schedule.abar(t)
        end = step(x, predict(x, t if anchor == "target" else max(t - stride, 0)), a, b)
        for _ in range(iterations):
            end = step(x, predict(end, t), a, b)
        x = end
        yield i, t, x
