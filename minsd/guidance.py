"""Noise predictors: callables `predict(x, t) -> eps`, made from the network and from one another.

v-prediction becomes eps here and nowhere else. Guidance of whole prompts is applied here too;
collages (noise/collage.py) guide each of their passes. Samplers and noise methods know of neither.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from minsd.config import ModelConfig
from minsd.samplers.schedule import Schedule

Predictor = Callable[[Tensor, int | float], Tensor]
TextKV = dict[torch.nn.Module, tuple[Tensor, Tensor]]  # by cross-attention layer: `UNet.text_kv`


class Model(Protocol):
    """The part of `StableDiffusion` that noise methods use. They cannot import the class, since
    minsd/pipeline.py imports them.

    The networks may be stand-ins, such as a `Controlled` for the UNet, hence `Any`.
    """

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
    def encode_prompt(self, prompts: Sequence[str] | str) -> Tensor: ...
    def predictor(self, context: Tensor, uncond: Tensor, guidance_scale: float) -> Predictor: ...
    def encode(self, pictures: Image.Image | Sequence[Image.Image]) -> Tensor: ...
    def decode(self, latents: Tensor) -> list[Image.Image]: ...


@contextmanager
def counted(unet: Any) -> Iterator[list[int]]:
    """A list that grows within the block by the number of rows of every UNet evaluation. Each half
    of guidance is a row; an evaluation repeated by gradient checkpointing counts again."""
    rows: list[int] = []
    handle = unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        handle.remove()


def eps_from_output(output: Tensor, x: Tensor, t: int | float, schedule: Schedule) -> Tensor:
    """The network's output (B,4,h,w) at latents x and timestep t as predicted noise.

    A v-predicting network (Salimans & Ho 2022) returns v = sqrt(abar) eps - sqrt(1 - abar) x0, and
    x = sqrt(abar) x0 + sqrt(1 - abar) eps, so eps = sqrt(abar) v + sqrt(1 - abar) x.
    """
    if schedule.prediction_type == "epsilon":
        return output
    abar = schedule.abar(t)
    return abar**0.5 * output + (1 - abar) ** 0.5 * x


def _texts(unet: Any, contexts: list[Tensor]) -> Callable[[int], Tensor | TextKV]:
    """-> texts(n): these text states, each for n images, one after the other, as the network takes
    them.

    Their keys and values are computed once for all steps; of states (1,77,D) once for all images.
    Only states that take a gradient are passed as they are: every step needs a graph of its own.
    """
    known: dict[int, TextKV] = {}

    def texts(n: int) -> Tensor | TextKV:
        if n in known:
            return known[n]
        each = [context.expand(n, -1, -1) for context in contexts]
        if any(context.requires_grad for context in contexts):
            return torch.cat(each)
        shared = all(len(context) == 1 for context in contexts)
        text_kv = unet.text_kv(torch.cat(contexts if shared else each))
        if shared and n > 1:
            text_kv = {
                layer: (k.repeat_interleave(n, dim=0), v.repeat_interleave(n, dim=0))
                for layer, (k, v) in text_kv.items()
            }
        known.clear()
        known[n] = text_kv
        return text_kv

    return texts


def conditional(unet: Any, context: Tensor, schedule: Schedule) -> Predictor:
    """The network under one text: context (B,77,D), or (1,77,D) for every image of the batch."""
    texts = _texts(unet, [context])

    def predict(x: Tensor, t: int | float) -> Tensor:
        return eps_from_output(unet(x, t, texts(len(x))), x, t, schedule)

    return predict


def classifier_free(
    unet: Any, cond: Tensor, uncond: Tensor, guidance_scale: float, schedule: Schedule
) -> Predictor:
    """eps = u + g (c - u) (Ho & Salimans 2022), both halves in one batch. At g = 1 only the
    conditional half runs.

    cond and uncond are (B,77,D), or (1,77,D) for every image of the batch.
    """
    if guidance_scale == 1:
        return conditional(unet, cond, schedule)
    texts = _texts(unet, [uncond, cond])

    def predict(x: Tensor, t: int | float) -> Tensor:
        both = torch.cat([x, x])
        u, c = eps_from_output(unet(both, t, texts(len(x))), both, t, schedule).chunk(2)
        return u + guidance_scale * (c - u)

    return predict
