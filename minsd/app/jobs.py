"""Jobs: one image each, every setting resolved to its last default.

`plan` makes the jobs of all requests. `Job.settings()` is the only maker of the keys in an image's
metadata and in runs.jsonl; `Job.identity()` tells whether an image is done already.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minsd import __version__
from minsd.app.options import IDENTITY
from minsd.app.prompts import located
from minsd.app.requests import Command, ControlRequest, InitImage, NoiseMethod, Request
from minsd.noise import arrange, collage, losses
from minsd.noise.initial import noise_files, read_metadata, read_noise
from minsd.noise.layout import SizedLayout
from minsd.noise.methods import candidate_seeds
from minsd.pipeline import StableDiffusion, first_step
from minsd.samplers import timesteps


@dataclass(frozen=True)
class ModelSettings:
    """Model and hardware, the same for all jobs of a run."""

    model: str
    model_hash: str | None
    vae: Path | None
    tokenizer: Path | None
    prediction_type: str | None
    lora: tuple[str, ...]
    attention: str
    device: str
    dtype: str

    def settings(self) -> dict[str, Any]:
        import transformers

        return {
            "model": self.model,
            "model_hash": self.model_hash,
            "vae": self.vae and str(self.vae),
            "tokenizer": self.tokenizer and str(self.tokenizer),
            "prediction_type": self.prediction_type,
            "lora": list(self.lora),
            "attention": self.attention,
            "device": self.device,
            "dtype": self.dtype,
            "versions": {
                "minsd": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


@dataclass(frozen=True)
class Sampling:
    sampler: str
    karras: bool
    steps: int
    guidance_scale: float
    height: int  # pixels
    width: int


@dataclass(frozen=True)
class Job:
    """One image."""

    prompt: str
    negative_prompt: str
    seed: int
    model: ModelSettings
    sampling: Sampling
    method: NoiseMethod
    subjects: tuple[str | int, ...] | None = None  # None: no method or map asks for any
    excite: str | None = None  # a variant of noise.excite.updates
    layout: SizedLayout | None = None
    crop_margin: float | None = None
    control: ControlRequest | None = None
    init: InitImage | None = None
    invert: Path | None = None
    noise_file: Path | None = None
    noise_index: int = 0  # of this image's noise in the file

    def candidates(self) -> list[int]:
        """The seeds that a selection chooses among, the asked one first."""
        if self.method.candidate_seeds is not None:
            return list(self.method.candidate_seeds)
        return candidate_seeds(self.seed, self.method.candidates or 1)

    @property
    def start(self) -> int:
        """Steps left out at the noisy end."""
        return first_step(self.sampling.steps, 1.0 if self.init is None else self.init.strength)

    def batch_key(self) -> "Job":
        """Equal for jobs that one batch can hold."""
        return replace(self, prompt="", seed=0, subjects=None, noise_index=0)

    def settings(self) -> dict[str, Any]:
        """The image's metadata, and its row in runs.jsonl."""
        out: dict[str, Any] = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        out |= self.model.settings()
        out |= vars(self.sampling)
        out["init_noise"] = self.method.name
        if self.subjects is not None:
            out |= {"subjects": list(self.subjects), "excite": self.excite}
        for name in ("candidates", "score", "optimize_steps", "optimize_mode"):
            if getattr(self.method, name) is not None:
                out[name] = getattr(self.method, name)
        if self.layout is not None:
            out["layout"] = self.layout.to_json()
        if self.control is not None:
            image = self.control.image
            out |= {"controlnet": str(self.control.net), "control_image": image and str(image)}
            out["control_scale"] = self.control.scale
        if self.invert is not None:
            out["invert"] = str(self.invert)
        if self.init is not None:
            out |= {"init_image": str(self.init.path), "strength": self.init.strength}
        if self.crop_margin is not None:
            out["crop_margin"] = self.crop_margin
        if self.noise_file is not None:
            out |= {"noise_file": str(self.noise_file), "noise_index": self.noise_index}
        out["seed"] = self.seed
        return out

    def identity(self) -> str:
        return identity(self.settings())


def identity(settings: Mapping[str, Any]) -> str:
    """Key under which an image counts as done, of a job or of a finished image's row.

    A selection is keyed by the seed asked for and the number of candidates, not by the seed it
    chose.
    """
    candidates = settings.get("candidates") or 0
    seed = settings.get("asked_seed", settings.get("seed"))
    if isinstance(candidates, list):  # of a finished image: each seed with its score, the asked one first
        seed = candidates[0]["seed"]
        candidates = len(candidates)
    return json.dumps([candidates, seed, *(settings.get(key) for key in IDENTITY if key != "seed")])


# --- from requests to jobs --------------------------------------------------------------------------------


