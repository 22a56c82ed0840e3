"""Noise predictors: callables `predict(x, t) -> eps`, made out of the network and of one another.

Here is the one place where v-prediction becomes eps, and where guidance is applied; samplers, noise methods and
layouts know neither.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from PIL import Image

from minsd.config import ModelConfig
from minsd.samplers.schedule import Schedule

Predictor = Callable[[torch.Tensor, int | float], torch.Tensor]


class Model(Protocol):
    """What noise methods use of a `StableDiffusion` (minsd/pipeline.py), which imports them and not the other way round."""

    config: ModelConfig
    unet: Any
    vae: Any
    text: Any
    schedule: Schedule

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, *args: Any, **how: Any) -> list[Image.Image]: ...
    def batch_size(self, height: int, width: int) -> int: ...
    def encode_prompt(self, prompts: Sequence[str] | str) -> torch.Tensor: ...
    def predictor(self, context: torch.Tensor, uncond: torch.Tensor, guidance_scale: float) -> Predictor: ...
    def encode(self, pictures: Image.Image | Sequence[Image.Image]) -> torch.Tensor: ...
    def decode(self, latents: torch.Tensor) -> list[Image.Image]: ...


@contextmanager
def counted(unet) -> Iterator[list[int]]:
    """The number of rows of every UNet evaluation within the block, as a growing list. Each half of guidance is a row, and so
    is an evaluation that a checkpoint repeats."""
    rows: list[int] = []
    handle = unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        handle.remove()


def eps_from_output(
    output: torch.Tensor, x: torch.Tensor, t: int | float, schedule: Schedule
) -> torch.Tensor:
    """The network's output (B,4,h,w) at latents x as predicted noise.

    A v-predicting network (Salimans & Ho 2022) returns v = sqrt(abar) eps - sqrt(1 - abar) x0, and
    x = sqrt(abar) x0 + sqrt(1 - abar) eps, so eps = sqrt(abar) v + sqrt(1 - abar) x.
    """
    if schedule.prediction_type == "epsilon":
        return output
    abar = schedule.abar(t)
    return abar**0.5 * output + (1 - abar) ** 0.5 * x


def _keys_for(unet, contexts: list[torch.Tensor]):
    """-> keys(n): what the network's attention makes of these texts, each for n images, one after the other; computed
    once for all steps. Texts (1,77,D) are looked at once and repeated."""
    known = {}

    def keys(n):
        if n not in known:
            if any(c.requires_grad for c in contexts):  # a gradient wants its graph anew at every step
                return torch.cat([c.expand(n, -1, -1) for c in contexts])
            alone = all(len(c) == 1 for c in contexts)
            each = unet.keys(torch.cat(contexts if alone else [c.expand(n, -1, -1) for c in contexts]))
            known.clear()
            known[n] = {
                m: tuple(y.repeat_interleave(n, dim=0) if alone and n > 1 else y for y in kv)
                for m, kv in each.items()
            }
        return known[n]

    return keys


def conditional(unet, context: torch.Tensor, schedule: Schedule) -> Predictor:
    """The network under one text: context (B,77,D), or (1,77,D) for every image of the batch."""

    keys = _keys_for(unet, [context])

    def predict(x, t):
        return eps_from_output(unet(x, t, keys(len(x))), x, t, schedule)

    return predict


def classifier_free(
    unet, cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float, schedule: Schedule
) -> Predictor:
    """eps = u + g (c - u) (Ho & Salimans 2022), both halves in one batch; at g = 1 only the conditional half runs.

    cond and uncond are (B,77,D), or (1,77,D) for every image of the batch.
    """
    if guidance_scale == 1:
        return conditional(unet, cond, schedule)

    keys = _keys_for(unet, [uncond, cond])

    def predict(x, t):
        both = torch.cat([x, x])
        u, c = eps_from_output(unet(both, t, keys(len(x))), both, t, schedule).chunk(2)
        return u + guidance_scale * (c - u)

    return predict
