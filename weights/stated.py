"""What files state of themselves: metadata of single files, and the pipeline and scheduler classes
of folders.

Single files follow ModelSpec (Stability AI's convention, keys `modelspec.*`) or are written by
kohya's sd-scripts (`ss_*`). Folders name diffusers' classes in model_index.json and
scheduler_config.json.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# diffusers' scheduler classes -> samplers of the same rule. PNDM, which SD 1.x was published with,
# is left out: minsd's default for those models is ddim.
SCHEDULERS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}
LCM_STEPS = 4  # what consistency models are made for
NETWORKS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
BESIDE = (
    "tokenizer",
    "scheduler",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "controlnet",
    "adapter",
)
# Pipelines whose networks differ even where their index does not show it.
OTHER_KINDS = re.compile(
    "XL|StableDiffusion3|Inpaint|Upscale|Depth2Img|InstructPix2Pix|UnCLIP|GLIGEN|ImageVariation|LDM3D", re.I
)


@dataclass(frozen=True)
class Stated:
    """What a single file's metadata states. None: nothing."""

    prediction_type: str | None = None  # "epsilon" or "v_prediction"
    size: int | None = None  # default side of images, pixels
    architecture: str | None = None


def of_file(metadata: Mapping[str, str]) -> Stated:
    """The meaning of a safetensors file's metadata. ModelSpec's keys count before kohya's."""
    architecture = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    words = {"v": "v_prediction", "vprediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
    prediction = words.get(re.sub(r"[^a-z]", "", metadata.get("modelspec.prediction_type", "").lower()))
    if prediction is None and metadata.get("ss_v_parameterization", "").lower() == "true":
        prediction = "v_prediction"
    if prediction is None and architecture is not None:
        prediction = _of_architecture(architecture.lower())
    resolution = metadata.get("modelspec.resolution") or metadata.get("ss_resolution") or ""
    return Stated(prediction, _side(resolution), architecture)


def _of_architecture(name: str) -> str | None:
    """ModelSpec's "stable-diffusion-v2-768-v" and kohya's "sd_v2_v" predict v; "...-v2-512"
    predicts noise.
    """
    base = name.partition("/")[0]
    if re.search(r"[-_](768-)?v$", base):
        return "v_prediction"
    return "epsilon" if base.endswith("v2-512") else None


def _side(resolution: str) -> int | None:
    """ "768x768", "(512, 512)" or "512" -> the side of square images; None for others."""
    sides = {int(side) for side in re.findall(r"\d{2,5}", resolution)}
    if len(sides) != 1:
        return None
    (side,) = sides
    return side if side % 8 == 0 and 64 <= side <= 4096 else None


def sampler_of(scheduler: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The sampler that a folder's scheduler config asks for (None: the family's default), and a
    note for the user.
    """
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
    """Notes on a folder's model_index.json. ValueError where it names networks other than Stable
    Diffusion 1.x's and 2.x's.

    Other pipeline classes (image to image, ControlNet, InitNO's, Attend-and-Excite's, ...) hold
    the same networks: the index lists the class of each.
    """
    kind = str(index.get("_class_name", "StableDiffusionPipeline"))
    listed = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    parts = {name: value for name, value in listed.items() if value is not None}
    differs = [name for name, value in NETWORKS.items() if parts.get(name, value) != value]
    differs += [name for name in parts if name not in NETWORKS and name not in BESIDE]
    if kind != "StableDiffusionPipeline" and (OTHER_KINDS.search(kind) or not parts):
        differs.append(kind)
    if differs:
        raise ValueError(
            f"{folder} holds a {ascii(kind)[1:-1][:60]} with other networks"
            f" ({ascii(', '.join(differs[:3]))[1:-1][:90]}); minsd loads Stable Diffusion 1.x and 2.x"
            " (StableDiffusionPipeline)"
        )
    if "controlnet" in parts:
        return ["the folder's ControlNet is not loaded: give it with --controlnet FOLDER/controlnet"]
    return []
