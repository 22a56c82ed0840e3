"""Reads tensors by name from safetensors files. The header of a file is read and checked first; the
data is memory-mapped rather than read.

The header is JSON that states the position of each tensor in the file
(https://huggingface.co/docs/safetensors, "Format"). Files come from strangers, so sizes, offsets,
names and dtypes are checked to the byte with bounded work, and a malformed file is refused with an
error of one line. Pickles can run code and are never opened.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from safetensors import safe_open

from minsd import files

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
MAX_HEADER = files.LARGEST_JSON  # bytes; the format allows 100 MB, but real headers have less than 1 MB
ITEM_SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def refuse_pickle(path: Path, what: str) -> None:
    """Raises ValueError if `path` has the suffix of a pickle (.ckpt, .pt, .pth, .bin). `what` is
    the word for the file's content in the error message, such as "model" or "VAE"."""
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when opened: get the {what}'s .safetensors"
            " version instead"
        )


def variants(dtype: torch.dtype) -> tuple[str, str]:
    """Returns the two variants in which a diffusers folder may have its weights, as what stands
    before ".safetensors" in the file name: "" for float32 and ".fp16" for float16. The variant that
    is nearer to `dtype` comes first."""
    return ("", ".fp16") if dtype == torch.float32 else (".fp16", "")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose content is an object. Raises FileNotFoundError if the file is
    missing, and ValueError if its content is not a JSON object. The error message is one line."""
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: is {path.parent} a folder in the diffusers layout?"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the header of a safetensors file and checks that it fits the file's size exactly.
    Returns a dict of tensor name -> {"dtype": ..., "shape": ..., "data_offsets": ...}. Raises
    ValueError if the file is malformed. The error message is one line."""
    return _checked(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file. Returns an empty dict if the file has none. Raises
    ValueError if the file is malformed. The error message is one line."""
    return _checked(path)[1]


def _checked(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Reads and checks the header of a safetensors file. Returns (entries, metadata). `entries` are
    those of `read_header`; `metadata` is a dict of text -> text, empty if the file has none. Raises
    ValueError if the file is malformed."""
    header, size = _header_json(path)
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "its __metadata__ values are not strings")
    position = 0
    for begin, end in sorted(_span(path, name, entry) for name, entry in header.items()):
        if begin != position:
            _refuse(path, "its tensors overlap or leave gaps")
        position = end
    if position != size:
        _refuse(path, f"it should hold {position} bytes of tensors and holds {size} (truncated?)")
    return header, metadata


def _refuse(path: Path, why: str) -> NoReturn:
    raise ValueError(f"{path} is not a sound safetensors file: {why}; download it again")


