"""The noise levels a model was trained on, and the timesteps at which a sampler visits them.

The forward process (Ho et al. 2020) mixes an image's latents with noise: x_t = sqrt(abar_t) x_0 +
sqrt(1 - abar_t) eps, where abar is the cumulative product of 1 - beta. All numbers of this module
are stored on the CPU, as Python numbers or small tensors, so that a sampling loop never waits for
the GPU.

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

# abar at the last timestep of a schedule with zero terminal SNR (nothing of the image is left). The
# exact value is 0, at which sigma would be infinite. With this value, also used by diffusers, sigma
# is 4096.
ZERO_SNR = 2.0**-24
ZERO_SNR_SAMPLERS = "ddim, euler, euler_a, dpmpp_2m, unipc or lcm"  # those that can begin there


class Schedule:
    """The noise levels of a model, computed from its scheduler config as in diffusers. A level is
    described by abar, the cumulative product of 1 - beta. `alphas_cumprod` (1000,) float32 holds
    abar for all training timesteps, and the method `abar(t)` returns abar for one timestep.

    The constructor raises ValueError for an unknown beta schedule or prediction type, and for zero
    terminal SNR without v-prediction.
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
        if config.rescale_betas_zero_snr and config.prediction_type != "v_prediction":
            raise ValueError(
                "the model's schedule has zero terminal SNR (rescale_betas_zero_snr, ztsnr), which needs"
                " a model that predicts v: give --prediction-type v_prediction if this one does"
            )
        self.config = config
        self.prediction_type = config.prediction_type
        self.has_zero_snr = config.rescale_betas_zero_snr
        self.betas = zero_snr_betas(betas) if self.has_zero_snr else betas  # (1000,)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)  # (1000,)
        if self.has_zero_snr:
            self.alphas_cumprod[-1] = ZERO_SNR
        self._abar: list[float] = self.alphas_cumprod.double().tolist()

    def abar(self, t: Timestep) -> float:
        """Returns abar, the cumulative product of 1 - beta, at timestep t. For a fractional t the
        value is interpolated between the two nearest timesteps, as in diffusers: linearly in sigma
        = sqrt((1 - abar) / abar) if the schedule's spacing is linspace, otherwise linearly in log
        sigma."""
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

    def check_signal(self, visited: Sequence[Timestep], what: str, advice: str) -> None:
        """Raises ValueError if a run over the timesteps `visited` begins at zero terminal SNR, that
        is, where nothing of the image is left. The message states that `what` is not possible
        there, and ends with `advice`."""
        if self.abar(visited[0]) == ZERO_SNR:
            raise ValueError(
                f"{what} is not possible where the first timestep leaves nothing of the image, as this"
                f" model's does (zero terminal SNR): {advice}"
            )

    def final_abar(self, final: str | None = None) -> float:
        """Returns abar, the cumulative product of 1 - beta, at the end of a run. `final` is "abar0"
        (the run ends at the level of timestep 0), "zero" (it ends without noise, so abar is 1), or
        None for the one of these that the model's config states (`set_alpha_to_one`). Raises
        ValueError for any other `final`."""
        if final not in (None, "abar0", "zero"):
            raise ValueError(f"final must be 'abar0' or 'zero', not {final!r}")
        if final is None:
            final = "zero" if self.config.set_alpha_to_one else "abar0"
        return 1.0 if final == "zero" else self._abar[0]

    def abar_below(self, t: Timestep, steps: int, final: str | None = None) -> float:
        """Returns abar, the cumulative product of 1 - beta, where a step of DDIM or PNDM ends. The
        step begins at timestep t, in a run of `steps` steps. It ends at timestep t - 1000 // steps
        (for 1000 training timesteps). If this number is negative, it ends at the level that `final`
        selects (`final_abar`).

        With linspace spacing this is not exactly the next timestep of the run. The published
        samplers have the same inaccuracy.
        """
        below = t - self.config.num_train_timesteps // steps
        return self.abar(below) if below >= 0 else self.final_abar(final)

    def sigma(self, t: Timestep) -> float:
        """Returns sigma = sqrt((1 - abar) / abar), the ratio of noise to signal, at timestep t.
        abar is the cumulative product of 1 - beta. Most samplers solve an equation in sigma
        (`samplers/__init__.py`)."""
        return ((1 - self.abar(t)) / self.abar(t)) ** 0.5

    def sigmas(self, timesteps: Sequence[Timestep], final: str | None = None) -> list[float]:
        """Lists sigma, the ratio of noise to signal, for a run: one value for each timestep in
        `timesteps`, and a last one for the end of the run. This last value is sigma at timestep 0
        if `final` is "abar0", and 0 if it is "zero" or None."""
        last = self.final_abar(final or "zero")
        return [self.sigma(t) for t in timesteps] + [((1 - last) / last) ** 0.5]

    def timesteps(self, steps: int, fractional: bool = False, below: int = 0) -> list[Timestep]:
        """Lists the training timesteps of a run of `steps` steps, most noise first. The model's
        config states how they are spaced (leading, linspace or trailing). They are rounded as in
        diffusers. With linspace spacing, `fractional` prevents the rounding, as some samplers of
        diffusers do.

        If `below` is not 0, lists the first `steps` timesteps of a longer run, of `steps + below`
        steps. Raises ValueError if the number of steps is out of range or the spacing is unknown.
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
            # With some strides, rounding makes arange one number longer.
            even = np.arange(n, 0, -n / length)[:steps]
            return (even.round().astype(int) - 1).tolist()
        raise ValueError(f"unknown timestep_spacing {spacing!r}: use leading, linspace or trailing")

    def solver_timesteps(self, steps: int) -> list[Timestep]:
        """Lists the timesteps of a run of `steps` steps with DPM-Solver++ or UniPC, most noise
        first. With trailing spacing they are those of the method `timesteps`. With another spacing
        they are the first `steps` timesteps of a run with one step more."""
        return self.timesteps(steps, below=0 if self.config.timestep_spacing == "trailing" else 1)

    def karras_timesteps(self, steps: int) -> list[Timestep]:
        """Lists `steps` timesteps, most noise first, whose noise levels sigma are evenly spaced in
        sigma^(1/7) (Karras et al. 2022, equation 5). The timesteps are fractional, so that the
        method `sigma` returns exactly these levels. Raises ValueError if the number of steps is out
        of range."""
        self._check(steps)
        top = self.sigma(len(self._abar) - 1) ** (1 / 7)
        bottom = self.sigma(0) ** (1 / 7)
        # The scale in which `abar` interpolates linearly.
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
        """Returns the latents (B,4,h,w) with which a run at timestep t begins. If `init` is None,
        they are the unit noise `noise`. Otherwise they are the clean latents `init` with `noise`
        added up to the noise level of t."""
        abar = self.abar(t)
        return noise if init is None else abar**0.5 * init + (1 - abar) ** 0.5 * noise

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Adds noise to clean latents. Returns sqrt(abar) x0 + sqrt(1 - abar) noise, where abar is
        the cumulative product of 1 - beta at timestep t. `x0` and the unit noise `noise` are
        (B,4,h,w). t is an int for all images, or a tensor (B,) with one timestep per image."""
        abar = self.alphas_cumprod.to(x0.device)[torch.as_tensor(t, device=x0.device).expand(len(x0))]
        abar = abar.to(x0.dtype).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def zero_snr_betas(betas: Tensor) -> Tensor:
    """Changes `betas` (1000,) so that abar ends at 0. Returns betas (1000,), the last of which is
    1. sqrt(abar) is shifted, and then scaled so that its first value stays the same (Lin et al.
    2023, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def clean(x: Tensor, eps: Tensor, abar: float) -> Tensor:
    """Predicts the clean latents (B,4,h,w), in x's dtype, from latents x (B,4,h,w) at level `abar`
    and the noise `eps` predicted for x.

    If x is at zero terminal SNR, the result is -v of a network that predicts v. This is what the
    formula approaches as abar approaches 0, where eps is sqrt(abar) v + sqrt(1 - abar) x.
    """
    if abar == ZERO_SNR:
        return (((1 - abar) ** 0.5 * x.to(eps.dtype) - eps) / abar**0.5).to(x.dtype)
    return ((x - (1 - abar) ** 0.5 * eps) / abar**0.5).to(x.dtype)


def to_y(x: Tensor, sigma: float) -> Tensor:
    """Converts latents x = sqrt(abar) x0 + sqrt(1 - abar) eps, the scale of the network's inputs,
    into y = x0 + sigma eps, the scale in which most samplers compute. Returns x sqrt(1 +
    sigma^2)."""
    return x * (1 + sigma**2) ** 0.5


def to_x(y: Tensor, sigma: float) -> Tensor:
    """Converts y = x0 + sigma eps, the scale in which most samplers compute, into latents x =
    sqrt(abar) x0 + sqrt(1 - abar) eps, the scale of the network's inputs. Returns y / sqrt(1 +
    sigma^2)."""
    return y / (1 + sigma**2) ** 0.5
