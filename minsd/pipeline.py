"""StableDiffusion: from text and noise to an image, and the denoising loop that all methods share.

The text encoder turns the prompt into text states. A predictor (minsd/guidance.py) predicts the
noise in the latents, and a sampler (samplers/) uses the predictions to take the latents down the
schedule's noise levels. The VAE decodes the latents. `load` makes a model from files (weights/).
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minsd import guidance, image, samplers
from minsd.attention import Attention
from minsd.config import STRENGTH, ModelConfig, check_size, overflow_advice
from minsd.controlnet import Controlled
from minsd.graphs import Graphs, graphs_of, use_graphs
from minsd.kernels import BACKENDS
from minsd.noise.initial import noise as unit_noise
from minsd.noise.steer import asked
from minsd.samplers.random import generators
from minsd.samplers.schedule import Schedule
from minsd.text import TextEncoder
from minsd.vae import VAE, decode_in_bands, encode_in_bands, memory_needed

# The most images in one batch. Larger batches of the smallest images would be little faster
# (8x8 pixels, embedded model, on a CPU: 15 % less time per image with 1024), but a kill loses the
# whole batch, and text states take memory whatever an image's size.
BATCH_MOST = 256


def load(
    model: str = "shapes",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
) -> "StableDiffusion":
    """Loads a model. `model` is a name ("shapes", or another one in `minsd.config.MODELS`), a
    folder, a single file, or a hub id. The model's weights are frozen.

    `device` defaults to CUDA if there is a GPU, otherwise to the CPU. `dtype` defaults to float16
    on CUDA and to float32 elsewhere. `vae` (a folder or a file), `tokenizer` (a folder) and
    `prediction_type` ("epsilon" or "v_prediction") replace the model's own. The last two are meant
    for single files, which contain no tokenizer and often do not state a prediction type.

    Raises FileNotFoundError if a file is missing, and ValueError if the model cannot be loaded for
    another reason. The error message is one line.
    """
    from minsd.weights.load import load_model

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {device} is not one of cpu, cuda, mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch finds no CUDA device here: use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} was asked for, but PyTorch finds {torch.cuda.device_count()} here: "
            "start no more processes than there are GPUs"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps was asked for, but PyTorch finds none here: use cpu")
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    files = {"vae": vae, "tokenizer": tokenizer, "prediction_type": prediction_type}
    loaded = load_model(
        model, device=device, dtype=dtype, **{key: value for key, value in files.items() if value is not None}
    )
    sd = StableDiffusion(loaded.config, loaded.unet, loaded.vae, loaded.text)
    sd.name = loaded.name
    sd.model_hash = loaded.sha256
    sd.model_revision = loaded.revision
    sd.notes = loaded.notes
    if device.type == "cuda":
        for module in (sd.unet, sd.vae):
            # Tensor-core convolutions expect this layout, which saves a transpose before each one.
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        sd.use_graphs()
    return sd


class StableDiffusion:
    """A model (text encoder, UNet, VAE and noise schedule), with methods that generate images."""

    def __init__(self, config: ModelConfig, unet: Any, vae: VAE, text: TextEncoder):
        self.config = config
        self.unet = unet  # a UNet, or a `Controlled` while a ControlNet is in use
        self.vae = vae
        self.text = text
        self.schedule = Schedule(config.schedule)
        self.guidance_rescale = 0.0  # the `part` of `guidance.rescaled`, for every guided prediction
        self.name = config.name
        self.model_hash: str | None = None  # of a model in a single file
        self.model_revision: str | None = None  # of a model of the hub: the commit
        self.notes: list[str] = []  # for the user, on how the model was loaded
        self.graphs: Graphs | None = None

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        """Returns the dtype in which the VAE runs. It is the dtype of the model, except that SDXL's
        VAE runs in float32 in a float16 model."""
        return self.vae.decoder.conv_in.weight.dtype

    def set_attention(self, backend: str, *others: torch.nn.Module) -> None:
        """Sets which function computes attention in the UNet and in further networks `others`, such
        as a ControlNet. `backend` is one of the names that `minsd.kernels.attention` accepts.
        Raises ValueError for any other name."""
        if backend not in BACKENDS:
            raise ValueError(f"no attention backend is called {backend!r}; choose from {', '.join(BACKENDS)}")
        for module in (module for network in (self.unet, *others) for module in network.modules()):
            if isinstance(module, Attention):
                module.backend = backend
        for graphs in filter(None, map(graphs_of, (self.unet, *others))):
            graphs.release()

    def use_graphs(self, on: bool = True, gradients: bool = True) -> None:
        """Makes the UNet, and the ControlNets in use, run by CUDA graphs (minsd/graphs.py), or, if
        `on` is False, makes them run without graphs again. `load` turns graphs on for CUDA devices.

        If `gradients` is True, there are also graphs for attention maps and their gradients. At
        batch 1 these should save the largest part of the time (expected, not measured on a GPU).
        """
        unet = self.unet
        if isinstance(unet, Controlled):
            for control in unet.controls:
                use_graphs(control.net, on, gradients)
            unet = unet.unet
        self.graphs = use_graphs(unet, on, gradients)

    def compile(self, **options) -> None:
        """Compiles the UNet with torch.compile. `options` are keyword arguments of torch.compile.
        For each image size, the first step then takes minutes, and later steps are faster.

        If CUDA graphs are on, they stay on and capture the compiled UNet. But if the option `mode`
        is given, they are turned off, because some modes use graphs of their own.
        """
        graphs = self.graphs is not None and "mode" not in options
        self.use_graphs(False)
        run = torch.compile(self.unet.forward, **options)

        def forward(x: Tensor, t: int | float | Tensor, *args: Any, **more: Any) -> Tensor | None:
            # torch.compile would treat a timestep that is a number as a constant, and compile the
            # UNet again at every step.
            t = t if torch.is_tensor(t) else torch.full((len(x),), float(t), device=x.device)
            return run(x, t, *args, **more)

        self.unet.forward = forward
        # A recorder may cause a recompilation, which must not happen during a graph's capture.
        self.use_graphs(graphs, gradients=False)

    def __call__(
        self,
        prompt: str | Sequence[str],
        seeds: Sequence[int] | int | None = None,
        *,
        noise: Tensor | None = None,
        negative_prompt: str = "",
        steps: int | None = None,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        init_image: Image.Image | None = None,
        strength: float = STRENGTH,
        karras: bool = False,
        refine: Callable | None = None,
        objective: Callable | str | None = None,
        driver: str | None = None,
        settings: Mapping[str, Any] | None = None,
        subjects: str | Sequence[str | int] | None = None,
        pairs: str | None = None,
    ) -> list[Image.Image]:
        """Generates images and returns them: one per seed, or, if `noise` (B,4,height/8,width/8) is
        given, one per row of this unit noise. Without both, generates one image from seed 0.

        `prompt` is one string for all images, or a list with one string per image. `height` and
        `width` are in pixels, multiples of 8. For these two and for `steps`, `sampler` and
        `guidance_scale`, None means the model's default. If `init_image` is given, it is cropped
        and scaled to the size, and the images are made from it (image-to-image); `strength` (0 to
        1) is the fraction of the steps that run. `karras` turns Karras noise levels on, for the
        sampler dpmpp_2m. refine(i, t, x), if given, is called before the prediction of step i at
        timestep t, and returns the latents that replace x. `guidance_rescale` (0 to 1) keeps
        guidance from overexposing images (`guidance.rescaled`).

        If `objective` is given, the images are made so that it rates them better. It is a function
        that rates latents by what one UNet evaluation shows (a `Look`, noise/look.py), or a name in
        noise/objectives/, or FILE.py:NAME. `driver` states how the rating is used: "select" chooses
        the best noise of several seeds, "optimize" changes the noise, and "refine" changes the
        latents while sampling. `settings` are settings of the objective and the driver, as a dict
        or as text such as "lr=5,steps=50". `subjects` are the words of the prompt that the
        objective is about, or their token positions. `pairs` states which attributes belong to
        which nouns.

        Raises ValueError if sizes, shapes or numbers of items do not fit, or if the objective or
        one of its settings does not exist.
        """
        sd = self.with_rescale(guidance_rescale)
        taken = noise is not None or refine is not None
        begin = asked(objective, driver, settings, subjects, pairs, taken)
        height = self.config.size if height is None else height
        width = self.config.size if width is None else width
        check_size(height, width)
        prompts, seeds, noise = _per_image(prompt, seeds, noise, (4, height // 8, width // 8))
        init = None if init_image is None else self.encode(image.fit(init_image, width, height))
        pictures = []
        for part in torch.arange(len(noise)).split(self.batch_size(height, width)):
            these = [prompts[k] for k in part]
            own = [seeds[k] for k in part]
            start = noise[part]
            if begin is not None:
                run = (steps, sampler, karras, negative_prompt, guidance_scale)
                start, refine = begin(sd, these, own, start, *run)
            latents = sd.sample(
                these,
                start,
                seeds=own,
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

    def with_rescale(self, guidance_rescale: float | None) -> "StableDiffusion":
        """Returns this model, with the same networks and another guidance rescale (None: the same).
        Raises ValueError unless it is from 0 to 1."""
        if guidance_rescale is None:
            return self
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be from 0 to 1, not {guidance_rescale}")
        sd = copy.copy(self)
        sd.guidance_rescale = guidance_rescale
        return sd

    def sample(
        self,
        prompts: Sequence[str] | str,
        noise: Tensor,
        *,
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        **how: Any,
    ) -> Tensor:
        """Denoises unit noise (B,4,h,w) with classifier-free guidance, as one batch. Returns
        latents (B,4,h,w). `prompts` is one string for all images, or a list with one string per
        image. If `guidance_scale` is None, it is the model's own. `guidance_rescale` is as in a
        call of the model. `how` are further arguments of `denoise`, such as `steps` and `seeds`."""
        sd = self.with_rescale(guidance_rescale)
        return self.denoise(sd.guided(prompts, negative_prompt, guidance_scale), noise, **how)

    def guided(
        self, prompts: Sequence[str] | str, negative_prompt: str = "", guidance_scale: float | None = None
    ) -> guidance.Predictor:
        """Makes a predictor with classifier-free guidance towards `prompts` and away from
        `negative_prompt`. The predictor is a function predict(x, t) that returns the noise in
        latents x at timestep t. `prompts` is one string for all images, or a list with one string
        per image. If `guidance_scale` is None, it is the model's own. Raises ValueError if it is
        not finite."""
        guidance_scale = self.config.guidance(guidance_scale)
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a number, not {guidance_scale}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        same = len(set(prompts)) == 1  # a shared prompt is encoded once
        cond = self.encode_prompt(prompts[:1] if same else prompts)
        return self.predictor(cond, self.encode_prompt([negative_prompt]), guidance_scale)

    @torch.no_grad()
    def denoise(
        self,
        predict: guidance.Predictor,
        noise: Tensor,
        *,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        karras: bool = False,
        init: Tensor | None = None,
        strength: float = STRENGTH,
        refine: Callable | None = None,
        progress: Callable[[int, int | float], object] | None = None,
    ) -> Tensor:
        """Denoises unit noise (B,4,h,w) with a sampler. Returns latents (B,4,h,w). predict(x, t)
        returns the noise in latents x at timestep t. If `steps` or `sampler` is None, it is the
        model's default. `karras` turns Karras noise levels on, for the sampler dpmpp_2m.

        `seeds`, one per image, are for samplers that draw more noise while sampling. refine(i, t,
        x), if given, is called before the prediction of step i at timestep t, and returns the
        latents that replace x. progress(i, t), if given, is called after each step.

        `init`, latents of an image, (B,4,h,w) or (1,4,h,w), makes the run image-to-image: noise is
        added to `init`, and only the last steps run. `strength` (0 to 1) is the fraction of the
        steps that run. At 0 the result is `init`; at 1 nothing of `init` is left.

        Raises ValueError for an unknown sampler, for `karras` with another sampler, and for a
        strength that `first_step` refuses.
        """
        sampler = sampler or self.config.sampler
        samplers.check(sampler, karras)
        steps = self.config.steps if steps is None else steps
        options: dict[str, Any] = {"karras": True} if karras else {}
        if init is not None and (first := first_step(steps, strength)):
            init = init.to(self.device, self.dtype).expand(len(noise), -1, -1, -1)
            if first == steps:
                return init
            options |= {"init": init, "start": first}
        start = noise.to(self.device, self.dtype)
        generator = generators(range(len(noise)) if seeds is None else seeds, skip=noise.shape[1:])
        sample = samplers.SAMPLERS[sampler]
        x = start
        walk = sample(predict, start, self.schedule, steps, generator=generator, refine=refine, **options)
        for i, t, x in walk:  # noqa: B007
            if progress is not None:
                progress(i, t)
        return x

    def predictor(self, context: Tensor, uncond: Tensor, guidance_scale: float) -> guidance.Predictor:
        """Makes a predictor with classifier-free guidance towards the text states `context` and
        away from the text states `uncond`. The predictor is a function predict(x, t) that returns
        the noise in latents x at timestep t.

        `context` and `uncond` are (B,77n,D) or, for all images of the batch, (1,77n,D). If one of
        them has fewer chunks of 77 text states than the other, empty chunks are appended to it.
        """
        guided = guidance_scale != 1 and not self.config.unet.guidance_dim
        if guided and context.shape[1] != uncond.shape[1]:
            context, uncond = (
                self.text.filled(one, other.shape[1]) for one, other in ((context, uncond), (uncond, context))
            )
        return guidance.classifier_free(
            self.unet, context, uncond, guidance_scale, self.schedule, self.guidance_rescale
        )

    def encode_prompt(self, prompts: Sequence[str] | str, size: tuple[int, int] | None = None) -> Tensor:
        """Encodes prompts into text states (B,77n,D), in the model's dtype. A prompt is encoded in
        chunks, parts that CLIP reads at once, and n is the number of chunks of the longest prompt:
        1 for up to 75 tokens. Shorter prompts get empty chunks.

        For SDXL the result is (B,77n+1,D). Its last row describes the whole text and the size of
        the image (`text.TwoTextEncoders`). Give `size`, (height, width) in pixels, if the latents
        will be only a part of the image: the size is that of the whole image. Other models ignore
        it.
        """
        part = {} if size is None else {"size": size}  # other encoders may take prompts alone
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.text.encode(prompts, **part).to(self.dtype)

    @torch.no_grad()
    def encode(self, pictures: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Encodes images of the same size into latents (B,4,h,w): the mean of the VAE's posterior,
        times the VAE's scaling factor. Raises ValueError if the images differ in size, or if a side
        is not a multiple of 8 pixels."""
        x = image.to_tensor([pictures] if isinstance(pictures, Image.Image) else list(pictures))
        if x.shape[-2] % 8 or x.shape[-1] % 8:
            size = f"{x.shape[-1]}x{x.shape[-2]}"
            raise ValueError(f"an image to encode must have sides that are multiples of 8, not {size}")
        x = x.to(self.device, self.vae_dtype)
        at_once = self._vae_batch(*x.shape[-2:])
        parts = []
        for part in x.split(at_once or 1):
            mean = self.vae.encode(part)[0] if at_once else encode_in_bands(self.vae, part)
            parts.append(mean)  # (b, 4, h, w)
        return torch.cat(parts).to(self.dtype) * self.config.vae.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decodes latents (B,4,h,w) into B images. Raises FloatingPointError if the latents or the
        decoded images are not finite, because the images would be black."""
        if not latents.isfinite().all():
            raise FloatingPointError(
                f"the latents are not finite: sampling in {latents.dtype} overflowed; "
                f"{overflow_advice(latents.dtype)}"
            )
        z = latents.to(self.vae_dtype) / self.config.vae.scaling_factor
        at_once = self._vae_batch(8 * z.shape[-2], 8 * z.shape[-1])
        pixels = []
        for part in z.split(at_once or 1):
            # (b, 3, 8h, 8w)
            x = self.vae.decode(part) if at_once else decode_in_bands(self.vae, part)
            if not x.isfinite().all() and self.vae_dtype != torch.float32:  # float16's maximum is 65504
                warnings.warn(
                    f"VAE decoding overflowed in {self.vae_dtype}; decoded again in float32", stacklevel=2
                )
                vae = copy.deepcopy(self.vae).float()
                # float32 needs twice the memory, so it decodes in bands.
                x = torch.cat([decode_in_bands(vae, one) for one in part.float().split(1)])
            if not x.isfinite().all():
                raise FloatingPointError(
                    "the decoded image is not finite even in float32: "
                    f"{_decoding_advice(float(part.abs().max()))}"
                )
            pixels.append(x)
        return image.from_tensor(torch.cat(pixels))

    def _vae_batch(self, height: int, width: int) -> int:
        """Returns how many images of `height` x `width` pixels the VAE can process at once. If
        memory does not suffice for one image, warns and returns 0. The image must then be processed
        in bands (strips of rows, one after another)."""
        need = memory_needed(self.config.vae, height, width, self.vae_dtype)
        free = 0.9 * free_memory(self.device)
        # `free_memory` counts the memory in the graphs' pool as free, but only graphs can use it.
        if self.graphs is not None and need > free - self.graphs.held:
            self.graphs.release()
        if need > free:
            warnings.warn(
                f"the VAE works in bands of rows: {width}x{height} at once would take {need / 2**30:.1f} GB, "
                f"{free / 2**30:.1f} GB are free",
                stacklevel=3,
            )
            return 0
        return int(min(self.batch_size(height, width), free // need))

    def batch_size(self, height: int, width: int) -> int:
        """Returns how many images of `height` x `width` pixels the networks process at once: at
        least 1 and at most BATCH_MOST.

        On a CPU, a batch has at most as many latent cells as one image of 512x512 pixels, because
        larger batches are no faster. On a GPU, it has at most 16 times as many cells, and no more
        than the free memory allows. For this, a guided step in 16 bits is taken to need 200 kB per
        latent cell, for both halves of guidance together (expected, not measured on a GPU).
        """
        cells = (height // 8) * (width // 8)
        limit = 64 * 64
        if self.device.type == "cuda":
            limit = min(16 * limit, 0.8 * free_memory(self.device) / (2 * 50e3 * self.dtype.itemsize))
        return max(1, min(BATCH_MOST, int(limit // cells)))


def _per_image(
    prompt: str | Sequence[str],
    seeds: Sequence[int] | int | None,
    noise: Tensor | None,
    shape: tuple[int, int, int],
) -> tuple[list[str], list[int], Tensor]:
    """Checks the arguments of a call, and repeats what is given once for all images. Returns
    (prompts, seeds, noise) with one item per image. If `noise` is None, it is made from the seeds.
    `shape` is the shape (4,h,w) of the noise of one image. Raises ValueError if numbers of items or
    shapes do not fit."""
    if noise is not None and (noise.ndim != 4 or tuple(noise.shape[1:]) != shape):
        wanted = f"(images, {', '.join(map(str, shape))})"
        raise ValueError(f"noise of shape {wanted} is needed for this size, not {tuple(noise.shape)}")
    if seeds is None:
        seeds = range(1 if noise is None else len(noise))
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    if not seeds:
        raise ValueError("no seeds were given: give one per image")
    noise = unit_noise(seeds, shape) if noise is None else noise
    prompts = [prompt] * len(noise) if isinstance(prompt, str) else list(prompt)
    if not len(prompts) == len(noise) == len(seeds):
        raise ValueError(
            f"give one prompt, seed and noise per image, not {len(prompts)} prompts, {len(seeds)} seeds "
            f"and {len(noise)} noises"
        )
    return prompts, seeds, noise


def _decoding_advice(largest: float) -> str:
    """Returns the end of an error message about finite latents that decode to pixels which are not
    finite: a phrase that tells the user what to do. `largest` is the largest absolute value of the
    latents."""
    if largest < 1000:  # latents of images are below about 30
        return "the VAE's file is damaged; --vae takes another"
    return f"its latents reach {largest:.3g}; {overflow_advice(torch.float32)}"


def first_step(steps: int, strength: float) -> int:
    """Returns the number of steps that an image-to-image run skips at its noisy end. Of `steps`
    steps, the fraction `strength` runs, rounded down to a whole number of steps. Raises ValueError
    if `strength` is outside 0 to 1, or if it is above 0 and yet all steps would be skipped."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, not {strength}")
    run = math.floor(steps * strength + 1e-9)
    if run < 1 and strength:
        raise ValueError(
            f"strength {strength} leaves none of {steps} steps: the smallest that runs one is {1 / steps:.3g}"
        )
    return steps - run


def free_memory(device: torch.device) -> float:
    """Returns the number of free bytes of memory on a device. Memory that PyTorch has reserved but
    does not use counts as free. Returns infinity if the number is unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    info = Path("/proc/meminfo")
    if device.type == "cpu" and info.exists():
        available = re.search(r"MemAvailable:\s+(\d+)", info.read_text())
        if available is not None:
            return 1024 * int(available[1])
    return math.inf
