"""Schedule and samplers against whole trajectories of diffusers' schedulers, with a fixed
predictor."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from minsd.config import ScheduleConfig
from minsd.noise.initial import noise
from minsd.samplers import SAMPLERS, ddim, timesteps
from minsd.samplers.random import generators, randn_like
from minsd.samplers.schedule import Schedule

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def predict(x, t):
    """Neither linear nor even in x, and different at every t."""
    return torch.tanh(1.3 * x + 0.2 * torch.roll(x, 1, -1)) + 0.1 * torch.cos(x * (1 + t / 500))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_published_constants():
    """abar[0, 1, 981, 999] and the grids of 50 and 10 steps, of SD1.x."""
    schedule = Schedule(ScheduleConfig())
    expected = [0.99915, 0.998296, 0.00577550, 0.00466010]
    assert [schedule.abar(t) for t in (0, 1, 981, 999)] == pytest.approx(expected, rel=1e-5)
    assert schedule.timesteps(50) == list(range(981, 0, -20))
    assert schedule.timesteps(10)[0] == 901 and schedule.timesteps(10)[-1] == 1


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 3, 10, 25, 50, 999])
def test_timesteps_equal_diffusers(spacing, steps):
    theirs = DDIMScheduler(**SD, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert Schedule(ScheduleConfig(timestep_spacing=spacing)).timesteps(steps) == theirs.timesteps.tolist()


def test_betas_equal_diffusers():
    for kind in ("scaled_linear", "linear"):
        theirs = DDIMScheduler(**{**SD, "beta_schedule": kind})
        assert torch.equal(Schedule(ScheduleConfig(beta_schedule=kind)).alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 25, 50])
def test_ddim_equals_diffusers(steps, eta):
    theirs = DDIMScheduler(**SD)
    theirs.set_timesteps(steps)
    start = noise([0, 1], (4, 8, 8))
    x, twins = start, generators([10, 11])
    for t in theirs.timesteps:
        drawn = randn_like(twins, x) if eta else None
        x = theirs.step(predict(x, int(t)), t, x, eta=eta, variance_noise=drawn).prev_sample
    *_, (i, t, ours) = ddim.sample(
        predict, start, Schedule(ScheduleConfig()), steps, eta=eta, generator=generators([10, 11])
    )
    assert (i, t) == (steps - 1, 1)
    assert relative(ours, x) <= 1e-5


LEADING = {k: v for k, v in SD.items() if k not in ("clip_sample", "set_alpha_to_one")}
LEADING["timestep_spacing"] = "leading"


def relatives(name, prediction_type="epsilon", **more):
    """diffusers' class of that name, from the same config."""
    make = {
        "ddim": lambda c: DDIMScheduler(**c, set_alpha_to_one=False, clip_sample=False),
        "pndm": lambda c: PNDMScheduler(**c, skip_prk_steps=True, set_alpha_to_one=False),
        "euler": lambda c: EulerDiscreteScheduler(**c),
        "euler_a": lambda c: EulerAncestralDiscreteScheduler(**c),
        "heun": lambda c: HeunDiscreteScheduler(**c),
        "dpmpp_2m": lambda c: DPMSolverMultistepScheduler(**c),
        "unipc": lambda c: UniPCMultistepScheduler(**c, solver_order=2, solver_type="bh2"),
        "lcm": lambda c: LCMScheduler(**{**c, "steps_offset": 0}, clip_sample=False),
    }
    return make[name](LEADING | {"prediction_type": prediction_type} | more)


def as_v(x, t, alphas_cumprod):
    """The output of a v-predicting network with the same eps: v = (eps - sqrt(1 - abar) x) /
    sqrt(abar)."""
    t = float(t)
    sigmas = ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).sqrt()
    sigma = torch.lerp(sigmas[int(t)], sigmas[min(int(t) + 1, 999)], torch.tensor(t - int(t)).double())
    abar = 1 / (1 + sigma**2)
    return (predict(x, t) - (1 - abar).sqrt() * x) / abar.sqrt()


