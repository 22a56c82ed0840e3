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
