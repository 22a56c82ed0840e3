"""Reads embeddings of textual inversion (Gal et al. 2022): vectors for a new word of the prompt,
which take the place of the text encoder's own token embeddings.

Two formats are read: safetensors, and pickles with torch.load's restriction to tensors and plain
data. Their tensors may be named as in AUTOMATIC1111's web UI (`emb_params`, `string_to_param`), as
in diffusers (the word itself is the name of its tensor), as in SDXL's files with one tensor per
text encoder (`clip_l`, `clip_g`), or as in LoRA files with embeddings in them
(`bundle_emb.NAME.*`). For example:

    add(read("easynegative.safetensors", None, sd), sd)
    images = sd("a red circle", negative_prompt="easynegative")
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minsd.text import TextEncoder
from minsd.weights.safetensors_file import PICKLES, Tensors, guess

LARGEST = 32 * 2**20  # bytes of a pickle; 75 vectors of SDXL take 0.6 MB in float32
MOST = 75  # vectors, the tokens of a chunk
_BUNDLED = re.compile(r"bundle_emb\.([^.]+)\.(.+)")
_FAMILIES = {(768,): "Stable Diffusion 1.x", (1024,): "Stable Diffusion 2.x", (768, 1280): "SDXL"}
# Tensor names that do not contain the word; the word is then the file's name.
_NAMELESS = ("emb_params", "string_to_param", "*", "clip_l", "clip_g", "text_encoders_0", "text_encoders_1")


@dataclass(frozen=True)
class Embedding:
    """An embedding of textual inversion. `name` is the word to write in prompts. `vectors` has one
    tensor for each text encoder of the model (two for SDXL). Each tensor (k,D) holds the k vectors
    of width D that take the word's place."""

    name: str
    vectors: tuple[Tensor, ...]


def read(path: str | Path, name: str | None, sd: Any) -> Embedding:
    """Reads a textual-inversion embedding from a file (.safetensors, .pt or .bin) and checks that
    it fits the text encoders of the model `sd`. `name` is the word to write in prompts. If `name`
    is None, the word is taken from the file, or, if the file states no word, from the file's name
    without the suffix.

    Raises FileNotFoundError if there is no such file. Raises ValueError if the file holds no
    embedding, or an embedding that was made for another model. The error message is one line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no embedding {path}: give a .safetensors, .pt or .bin file")
    if path.suffix.lower() in PICKLES:
        tensors = _unpickled(path)
    elif path.suffix.lower() == ".safetensors":
        tensors = Tensors(path, "", torch.float32)
    else:
        raise ValueError(
            f"{path} is no embedding that minsd reads: .safetensors, .pt or .bin (an embedding stored in an"
            " image must be converted)"
        )
    if any(_BUNDLED.fullmatch(key) for key in tensors):
        raise ValueError(f"{path} is a LoRA with embeddings in it: give it with --lora")
    stated = [key for key in tensors if key not in _NAMELESS]
    return _embedding(path, name or (stated[0] if len(tensors) == 1 and stated else path.stem), tensors, sd)


def bundled(path: str | Path, sd: Any) -> list[Embedding]:
    """Reads the textual-inversion embeddings that a LoRA brings with it. `path` is the LoRA's file,
    or the folder with this file. Returns the embeddings, or an empty list if the file holds none.
    Raises FileNotFoundError if there is no such file, and ValueError if an embedding does not fit
    the text encoders of the model `sd`."""
    from minsd.weights.lora import file_of

    path = file_of(Path(path))
    tensors = Tensors(path, "", torch.float32)
    found: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        if m := _BUNDLED.fullmatch(key):
            found.setdefault(m[1], {})[m[2]] = tensors[key]
    return [_embedding(path, name, tensors, sd) for name, tensors in found.items()]


def add(embedding: Embedding, sd: Any) -> str:
    """Adds an embedding to the model `sd`, so that prompts can use the embedding's name as a word.
    Returns one line of text that tells the user how to use the embedding. Raises ValueError if the
    model already has an embedding with the same name."""
    for encoder, vectors in zip(encoders(sd), embedding.vectors):
        encoder.add(embedding.name, vectors)
    count = len(embedding.vectors[0])
    return f"embedding of {count} vector{'s' * (count > 1)}: write {embedding.name} in a prompt to use it"


def encoders(sd: Any) -> list[TextEncoder]:
    """Returns the text encoders of the model `sd` as a list: both encoders of an SDXL model, first
    and second, or the only encoder of another model."""
    second = getattr(sd.text, "second", None)
    return [sd.text] if second is None else [sd.text, second]


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a pickled embedding. Returns a dict of name -> tensor. Raises ValueError
    if the pickle at `path` holds anything but tensors and plain data, takes more than 32 MiB when
    unpacked, or is damaged."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(entry.file_size for entry in archive.infolist()))
        except (OSError, zipfile.BadZipFile):
            size = LARGEST + 1
    if size > LARGEST:
        raise ValueError(f"{path} is no embedding: it has more than {LARGEST >> 20} MiB, or is damaged")
    try:
        # Early files hold their vectors in a ParameterDict, whose unpickling sets attributes only.
        with torch.serialization.safe_globals([nn.ParameterDict]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        content = content.get("string_to_param", content)
        return {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch raises errors of many types, most with several lines
        raise ValueError(
            f"{path} cannot be read as an embedding of tensors and plain data ({type(error).__name__}); other"
            " content can run code: get the .safetensors version"
        ) from None


def _embedding(path: Path, name: str, tensors: Mapping[str, Tensor], sd: Any) -> Embedding:
    """Makes an embedding from its tensors (name -> tensor) and checks that they fit the model `sd`.
    `name` is the word to write in prompts. The result holds the tensors in the order of the model's
    text encoders. Raises ValueError, naming the file `path`, if `name` cannot be a word of a
    prompt, or if the tensors are no embedding for this model."""
    name = name.strip()
    if not name.isprintable() or not 0 < len(name) <= 100:
        raise ValueError(f"{path}: {ascii(name)[:120]} cannot be a word of a prompt: give FILE:NAME")
    vectors: list[Tensor] = []
    if 1 <= len(tensors) <= 2:  # other files may be whole models, and large
        vectors = [tensor[None] if tensor.ndim == 1 else tensor for tensor in tensors.values()]
        vectors.sort(key=lambda tensor: tensor.shape[-1] if tensor.ndim else 0)
    if not vectors or any(
        tensor.ndim != 2 or not tensor.is_floating_point() or not 1 <= len(tensor) <= MOST
        for tensor in vectors
    ):
        kind = (guess(tensors) if len(tensors) > 2 else None) or f"does not hold 1 to {MOST} vectors"
        raise ValueError(f"{path} is no embedding of textual inversion: it {kind}")
    widths = tuple(tensor.shape[1] for tensor in vectors)
    own = tuple(encoder.width for encoder in encoders(sd))
    if widths != own or len({len(tensor) for tensor in vectors}) > 1:
        made_for = _FAMILIES.get(widths, "another model")
        raise ValueError(
            f"{path} was made for {made_for}: its vectors have width {' and '.join(map(str, widths))}, those"
            f" of this model {' and '.join(map(str, own))}"
        )
    if not all(tensor.isfinite().all() for tensor in vectors):
        raise ValueError(f"{path} holds numbers that are not finite: the file is damaged")
    return Embedding(name, tuple(vectors))
