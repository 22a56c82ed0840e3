"""Reads the settings that files state about their model: the metadata of single files, and the
pipeline and scheduler classes that a folder's JSON files name.

The metadata of single files follows ModelSpec (Stability AI's convention, keys `modelspec.*`) or
comes from kohya's sd-scripts (keys `ss_*`). The JSON files of folders (model_index.json,
scheduler_config.json) name diffusers' classes.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# diffusers' scheduler class -> minsd's sampler with the same update rule. PNDM, which SD 1.x was
# published with, is left out because minsd's default for those models is ddim.
SCHEDULERS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}
MARKS = ("v_pred", "ztsnr")  # tensors that only state something, explained in `of_file`
LCM_STEPS = 4  # the number of steps that latent consistency models are made for
NETWORKS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
XL_NETWORKS = NETWORKS | {"text_encoder_2": "CLIPTextModelWithProjection"}
BESIDE = (
    "tokenizer",
    "tokenizer_2",
    "scheduler",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "controlnet",
    "adapter",
)
# Pipeline classes whose networks differ even where model_index.json does not show it.
OTHER_KINDS = re.compile(
    "StableDiffusion3|Inpaint|Upscale|Depth2Img|InstructPix2Pix|UnCLIP|GLIGEN|ImageVariation|LDM3D", re.I
)


@dataclass(frozen=True)
class Stated:
    """The settings that the metadata of a single file states. A setting is None if the metadata
    does not state it."""

    prediction_type: str | None = None  # "epsilon" or "v_prediction"
    zero_snr: bool = False  # whether the model was trained with zero terminal SNR
    size: int | None = None  # default side of images, pixels
    architecture: str | None = None


def of_file(metadata: Mapping[str, str], names: Container[str] = ()) -> Stated:
    """Extracts the settings from `metadata`, the metadata of a safetensors file, and from `names`,
    the names of the file's tensors. ModelSpec's keys (`modelspec.*`) take precedence over kohya's
    (`ss_*`), and these over names.

    Files for ComfyUI and AUTOMATIC1111's web UI contain an empty tensor "v_pred" if the model
    predicts v, and an empty tensor "ztsnr" if it was trained with zero terminal SNR."""
    architecture = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    words = {"v": "v_prediction", "vprediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
    prediction = words.get(re.sub(r"[^a-z]", "", metadata.get("modelspec.prediction_type", "").lower()))
    if prediction is None and metadata.get("ss_v_parameterization", "").lower() == "true":
        prediction = "v_prediction"
    if prediction is None and architecture is not None:
        prediction = _of_architecture(architecture.lower())
    resolution = metadata.get("modelspec.resolution") or metadata.get("ss_resolution") or ""
    if prediction is None and MARKS[0] in names:
        prediction = "v_prediction"
    zero_snr = MARKS[1] in names or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    return Stated(prediction, zero_snr, _side(resolution), architecture)


def _of_architecture(name: str) -> str | None:
    """Returns the prediction type that follows from the name of an architecture in a file's
    metadata: "v_prediction" for names such as "stable-diffusion-v2-768-v" or "sd_v2_v", "epsilon"
    for names that end in "v2-512", and None for all other names."""
    base = name.partition("/")[0]
    if re.search(r"[-_](768-)?v$", base):
        return "v_prediction"
    return "epsilon" if base.endswith("v2-512") else None


def _side(resolution: str) -> int | None:
    """Reads the side of a square image, in pixels, from a text such as "768x768", "(512, 512)" or
    "512". Returns None if the text is not the size of a square image, or if the side is not a
    multiple of 8 between 64 and 4096."""
    sides = {int(side) for side in re.findall(r"\d{2,5}", resolution)}
    if len(sides) != 1:
        return None
    (side,) = sides
    return side if side % 8 == 0 and 64 <= side <= 4096 else None


def sampler_of(scheduler: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Finds the sampler for a model from its scheduler config, the content of diffusers'
    scheduler_config.json. Returns (sampler, note). `sampler` is the name of minsd's sampler with
    the same update rule, or None if there is none or the model family's default is to be used.
    `note` is a line of text for the user, or None."""
    kind = scheduler.get("_class_name")
    if kind in (None, "DDIMScheduler"):
        return None, None
    if kind == "PNDMScheduler":
        return None, "the folder's scheduler is PNDMScheduler; ddim is used unless --sampler pndm is given"
    sampler = SCHEDULERS.get(kind) if isinstance(kind, str) else None
    plain_solver = scheduler.get("algorithm_type", "dpmsolver++") == "dpmsolver++"
    if (
        sampler is None
        or (sampler == "dpmpp_2m" and not plain_solver)
        or scheduler.get("solver_order", 2) != 2
    ):
        name = ascii(kind)[1:-1][:60]
        return None, f"the folder's scheduler, {name}, is not among minsd's samplers; ddim is used instead"
    karras = sampler == "dpmpp_2m" and scheduler.get("use_karras_sigmas")
    more = "; its Karras noise levels need --karras" if karras else ""
    return sampler, f"sampler {sampler}, as the folder's {kind}{more}"


def check_pipeline(index: Mapping[str, Any], folder: Path) -> list[str]:
    """Checks that a model's folder holds the networks of Stable Diffusion 1.x, 2.x or XL. `index`
    is the content of the folder's model_index.json, which names the class of each network. Returns
    a list of notes for the user, which is often empty. Raises ValueError if one of the networks is
    of another class.

    The class of the pipeline matters less: a folder for image-to-image, ControlNet or
    Attend-and-Excite, for example, is accepted if its networks are the same.
    """
    kind = str(index.get("_class_name", "StableDiffusionPipeline"))
    listed = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    parts = {name: value for name, value in listed.items() if value is not None}
    networks = XL_NETWORKS if "XL" in kind else NETWORKS
    if networks is XL_NETWORKS and "text_encoder" in listed and "text_encoder" not in parts:
        raise ValueError(
            f"{folder} is the SDXL refiner, which continues from another model's latents: give the base model"
        )
    differs = [name for name, value in networks.items() if parts.get(name, value) != value]
    differs += [name for name in parts if name not in networks and name not in BESIDE]
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline") and (
        OTHER_KINDS.search(kind) or not parts
    ):
        differs.append(kind)
    if differs:
        raise ValueError(
            f"{folder} holds a {ascii(kind)[1:-1][:60]} with other networks"
            f" ({ascii(', '.join(differs[:3]))[1:-1][:90]}); minsd loads Stable Diffusion 1.x, 2.x and XL"
            " (StableDiffusionPipeline, StableDiffusionXLPipeline)"
        )
    if "controlnet" in parts:
        return ["the folder's ControlNet is not loaded: give it with --controlnet FOLDER/controlnet"]
    return []
