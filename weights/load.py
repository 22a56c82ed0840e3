"""From files to modules: strict, frozen, at low peak memory.

Networks are made on the meta device, where parameters have shapes and no memory, and every tensor of the file is put in
its place straight from the mapped file, cast one at a time. Every parameter is filled by exactly one tensor of its
shape, or the load fails and says which were not, with a guess at the reason. File headers are checked before anything
is mapped (https://huggingface.co/docs/safetensors, "Format"): a hostile file is refused, never executed.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from minsd.attention import Attention
from minsd.config import MODELS, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from minsd.text import TextEncoder
from minsd.unet import UNet
from minsd.vae import VAE

SHAPES_FOLDER = Path(__file__).parent / "shapes"
MAX_HEADER = 100 * 2**20  # bytes; the format's own limit
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


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


def load_model(model: str, *, device: torch.device, dtype: torch.dtype) -> Loaded:
    """A model by name or path, frozen, on `device` in `dtype`.

    ValueError or FileNotFoundError, each in one line, for what is not there or cannot be loaded.
    """
    path = SHAPES_FOLDER if model == "shapes" else Path(model)
    if path.is_dir():
        return load_folder(path, device=device, dtype=dtype)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(
            f"{model} is a pickle, which can run code when opened: get the model's .safetensors version instead"
        )
    if path.is_file():
        names = read_header(path)
        raise ValueError(f"{model} {guess(names) or 'is a single file'}: give a folder in the diffusers layout (with model_index.json)")
    known = ", ".join(MODELS)
    if model in MODELS or (model.count("/") == 1 and not model.startswith(".")):
        raise FileNotFoundError(f"no folder {model} here: download the model and give its folder (model_index.json, unet/, vae/, ...)")
    raise FileNotFoundError(f"there is no model {model!r}: give a folder in the diffusers layout, or one of {known}")


def load_folder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Loaded:
    """A folder in the diffusers layout: model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/."""
    from transformers import CLIPTokenizer

    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name", "StableDiffusionPipeline")
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"{folder} holds a {kind}; minsd loads Stable Diffusion 1.x and 2.x (StableDiffusionPipeline)")
    config, notes = folder_config(folder), []

    with torch.device("meta"):
        unet, vae = UNet(config.unet), VAE(config.vae)
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fuse(device, dtype)
    fill(unet, Tensors(folder / "unet", "diffusion_pytorch_model", dtype), device, dtype)
    fill(vae, Tensors(folder / "vae", "diffusion_pytorch_model", dtype), device, dtype, rename=vae_name)

    clip = empty_clip(config.text)
    fill(clip, Tensors(folder / "text_encoder", "model", dtype), device, dtype, rename=clip_name)
    if not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(f"{folder / 'tokenizer'} is missing: a diffusers folder has its tokenizer there (vocab.json, merges.txt)")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # transformers raises many kinds here, some of several lines
        raise ValueError(f"{folder / 'tokenizer'} cannot be read as a CLIP tokenizer: {str(error).splitlines()[0]}") from error
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.text.pad_token_id
    return Loaded(config.name, config, unet, vae, TextEncoder(clip, tokenizer, pad), notes)


# --- configurations -------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: is {path.parent} a folder in the diffusers layout?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def per_level(value, levels: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else (value,) * levels


def unet_config(path: Path) -> UNetConfig:
    """unet/config.json -> UNetConfig; ValueError for an architecture that is not Stable Diffusion 1.x or 2.x."""
    c = read_json(path)
    if c.get("addition_embed_type"):
        raise ValueError(f"{path}: this is an SDXL network (addition_embed_type); minsd loads Stable Diffusion 1.x and 2.x")
    if c.get("in_channels", 4) == 9:
        raise ValueError(f"{path}: this is an inpainting network (9 input channels); minsd loads text-to-image models, with 4")
    for key, fine in {
        "class_embed_type": (None,), "num_class_embeds": (None,), "encoder_hid_dim_type": (None,), "time_cond_proj_dim": (None,),
        "dual_cross_attention": (None, False), "only_cross_attention": (None, False), "class_embeddings_concat": (None, False),
        "act_fn": (None, "silu", "swish"), "resnet_time_scale_shift": (None, "default"), "attention_type": (None, "default"),
        "time_embedding_type": (None, "positional"), "mid_block_type": (None, "UNetMidBlock2DCrossAttn"),
        "transformer_layers_per_block": (None, 1), "center_input_sample": (None, False), "cross_attention_norm": (None,),
        "conv_in_kernel": (None, 3), "conv_out_kernel": (None, 3),
    }.items():
        if c.get(key) not in fine:
            raise ValueError(f"{path}: {key} = {c[key]!r} is not an architecture of Stable Diffusion 1.x or 2.x")
    try:
        down, up, widths = c["down_block_types"], c["up_block_types"], tuple(c["block_out_channels"])
        kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
        cross = tuple(kinds[kind] for kind in down)
        if tuple(kind == "CrossAttnUpBlock2D" for kind in reversed(up)) != cross or len(cross) != len(widths):
            raise ValueError(f"{path}: the ways down and up are not each other's mirror image")
        heads = c.get("num_attention_heads") or c.get("attention_head_dim", 8)  # both mean the number of heads here
        size = c.get("sample_size") or 64
        return UNetConfig(
            in_channels=c.get("in_channels", 4), out_channels=c.get("out_channels", 4), block_out_channels=widths,
            layers_per_block=c.get("layers_per_block", 2), cross_attention=cross, num_heads=per_level(heads, len(widths)),
            context_dim=c["cross_attention_dim"], linear_projection=bool(c.get("use_linear_projection")),
            upcast_attention=bool(c.get("upcast_attention")), norm_groups=c.get("norm_num_groups", 32),
            norm_eps=c.get("norm_eps", 1e-5), sample_size=size if isinstance(size, int) else size[0],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a Stable Diffusion UNet: {error} is missing or not known") from None


def vae_config(path: Path) -> VAEConfig:
    c = read_json(path)
    if c.get("latent_channels", 4) != 4 or any(kind != "DownEncoderBlock2D" for kind in c.get("down_block_types", [])):
        raise ValueError(f"{path} does not describe the VAE of a Stable Diffusion 1.x or 2.x (4 latent channels, DownEncoderBlock2D)")
    if "block_out_channels" not in c:
        raise ValueError(f"{path} does not describe a VAE: block_out_channels is missing")
    return VAEConfig(
        block_out_channels=tuple(c["block_out_channels"]), layers_per_block=c.get("layers_per_block", 1),
        norm_groups=c.get("norm_num_groups", 32), scaling_factor=c.get("scaling_factor", 0.18215),
    )


def text_config(path: Path) -> TextConfig:
    c = {**read_json(path)}
    try:
        return TextConfig(
            hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"], num_layers=c["num_hidden_layers"],
            num_heads=c["num_attention_heads"], vocab_size=c["vocab_size"], max_length=c.get("max_position_embeddings", 77),
            hidden_act=c.get("hidden_act", "quick_gelu"), pad_token_id=c.get("pad_token_id", 1), eos_token_id=c.get("eos_token_id", 2),
        )
    except KeyError as error:
        raise ValueError(f"{path} does not describe a CLIP text model: {error} is missing") from None


def schedule_config(path: Path) -> ScheduleConfig:
    c = read_json(path)
    if c.get("trained_betas") is not None:
        raise ValueError(f"{path}: trained_betas are not supported; minsd knows scaled_linear and linear betas")
    return ScheduleConfig(**{f.name: c[f.name] for f in fields(ScheduleConfig) if c.get(f.name) is not None})


def folder_config(folder: Path) -> ModelConfig:
    """The folder's own networks and schedule, with the defaults of the family they belong to."""
    unet, schedule = unet_config(folder / "unet" / "config.json"), schedule_config(folder / "scheduler" / "scheduler_config.json")
    family = next(
        (row for row in reversed(MODELS.values()) if row.unet == unet and (row.schedule.prediction_type, row.schedule.timestep_spacing)
         == (schedule.prediction_type, schedule.timestep_spacing)), None
    )
    row = family or ModelConfig(folder.resolve().name)
    # The family says how many steps and how much guidance; whose weights these are, the folder's name says.
    name = row.name if folder == SHAPES_FOLDER else folder.resolve().name
    return replace(
        row, name=name, unet=unet, schedule=schedule, vae=vae_config(folder / "vae" / "config.json"),
        text=text_config(folder / "text_encoder" / "config.json"),
    )


