"""The noise levels a model was trained on, and the timesteps at which a sampler visits them.

The forward process (Ho et al. 2020) mixes a picture's latents with noise: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,
abar the running product of 1 - beta. Everything here lives on the CPU as Python numbers or small tensors, so that a
sampling loop never waits for the GPU.
"""

import bisect
import math

import torch

from minsd.config import ScheduleConfig


class Schedule:
    """`alphas_cumprod` (1000,) float32 as diffusers computes it; `abar(t)` one of them as a Python float."""

    def __init__(self, config: ScheduleConfig):
        self.config, self.prediction_type, n = config, config.prediction_type, config.num_train_timesteps
        if (
            config.beta_schedule == "scaled_linear"
        ):  # linear in sqrt(beta): what every Stable Diffusion was trained on
            betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, n) ** 2
        elif config.beta_schedule == "linear":
            betas = torch.linspace(config.beta_start, config.beta_end, n)
        else:
            raise ValueError(f"beta_schedule {config.beta_schedule!r} is not known: scaled_linear or linear")
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type {config.prediction_type!r} is not known: epsilon or v_prediction"
            )
        self.betas = betas  # (1000,)
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)  # (1000,)
        self._abar = self.alphas_cumprod.double().tolist()

    def abar(self, t: int | float) -> float:
        """abar at timestep t; between two whole timesteps (Karras levels) log sigma is interpolated."""
        low = min(max(int(t), 0), len(self._abar) - 1)
        if t == low:
            return self._abar[low]
        high, part = min(low + 1, len(self._abar) - 1), t - low
        log_sigma = [0.5 * math.log((1 - a) / a) for a in (self._abar[low], self._abar[high])]
        return 1 / (1 + math.exp(2 * ((1 - part) * log_sigma[0] + part * log_sigma[1])))

    def final_abar(self, final: str | None = None) -> float:
        """The level below the last timestep. `final` is "abar0", "zero" (no noise), or None for the model's own."""
        if final not in (None, "abar0", "zero"):
            raise ValueError(f"final must be 'abar0' or 'zero', not {final!r}")
        if final is None:
            final = "zero" if self.config.set_alpha_to_one else "abar0"
        return 1.0 if final == "zero" else self._abar[0]

    def abar_below(self, t: int, steps: int, final: str | None = None) -> float:
        """Where DDIM's and PNDM's step from t ends: 1000 // steps timesteps lower (which linspace spacing does not quite
        visit next: these samplers were published so), or at the last level."""
        below = t - self.config.num_train_timesteps // steps
        return self.abar(below) if below >= 0 else self.final_abar(final)

    def sigma(self, t: int | float) -> float:
        """Noise against signal at t: sqrt((1 - abar) / abar), the level in the samplers that solve dy/dsigma = eps."""
        return ((1 - self.abar(t)) / self.abar(t)) ** 0.5

    def sigmas(self, timesteps: list[int], final: str | None = None) -> list[float]:
        """sigma at each timestep, and the last level: 0 unless `final` is "abar0"."""
        last = self.final_abar(final or "zero")
        return [self.sigma(t) for t in timesteps] + [((1 - last) / last) ** 0.5]

    def solver_timesteps(self, steps: int) -> list[int]:
        """The grid of the multistep solvers (DPM++, UniPC): cut one step finer, its least noisy timestep left out."""
        if self.config.timestep_spacing == "trailing":
            return self.timesteps(steps)
        return self.timesteps(steps + 1)[:-1] if steps >= 1 else self.timesteps(steps)

    def karras_timesteps(self, steps: int) -> list[float]:
        """Levels even in sigma^(1/7) from the most noise to the least (Karras et al. 2022, equation 5), as timesteps:
        fractions of them, at which `sigma` gives just these levels."""
        self.timesteps(steps)  # refuses what is no number of steps
        top, bottom = (self.sigma(t) ** (1 / 7) for t in (len(self._abar) - 1, 0))
        sigmas = [(top + i / max(steps - 1, 1) * (bottom - top)) ** 7 for i in range(steps)]
        log_sigmas = [math.log(self.sigma(t)) for t in range(len(self._abar))]
        timesteps = []
        for sigma in sigmas:
            high = min(max(bisect.bisect_left(log_sigmas, math.log(sigma)), 1), len(log_sigmas) - 1)
            low = high - 1
            part = (math.log(sigma) - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])
            timesteps.append(low + min(max(part, 0.0), 1.0))
        return timesteps

    def timesteps(self, steps: int, fractional: bool = False) -> list[int]:
        """The training timesteps of a run of `steps`, most noise first, by the model's spacing. Some samplers leave those
        of linspace unrounded (`fractional`), as the classes that models were published with do."""
        n = self.config.num_train_timesteps
        if not isinstance(steps, int) or not 1 <= steps <= n:
            raise ValueError(f"steps must be a whole number from 1 to {n}, not {steps}")
        spacing = self.config.timestep_spacing
        if spacing == "leading":
            timesteps = [i * (n // steps) + self.config.steps_offset for i in range(steps)][::-1]
            if timesteps[0] >= n:
                raise ValueError(
                    f"{steps} steps at leading spacing begin beyond the last timestep, {n - 1}: take fewer"
                )
            return timesteps
        if spacing == "linspace":
            timesteps = [(n - 1) * i / max(steps - 1, 1) for i in range(steps)][::-1]
            return timesteps if fractional else [round(t) for t in timesteps]
        if spacing == "trailing":
            return [round(n - i * n / steps) - 1 for i in range(steps)]
        raise ValueError(f"timestep_spacing {spacing!r} is not known: leading, linspace or trailing")

    def begin(self, init: torch.Tensor | None, noise: torch.Tensor, t: int | float) -> torch.Tensor:
        """Where a run begins: unit noise, or with `init` (latents of a picture) these, noised to the level of t."""
        abar = self.abar(t)
        return noise if init is None else abar**0.5 * init + (1 - abar) ** 0.5 * noise

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor | int) -> torch.Tensor:
        """x_t of clean latents x0 and unit noise (B,4,h,w) at timesteps t, an int or (B,)."""
        abar = self.alphas_cumprod.to(x0.device)[torch.as_tensor(t, device=x0.device).expand(len(x0))]
        abar = abar.to(x0.dtype).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def to_y(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Variance-preserving latents x to y = x0 + sigma eps: see `samplers/__init__.py`."""
    return x * (1 + sigma**2) ** 0.5


def to_x(y: torch.Tensor, sigma: float) -> torch.Tensor:
    return y / (1 + sigma**2) ** 0.5
