"""StableDiffusion: text + noise -> picture. The loop that everything shares.

A picture is: the prompt's text states, unit noise, a predictor (minsd/guidance.py), a sampler that walks it down the
schedule's levels (samplers/), and the VAE's decoder. `load` makes one from files (weights/).
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from minsd import guidance, image, samplers
from minsd.attention import Attention
from minsd.config import STRENGTH, ModelConfig, check_size
from minsd.graphs import Graphs
from minsd.kernels import BACKENDS
from minsd.noise.initial import noise as draw_noise
from minsd.samplers.random import generators as make_generators
from minsd.samplers.schedule import Schedule
from minsd.vae import decode_in_bands, encode_in_bands, memory_needed


def load(
    model: str = "shapes",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
) -> "StableDiffusion":
    """A model by name ("shapes", or a row of `minsd.config.MODELS`), folder, file or hub id, frozen and ready.

    Device: CUDA where there is one, else the CPU. dtype: float16 on CUDA, else float32. `vae`, a folder or file, takes the
    place of the model's own; `tokenizer`, a folder, and `prediction_type` serve single files, which hold neither.
    ValueError or FileNotFoundError, in one line, for what cannot be loaded.
    """
    from minsd.weights.load import load_model

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {device} is not one of cpu, cuda, mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch finds no CUDA device here: use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} was asked for, but PyTorch finds {torch.cuda.device_count()} here: no more processes than GPUs"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps was asked for, but PyTorch finds none here: use cpu")
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    files = {"vae": vae, "tokenizer": tokenizer, "prediction_type": prediction_type}
    loaded = load_model(
        model, device=device, dtype=dtype, **{key: value for key, value in files.items() if value is not None}
    )
    sd = StableDiffusion(loaded.config, loaded.unet, loaded.vae, loaded.text)
    sd.name, sd.model_hash, sd.notes = loaded.name, loaded.sha256, loaded.notes
    if device.type == "cuda":
        for network in (
            sd.unet,
            sd.vae,
        ):  # as the convolutions of tensor cores read: no turning round before each
            network.to(memory_format=torch.channels_last)
        sd.use_graphs()
    return sd


class StableDiffusion:
    """The three networks and the schedule, and what people do with them."""

    def __init__(self, config: ModelConfig, unet, vae, text):
        self.config, self.unet, self.vae, self.text = config, unet, vae, text
        self.schedule = Schedule(config.schedule)
        self.name, self.model_hash, self.notes = config.name, None, []
        self.graphs: Graphs | None = None

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def set_attention(self, backend: str, *others: torch.nn.Module) -> None:
        """Who computes attention in the UNet, and in `others` (a ControlNet): a backend of `minsd.kernels.attention`."""
        if backend not in BACKENDS:
            raise ValueError(f"no attention backend is called {backend!r}; choose from {', '.join(BACKENDS)}")
        for module in (module for network in (self.unet, *others) for module in network.modules()):
            if isinstance(module, Attention):
                module.backend = backend
        if self.graphs is not None:
            self.graphs.release()

    def use_graphs(self, on: bool = True) -> None:
        """Answer the UNet's evaluations from CUDA graphs (minsd/graphs.py), or no longer. `load` does on CUDA."""
        if self.graphs is not None:
            self.graphs.release()
            self.unet.forward, self.graphs = self.graphs.run, None
        if on:
            self.unet.forward = self.graphs = Graphs(self.unet)

    def compile(self, **options) -> None:
        """Let torch.compile work on the UNet: minutes at the first step of each size, faster steps after. `options` are
        torch.compile's. CUDA graphs, where they are used, are then of what it made, unless a `mode` brings its own."""
        graphs = self.graphs is not None and "mode" not in options
        self.use_graphs(False)
        run = torch.compile(self.unet.forward, **options)

        def forward(
            x, t, *args, **more
        ):  # a timestep as a number would be compiled in, and every step compiled anew
            t = t if torch.is_tensor(t) else torch.full((len(x),), float(t), device=x.device)
            return run(x, t, *args, **more)

        self.unet.forward = forward
        self.use_graphs(graphs)

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
        init_image: Image.Image | None = None,
        strength: float = STRENGTH,
        karras: bool = False,
        refine: Callable | None = None,
    ) -> list[Image.Image]:
        """Pictures, one per seed (default: seed 0) or per unit noise (B,4,height/8,width/8).

        Whatever is None takes the model's own default. Height and width are pixels, multiples of 8. With several
        prompts, one per picture. `refine(i, t, x) -> x` may change the latents before each step's prediction.
        `init_image` is where image to image begins, cut and scaled to height x width, and `strength` (0 to 1)
        the share of the steps that it goes through. `karras`: the level spacing of that name, for dpmpp_2m.
        """
        height = self.config.size if height is None else height
        width = self.config.size if width is None else width
        check_size(height, width)
        shape = (4, height // 8, width // 8)
        if noise is not None and (noise.ndim != 4 or tuple(noise.shape[1:]) != shape):
            raise ValueError(
                f"noise (pictures, {', '.join(map(str, shape))}) is needed for {width}x{height}, not {tuple(noise.shape)}"
            )
        if seeds is None:
            seeds = [0] if noise is None else range(len(noise))
        seeds = [seeds] if isinstance(seeds, int) else list(seeds)
        if not seeds:
            raise ValueError("no seeds were given: one a picture")
        noise = draw_noise(seeds, shape) if noise is None else noise
        prompts = [prompt] * len(noise) if isinstance(prompt, str) else list(prompt)
        if not len(prompts) == len(noise) == len(seeds):
            raise ValueError(
                f"one prompt, seed and noise a picture: not {len(prompts)} prompts, {len(seeds)} seeds, {len(noise)} noises"
            )

        init = None if init_image is None else self.encode(image.fit(init_image, width, height))
        pictures, size = [], self.batch_size(height, width)
        for start in range(0, len(noise), size):
            part = slice(start, start + size)
            latents = self.sample(
                prompts[part],
                noise[part],
                seeds=seeds[part],
                negative_prompt=negative_prompt,
                steps=steps,
                sampler=sampler,
                guidance_scale=guidance_scale,
                init=init,
                strength=strength,
                karras=karras,
                refine=refine,
            )
            pictures += self.decode(latents)
        return pictures

    def sample(
        self,
        prompts: Sequence[str] | str,
        noise: torch.Tensor,
        *,
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        **how,
    ) -> torch.Tensor:
        """Unit noise (B,4,h,w) -> latents (B,4,h,w), as one batch; `how` goes to `denoise`."""
        return self.denoise(self.guided(prompts, negative_prompt, guidance_scale), noise, **how)

    def guided(
        self, prompts: Sequence[str] | str, negative_prompt: str = "", guidance_scale: float | None = None
    ) -> guidance.Predictor:
        """The predictor of some prompts, one an image or one for all."""
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a number, not {guidance_scale}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        same = len(set(prompts)) == 1  # encode a shared prompt once
        cond = self.encode_prompt(prompts[:1] if same else prompts)
        return self.predictor(cond, self.encode_prompt([negative_prompt]), guidance_scale)

    @torch.no_grad()
    def denoise(
        self,
        predict: guidance.Predictor,
        noise: torch.Tensor,
        *,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        karras: bool = False,
        init: torch.Tensor | None = None,
        strength: float = STRENGTH,
        refine: Callable | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """The loop that everything shares: unit noise (B,4,h,w) -> latents, with any noise predictor.

        `seeds` feed samplers that draw noise on the way. With `init`, latents (B or 1,4,h,w) of a picture, the run begins
        from these, noised, and goes through the last `strength` of the steps: at 0 none, at 1 nothing of `init` is left.
        `progress(i, t)` is called after every step.
        """
        sampler = sampler or self.config.sampler
        samplers.check(sampler, karras)
        steps = self.config.steps if steps is None else steps
        options = {"karras": True} if karras else {}
        first = 0 if init is None else first_step(steps, strength)
        if first:
            init = init.to(self.device, self.dtype).expand(len(noise), -1, -1, -1)
            if first == steps:
                return init
            options |= {"init": init, "start": first}
        start = noise.to(self.device, self.dtype)
        generator = make_generators(range(len(noise)) if seeds is None else seeds, skip=noise.shape[1:])
        sample = samplers.SAMPLERS[sampler]
        for i, t, x in sample(  # noqa: B007
            predict, start, self.schedule, steps, generator=generator, refine=refine, **options
        ):
            if progress is not None:
                progress(i, t)
        return x

    def predictor(
        self, context: torch.Tensor, uncond: torch.Tensor, guidance_scale: float
    ) -> guidance.Predictor:
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
            raise ValueError(
                f"a picture to encode must have sides that are multiples of 8, not {x.shape[-1]}x{x.shape[-2]}"
            )
        x = x.to(self.device, self.dtype)
        size, encode = self._vae_batch(*x.shape[-2:]), lambda vae, x: vae.encode(x)[0]
        parts = [
            (encode if size else encode_in_bands)(self.vae, part) for part in x.split(size or 1)
        ]  # (b, 4, h, w) each
        return torch.cat(parts).to(self.dtype) * self.config.vae.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Latents (B,4,h,w) -> B pictures. Latents that are not finite are an error, never a black picture."""
        if not latents.isfinite().all():
            raise FloatingPointError(
                f"the latents are not finite: sampling in {latents.dtype} overflowed; try --dtype float32 or bfloat16"
            )
        z = latents.to(self.dtype) / self.config.vae.scaling_factor
        size, pixels = self._vae_batch(8 * z.shape[-2], 8 * z.shape[-1]), []
        decode = (lambda vae, z: vae.decode(z)) if size else decode_in_bands
        for part in z.split(size or 1):
            x = decode(self.vae, part)  # (b, 3, 8h, 8w)
            if (
                not x.isfinite().all() and self.dtype != torch.float32
            ):  # beyond float16's 65504, seen with real SD VAEs
                warnings.warn(
                    f"VAE decoding overflowed in {self.dtype}; decoded again in float32", stacklevel=2
                )
                vae = copy.deepcopy(self.vae).float()
                x = torch.cat(
                    [decode_in_bands(vae, one) for one in part.float().split(1)]
                )  # there is twice as much of everything
            if not x.isfinite().all():
                raise FloatingPointError(
                    "the VAE's picture is not finite even in float32: its file is damaged; --vae takes another"
                )
            pixels.append(x)
        return image.from_tensor(torch.cat(pixels))

    def _vae_batch(self, height: int, width: int) -> int:
        """How many pictures the VAE may take at once; 0, with a warning, where one must be coded in bands."""
        need, free = memory_needed(self.config.vae, height, width, self.dtype), 0.9 * free_memory(self.device)
        if self.graphs is not None and need > free - self.graphs.held:  # theirs is free for graphs alone
            self.graphs.release()
        if need > free:
            size = (
                f"{width}x{height} at once would take {need / 2**30:.1f} GB, {free / 2**30:.1f} GB are free"
            )
            warnings.warn(f"the VAE works in bands of rows: {size}", stacklevel=3)
            return 0
        return int(min(self.batch_size(height, width), free // need))

    def batch_size(self, height: int, width: int) -> int:
        """Pictures that go through the networks at once.

        On a CPU as many as have the latent cells of one at 512x512: more is no faster there. On a GPU as many as fit the
        free memory, sixteen times that at most; a guided step keeps about 100 kB a cell and half of guidance in 16 bits.
        """
        cells, limit = (height // 8) * (width // 8), 64 * 64
        if self.device.type == "cuda":
            limit = min(16 * limit, 0.8 * free_memory(self.device) / (2 * 50e3 * self.dtype.itemsize))
        return max(1, int(limit // cells))


def first_step(steps: int, strength: float) -> int:
    """How many of `steps` image to image leaves out at the noisy end, for a strength in 0..1."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, not {strength}")
    run = math.floor(steps * strength + 1e-9)
    if run < 1 and strength:
        raise ValueError(
            f"strength {strength} leaves none of {steps} steps: the least that runs one is {1 / steps:.3g}"
        )
    return steps - run


def free_memory(device: torch.device) -> float:
    """Bytes free on the device, those that PyTorch holds and does not use included; infinite where it cannot be known."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    info = Path("/proc/meminfo")
    if device.type == "cpu" and info.exists():
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", info.read_text())[1])
    return math.inf
