"""Noise predictors: callables `predict(x, t) -> eps`, made from the network or from other
predictors.

v-prediction is converted to eps in this module and nowhere else. This module also applies
classifier-free guidance, except to images that are generated from one caption per region
(noise/collage.py); there it is applied to each caption's evaluation. Samplers and noise methods
depend on neither v-prediction nor guidance.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from minsd.config import DISTILLED_SCALE, ModelConfig
from minsd.samplers.schedule import Schedule

Predictor = Callable[[Tensor, int | float], Tensor]
TextKV = dict[
    torch.nn.Module, tuple[Tensor, Tensor]
]  # one entry per cross-attention layer, from `UNet.text_kv`


class Model(Protocol):
    """A protocol: the part of `StableDiffusion` that noise methods use. They cannot import
    `StableDiffusion` itself, because minsd/pipeline.py, where it is defined, imports from noise/.
    The networks have type `Any`, because other objects may stand in for them, such as a
    `Controlled` for the UNet."""

    config: ModelConfig
    unet: Any
    vae: Any
    text: Any
    schedule: Schedule
    guidance_rescale: float

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def vae_dtype(self) -> torch.dtype: ...
    def __call__(self, *args: Any, **how: Any) -> list[Image.Image]: ...
    def batch_size(self, height: int, width: int) -> int: ...
    def encode_prompt(self, prompts: Sequence[str] | str, size: tuple[int, int] | None = None) -> Tensor: ...
    def predictor(self, context: Tensor, uncond: Tensor, guidance_scale: float) -> Predictor: ...
    def encode(self, pictures: Image.Image | Sequence[Image.Image]) -> Tensor: ...
    def decode(self, latents: Tensor) -> list[Image.Image]: ...


@contextmanager
def counted(unet: Any) -> Iterator[list[int]]:
    """Counts UNet evaluations within the `with` block. Yields a list, to which every evaluation of
    `unet` appends its batch size. A guided evaluation has two rows per image. An evaluation that
    gradient checkpointing repeats is counted again."""
    rows: list[int] = []
    with evaluations(unet, rows.append):
        yield rows


@contextmanager
def evaluations(unet: Any, begin: Callable[[int], object]) -> Iterator[None]:
    """Within the `with` block, calls begin(rows) before every evaluation of `unet`; `rows` is the
    evaluation's batch size."""
    handle = unet.register_forward_pre_hook(lambda module, inputs: begin(len(inputs[0])))
    try:
        yield
    finally:
        handle.remove()


def eps_from_output(output: Tensor, x: Tensor, t: int | float, schedule: Schedule) -> Tensor:
    """Converts the output (B,4,h,w) of a network for latents x at timestep t into predicted noise.
    The output is noise or v; `schedule.prediction_type` states which.

    v is sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022), where abar is the cumulative
    product of 1 - beta at t. Since x is sqrt(abar) x0 + sqrt(1 - abar) eps, the noise is eps =
    sqrt(abar) v + sqrt(1 - abar) x.

    Where nearly nothing of the image is left, eps is nearly x, and the small difference holds what
    the network has predicted. So for schedules with zero terminal SNR the result is float64. A
    device of the kind "mps" has no float64, so there it is float32, and v keeps about 3 digits.
    """
    if schedule.prediction_type == "epsilon":
        return output
    if schedule.has_zero_snr:
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        output, x = output.to(wide), x.to(wide)
    abar = schedule.abar(t)
    return abar**0.5 * output + (1 - abar) ** 0.5 * x


