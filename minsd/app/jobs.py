"""Jobs: each describes one image, with all defaults filled in.

`plan` makes the jobs of all requests (the checked settings of a prompt). It returns them as `Jobs`,
which stores one job per prompt and range of seeds, so that millions of images take little memory.
Only `Job.settings()` creates the keys in an image's metadata and in runs.jsonl. `Job.identity()`
identifies an image, to find out whether it is done already.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from minsd import __version__
from minsd.app.options import IDENTITY
from minsd.app.prompts import located
from minsd.app.requests import Command, ControlRequest, InitImage, NoiseMethod, Request, check_count
from minsd.app.seeds import Seeds, Taken, consecutive
from minsd.emphasis import is_weighted
from minsd.noise import arrange, best, collage, look, losses
from minsd.noise.initial import candidate_seeds, noise_files, read_metadata, read_noise
from minsd.noise.layout import SizedLayout
from minsd.noise.objectives import NAMES
from minsd.noise.pairs import named_groups
from minsd.noise.steer import Run, Steer
from minsd.pipeline import StableDiffusion, first_step
from minsd.samplers import timesteps

FEW_STEPS = 8  # a model whose default is no more steps was distilled to draw in few


@dataclass(frozen=True)
class ModelSettings:
    """The settings of the model and the hardware, which are the same for all images of a run."""

    model: str
    model_hash: str | None
    model_revision: str | None
    vae: Path | None
    tokenizer: Path | None
    prediction_type: str | None
    prompt_weights: bool | None
    clip_skip: int | None
    embedding: tuple[str, ...]
    lora: tuple[str, ...]
    attention: str
    device: str
    dtype: str

    def settings(self) -> dict[str, Any]:
        import transformers

        return {
            "model": self.model,
            "model_hash": self.model_hash,
            "model_revision": self.model_revision,
            "vae": self.vae and str(self.vae),
            "tokenizer": self.tokenizer and str(self.tokenizer),
            "prediction_type": self.prediction_type,
            "prompt_weights": self.prompt_weights,
            "clip_skip": self.clip_skip,
            "embedding": list(self.embedding) or None,
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
    guidance_rescale: float | None = None  # None: 0


@dataclass(frozen=True, slots=True)
class Job:
    """All settings of one image, with defaults filled in."""

    prompt: str
    negative_prompt: str
    seed: int
    model: ModelSettings
    sampling: Sampling
    method: NoiseMethod
    subjects: tuple[str | int, ...] | None = None  # None if neither method nor --attention-maps needs any
    excite: str | None = None  # a variant of noise.excite.updates
    steer: Steer | None = None
    pairs: str | None = None
    layout: SizedLayout | None = None
    crop_margin: float | None = None
    control: ControlRequest | None = None
    init: InitImage | None = None
    invert: Path | None = None
    noise_file: Path | None = None
    noise_index: int = 0  # of this image's noise in the file
    # The number of chunks that CLIP reads the prompt in. It is equal for all jobs of a batch, since
    # shorter prompts would be padded.
    chunks: int = 1
    # The beginning of an error message about this job: "prompts.jsonl, line 2: ".
    where: str = field(default="", compare=False)

    def candidates(self) -> list[int]:
        """Returns the seeds of the candidate noises among which the noise method (--init-noise)
        chooses. The first is the seed that the user gave."""
        if self.method.candidate_seeds is not None:
            return list(self.method.candidate_seeds)
        return candidate_seeds(self.seed, self.method.candidates or 1)

    @property
    def start(self) -> int:
        """Returns how many sampling steps are skipped at the beginning because the generation
        begins from an image (--init-image). Returns 0 without such an image."""
        return first_step(self.sampling.steps, 1.0 if self.init is None else self.init.strength)

    def batch_key(self) -> "Job":
        """Returns a copy of the job with empty prompt, seed, subjects and noise index. Jobs whose
        copies are equal can be drawn in one batch."""
        return replace(self, prompt="", seed=0, subjects=None, noise_index=0)

    def settings(self) -> dict[str, Any]:
        """Returns the dict of settings that is written into the image's metadata, and into its row
        of runs.jsonl."""
        out: dict[str, Any] = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        out |= self.model.settings()
        out |= vars(self.sampling)
        out["init_noise"] = self.method.name
        if self.subjects is not None:
            out |= {"subjects": list(self.subjects), "excite": self.excite}
        if self.steer is not None:
            out["objective"] = self.steer.record()
        if self.pairs is not None:
            out["pairs"] = self.pairs
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
    """Returns a text that identifies an image. A run with --resume skips an image if the folder has
    an image with the same text. `settings` come from an image's metadata, from its row of
    runs.jsonl, or from `Job.settings`.

    If the noise was selected among candidates, the text contains the seed that the user gave and
    the number of candidates, not the seed that was chosen.
    """
    candidates = settings.get("candidates") or 0
    seed = settings.get("asked_seed", settings.get("seed"))
    # A finished image has a list: each candidate's seed and score, the user's own seed first.
    if isinstance(candidates, list):
        seed = candidates[0]["seed"]
        candidates = len(candidates)
    objective = settings.get("objective")
    if objective is not None:  # that of a finished image also holds values measured in its run
        asked = {key: objective.get(key) for key in ("name", "driver", "settings", "sha256")}
        settings = {**settings, "objective": asked}
    rest = [settings.get(key) for key in IDENTITY if key != "seed"]
    return _identity(seed, json.dumps([candidates, *rest]))


def _identity(seed: object, rest: str) -> str:
    return f"{seed} {rest}"


def key(identity: str) -> bytes:
    """Returns a hash, 16 bytes, of the text that identifies an image (`identity`). A set of
    millions of such hashes fits into memory."""
    return hashlib.blake2b(identity.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Piece:
    """A sequence of jobs (one per image) that differ only in the seed and, if they begin from a
    noise file, in the index of the noise in that file. Only the first job, `template`, is stored.
    """

    template: Job
    seeds: range
    noise_index: int  # of the first job

    def __len__(self) -> int:
        return len(self.seeds)

    def job(self, k: int) -> Job:
        """Returns the job with the number `k` in this sequence, counting from 0."""
        index = self.noise_index + k if self.template.noise_file is not None else 0
        return replace(self.template, seed=self.seeds[k], noise_index=index)

    def keys(self, wanted: Iterable[int]) -> Iterator[bytes]:
        """Yields, for each number in `wanted`, the key of the job with that number: a hash of the
        text that identifies the job's image."""
        if self.template.noise_file is not None:
            yield from (key(self.job(k).identity()) for k in wanted)
            return
        _, _, rest = self.template.identity().partition(" ")  # `rest` does not depend on the seed
        yield from (key(_identity(self.seeds[k], rest)) for k in wanted)


