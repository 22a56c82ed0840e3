"""One batch of jobs to its pictures: the initial noise by its method, what predicts the noise, the walk down, the decoding.

A batch (minsd/run.py makes them) differs in prompt, seed and subjects at most, so all else is read from its first job.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from minsd import image
from minsd.controlnet import Control, Controlled, read_control_image
from minsd.noise import arrange, collage, collage_control, excite, initno, stability
from minsd.noise.initial import noise as draw_noise
from minsd.noise.initial import read_noise
from minsd.noise.layout import load as load_layout
from minsd.pipeline import StableDiffusion, first_step
from minsd.weights import lora


@dataclass
class Drawn:
    """A batch: its pictures, the noise they began from, what is to be said of each, and further files by name."""

    pictures: list[Image.Image]
    noise: torch.Tensor  # (B, 4, h, w)
    notes: list[dict]
    extras: list[dict[str, Image.Image | torch.Tensor]]


def find_noise(sd: StableDiffusion, jobs: list[dict], tell) -> tuple[torch.Tensor, list[dict], list[dict]]:
    """The initial noise (B,4,h,w) of a batch by its method, what is to be said of each, and files that come of it."""
    first, seeds, notes, extras = (
        jobs[0],
        [job["seed"] for job in jobs],
        [{} for _ in jobs],
        [{} for _ in jobs],
    )
    shape, method = (4, first["height"] // 8, first["width"] // 8), first["init_noise"]
    if first.get("noise_file"):
        return (
            read_noise(Path(first["noise_file"]), shape)[[job["noise_index"] for job in jobs]],
            notes,
            extras,
        )
    run = {key: first[key] for key in ("steps", "sampler", "karras", "height", "width")}
    if first.get("score") == "attention":
        for k, job in enumerate(jobs):
            candidates = list(range(seeds[k], seeds[k] + job["candidates"]))
            if (
                method == "select" and job.get("layout") and job["layout"]["regions"]
            ):  # by where the captions of its regions look
                where = {key: job[key] for key in ("steps", "sampler")}
                scores = arrange.arrange(sd, load_layout(job["layout"]), candidates, **where).scores
                best = max(scores)
            else:
                scores = initno.attention_scores(sd, job["prompt"], job["subjects"], candidates, **run)
                best = min(scores)  # they are losses
            seeds[k] = candidates[scores.index(best)]
            notes[k] = {
                "seed": seeds[k],
                "candidates": [{"seed": s, "score": round(x, 5)} for s, x in zip(candidates, scores)],
            }
            tell(f"seed {seeds[k]} has the best of {len(scores)} scores, {best:.3f}")
    trip = {key: first[key] for key in ("negative_prompt", "guidance_scale", "height", "width")}
    if method == "select" and first["score"] == "stability":
        for k, job in enumerate(jobs):
            chosen = stability.select(
                sd, job["prompt"], range(seeds[k], seeds[k] + job["candidates"]), progress=tell, **trip
            )
            seeds[k] = chosen.seed
            notes[k] = {
                "seed": chosen.seed,
                "candidates": [{"seed": s, "score": round(x, 5)} for s, x in chosen.scores.items()],
            }
            extras[k]["candidates"] = stability.sheet(sd, job["prompt"], chosen, **trip | run)
    if method == "optimize":
        results = stability.optimize_batch(
            sd,
            [job["prompt"] for job in jobs],
            seeds,
            mode=first["optimize_mode"],
            optimize_steps=first["optimize_steps"],
            progress=lambda b, message: tell(f"seed {seeds[b]}: {message}"),
            **trip,
        )
        for note, result in zip(notes, results):
            note["stability"] = {"before": result.before, "after": result.score}
            if result.note:
                warnings.warn(result.note, stacklevel=2)
        return torch.cat([result.noise for result in results]), notes, extras
    if method == "initno":
        results = initno.optimize_batch(
            sd,
            [job["prompt"] for job in jobs],
            [job["subjects"] for job in jobs],
            seeds,
            **run,
            progress=lambda b, message: tell(f"seed {seeds[b]}: {message}"),
        )
        for note, result in zip(notes, results):
            note["initno"] = {
                "success": result.success,
                "rounds": result.rounds,
                "steps": result.steps,
                "losses": result.losses,
            }
            if result.note:
                warnings.warn(result.note, stacklevel=2)
        return torch.cat([result.noise for result in results]), notes, extras
    return draw_noise(seeds, shape), notes, extras


def invert(sd: StableDiffusion, job: dict) -> Drawn:
    """The noise of a picture, and what is drawn from it."""
    keys = ("negative_prompt", "steps", "guidance_scale", "height", "width")
    with Image.open(job["invert"]) as picture:
        found = stability.invert_picture(sd, picture, job["prompt"], **{key: job[key] for key in keys})
    note = {"psnr": round(found.psnr, 2), "codec_psnr": round(found.codec_psnr, 2)}
    return Drawn([found.picture], found.noise, [note], [{"noise": found.noise}])


@contextmanager
def controlled(sd: StableDiffusion, job: dict, net):
    """Within the block a ControlNet stands beside the network, whatever calls it."""
    if not job.get("control_image"):
        yield
        return
    plain, pictures = sd.unet, read_control_image(job["control_image"], job["width"], job["height"])
    timesteps = sd.schedule.config.num_train_timesteps
    control = Control(net, pictures, job["control_scale"], num_train_timesteps=timesteps)
    sd.unet = Controlled(plain, [control])
    try:
        yield
    finally:
        sd.unet = plain


@contextmanager
def predictor(sd: StableDiffusion, job: dict, prompts: list[str], seeds: list[int], args):
    """What predicts a batch's noise, within the block: the prompts, or the layout with what its regions have of their own."""
    if not job.get("layout"):
        yield sd.guided(prompts, job["negative_prompt"], job["guidance_scale"])
        return
    layout = load_layout(job["layout"]).sized(job["width"], job["height"])
    how = {"guidance_scale": job["guidance_scale"], "seed": seeds}
    how["crop_margin"] = job.get("crop_margin")
    with lora.by_region(layout.regions, args.by_region) as adapters:
        if job.get("controlnet"):
            pictures, scales = collage_control.read(layout, job["control_image"], job["control_scale"])
            yield collage_control.predictor(sd, layout, args.net, pictures, scales, adapters=adapters, **how)
        else:
            yield collage.predictor(sd, layout, adapters=adapters, **how)


