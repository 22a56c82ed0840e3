"""Samplers: generator functions that walk latents down a schedule's noise levels, one file each.

Every one has the shape `sample(predict, x, schedule, steps, *, init=None, start=0, generator=None, refine=None, final=None)`:

- `predict(x, t) -> eps`, the noise predictor; `x` (B,4,h,w) unit noise, or latents at the first level.
- Image to image: with `init`, the latents (B,4,h,w) of a picture, the run begins there instead, noised by x to the
  level of step `start`; the steps before are left out.
- It yields `(i, t, x)` after every step: the step's number, its timestep, the latents after it, always in
  variance-preserving scale (x = sqrt(abar) x0 + sqrt(1 - abar) eps) whatever the sampler keeps inside.
- `refine(i, t, x) -> x` may change the latents before the prediction at each listed timestep.
- `generator`: one per image, for samplers that draw noise on the way; the others take it and draw nothing.
- `final` overrides the last level: "abar0" or "zero".

The grad mode is the caller's. Levels and timesteps are Python numbers: nothing waits for the GPU.

Most samplers solve the same equation in the same variables. Divide the latents by sqrt(abar): y = x / sqrt(abar) =
x0 + sigma eps with sigma = sqrt((1 - abar) / abar), and denoising becomes dy/dsigma = eps (Song et al. 2021; Karras et
al. 2022, appendix B). As abar = 1 / (1 + sigma^2), y = x sqrt(1 + sigma^2): `to_y` and `to_x` are those two lines, and
the clean picture predicted at y is y - sigma eps. Each sampler is then a rule for a step in sigma.
"""

from . import ddim, dpmpp, euler, heun, lcm, pndm, unipc
from .schedule import Schedule

SAMPLERS = {
    "ddim": ddim.sample,
    "pndm": pndm.sample,
    "euler": euler.sample,
    "euler_a": euler.sample_ancestral,
    "heun": heun.sample,
    "dpmpp_2m": dpmpp.sample,
    "unipc": unipc.sample,
    "lcm": lcm.sample,
}

TIMESTEPS = {
    "ddim": ddim.timesteps,
    "pndm": pndm.timesteps,
    "euler": euler.timesteps,
    "euler_a": euler.timesteps,
    "heun": euler.timesteps,
    "dpmpp_2m": dpmpp.timesteps,
    "unipc": unipc.timesteps,
    "lcm": lcm.timesteps,
}


def check(sampler: str, karras: bool = False) -> None:
    """ValueError where no sampler has this name, or where it takes no Karras levels."""
    if sampler not in SAMPLERS:
        raise ValueError(f"no sampler is called {sampler!r}; choose from {', '.join(SAMPLERS)}")
    if karras and sampler != "dpmpp_2m":
        raise ValueError(f"karras levels are for the sampler dpmpp_2m, not {sampler}")


def timesteps(
    sampler: str, schedule: Schedule, steps: int, *, start: int = 0, karras: bool = False
) -> list[int | float]:
    """The timestep of every (i, t, x) that a sampler yields, in order. `start`: steps left out at the noisy end.

    ValueError for an unknown sampler, and for a number of steps that it does not take.
    """
    check(sampler, karras)
    if sampler == "pndm":
        return pndm.timesteps(schedule, steps, start)
    return TIMESTEPS[sampler](schedule, steps, **({"karras": True} if karras else {}))[start:]
