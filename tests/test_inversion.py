"""DDIM inversion: against diffusers' scheduler of that name, and back to where it came from."""

import pytest
import torch
from diffusers import DDIMInverseScheduler
from test_samplers import SD, as_v, predict, relative

from minsd.config import ScheduleConfig
from minsd.guidance import eps_from_output
from minsd.noise.initial import noise
from minsd.samplers import ddim
from minsd.samplers.schedule import Schedule

START = noise([0, 1], (4, 8, 8)).double()


def end(run):
    *_, (_, _, x) = run
    return x


def theirs(steps, output, start, **config):
    """diffusers' loop, as in its inversion pipelines: latents at a level, the timestep of the next
    one."""
    scheduler = DDIMInverseScheduler(**SD | config)
    scheduler.set_timesteps(steps)
    x, grid = start, [int(t) for t in scheduler.timesteps]
    for t in grid:
        x = scheduler.step(output(x, t), t, x).prev_sample
    return x, grid


@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # its class has no linspace
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 27, 50])
@pytest.mark.parametrize("one", [False, True], ids=["abar0", "one"])
def test_whole_inversions_equal_diffusers(steps, spacing, one):
    config = {"timestep_spacing": spacing, "set_alpha_to_one": one}
    expected, grid = theirs(steps, predict, START, **config)
    out = list(ddim.invert(predict, START, Schedule(ScheduleConfig(**config)), steps))
    assert [t for _, t, _ in out] == grid and [i for i, _, _ in out] == list(range(steps))
    assert relative(out[-1][2], expected) <= 1e-6  # diffusers keeps its levels in float32
    schedule = Schedule(ScheduleConfig(timestep_spacing=spacing))
    other = end(ddim.invert(predict, START, schedule, steps, final="abar0" if one else "zero"))
    assert relative(other, expected) > 1e-4  # the last level matters


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_whole_inversions_of_v_models_equal_diffusers(steps):
    """A v-predicting network, converted in minsd.guidance.

    diffusers converts v at the level of the latents. minsd does the same if the network is
    evaluated at that level (`source`). If it is evaluated at the next level (`target`), minsd
    converts there; diffusers then gets the same eps, expressed as v at the level of the latents.
    """
    schedule = Schedule(ScheduleConfig(prediction_type="v_prediction"))
    stride, abars = 1000 // steps, schedule.alphas_cumprod

    def eps(x, t):
        return eps_from_output(as_v(x, t, abars), x, t, schedule)

    def below(t):
        return max(t - stride, 0)

    v = {"prediction_type": "v_prediction"}
    source, _ = theirs(steps, lambda x, t: as_v(x, below(t), abars), START, **v)
    assert relative(end(ddim.invert(eps, START, schedule, steps, anchor="source")), source) <= 1e-6

    def v_of_eps(x, t):
        abar = abars[below(t)].double()
        return (eps(x, t) - (1 - abar).sqrt() * x) / abar.sqrt()

    target, _ = theirs(steps, v_of_eps, START, **v)
    assert relative(end(ddim.invert(eps, START, schedule, steps)), target) <= 1e-6
    assert relative(source, target) > 1e-4  # anchors differ
    unconverted = end(ddim.invert(lambda x, t: as_v(x, t, abars), START, schedule, steps))
    assert relative(unconverted, target) > 0.1  # v taken for eps, the known cause of collapse


@pytest.mark.parametrize("v", [False, True], ids=["eps", "v"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-6), (torch.float64, 1e-13)])
def test_the_same_eps_both_ways_returns(dtype, bound, steps, spacing, v):
    prediction_type = "v_prediction" if v else "epsilon"
    schedule = Schedule(ScheduleConfig(timestep_spacing=spacing, prediction_type=prediction_type))
    start = START.to(dtype)
    recorded = {}

    def record(x, t):
        output = as_v(x, t, schedule.alphas_cumprod) if v else predict(x, t)
        recorded[t] = eps_from_output(output, x, t, schedule).to(dtype)
        return recorded[t]

    def replay(x, t):
        return recorded[t]

    latents = end(ddim.sample(record, start, schedule, steps))
    back = end(ddim.invert(replay, latents, schedule, steps))
    assert (back - start).norm() / start.norm() <= bound
    recorded.clear()  # and the other way round
    noisy = end(ddim.invert(record, start, schedule, steps))
    again = end(ddim.sample(replay, noisy, schedule, steps))
    assert (again - start).norm() / start.norm() <= bound


def test_fixed_points_make_the_inversion_exact():
    """The error falls with each iteration, down to rounding, whichever the first guess."""
    schedule = Schedule(ScheduleConfig())

    def gentle(x, t):  # a contraction at every step, as the implicit step needs
        return torch.tanh(0.4 * x + 0.1 * torch.roll(x, 1, -1)) + 0.1 * torch.cos(x * t / 500)

    latents = end(ddim.sample(gentle, START, schedule, 50))
    for anchor in ("target", "source"):
        errors = [
            relative(end(ddim.invert(gentle, latents, schedule, 50, anchor=anchor, iterations=n)), START)
            for n in (0, 1, 2, 4, 40)
        ]
        assert errors[0] > 1e-3 and errors == sorted(errors, reverse=True) and errors[-1] < 1e-12, errors


def test_refusals():
    schedule = Schedule(ScheduleConfig())
    for wrong in ({"anchor": "middle"}, {"iterations": -1}, {"final": "nought"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            next(ddim.invert(predict, START, schedule, 10, **wrong))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="steps"):
            next(ddim.invert(predict, START, schedule, steps))