def draw(
    sd: StableDiffusion,
    jobs: list[dict],
    args,
    progress: Callable[[int, int], None],
    tell: Callable[[str], None],
) -> Drawn:
    """One batch. `progress(i, t)` is called after every step of the sampler, `tell(message)` while noise is looked for."""
    with controlled(sd, jobs[0], args.net):
        return invert(sd, jobs[0]) if jobs[0].get("invert") else sample(sd, jobs, args, progress, tell)


def sample(sd: StableDiffusion, jobs: list[dict], args, progress, tell) -> Drawn:
    """From noise to pictures."""
    first, prompts, subjects = jobs[0], [job["prompt"] for job in jobs], [job.get("subjects") for job in jobs]
    noise, notes, extras = find_noise(sd, jobs, tell)
    seeds = [note.get("seed", job["seed"]) for job, note in zip(jobs, notes)]
    run = {key: first[key] for key in ("steps", "sampler", "karras")}
    refine = frames = init = None
    if first.get("excite"):
        refine = excite.updates(sd, prompts, subjects, variant=first["excite"], **run)
    if args.attention_maps:
        refine, frames = excite.watch(sd, prompts, subjects, before=refine, **run)
    if first.get("init_image"):
        with Image.open(first["init_image"]) as picture:
            init = sd.encode(image.fit(picture, first["width"], first["height"]))
    with predictor(sd, first, prompts, seeds, args) as predict:
        latents = sd.denoise(
            predict,
            noise,
            seeds=seeds,
            init=init,
            strength=first.get("strength", 0.8),
            refine=refine,
            progress=progress,
            **run,
        )
    pictures = sd.decode(latents)
    if frames is not None:
        for b, (picture, extra) in enumerate(zip(pictures, extras)):
            extra["attention"] = excite.sheet(picture, frames, b, [str(subject) for subject in subjects[b]])
    return Drawn(pictures, noise, notes, extras)


def steps_of(job: dict) -> int:
    """How often a sampler calls `progress` for a picture."""
    steps = job["steps"] - (first_step(job["steps"], job["strength"]) if job.get("init_image") else 0)
    if job.get("invert"):
        return 0
    return steps + (job["sampler"] == "pndm" and steps > 1)  # which visits one timestep twice
