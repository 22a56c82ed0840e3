"""Translates tensor names of the original (LDM) single-file checkpoints into the names of our
modules.

Before diffusers one file held everything: `model.diffusion_model.` (the UNet), `first_stage_model.`
(the VAE) and the text encoder, which is transformers' CLIP in SD1.x
(`cond_stage_model.transformer.`) and OpenCLIP in SD2.x (`cond_stage_model.model.`). SDXL has both
(`conditioner.embedders.0.transformer.` and `.1.model.`). ControlNets are in `control_model.`. The
networks are the same as ours, but their layers are numbered differently. The functions of this
module look at names alone. They return a name that is not of the original layout unchanged, and
`load.fill` then reports that name as unexpected.
"""

import re

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
XL_CLIP = "conditioner.embedders.0.transformer."
XL_OPEN_CLIP = "conditioner.embedders.1.model."
CONTROL = "control_model."

# Tensors that training leaves in a file: averaged weights (all programs run the plain ones) and the
# tables of the noise schedule, which minsd computes itself.
_LEFT_BEHIND = re.compile(
    r"model_ema\.|(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar"
    r"|scale_factor|global_step)$|cond_stage_model\.(logit_scale|text_projection)$|denoiser\.sigmas$"
)


def left_behind(name: str) -> bool:
    """Returns whether a checkpoint's tensor is a remnant of training that minsd does not need."""
    return _LEFT_BEHIND.match(name) is not None


# --- the UNet, and ControlNets, which are copies of its encoder half ------------------------------

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def resnet_name(name: str) -> str:
    """Translates a name inside one of the UNet's residual blocks from the original (LDM) layout
    into ours."""
    part, _, leaf = name.rpartition(".")
    return f"{_RESNET.get(part, part)}.{leaf}"


def unet_name(name: str, layers: int) -> str:
    """Translates a UNet parameter name, given without the prefix `model.diffusion_model.`, from the
    original (LDM) layout into ours.

    `layers` is the number of residual blocks per level in the encoder half; the decoder half has
    one more per level. The original layout numbers the layers of all levels in one sequence, which
    includes the downsampling layers. A name of another form is returned unchanged.
    """
    if m := re.fullmatch(r"label_emb\.0\.(\d+)\.(.+)", name):  # SDXL: linear, activation, linear
        return f"add_embedding.linear_{1 + int(m[1]) // 2}.{m[2]}"
    m = re.fullmatch(r"(time_embed|input_blocks|middle_block|output_blocks|out)\.(\d+)\.(.+)", name)
    if not m:
        return name
    part = m[1]
    i = int(m[2])
    rest = m[3]
    if part == "time_embed":  # linear, activation, linear
        return f"time_embedding.linear_{1 + i // 2}.{rest}"
    if part == "out":  # norm, activation, convolution
        return f"{'conv_out' if i else 'conv_norm_out'}.{rest}"
    if part == "middle_block":  # resnet, attention, resnet
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
        level, layer = divmod(i, layers + 1)  # from the coarsest level, as in our up_blocks
        block = f"up_blocks.{level}"
        if rest.startswith("conv."):
            return f"{block}.upsamplers.0.{rest}"
    if which == "1":
        return f"{block}.attentions.{layer}.{rest}"
    return f"{block}.resnets.{layer}.{resnet_name(rest)}"


def unet_layer(name: str, layers: int) -> str:
    """Translates the name of one of the UNet's layers, written with underscores for dots as
    adapters of SDXL do, from the original (LDM) layout into ours, with underscores too. `layers` is
    as for `unet_name`. A name of another form is returned unchanged."""
    m = re.fullmatch(
        r"(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)_(\d+)(?:_(\d+))?(?:_(.+))?", name
    )
    if not m:
        return name
    rest = re.sub(r"^((?:in|emb|out)_layers)_(\d)$", r"\1.\2", m[4] or "")
    dotted = ".".join(part for part in (m[1], m[2], m[3], rest, "weight") if part)
    return unet_name(dotted, layers).removesuffix(".weight").replace(".", "_")


