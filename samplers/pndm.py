"""PNDM without its Runge-Kutta start, also called PLMS (Liu et al. 2022, sections 3.3 and 4):
DDIM's step, with eps from the Adams-Bashforth formula over the last four predictions. Stable
Diffusion 1.x was published with it.

The formula (the paper's equation 12) combines predictions of eps. diffusers' PNDMScheduler combines
the outputs of a v-predicting network and converts the sum at the newest level only, although each v
belongs to a level of its own; its runs do not end where DDIM's do even if every v is exact. Here
`predict` has converted each prediction at its own level. On a test predictor the two runs differ by
88 % of their norm at 2 steps, 13 % at 10, and 3 % at 50."""

from torch import Tensor

from .ddim import step
from .schedule import ZERO_SNR_SAMPLERS, Generators, Predictor, Refine, Schedule, Steps, Timestep


def timesteps(schedule: Schedule, steps: int, start: int = 0) -> list[Timestep]:
    """Lists the timesteps of a run without its first `start` steps, most noise first. The second
    timestep is listed twice, so the list has one timestep more than the run has steps, unless a
    single step is left.

    Raises ValueError for a run that begins at zero terminal SNR, where eps is x and cannot be
    combined with the eps of other levels."""
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
    """Denoises unit noise x (B,4,h,w), and yields as every sampler does (`samplers/__init__.py`),
    but one time more than there are steps (unless a single step is left).

    The second timestep is visited twice. The first of these visits repeats the run's first step
    from the latents where that step began, with the mean of the predictions at the step's two ends.
    A change that `refine` makes during this visit therefore affects the prediction alone, as in the
    published program.
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
