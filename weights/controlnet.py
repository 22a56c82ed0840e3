"""ControlNets from files: diffusers folders, single files with diffusers' names, and the original layout (`control_model.*`).

What a network is, its tensors' shapes say: widths, layers, where it looks at the text. The number of heads they do not
say; it is the family's, told from the width of the text states, or that of the config.json beside the weights.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch

from minsd.attention import Attention
from minsd.config import MODELS, UNetConfig
from minsd.controlnet import ControlNet
from minsd.weights.load import Tensors, fill, guess, per_level, read_json


class File(Tensors):
    """The tensors of one file, or of a folder's `diffusion_pytorch_model`."""

    @staticmethod
    def _choose(path: Path, stem: str, dtype: torch.dtype) -> list[Path]:
        return [path] if path.is_file() else Tensors._choose(path, stem, dtype)


def load_controlnet(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> ControlNet:
    """A ControlNet of Stable Diffusion 1.x or 2.x, frozen, on `device` in `dtype`.

    ValueError or FileNotFoundError, each in one line, for what is not there or is something else.
    """
    path, device = Path(path), torch.device(device)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(
            f"{path} is a pickle, which can run code when opened: get the ControlNet's .safetensors version instead"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"there is no ControlNet {path}: give a diffusers folder (config.json, ...) or a .safetensors file"
        )
    tensors = File(path, "diffusion_pytorch_model", dtype)
    old = {new: name for name in tensors if (new := new_name(name)) is not None}
    if "controlnet_mid_block.weight" not in old:
        reason = guess(tensors) or "has none of its tensors (controlnet_mid_block, middle_block_out)"
        raise ValueError(f"{path} is not a ControlNet: it {reason}")
    shapes = {new: tensors.shape(name) for new, name in old.items()}
    (config, hidden), bgr = config_of(shapes, path), False
    if path.is_dir() and (path / "config.json").is_file():
        config, bgr = refine(config, path / "config.json")
    with torch.device("meta"):
        net = ControlNet(config, hidden, bgr)
    for module in net.modules():
        if isinstance(module, Attention):
            module.fuse(device, dtype)
    fill(net, tensors, device, dtype, rename=new_name)
    return net


def config_of(shapes: dict[str, tuple[int, ...]], path: Path) -> tuple[UNetConfig, tuple[int, ...]]:
    """What tensors of these names and shapes make up -> (config, channels inside the embedding of control images)."""

    def count(pattern):
        return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)

    try:
        levels = range(count(r"down_blocks\.(\d+)\."))
        widths = tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels)
        cross = tuple(f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in levels)
        middle = "mid_block.attentions.0."
        context_dim = shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1]
        hidden = [shapes["controlnet_cond_embedding.conv_in.weight"][0]]
        hidden += [
            shapes[f"controlnet_cond_embedding.blocks.{i}.weight"][0]
            for i in range(1, count(r"controlnet_cond_embedding\.blocks\.(\d+)\."), 2)
        ]
        in_channels, linear = shapes["conv_in.weight"][1], len(shapes[f"{middle}proj_in.weight"]) == 2
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{path} is not a whole ControlNet of Stable Diffusion 1.x or 2.x: {error} is missing"
        ) from None
    families = (row.unet for row in MODELS.values())
    family = next(
        (unet for unet in families if (unet.block_out_channels, unet.context_dim) == (widths, context_dim)),
        None,
    )
    if "add_embedding.linear_1.weight" in shapes or (family is None and widths == (320, 640, 1280)):
        raise ValueError(
            f"{path} is a ControlNet for SDXL; minsd takes those of Stable Diffusion 1.x and 2.x"
        )
    family = family or UNetConfig(num_heads=(8,) * len(widths))
    config = replace(
        family,
        in_channels=in_channels,
        block_out_channels=widths,
        layers_per_block=count(r"down_blocks\.0\.resnets\.(\d+)\."),
        cross_attention=cross,
        context_dim=context_dim,
        linear_projection=linear,
    )
    return config, tuple(hidden)


def refine(config: UNetConfig, path: Path) -> tuple[UNetConfig, bool]:
    """What config.json says beyond the shapes -> (config, whether control images were in bgr order)."""
    c = read_json(path)
    if c.get("_class_name", "ControlNetModel") != "ControlNetModel":
        raise ValueError(f"{path} describes a {c['_class_name']}; minsd takes ControlNets (ControlNetModel)")
    for key in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "global_pool_conditions"):
        if c.get(key):
            raise ValueError(f"{path}: {key} = {c[key]!r} is a kind of ControlNet that minsd does not know")
    if c.get("conditioning_channels", 3) != 3:
        raise ValueError(
            f"{path}: control images of {c['conditioning_channels']} channels are not supported, only of 3"
        )
    heads = c.get("num_attention_heads") or c.get(
        "attention_head_dim", 8
    )  # both mean the number of heads here
    config = replace(
        config,
        num_heads=per_level(heads, len(config.block_out_channels)),
        norm_groups=c.get("norm_num_groups", 32),
        norm_eps=c.get("norm_eps", 1e-5),
        upcast_attention=bool(c.get("upcast_attention")),
    )
    return config, c.get("controlnet_conditioning_channel_order", "rgb") == "bgr"


# --- names of the original layout -------------------------------------------------------------------------------------

_PARTS = {  # of a residual block
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_LAYERS = 2  # per block, in every network of that layout


def new_name(name: str) -> str | None:
    """A tensor's name in diffusers' layout; None for what is no part of the ControlNet (the original files hold whole models)."""
    original = name.startswith("control_model.")
    name = name.removeprefix("control_model.")
    if not original and name.startswith(("model.", "first_stage_model.", "cond_stage_model.", "model_ema.")):
        return None
    if m := re.fullmatch(r"time_embed\.([02])\.(\w+)", name):
        return f"time_embedding.linear_{1 + int(m[1]) // 2}.{m[2]}"
    if m := re.fullmatch(r"zero_convs\.(\d+)\.0\.(\w+)", name):
        return f"controlnet_down_blocks.{m[1]}.{m[2]}"
    if m := re.fullmatch(r"middle_block_out\.0\.(\w+)", name):
        return f"controlnet_mid_block.{m[1]}"
    if m := re.fullmatch(r"input_hint_block\.(\d+)\.(\w+)", name):  # every other layer is an activation
        i = int(m[1]) // 2
        layer = "conv_in" if i == 0 else "conv_out" if i == 7 else f"blocks.{i - 1}"
        return f"controlnet_cond_embedding.{layer}.{m[2]}"
    if m := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        return "mid_block." + (
            f"attentions.0.{m[2]}" if m[1] == "1" else f"resnets.{int(m[1]) // 2}.{_part(m[2])}"
        )
    if m := re.fullmatch(r"input_blocks\.(\d+)\.([01])\.(.+)", name):
        i, rest = int(m[1]) - 1, m[3]
        if i < 0:
            return f"conv_in.{rest}"
        block, layer = divmod(i, _LAYERS + 1)  # each level's layers, then its downsampling
        if m[2] == "1":
            return f"down_blocks.{block}.attentions.{layer}.{rest}"
        if rest.startswith("op."):
            return f"down_blocks.{block}.downsamplers.0.conv.{rest[3:]}"
        return f"down_blocks.{block}.resnets.{layer}.{_part(rest)}"
    return name


def _part(name: str) -> str:
    part, _, leaf = name.rpartition(".")
    return f"{_PARTS.get(part, part)}.{leaf}"
