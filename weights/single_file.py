"""Reads single files: checkpoints in the original layout, and VAEs in the original or the diffusers
layout.

Such files hold no config. A whole checkpoint is split into the tensors of its networks, under
minsd's names (ldm_keys.py), and the shapes of the tensors give each network's sizes. The kind of
text encoder distinguishes Stable Diffusion 1 (CLIP) from 2 (OpenCLIP); SDXL has both kinds, and an
embedding of the pooled text state. The remaining settings, such as the number of attention heads
and the prediction type, come from the model family (`minsd.config.MODELS`).
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minsd.config import MODELS, ModelConfig, TextConfig, UNetConfig, VAEConfig
from minsd.weights import ldm_keys, stated
from minsd.weights.safetensors_file import RenamedTensors, Source, Tensors, guess

_SD1 = MODELS["sd15"]
_SD2 = MODELS["sd21"]
_SDXL = MODELS["sdxl"]
CHANNELS = {5: "depth-to-image", 7: "upscaling", 8: "InstructPix2Pix", 9: "inpainting"}
# Tensors that mark SDXL models which predict neither noise nor v -> the kind of model.
_OTHER_XL = {"edm_mean": "is of the EDM kind (Playground 2.5)", "edm_vpred.sigma_max": "is of the EDM kind"}


@dataclass(frozen=True)
class Parts:
    """A checkpoint in the original (LDM) layout, split into the tensors of its networks. All
    tensors have minsd's names. `vae` is None if the checkpoint holds no VAE, and `text_2` is None
    if it is not SDXL."""

    config: ModelConfig
    unet: RenamedTensors
    vae: RenamedTensors | None
    text: RenamedTensors
    text_2: RenamedTensors | None  # SDXL's second encoder
    notes: list[str]  # for the user


def original(tensors: Tensors, prediction_type: str | None, metadata: Mapping[str, str]) -> Parts:
    """Splits a checkpoint in the original (LDM) layout into its networks and derives its
    configuration. `metadata` is the file's metadata, which may state the prediction type. If
    `prediction_type` ("epsilon" or "v_prediction") is not None, it is used instead. Raises
    ValueError if the checkpoint is incomplete or of another kind. The error message is one line."""
    path = tensors.where
    unet = _unet_tensors(tensors)
    vae = _vae_tensors(tensors)
    is_xl = "add_embedding.linear_1.weight" in unet
    texts, prefixes = _xl_text_tensors(tensors) if is_xl else _text_tensors(tensors)
    notes = []
    said = stated.of_file(metadata, tensors)
    if said.prediction_type is not None and prediction_type not in (None, said.prediction_type):
        notes.append(f"{path.name} states {said.prediction_type}; {prediction_type} is used, as asked for")
    prediction_type = prediction_type or said.prediction_type
    family, note = _family(path, prefixes, prediction_type)
    if note:
        notes.append(note)
    known = (ldm_keys.UNET, ldm_keys.VAE, *prefixes, *stated.MARKS)
    unused = [name for name in tensors if not name.startswith(known) and not ldm_keys.left_behind(name)]
    if unused:
        names = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        notes.append(
            f"{path.name}: {len(unused)} tensors are no part of the model and were left out ({names})"
        )
    text_2 = texts[1] if is_xl else None
    config = replace(
        family,
        name=path.stem,
        unet=unet_of(unet, family.unet),
        vae=vae_of(vae, family.vae) if vae else family.vae,
        text=text_of(texts[0], family.text),
        text_2=text_of(text_2, family.text_2) if text_2 and family.text_2 else None,
    )
    if prediction_type is not None:
        config = replace(config, schedule=replace(config.schedule, prediction_type=prediction_type))
    if said.zero_snr:  # so that sampling begins at the last timestep, where nothing is left
        more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        config = replace(config, schedule=replace(config.schedule, **more))
    if said.size is not None:
        config = replace(config, unet=replace(config.unet, sample_size=said.size // 8))
    check_widths(config, path)
    return Parts(config, unet, vae or None, texts[0], text_2, notes)


def _family(
    path: Path, prefixes: tuple[str, ...], prediction_type: str | None
) -> tuple[ModelConfig, str | None]:
    """Determines which kind of Stable Diffusion the checkpoint `path` holds. Returns (family,
    note): a row of `MODELS`, and a line of text for the user or None.

    It decides by three things: `prefixes`, with which the names of the text encoders' tensors begin
    (CLIP, OpenCLIP or both); `prediction_type`, None if unknown; and whether the file's name
    contains "turbo".
    """
    if ldm_keys.XL_CLIP in prefixes:
        is_turbo = "turbo" in path.stem.lower()
        kind = "a Turbo model (1 step, no guidance)" if is_turbo else "the base model"
        note = f"{path.name} is an SDXL file, taken for {kind} by its name: the file does not state it"
        return MODELS["sdxl-turbo" if is_turbo else "sdxl"], note
    if ldm_keys.OPEN_CLIP not in prefixes:
        return _SD1, None
    note = None
    if prediction_type is None:
        note = (
            f"{path.name} is a Stable Diffusion 2 file, which does not state its prediction type:"
            " v_prediction at 768x768 is assumed; a 512 base model needs --prediction-type epsilon"
        )
    return MODELS["sd21-base" if prediction_type == "epsilon" else "sd21"], note


def check_widths(config: ModelConfig, where: Path) -> None:
    """Checks that a model's text encoders and its UNet fit together: the text states must have the
    width that the UNet takes, and so must the pooled text state of SDXL. Otherwise raises
    ValueError, naming the file `where`."""
    second = config.text_2
    made = config.text.hidden_size + (second.hidden_size if second else 0)
    taken = config.unet.context_dim
    what = "text states"
    if second and taken == made:
        made, taken = second.projection_dim, config.unet.pooled_dim
        what = "a pooled text state"
    if taken != made:
        encoders = "text encoders make" if second else "text encoder makes"
        raise ValueError(
            f"{where}: its UNet takes {what} of width {taken}, its {encoders} {what} of width {made}: parts"
            " of different models"
        )


def _inside(tensors: Tensors, prefix: str) -> list[str]:
    """Returns the tensor names that begin with `prefix`, after the prefix was removed from them."""
    return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]


def _unet_tensors(tensors: Tensors) -> RenamedTensors:
    names = _inside(tensors, ldm_keys.UNET)
    downsamplers = (re.match(r"input_blocks\.(\d{1,4})\.0\.op\.", name) for name in names)
    first = min((int(m[1]) for m in downsamplers if m), default=3)
    layers = max(1, first - 1)  # the first level's residual blocks precede its downsampling
    renamed = pairs(names, ldm_keys.UNET, lambda name: [ldm_keys.unet_name(name, layers)])
    return RenamedTensors(tensors, "the UNet of", renamed)


def _vae_tensors(tensors: Tensors) -> RenamedTensors:
    names = _inside(tensors, ldm_keys.VAE)
    levels = count(names, r"decoder\.up\.(\d{1,4})\.")
    renamed = pairs(names, ldm_keys.VAE, lambda name: [ldm_keys.vae_name(name, levels)])
    return RenamedTensors(tensors, "the VAE of", renamed)


def _text_tensors(tensors: Tensors) -> tuple[list[RenamedTensors], tuple[str, ...]]:
    """Finds the text encoder in a checkpoint of Stable Diffusion 1 (CLIP) or 2 (OpenCLIP). Returns
    (texts, prefixes). `texts` is a list with one item, the encoder's tensors under minsd's names.
    `prefixes` is a tuple with one item, the prefix that the tensors' names have in the file. Raises
    ValueError if there is no text encoder."""
    if _inside(tensors, ldm_keys.OPEN_CLIP):
        # SD2 does not use the last of the 24 layers; files made from diffusers folders hold 23.
        text = _open_clip(tensors, ldm_keys.OPEN_CLIP, _SD2.text.num_layers)
        return [text], (ldm_keys.OPEN_CLIP,)
    if _inside(tensors, ldm_keys.CLIP):
        return [_clip(tensors, ldm_keys.CLIP)], (ldm_keys.CLIP,)
    raise ValueError(
        f"{tensors.where} holds no text encoder: minsd needs whole checkpoints (UNet, VAE and text encoder)"
    )


def _xl_text_tensors(tensors: Tensors) -> tuple[list[RenamedTensors], tuple[str, ...]]:
    """Finds the two text encoders in an SDXL checkpoint. Returns (texts, prefixes). `texts` is a
    list with the tensors of the two encoders, under minsd's names. `prefixes` is a tuple with the
    two prefixes that these tensors' names have in the file. Raises ValueError if an encoder is
    missing, or if the checkpoint is a relative of SDXL that minsd does not support. The error
    message is one line."""
    path = tensors.where
    for key, kind in _OTHER_XL.items():
        if key in tensors:
            raise ValueError(
                f"{path} is an SDXL model that {kind} (it holds {key!r}): minsd draws with those that"
                " predict noise or v"
            )
    both = (ldm_keys.XL_CLIP, ldm_keys.XL_OPEN_CLIP)
    missing = [prefix for prefix in both if not _inside(tensors, prefix)]
    # The refiner's only encoder is OpenCLIP, in the place of the base model's CLIP.
    if missing and _inside(tensors, "conditioner.embedders.0.model."):
        raise ValueError(
            f"{path} is the SDXL refiner, which continues from another model's latents: give the base model"
        )
    if missing:
        raise ValueError(
            f"{path} does not hold SDXL's two text encoders ({missing[0]}*): minsd needs whole checkpoints"
        )
    second = _open_clip(tensors, ldm_keys.XL_OPEN_CLIP, 1000)
    projection = ldm_keys.XL_OPEN_CLIP + "text_projection"
    if projection in tensors:  # OpenCLIP multiplies from the other side
        second.names["text_projection.weight"] = projection, "T"
    return [_clip(tensors, ldm_keys.XL_CLIP), second], both


def _clip(tensors: Tensors, prefix: str) -> RenamedTensors:
    def rename(name: str) -> list[str]:
        new = ldm_keys.clip_name(name)
        # Some programs leave the projection into the space shared with images, which is not used.
        return [new] if new and new not in ("text_projection.weight", "logit_scale") else []

    return RenamedTensors(tensors, "the text encoder of", pairs(_inside(tensors, prefix), prefix, rename))


def _open_clip(tensors: Tensors, prefix: str, layers: int) -> RenamedTensors:
    renamed = pairs(_inside(tensors, prefix), prefix, lambda name: ldm_keys.open_clip_names(name, layers))
    return RenamedTensors(tensors, "the text encoder of", renamed)


def vae_file(tensors: Tensors, family: VAEConfig) -> tuple[VAEConfig, RenamedTensors]:
    """Finds the VAE in `tensors`, the content of one file: a VAE in the original or the diffusers
    layout, or a whole checkpoint in the original layout. Returns (config, vae): the VAE's config,
    and its tensors under minsd's names. Settings that tensor shapes do not show come from `family`.
    Raises ValueError if the file holds no VAE."""
    prefix = ldm_keys.VAE if any(name.startswith(ldm_keys.VAE) for name in tensors) else ""
    names = [
        name.removeprefix(prefix)
        for name in tensors
        if name.startswith(prefix) and not ldm_keys.left_behind(name)
    ]
    # Some VAE files also hold the GAN discriminator that the VAE was trained against.
    names = [name for name in names if not name.startswith("loss.")]
    if "decoder.conv_in.weight" not in names:
        raise ValueError(
            f"{tensors.where} is not a VAE: it {guess(tensors) or 'has no decoder.conv_in.weight'}"
        )
    levels = count(names, r"decoder\.up\.(\d{1,4})\.")

    def rename(name: str) -> list[str]:
        return [ldm_keys.vae_name(name, levels) if levels else ldm_keys.newer_vae_name(name)]

    vae = RenamedTensors(tensors, "the VAE of", pairs(names, prefix, rename))
    return vae_of(vae, family), vae


def pairs(names: Iterable[str], prefix: str, rename: Callable[[str], list[str]]) -> dict[str, Source]:
    """Makes the table of new names that `RenamedTensors` takes: a dict of new name -> (name in the
    file, part). The part is None for a whole tensor, and 0, 1 or 2 for the first, second or last
    third of its rows.

    `names` are names in the file from which `prefix` was removed. `rename` is called with each of
    them and returns a list: one new name, no name if the tensor is to be left out, or three names
    for the thirds of a fused attention projection. Raises ValueError if two tensors get the same
    new name.
    """
    found: dict[str, Source] = {}
    for name in names:
        new = rename(name)
        for i, one in enumerate(new):
            if one in found:
                raise ValueError(
                    f"{prefix + name} and {found[one][0]} are the same tensor under two names:"
                    " the file is damaged"
                )
            found[one] = prefix + name, i if len(new) > 1 else None
    return found


# --- sizes from shapes ----------------------------------------------------------------------------


def count(names: Iterable[str], pattern: str) -> int:
    """Counts the numbered parts (layers, blocks) of a network. `names` are the names of its
    tensors. `pattern` is a regular expression for the start of a name, with one group for the
    number of the part. Returns the greatest number plus one, or 0 if no name matches."""
    found = (re.match(pattern, name) for name in names)
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def sizes(read: Callable[[], dict[str, Any]], where: object) -> dict[str, Any]:
    """Calls `read`, checks the sizes that it returns, and returns them. They are a dict of name ->
    number or tuple of numbers, which `read` takes from tensor shapes. Raises ValueError, naming the
    file `where`, if `read` misses a tensor, or if no network of Stable Diffusion has such sizes."""
    try:
        found = read()
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{where} is not whole: {error.args[0]} is missing or has too few dimensions"
        ) from None
    numbers = [n for value in found.values() for n in (value if isinstance(value, tuple) else [value])]
    possible = (
        numbers
        and all(0 <= n <= 10**6 for n in numbers)
        and all(0 < n <= 2**14 for n in found.get("block_out_channels", (1,)))
    )
    if not possible:
        raise ValueError(f"{where} has tensors of sizes that no Stable Diffusion has")
    return found


def unet_of(tensors: RenamedTensors, family: UNetConfig | None = None) -> UNetConfig:
    """Derives the config of a UNet from the shapes of its tensors. `family` is the UNet config of
    its model family, and gives the settings that shapes do not show. The number of attention heads
    is an exception: one head per 64 channels if `family.linear_projection` is set (SD2, SDXL),
    otherwise 8 heads per level.

    `family` is None for a ControlNet, whose tensors are those of a UNet's encoder half. The
    settings that shapes do not show then come from the first row of `MODELS` with the same channel
    counts and the same width of text states, or else from the defaults of `UNetConfig`, with 8
    heads per level.

    Raises ValueError if the tensors are not those of a text-to-image UNet.
    """
    shape = tensors.shape
    middle = "mid_block.attentions.0"

    def read() -> dict[str, Any]:
        levels = range(min(count(tensors, r"down_blocks\.(\d{1,4})\."), 16))
        found = {
            "in_channels": shape("conv_in.weight")[1],
            "block_out_channels": tuple(shape(f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels),
            "layers_per_block": min(count(tensors, r"down_blocks\.0\.resnets\.(\d{1,4})\."), 16),
            "cross_attention": tuple(f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in levels),
            "transformer_depth": tuple(_depth(tensors, i, len(levels)) for i in levels),
            "context_dim": shape(f"{middle}.transformer_blocks.0.attn2.to_k.weight")[1],
            "linear_projection": len(shape(f"{middle}.proj_in.weight")) == 2,
        }
        add = "add_embedding.linear_1.weight"
        found["pooled_dim"] = shape(add)[1] - 6 * _SDXL.unet.size_dim if add in tensors else 0
        return found if family is None else found | {"out_channels": shape("conv_out.weight")[0]}

    found = sizes(read, tensors.where)
    channels = found["in_channels"]
    if channels != 4:
        kind = CHANNELS.get(channels, "unknown")
        raise ValueError(
            f"{tensors.where} has {channels} input channels ({kind}): minsd loads text-to-image"
            " models, with 4"
        )
    widths = found["block_out_channels"]
    heads = (8,) * len(widths)
    if family is None:
        for row in MODELS.values():
            if (row.unet.block_out_channels, row.unet.context_dim) == (widths, found["context_dim"]):
                return replace(row.unet, **found)
    elif family.linear_projection:
        heads = tuple(max(1, width // 64) for width in widths)
    return replace(family or UNetConfig(), **found, num_heads=heads)


def _depth(tensors: RenamedTensors, level: int, levels: int) -> int:
    """Returns how many transformer blocks an attention layer has at one level of a UNet, or 1 if
    the level has no attention. `level` is the number of the level, 0 for the finest, and `levels`
    the number of all levels. Raises ValueError if the attention layers of the level differ."""
    middle = "|mid_block" if level == levels - 1 else ""
    block = rf"((?:down_blocks\.{level}|up_blocks\.{levels - 1 - level}{middle})\.attentions\.\d+)\."
    layers = {m[1] for m in (re.match(block, name) for name in tensors) if m}
    depths = {count(tensors, rf"{re.escape(layer)}\.transformer_blocks\.(\d{{1,4}})\.") for layer in layers}
    if len(depths) > 1:
        raise ValueError(
            f"{tensors.where}: depths that differ within a level (SSD-1B, Vega) are not supported"
        )
    return max(1, min(64, *depths)) if depths else 1


def vae_of(tensors: RenamedTensors, family: VAEConfig) -> VAEConfig:
    """Derives the config of a VAE from the shapes of its tensors. `family` is the VAE config of the
    model family, and gives the settings that shapes do not show. Raises ValueError if a tensor is
    missing, or if the VAE does not have 4 latent channels."""

    def read() -> dict[str, Any]:
        levels = range(min(count(tensors, r"encoder\.down_blocks\.(\d{1,4})\."), 16))
        widths = (tensors.shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels)
        return {
            "block_out_channels": tuple(widths),
            "layers_per_block": min(count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d{1,4})\."), 16),
            "latent_channels": tensors.shape("decoder.conv_in.weight")[1],
        }

    found = sizes(read, tensors.where)
    if found["latent_channels"] != 4:
        raise ValueError(
            f"{tensors.where} has {found['latent_channels']} latent channels: a VAE of Stable Diffusion 1.x,"
            " 2.x and XL has 4"
        )
    return replace(family, **found)


def text_of(tensors: RenamedTensors, family: TextConfig) -> TextConfig:
    """Derives the config of a text encoder from the shapes of its tensors. `family` is the text
    config of the model family, and gives the settings that shapes do not show. Raises ValueError if
    a tensor is missing or a size is impossible."""

    def read() -> dict[str, Any]:
        embedding = tensors.shape("embeddings.token_embedding.weight")
        return {
            "hidden_size": embedding[1],
            "intermediate_size": tensors.shape("encoder.layers.0.mlp.fc1.weight")[0],
            "vocab_size": embedding[0],
            "num_layers": min(count(tensors, r"encoder\.layers\.(\d{1,4})\."), 64),
            "num_heads": max(1, embedding[1] // 64),
            "max_length": tensors.shape("embeddings.position_embedding.weight")[0],
            "projection_dim": tensors.shape("text_projection.weight")[0] if family.projection_dim else 0,
        }

    return replace(family, **sizes(read, tensors.where))


# --- the file's hash ------------------------------------------------------------------------------


class FileHash(threading.Thread):
    """A thread that computes a short hash of the file `path`: the first ten hex digits of its
    SHA-256, by which other programs identify a model. After `join()`, the attribute `digest` holds
    the ten digits, or None if the file cannot be read.

    Hashing gigabytes takes seconds, so the result is kept in the user's cache folder, if that
    folder can be written. It is used again while the file's path, size and time of change stay the
    same.
    """

    def __init__(self, path: Path):
        super().__init__(daemon=True)
        self.path = path
        self.digest: str | None = None

    def run(self) -> None:
        store = self._store()
        try:
            status = self.path.stat()
            place = str(self.path.resolve())
            key = f"{place}|{status.st_size}|{status.st_mtime_ns}"
        except (OSError, RuntimeError):
            return
        known = self._known(store)
        digest = known.get(key)
        if isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{10}", digest):
            self.digest = digest
            return
        try:
            with self.path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()[:10]
            if store is None:
                return
            kept = {old: value for old, value in known.items() if old.split("|")[0] != place}
            store.parent.mkdir(parents=True, exist_ok=True)
            part = store.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(kept | {key: self.digest}, indent=0), encoding="utf-8")
            part.replace(store)
        except OSError:
            pass

    @staticmethod
    def _store() -> Path | None:
        try:
            return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minsd" / "sha256.json"
        except RuntimeError:  # the user has no home
            return None

    @staticmethod
    def _known(store: Path | None) -> dict[str, Any]:
        try:
            known = json.loads(store.read_text(encoding="utf-8")) if store else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return known if isinstance(known, dict) else {}
