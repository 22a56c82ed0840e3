"""Samplers: generator functions that take latents down a schedule's noise levels, one file each.

Each has the form `sample(predict, x, schedule, steps, *, init=None, start=0, generator=None,
refine=None, final=None)`:

- `predict(x, t) -> eps` is the noise predictor; the argument `x` (B,4,h,w) is unit noise.
- The sampler yields `(i, t, x)` after every step: the number of the step, its timestep, and the
  latents after the step. The latents are always in variance-preserving scale, x = sqrt(abar) x0 +
  sqrt(1 - abar) eps, whatever the sampler uses internally.
- `refine(i, t, x) -> x` may change the latents before the prediction at each listed timestep.
- `init` (image-to-image): clean latents (B,4,h,w) of an image. The first `start` steps are skipped,
  and the run begins from `init`, mixed with the noise x at the level of the first timestep left.
- `generator`: a list with one random generator per image, for samplers that draw noise during the
  run. The other samplers ignore `generator`.
- `final` overrides the noise level at which the run ends: "abar0" (the level of timestep 0) or
  "zero" (no noise).

Each file also has `timesteps(schedule, steps, start=0)`, which lists the timestep of every `(i, t,
x)`, most noise first, without running anything.

Samplers do not change the grad mode. Levels and timesteps are Python numbers, so nothing waits for
the GPU.

Most samplers solve the same equation in the same variables. Divide the latents by sqrt(abar):

    y = x / sqrt(abar) = x0 + sigma eps,   sigma = sqrt((1 - abar) / abar),

and denoising becomes dy/dsigma = eps (Song et al. 2021; Karras et al. 2022, appendix B). As
abar = 1 / (1 + sigma^2), y = x sqrt(1 + sigma^2); `to_y` and `to_x` convert between x and y. The
clean latents predicted at y are y - sigma eps. Each sampler is then a rule for a step in sigma.

Each sampler equals diffusers' class of that name, built from the model's betas, spacing, offset and
final level with neither clipping nor a Runge-Kutta start, at every spacing, number of steps,
prediction type and start (`tests/test_samplers.py`), except:

- "pndm" with v-prediction: diffusers combines v of different levels (explained in `pndm.py`).
- "pndm" from an image: if a run starts late, diffusers' class treats its second timestep as if
  that timestep had been listed twice, and then misses a level. Here a late start is a run of its
  own over the timesteps left.
- "trailing" spacing with 61, 103, 121 or one of 59 larger numbers of steps (for the usual 1000
  training timesteps): rounding gives diffusers one step more, at timestep -1. Here that step is
  left out.
- The largest numbers of steps. "leading" spacing with 1000 steps (with 999 for "dpmpp_2m" and
  "unipc") would begin at timestep 1000, which no model was trained at. 1000 steps of "dpmpp_2m" or
  "unipc" repeat timesteps except with "trailing". In these cases diffusers runs on, fails, or
  returns NaN; here a ValueError is raised.
- Zero terminal SNR (a schedule whose last timestep leaves nothing of the image): "heun" and "pndm"
  raise ValueError for a run that begins there. diffusers' two Euler classes compute the first step
  in float32 at sigma 4096, which changes runs of a few steps by up to 3e-4. Here the step is exact.
- Karras levels: diffusers rounds the timesteps that the network is given. Here each timestep
  belongs to its level exactly.
"""

from collections.abc import Callable

from . import ddim, dpmpp, euler, heun, lcm, pndm, unipc
from .schedule import Schedule, Steps, Timestep

SAMPLERS: dict[str, Callable[..., Steps]] = {
    "ddim": ddim.sample,
    "pndm": pndm.sample,
    "euler": euler.sample,
    "euler_a": euler.sample_ancestral,
    "heun": heun.sample,
    "dpmpp_2m": dpmpp.sample,
    "unipc": unipc.sample,
    "lcm": lcm.sample,
}

TIMESTEPS: dict[str, Callable[..., list[Timestep]]] = {
    "ddim": ddim.timesteps,
    "pndm": pndm.timesteps,
    "euler": euler.timesteps,
    "euler_a": euler.timesteps,
    "heun": heun.timesteps,
    "dpmpp_2m": dpmpp.timesteps,
    "unipc": unipc.timesteps,
    "lcm": lcm.timesteps,
}


def check(sampler: str, karras: bool = False) -> None:
    """Raises ValueError if no sampler is called `sampler`. Also raises ValueError if `karras` is
    True for a sampler other than "dpmpp_2m", because only that sampler can run at Karras noise
    levels."""
    if sampler not in SAMPLERS:
        raise ValueError(f"no sampler is called {sampler!r}; choose from {', '.join(SAMPLERS)}")
    if karras and sampler != "dpmpp_2m":
        raise ValueError(f"karras levels are for the sampler dpmpp_2m, not {sampler}")


def timesteps(
    sampler: str, schedule: Schedule, steps: int, *, start: int = 0, karras: bool = False
) -> list[Timestep]:
    """Lists the timesteps that a run visits, most noise first: one for every `(i, t, x)` that the
    sampler called `sampler` yields. The run has `steps` steps, but skips the first `start` of them,
    as for image-to-image. If `karras` is True, the timesteps are those of Karras noise levels.

    Raises ValueError for a sampler or a number of steps that is not possible, and if the sampler
    has no Karras noise levels.
    """
    check(sampler, karras)
    options = {"karras": True} if karras else {}
    return TIMESTEPS[sampler](schedule, steps, start, **options)
