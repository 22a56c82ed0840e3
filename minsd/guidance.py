"""Noise predictors: callables `predict(x, t) -> eps`, made out of the network and of one another.

Here is the one place where v-prediction becomes eps, and where guidance is applied; samplers, noise methods and
layouts know neither.
"""

from collections.abc import Callable

import torch

from minsd.samplers.schedule import Schedule

Predictor = Callable[[torch.Tensor, int | float], torch.Tensor]


def eps_from_output(output: torch.Tensor, x: torch.Tensor, t: int | float, schedule: Schedule) -> torch.Tensor:
    """The network's output (B,4,h,w) at latents x as predicted noise.

    A v-predicting network (Salimans & Ho 2022) returns v = sqrt(abar) eps - sqrt(1 - abar) x0, and
    x = sqrt(abar) x0 + sqrt(1 - abar) eps, so eps = sqrt(abar) v + sqrt(1 - abar) x.
    """
    if schedule.prediction_type == "epsilon":
        return output
    abar = schedule.abar(t)
    return abar**0.5 * output + (1 - abar) ** 0.5 * x


def conditional(unet, context: torch.Tensor, schedule: Schedule) -> Predictor:
    """The network under one text: context (B,77,D), or (1,77,D) for every image of the batch."""

    def predict(x, t):
        output = unet(x, t, context.expand(len(x), -1, -1))
        return eps_from_output(output, x, t, schedule)

    return predict


def classifier_free(unet, cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float, schedule: Schedule) -> Predictor:
    """eps = u + g (c - u) (Ho & Salimans 2022), both halves in one batch; at g = 1 only the conditional half runs.

    cond and uncond are (B,77,D), or (1,77,D) for every image of the batch.
    """
    if guidance_scale == 1:
        return conditional(unet, cond, schedule)

    def predict(x, t):
        context = torch.cat([uncond.expand(len(x), -1, -1), cond.expand(len(x), -1, -1)])  # (2B, 77, D)
        u, c = eps_from_output(unet(torch.cat([x, x]), t, context), torch.cat([x, x]), t, schedule).chunk(2)
        return u + guidance_scale * (c - u)

    return predict
