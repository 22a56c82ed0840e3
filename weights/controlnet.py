"""Loads ControlNets from files: diffusers folders, and single files with diffusers' names or in the
original layout (`control_model.*`), and control-loras.

The shapes of the tensors show widths, layers, and the levels with cross-attention, but not the
number of attention heads. That number is read from the config.json beside the weights. Without a
config.json, the number is that of the model family (`minsd.config.MODELS`) with the same level
widths and the same width of text states, or 8 if no family has these widths.

A control-lora (the format of Stability AI and ComfyUI) holds a ControlNet as its difference from
the UNet of the model that it is used with. The file contains an empty tensor `lora_controlnet`. It
contains the difference of a weight as two low-rank factors, `LAYER.up` and `LAYER.down`, and other
tensors as they are. Weights that are not in the file are the UNet's own.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minsd.config import UNetConfig
from minsd.controlnet import ControlNet
from minsd.graphs import use_graphs
from minsd.unet import UNet
from minsd.weights.ldm_keys import controlnet_name
from minsd.weights.load import check_heads, checked, empty, fill, heads_per_level
from minsd.weights.safetensors_file import RenamedTensors, Tensors, guess, read_json, refuse_pickle
from minsd.weights.single_file import count, pairs, sizes, unet_of


def load_controlnet(
    path: str | Path, *, device: torch.device | str, dtype: torch.dtype, unet: UNet | None = None
) -> ControlNet:
    """Loads a ControlNet of Stable Diffusion 1.x, 2.x or XL from `path`, a ControlNet's folder in
    the diffusers layout or a .safetensors file. The parameters of the result are frozen, on
    `device`, and of type `dtype`. `unet` is the UNet of the model that the ControlNet will be used
    with; only control-loras need it.

    Raises FileNotFoundError if a file is missing. Raises ValueError if the file is a pickle, is
    malformed, or holds no complete ControlNet, and for a control-lora without a `unet`. The error
    message is one line.
    """
    path = Path(path)
    refuse_pickle(path, "ControlNet")
    if not path.exists():
        raise FileNotFoundError(
            f"there is no ControlNet {path}: give a diffusers folder (config.json, ...) or a"
            " .safetensors file"
        )
    file = Tensors(path, "diffusion_pytorch_model", dtype)
    config = None
    if "lora_controlnet" not in file:
        tensors = RenamedTensors(file, "the ControlNet", pairs(file, "", _rename))
    elif unet is None:
        raise ValueError(f"{path} is a control-lora, a difference from a UNet: give that too (unet=sd.unet)")
    else:
        tensors = ControlLora(file, unet)
        config = unet.config
    if "controlnet_mid_block.weight" not in tensors:
        reason = guess(file) or "has none of its tensors (controlnet_mid_block, middle_block_out)"
        raise ValueError(f"{path} is not a ControlNet: it {reason}")
    config = config or unet_of(tensors)
    hidden = hidden_of(tensors)
    bgr = False
    if path.is_dir() and (path / "config.json").is_file():
        config, bgr = with_config_json(config, path / "config.json")
    net = empty(lambda config: ControlNet(config, hidden, bgr), config, path)
    device = torch.device(device)
    fill(net, tensors, device, dtype)
    if device.type == "cuda":  # as `minsd.load` does for the UNet
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        use_graphs(net)
    return net


def _rename(name: str) -> list[str]:
    """Translates the name that a tensor has in a ControlNet's file into minsd's name. Returns a
    list, as `pairs` needs it: its only item is the new name. The list is empty if the tensor is not
    part of the ControlNet."""
    new = controlnet_name(name)
    return [new] if new else []


class ControlLora(RenamedTensors):
    """A mapping of name -> tensor of a ControlNet. The tensors are computed from those of a
    control-lora and of the UNet, when they are read."""

    def __init__(self, file: Tensors, unet: UNet):
        """Finds the source of each tensor. Raises ValueError if a factor lacks its counterpart or
        does not fit it."""
        skipped = ("up_blocks.", "conv_norm_out.", "conv_out.")  # the decoder half
        self.own = {name: weight for name, weight in unet.named_parameters() if not name.startswith(skipped)}
        self.layers: dict[str, str] = {}  # name of a weight -> name of its layer in the file
        whole = []
        for name in file:
            layer, _, part = name.rpartition(".")
            if part not in ("up", "down"):
                whole += [name] if name != "lora_controlnet" else []
                continue
            shapes = [file.shape(f"{layer}.{one}") for one in ("up", "down") if f"{layer}.{one}" in file]
            whole_pair = len(shapes) == 2 and min(map(len, shapes)) >= 2
            if not whole_pair or shapes[0][1:] != (shapes[1][0], *[1] * (len(shapes[0]) - 2)):
                raise ValueError(f"{file.where} is not a whole control-lora: {layer}.up and .down do not fit")
            self.layers[controlnet_name(f"{layer}.weight") or name] = layer
        super().__init__(file, "with this model's UNet, the control-lora", pairs(whole, "", _rename))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.names:
            return super().__getitem__(name)
        weight = self.own[name].detach()
        if name not in self.layers:
            return weight.clone()  # an adapter may change the UNet's own weight later
        up, down = (self.tensors[f"{self.layers[name]}.{one}"].to(weight.device) for one in ("up", "down"))
        return weight.float() + (up.float().flatten(1) @ down.float().flatten(1)).reshape(weight.shape)

    def copy_to(self, target: torch.Tensor, name: str) -> None:
        target.copy_(self[name].reshape(target.shape))

    def __iter__(self) -> Iterator[str]:
        return iter({**self.own, **self.layers, **self.names})

    def __len__(self) -> int:
        return len({**self.own, **self.layers, **self.names})

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.names:
            return super().shape(name)
        if name not in self.layers:
            return tuple(self.own[name].shape)
        up, down = (self.tensors.shape(f"{self.layers[name]}.{one}") for one in ("up", "down"))
        return up[0], *down[1:]

    def dtype(self, name: str) -> str:
        return super().dtype(name) if name in self.names else "F32"


def hidden_of(tensors: RenamedTensors) -> tuple[int, ...]:
    """Reads the channel counts of the small network that embeds a ControlNet's control image.
    `tensors` are all tensors of the ControlNet. Returns one channel count for each resolution of
    that network, the finest first. Raises ValueError if a tensor of the network is missing or a
    channel count is impossible."""
    embedding = "controlnet_cond_embedding"

    def read() -> dict[str, Any]:
        halving = range(1, min(count(tensors, rf"{embedding}\.blocks\.(\d{{1,4}})\."), 16), 2)
        layers = ["conv_in", *(f"blocks.{i}" for i in halving)]
        return {"hidden": tuple(tensors.shape(f"{embedding}.{layer}.weight")[0] for layer in layers)}

    return sizes(read, tensors.where)["hidden"]


def with_config_json(config: UNetConfig, path: Path) -> tuple[UNetConfig, bool]:
    """Completes `config`, which was derived from the tensor shapes of a ControlNet. The settings
    that shapes do not show (attention heads, norms, upcasting of attention) are read from the
    ControlNet's config.json at `path`. Returns (config, bgr): the completed config, and True if the
    ControlNet takes control images in BGR channel order. Raises ValueError if config.json describes
    a network other than a ControlNet, or if minsd does not support one of its settings."""
    c = read_json(path)
    if c.get("_class_name", "ControlNetModel") != "ControlNetModel":
        kind = ascii(c["_class_name"])[:80]
        raise ValueError(f"{path} describes a {kind}; minsd takes ControlNets (ControlNetModel)")
    kinds = {"addition_embed_type": "text_time"}  # SDXL
    for key in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "global_pool_conditions"):
        if c.get(key) and c[key] != kinds.get(key):
            value = ascii(c[key])[:80]
            raise ValueError(f"{path}: {key} = {value} is a kind of ControlNet that minsd does not know")
    if c.get("conditioning_channels", 3) != 3:
        raise ValueError(
            f"{path}: control images of {ascii(c['conditioning_channels'])[:80]} channels are not supported,"
            " only of 3"
        )
    config = replace(
        config,
        num_heads=heads_per_level(c, len(config.block_out_channels)),
        norm_groups=c.get("norm_num_groups", 32),
        norm_eps=c.get("norm_eps", 1e-5),
        upcast_attention=bool(c.get("upcast_attention")),
    )
    bgr = c.get("controlnet_conditioning_channel_order", "rgb") == "bgr"
    return check_heads(checked(config, path), path), bgr
