"""Tensors by name out of safetensors files, mapped and not read, whose headers are checked before.

The header of a file is JSON that says where each tensor lies (https://huggingface.co/docs/safetensors, "Format"). Files
come from strangers: sizes, offsets, names and dtypes are checked to the byte, with bounded work, and what does not hold
is refused in one line. Pickles, which can run code, are not opened at all.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
MAX_HEADER = (
    32 * 2**20
)  # bytes. The format allows 100 MB, real ones have less than 1, and JSON grows twentyfold in memory
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


def read_json(path: Path) -> dict:
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError(f"it has more than {MAX_HEADER >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: is {path.parent} a folder in the diffusers layout?"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deep") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def read_header(path: Path) -> dict[str, dict]:
    """A safetensors file's header, checked to the byte: name -> {"dtype", "shape", "data_offsets"}."""

    def refuse(why):
        raise ValueError(f"{path} is not a sound safetensors file: {why}; download it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            (length,) = (
                struct.unpack("<Q", start) if len(start) == 8 else refuse("it is shorter than a header")
            )
            if length > min(size - 8, MAX_HEADER):
                refuse(
                    f"its header claims {length} bytes, the file has {size} (truncated, or another format?)"
                )
            content = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(content.decode("utf-8"))  # bytes would be let through in UTF-16, too
    except (ValueError, RecursionError):
        refuse("its header is not JSON")
    if not isinstance(header, dict):
        refuse("its header is not a JSON object")
    notes = header.pop("__metadata__", None)
    if notes is not None and not (
        isinstance(notes, dict) and all(isinstance(value, str) for value in notes.values())
    ):
        refuse("its __metadata__ is not made of strings")
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = (
                isinstance(shape, list)
                and len(shape) <= 8
                and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
            )
        except (KeyError, TypeError, ValueError):
            refuse(f"the entry of {name[:200]!r} is malformed")
        if not name.isprintable() or len(name) > 500:  # names are printed when something does not fit
            refuse(f"the name {ascii(name[:50])} is not one of a tensor")
        if not isinstance(dtype, str) or dtype not in ITEM_SIZE or not whole:
            refuse(f"the entry of {name!r} is malformed (dtype {ascii(dtype)[:50]})")
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
    """Tensors by name out of a file, or of one component's file or shards in a folder: `tensors[name]` maps, and reads nothing before."""

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
        if folder.is_file():
            return [folder]
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
                        raise FileNotFoundError(
                            f"{path} is missing: {index.name} lists it as a part of the model"
                        )
                return paths
        pickles = (
            [p.name for p in folder.glob("*") if p.suffix in (".bin", ".ckpt", ".pt")]
            if folder.is_dir()
            else []
        )
        if pickles:
            raise ValueError(
                f"{folder} has only {pickles[0]}, a pickle, which can run code when opened: get the model's {stem}.safetensors"
            )
        raise FileNotFoundError(
            f"{folder / stem}.safetensors is missing (nor is there an fp16 variant, nor shards)"
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        path, _ = self.files[name]
        try:
            if path not in self.open:
                self.open[path] = safe_open(path, framework="pt", device="cpu")
            return self.open[path].get_tensor(name)
        except Exception as error:  # what the library is stricter about than `read_header`
            raise ValueError(
                f"{path} cannot be read by safetensors: {str(error).splitlines()[0]}; download it again"
            ) from None

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name][1]["shape"])

    def dtype(self, name: str) -> str:
        return self.files[name][1]["dtype"]


def lies_well(tensor: torch.Tensor) -> bool:
    """Whether products with it round as with one of torch's own. Files put tensors anywhere, and a product of one row with a
    float32 matrix that does not start at a multiple of 64 bytes can be summed in another order (Intel oneMKL's guide,
    "Conditional Numerical Reproducibility"): the same weights would give another picture from another file. Biases and norms
    do not mind, nor do half precisions."""
    return tensor.dtype != torch.float32 or tensor.ndim < 2 or tensor.data_ptr() % 64 == 0


class Part(Mapping):
    """Some tensors of a file under other names: new name -> (name there, which third of its rows, or None for all)."""

    def __init__(self, tensors: Tensors, what: str, names: dict[str, tuple[str, int | None]]):
        self.tensors, self.names, self.where, self.files = (
            tensors,
            names,
            f"{what} {tensors.where}",
            tensors.files,
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        source, third = self.names[name]
        tensor = self.tensors[source]
        return tensor if third is None else tensor.chunk(3)[third]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        source, third = self.names[name]
        shape = self.tensors.shape(source)
        return (
            shape
            if third is None or not shape
            else (shape[0] / 3 if shape[0] % 3 else shape[0] // 3, *shape[1:])
        )

    def dtype(self, name: str) -> str:
        return self.tensors.dtype(self.names[name][0])


ORIGINAL = "is a single-file checkpoint in the original layout"


def guess(names: Iterable[str]) -> str | None:
    """What a set of tensor names probably is, when it is not what was asked for."""
    names = dict.fromkeys(names)
    for sign, what in {
        "conditioner.embedders": "looks like an SDXL checkpoint",
        "add_embedding.": "looks like an SDXL network",
        "label_emb.": "looks like an SDXL network",
        "double_blocks.": "looks like a Flux checkpoint",
        "joint_blocks.": "looks like an SD3 checkpoint",
        "lora": "looks like a LoRA, which adapts a model and is not one",
        "control_model.": "looks like a ControlNet",
        "controlnet_": "looks like a ControlNet",
        "emb_params": "looks like a textual-inversion embedding",
        "model.diffusion_model.": ORIGINAL,
        "first_stage_model.": "looks like a VAE alone",
        "decoder.conv_in": "looks like a VAE alone",
        "down_blocks.": "looks like a UNet alone, in the diffusers layout",
        "encoder.layers.": "looks like a text encoder alone",
    }.items():
        if any(sign in name for name in names):
            return what
    return None