class Jobs:
    """The sequence of all jobs of a run, one per image. It is stored as pieces (sequences of jobs
    that differ only in the seed). A job is created only when it is indexed or iterated over."""

    def __init__(self, pieces: Iterable[Piece]):
        self.pieces = list(pieces)
        self.ends = list(accumulate(map(len, self.pieces)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Job:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self.ends, index)
        piece = self.pieces[number]
        return piece.job(index - self.ends[number] + len(piece))

    def __iter__(self) -> Iterator[Job]:
        return (piece.job(k) for piece in self.pieces for k in range(len(piece)))

    def share(self, first: int, step: int) -> Iterator[tuple[Piece, range]]:
        """Yields every `step`-th job from number `first` on, which is one process's part of the
        run. The jobs are yielded as pairs (piece, numbers): a piece (a sequence of jobs that differ
        only in the seed), and the numbers of the selected jobs within this piece."""
        for piece, end in zip(self.pieces, self.ends):
            begin = end - len(piece)
            skip = (first - begin) % step if begin > first else first - begin
            if skip < len(piece):
                yield piece, range(skip, len(piece), step)


# --- from requests to jobs --------------------------------------------------------------------------------


def plan(
    sd: StableDiffusion, command: Command, requests: Sequence[Request], device: str | None = None
) -> tuple[Jobs, list[str]]:
    """Makes the jobs of a run. Returns (jobs, notes). `jobs` has one job per image, in the order of
    the prompts and their seeds, without repeated images. `notes` are messages for the user.

    `command` holds the settings of the run, and `requests` those of each prompt. `device` is the
    type of the device that will draw ("cuda", "cpu"), by default that of `sd`. Raises ValueError
    for settings that the model does not accept. For a prompt from a prompts file, the error message
    begins with the file and line.
    """
    model = ModelSettings(
        command.model,
        sd.model_hash,
        sd.model_revision,
        command.vae,
        command.tokenizer,
        command.prediction_type,
        command.prompt_weights,
        command.clip_skip,
        command.embedding,
        command.lora,
        command.attention,
        device or sd.device.type,
        str(sd.dtype).removeprefix("torch."),
    )
    pieces: list[Piece] = []
    notes: list[str] = []
    asked = 0
    for request in requests:
        with located(request.where):
            template, seeds = _template(sd, request, model, notes)
            index = 0
            for part in seeds.ranges:
                pieces.append(Piece(template, part, index))
                index += len(part)
            asked += seeds.count
            check_count(asked)
    jobs = Jobs(_unique(pieces))
    if len(jobs) < asked:
        notes.append(f"{asked - len(jobs)} images were asked for more than once: each is made once")
    return jobs, notes


def _unique(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yields the pieces (sequences of jobs that differ only in the seed) without repeated jobs:
    every job that is equal to a job of an earlier piece is left out. A piece may be yielded in
    several parts."""
    taken: dict[tuple[bytes, int], Taken] = {}
    last = None
    same = b""
    for piece in pieces:
        if piece.template is not last:
            last = piece.template
            same = key(replace(last, seed=0, noise_index=0).identity())
        # Two jobs of one noise file are equal if they have the same seed and the same noise index.
        offset = piece.noise_index - piece.seeds.start if piece.template.noise_file is not None else 0
        for part in taken.setdefault((same, offset), Taken()).take(piece.seeds):
            yield Piece(piece.template, part, piece.noise_index + part.start - piece.seeds.start)


def _template(
    sd: StableDiffusion, request: Request, model: ModelSettings, notes: list[str]
) -> tuple[Job, Seeds]:
    """Returns (job, seeds): the first job of a request (the settings of one prompt), and the seeds
    of all jobs of the request. The other jobs differ only in the seed and, with a noise file, in
    the index of the noise. Appends messages for the user to `notes`. Raises ValueError for settings
    that the model does not accept."""
    sampling = _sampling(sd, request)
    if sd.config.guidance_scale == 1 != sampling.guidance_scale:
        notes.append(
            f"{request.where}{sd.name} was distilled to draw without guidance: --guidance-scale"
            f" {sampling.guidance_scale:g} takes twice as long and may spoil the image"
        )
    if request.guidance_scale == 0 and sampling.guidance_scale:
        notes.append("guidance scale 0 means no guidance for this model: the prompt alone is used (scale 1)")
    if sampling.guidance_rescale and (sampling.guidance_scale == 1 or sd.config.unet.guidance_dim):
        notes.append(f"{request.where}--guidance-rescale changes nothing here: no second text guides")
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
        request.seeds.first,
        model,
        sampling,
        request.method,
        subjects=None if subjects is None else tuple(subjects),
        excite=_excite(request) if request.wants_subjects else None,
        steer=request.steer,
        pairs=request.pairs,
        layout=layout,
        crop_margin=request.crop_margin,
        control=request.control,
        init=request.init,
        invert=request.invert,
        noise_file=request.noise,
        chunks=sd.text.chunk_count(request.prompt),
        where=request.where,
    )
    if request.steer is not None:
        _check_steer(sd, job, notes)
    notes += _method_notes(sd, job)
    notes += _text_notes(sd, request)
    visited = timesteps(
        sampling.sampler, sd.schedule, sampling.steps, start=job.start, karras=sampling.karras
    )
    if request.crop_margin is not None and layout is not None:
        if not layout.regions or all(t < collage.CROP_UNTIL for t in visited):
            notes.append(
                f"{request.where}crop_margin changes nothing here: it is for a layout's regions, "
                f"and for timesteps from {collage.CROP_UNTIL}"
            )
    return job, request.seeds if request.noise is None else _noise_seeds(request, request.noise, job, notes)


def _noise_seeds(request: Request, path: Path, job: Job, notes: list[str]) -> Seeds:
    """Returns one seed for each noise in `path`, a file or folder of noises. If the request (the
    settings of one prompt) has a single seed, the result is consecutive seeds from that one;
    otherwise it is the request's seeds. `job` is the request's first job. Appends messages about
    the noises to `notes`. Raises ValueError if the request has several seeds, but not as many as
    there are noises."""
    shape = (4, job.sampling.height // 8, job.sampling.width // 8)
    count = len(read_noise(path, shape))
    notes += [f"{request.where}{note}" for note in _noise_notes(path)]
    seeds = consecutive(request.seeds.first, count) if request.seeds.count == 1 else request.seeds
    if count != seeds.count:
        raise ValueError(
            f"{path} holds {count} noises and {seeds.count} seeds were given: give one per image"
        )
    return seeds


def _method_notes(sd: StableDiffusion, job: Job) -> list[str]:
    """Returns messages for the user about limits of the job's methods: of methods that read
    attention maps with a model of few steps, and of the noise method "best" with another model than
    the embedded one or with fewer than two subjects. Raises ValueError for the method "best" in a
    run of one step."""
    notes = []
    few = sd.config.steps <= FEW_STEPS or job.sampling.sampler == "lcm"
    if few and _attends(job):
        notes.append(
            f"{job.where}methods that read attention maps were made for models of many steps: the maps "
            "of a model of few steps may tell them little"
        )
    if job.method.name != "best":
        return notes
    best.check_steps(job.sampling.steps)
    if sd.config.name != "shapes":
        notes.append("best: its constants were measured on the embedded model alone")
    if len(job.subjects or ()) < 2:
        notes.append("best: with a single subject it looks only for noise that attends to that one")
    return notes


def _attends(job: Job) -> bool:
    """Returns whether the job's noise method, latent updates or objective read attention maps. A
    reward, or an objective of the user's own, counts as not reading them."""
    by_name = job.steer is not None and job.steer.name in NAMES and job.steer.name != "nlg"
    return (
        by_name
        or job.method.name in ("initno", "best")
        or job.method.score == "attention"
        or job.excite is not None
    )


def _check_steer(sd: StableDiffusion, job: Job, notes: list[str]) -> None:
    """Raises ValueError if the job's objective (--objective) cannot be applied to its prompt. Some
    objectives bind attributes to nouns. For these, if the user has not given the pairs of nouns and
    attributes with --pairs, appends the pairs found in the prompt to `notes`."""
    assert job.steer is not None
    subjects = None if job.subjects is None else [list(job.subjects)]
    asks = look.ask(sd, [job.prompt], [job.seed], subjects, job.pairs, job.layout)
    run = (job.sampling.steps, job.sampling.sampler, job.sampling.karras)
    Run(sd, job.steer, asks, *run).check()
    if job.pairs is None and job.steer.name in ("syngen", "contrast", "divide"):
        named = [" ".join([*modifiers, noun]) for modifiers, noun in named_groups(job.prompt)]
        notes.append(f"pairs: {'; '.join(named)}")


def _text_notes(sd: StableDiffusion, request: Request) -> list[str]:
    """Returns messages for the user about the texts of a request (prompt, negative prompt,
    captions): that weights such as (word:1.3) are interpreted, and that texts of more than 75
    tokens are encoded in several chunks."""
    texts = [request.prompt, request.negative_prompt]
    for region in () if request.layout is None else request.layout.regions:
        texts += [region.prompt, region.negative_prompt]
    notes = []
    if sd.text.prompt_weights is None and any(map(is_weighted, texts)):
        notes.append(
            f"{request.where}prompt weights and BREAK are read as in AUTOMATIC1111's web UI"
            " (--no-prompt-weights: as plain text)"
        )
    chunks = max(map(sd.text.chunk_count, texts))
    if chunks > 1:
        notes.append(f"{request.where}the text is read in {chunks} chunks of up to 75 tokens")
    return notes


def _noise_notes(path: Path) -> list[str]:
    """Returns messages for the user about `path`, a file or folder of noises. There is one message
    if the images of some of these noises were also changed by latent updates while denoising, so
    that the noise alone does not generate these images again. Otherwise the list is empty."""
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
    guidance_scale = sd.config.guidance(request.guidance_scale)
    if request.guidance_scale is None and request.invert is not None:
        guidance_scale = 1.0  # guided inversion is inexact
    return Sampling(
        request.sampler or sd.config.sampler,
        request.karras,
        sd.config.steps if request.steps is None else request.steps,
        guidance_scale,
        request.height or sd.config.size,
        request.width or sd.config.size,
        request.guidance_rescale,
    )


def _subjects(sd: StableDiffusion, request: Request, notes: list[str]) -> list[str | int]:
    """Returns the subjects of a request: the words, or token indices, that must not be neglected in
    the image. If the request names none, they are found in its prompt and reported in `notes`.
    Raises ValueError for a subject that is not in the prompt."""
    subjects: list[str | int] = []
    if request.subjects is None:
        subjects += losses.automatic_subjects(request.prompt)
    else:
        subjects += request.subjects
    losses.resolve(sd.text, request.prompt, subjects)
    if request.subjects is None:
        notes.append(f"subjects: {', '.join(map(str, subjects))}")
    return subjects


def _excite(request: Request) -> str | None:
    """Returns which latent updates are used while denoising: "official" (InitNO's) with
    --init-noise initno, unless --no-excite is given; "attend-and-excite" with --excite; otherwise
    None. With an objective, also returns None, because the objective has updates of its own."""
    if request.steer is not None:
        return None
    if request.method.name == "initno":
        return None if request.excite is False else "official"
    return "attend-and-excite" if request.excite else None
