"""SAGA (Grimal et al., AAAI 2026, arXiv 2508.13866): learn the mean of the latents at one step.

At step k = steps // 5 the latents become

    x = sqrt(abar) mu + sqrt(1 - abar) z,   z fresh unit noise,

where mu begins as each channel's mean of the predicted clean latents x0. The loss L of overlap.py,
averaged over 10 fresh z, is minimised by 50 steps of gradient descent in sqrt(abar) mu. When used,
mu is scaled down to the standard deviation of x0. As published, one mu serves all images of a
prompt; here each image learns its own.
"""

import warnings

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise.drivers import Result, Say, values_of
from minsd.noise.look import Lift, Look, finite
from minsd.noise.objectives.overlap import Overlap
from minsd.samplers.random import generators
from minsd.samplers.schedule import Refine, Timestep


def bounded(mu: Tensor, spread: Tensor) -> Tensor:
    """Returns mu (4,h,w), scaled down if needed so that its standard deviation is at most
    `spread`."""
    return mu * (spread / mu.std()).clamp(max=1)


class Saga(Overlap):
    iterations, draws, lr, momentum = 50, 10, 20.0, 0.4  # lr for a model whose update_scale is 20

    def refine(self, sd: Model, lift: Lift, steps: int, record: list[Result], progress: Say | None) -> Refine:
        """Returns a function `refine(i, t, x) -> x` for a run of `steps` timesteps, which samplers
        call before each noise prediction. At step steps // 5 the function learns the mean of the
        latents by gradient descent, and replaces the latents x by new ones with this mean. At other
        steps it changes nothing.

        Each iteration of the descent evaluates the loss for 10 random draws of latents and averages
        it over them. The values of the first and the last iteration are stored in `record`, which
        holds one Result per image. If the values or the gradient of an image are not finite, its
        latents stay unchanged, with a warning. `progress(b, message)` is called with the progress
        of image b.
        """

        def move(i: int, t: Timestep, x: Tensor) -> Tensor:
            if i != steps // 5:
                return x
            rows = torch.arange(len(x), device=x.device)
            with torch.no_grad():
                x0 = Look(lift, x.to(lift.dtype), rows, t, i).x0
            draws = generators([ask.seed for ask in lift.asks], skip=x.shape[1:])
            own = zip(x, x0, draws)
            return torch.stack([learn(b, t, i, *each).to(x.dtype) for b, each in enumerate(own)])

        def learn(b: int, t: Timestep, i: int, old: Tensor, x0: Tensor, generator: torch.Generator) -> Tensor:
            a = sd.schedule.abar(t)
            mu = x0.mean(dim=(1, 2), keepdim=True).expand_as(x0)
            velocity = torch.zeros_like(x0)
            for turn in range(self.iterations + 1):
                n = self.draws if turn < self.iterations else 1
                z = torch.randn(n, *x0.shape, generator=generator).to(x0)
                x = a**0.5 * bounded(mu, x0.std()) + (1 - a) ** 0.5 * z
                if turn == self.iterations:
                    return x[0]
                told, gradient = lift.slope(x, torch.full((n,), b, device=x0.device), t, i)
                if not finite(told, gradient).all():
                    warnings.warn(f"{lift.not_finite([b])}; its latents are left as they were", stacklevel=2)
                    return old
                [values] = values_of({name: value.mean(dim=0, keepdim=True) for name, value in told.items()})
                record[b].note_values(values)
                velocity = self.momentum * velocity + gradient.mean(dim=0)
                mu = mu - self.lr * sd.config.update_scale / 20 / a**0.5 * velocity
                if progress is not None:
                    progress(b, f"saga {turn + 1}/{self.iterations} loss {values['loss']:.3g}")
            return x0

        return move
