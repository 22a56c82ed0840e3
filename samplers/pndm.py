"""PNDM without its Runge-Kutta start, also called PLMS (Liu et al. 2022, sections 3.3 and 4): DDIM's step, with eps taken
from the Adams-Bashforth formula over the last four predictions. What Stable Diffusion 1.x was published with."""

from .ddim import step
from .schedule import Schedule


def timesteps(schedule: Schedule, steps: int, start: int = 0) -> list[int]:
    """The timesteps of a run, most noise first, its second one twice: steps + 1 of them, for steps > 1."""
    grid = schedule.timesteps(steps)[start:]
    return grid[:1] + grid[1:2] + grid[1:]


def sample(predict, x, schedule, steps, *, init=None, start=0, generator=None, refine=None, final=None):
    """Unit noise x (B,4,h,w) -> latents. Yields steps + 1 times: the second timestep is visited twice, first to complete
    the first step as the mean of its two ends. (That second visit starts anew from where the first began, so what
    `refine` does there acts on its prediction alone, as in the published program.)"""
    visited = timesteps(schedule, steps, start)
    stride = schedule.config.num_train_timesteps // steps
    x = schedule.begin(init, x, visited[0])
    begin, past = x, []
    for i, t in enumerate(visited):
        if refine is not None:
            x = refine(i, t, x)
        if i == 0:
            begin = x
        eps = predict(x, t)
        if i == 1:
            x, eps = begin, (eps + past[-1]) / 2
        else:
            past = [*past[-3:], eps]
            if len(past) == 2:
                eps = (3 * past[-1] - past[-2]) / 2
            elif len(past) == 3:
                eps = (23 * past[-1] - 16 * past[-2] + 5 * past[-3]) / 12
            elif len(past) == 4:
                eps = (55 * past[-1] - 59 * past[-2] + 37 * past[-3] - 9 * past[-4]) / 24
        a, b = (
            (schedule.abar(t + stride), schedule.abar(t))
            if i == 1
            else (schedule.abar(t), schedule.abar_below(t, steps, final))
        )
        x = step(x, eps, a, b)
        yield i, t, x
