"""Samplers: generator functions that walk latents down a schedule's noise levels, one file each.

Every one has the shape `sample(predict, x, schedule, steps, *, generator=None, refine=None, final=None)`:

- `predict(x, t) -> eps`, the noise predictor; `x` (B,4,h,w) unit noise, or latents at the first level.
- It yields `(i, t, x)` after every step: the step's number, its timestep, the latents after it, always in
  variance-preserving scale (x = sqrt(abar) x0 + sqrt(1 - abar) eps) whatever the sampler keeps inside.
- `refine(i, t, x) -> x` may change the latents before the prediction at each listed timestep.
- `generator`: one per image, for samplers that draw noise on the way.
- `final` overrides the last level: "abar0" or "zero".

The grad mode is the caller's. Levels and timesteps are Python numbers: nothing waits for the GPU.
"""

from . import ddim

SAMPLERS = {"ddim": ddim.sample}