def _header_json(path: Path) -> tuple[dict[str, Any], int]:
    """Reads the header of a safetensors file, without checks of what it contains. Returns (header,
    size): the header, and the number of bytes that follow it in the file. Raises ValueError if the
    header is not a JSON object."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                _refuse(path, "it is shorter than a header")
            (length,) = struct.unpack("<Q", start)
            if length > min(size - 8, MAX_HEADER):
                why = f"its header claims {length} bytes, the file has {size} (truncated, or another format?)"
                _refuse(path, why)
            content = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = files.parse_json(content)
    except ValueError as error:
        _refuse(path, f"its header is {error}")
    if not isinstance(header, dict):
        _refuse(path, "its header is not a JSON object")
    return header, size - 8 - length


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Checks `entry`, what the header of a safetensors file states about the tensor `name`. Returns
    (begin, end), the tensor's place in the data behind the header: the offset of its first byte,
    and the offset of the byte after its last one. Raises ValueError, naming the file `path`, if the
    entry is malformed."""
    try:
        dtype = entry["dtype"]
        shape = entry["shape"]
        begin, end = entry["data_offsets"]
        whole = (
            isinstance(shape, list)
            and len(shape) <= 8
            and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
        )
    except (KeyError, TypeError, ValueError):
        _refuse(path, f"the entry of {name[:200]!r} is malformed")
    if not name.isprintable() or len(name) > 500:  # names are printed in errors
        _refuse(path, f"the name {ascii(name[:50])} is not one of a tensor")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE or not whole:
        _refuse(path, f"the entry of {name!r} is malformed (dtype {ascii(dtype)[:50]})")
    if end - begin != math.prod(shape) * ITEM_SIZE[dtype]:
        _refuse(path, f"{name!r} has {end - begin} bytes, which its shape {shape} in {dtype} does not fill")
    return begin, end


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of one network, as a mapping of name -> tensor. They are in one safetensors file,
    or in several (shards) in one folder.

    The constructor reads and checks the files' headers only. `tensors[name]` memory-maps the data
    of one tensor.
    """

    def __init__(self, path: Path, stem: str, dtype: torch.dtype):
        """Opens `path`, a safetensors file or a folder with one network. In a folder, the network
        is in the file STEM.safetensors or STEM.fp16.safetensors, where STEM is `stem`, or in the
        shards of one of them. If the folder has both, the one nearer to `dtype` is opened. Raises
        FileNotFoundError if there is no such file, and ValueError if a file is malformed."""
        self.where = path
        self.files: dict[str, tuple[Path, dict[str, Any]]] = {}
        self.starts: dict[Path, int] = {}  # file -> offset of its tensors, which follow the header
        for file in _choose_files(path, stem, dtype):
            header = read_header(file)
            repeated = self.files.keys() & header.keys()
            if repeated:
                raise ValueError(f"{file} repeats the tensor {min(repeated)!r} of another shard")
            self.files |= {name: (file, entry) for name, entry in header.items()}
            length = sum(end - begin for begin, end in (e["data_offsets"] for e in header.values()))
            self.starts[file] = file.stat().st_size - length
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        path, _ = self.files[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            return self._open[path].get_tensor(name)
        except Exception as error:  # safetensors is stricter than `read_header` in places
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} cannot be read by safetensors: {reason}; download it again") from None

    def copy_to(self, target: torch.Tensor, name: str) -> None:
        """Copies the data of the tensor called `name` into `target`, which must have as many
        elements but may have another shape and dtype. Raises ValueError if the file has become
        shorter since its header was checked.

        If `target` is contiguous, on the CPU and of the same dtype as in the file, this reads the
        file straight into `target`, which is several times as fast as memory-mapping and copying.
        """
        path, entry = self.files[name]
        direct = target.device.type == "cpu" and target.is_contiguous()
        if not direct or DTYPES.get(entry["dtype"]) != target.dtype:
            target.copy_(self[name].reshape(target.shape))
            return
        with path.open("rb") as file:
            file.seek(self.starts[path] + entry["data_offsets"][0])
            count = file.readinto(target.view(torch.uint8).numpy().data)
        if count != target.nbytes:
            raise ValueError(f"{path} ended early: was it replaced while it was read? Start again")

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name][1]["shape"])

    def dtype(self, name: str) -> str:
        """Returns the dtype of the tensor called `name` as safetensors writes it, for example "F32"
        or "BF16"."""
        return self.files[name][1]["dtype"]


def _choose_files(path: Path, stem: str, dtype: torch.dtype) -> list[Path]:
    if path.is_file():
        return [path]
    for variant in variants(dtype):
        one = path / f"{stem}{variant}.safetensors"
        if one.is_file():
            return [one]
        index = path / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            return _shards(index)
    pickles = [file.name for file in path.glob("*") if file.suffix in PICKLES] if path.is_dir() else []
    if pickles:
        raise ValueError(
            f"{path} has only {min(pickles)}, a pickle, which can run code when opened: get the model's"
            f" {stem}.safetensors"
        )
    raise FileNotFoundError(
        f"{path / stem}.safetensors is missing (nor is there an fp16 variant, nor shards)"
    )


def _shards(index: Path) -> list[Path]:
    """Reads the index file of a network that is split into shards (several weight files). Returns
    the paths of the shards, which lie beside the index file. Raises ValueError if the index file is
    malformed, and FileNotFoundError if a shard is missing."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map of file names")
    paths = [index.parent / Path(name).name for name in sorted(set(names.values()))]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {index.name} lists it as a part of the model")
    return paths


