"""From files to modules: strict, frozen, at low peak memory.

Networks are made on the meta device, where parameters have shapes and no memory, and every tensor of the file is put in
its place straight from the mapped file, cast one at a time. Every parameter is filled by exactly one tensor of its
shape, or the load fails and says which were not, with a guess at the reason.

Models come as folders in the diffusers layout, by hub id (hub.py), which makes such a folder, and as single files in the
original layout (single.py). The files themselves are read in tensors.py, which lets nothing unsound pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import nn

from minsd.attention import Attention
from minsd.config import MODELS, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from minsd.text import TextEncoder
from minsd.unet import UNet
from minsd.vae import VAE
from minsd.weights import hub
from minsd.weights.ldm_keys import clip_name, newer_vae_name
from minsd.weights.safetensors_file import ORIGINAL, PICKLES, Tensors, guess, lies_well, read_json
from minsd.weights.safetensors_file import read_header as read_header  # others take it from here
from minsd.weights.single_file import FileHash, original, vae_file

SHAPES_FOLDER = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Loaded:
    """What a model's files held. `notes` are lines a user should see."""

    name: str
    config: ModelConfig
    unet: UNet
    vae: VAE
    text: TextEncoder
    notes: list[str] = field(default_factory=list)
    sha256: str | None = None  # first ten hex digits, for a single file


def load_model(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
) -> Loaded:
    """A model by name, path or hub id, frozen, on `device` in `dtype`.

    `vae`, a folder or file, takes the place of the model's own; so does `tokenizer`, a folder, which single files have none
    of; so does `prediction_type` ("epsilon" or "v_prediction"), which they do not tell.
    ValueError or FileNotFoundError, each in one line, for what is not there or cannot be loaded.
    """
    path = SHAPES_FOLDER if model == "shapes" else Path(model)
    if prediction_type not in (None, "epsilon", "v_prediction"):
        raise ValueError(f"prediction_type must be epsilon or v_prediction, not {prediction_type!r}")
    more = {
        "device": device,
        "dtype": dtype,
        "vae": vae,
        "tokenizer": tokenizer,
        "prediction_type": prediction_type,
    }
    if path.is_dir():
        return load_folder(path, **more)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{model} is a pickle, which can run code when opened: get the model's .safetensors version instead"
        )
    if path.is_file():
        return load_file(path, **more)
    repo = MODELS[model].hub_id if model in MODELS else str(model)
    if path.suffix != ".safetensors" and hub.is_id(repo):
        folder = hub.fetch(repo, wide=dtype == torch.float32, check=check_folder)
        return load_folder(folder, name=repo.rpartition("/")[2], **more)
    known = ", ".join(MODELS)
    raise FileNotFoundError(
        f"there is no model {model!r}: give a diffusers folder, a .safetensors file, a hub id, or one of {known}"
    )


def load_folder(
    folder: Path, *, device, dtype, vae=None, tokenizer=None, prediction_type=None, name: str | None = None
) -> Loaded:
    """A folder in the diffusers layout: model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/."""
    config = check_folder(folder)
    if name is not None:
        config = replace(config, name=name)
    if prediction_type is not None:
        config = replace(config, schedule=replace(config.schedule, prediction_type=prediction_type))
    unet = Tensors(folder / "unet", "diffusion_pytorch_model", dtype)
    vae_config, vae_tensors = (
        find_vae(Path(vae), dtype)
        if vae
        else (config.vae, Tensors(folder / "vae", "diffusion_pytorch_model", dtype))
    )
    text = Tensors(folder / "text_encoder", "model", dtype)
    if not tokenizer and not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(
            f"{folder / 'tokenizer'} is missing: a diffusers folder has its tokenizer there (vocab.json, merges.txt)"
        )
    tokenizer = read_tokenizer(Path(tokenizer or folder / "tokenizer"), config.text)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.text.pad_token_id
    config = replace(config, vae=vae_config)
    return assemble(config, unet, vae_tensors, text, tokenizer, pad, device, dtype)


def check_folder(folder: Path) -> ModelConfig:
    """What a folder's JSON files say it is; ValueError if that is no Stable Diffusion 1.x or 2.x."""
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name", "StableDiffusionPipeline")
    if kind != "StableDiffusionPipeline":
        raise ValueError(
            f"{folder} holds a {kind}; minsd loads Stable Diffusion 1.x and 2.x (StableDiffusionPipeline)"
        )
    return folder_config(folder)


