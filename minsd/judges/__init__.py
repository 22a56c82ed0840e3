"""Judges: each rates, as numbers, how well an image shows what its prompt asks for.

`load(name)` returns a judge: frozen networks with the published weights, in float32. The judge's
method `pictures` returns the reported numbers of PIL images. Some judges also have a method
`score`, which takes pixels (B,3,H,W) in 0..1 and is differentiable with respect to them, so that it
can serve as a reward.

`JUDGES` lists all judges, `WEIGHTS` the files that they need. Heavy packages such as torch are
imported only when a judge is loaded, and nothing is downloaded unless the caller allows it.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from minsd.judges.objects import Detection


class Judged(NamedTuple):
    """A judge's result for one image. `values` maps column names, such as "clip", to numbers. It is
    empty if the judge cannot judge the image. `reason` states why it cannot, or what a judge that
    applies rules found, such as "lacks dog"."""

    values: dict[str, float]
    found: "Sequence[Detection] | None" = None  # everything found, if the judge has a detector
    reason: str = ""


class Judge(Protocol):
    """The interface of every judge. `load` returns objects that have it."""

    identity: dict[str, Any]  # name, weights, dtype and options, written into every line of scores

    def pictures(
        self,
        images: "Sequence[Image.Image]",
        prompts: Sequence[str],
        asked: Sequence[Mapping[str, Any] | None],
    ) -> list[Judged]:
        """Judges RGB images, each with its prompt. Returns one result per image. `asked` holds for
        each image what a detector must look for (objects with colours, counts and places, see
        `objects.Asked`), or None if this is not known."""
        ...


@dataclass(frozen=True)
class Weights:
    """A published file of weights: its repository and name on the Hugging Face hub, its size and
    its licence. The user is told size and licence before a download."""

    repo: str
    file: str  # the weights; a second name after | is taken where the first is missing
    size: str
    licence: str
    more: tuple[str, ...] = ()  # small files that must be beside the weights, such as config.json


CONFIG = ("config.json",)
WEIGHTS: dict[str, Weights] = {
    "clip-b16": Weights(
        "openai/clip-vit-base-patch16", "model.safetensors|pytorch_model.bin", "0.6 GB", "MIT", CONFIG
    ),
    "clip-b32": Weights(
        "openai/clip-vit-base-patch32", "model.safetensors|pytorch_model.bin", "0.6 GB", "MIT", CONFIG
    ),
    "clip-l14": Weights(
        "openai/clip-vit-large-patch14", "model.safetensors|pytorch_model.bin", "1.7 GB", "MIT", CONFIG
    ),
    "clip-h14": Weights(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "model.safetensors|pytorch_model.bin",
        "3.9 GB",
        "MIT",
        CONFIG,
    ),
    "pickscore": Weights("yuvalkirstain/PickScore_v1", "model.safetensors", "3.9 GB", "not stated", CONFIG),
    "hpsv2": Weights("xswu/HPSv2", "HPS_v2_compressed.pt", "2.0 GB", "Apache-2.0"),
    "hpsv2.1": Weights("xswu/HPSv2", "HPS_v2.1_compressed.pt", "2.0 GB", "Apache-2.0"),
    "aesthetic": Weights("", "sac+logos+ava1-l14-linearMSE.pth", "4 MB", "Apache-2.0"),
    "imagereward": Weights("zai-org/ImageReward", "ImageReward.pt", "1.8 GB", "Apache-2.0"),
    "bert": Weights("google-bert/bert-base-uncased", "vocab.txt", "0.2 MB", "Apache-2.0"),
    "mask2former": Weights(
        "facebook/mask2former-swin-small-coco-instance", "model.safetensors", "0.3 GB", "other", CONFIG
    ),
}


@dataclass(frozen=True)
class Entry:
    """A judge's entry in the table JUDGES: the module of minsd.judges that builds the judge, the
    weights that the judge needs (keys of WEIGHTS), and a description of the judge."""

    module: str
    weights: tuple[str, ...]
    about: str


JUDGES: dict[str, Entry] = {
    "shapes": Entry("shapes", (), "the embedded model's own pixel detector"),
    "clip": Entry("clip", ("clip-b16",), "cosine of image and prompt, ViT-B/16"),
    "clip-b32": Entry("clip", ("clip-b32",), "the same, ViT-B/32"),
    "clip-l14": Entry("clip", ("clip-l14",), "the same, ViT-L/14"),
    "clip-h14": Entry("clip", ("clip-h14",), "the same, OpenCLIP's ViT-H/14"),
    "least": Entry("clip", ("clip-b16",), "the part of the prompt that the image neglects most"),
    "pickscore": Entry("clip", ("pickscore",), "PickScore, human preference"),
    "hpsv2": Entry("clip", ("hpsv2",), "Human Preference Score v2, times 100"),
    "hpsv2.1": Entry("clip", ("hpsv2.1",), "Human Preference Score v2.1, times 100"),
    "hpsv2.1@plain": Entry("clip", ("hpsv2.1",), "the same, resized without antialias"),
    "aesthetic": Entry("clip", ("clip-l14", "aesthetic"), "LAION's aesthetic predictor v2"),
    "imagereward": Entry("blip", ("imagereward", "bert"), "ImageReward, human preference"),
    "geneval-style": Entry(
        "mask2former", ("mask2former", "clip-l14"), "GenEval's rules on Mask2Former's detections"
    ),
    "tiam-like": Entry("mask2former", ("mask2former",), "TIAM's rule: every object is there"),
    "region_clip": Entry("regions", ("clip-b32",), "cosine of each box with its caption"),
}

RATES = ("right", "no_neglect", "strict", "geneval-style", "tiam-like")  # columns of 0 and 1
LOWER = ("strays",)  # columns of which less is better


def check(name: str) -> Entry:
    """Returns the entry of the judge `name` in the table JUDGES. Raises ValueError if there is no
    such judge."""
    if name not in JUDGES:
        raise ValueError(f"there is no judge {name!r}: known are {', '.join(JUDGES)}")
    return JUDGES[name]


def load(
    name: str,
    weights: Mapping[str, str] | None = None,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
    fetch: bool = False,
    **options: Any,
) -> Any:
    """Loads the judge `name`, a key of JUDGES, onto `device`, and returns it.

    `weights` maps keys of WEIGHTS to a folder, a file or a hub id that is to be used in place of
    the published one. Weights that it does not name are taken from the hub's cache. Those that are
    missing there are downloaded if `fetch` is True. `dtype` is that of the networks, by default
    float32. `options` are passed to the function `build` of the judge's module.

    Raises ValueError for an unknown name or an unsuitable file, and FileNotFoundError for missing
    weights. Error messages have one line.
    """
    files = found(name, weights or {}, fetch)
    return built(identity(name, files, str(dtype or "float32"), options), files, device, options)


def found(name: str, weights: Mapping[str, str], fetch: bool) -> dict[str, Path]:
    """Returns a dict from the keys in WEIGHTS of the weights that the judge `name` needs to the
    paths of these files. `weights` maps keys of WEIGHTS to a folder, a file or a hub id that is to
    be used in place of the published one. Missing weights are downloaded if `fetch` is True.

    Raises ValueError for an unknown name, and FileNotFoundError for missing weights.
    """
    return {key: find(key, name, weights, fetch) for key in check(name).weights}


def built(
    identity: dict[str, Any],
    files: Mapping[str, Path],
    device: "torch.device | str",
    options: Mapping[str, Any],
) -> Any:
    """Loads the judge that `identity` describes (the result of the function `identity`: the judge's
    name, weights, dtype and options) onto `device`, and returns it. `files` maps keys of WEIGHTS to
    the paths of the weights. `options` are passed to the function `build` of the judge's module.
    Raises ValueError, with a message of one line, for an unsuitable file."""
    import torch

    module = importlib.import_module(f"minsd.judges.{check(identity['judge']).module}")
    dtype = getattr(torch, identity["dtype"])
    return module.build(identity, files=files, device=device, dtype=dtype, **options)


def identity(name: str, files: Mapping[str, Path], dtype: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dict with everything that a judge's scores depend on: its name under "judge", its
    "dtype", its options, and for each of its weights an entry under their key in WEIGHTS. Two
    scores of a judge can be compared only if these dicts are equal. `files` maps keys of WEIGHTS to
    the paths of the weights.

    Weights in the hub's cache are identified by repository and revision, any other file by the
    first ten digits of its SHA-256.
    """
    from minsd.weights.single_file import FileHash

    said: dict[str, Any] = {"judge": name, "dtype": dtype.removeprefix("torch.")} | dict(options)
    for key, path in files.items():
        parts = path.parts
        if "snapshots" in parts[:-1]:
            said[key] = f"{WEIGHTS[key].repo}@{parts[parts.index('snapshots') + 1][:10]}"
        else:
            hashing = FileHash(path)
            hashing.run()
            said[key] = f"sha256:{hashing.digest}"
    return said


