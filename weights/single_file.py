"""Single files: checkpoints in the original layout, and VAEs in either. No config says what is in them; the shapes do.

Whole checkpoints are split into the three networks' tensors under our names (ldm_keys.py). Stable Diffusion 1 is told from
2 by its text encoder; what shapes cannot tell (heads, whether v or noise is predicted) is the family's.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from minsd.config import MODELS, TextConfig, UNetConfig, VAEConfig
from minsd.weights import ldm_keys
from minsd.weights.safetensors_file import Part, Tensors, guess

_SD1, _SD2 = MODELS["sd15"], MODELS["sd21"]


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the greatest number that `pattern` finds at the start of a name; 0 if it finds none."""
    return 1 + max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)


def original(tensors: Tensors, prediction_type: str | None):
    """A checkpoint's tensors under our names -> (config, UNet's, VAE's or None, text encoder's, notes for the user)."""
    path, notes = tensors.where, []
    unet_names = [name.removeprefix(ldm_keys.UNET) for name in tensors if name.startswith(ldm_keys.UNET)]
    vae_names = [name.removeprefix(ldm_keys.VAE) for name in tensors if name.startswith(ldm_keys.VAE)]
    ops = [int(m[1]) for name in unet_names if (m := re.match(r"input_blocks\.(\d{1,4})\.0\.op\.", name))]
    layers, levels = max(1, min(ops, default=3) - 1), count(vae_names, r"decoder\.up\.(\d{1,4})\.")
    unet = Part(
        tensors,
        "the UNet of",
        pairs(unet_names, ldm_keys.UNET, lambda name: [ldm_keys.unet_name(name, layers)]),
    )
    vae = Part(
        tensors, "the VAE of", pairs(vae_names, ldm_keys.VAE, lambda name: [ldm_keys.vae_name(name, levels)])
    )

    clip = [name.removeprefix(ldm_keys.CLIP) for name in tensors if name.startswith(ldm_keys.CLIP)]
    open_clip = [
        name.removeprefix(ldm_keys.OPEN_CLIP) for name in tensors if name.startswith(ldm_keys.OPEN_CLIP)
    ]
    if not clip and not open_clip:
        raise ValueError(
            f"{path} holds no text encoder: minsd needs whole checkpoints (UNet, VAE and text encoder)"
        )
    if (
        open_clip
    ):  # 24 layers, the last of which SD2 does not use; files made from diffusers folders hold the 23
        text = pairs(
            open_clip, ldm_keys.OPEN_CLIP, lambda name: ldm_keys.open_clip_names(name, _SD2.text.num_layers)
        )
    else:
        text = pairs(clip, ldm_keys.CLIP, lambda name: [new] if (new := ldm_keys.clip_name(name)) else [])
    text = Part(tensors, "the text encoder of", text)

    family = _SD1
    if open_clip:
        family = MODELS["sd21-base" if prediction_type == "epsilon" else "sd21"]
        if prediction_type is None:
            notes.append(
                f"{path.name} is a Stable Diffusion 2 file, which does not say what it predicts: taken for v_prediction at"
                " 768x768; a 512 base model wants --prediction-type epsilon"
            )
    known = (ldm_keys.UNET, ldm_keys.VAE, ldm_keys.OPEN_CLIP if open_clip else ldm_keys.CLIP)
    if strangers := [
        name for name in tensors if not name.startswith(known) and not ldm_keys.left_behind(name)
    ]:
        notes.append(
            f"{path.name}: {len(strangers)} tensors are no part of the model and were left out ({', '.join(strangers[:3])}"
            f"{', ...' if len(strangers) > 3 else ''})"
        )
    config = replace(
        family,
        name=path.stem,
        unet=unet_of(unet, family.unet),
        vae=vae_of(vae) if vae else family.vae,
        text=text_of(text, family.text),
    )
    if prediction_type is not None:
        config = replace(config, schedule=replace(config.schedule, prediction_type=prediction_type))
    if config.unet.context_dim != config.text.hidden_size:
        raise ValueError(
            f"{path}: its UNet looks at text states of {config.unet.context_dim} numbers, its text encoder makes"
            f" {config.text.hidden_size}: parts of different models"
        )
    return config, unet, vae or None, text, notes


def vae_file(tensors: Tensors) -> tuple[VAEConfig, Part]:
    """The VAE in a file of its own, in the original or the diffusers layout, or in a whole checkpoint."""
    prefix = ldm_keys.VAE if any(name.startswith(ldm_keys.VAE) for name in tensors) else ""
    names = [
        name.removeprefix(prefix)
        for name in tensors
        if name.startswith(prefix) and not ldm_keys.left_behind(name)
    ]
    names = [name for name in names if not name.startswith("loss.")]  # the critic it was trained with
    if "decoder.conv_in.weight" not in names:
        raise ValueError(
            f"{tensors.where} is not a VAE: it {guess(tensors) or 'has no decoder.conv_in.weight'}"
        )
    levels = count(names, r"decoder\.up\.(\d{1,4})\.")
    rename = (
        (lambda name: [ldm_keys.vae_name(name, levels)])
        if levels
        else (lambda name: [ldm_keys.newer_vae_name(name)])
    )
    part = Part(tensors, "the VAE of", pairs(names, prefix, rename))
    return vae_of(part), part