def diffusers_trajectory(scheduler, start, steps, v=False):
    """diffusers' loop as in its pipelines, from `start` in variance-preserving scale."""
    scheduler.set_timesteps(steps)
    x = start
    # Euler and Heun keep y = x sqrt(1 + sigma^2).
    if hasattr(scheduler, "sigmas") and scheduler.init_noise_sigma != 1:
        x = start * (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        y = scheduler.scale_model_input(x, t)
        output = as_v(y, t, scheduler.alphas_cumprod) if v else predict(y, float(t))
        x = scheduler.step(output, t, x).prev_sample
    return x


DETERMINISTIC = ("pndm", "euler", "heun", "dpmpp_2m", "unipc")


@pytest.mark.parametrize("v", [False, True], ids=["eps", "v"])
@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_whole_trajectories_equal_diffusers(name, steps, v):
    v = v and name != "pndm"  # PNDM: against converted eps
    theirs = relatives(name, "v_prediction" if v else "epsilon")
    start = noise([0, 1], (4, 8, 8)).double()
    expected = diffusers_trajectory(theirs, start, steps, v)
    out = list(SAMPLERS[name](predict, start, Schedule(ScheduleConfig()), steps))
    assert len(out) == steps + (name == "pndm")
    grid = [int(t) for t in theirs.timesteps]
    assert [t for _, t, _ in out] == (grid if name != "heun" else grid[:1] + grid[1::2])
    assert relative(out[-1][2], expected) <= 1e-5


@pytest.mark.parametrize("v", [False, True], ids=["eps", "v"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name", [*DETERMINISTIC, "ddim"])
def test_other_spacings_equal_diffusers(name, spacing, v):
    v = v and name != "pndm"
    theirs = relatives(name, "v_prediction" if v else "epsilon", timestep_spacing=spacing)
    start = noise([0, 1], (4, 8, 8)).double()
    schedule = Schedule(ScheduleConfig(timestep_spacing=spacing))
    for steps in (10, 25, 50):
        expected = diffusers_trajectory(theirs, start, steps, v)
        *_, (_, _, ours) = SAMPLERS[name](predict, start, schedule, steps)
        assert relative(ours, expected) <= 1e-5


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_karras_levels_equal_diffusers(steps):
    """diffusers rounds the timestep that it passes to the network (not the level); so does this
    predictor."""
    theirs = relatives("dpmpp_2m", use_karras_sigmas=True)
    start = noise([0, 1], (4, 8, 8)).double()
    expected = diffusers_trajectory(theirs, start, steps)
    schedule = Schedule(ScheduleConfig())
    out = list(SAMPLERS["dpmpp_2m"](lambda x, t: predict(x, round(t)), start, schedule, steps, karras=True))
    assert [schedule.sigma(t) for _, t, _ in out] == pytest.approx(theirs.sigmas[:-1].tolist(), rel=1e-5)
    assert relative(out[-1][2], expected) <= 1e-5


@pytest.mark.parametrize("name", [*DETERMINISTIC, "ddim"])
def test_image_to_image_equals_diffusers(name):
    """From clean latents noised to a later level.

    PNDM's class, begun late, skips the timestep after its second visit (a known fault of its
    pipeline). There the truth is a run over the later timesteps alone.
    """
    theirs = relatives(name)
    x0, z = noise([5, 6], (4, 8, 8)).double(), noise([0, 1], (4, 8, 8)).double()
    steps, begin = 20, 8
    theirs.set_timesteps(steps)
    grid = theirs.timesteps[begin * theirs.order :]
    if name == "pndm":
        theirs.set_timesteps(steps)
        grid = torch.cat([theirs.timesteps[:1], theirs.timesteps[2:]])[begin:]  # each once
        grid = torch.cat([grid[:1], grid[1:2], grid[1:]])
    x = theirs.add_noise(x0, z, grid[:1])
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(begin * theirs.order)
    for t in grid:
        y = theirs.scale_model_input(x, t)
        x = theirs.step(predict(y, int(t)), t, x).prev_sample
    seen = []
    *_, (i, _, ours) = SAMPLERS[name](
        predict,
        z,
        Schedule(ScheduleConfig()),
        steps,
        init=x0,
        start=begin,
        refine=lambda i, t, x: seen.append(t) or x,
    )
    assert seen[0] == int(grid[0]) and i + 1 == len(seen) == steps - begin + (name == "pndm")
    assert seen == timesteps(name, Schedule(ScheduleConfig()), steps, start=begin)
    assert relative(ours, x) <= 1e-5


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("name", ["euler_a", "lcm"])
def test_stochastic_ones_equal_diffusers_on_the_same_noise(name, steps, monkeypatch):
    module = {"euler_a": "scheduling_euler_ancestral_discrete", "lcm": "scheduling_lcm"}[name]
    twins, theirs = generators([10, 11]), relatives(name)
    start = noise([0, 1], (4, 8, 8)).double()
    monkeypatch.setattr(
        f"diffusers.schedulers.{module}.randn_tensor", lambda shape, **k: randn_like(twins, start)
    )
    expected = diffusers_trajectory(theirs, start, steps)
    *_, (_, _, ours) = SAMPLERS[name](
        predict, start, Schedule(ScheduleConfig()), steps, generator=generators([10, 11])
    )
    assert relative(ours, expected) <= 1e-5


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_the_last_level_can_be_abar0(name):
    theirs = relatives(name, final_sigmas_type="sigma_min")
    start = noise([0], (4, 8, 8)).double()
    for steps in (5, 20):
        expected = diffusers_trajectory(theirs, start, steps)
        *_, (_, _, ours) = SAMPLERS[name](predict, start, Schedule(ScheduleConfig()), steps, final="abar0")
        assert relative(ours, expected) <= 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-13)], ids=str)