def plan(sd: StableDiffusion, command: Command, requests: Sequence[Request]) -> tuple[list[Job], list[str]]:
    """One job per image, in the order of the prompts and their seeds, and notes for the user.

    ValueError, with the request's place, for what the model does not accept.
    """
    model = ModelSettings(
        command.model,
        sd.model_hash,
        command.vae,
        command.tokenizer,
        command.prediction_type,
        command.lora,
        command.attention,
        sd.device.type,
        str(sd.dtype).removeprefix("torch."),
    )
    jobs: list[Job] = []
    notes: list[str] = []
    for request in requests:
        with located(request.where):
            jobs += jobs_of(sd, request, model, notes)
    unique = list({job.identity(): job for job in jobs}.values())
    if len(unique) < len(jobs):
        notes.append(f"{len(jobs) - len(unique)} images were asked for more than once: each is made once")
    return unique, notes


def jobs_of(sd: StableDiffusion, request: Request, model: ModelSettings, notes: list[str]) -> list[Job]:
    """The jobs of one request, one per seed. What its author may not expect is added to `notes`."""
    sampling = _sampling(sd, request)
    if sd.config.guidance_scale == 1 != sampling.guidance_scale:
        notes.append(
            f"{request.where}{sd.name} was distilled to draw without guidance: --guidance-scale"
            f" {sampling.guidance_scale:g} takes twice as long and may spoil the image"
        )
    subjects = _subjects(sd, request, notes) if request.wants_subjects else None
    layout = None
    if request.layout is not None:
        layout = request.layout.sized(sampling.width, sampling.height)
        if request.method.name == "select" and request.method.score == "attention":
            arrange.caption_subjects(sd, layout)  # reports a caption without subjects
        notes += [f"{request.where}{note}" for note in layout.notes]
    job = Job(
        request.prompt,
        request.negative_prompt,
        request.seeds[0],
        model,
        sampling,
        request.method,
        subjects=None if subjects is None else tuple(subjects),
        excite=_excite(request) if request.wants_subjects else None,
        layout=layout,
        crop_margin=request.crop_margin,
        control=request.control,
        init=request.init,
        invert=request.invert,
        noise_file=request.noise,
    )
    visited = timesteps(
        sampling.sampler, sd.schedule, sampling.steps, start=job.start, karras=sampling.karras
    )
    if request.crop_margin is not None and layout is not None:
        if not layout.regions or all(t < collage.CROP_UNTIL for t in visited):
            notes.append(
                f"{request.where}crop_margin changes nothing here: it is for a layout's regions, "
                f"and for timesteps from {collage.CROP_UNTIL}"
            )
    if request.noise is None:
        return [replace(job, seed=seed) for seed in request.seeds]
    shape = (4, sampling.height // 8, sampling.width // 8)
    count = len(read_noise(request.noise, shape))
    notes += [f"{request.where}{note}" for note in _noise_notes(request.noise)]
    first = request.seeds[0]
    seeds = list(range(first, first + count)) if len(request.seeds) == 1 else request.seeds
    if count != len(seeds):
        raise ValueError(
            f"{request.noise} holds {count} noises and {len(seeds)} seeds were given: give one per image"
        )
    return [replace(job, seed=seed, noise_index=k) for k, seed in enumerate(seeds)]


def _noise_notes(path: Path) -> list[str]:
    """What the user should know of noise files whose noise alone does not make their image."""
    updated = []
    for file in noise_files(path):
        updates = read_metadata(file).get("updates", "none")
        if updates != "none":
            updated.append(f"{file.name} ({updates})")
    if not updated:
        return []
    names = ", ".join(updated[:3]) + " ..." * (len(updated) > 3)
    return [
        f"updates while denoising also shaped the images of {names}: "
        "the noise alone does not draw them again (--like does)"
    ]


def _sampling(sd: StableDiffusion, request: Request) -> Sampling:
    guidance_scale = request.guidance_scale
    if guidance_scale is None:
        guidance_scale = (
            sd.config.guidance_scale if request.invert is None else 1.0
        )  # guided inversion is inexact
    return Sampling(
        request.sampler or sd.config.sampler,
        request.karras,
        sd.config.steps if request.steps is None else request.steps,
        guidance_scale,
        request.height or sd.config.size,
        request.width or sd.config.size,
    )


def _subjects(sd: StableDiffusion, request: Request, notes: list[str]) -> list[str | int]:
    """The subjects of a request, found in its prompt where it names none. ValueError for one that
    the prompt lacks.
    """
    subjects: list[str | int] = []
    if request.subjects is None:
        subjects += losses.readable_subjects(sd.text, request.prompt)
    else:
        subjects += request.subjects
    losses.resolve(sd.text, request.prompt, subjects)
    if request.subjects is None:
        notes.append(f"subjects: {', '.join(map(str, subjects))}")
    return subjects


def _excite(request: Request) -> str | None:
    """Which latent updates to use: InitNO's with --init-noise initno, otherwise
    Attend-and-Excite's.
    """
    if request.method.name == "initno":
        return None if request.excite is False else "official"
    return "attend-and-excite" if request.excite else None
