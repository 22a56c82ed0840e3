"""Translates tensor names of the original (LDM) single-file checkpoints into the names of minsd's
modules.

Before diffusers one file held everything: the UNet (`model.diffusion_model.`), the VAE
(`first_stage_model.`) and the text encoder, which is transformers' CLIP in SD1.x
(`cond_stage_model.transformer.`) and OpenCLIP in SD2.x (`cond_stage_model.model.`). SDXL has both
(`conditioner.embedders.0.transformer.` and `.1.model.`). ControlNets are in `control_model.`. The
networks are the same as minsd's, but their layers are numbered differently. The functions of this
module use names alone. They return a name that is not of the original layout unchanged, and
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
    """Returns True if the tensor called `name` in a checkpoint is a remnant of training that minsd
    does not need, such as averaged weights or a table of the noise schedule."""
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
    """Translates a parameter name within one of the UNet's residual blocks from the original (LDM)
    layout into minsd's, for example "in_layers.0.weight" into "norm1.weight"."""
    part, _, leaf = name.rpartition(".")
    return f"{_RESNET.get(part, part)}.{leaf}"


def unet_name(name: str, layers: int) -> str:
    """Translates the name of a UNet parameter from the original (LDM) layout into minsd's. `name`
    is the original name without its prefix `model.diffusion_model.`. A name that is not of the
    original layout is returned unchanged.

    `layers` is the number of residual blocks per level in the encoder half of this UNet. It is
    needed because the original layout has one sequence of numbers for the layers of all levels, and
    minsd's names have the level and the layer within it.
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
    """Translates the name of one of the UNet's layers from the original (LDM) layout into minsd's.
    In both names underscores stand for dots, as SDXL's adapters write them:
    "input_blocks_4_1_proj_in" becomes "down_blocks_1_attentions_0_proj_in". `layers` is the number
    of residual blocks per level in the UNet's encoder half. A name that is not of the original
    layout is returned unchanged."""
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
    """Translates a parameter name in a ControlNet's file from the original (LDM) layout into
    minsd's. A name that is not of the original layout is returned unchanged. Returns None if the
    tensor is not part of the ControlNet: an original file may also hold the Stable Diffusion model
    beside which the ControlNet was trained."""
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
    """Translates the name of a VAE parameter from the original (LDM) layout into minsd's. `name` is
    the original name without its prefix `first_stage_model.`. A name that is not of the original
    layout is returned unchanged.

    `levels` is the number of the decoder's levels. It is needed because the original layout numbers
    them from the finest level, and minsd from the coarsest, which runs first.
    """
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
    """Translates the name of one tensor of OpenCLIP's text encoder into the names of transformers'
    CLIPTextModel. Returns a list of new names, which lack the prefix `text_model.`:

    - One name for most tensors. A name of another layout is returned unchanged.
    - Three names, of q, k and v, for the fused attention projection, whose rows are those of q,
      then of k, then of v.
    - No name for a tensor that is not used: a layer after the first `layers` ones, or the
      projection into the space that text shares with images.
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
    """Translates an older name of a parameter of the VAE's attention, as files of SD1.x in the
    diffusers layout have it, into the present name: "query" becomes "to_q", for example. Any other
    name is returned unchanged."""
    m = re.fullmatch(r"(.+\.attentions\.0\.)(\w+)\.(weight|bias)", name)
    return name if m is None else f"{m[1]}{_VAE_ATTENTION.get(m[2], m[2])}.{m[3]}"


def clip_name(name: str, layers: int = 1000) -> str | None:
    """Removes the prefix `text_model.`, which some versions of transformers write, from the name of
    a text encoder's parameter. Returns None for a tensor that is not used: a table of position
    numbers, or a part of a layer after the first `layers` ones."""
    bare = name.removeprefix("text_model.")
    m = re.match(r"encoder\.layers\.(\d+)\.", bare)
    if name.endswith("position_ids") or (m is not None and int(m[1]) >= layers):
        return None
    return bare
