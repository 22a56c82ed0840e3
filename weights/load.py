"""Loads models from files. Loading is strict, needs little more memory than the weights, and leaves
the weights frozen.

Networks are made on the meta device, where parameters have shapes and no memory. Every tensor of
the file then becomes a parameter straight from the memory-mapped file, cast one at a time. Every
parameter must be filled by exactly one tensor of the parameter's shape. Otherwise the load fails
with an error that names the mismatches and guesses the reason.

Models come as folders in the diffusers layout, by hub id (hub.py downloads such a folder), and as
single files in the original layout (single_file.py). safetensors_file.py reads the files and
refuses malformed ones.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from minsd.attention import Attention
from minsd.config import (
    CELL,
    DISTILLED_SCALE,
    LARGEST,
    MODELS,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from minsd.text import TextEncoder, TwoTextEncoders
from minsd.unet import UNet
from minsd.vae import VAE
from minsd.weights import hub, lora, stated
from minsd.weights.ldm_keys import clip_name, newer_vae_name
from minsd.weights.safetensors_file import (
    ORIGINAL,
    RenamedTensors,
    Tensors,
    guess,
    is_aligned,
    read_json,
    read_metadata,
    refuse_pickle,
)
from minsd.weights.single_file import CHANNELS, FileHash, check_widths, original, vae_file

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

SHAPES_FOLDER = Path(__file__).parent / "shapes"
TURBO_FILE = SHAPES_FOLDER / "extras" / "turbo.safetensors"  # the adapter that makes shapes-turbo
Config = TypeVar("Config", ScheduleConfig, TextConfig, UNetConfig, VAEConfig)
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Loaded:
    """A loaded model: its name, its configuration, and its networks `unet`, `vae` and `text`. For
    SDXL, `text` is a `TwoTextEncoders`. `notes` are lines of text to show to the user."""

    name: str
    config: ModelConfig
    unet: UNet
    vae: VAE
    text: TextEncoder
    notes: list[str] = field(default_factory=list)
    sha256: str | None = None  # of a single file: the first ten hex digits of its SHA-256
    revision: str | None = None  # of a hub id: the hash of the commit that its files are from


@dataclass(frozen=True)
class Wanted:
    """Options for loading a model. The fields are those arguments of `load_model` that have the
    same names."""

    device: torch.device
    dtype: torch.dtype
    vae: Path | None = None
    tokenizer: Path | None = None
    prediction_type: str | None = None


@dataclass(frozen=True)
class TextFiles:
    """What one text encoder is made from: its tensors, its tokenizer, and `pad`, the id of the
    token that pads short prompts."""

    tensors: Tensors | RenamedTensors
    tokenizer: "CLIPTokenizer"
    pad: int


def load_model(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
) -> Loaded:
    """Loads a model. Its parameters are frozen, on `device`, and of type `dtype`. `model` is a name
    in `minsd.config.MODELS`, a folder in the diffusers layout, a single .safetensors file, or a hub
    id.

    If `vae` (a folder or a file), `tokenizer` (a folder) or `prediction_type` ("epsilon" or
    "v_prediction") is given, it replaces the model's own. These arguments matter most for single
    files, which contain no tokenizer and often do not state the prediction type.

    Raises FileNotFoundError if the model or one of its files is missing. Raises ValueError if the
    model cannot be loaded, for example because a file is a pickle, is malformed, or belongs to
    another kind of model. The error message is one line.
    """
    if prediction_type not in (None, "epsilon", "v_prediction"):
        raise ValueError(f"prediction_type must be epsilon or v_prediction, not {prediction_type!r}")
    path = SHAPES_FOLDER if model in ("shapes", "shapes-turbo") else Path(model)
    wanted = Wanted(
        device, dtype, Path(vae) if vae else None, Path(tokenizer) if tokenizer else None, prediction_type
    )
    if path.is_dir():
        loaded = load_folder(path, wanted)
        return as_turbo(loaded) if model == "shapes-turbo" else loaded
    refuse_pickle(path, "model")
    if path.is_file():
        return load_file(path, wanted)
    repo = (MODELS[model].hub_id if model in MODELS else None) or str(model)
    if path.suffix != ".safetensors" and hub.is_id(repo):
        folder = hub.fetch(repo, dtype=dtype, check=check_folder)
        name = repo.rpartition("@")[0] or repo
        return replace(load_folder(folder, wanted, name=name.rpartition("/")[2]), revision=folder.name)
    known = ", ".join(MODELS)
    raise FileNotFoundError(
        f"there is no model {model!r}: give a diffusers folder, a .safetensors file, a hub id, or"
        f" one of {known}"
    )


def load_folder(folder: Path, wanted: Wanted, name: str | None = None) -> Loaded:
    """Loads a model from a folder in the diffusers layout: model_index.json, unet/, vae/,
    text_encoder/, tokenizer/, scheduler/, and for SDXL text_encoder_2/ and tokenizer_2/. `wanted`
    holds the options of `load_model`. `name` becomes the model's name; if it is None, the folder's
    name does. Raises the same errors as `load_model`."""
    config = check_folder(folder)
    if name is not None:
        config = replace(config, name=name)
    if wanted.prediction_type is not None:
        schedule = replace(config.schedule, prediction_type=wanted.prediction_type)
        config = replace(config, schedule=schedule)
    unet = Tensors(folder / "unet", "diffusion_pytorch_model", wanted.dtype)
    if wanted.vae:
        vae_config, vae = find_vae(wanted.vae, wanted.dtype, config.vae)
        config = replace(config, vae=vae_config)
    else:
        vae = Tensors(folder / "vae", "diffusion_pytorch_model", wanted.dtype)
    text = Tensors(folder / "text_encoder", "model", wanted.dtype)
    notes = stated.check_pipeline(read_json(folder / "model_index.json"), folder)
    notes += _scheduler_note(folder, config)
    skipped = layers_skipped(text, config.text)
    if skipped:
        notes.append(
            f"the text encoder runs {config.text.num_layers} of its"
            f" {config.text.num_layers + skipped} layers (clip skip), as its config states"
        )
    own = folder / "tokenizer"
    if not wanted.tokenizer and not own.is_dir():
        raise FileNotFoundError(
            f"{own} is missing: a diffusers folder has its tokenizer there (vocab.json, merges.txt)"
        )
    tokenizer = read_tokenizer(wanted.tokenizer or own, config.text)
    pad = _token_id(tokenizer.pad_token_id, config.text.pad_token_id)
    texts = [TextFiles(text, tokenizer, pad)]
    if config.text_2 is not None:
        text = Tensors(folder / "text_encoder_2", "model", wanted.dtype)
        tokenizer = read_tokenizer(folder / "tokenizer_2", config.text_2)
        # The pad_token_id in SDXL's text_encoder_2/config.json is not the one used in training.
        texts.append(TextFiles(text, tokenizer, _token_id(tokenizer.pad_token_id, 0)))
    return replace(assemble(config, unet, vae, texts, wanted), notes=notes)


def as_turbo(shapes: Loaded) -> Loaded:
    """Turns the embedded model `shapes` into the model shapes-turbo: merges the trained adapter in
    `TURBO_FILE` into the weights of `shapes`, in place. Returns the same networks with another name
    and other settings, those of the row "shapes-turbo" of `MODELS`."""
    row = MODELS["shapes-turbo"]
    schedule = replace(shapes.config.schedule, timestep_spacing=row.schedule.timestep_spacing)
    config = replace(row, schedule=schedule, vae=shapes.config.vae)
    for layer in lora.merge([(lora.read(TURBO_FILE, shapes), 1.0)]):
        setattr(layer, lora.MERGED, False)  # so that the user can add adapters of their own
    return replace(shapes, name=config.name, config=config)


def _scheduler_note(folder: Path, config: ModelConfig) -> list[str]:
    """Makes a note that tells the user which sampler follows from the scheduler config in a model's
    folder. `config` is the model's configuration. Returns a list with the note. The list is empty
    if the scheduler config names no sampler, a DDIM scheduler, or the sampler that is the default
    for this kind of model anyway."""
    _, note = stated.sampler_of(read_json(folder / "scheduler" / "scheduler_config.json"))
    return [] if note is None or note.startswith(f"sampler {_family(config).sampler},") else [note]


def layers_skipped(tensors: Tensors, config: TextConfig) -> int:
    """Returns the number of layers at the end of a text encoder that have tensors but do not run,
    because `config` states fewer layers than `tensors` holds (CLIP skip)."""
    numbers = (re.search(r"encoder\.layers\.(\d{1,3})\.", name) for name in tensors)
    return max(0, 1 + max((int(m[1]) for m in numbers if m), default=-1) - config.num_layers)


def check_folder(folder: Path) -> ModelConfig:
    """Reads and checks the configuration of a model from the JSON files in its folder, which has
    the diffusers layout. Raises FileNotFoundError if a JSON file is missing, and ValueError if the
    model is not of Stable Diffusion 1.x, 2.x or XL."""
    index = read_json(folder / "model_index.json")
    stated.check_pipeline(index, folder)
    config = folder_config(folder, index)
    kind = str(index.get("_class_name", "StableDiffusionPipeline"))
    if (config.text_2 is not None) != ("XL" in kind):
        network = "an SDXL UNet" if config.text_2 else "no SDXL UNet"
        raise ValueError(
            f"{folder} holds a {kind} with other networks ({network}): parts of different models"
        )
    check_widths(config, folder)
    return config


def load_file(path: Path, wanted: Wanted) -> Loaded:
    """Loads a model from a single file in the original (LDM) layout. `wanted` holds the options of
    `load_model`. Raises the same errors as `load_model`."""
    tensors = Tensors(path, "", wanted.dtype)
    kind = guess(tensors)
    if kind != ORIGINAL:
        raise ValueError(
            f"{path} {kind or 'holds no model that minsd knows'}: give a Stable Diffusion 1.x,"
            " 2.x or XL checkpoint"
        )
    if any(name.endswith((".scale_weight", ".weight_scale")) for name in tensors):
        raise ValueError(
            f"{path} holds 8-bit weights with a scale for each layer, which minsd does not read: get the"
            " model in fp16, or in fp8 without scales"
        )
    parts = original(tensors, wanted.prediction_type, read_metadata(path))
    config = parts.config
    if wanted.vae:
        vae_config, vae = find_vae(wanted.vae, wanted.dtype, config.vae)
        config = replace(config, vae=vae_config)
    elif parts.vae:
        vae = parts.vae
    else:
        raise ValueError(
            f"{path} holds no VAE: give one with --vae (a folder or file, such as sd-vae-ft-mse)"
        )
    tokenizer = read_tokenizer(wanted.tokenizer or hub.tokenizer(), config.text)
    pad = config.text.pad_token_id
    if pad:  # SD1's encoder, and SDXL's first one; SD2 pads with 0
        pad = _token_id(tokenizer.eos_token_id, config.text.eos_token_id)
    texts = [TextFiles(parts.text, tokenizer, pad)]
    if parts.text_2 is not None:
        texts.append(TextFiles(parts.text_2, tokenizer, 0))
    hashing = FileHash(path)
    hashing.start()  # in parallel with loading: hashing releases the interpreter lock
    loaded = assemble(config, parts.unet, vae, texts, wanted)
    hashing.join()
    return replace(loaded, notes=parts.notes, sha256=hashing.digest)


def assemble(
    config: ModelConfig,
    unet: Tensors | RenamedTensors,
    vae: Tensors | RenamedTensors,
    texts: list[TextFiles],
    wanted: Wanted,
) -> Loaded:
    """Builds the networks of a model by their sizes in `config`, and fills them with tensors.
    `unet` and `vae` are the tensors of the UNet and the VAE. `texts` has one item for each text
    encoder (two for SDXL). `wanted` gives the device and the dtype. Returns the loaded model, with
    an empty list of notes.

    The VAE of an SDXL model is loaded in float32 rather than float16 if the model's config states
    that float16 does not suffice (`force_upcast`).
    """

    def build(
        kind: Callable[[Config], Network],
        config: Config,
        tensors: Tensors | RenamedTensors,
        rename: Callable[[str], str | None] = str,
        dtype: torch.dtype = wanted.dtype,
    ) -> Network:
        module = empty(kind, config, tensors.where)
        fill(module, tensors, wanted.device, dtype, rename)
        return module

    def encoder(config: TextConfig, files: TextFiles) -> TextEncoder:
        rename = partial(clip_name, layers=config.num_layers)
        return TextEncoder(build(empty_clip, config, files.tensors, rename), files.tokenizer, files.pad)

    # force_upcast counts for SDXL alone: newer files of SD1 and SD2 state it too, needlessly.
    upcast = config.text_2 is not None and config.vae.force_upcast and wanted.dtype == torch.float16
    networks = (
        build(UNet, config.unet, unet),
        build(VAE, config.vae, vae, newer_vae_name, torch.float32 if upcast else wanted.dtype),
    )
    text = encoder(config.text, texts[0])
    if config.text_2 is not None:
        text = TwoTextEncoders(text, encoder(config.text_2, texts[1]), config.zero_empty)
    return Loaded(config.name, config, *networks, text)


def empty(kind: Callable[[Config], Network], config: Config, where: object) -> Network:
    """Builds a network on the meta device, where parameters have shapes but no memory, by calling
    `kind(config)`. Raises ValueError, naming the file `where`, if no network can have the sizes in
    `config`."""
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # torch raises errors of many types, some with several lines
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{where}: no network has these sizes: {reason}") from None


def empty_clip(config: TextConfig) -> "CLIPTextModel":
    """Builds CLIP's text encoder with the sizes in `config`, before its weights are loaded. Returns
    transformers' CLIPTextModelWithProjection if `config.projection_dim` is not 0 (the encoder then
    makes a pooled text state too), otherwise a CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind: Any = CLIPTextModelWithProjection if config.projection_dim else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_length,
            hidden_act=config.hidden_act,
            eos_token_id=config.eos_token_id,
            bos_token_id=None,  # only the tokenizer uses it
            projection_dim=config.projection_dim or 512,  # CLIPTextModel does not read it
        )
    )


