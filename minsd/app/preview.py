"""Previews: images of what the network predicts the finished image to be, during sampling.

From the predicted noise e at latents x, the clean latents are predicted to be
x0 = (x - sqrt(1 - abar) e) / sqrt(abar), where abar is the cumulative product of 1 - beta. They are
averaged down to SIDE cells before they are decoded, which costs a small fraction of decoding the
image itself and needs no constants of the model.
"""

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from minsd.app.progress import Show
from minsd.guidance import Predictor
from minsd.image import contact_sheet
from minsd.pipeline import StableDiffusion
from minsd.samplers.schedule import Timestep

SIDE = 32  # most cells per side of the latents that are decoded


class Previews:
    """Makes previews of a batch during sampling: one after every `every` steps, and none if `every`
    is None. A preview shows the finished images as the latest noise prediction implies them, at a
    low resolution.

    Sample with the noise predictor that `watch` returns, and call `after` after every step.
    """

    def __init__(self, sd: StableDiffusion, every: int | None, show: Show):
        self.sd = sd
        self.every = every
        self.show = show
        self.steps: list[int] = []  # steps that were done when each preview was taken
        self.images: list[list[Image.Image]] = []  # per preview, the batch's images
        self._last: tuple[Tensor, float, Tensor] | None = None

    def watch(self, predict: Predictor) -> Predictor:
        """Returns a noise predictor that returns what `predict` returns, and stores the latest
        prediction for `after`."""

        def watched(x: Tensor, t: Timestep) -> Tensor:
            eps = predict(x, t)
            self._last = x, t, eps
            return eps

        return watched

    @torch.no_grad()
    def after(self, i: int, reached: Timestep) -> None:
        """Reports to the constructor's `show` that step `i`, counted from 0, is done. If a preview
        is due after this step, also shows the batch's images as predicted in the step. `reached`,
        the timestep that the sampler reports, is not used."""
        self.show.advance()
        if not self.every or (i + 1) % self.every or self._last is None:
            return
        x, t, eps = self._last  # t is the timestep of the prediction, not the one reached
        abar = self.sd.schedule.abar(t)
        x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        shrink = max(1.0, max(x0.shape[2:]) / SIDE)
        x0 = adaptive_avg_pool2d(x0.float(), [max(1, round(side / shrink)) for side in x0.shape[2:]])
        self.steps.append(i + 1)
        self.images.append(self.sd.decode(x0.to(x.dtype)))
        self.show.preview(i + 1, self.images[-1])

    def sheet(self, b: int) -> Image.Image:
        """Returns a contact sheet of all previews of image number `b` (from 0) in the batch."""
        captions = [f"after step {step}" for step in self.steps]
        return contact_sheet([images[b] for images in self.images], min(8, len(self.steps)), captions)