def load_file(path: Path, *, device, dtype, vae=None, tokenizer=None, prediction_type=None) -> Loaded:
    """A single file in the original layout."""
    tensors = Tensors(path, "", dtype)
    if (what := guess(tensors)) != ORIGINAL:
        raise ValueError(
            f"{path} {what or 'holds no model that minsd knows'}: give a Stable Diffusion 1.x or 2.x checkpoint"
        )
    config, unet, own_vae, text, notes = original(tensors, prediction_type)
    if vae:
        vae_config, vae_tensors = find_vae(Path(vae), dtype)
        config = replace(config, vae=vae_config)
    elif own_vae:
        vae_tensors = own_vae
    else:
        raise ValueError(
            f"{path} holds no VAE: give one with --vae (a folder or file, such as sd-vae-ft-mse)"
        )
    tokenizer = read_tokenizer(Path(tokenizer) if tokenizer else hub.tokenizer(), config.text)
    pad = 0 if config.unet.linear_projection else tokenizer.eos_token_id
    hashing = FileHash(path)
    hashing.start()  # beside the loading: hashing lets other threads run
    loaded = assemble(config, unet, vae_tensors, text, tokenizer, pad, device, dtype)
    hashing.join()
    return replace(loaded, notes=notes, sha256=hashing.digest)


def assemble(
    config: ModelConfig, unet: Tensors, vae: Tensors, text: Tensors, tokenizer, pad: int, device, dtype
) -> Loaded:
    """Empty networks, each filled from its tensors."""
    parts = []
    for kind, own, tensors, rename in (
        (UNet, config.unet, unet, str),
        (VAE, config.vae, vae, newer_vae_name),
        (empty_clip, config.text, text, clip_name),
    ):
        module = empty(kind, own, tensors.where)
        fill(module, tensors, device, dtype, rename=rename)
        parts.append(module)
    return Loaded(config.name, config, parts[0], parts[1], TextEncoder(parts[2], tokenizer, pad))


def empty(kind: Callable[..., nn.Module], config, where) -> nn.Module:
    """A network on the meta device. A config whose numbers make none is its file's fault: ValueError."""
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # torch raises many kinds, some of several lines
        raise ValueError(
            f"{where}: no network has these sizes: {(str(error) or repr(error)).splitlines()[0]}"
        ) from None


def find_vae(path: Path, dtype: torch.dtype) -> tuple[VAEConfig, Tensors]:
    """Another VAE: a diffusers folder (or a whole model's, which has one in vae/), or a file in either layout."""
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        return vae_config(folder / "config.json"), Tensors(folder, "diffusion_pytorch_model", dtype)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when opened: get the VAE's .safetensors version instead"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no VAE {path}: give a diffusers folder (config.json, ...) or a .safetensors file"
        )
    return vae_file(Tensors(path, "", dtype))


def read_tokenizer(folder: Path, config: TextConfig):
    from transformers import CLIPTokenizer

    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: a tokenizer is a folder with vocab.json and merges.txt"
        )
    if not (folder / "tokenizer.json").is_file() and not all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer: vocab.json or merges.txt is missing"
        )  # transformers would make an empty one
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here, some of several lines
        raise ValueError(
            f"{folder} cannot be read as a CLIP tokenizer: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder} is another model's tokenizer: it has {len(tokenizer)} tokens, the text encoder {config.vocab_size}"
        )
    return tokenizer


# --- configurations -------------------------------------------------------------------------------------------------


def per_level(value, levels: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else (value,) * levels


def checked(config, path: Path):
    """A config whose fields are of the kinds that their defaults are, and of sizes that a network can be made of in no time;
    ValueError for the first that is not."""
    for f in fields(config):
        value, many = getattr(config, f.name), isinstance(f.default, tuple)
        kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}[
            type(f.default[0] if many else f.default)
        ]
        most = 64 if "layers" in f.name else 10**6
        values = value if many else (value,)
        if len(values) > 16 or not all(
            type(x) in kinds and (isinstance(x, str) or 0 <= x <= most) for x in values
        ):  # nor NaN
            raise ValueError(
                f"{path}: {f.name} = {ascii(value)[:80]} is not what a Stable Diffusion model has there"
            )
    return config


