"""Draws one batch of jobs: finds the initial noise, makes the noise predictor, samples, decodes.

A job holds all settings of one image. The jobs of a batch (minsd/app/run.py groups them) differ
only in prompt, seed, subjects, and index in a noise file. All other settings are read from the
first job.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from minsd import image
from minsd.app.jobs import Job
from minsd.app.preview import Previews
from minsd.app.progress import Show
from minsd.app.session import Session
from minsd.controlnet import Control, Controlled, read_control_image
from minsd.guidance import Predictor, evaluations
from minsd.noise import arrange, collage, collage_control, excite, look, stability
from minsd.noise.initial import read_noise
from minsd.noise.layout import overlay
from minsd.noise.methods import METHODS, Batch, Found, Say
from minsd.noise.steer import Run
from minsd.pipeline import StableDiffusion
from minsd.samplers import timesteps
from minsd.weights import lora

Extras = dict[str, Image.Image | Tensor]  # further files of an image, by name


# Noise methods that take a while -> what the user sees them do.
SEARCHES = {
    "initno": "optimising the noise",
    "optimize": "optimising the noise",
    "select": "selecting the noise",
    "best": "selecting the noise",
}


@dataclass
class Drawn:
    """A drawn batch: its images, their initial noise, and further settings and files to save for
    each image."""

    images: list[Image.Image]
    noise: Tensor  # (B, 4, h, w)
    notes: list[dict[str, Any]]  # per image: settings found by the noise method, such as the seed chosen
    extras: list[Extras]  # per image


def draw(session: Session, jobs: Sequence[Job], show: Show) -> Drawn:
    """Draws one batch of jobs (one per image). For a job with --invert, instead finds the noise
    from which the model generates the image of --invert, and draws the image from that noise.
    `session` holds the loaded model, and `show` receives the progress."""
    session.sd.guidance_rescale = jobs[0].sampling.guidance_rescale or 0.0
    with controlled(session, jobs[0]):
        return (
            invert(session.sd, jobs[0], show) if jobs[0].invert is not None else sample(session, jobs, show)
        )


def sample(session: Session, jobs: Sequence[Job], show: Show) -> Drawn:
    """Draws a batch of jobs (one per image): finds the initial noise, denoises it, and decodes the
    latents. `session` holds the loaded model, and `show` receives the progress."""
    sd = session.sd
    first = jobs[0]
    sampling = first.sampling
    run: dict[str, Any] = {"steps": sampling.steps, "sampler": sampling.sampler, "karras": sampling.karras}
    prompts = [job.prompt for job in jobs]
    subjects = [list(job.subjects) if job.subjects is not None else None for job in jobs]
    run_of = steering(sd, jobs, subjects)
    search = SEARCHES.get(first.method.name)
    if search is not None and first.noise_file is None:
        show.phase(search)
    found = initial_noise(sd, jobs, show.say, run_of)
    seeds = [note.get("seed", job.seed) for job, note in zip(jobs, found.notes)]
    refine = None
    ended: Callable[[], None] | None = None
    if run_of is not None and run_of.steer.driver == "refine":
        refine, ended = run_of.refine(lambda b, message: show.say(f"seed {seeds[b]}: {message}"))
    elif first.excite is not None:
        refine = excite.updates(sd, prompts, subjects, variant=first.excite, **run)
    frames = None
    if session.command.attention_maps:
        refine, frames = excite.watch(sd, prompts, subjects, before=refine, **run)
    previews = Previews(sd, session.command.preview, show)
    run |= {"seeds": seeds, "refine": refine, "progress": previews.after}
    if first.init is not None:
        picture = image.read(first.init.path)
        run["init"] = sd.encode(image.fit(picture, sampling.width, sampling.height))
        run["strength"] = first.init.strength
    show.phase("sampling", steps_of(sd, first))
    with predictor(session, first, prompts, seeds) as predict:
        latents = sd.denoise(previews.watch(predict), found.noise, **run)
    show.phase("decoding")
    images = sd.decode(latents)
    if run_of is not None and ended is not None:
        ended()
        for note, record in zip(found.notes, run_of.records):
            note["objective"] = record
    if first.layout is not None:
        about_layout(session, first, found, images)
    if frames is not None and frames.steps:
        for b, (picture, extra) in enumerate(zip(images, found.extras)):
            extra["attention"] = excite.sheet(
                picture, frames, b, [str(subject) for subject in subjects[b] or ()]
            )
    if previews.steps:
        for b, extra in enumerate(found.extras):
            extra["preview"] = previews.sheet(b)
    return Drawn(images, found.noise, found.notes, found.extras)


def about_layout(session: Session, job: Job, found: Found, images: Sequence[Image.Image]) -> None:
    """Records, for each region of the job's layout, how much of the attention to the region's
    caption falls into the region. Each image's notes in `found` get an entry
    `attention_in_regions`, a list with one dict per region. `fraction` is the fraction of the
    attention to the caption's subjects that falls into the region, and `area` the fraction of the
    image that the region covers. No entry is added if a caption has no subject.

    With --layout-overlay, also adds each image with the regions' outlines drawn over it to the
    image's extra files in `found`.
    """
    assert job.layout is not None
    if session.command.layout_overlay:
        for picture, extra in zip(images, found.extras):
            extra["layout"] = overlay(picture, job.layout)
    if not job.layout.regions:
        return
    try:
        fractions = arrange.attended(
            session.sd, job.layout, found.noise, steps=job.sampling.steps, sampler=job.sampling.sampler
        )
    except ValueError:
        return
    areas = [float(region.pixels.mean()) for region in job.layout.regions]
    for note, each in zip(found.notes, fractions.T.tolist()):
        note["attention_in_regions"] = [
            {"fraction": round(fraction, 3), "area": round(area, 3)} for fraction, area in zip(each, areas)
        ]


def steering(sd: StableDiffusion, jobs: Sequence[Job], subjects: list[list[str | int] | None]) -> Run | None:
    """Returns a `Run`, the object that applies the jobs' objective (--objective) to the images of
    this batch, or None if the jobs have no objective. `subjects` lists, for each job, the words or
    token indices that the objective is about, or is None for a job that names none."""
    first = jobs[0]
    if first.steer is None:
        return None
    prompts = [job.prompt for job in jobs]
    asks = look.ask(sd, prompts, [job.seed for job in jobs], subjects, first.pairs, first.layout)
    sampling = first.sampling
    run = (sampling.steps, sampling.sampler, sampling.karras)
    return Run(sd, first.steer, asks, *run, first.negative_prompt, sampling.guidance_scale)


def initial_noise(sd: StableDiffusion, jobs: Sequence[Job], say: Say, run: Run | None = None) -> Found:
    """Returns the initial noise of a batch of jobs (one per image), and the settings and files to
    save with each image. The noise is read from the jobs' noise file if they have one; otherwise
    their noise method (--init-noise) finds it. `run` applies the jobs' objective, and is None if
    they have none. `say(message)` is called with messages about the search."""
    first = jobs[0]
    sampling = first.sampling
    if first.noise_file is not None:
        noise = read_noise(first.noise_file, (4, sampling.height // 8, sampling.width // 8))
        return Found(noise[[job.noise_index for job in jobs]], [{} for _ in jobs], [{} for _ in jobs])
    method = first.method
    batch = Batch(
        [job.prompt for job in jobs],
        [job.seed for job in jobs],
        [None if job.subjects is None else list(job.subjects) for job in jobs],
        first.negative_prompt,
        sampling.guidance_scale,
        sampling.steps,
        sampling.sampler,
        sampling.karras,
        sampling.height,
        sampling.width,
        layout=first.layout,
        score=method.score,
        candidates=None if method.candidates is None else [job.candidates() for job in jobs],
        optimize_steps=method.optimize_steps or 0,
        optimize_mode=method.optimize_mode or "full",
        steer=run,
    )
    return METHODS[method.name](sd, batch, say)


def invert(sd: StableDiffusion, job: Job, show: Show) -> Drawn:
    """Finds the noise from which the model generates the image that the job names with --invert.
    Returns this noise and the image generated from it, with two PSNRs (dB) against the original
    image as settings to save: `psnr` is that of the generated image, and `codec_psnr` that of the
    original after VAE encoding and decoding alone."""
    assert job.invert is not None
    show.phase("inverting and drawing again", 2 * job.sampling.steps)
    with evaluations(sd.unet, lambda rows: show.advance()):
        found = stability.invert_picture(
            sd,
            image.read(job.invert),
            job.prompt,
            negative_prompt=job.negative_prompt,
            steps=job.sampling.steps,
            guidance_scale=job.sampling.guidance_scale,
            height=job.sampling.height,
            width=job.sampling.width,
        )
    note = {"psnr": round(found.psnr, 2), "codec_psnr": round(found.codec_psnr, 2)}
    return Drawn([found.picture], found.noise, [note], [{"noise": found.noise}])


@contextmanager
def controlled(session: Session, job: Job) -> Iterator[None]:
    """Context manager. Within the block, every call of the session's UNet uses the job's ControlNet
    and control image. Nothing changes if the job has no ControlNet, or if only regions of the
    layout have control images."""
    sd = session.sd
    if job.control is None or job.control.image is None or session.controlnet is None:
        yield
        return
    plain = sd.unet
    pictures = read_control_image(job.control.image, job.sampling.width, job.sampling.height)
    levels = sd.schedule.config.num_train_timesteps
    control = Control(session.controlnet, pictures, job.control.scale, num_train_timesteps=levels)
    sd.unet = Controlled(plain, [control])
    try:
        yield
    finally:
        sd.unet = plain


@contextmanager
def predictor(session: Session, job: Job, prompts: list[str], seeds: list[int]) -> Iterator[Predictor]:
    """Context manager. Yields the batch's noise predictor, the function predict(x, t) -> eps that a
    sampler calls. `prompts` and `seeds` have one entry per image; all other settings are those of
    `job`.

    With a layout, the predictor follows each region's own caption, with the LoRAs and control image
    of that region. Without a layout, or if the job's objective replaces the layout, the predictor
    follows the prompts alone.
    """
    sd = session.sd
    scale = job.sampling.guidance_scale
    if job.layout is None or (job.steer is not None and job.steer.replaces_layout):
        yield sd.guided(prompts, job.negative_prompt, scale)
        return
    how = {"guidance_scale": scale, "seed": seeds, "crop_margin": job.crop_margin}
    with lora.by_region(job.layout.regions, session.adapters) as adapters:
        if job.control is not None and session.controlnet is not None:
            pictures, scales = collage_control.read(job.layout, job.control.image, job.control.scale)
            yield collage_control.predictor(
                sd, job.layout, session.controlnet, pictures, scales, adapters=adapters, **how
            )
        else:
            yield collage.predictor(sd, job.layout, adapters=adapters, **how)


def steps_of(sd: StableDiffusion, job: Job) -> int:
    """Returns the number of sampling steps that a job runs. Steps that are left out because of
    --init-image do not count."""
    sampling = job.sampling
    return len(
        timesteps(sampling.sampler, sd.schedule, sampling.steps, start=job.start, karras=sampling.karras)
    )