def rescaled(
    guided: Tensor, cond: Tensor, x: Tensor, t: int | float, part: float, schedule: Schedule
) -> Tensor:
    """Rescales `guided`, noise (...,4,h,w) predicted with guidance for latents x (B,4,h,w) at
    timestep t, against overexposed images (Lin et al. 2023, section 3.4). `cond` (...,4,h,w) is the
    noise predicted for the prompt alone.

    Each image's guided network output o gets the standard deviation of the output for the prompt
    alone, o' = o std(cond) / std(o), and is mixed: part o' + (1 - part) o, with `part` from 0 (no
    change) to 1. If the network predicts v, eps - sqrt(1 - abar) x is its output times sqrt(abar),
    so this difference is rescaled.
    """
    if part == 0:
        return guided
    known = 0.0 if schedule.prediction_type == "epsilon" else (1 - schedule.abar(t)) ** 0.5 * x.to(cond.dtype)
    output = guided - known
    spread, wanted = (each.std(dim=(-3, -2, -1), keepdim=True) for each in (output, cond - known))
    return (part * wanted / spread + 1 - part) * output + known


def _texts(unet: Any, contexts: list[Tensor]) -> Callable[[int], Tensor | TextKV]:
    """Prepares texts for the network. `contexts` lists text states, (n,77k,D) for n images or
    (1,77k,D) for all images. Returns a function texts(n) that makes the context of a batch: n rows
    for the first item of `contexts`, then n rows for the next item, and so on.

    The context is a dict of keys and values (`UNet.text_kv`), computed once for all steps. It is
    computed once for all images too if every item of `contexts` has one row only. If text states
    require a gradient, the context is the text states themselves, because each step then needs an
    autograd graph of its own.
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
    """Makes a predictor for one text, without guidance. The predictor is a function predict(x, t)
    that returns the noise in latents x at timestep t; samplers call it. `context` is text states,
    (B,77n,D) or, for all images of the batch, (1,77n,D). `schedule` states whether the network
    `unet` predicts noise or v."""
    texts = _texts(unet, [context])

    def predict(x: Tensor, t: int | float) -> Tensor:
        return eps_from_output(unet(x, t, texts(len(x))), x, t, schedule)

    return predict


def distilled(unet: Any, context: Tensor, guidance_scale: float, schedule: Schedule) -> Predictor:
    """Makes a predictor from a network that takes the guidance scale as an input (a distilled
    latent consistency model). The predictor is a function predict(x, t) that returns the noise in
    latents x at timestep t. `context` is text states, (B,77n,D) or, for all images of the batch,
    (1,77n,D). `schedule` states whether the network predicts noise or v.

    During each call, the network runs at `guidance_scale`. After it, the network has its usual
    scale again, because others may call it too.
    """
    plain = conditional(unet, context, schedule)
    usual, asked = (unet.guidance_of(scale) for scale in (DISTILLED_SCALE, guidance_scale))

    def predict(x: Tensor, t: int | float) -> Tensor:
        unet.guide(asked)
        try:
            return plain(x, t)
        finally:
            unet.guide(usual)

    return predict


def classifier_free(
    unet: Any,
    cond: Tensor,
    uncond: Tensor,
    guidance_scale: float,
    schedule: Schedule,
    guidance_rescale: float = 0.0,
) -> Predictor:
    """Makes a predictor with classifier-free guidance (Ho & Salimans 2022). The predictor is a
    function predict(x, t) that returns the noise in latents x at timestep t: u + g (c - u), where u
    is the noise predicted for `uncond`, c the noise predicted for `cond`, and g is
    `guidance_scale`. `cond` and `uncond` are text states, (B,77n,D) or, for all images of the
    batch, (1,77n,D). `schedule` states whether the network predicts noise or v.

    u and c are computed in one batch. If g is 1, only c is computed. A distilled network, which
    takes g as an input, also computes c only. `guidance_rescale` is the `part` of `rescaled`, which
    is applied to guided predictions.
    """
    if getattr(getattr(unet, "config", None), "guidance_dim", 0):
        return distilled(unet, cond, guidance_scale, schedule)
    if guidance_scale == 1:
        return conditional(unet, cond, schedule)
    texts = _texts(unet, [uncond, cond])

    def predict(x: Tensor, t: int | float) -> Tensor:
        both = torch.cat([x, x])
        u, c = eps_from_output(unet(both, t, texts(len(x))), both, t, schedule).chunk(2)
        return rescaled(u + guidance_scale * (c - u), c, x, t, guidance_rescale, schedule)

    return predict
