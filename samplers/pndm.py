"""PNDM without its Runge-Kutta start, also called PLMS (Liu et al. 2022, sections 3.3 and 4). A
step is DDIM's, with eps from the Adams-Bashforth formula over the last four predictions. Stable
Diffusion 1.x was published with this sampler.

The formula (the paper's equation 12) combines predictions of eps. For a v-predicting network,
diffusers' PNDMScheduler combines the network's outputs v, although each v belongs to a level of its
own, and converts only the sum to eps, at the newest level; its runs do not end where DDIM's do even
if every v is exact. Here `predict` has converted each prediction at its own level. On a test
predictor the two runs differ by 88 % of their norm at 2 steps, 13 % at 10, and 3 % at 50.
"""

from torch import Tensor

from .ddim import step
from .schedule import ZERO_SNR_SAMPLERS, Generators, Predictor, Refine, Schedule, Steps, Timestep


def timesteps(schedule: Schedule, steps: int, start: int = 0) -> list[Timestep]:
    """Lists the timesteps that a run visits, most noise first. The run has `steps` steps, but skips
    the first `start` of them. The second timestep is listed twice, because PNDM visits it twice. If
    only one step is left, its timestep is the only one.

    Raises ValueError for a run that begins at zero terminal SNR. The predicted noise equals the
    latents there, and cannot be combined with the noise predicted at other levels."""
    grid = schedule.timesteps(steps)[start:]
    schedule.check_signal(grid, "the sampler pndm", f"take {ZERO_SNR_SAMPLERS}")
    return grid[:1] + grid[1:2] + grid[1:]


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
    """Denoises unit noise x (B,4,h,w) with PNDM. predict(x, t) returns the noise in latents x at
    timestep t. Yields (i, t, x) for each timestep t that the function `timesteps` lists, with i
    counted from 0 and the latents x. `init`, `start`, `refine` and `final` are explained in
    `samplers/__init__.py`; `generator` is ignored.

    The first step is taken twice, so the second timestep is visited twice. The second time, the
    step starts again from its beginning, with the mean of the noise predicted at its two ends. If
    `refine` changes the latents on the first visit of the second timestep, the change affects only
    this mean.
    """
    visited = timesteps(schedule, steps, start)
    stride = schedule.config.num_train_timesteps // steps
    x = schedule.begin(init, x, visited[0])
    begin = x
    past: list[Tensor] = []  # the last four predictions
    for i, t in enumerate(visited):
        a = schedule.abar(t)
        b = schedule.abar_below(t, steps, final)
        if refine is not None:
            x = refine(i, t, x)
        if i == 0:
            begin = x
        eps = predict(x, t)
        if i == 1:  # the first step again, from its beginning to t
            a = schedule.abar(t + stride)
            b = schedule.abar(t)
            x = begin
            eps = (eps + past[-1]) / 2
        else:
            past = [*past[-3:], eps]
            if len(past) == 2:
                eps = (3 * past[-1] - past[-2]) / 2
            elif len(past) == 3:
                eps = (23 * past[-1] - 16 * past[-2] + 5 * past[-3]) / 12
            elif len(past) == 4:
                eps = (55 * past[-1] - 59 * past[-2] + 37 * past[-3] - 9 * past[-4]) / 24
        x = step(x, eps, a, b)
        yield i, t, x