def pairs(
    names: Iterable[str], prefix: str, rename: Callable[[str], list[str]]
) -> dict[str, tuple[str, int | None]]:
    """New name -> (whole name in the file, which of its thirds or None). ValueError where two names become one."""
    found = {}
    for name in names:
        new = rename(name)
        for i, one in enumerate(new):
            if one in found:
                raise ValueError(
                    f"{prefix + name} and {found[one][0]} are the same tensor under two names: the file is damaged"
                )
            found[one] = prefix + name, i if len(new) > 1 else None
    return found


def sizes(read: Callable[[], dict], where) -> dict:
    """What `read` makes out of shapes; ValueError where one is missing or no network's."""
    try:
        found = read()
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{where} is not whole: {error.args[0]} is missing or has too few dimensions"
        ) from None
    numbers = [n for value in found.values() for n in (value if isinstance(value, tuple) else [value])]
    if (
        not numbers
        or not all(0 <= n <= 10**6 for n in numbers)
        or not all(0 < n <= 2**14 for n in found.get("block_out_channels", (1,)))
    ):
        raise ValueError(f"{where} has tensors of sizes that no Stable Diffusion has")
    return found


def unet_of(tensors: Part, family: UNetConfig) -> UNetConfig:
    """The number of heads is not in the shapes: SD1 has 8 at every level, SD2 as many as make 64 channels each."""
    shape, middle = tensors.shape, "mid_block.attentions.0"

    def read():
        levels = range(min(count(tensors, r"down_blocks\.(\d{1,4})\."), 16))
        return {
            "in_channels": shape("conv_in.weight")[1],
            "out_channels": shape("conv_out.weight")[0],
            "block_out_channels": tuple(shape(f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels),
            "layers_per_block": min(count(tensors, r"down_blocks\.0\.resnets\.(\d{1,4})\."), 16),
            "cross_attention": tuple(f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in levels),
            "context_dim": shape(f"{middle}.transformer_blocks.0.attn2.to_k.weight")[1],
            "linear_projection": len(shape(f"{middle}.proj_in.weight")) == 2,
        }

    found = sizes(read, tensors.where)
    if (channels := found["in_channels"]) != 4:
        kind = {9: "inpainting", 8: "InstructPix2Pix", 5: "depth-to-image", 7: "upscaling"}.get(
            channels, "unknown"
        )
        raise ValueError(
            f"{tensors.where} has {channels} input channels ({kind}): minsd loads text-to-image models, with 4"
        )
    heads = (8,) * len(found["block_out_channels"])
    if family.linear_projection:
        heads = tuple(max(1, width // 64) for width in found["block_out_channels"])
    return replace(family, **found, num_heads=heads)


def vae_of(tensors: Part) -> VAEConfig:
    def read():
        levels = range(min(count(tensors, r"encoder\.down_blocks\.(\d{1,4})\."), 16))
        return {
            "block_out_channels": tuple(
                tensors.shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels
            ),
            "layers_per_block": min(count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d{1,4})\."), 16),
            "latent_channels": tensors.shape("decoder.conv_in.weight")[1],
        }

    found = sizes(read, tensors.where)
    if found["latent_channels"] != 4:
        raise ValueError(
            f"{tensors.where} has {found['latent_channels']} latent channels: a VAE of Stable Diffusion 1.x and 2.x has 4"
        )
    return VAEConfig(**found)


def text_of(tensors: Part, family: TextConfig) -> TextConfig:
    def read():
        vocab, hidden = tensors.shape("embeddings.token_embedding.weight")
        return {
            "hidden_size": hidden,
            "intermediate_size": tensors.shape("encoder.layers.0.mlp.fc1.weight")[0],
            "vocab_size": vocab,
            "num_layers": min(count(tensors, r"encoder\.layers\.(\d{1,4})\."), 64),
            "num_heads": max(1, hidden // 64),
            "max_length": tensors.shape("embeddings.position_embedding.weight")[0],
        }

    return replace(family, **sizes(read, tensors.where))


class FileHash(threading.Thread):
    """`digest`: the first ten hex digits of a file's SHA-256, as other tools name a model. Reading gigabytes takes seconds:
    what was found is kept in the user's cache folder, by path, size and time, where that can be written."""

    def __init__(self, path: Path):
        super().__init__(daemon=True)
        self.path, self.digest = path, None

    def run(self):
        try:
            status = self.path.stat()
            key = f"{self.path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
            store = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minsd" / "sha256.json"
        except (OSError, RuntimeError):  # no home
            key, store = "", None
        try:
            known = json.loads(store.read_text(encoding="utf-8"))
            if re.fullmatch(r"[0-9a-f]{10}", known[key]):
                self.digest = known[key]
                return
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            known = {}
        try:
            with self.path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()[:10]
            store.parent.mkdir(parents=True, exist_ok=True)
            known = {old: value for old, value in known.items() if old.split("|")[0] != key.split("|")[0]} | {
                key: self.digest
            }
            part = store.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(known, indent=0), encoding="utf-8")
            part.replace(store)
        except (OSError, AttributeError):
            pass