CONTROL_LAYERS = 2  # residual blocks per level in every ControlNet of the original layout


def controlnet_name(name: str) -> str | None:
    """Translates a parameter name in a ControlNet's file from the original layout into ours.
    Original files may also hold the model that the ControlNet was trained with; the result is None
    for the tensors of that model."""
    bare = name.removeprefix(CONTROL)
    if bare == name and name.startswith(("model.", VAE, "cond_stage_model.", "model_ema.")):
        return None
    if m := re.fullmatch(r"zero_convs\.(\d+)\.0\.(\w+)", bare):
        return f"controlnet_down_blocks.{m[1]}.{m[2]}"
    if m := re.fullmatch(r"middle_block_out\.0\.(\w+)", bare):
        return f"controlnet_mid_block.{m[1]}"
    if m := re.fullmatch(r"input_hint_block\.(\d+)\.(\w+)", bare):
        i = int(m[1]) // 2  # every other layer is an activation
        layer = {0: "conv_in", 7: "conv_out"}.get(i, f"blocks.{i - 1}")
        return f"controlnet_cond_embedding.{layer}.{m[2]}"
    return unet_name(bare, CONTROL_LAYERS)


# --- the VAE --------------------------------------------------------------------------------------

# The layers of the VAE's attention: all names that the original layout or diffusers has given them
# -> our name.
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
    "proj_out": "to_out.0",
    "to_out": "to_out.0",
}


def vae_name(name: str, levels: int) -> str:
    """Translates a VAE parameter name, given without the prefix `first_stage_model.`, from the
    original (LDM) layout into ours. The original layout numbers the decoder's `levels` from the
    finest; ours numbers them in the order in which they run, which is from the coarsest."""
    name = name.replace(".norm_out.", ".conv_norm_out.").replace(".nin_shortcut.", ".conv_shortcut.")
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", name):
        return f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}.{m[3]}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+|to_out\.0)\.(\w+)", name):
        return f"{m[1]}.mid_block.attentions.0.{_VAE_ATTENTION.get(m[2], m[2])}.{m[3]}"
    if m := re.fullmatch(r"encoder\.down\.(\d+)\.(.+)", name):
        block = f"encoder.down_blocks.{m[1]}"
    elif m := re.fullmatch(r"decoder\.up\.(\d+)\.(.+)", name):
        block = f"decoder.up_blocks.{levels - 1 - int(m[1])}"
    else:
        return name
    rest = re.sub(r"^(down|up)sample\.", r"\1samplers.0.", m[2])
    return f"{block}." + re.sub(r"^block\.", "resnets.", rest)


# --- OpenCLIP's text encoder ----------------------------------------------------------------------

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
    """Translates the name of a tensor of OpenCLIP's text encoder into the names of transformers'
    CLIPTextModel, without the prefix `text_model.`.

    Returns three names for the fused projection, whose rows are those of q, then k, then v. Returns
    an empty list for a tensor that is not used, because SD2 takes the text states after the first
    `layers` layers and the final norm, without the projection into the space shared with images.
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


# --- names that changed within the diffusers layout -----------------------------------------------


def newer_vae_name(name: str) -> str:
    """Translates the name of a parameter of the VAE's attention, within the diffusers layout, into
    the present name. Files of SD1.x use older names. Other names are returned unchanged."""
    m = re.fullmatch(r"(.+\.attentions\.0\.)(\w+)\.(weight|bias)", name)
    return name if m is None else f"{m[1]}{_VAE_ATTENTION.get(m[2], m[2])}.{m[3]}"


def clip_name(name: str, layers: int = 1000) -> str | None:
    """Removes from a text encoder's parameter name the prefix `text_model.` that some versions of
    transformers add. Returns None for a tensor that is not used: the position numbers that some
    versions store, and the layers with the numbers `layers` and above."""
    bare = name.removeprefix("text_model.")
    m = re.match(r"encoder\.layers\.(\d+)\.", bare)
    if name.endswith("position_ids") or (m is not None and int(m[1]) >= layers):
        return None
    return bare
