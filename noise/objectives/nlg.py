"""Noise-level guidance (arXiv 2509.13936): no attention, no backward pass.

At the first timestep, 20 times: g = eps(n, prompt) - eps(n, negative prompt), cut to norm 0.5;

    n <- n - g,   n <- n + sqrt(0.001) z,   n <- n sqrt(d) / |n|

The direction is the gradient of no stated loss. As an objective it is <x, g> with g held constant,
whose gradient in x is g. z is drawn afresh each time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise.drivers import Optimizing
from minsd.noise.look import Ask, Look, Told


class NoiseLevelGuidance:
    driver = "optimize"
    how = Optimizing(steps=20, lr=1.0, clip=0.5, jitter=1e-3, norm="unit", keep="last")

    def __init__(self, sd: Model, asks: Sequence[Ask]):
        pass

    def __call__(self, look: Look) -> tuple[Tensor, Told]:
        with torch.no_grad():
            eps, uncond = look.read("eps", "uncond")
            g = eps - uncond
        return (look.x * g).flatten(1).sum(dim=1), {"guidance": g.flatten(1).norm(dim=1)}