def short(identity: Mapping[str, Any]) -> str:
    """Returns a hash of eight hex digits of `identity`, the dict that the function `identity`
    returns. The hashes of equal dicts are equal. Any other object that JSON can hold may be given
    too."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


# --- files ----------------------------------------------------------------------------------------


def find(key: str, judge: str, given: Mapping[str, str], fetch: bool = False) -> Path:
    """Returns the path of the file of weights that `WEIGHTS[key]` describes. `given` maps keys of
    WEIGHTS to a folder, a file or a hub id that the user chose.

    If the user chose a file for `key`, returns its path; if a folder, the path of the weights in
    it. Otherwise the weights come from the chosen repository on the hub, or from the published one
    if none was chosen. They are taken from the hub's cache or, if they are missing there and
    `fetch` is True, downloaded. Raises FileNotFoundError if they are not found. `judge` is the name
    of the judge, for the error message, which has one line.
    """
    row = WEIGHTS[key]
    place = given.get(key)
    if place is not None and Path(place).exists():
        return _in_folder(Path(place), row, key)
    repo = place or row.repo
    if place is not None and repo.count("/") != 1:
        raise FileNotFoundError(f"--weights {key}={place}: there is no such folder or file")
    path = _cached(repo, row) if repo else None
    if path is None and fetch and repo:
        path = _fetched(repo, row, key)
    if path is None:
        needed = " and ".join((*row.more, row.file.split("|")[0]))
        where = f"{repo} ({row.size}), not in the hub cache" if repo else f"{row.file} ({row.size})"
        raise FileNotFoundError(f"judge {judge} needs {where}: --weights {key}=FOLDER with {needed}")
    return path


def _in_folder(place: Path, row: Weights, key: str) -> Path:
    """Returns the path of the file of weights that `row` describes in the folder `place`. If
    `place` is a file, returns `place`. Raises FileNotFoundError if the folder lacks the weights, or
    a small file that must be beside them, such as config.json. `key` is the key of `row` in
    WEIGHTS, for the error message."""
    if place.is_file():
        return place
    names = [name for name in row.file.split("|") if (place / name).is_file()]
    if not names and not row.file.endswith(".txt"):  # the same tensors under another name
        names = sorted(path.name for path in place.glob("*.safetensors"))
    missing = [name for name in row.more if not (place / name).is_file()]
    if not names or missing:
        raise FileNotFoundError(
            f"--weights {key}={place}: the folder holds no {(missing or [row.file.split('|')[0]])[0]}"
        )
    return place / names[0]


def _cached(repo: str, row: Weights) -> Path | None:
    """Returns the path of the file of weights that `row` describes, in the local cache of the hub's
    repository `repo`. Returns None if the cache lacks the weights, or a small file that must be
    beside them, such as config.json."""
    import huggingface_hub as hf

    if any(not isinstance(hf.try_to_load_from_cache(repo, name), str) for name in row.more):
        return None
    for name in row.file.split("|"):
        path = hf.try_to_load_from_cache(repo, name)
        if isinstance(path, str):
            return Path(path)
    return None


def _fetched(repo: str, row: Weights, key: str) -> Path:
    """Downloads the weights that `row` describes, and the small files that belong beside them, from
    the hub's repository `repo`. Before this, prints a line that names `key` (the weights' key in
    WEIGHTS), the size and the licence. Returns the path of the weights. If the download fails,
    raises an error whose message explains the cause."""
    import sys

    import huggingface_hub as hf

    from minsd.weights import hub

    print(f"minsd: fetching {repo} ({row.size}, licence: {row.licence}) for {key}", file=sys.stderr)
    try:
        there = hub.listed(repo)
        for name in (*row.more, "vocab.json", "merges.txt", "med_config.json"):
            if name in there:
                hf.hf_hub_download(repo, name)  # nosec B615: the commit is recorded
        name = next((name for name in row.file.split("|") if name in there), row.file.split("|")[0])
        return Path(hf.hf_hub_download(repo, name))  # nosec B615: the commit is recorded
    except Exception as error:
        raise hub.explained(error, repo) from None


def tensors(path: Path) -> "dict[str, torch.Tensor]":
    """Reads the tensors of a file, and returns them as a dict name -> tensor. The file is a
    .safetensors file, or a pickle that holds nothing but tensors and containers. Raises ValueError,
    with a message of one line, for a pickle that holds anything else or cannot be read. No code in
    a pickle is run."""
    import pickle  # nosec B403: for its error types

    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors, which can run code when opened: refused; "
            "convert its tensors to .safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise ValueError(f"{path} holds no plain list of tensors")
    return held


def fill(
    network: "torch.nn.Module", held: "Mapping[str, torch.Tensor]", spare: Sequence[str], path: Path
) -> None:
    """Gives a network that was made on the meta device the tensors in `held` (name -> tensor),
    converted to float32, sets the network to evaluation mode and freezes it.

    Raises ValueError, with a message of one line, if `held` lacks a tensor of the network, has one
    in another shape, or has a tensor that the network does not. A tensor that the network does not
    have is ignored, however, if its name begins with one of the prefixes `spare` or ends with
    "position_ids". `path` is the file that the error message names.
    """
    import torch

    wanted = network.state_dict()
    missing = [name for name in wanted if name not in held]
    left = [name for name in held if name not in wanted and not name.startswith(tuple(spare))]
    left = [name for name in left if not name.endswith("position_ids")]
    wrong = [name for name in wanted if name in held and held[name].shape != wanted[name].shape]
    for names, what in (
        (missing, "lacks"),
        (left, "has beyond its network"),
        (wrong, "has in another shape"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{path} {what} the tensor {names[0]}{more}: another model's file?")
    network.load_state_dict({name: held[name].float() for name in wanted}, strict=True, assign=True)
    for module in network.modules():  # buffers that no file holds
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and name == "position_ids":
                setattr(module, name, torch.arange(buffer.shape[-1])[None])
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    network.requires_grad_(False).eval()