Source = tuple[str, int | Literal["T"] | None]


class RenamedTensors(Mapping[str, torch.Tensor]):
    """Tensors of a file under new names, as a mapping of new name -> tensor. `names` maps each new
    name to (name in the file, part). The part states what to take of the tensor in the file: None
    for the whole tensor, 0, 1 or 2 for the first, second or last third of its rows, "T" for its
    transpose."""

    def __init__(self, tensors: Tensors, what: str, names: dict[str, Source]):
        """Gives tensors in `tensors` new names. `names` maps each new name to (name in the file,
        part), as the docstring of the class explains. `what`, such as "the UNet of", stands before
        the file's path in error messages."""
        self.tensors = tensors
        self.names = names
        self.where = f"{what} {tensors.where}"

    def __getitem__(self, name: str) -> torch.Tensor:
        source, third = self.names[name]
        tensor = self.tensors[source]
        if third == "T":
            return tensor.T.contiguous()
        return tensor if third is None else tensor.chunk(3)[third]

    def copy_to(self, target: torch.Tensor, name: str) -> None:
        """Copies the data of the tensor with the new name `name` into `target`, as
        `Tensors.copy_to` does."""
        source, part = self.names[name]
        if part is None:
            self.tensors.copy_to(target, source)
        else:
            target.copy_(self[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        source, third = self.names[name]
        shape = self.tensors.shape(source)
        if third == "T":
            return shape[::-1]
        if third is None or not shape:
            return shape
        size = -(-shape[0] // 3)  # as torch.chunk divides: the last chunk takes the rest
        return max(0, min(size, shape[0] - third * size)), *shape[1:]

    def dtype(self, name: str) -> str:
        return self.tensors.dtype(self.names[name][0])


def is_aligned(tensor: torch.Tensor) -> bool:
    """Returns True if the tensor may be used as it lies in a memory-mapped file, and False if it
    must be copied first. It must be copied if it has float32 numbers and two or more dimensions,
    and does not begin at a multiple of 64 bytes.

    The reason: PyTorch may sum a product with a misaligned float32 matrix in another order than
    with an aligned one. The same weights in another file would then give a slightly different
    image.
    """
    return tensor.dtype != torch.float32 or tensor.ndim < 2 or tensor.data_ptr() % 64 == 0


ORIGINAL = "is a single-file checkpoint in the original layout"
_SIGNS = {  # part of a tensor's name -> the kind of file; the first that occurs decides
    "double_blocks.": "looks like a Flux checkpoint",
    "joint_blocks.": "looks like an SD3 checkpoint",
    "adapter.body.": "looks like a T2I adapter",
    "adapter.conv_in.": "looks like a T2I adapter",
    "body.0.in_conv.": "looks like a T2I adapter",
    "lora_controlnet": "looks like a control-lora",
    "lora": "looks like a LoRA, which adapts a model and is not one",
    "control_model.": "looks like a ControlNet",
    "controlnet_": "looks like a ControlNet",
    "emb_params": "looks like a textual-inversion embedding",
    "model.diffusion_model.": ORIGINAL,
    "conditioner.embedders": "looks like an SDXL checkpoint without its UNet",
    "add_embedding.": "looks like an SDXL network alone",
    "label_emb.": "looks like an SDXL network alone",
    "first_stage_model.": "looks like a VAE alone",
    "decoder.conv_in": "looks like a VAE alone",
    "down_blocks.": "looks like a UNet alone, in the diffusers layout",
    "encoder.layers.": "looks like a text encoder alone",
}


def guess(names: Iterable[str]) -> str | None:
    """Guesses from the names of a file's tensors what kind of file this is. Returns a phrase for an
    error message, such as "looks like a LoRA", or None if the names match no known kind."""
    names = list(names)
    for sign, what in _SIGNS.items():
        if any(sign in name for name in names):
            return what
    return None