# --- tensors --------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, dict]:
    """A safetensors file's header, checked to the byte: name -> {"dtype", "shape", "data_offsets"}."""

    def refuse(why):
        raise ValueError(f"{path} is not a sound safetensors file: {why}; download it again")

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            refuse("it is shorter than a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, MAX_HEADER):
            refuse(f"its header claims {length} bytes, the file has {size} (truncated, or another format?)")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            refuse("its header is not JSON")
    if not isinstance(header, dict):
        refuse("its header is not a JSON object")
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            refuse(f"the entry of {name!r} is malformed")
        if dtype not in ITEM_SIZE or not whole:
            refuse(f"the entry of {name!r} is malformed (dtype {dtype!r})")
        if end - begin != math.prod(shape) * ITEM_SIZE[dtype]:
            refuse(f"{name!r} has {end - begin} bytes, which its shape {shape} in {dtype} does not fill")
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            refuse("its tensors overlap or leave gaps")
        position = end
    if position != size - 8 - length:
        refuse(f"it should hold {position} bytes of tensors and holds {size - 8 - length} (truncated?)")
    return header


class Tensors(Mapping):
    """Tensors by name out of one component's safetensors file or shards: `tensors[name]` maps, and reads nothing before."""

    def __init__(self, folder: Path, stem: str, dtype: torch.dtype):
        self.where, self.files = folder, {}
        for path in self._choose(folder, stem, dtype):
            header = read_header(path)
            if twice := self.files.keys() & header.keys():
                raise ValueError(f"{path} repeats the tensor {min(twice)!r} of another shard")
            self.files |= {name: (path, entry) for name, entry in header.items()}
        self.open = {}

    @staticmethod
    def _choose(folder: Path, stem: str, dtype: torch.dtype) -> list[Path]:
        variants = ["", ".fp16"] if dtype == torch.float32 else [".fp16", ""]  # the nearer precision first
        for variant in variants:
            if (one := folder / f"{stem}{variant}.safetensors").is_file():
                return [one]
            if (index := folder / f"{stem}.safetensors.index{variant}.json").is_file():
                shards = read_json(index).get("weight_map")
                if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                    raise ValueError(f"{index} has no weight_map of file names")
                paths = [folder / Path(name).name for name in sorted(set(shards.values()))]
                for path in paths:
                    if not path.is_file():
                        raise FileNotFoundError(f"{path} is missing: {index.name} lists it as a part of the model")
                return paths
        pickles = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".ckpt", ".pt")] if folder.is_dir() else []
        if pickles:
            raise ValueError(
                f"{folder} has only {pickles[0]}, a pickle, which can run code when opened: get the model's {stem}.safetensors"
            )
        raise FileNotFoundError(f"{folder / stem}.safetensors is missing (nor is there an fp16 variant, nor shards)")

    def __getitem__(self, name: str) -> torch.Tensor:
        path, _ = self.files[name]
        if path not in self.open:
            self.open[path] = safe_open(path, framework="pt", device="cpu")
        return self.open[path].get_tensor(name)

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name][1]["shape"])

    def dtype(self, name: str) -> str:
        return self.files[name][1]["dtype"]