def find_vae(path: Path, dtype: torch.dtype, own: VAEConfig) -> tuple[VAEConfig, Tensors | RenamedTensors]:
    """Opens a VAE that replaces a model's own VAE. `path` is a VAE's folder in the diffusers
    layout, a whole model's folder that contains it as vae/, or a single .safetensors file in the
    original or the diffusers layout. A single file lacks settings such as the scale of the latents.
    These come from `own`, the config of the model's own VAE.

    Returns (config, tensors). If a folder has weights in two precisions, the one nearer to `dtype`
    is opened. Raises FileNotFoundError if a file is missing, and ValueError if `path` holds no VAE
    of Stable Diffusion.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        return vae_config(folder / "config.json"), Tensors(folder, "diffusion_pytorch_model", dtype)
    refuse_pickle(path, "VAE")
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no VAE {path}: give a diffusers folder (config.json, ...) or a .safetensors file"
        )
    return vae_file(Tensors(path, "", dtype), own)


def read_tokenizer(folder: Path, config: TextConfig) -> "CLIPTokenizer":
    """Loads the tokenizer in `folder` or in the folder's subfolder tokenizer/. Raises
    FileNotFoundError if there is no tokenizer. Raises ValueError if the tokenizer cannot be read,
    or has more tokens than a text encoder with `config` knows. The error message is one line."""
    from transformers import CLIPTokenizer

    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: a tokenizer is a folder with vocab.json and merges.txt"
        )
    pair = (folder / "vocab.json", folder / "merges.txt")
    if not (folder / "tokenizer.json").is_file() and not all(path.is_file() for path in pair):
        # Without this check transformers would make an empty tokenizer.
        raise FileNotFoundError(f"{folder} holds no tokenizer: vocab.json or merges.txt is missing")
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is a pipe or a device")  # reading could block for ever
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)  # nosec B615: no download
    except Exception as error:  # transformers raises errors of many types, some with several lines
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{folder} cannot be read as a CLIP tokenizer: {reason}") from error
    tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)  # ids need not be consecutive
    if tokens > config.vocab_size:
        raise ValueError(
            f"{folder} is another model's tokenizer: it has {tokens} tokens, the text encoder"
            f" {config.vocab_size}"
        )
    return tokenizer


def _token_id(known: object, default: int) -> int:
    """Returns the token id `known`, which comes from a tokenizer. If it is not an int, because the
    tokenizer does not state the id, returns `default`."""
    return known if isinstance(known, int) else default


# --- configurations -------------------------------------------------------------------------------


def heads_per_level(config: dict[str, Any], levels: int) -> tuple[int, ...]:
    """Reads the numbers of attention heads from `config`, the content of the config.json of a UNet
    or a ControlNet. Returns one number of heads for each level; `levels` is the number of
    levels."""
    # Both keys mean the number of heads. The "dim" in the second one is an old mistake.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    return tuple(heads) if isinstance(heads, list) else (heads,) * levels


def depth_per_level(config: dict[str, Any], levels: int, path: Path) -> tuple[int, ...]:
    """Reads from `config`, the content of a UNet's config.json, how many transformer blocks an
    attention layer has. Returns one number for each level; `levels` is the number of levels. Raises
    ValueError, naming the file `path`, if attention layers of the same level differ, or if the
    count of numbers is not `levels`."""
    depths = config.get("transformer_layers_per_block") or 1
    depths = tuple(depths) if isinstance(depths, list) else (depths,) * levels
    if config.get("reverse_transformer_layers_per_block") or any(isinstance(n, list) for n in depths):
        raise ValueError(f"{path}: depths that differ within a level (SSD-1B, Vega) are not supported")
    if len(depths) != levels:
        raise ValueError(f"{path}: transformer_layers_per_block must have {levels} numbers")
    return depths


def pooled_dim(config: dict[str, Any], size_dim: int, path: Path) -> int:
    """Returns the width of the pooled text state that an SDXL UNet takes, or 0 for a UNet that
    takes none. `config` is the content of the UNet's config.json. An SDXL UNet also takes six
    numbers about the image's size, and `size_dim` is the width of the embedding of one such number.
    Raises ValueError, naming the file `path`, if the width of the pooled text state is
    impossible."""
    if config.get("addition_embed_type") is None:
        return 0
    # The network's input beside the time is the pooled state and six embedded numbers. In the
    # context, the pooled state and the six numbers must fit into one row.
    pooled = (config.get("projection_class_embeddings_input_dim") or 0) - 6 * size_dim
    if not 0 < pooled <= config["cross_attention_dim"] - 6:
        raise ValueError(f"{path}: an SDXL network whose pooled text has {pooled} numbers is not known")
    return pooled


def checked(config: Config, path: Path) -> Config:
    """Checks every field of `config` and returns `config` unchanged. Each value must have the type
    of the field's default. Numbers must not be negative and not be so large that building the
    network would take long. Raises ValueError, naming the file `path`, for the first field that
    does not pass."""
    for f in fields(config):
        value = getattr(config, f.name)
        values = value if isinstance(f.default, tuple) else (value,)
        example = f.default[0] if isinstance(f.default, tuple) else f.default
        types = (int, float) if type(example) is float else (type(example),)
        most = 64 if "layers" in f.name or "depth" in f.name else 10**6
        fine = len(values) <= 16 and all(
            type(x) in types and (isinstance(x, str) or 0 <= x <= most)
            for x in values  # NaN fails the comparison too
        )
        if not fine:
            raise ValueError(
                f"{path}: {f.name} = {ascii(value)[:80]} is not what a Stable Diffusion model has there"
            )
    return config


def check_heads(config: UNetConfig, path: Path) -> UNetConfig:
    """Checks the numbers of attention heads and returns `config` unchanged. Every level must have a
    number of heads, and this number must divide the level's channel count. Otherwise raises
    ValueError, naming the file `path`."""
    heads = config.num_heads
    widths = config.block_out_channels
    if len(heads) != len(widths) or any(n == 0 or width % n for n, width in zip(heads, widths)):
        raise ValueError(f"{path}: {heads} heads do not divide the widths {widths}")
    return config


# The values that a UNet's config.json may have for keys that minsd's UNet has no setting for.
_UNET_VALUES = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (None, False),
    "only_cross_attention": (None, False),
    "class_embeddings_concat": (None, False),
    "act_fn": (None, "silu", "swish"),
    "resnet_time_scale_shift": (None, "default"),
    "attention_type": (None, "default"),
    "time_embedding_type": (None, "positional"),
    "mid_block_type": (None, "UNetMidBlock2DCrossAttn"),
    "addition_embed_type": (None, "text_time"),
    "center_input_sample": (None, False),
    "cross_attention_norm": (None,),
    "conv_in_kernel": (None, 3),
    "conv_out_kernel": (None, 3),
    "flip_sin_to_cos": (None, True),
    "freq_shift": (None, 0),
    "downsample_padding": (None, 1),
    "mid_block_scale_factor": (None, 1),
}


def unet_config(path: Path) -> UNetConfig:
    """Reads a UNet's config.json, the file `path`, into a UNetConfig. Raises FileNotFoundError if
    there is no such file, and ValueError if the UNet in it is not one of Stable Diffusion 1.x, 2.x
    or XL for text-to-image."""
    c = read_json(path)
    channels = c.get("in_channels", 4)
    if isinstance(channels, int) and channels in CHANNELS:
        raise ValueError(
            f"{path}: this is a network for {CHANNELS[channels]} ({channels} input channels); minsd loads"
            " text-to-image models, with 4"
        )
    for key, known in _UNET_VALUES.items():
        if c.get(key) not in known:
            raise ValueError(
                f"{path}: {key} = {ascii(c[key])[:80]} is not an architecture of Stable Diffusion 1.x, 2.x"
                " or XL"
            )
    try:
        widths = tuple(c["block_out_channels"])
        cross_by_kind = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
        cross = tuple(cross_by_kind[kind] for kind in c["down_block_types"])
        mirrored = tuple(kind == "CrossAttnUpBlock2D" for kind in reversed(c["up_block_types"]))
        if mirrored != cross or len(cross) != len(widths):
            raise ValueError(f"{path}: down_block_types and up_block_types are not each other's mirror image")
        size = c.get("sample_size") or 64
        size_dim = c.get("addition_time_embed_dim") or 256
        config = UNetConfig(
            in_channels=c.get("in_channels", 4),
            out_channels=c.get("out_channels", 4),
            block_out_channels=widths,
            layers_per_block=c.get("layers_per_block", 2),
            cross_attention=cross,
            transformer_depth=depth_per_level(c, len(widths), path),
            num_heads=heads_per_level(c, len(widths)),
            context_dim=c["cross_attention_dim"],
            pooled_dim=pooled_dim(c, size_dim, path),
            size_dim=size_dim,
            linear_projection=bool(c.get("use_linear_projection")),
            upcast_attention=bool(c.get("upcast_attention")),
            norm_groups=c.get("norm_num_groups", 32),
            norm_eps=c.get("norm_eps", 1e-5),
            sample_size=size if isinstance(size, int) else size[0],
            guidance_dim=c.get("time_cond_proj_dim") or 0,
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} does not describe a Stable Diffusion UNet: {error} is missing or not known"
        ) from None
    checked(config, path)
    if not 1 <= config.sample_size <= LARGEST // CELL:
        raise ValueError(f"{path}: sample_size = {config.sample_size} is not a size of latents")
    return check_heads(config, path)


def vae_config(path: Path) -> VAEConfig:
    """Reads a VAE's config.json, the file `path`, into a VAEConfig. Raises FileNotFoundError if
    there is no such file, and ValueError if the VAE in it is not one of Stable Diffusion 1.x, 2.x
    or XL."""
    c = read_json(path)
    blocks = c.get("down_block_types", [])
    plain = isinstance(blocks, list) and all(kind == "DownEncoderBlock2D" for kind in blocks)
    if c.get("latent_channels", 4) != 4 or not plain:
        raise ValueError(
            f"{path} does not describe the VAE of a Stable Diffusion 1.x, 2.x or XL (4 latent channels,"
            " DownEncoderBlock2D)"
        )
    if "block_out_channels" not in c:
        raise ValueError(f"{path} does not describe a VAE: block_out_channels is missing")
    if not isinstance(c["block_out_channels"], list):
        raise ValueError(f"{path}: block_out_channels must be a list")
    config = VAEConfig(
        block_out_channels=tuple(c["block_out_channels"]),
        layers_per_block=c.get("layers_per_block", 1),
        norm_groups=c.get("norm_num_groups", 32),
        scaling_factor=c.get("scaling_factor", 0.18215),
        force_upcast=bool(c.get("force_upcast")),
    )
    checked(config, path)
    if not 1e-4 <= config.scaling_factor <= 1e4:
        raise ValueError(f"{path}: scaling_factor = {config.scaling_factor:g} is not a VAE's (0.18, 0.13)")
    return config


def text_config(path: Path) -> TextConfig:
    """Reads a text encoder's config.json, the file `path`, into a TextConfig. Raises
    FileNotFoundError if there is no such file, and ValueError if a size is missing or
    impossible."""
    c = read_json(path)
    projection = 0
    if c.get("architectures") == ["CLIPTextModelWithProjection"]:  # other encoders state a width too
        projection = c.get("projection_dim", 512)
    try:
        config = TextConfig(
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=c["num_attention_heads"],
            vocab_size=c["vocab_size"],
            max_length=c.get("max_position_embeddings", 77),
            hidden_act=c.get("hidden_act", "quick_gelu"),
            pad_token_id=c.get("pad_token_id") or 0,
            eos_token_id=c.get("eos_token_id") or 0,
            projection_dim=projection,
        )
    except KeyError as error:
        raise ValueError(f"{path} does not describe a CLIP text model: {error} is missing") from None
    checked(config, path)
    if max(config.pad_token_id, config.eos_token_id) >= config.vocab_size:
        raise ValueError(f"{path}: its pad or eos token is not among its {config.vocab_size} tokens")
    return config


def schedule_config(path: Path) -> ScheduleConfig:
    """Reads the noise schedule from a model's scheduler_config.json, the file `path`. Raises
    FileNotFoundError if there is no such file, and ValueError if minsd does not support the
    schedule."""
    c = read_json(path)
    if c.get("trained_betas") is not None:
        raise ValueError(
            f"{path}: trained_betas are not supported; minsd knows scaled_linear and linear betas"
        )
    if "EDM" in str(c.get("_class_name")):
        raise ValueError(
            f"{path}: {c['_class_name']} is for models of the EDM kind (Playground 2.5): minsd draws with"
            " those that predict noise or v"
        )
    for key, known in {
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": ("leading", "linspace", "trailing"),
    }.items():
        if c.get(key) not in (None, *known):
            raise ValueError(f"{path}: {key} = {ascii(c[key])[:80]} is not known: {' or '.join(known)}")
    given = {f.name: c[f.name] for f in fields(ScheduleConfig) if c.get(f.name) is not None}
    config = checked(ScheduleConfig(**given), path)
    if not 0 < config.beta_start <= config.beta_end < 1 or not 1 <= config.num_train_timesteps <= 10**5:
        betas = f"betas from {config.beta_start} to {config.beta_end} in {config.num_train_timesteps} steps"
        raise ValueError(f"{path}: {betas} make no schedule")
    return config


def folder_config(folder: Path, index: dict[str, Any]) -> ModelConfig:
    """Makes a model's configuration from the JSON files in a diffusers folder. `index` is the
    content of the folder's model_index.json. The folder determines the name, the networks and the
    noise schedule. It also determines the sampler, if minsd has the sampler that the folder's
    scheduler config names.

    All other settings, such as the number of steps and the guidance scale, are those of the row of
    `MODELS` with the same kind of network. There are two exceptions. A latent consistency model
    gets 4 steps and guidance scale 1. A UNet that takes the guidance scale as an input gets
    guidance scale 8.5.
    """
    scheduler = folder / "scheduler" / "scheduler_config.json"
    unet = unet_config(folder / "unet" / "config.json")
    config = ModelConfig(
        folder.resolve().name,
        unet=unet,
        schedule=schedule_config(scheduler),
        vae=vae_config(folder / "vae" / "config.json"),
        text=text_config(folder / "text_encoder" / "config.json"),
        text_2=text_config(folder / "text_encoder_2" / "config.json") if unet.pooled_dim else None,
        zero_empty=unet.pooled_dim > 0 and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    family = _family(config)
    sampler, _ = stated.sampler_of(read_json(scheduler))
    few = sampler == "lcm"  # latent consistency models need few steps and no guidance
    guidance_scale = 1.0 if few else family.guidance_scale
    if unet.guidance_dim:
        guidance_scale = DISTILLED_SCALE
    return replace(
        family,
        name=family.name if folder == SHAPES_FOLDER else config.name,
        unet=config.unet,
        schedule=config.schedule,
        vae=config.vae,
        text=config.text,
        text_2=config.text_2,
        zero_empty=config.zero_empty,
        sampler=sampler or family.sampler,
        steps=stated.LCM_STEPS if few else family.steps,
        guidance_scale=guidance_scale,
    )


def _family(config: ModelConfig) -> ModelConfig:
    """Returns the row of `MODELS` whose UNet, prediction type and timestep spacing are those of
    `config`. If there is no such row, returns the row "sdxl" (without its hub id) for an SDXL UNet,
    and a `ModelConfig` with default settings for any other UNet."""

    def is_like(row: ModelConfig) -> bool:
        return (
            row.unet == replace(config.unet, guidance_dim=0)
            and row.schedule.prediction_type == config.schedule.prediction_type
            and row.schedule.timestep_spacing == config.schedule.timestep_spacing
        )

    other = replace(MODELS["sdxl"], hub_id=None) if config.unet.pooled_dim else ModelConfig(config.name)
    return next((row for row in reversed(MODELS.values()) if is_like(row)), other)


# --- filling networks -----------------------------------------------------------------------------


def fill(
    module: nn.Module,
    tensors: Tensors | RenamedTensors,
    device: torch.device,
    dtype: torch.dtype,
    rename: Callable[[str], str | None] = str,
) -> None:
    """Gives every parameter of `module` the values of its tensor in `tensors`. Afterwards the
    parameters are frozen, on `device`, and of type `dtype`.

    `rename` translates the name of a tensor into that of its parameter, and returns None if the
    tensor is not used. Raises ValueError if a parameter has no tensor or more than one, if a tensor
    has another shape than its parameter, or if a tensor is left over. The error message is one
    line.
    """
    place(module, tensors, match(module, tensors, rename), device, dtype)


def match(
    module: nn.Module, tensors: Tensors | RenamedTensors, rename: Callable[[str], str | None]
) -> dict[str, str]:
    """Finds the tensor of each parameter of `module`. Returns a dict of parameter name -> tensor
    name. `rename` translates the name of a tensor into that of its parameter, and returns None if
    the tensor is not used.

    Raises ValueError if a parameter has no tensor or more than one, if a tensor has another shape
    than its parameter, or if a tensor is left over. The error message names the first few such
    tensors.
    """
    parameters = dict(module.named_parameters())
    own = {rename(name) or name: name for name in parameters}
    sources: dict[str, str] = {}
    doubled = []
    for name in tensors:
        new = rename(name)
        if new in sources:
            doubled.append(name)
        elif new is not None:
            sources[new] = name
    misshaped = []
    for key in own.keys() & sources.keys():
        wanted = tuple(parameters[own[key]].shape)
        shape = tensors.shape(sources[key])
        dtype = tensors.dtype(sources[key])
        # The VAE's attention was once made of 1x1 convolutions.
        if shape != wanted and shape != (*wanted, 1, 1):
            misshaped.append(f"{key} {shape}, not {wanted}")
        elif dtype not in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"):
            misshaped.append(f"{key} has dtype {dtype}")
    kinds = {
        "missing": own.keys() - sources.keys(),
        "unexpected": sources.keys() - own.keys(),
        "mis-shaped": misshaped,
        "doubled": doubled,
    }
    problems = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        reason = guess(tensors) if isinstance(tensors, Tensors) else None
        because = f": it {reason}" if reason else ""
        raise ValueError(f"{tensors.where} does not fit its config: {'; '.join(problems)}{because}")
    return {name: sources[key] for key, name in own.items()}


@torch.no_grad()
def place(
    module: nn.Module,
    tensors: Tensors | RenamedTensors,
    sources: dict[str, str],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Replaces the parameters of `module`, which is on the meta device, by tensors from a file.
    Afterwards the parameters are frozen, on `device`, and of type `dtype`. `sources` maps the name
    of each parameter to the name of its tensor.

    On a CPU, a tensor that has this dtype in the file already is not copied but stays
    memory-mapped, if its position in the file allows that (`is_aligned`). The tensors of fused
    attention projections (`Attention.fuse`) are copied into the buffer that these projections
    share.
    """
    for part in module.modules():
        if isinstance(part, Attention) and part.fused is None:
            part.fuse(device, dtype)
    parameters = dict(module.named_parameters())  # fusing has replaced some parameters
    for name, source in sources.items():
        if parameters[name].is_meta:
            tensor = tensors[source].reshape(parameters[name].shape)
            tensor = tensor.to(device, dtype, copy=not is_aligned(tensor))
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            tensors.copy_to(parameters[name], source)
    for name, buffer in module.named_buffers():
        # Files do not hold this buffer, and leaving the meta device leaves it undefined.
        if name.endswith("position_ids"):
            parent, _, leaf = name.rpartition(".")
            positions = torch.arange(buffer.shape[-1], device=device).expand(1, -1)
            setattr(module.get_submodule(parent), leaf, positions)
    module.eval()
    assert not [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
