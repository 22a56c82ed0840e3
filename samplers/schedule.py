"""The noise levels a model was trained on, and the timesteps at which a sampler visits them.

The forward process (Ho et al. 2020) mixes an image's latents with noise: x_t = sqrt(abar_t) x_0 +
sqrt(1 - abar_t) eps, where abar is the running product of 1 - beta. Everything here lives on the
CPU as Python numbers or small tensors, so that a sampling loop never waits for the GPU.

The types that all samplers share are defined here, too.
"""

import bisect
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from minsd.config import ScheduleConfig

Timestep = int | float  # training index 0..999; fractional at Karras levels and under linspace
Predictor = Callable[[Tensor, Timestep], Tensor]  # (x, t) -> eps, of x's shape
Refine = Callable[[int, Timestep, Tensor], Tensor]  # (i, t, x) -> x, before step i's prediction
Steps = Iterator[tuple[int, Timestep, Tensor]]  # (i, t, x) after every step
Generators = Sequence[torch.Generator]  # one per image


class Schedule:
    """A model's noise levels. `alphas_cumprod` is (1000,) float32, computed as diffusers does;
    `abar(t)` is one of its values as a Python float.

    ValueError for a beta schedule or prediction type that is not known.
    """

    def __init__(self, config: ScheduleConfig):
        n = config.num_train_timesteps
        if config.beta_schedule == "scaled_linear":  # linear in sqrt(beta): Stable Diffusion's
            betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, n) ** 2
        elif config.beta_schedule == "linear":
            betas = torch.linspace(config.beta_start, config.beta_end, n)
        else:
            raise ValueError(f"unknown beta_schedule {config.beta_schedule!r}: use scaled_linear or linear")
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"unknown prediction_type {config.prediction_type!r}: use epsilon or v_prediction"
            )
        self.config = config
        self.prediction_type = config.prediction_type
        self.betas = betas  # (1000,)
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)  # (1000,)
        self._abar: list[float] = self.alphas_cumprod.double().tolist()

    def abar(self, t: Timestep) -> float:
        """abar at timestep t. Between two whole timesteps log sigma is interpolated linearly; under
        linspace spacing, sigma itself, as Euler's and Heun's reference classes do."""
        low = min(max(int(t), 0), len(self._abar) - 1)
        if t == low:
            return self._abar[low]
        high = min(low + 1, len(self._abar) - 1)
        part = t - low
        if self.config.timestep_spacing == "linspace":
            sigma = (1 - part) * self.sigma(low) + part * self.sigma(high)
            return 1 / (1 + sigma**2)
        log_sigma = [0.5 * math.log((1 - a) / a) for a in (self._abar[low], self._abar[high])]
        return 1 / (1 + math.exp(2 * ((1 - part) * log_sigma[0] + part * log_sigma[1])))

    def final_abar(self, final: str | None = None) -> float:
        """abar where a run ends. `final`: "abar0", "zero" (no noise), or None for the model's own.

        ValueError for any other value.
        """
        if final not in (None, "abar0", "zero"):
            raise ValueError(f"final must be 'abar0' or 'zero', not {final!r}")
        if final is None:
            final = "zero" if self.config.set_alpha_to_one else "abar0"
        return 1.0 if final == "zero" else self._abar[0]

    def abar_below(self, t: Timestep, steps: int, final: str | None = None) -> float:
        """abar where a step of DDIM or PNDM from t ends: 1000 // steps lower, or the final level.

        Under linspace spacing that is not exactly the next timestep visited. The published samplers
        do the same.
        """
        below = t - self.config.num_train_timesteps // steps
        return self.abar(below) if below >= 0 else self.final_abar(final)

    def sigma(self, t: Timestep) -> float:
        """Noise-to-signal ratio at t, sqrt((1 - abar) / abar): the variable of dy/dsigma = eps."""
        return ((1 - self.abar(t)) / self.abar(t)) ** 0.5

    def sigmas(self, timesteps: Sequence[Timestep], final: str | None = None) -> list[float]:
        """sigma at each timestep, then that of the final level: 0 unless `final` is "abar0"."""
        last = self.final_abar(final or "zero")
        return [self.sigma(t) for t in timesteps] + [((1 - last) / last) ** 0.5]

    def timesteps(self, steps: int, fractional: bool = False, below: int = 0) -> list[Timestep]:
        """The training timesteps of a run of `steps` by the model's own spacing, most noise first.

        `fractional` leaves linspace timesteps unrounded, as the reference classes of some samplers
        do. `below` takes the grid of `steps + below` steps and drops the last `below` of it. The
        numbers are spaced and rounded by NumPy, as in those classes, so that exact halves are
        rounded the same way. ValueError
        for a number of steps that is out of range, and for an unknown spacing.
        """
        self._check(steps)
        n = self.config.num_train_timesteps
        spacing = self.config.timestep_spacing
        length = steps + below
        if length > n:
            raise ValueError(
                f"{steps} steps at {spacing} spacing repeat timesteps in this sampler: take fewer"
            )
        if spacing == "leading":
            offset = self.config.steps_offset
            grid: list[Timestep] = [i * (n // length) + offset for i in reversed(range(length))]
            if grid[0] >= n:
                raise ValueError(
                    f"{steps} steps at leading spacing begin after timestep {n - 1}, the last: take fewer"
                )
            return grid[:steps]
        if spacing == "linspace":
            even = np.linspace(0, n - 1, length)[::-1][:steps]
            return (even if fractional else even.round().astype(int)).tolist()
        if spacing == "trailing":
            # With some strides, rounding makes arange one longer.
            even = np.arange(n, 0, -n / length)[:steps]
            return (even.round().astype(int) - 1).tolist()
        raise ValueError(f"unknown timestep_spacing {spacing!r}: use leading, linspace or trailing")

    def solver_timesteps(self, steps: int) -> list[Timestep]:
        """Lists the timesteps of the multistep solvers (DPM++, UniPC): the grid of steps + 1 steps
        without its last timestep; under trailing spacing, the usual grid."""
        return self.timesteps(steps, below=0 if self.config.timestep_spacing == "trailing" else 1)

    def karras_timesteps(self, steps: int) -> list[Timestep]:
        """Timesteps at levels evenly spaced in sigma^(1/7) (Karras et al. 2022, equation 5).

        Most noise first. They are fractional: `sigma` at each of them is exactly that level.
        ValueError for a number of steps that is out of range.
        """
        self._check(steps)
        top = self.sigma(len(self._abar) - 1) ** (1 / 7)
        bottom = self.sigma(0) ** (1 / 7)
        # In the scale that `abar` interpolates in.
        scale = float if self.config.timestep_spacing == "linspace" else math.log
        levels = [scale(self.sigma(t)) for t in range(len(self._abar))]
        timesteps: list[Timestep] = []
        for i in range(steps):
            sigma = (top + i / max(steps - 1, 1) * (bottom - top)) ** 7
            high = min(max(bisect.bisect_left(levels, scale(sigma)), 1), len(levels) - 1)
            low = high - 1
            part = (scale(sigma) - levels[low]) / (levels[high] - levels[low])
            timesteps.append(low + min(max(part, 0.0), 1.0))
        return timesteps

    def _check(self, steps: int) -> None:
        n = self.config.num_train_timesteps
        if not isinstance(steps, int) or not 1 <= steps <= n:
            raise ValueError(f"steps must be a whole number from 1 to {n}, not {steps}")

    def begin(self, init: Tensor | None, noise: Tensor, t: Timestep) -> Tensor:
        """Latents at the start of a run: unit noise, or clean latents `init` noised to level t."""
        abar = self.abar(t)
        return noise if init is None else abar**0.5 * init + (1 - abar) ** 0.5 * noise

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t of clean latents x0 and unit noise, (B,4,h,w) each, at timesteps t, an int or (B,)."""
        abar = self.alphas_cumprod.to(x0.device)[torch.as_tensor(t, device=x0.device).expand(len(x0))]
        abar = abar.to(x0.dtype).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def to_y(x: Tensor, sigma: float) -> Tensor:
    """Variance-preserving latents x -> y = x0 + sigma eps (explained in `samplers/__init__.py`)."""
    return x * (1 + sigma**2) ** 0.5


def to_x(y: Tensor, sigma: float) -> Tensor:
    """y = x0 + sigma eps -> variance-preserving latents x, the inverse of `to_y`."""
    return y / (1 + sigma**2) ** 0.5
