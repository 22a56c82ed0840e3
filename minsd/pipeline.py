"""StableDiffusion: text + noise -> picture. The loop that everything shares.

A picture is: the prompt's text states, unit noise, a predictor (minsd/guidance.py), a sampler that walks it down the
schedule's levels (samplers/), and the VAE's decoder. `load` makes one from files (weights/).
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from minsd import guidance, image
from minsd.config import ModelConfig
from minsd.noise.initial import generators as make_generators
from minsd.noise.initial import noise as draw_noise
from minsd.samplers import SAMPLERS
from minsd.samplers.schedule import Schedule


def load(model: str = "shapes", device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "StableDiffusion":
    """A model by name ("shapes", or a row of `minsd.config.MODELS`), folder, file or hub id, frozen and ready.

    Device: CUDA where there is one, else the CPU. dtype: float16 on CUDA, else float32.
    ValueError or FileNotFoundError, in one line, for what cannot be loaded.
    """
    from minsd.weights.load import load_model

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch finds no CUDA device here: use cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps was asked for, but PyTorch finds none here: use cpu")
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    loaded = load_model(model, device=device, dtype=dtype)
    sd = StableDiffusion(loaded.config, loaded.unet, loaded.vae, loaded.text)
    sd.name, sd.model_hash, sd.notes = loaded.name, loaded.sha256, loaded.notes
    return sd


class StableDiffusion:
    """The three networks and the schedule, and what people do with them."""

    def __init__(self, config: ModelConfig, unet, vae, text):
        self.config, self.unet, self.vae, self.text = config, unet, vae, text
        self.schedule = Schedule(config.schedule)
        self.name, self.model_hash, self.notes = config.name, None, []

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def __call__(
        self,
        prompt: str | Sequence[str],
        seeds: Sequence[int] | int | None = None,
        *,
        noise: torch.Tensor | None = None,
        negative_prompt: str = "",
        steps: int | None = None,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        refine: Callable | None = None,
    ) -> list[Image.Image]:
        """Pictures, one per seed (default: seed 0) or per unit noise (B,4,height/8,width/8).

        Whatever is None takes the model's own default. Height and width are pixels, multiples of 8. With several
        prompts, one per picture. `refine(i, t, x) -> x` may change the latents before each step's prediction.
        """
        height, width = height or self.config.size, width or self.config.size
        if height % 8 or width % 8 or height < 8 or width < 8:
            raise ValueError(f"height and width must be positive multiples of 8, not {height}x{width}")
        if seeds is None:
            seeds = [0] if noise is None else range(len(noise))
        seeds = [seeds] if isinstance(seeds, int) else list(seeds)
        noise = draw_noise(seeds, (4, height // 8, width // 8)) if noise is None else noise
        prompts = [prompt] * len(noise) if isinstance(prompt, str) else list(prompt)
        if not len(prompts) == len(noise) == len(seeds):
            raise ValueError(f"one prompt, seed and noise a picture: not {len(prompts)} prompts, {len(seeds)} seeds, {len(noise)} noises")

        pictures, size = [], self.batch_size(height, width)
        for start in range(0, len(noise), size):
            part = slice(start, start + size)
            latents = self.sample(
                prompts[part], noise[part], seeds=seeds[part], negative_prompt=negative_prompt, steps=steps,
                sampler=sampler, guidance_scale=guidance_scale, refine=refine,
            )
            pictures += self.decode(latents)
        return pictures

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str] | str,
        noise: torch.Tensor,
        *,
        seeds: Sequence[int] | None = None,
        negative_prompt: str = "",
        steps: int | None = None,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        refine: Callable | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Unit noise (B,4,h,w) -> latents (B,4,h,w), as one batch. `seeds` feed samplers that draw noise on the way;
        `progress(i, t)` is called after every step."""
        sampler = sampler or self.config.sampler
        if sampler not in SAMPLERS:
            raise ValueError(f"no sampler is called {sampler!r}; choose from {', '.join(SAMPLERS)}")
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a number, not {guidance_scale}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        same = len(set(prompts)) == 1  # encode a shared prompt once
        cond = self.encode_prompt(prompts[:1] if same else prompts)
        uncond = self.encode_prompt([negative_prompt])
        predict = self.predictor(cond, uncond, guidance_scale)

        start = noise.to(self.device, self.dtype)
        generator = make_generators(range(len(noise)) if seeds is None else seeds, skip=noise.shape[1:])
        steps = self.config.steps if steps is None else steps
        for i, t, x in SAMPLERS[sampler](predict, start, self.schedule, steps, generator=generator, refine=refine):  # noqa: B007
            if progress is not None:
                progress(i, t)
        return x

    def predictor(self, context: torch.Tensor, uncond: torch.Tensor, guidance_scale: float) -> guidance.Predictor:
        """predict(x, t) -> eps under text states (B or 1,77,D), guided away from `uncond`."""
        return guidance.classifier_free(self.unet, context, uncond, guidance_scale, self.schedule)

    def encode_prompt(self, prompts: Sequence[str] | str) -> torch.Tensor:
        """Prompts -> text states (B,77,D)."""
        return self.text.encode([prompts] if isinstance(prompts, str) else list(prompts)).to(self.dtype)

    @torch.no_grad()
    def encode(self, pictures: Image.Image | Sequence[Image.Image]) -> torch.Tensor:
        """Pictures of one size, sides multiples of 8 -> latents (B,4,h,w): the mean of the VAE's posterior."""
        x = image.to_tensor([pictures] if isinstance(pictures, Image.Image) else list(pictures))
        if x.shape[-2] % 8 or x.shape[-1] % 8:
            raise ValueError(f"a picture to encode must have sides that are multiples of 8, not {x.shape[-1]}x{x.shape[-2]}")
        mean, _ = self.vae.encode(x.to(self.device, self.dtype))
        return mean * self.config.vae.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Latents (B,4,h,w) -> B pictures. Latents that are not finite are an error, never a black picture."""
        if not latents.isfinite().all():
            raise FloatingPointError(f"the latents are not finite: sampling in {latents.dtype} overflowed; try --dtype float32 or bfloat16")
        z = latents.to(self.dtype) / self.config.vae.scaling_factor
        pixels = []
        for part in z.split(self.batch_size(8 * z.shape[-2], 8 * z.shape[-1])):
            x = self.vae.decode(part)  # (b, 3, 8h, 8w)
            if not x.isfinite().all():  # activations beyond float16's 65504, seen with real SD VAEs
                warnings.warn(f"VAE decoding overflowed in {self.dtype}; decoded again in float32", stacklevel=2)
                x = copy.deepcopy(self.vae).float().decode(part.float())
            pixels.append(x)
        return image.from_tensor(torch.cat(pixels))

    def batch_size(self, height: int, width: int) -> int:
        """Pictures that go through the networks at once: as many as fill the latent cells of four at 512x512."""
        return max(1, 4 * 64 * 64 // ((height // 8) * (width // 8)))