def unet_config(path: Path) -> UNetConfig:
    """unet/config.json -> UNetConfig; ValueError for an architecture that is not Stable Diffusion 1.x or 2.x."""
    c = read_json(path)
    if c.get("addition_embed_type"):
        raise ValueError(
            f"{path}: this is an SDXL network (addition_embed_type); minsd loads Stable Diffusion 1.x and 2.x"
        )
    if c.get("in_channels", 4) == 9:
        raise ValueError(
            f"{path}: this is an inpainting network (9 input channels); minsd loads text-to-image models, with 4"
        )
    for key, fine in {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
        "time_cond_proj_dim": (None,),
        "dual_cross_attention": (None, False),
        "only_cross_attention": (None, False),
        "class_embeddings_concat": (None, False),
        "act_fn": (None, "silu", "swish"),
        "resnet_time_scale_shift": (None, "default"),
        "attention_type": (None, "default"),
        "time_embedding_type": (None, "positional"),
        "mid_block_type": (None, "UNetMidBlock2DCrossAttn"),
        "transformer_layers_per_block": (None, 1),
        "center_input_sample": (None, False),
        "cross_attention_norm": (None,),
        "conv_in_kernel": (None, 3),
        "conv_out_kernel": (None, 3),
        "flip_sin_to_cos": (None, True),
        "freq_shift": (None, 0),
        "downsample_padding": (None, 1),
        "mid_block_scale_factor": (None, 1),
    }.items():
        if c.get(key) not in fine:
            raise ValueError(
                f"{path}: {key} = {c[key]!r} is not an architecture of Stable Diffusion 1.x or 2.x"
            )
    try:
        down, up, widths = c["down_block_types"], c["up_block_types"], tuple(c["block_out_channels"])
        kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
        cross = tuple(kinds[kind] for kind in down)
        if tuple(kind == "CrossAttnUpBlock2D" for kind in reversed(up)) != cross or len(cross) != len(widths):
            raise ValueError(f"{path}: the ways down and up are not each other's mirror image")
        heads = c.get("num_attention_heads") or c.get(
            "attention_head_dim", 8
        )  # both mean the number of heads here
        size = c.get("sample_size") or 64
        config = checked(
            UNetConfig(
                in_channels=c.get("in_channels", 4),
                out_channels=c.get("out_channels", 4),
                block_out_channels=widths,
                layers_per_block=c.get("layers_per_block", 2),
                cross_attention=cross,
                num_heads=per_level(heads, len(widths)),
                context_dim=c["cross_attention_dim"],
                linear_projection=bool(c.get("use_linear_projection")),
                upcast_attention=bool(c.get("upcast_attention")),
                norm_groups=c.get("norm_num_groups", 32),
                norm_eps=c.get("norm_eps", 1e-5),
                sample_size=size if isinstance(size, int) else size[0],
            ),
            path,
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} does not describe a Stable Diffusion UNet: {error} is missing or not known"
        ) from None
    if len(config.num_heads) != len(widths) or any(
        n == 0 or width % n for n, width in zip(config.num_heads, widths)
    ):
        raise ValueError(f"{path}: {config.num_heads} heads do not divide the widths {widths}")
    return config


def vae_config(path: Path) -> VAEConfig:
    c = read_json(path)
    blocks = c.get("down_block_types", [])
    if (
        c.get("latent_channels", 4) != 4
        or not isinstance(blocks, list)
        or any(kind != "DownEncoderBlock2D" for kind in blocks)
    ):
        raise ValueError(
            f"{path} does not describe the VAE of a Stable Diffusion 1.x or 2.x (4 latent channels, DownEncoderBlock2D)"
        )
    if "block_out_channels" not in c:
        raise ValueError(f"{path} does not describe a VAE: block_out_channels is missing")
    if not isinstance(c["block_out_channels"], list):
        raise ValueError(f"{path}: block_out_channels must be a list")
    return checked(
        VAEConfig(
            block_out_channels=tuple(c["block_out_channels"]),
            layers_per_block=c.get("layers_per_block", 1),
            norm_groups=c.get("norm_num_groups", 32),
            scaling_factor=c.get("scaling_factor", 0.18215),
        ),
        path,
    )


def text_config(path: Path) -> TextConfig:
    c = {**read_json(path)}
    try:
        return checked(
            TextConfig(
                hidden_size=c["hidden_size"],
                intermediate_size=c["intermediate_size"],
                num_layers=c["num_hidden_layers"],
                num_heads=c["num_attention_heads"],
                vocab_size=c["vocab_size"],
                max_length=c.get("max_position_embeddings", 77),
                hidden_act=c.get("hidden_act", "quick_gelu"),
                pad_token_id=c.get("pad_token_id") or 0,
                eos_token_id=c.get("eos_token_id") or 0,
            ),
            path,
        )
    except KeyError as error:
        raise ValueError(f"{path} does not describe a CLIP text model: {error} is missing") from None


