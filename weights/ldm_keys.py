"""Names of the original single-file checkpoints -> the names of our modules.

Before diffusers there was one file with everything: `model.diffusion_model.` (the UNet), `first_stage_model.` (the VAE)
and the text encoder, which is transformers' CLIP in SD1.x (`cond_stage_model.transformer.`) and OpenCLIP in SD2.x
(`cond_stage_model.model.`). The networks are the same; only how their parts are counted differs. These are functions of
names alone: what is no name of theirs comes back as it is, and is then found to be unexpected by whoever fills a module.
"""

import re

UNET, VAE, CLIP, OPEN_CLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)

# What training left behind: averaged weights (trainers keep their own copy; the plain ones are what everybody runs) and
# the noise schedule's tables, which minsd computes itself.
_LEFT_BEHIND = re.compile(
    r"model_ema\.|(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar|scale_factor|global_step)$"
    r"|cond_stage_model\.(logit_scale|text_projection)$"
)


def left_behind(name: str) -> bool:
    return _LEFT_BEHIND.match(name) is not None


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def resnet_name(name: str) -> str:
    """A part of one of the UNet's residual blocks."""
    part, _, leaf = name.rpartition(".")
    return f"{_RESNET.get(part, part)}.{leaf}"


def unet_name(name: str, layers: int) -> str:
    """A name inside the UNet, whose levels have `layers` residual blocks on the way down and one more on the way up.

    The original counts every layer of all levels in one row, what moves to the next level included.
    """
    m = re.fullmatch(r"(time_embed|input_blocks|middle_block|output_blocks|out)\.(\d+)\.(.+)", name)
    if not m:
        return name
    part, i, rest = m[1], int(m[2]), m[3]
    if part == "time_embed":  # linear, activation, linear
        return f"time_embedding.linear_{1 + i // 2}.{rest}"
    if part == "out":  # norm, activation, convolution
        return f"{'conv_out' if i else 'conv_norm_out'}.{rest}"
    if part == "middle_block":
        return "mid_block." + (f"attentions.0.{rest}" if i == 1 else f"resnets.{i // 2}.{resnet_name(rest)}")
    which, _, rest = rest.partition(".")
    if part == "input_blocks":
        if i == 0:
            return f"conv_in.{rest}"
        level, layer = divmod(i - 1, layers + 1)
        block = f"down_blocks.{level}"
        if rest.startswith("op."):
            return f"{block}.downsamplers.0.conv.{rest[3:]}"
    else:
        level, layer = divmod(i, layers + 1)  # coarsest first, as in our up_blocks
        block = f"up_blocks.{level}"
        if rest.startswith("conv."):
            return f"{block}.upsamplers.0.{rest}"
    return (
        f"{block}.attentions.{layer}.{rest}"
        if which == "1"
        else f"{block}.resnets.{layer}.{resnet_name(rest)}"
    )


_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def vae_name(name: str, levels: int) -> str:
    """A name inside the VAE. The original counts the decoder's `levels` from the finest, ours in the order they run."""
    name = name.replace(".norm_out.", ".conv_norm_out.").replace(".nin_shortcut.", ".conv_shortcut.")
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", name):
        return f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}.{m[3]}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(\w+)", name):
        return f"{m[1]}.mid_block.attentions.0.{_VAE_ATTENTION.get(m[2], m[2])}.{m[3]}"
    if m := re.fullmatch(r"encoder\.down\.(\d+)\.(.+)", name):
        block, rest = f"encoder.down_blocks.{m[1]}", m[2]
    elif m := re.fullmatch(r"decoder\.up\.(\d+)\.(.+)", name):
        block, rest = f"decoder.up_blocks.{levels - 1 - int(m[1])}", m[2]
    else:
        return name
    return f"{block}." + re.sub(
        r"^block\.", "resnets.", re.sub(r"^(down|up)sample\.", r"\1samplers.0.", rest)
    )


_OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def open_clip_names(name: str, layers: int) -> list[str]:
    """What a tensor of OpenCLIP's text half is in transformers' CLIPTextModel (without its `text_model.`).

    Three names where it is the fused projection, whose rows are those of q, then k, then v. None where it is not used: SD2
    takes the text states after the first `layers` layers and their final norm, and no projection into the space of pictures.
    """
    if name in ("text_projection", "logit_scale", "attn_mask"):
        return []
    if name in _OPEN_CLIP_ENDS:
        return [_OPEN_CLIP_ENDS[name]]
    m = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)(?:\.|_(?=weight$|bias$))(weight|bias)", name)
    if not m:
        return [name]
    i, part, leaf = m.groups()
    if int(i) >= layers:
        return []
    if part == "attn.in_proj":
        return [f"encoder.layers.{i}.self_attn.{x}_proj.{leaf}" for x in "qkv"]
    return [f"encoder.layers.{i}.{_OPEN_CLIP.get(part, part)}.{leaf}"]


# --- names that changed within the diffusers layout ------------------------------------------------------------------


def newer_vae_name(name: str) -> str:
    """The VAE's attention was once named otherwise (the files of SD1.x still are)."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def clip_name(name: str) -> str | None:
    """Some versions of transformers put a prefix before every name; some wrote out a buffer of position numbers."""
    return None if name.endswith("position_ids") else name.removeprefix("text_model.")