def test_inversion_with_the_same_eps_returns(dtype, bound):
    """With eps a function of t alone, the inversion is exact."""
    schedule, start = Schedule(ScheduleConfig()), noise([0], (4, 8, 8)).to(dtype)
    fixed = {t: noise([t], (4, 8, 8)).to(dtype) for t in schedule.timesteps(10)}
    *_, (_, _, x0) = ddim.sample(lambda x, t: fixed[t], start, schedule, 10)
    *_, (_, _, back) = ddim.invert(lambda x, t: fixed[t], x0, schedule, 10)
    assert relative(back, start) <= bound


def test_final_level():
    schedule, start = Schedule(ScheduleConfig()), noise([0], (4, 8, 8))
    *_, (_, _, x) = ddim.sample(predict, start, schedule, 4, final="zero")
    *_, (_, _, default) = ddim.sample(predict, start, schedule, 4)
    theirs = DDIMScheduler(**{**SD, "set_alpha_to_one": True})
    theirs.set_timesteps(4)
    y = start
    for t in theirs.timesteps:
        y = theirs.step(predict(y, int(t)), t, y).prev_sample
    assert relative(x, y) <= 1e-5 and relative(x, default) > 1e-4


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_contract(name):
    """Yields (i, t, x) after every step, refines before each listed timestep, keeps grad mode,
    dtype, graph."""
    schedule = Schedule(ScheduleConfig())
    start = noise([0, 1], (4, 8, 8)).double().requires_grad_()
    seen = []

    def refine(i, t, x):
        seen.append((i, t))
        return x * 1.0

    steps = list(SAMPLERS[name](predict, start, schedule, 5, generator=generators([0, 1]), refine=refine))
    assert seen == [(i, t) for i, t, _ in steps] and torch.is_grad_enabled()
    assert [t for _, t in seen] == timesteps(name, schedule, 5)
    x = steps[-1][2]
    assert x.dtype == torch.float64 and torch.autograd.grad(x.sum(), start)[0].abs().sum() > 0


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5])
def test_wrong_steps(steps):
    with pytest.raises(ValueError, match="from 1 to 1000"):
        Schedule(ScheduleConfig()).timesteps(steps)


def test_leading_spacing_ends_before_the_table_does():
    with pytest.raises(ValueError, match="take fewer"):
        Schedule(ScheduleConfig()).timesteps(1000)


def test_what_else_is_refused():
    schedule, x = Schedule(ScheduleConfig()), noise([0], (4, 8, 8))
    with pytest.raises(ValueError, match="eta"):
        next(ddim.sample(predict, x, schedule, 5, eta=2))
    with pytest.raises(ValueError, match="one generator per image"):
        next(ddim.sample(predict, x, schedule, 5, eta=1))
    with pytest.raises(ValueError, match="one generator per image"):
        next(ddim.sample(predict, x, schedule, 5, eta=1, generator=torch.Generator()))
    with pytest.raises(ValueError, match="final"):
        next(SAMPLERS["lcm"](predict, x, schedule, 5, final="abar0"))
    with pytest.raises(ValueError, match="final"):
        next(ddim.sample(predict, x, schedule, 5, final="one"))


def test_noise_depends_on_the_seed_alone():
    batch = noise([5, 6, 7], (4, 8, 8))
    assert torch.equal(batch[2], noise([7], (4, 8, 8))[0]) and not torch.equal(batch[0], batch[1])
    # The usual way to draw it.
    assert torch.equal(batch[0], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5)))
    later = randn_like(generators([5], skip=(4, 8, 8)), batch[:1])
    g = torch.Generator().manual_seed(5)
    torch.randn(4, 8, 8, generator=g)
    assert torch.equal(later[0], torch.randn(4, 8, 8, generator=g))