def schedule_config(path: Path) -> ScheduleConfig:
    c = read_json(path)
    if c.get("trained_betas") is not None:
        raise ValueError(
            f"{path}: trained_betas are not supported; minsd knows scaled_linear and linear betas"
        )
    if c.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"{path}: rescale_betas_zero_snr is not supported: minsd's samplers begin where some signal is left"
        )
    for key, known in {
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": ("leading", "linspace", "trailing"),
    }.items():
        if c.get(key) not in (None, *known):
            raise ValueError(f"{path}: {key} = {ascii(c[key])[:80]} is not known: {' or '.join(known)}")
    config = checked(
        ScheduleConfig(**{f.name: c[f.name] for f in fields(ScheduleConfig) if c.get(f.name) is not None}),
        path,
    )
    if not 0 < config.beta_start <= config.beta_end < 1 or not 1 <= config.num_train_timesteps <= 10**5:
        betas = f"betas from {config.beta_start} to {config.beta_end} in {config.num_train_timesteps} steps"
        raise ValueError(f"{path}: {betas} make no schedule")
    return config


def folder_config(folder: Path) -> ModelConfig:
    """The folder's own networks and schedule, with the defaults of the family they belong to."""
    unet, schedule = (
        unet_config(folder / "unet" / "config.json"),
        schedule_config(folder / "scheduler" / "scheduler_config.json"),
    )
    family = next(
        (
            row
            for row in reversed(MODELS.values())
            if row.unet == unet
            and (row.schedule.prediction_type, row.schedule.timestep_spacing)
            == (schedule.prediction_type, schedule.timestep_spacing)
        ),
        None,
    )
    row = family or ModelConfig(folder.resolve().name)
    # The family says how many steps and how much guidance; whose weights these are, the folder's name says.
    name = row.name if folder == SHAPES_FOLDER else folder.resolve().name
    return replace(
        row,
        name=name,
        unet=unet,
        schedule=schedule,
        vae=vae_config(folder / "vae" / "config.json"),
        text=text_config(folder / "text_encoder" / "config.json"),
    )


# --- modules --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(module: nn.Module, tensors: Tensors, device, dtype: torch.dtype, rename=lambda name: name) -> None:
    """Give each parameter its tensor, on `device` in `dtype`, frozen. What is on the meta device is put in place, mapped where
    the file has it in that dtype and it lies well; what has memory of its own (a part of a fused buffer) is written to."""
    parameters = dict(module.named_parameters())
    own = {rename(name): name for name in parameters}
    sources, twice = {}, []
    for name in tensors:
        new = rename(name)
        if new in sources:
            twice.append(name)
        elif new is not None:
            sources[new] = name
    missing, unexpected = own.keys() - sources.keys(), sources.keys() - own.keys()
    misshaped = []
    for key in own.keys() & sources.keys():
        wanted, there = tuple(parameters[own[key]].shape), tensors.shape(sources[key])
        if there != wanted and there != (
            *wanted,
            1,
            1,
        ):  # the VAE's attention was once made of 1x1 convolutions
            misshaped.append(f"{key} {there}, not {wanted}")
        elif tensors.dtype(sources[key]) not in ("F64", "F32", "F16", "BF16"):
            misshaped.append(f"{key} has dtype {tensors.dtype(sources[key])}")
    problems = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", misshaped),
            ("doubled", twice),
        )
        if names
    ]
    if problems:
        reason = guess(tensors.files) if isinstance(tensors, Tensors) else None
        raise ValueError(
            f"{tensors.where} does not fit its config: {'; '.join(problems)}"
            + (f": it {reason}" if reason else "")
        )
    for part in module.modules():
        if isinstance(part, Attention) and part.fused is None:
            part.fuse(device, dtype)
    parameters = dict(module.named_parameters())  # some are new now
    for key, name in own.items():
        tensor = tensors[sources[key]].reshape(parameters[name].shape)
        if parameters[name].is_meta:
            tensor = tensor.to(device, dtype, copy=not lies_well(tensor))
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            parameters[name].copy_(tensor)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):  # not in the files, and garbage after the meta device
            parent, _, leaf = name.rpartition(".")
            setattr(
                module.get_submodule(parent),
                leaf,
                torch.arange(buffer.shape[-1], device=device).expand(1, -1),
            )
    module.eval()
    assert not [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]


def empty_clip(config: TextConfig) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_length,
            hidden_act=config.hidden_act,
            eos_token_id=config.eos_token_id,
            bos_token_id=None,  # the tokenizer's business
        )
    )