def vae_name(name: str) -> str:
    """The VAE's attention was once named otherwise (the files of SD1.x still are)."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def clip_name(name: str) -> str | None:
    """Some versions of transformers put a prefix before every name; some wrote out a buffer of position numbers."""
    return None if name.endswith("position_ids") else name.removeprefix("text_model.")


@torch.no_grad()
def fill(module: nn.Module, tensors: Tensors, device, dtype: torch.dtype, rename=lambda name: name) -> None:
    """Give each parameter its tensor, on `device` in `dtype`, frozen. What is on the meta device is put in place, mapped
    where the file has the dtype already; what has memory of its own (a part of a fused buffer) is written to."""
    own = {rename(name): name for name, _ in module.named_parameters()}
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
        wanted, there = tuple(module.get_parameter(own[key]).shape), tensors.shape(sources[key])
        if there != wanted and there != (*wanted, 1, 1):  # the VAE's attention was once made of 1x1 convolutions
            misshaped.append(f"{key} {there}, not {wanted}")
        elif tensors.dtype(sources[key]) not in ("F64", "F32", "F16", "BF16"):
            misshaped.append(f"{key} has dtype {tensors.dtype(sources[key])}")
    problems = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped), ("doubled", twice)) if names
    ]
    if problems:
        reason = guess(tensors.files)
        raise ValueError(f"{tensors.where} does not fit its config: {'; '.join(problems)}" + (f": it {reason}" if reason else ""))
    for key, name in own.items():
        tensor, parameter = tensors[sources[key]], module.get_parameter(name)
        if parameter.is_meta:
            tensor = tensor.to(device, dtype).reshape(parameter.shape)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            parameter.copy_(tensor.reshape(parameter.shape))
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):  # not in the files, and garbage after the meta device
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, torch.arange(buffer.shape[-1], device=device).expand(1, -1))
    module.eval()
    assert not [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]


def empty_clip(config: TextConfig) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_length, hidden_act=config.hidden_act, eos_token_id=config.eos_token_id,
            bos_token_id=None,  # the tokenizer's business
        ))


def guess(names: Iterable[str]) -> str | None:
    """What a set of tensor names probably is, when it is not what was asked for."""
    names = dict.fromkeys(names)
    for sign, what in {
        "conditioner.embedders": "looks like an SDXL checkpoint", "add_embedding.": "looks like an SDXL network",
        "double_blocks.": "looks like a Flux checkpoint", "joint_blocks.": "looks like an SD3 checkpoint",
        "lora": "looks like a LoRA, which adapts a model and is not one",
        "control_model.": "looks like a ControlNet", "controlnet_": "looks like a ControlNet",
        "model.diffusion_model.": "is a single-file checkpoint in the original layout",
        "first_stage_model.": "looks like a VAE alone", "decoder.conv_in": "looks like a VAE alone",
    }.items():
        if any(sign in name for name in names):
            return what
    return None
