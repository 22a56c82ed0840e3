"""Implements --like: options that the command line does not give are taken from the settings inside
an image.

The image may come from somebody else. So its settings pass the same checks as a line of a prompts
file. Without --trust the image may only name the embedded model and files in its own folder, and
request a limited amount of work. Anything else (a model of the hub, a file elsewhere, days of work)
needs --trust, or the option itself on the command line.
"""

import os
import re
from pathlib import Path
from typing import Any

from minsd.adapters import split_name, split_scale
from minsd.app.options import OBJECTIVES, OPTIONS, Given
from minsd.app.prompts import located
from minsd.app.seeds import MOST_SEED
from minsd.config import MODELS
from minsd.files import exists

CANDIDATE_SEEDS = "candidate_seeds"  # not an option: the seeds that a selection chose among
VARIANTS = ("official", "attend-and-excite")  # of noise.excite.updates
MOST_EVALUATIONS = 50_000  # of the UNet at 512x512 pixels; a selection needs 10,000 by default
MOST_SETTING = 1000  # the largest whole number among an objective's settings without --trust
# The words that an objective's settings may have as values.
WORDS = (
    "sqrt none sgd adam keep unit norm kl white best last zero-order halving words groups "
    "ntxent pairs official paper"
).split()
MOST_PIXELS = 2048**2  # the largest image that can be asked for without --trust

# The options, and the keys of a layout's regions, that name files.
FILES = ("vae", "tokenizer", "init_image", "control_image", "controlnet", "invert")
REGION_FILES = ("mask", "control_image")


def take_from_image(given: Given, notes: list[str]) -> Given:
    """Completes the options `given` on the command line, and returns them: options that are not
    given are taken from the settings inside the image of --like. Appends to `notes` a message that
    names the files which these settings load.

    Raises ValueError for settings that are invalid, or not allowed without --trust. The error
    message names the image and the setting.
    """
    from minsd.image import read_settings

    path: Path = given["like"]
    settings = read_settings(path)
    if settings.get("noise_file") and given["noise"] is None:
        raise ValueError(f"{path} began from the noise file {settings['noise_file']}: give it with --noise")
    given = dict(given)
    with located(f"{path}: "):
        same_method = given["init_noise"] is None and settings.get("init_noise") not in (None, "invert")
        taken: Given = {}
        if same_method:
            settings = _take_method(given, settings, taken)
        _take_subjects(given, settings, settings if same_method else given)
        settings = _with_revision(settings)
        for name, option in OPTIONS.items():
            wanted = option.like or (same_method and option.like_method)
            if not wanted or given[name] is not None or settings.get(name) is None:
                continue
            if name != "seed" or given["seeds"] is None:
                taken[name] = _value(name, settings[name])
        given |= taken
        if not given["trust"]:
            _check_work(given, taken)
            _check_product(given, taken)
            _check_model(given, taken)
            _check_places(path, taken)
    loaded = [f"{name} {place}" for name, place in _places(taken)]
    notes.append(f"{path} loads {', '.join(loaded) or 'no file of its own'}")
    return given


def _with_revision(settings: Given) -> Given:
    """Returns an image's `settings`, with the setting "model" changed to owner/name@commit if the
    model came from the hub. So the new image is the same even if the repository has changed
    since."""
    model = settings.get("model")
    revision = settings.get("model_revision")
    if not isinstance(model, str) or not isinstance(revision, str) or "@" in model:
        return settings
    if not re.fullmatch("[0-9a-f]{40}", revision):
        return settings
    repo = MODELS[model].hub_id if model in MODELS else model
    if repo is None:  # the embedded models have no commit
        return settings
    return settings | {"model": f"{repo}@{revision}"}


def _value(name: str, value: Any) -> Any:
    """Converts `value`, the image's setting called `name`, to the value that the command line would
    give for this option. Raises ValueError if it has a wrong type or is outside the option's range.
    """
    option = OPTIONS[name]
    if name == "layout":  # the contents of a layout.json, which noise/layout.py checks
        return value if isinstance(value, dict) else option.from_json(value)
    if not option.repeated:
        value = option.from_json(value)
        option.check(value)
        return value
    if not isinstance(value, list):
        raise ValueError(f"{name!r} must be a list")
    return [option.from_json(_joined(part)) for part in value]


def _joined(part: Any) -> Any:
    """Converts a LoRA from a list [file, scale], as images of earlier versions contain it, to the
    text "FILE:SCALE". Returns anything else unchanged."""
    if isinstance(part, list) and len(part) == 2 and not isinstance(part[1], (list, dict)):
        return f"{part[0]}:{part[1]}"
    return part


def _take_method(given: Given, settings: Given, taken: Given) -> Given:
    """Copies what belongs to the image's noise method from the image's `settings` to `given`, the
    options of the new run: the number of candidates, the objective and the latent updates. Options
    on the command line are kept. The number of candidates is also copied to `taken`, the options
    from the image whose amount of work is checked later.

    If the noise was selected among candidates, the new run uses candidates with the same seeds,
    unless the command line gives another seed or number of candidates. Returns `settings`, in which
    the seed is then that of the first candidate, not the chosen one.
    """
    seeds = _candidates(settings.get("candidates"))
    if isinstance(seeds, list):
        settings = settings | {"seed": seeds[0]}
        if given["candidates"] in (None, len(seeds)) and given["seed"] is None and given["seeds"] is None:
            given[CANDIDATE_SEEDS] = tuple(seeds)
    if seeds and given["candidates"] is None:
        given["candidates"] = taken["candidates"] = len(seeds) if isinstance(seeds, list) else seeds
    if given["objective"] is None and settings.get("objective") is not None:
        _take_objective(given, settings["objective"])
    elif given["excite"] is None and given["objective"] is None:
        variant = settings.get("excite")
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"'excite' must be one of {', '.join(VARIANTS)}, not {str(variant)[:80]!r}")
        given["excite"] = variant is not None
    return settings


def _take_objective(given: Given, objective: Any) -> None:
    """Copies `objective`, the objective in an image's settings, to the options `given`. Raises
    ValueError for an objective in a Python file, because an image must not make minsd run code; for
    a reward that may download weights; for settings that are neither numbers nor known words; and,
    without --trust, for settings that would make the run long."""
    if not isinstance(objective, dict) or not isinstance(objective.get("settings", {}), dict):
        raise ValueError("'objective' must be an object with a name and settings")
    name = objective.get("name")
    if str(name).startswith("reward:") and name not in OBJECTIVES.split(", "):
        raise ValueError(f"made with {str(name)[:80]}, which may download weights: give --objective yourself")
    if "sha256" in objective or name not in OBJECTIVES.split(", "):
        raise ValueError(
            f"made with {str(name)[:80]} (sha256 {str(objective.get('sha256'))[:64]}): "
            "give --objective yourself, if you trust that file"
        )
    given["objective"] = name
    settings = {str(key): value for key, value in objective.get("settings", {}).items()}
    settings.pop("candidates", None)  # the image's list of candidates holds their number
    for key, value in settings.items():
        if not isinstance(value, (int, float)) and value not in (None, *WORDS):
            raise ValueError(f"'objective' sets {key[:40]!r} to neither a number nor a known word")
        if type(value) is int and value > MOST_SETTING and not given["trust"]:
            raise ValueError(f"its objective asks for {key[:40]} {value}, which takes long: give --trust")
    if given["objective_set"] is None and settings:
        given["objective_set"] = ",".join(f"{key}={value}" for key, value in settings.items())


def _candidates(ranked: Any) -> list[int] | int | None:
    """Checks `ranked`, the setting `candidates` of an image. It may be a list with one dict per
    candidate, or the number of candidates, or None. Returns the list of the candidates' seeds, the
    number, or None. Raises ValueError for anything else."""
    option = OPTIONS["candidates"]
    if ranked is None:
        return None
    if not isinstance(ranked, list):
        option.check(option.from_json(ranked))
        return ranked
    option.check(len(ranked))
    seeds: list[int] = []
    for entry in ranked:
        seed = entry.get("seed") if isinstance(entry, dict) else None
        if type(seed) is not int or not 0 <= seed <= MOST_SEED:
            raise ValueError("'candidates' must be a list of objects, each with a seed from 0 to 2^63 - 1")
        seeds.append(seed)
    return seeds


def _take_subjects(given: Given, settings: Given, method: Given) -> None:
    """Copies the subjects (words or token indices that must not be neglected) from the image's
    `settings` to the options `given`, if the new run needs subjects and the command line gives
    none. `method` holds the new run's options "init_noise" and "score"."""
    asks = method.get("init_noise") in ("initno", "best") or method.get("score") == "attention"
    asks = asks or given["excite"] or given["attention_maps"]
    named = given["token_indices"] is not None or given["subjects"] is not None
    subjects = settings.get("subjects")
    if asks and subjects and not named:
        text = OPTIONS["subjects"].from_json(subjects)
        words = isinstance(subjects, str) or all(isinstance(subject, str) for subject in subjects)
        given["subjects" if words else "token_indices"] = text


# --- limits without --trust -------------------------------------------------------------------------------


def _check_work(given: Given, taken: Given) -> None:
    """Raises ValueError if one of the options `taken` from an image requests more work, or a larger
    image, than is allowed without --trust. `given` holds all options."""
    for name, value in taken.items():
        option = OPTIONS[name]
        if isinstance(value, (int, float)) and value > option.unasked:
            raise ValueError(
                f"it asks for {name} {value}, which takes long: give {option.flag} {value}, or --trust"
            )
    layout = taken.get("layout")
    sides = [given["width"] or 0, given["height"] or 0]
    if isinstance(layout, dict):
        own = [layout.get("width"), layout.get("height")]
        sides = [side if isinstance(side, int) else 0 for side in own] if any(own) else sides
    elif not {"width", "height"} & taken.keys():
        return
    if sides[0] * sides[1] > MOST_PIXELS:
        raise ValueError(
            f"it asks for {sides[0]}x{sides[1]} pixels, which takes long: give --width and --height "
            "(of a layout, --layout), or --trust"
        )


def _check_product(given: Given, taken: Given) -> None:
    """Raises ValueError if the options together need more UNet evaluations than MOST_EVALUATIONS,
    although each option alone is allowed. `taken` holds the options that come from an image, and
    `given` all options."""
    options = given | taken
    regions = 0
    if isinstance(options["layout"], dict) and isinstance(options["layout"].get("regions"), list):
        regions = len(options["layout"]["regions"])
    pixels = (options["height"] or 512) * (options["width"] or 512)
    steps = options["steps"] or 50
    evaluations = steps
    method = options["init_noise"]
    if method in ("select", "best"):  # a stability score samples the image and inverts it again
        each = 2 * steps if options["score"] == "stability" else 1
        evaluations += (options["candidates"] or 100) * (steps if method == "best" else each)
    if method == "optimize":
        evaluations += (options["optimize_steps"] or 100) * 4 * steps
    evaluations *= (1 + regions) * pixels / 512**2
    if evaluations > MOST_EVALUATIONS:
        raise ValueError(
            f"it asks for work like {evaluations:,.0f} UNet evaluations at 512x512 pixels, which takes long: "
            "give fewer --steps, --candidates or --optimize-steps, or --trust"
        )


def _check_model(given: Given, taken: Given) -> None:
    """Raises ValueError if the model that an image names is neither the embedded model nor a local
    file or folder, because it would be downloaded from the hub. Also raises ValueError if the model
    is a single file and no tokenizer is given, because the tokenizer might be downloaded. `taken`
    holds the options that come from the image, and `given` all options."""
    model = taken.get("model", "shapes")
    if model != "shapes" and not exists(Path(model)):
        raise ValueError(
            f"it names the model {model!r}, which is not a file here and would be fetched from the hub: "
            f"give --model {model}, or --trust"
        )
    if model != "shapes" and Path(model).is_file() and given["tokenizer"] is None:
        raise ValueError(
            f"its model {model!r} is a single file, whose tokenizer could be fetched from the hub: "
            f"give --model {model}, or --trust"
        )


def _check_places(path: Path, taken: Given) -> None:
    """Raises ValueError if one of the options `taken` from the image at `path` names a file outside
    the image's folder."""
    folder = os.path.realpath(path.parent)
    outside: dict[str, str] = {}
    for name, place in _places(taken):
        real = os.path.realpath(place)
        # A layout file could itself name any file. minsd records layouts by their contents.
        by_name = name == "layout" and not isinstance(taken["layout"], dict)
        if by_name or not _inside(real, folder):
            outside.setdefault(name, place)
    if taken.get("model") == "shapes":
        outside.pop("model", None)
    if outside:
        listed = ", ".join(f"{name} {place!r}" for name, place in outside.items())
        flags = ", ".join(OPTIONS[name].flag for name in outside)
        raise ValueError(
            f"it names files outside its own folder: {listed}; if you trust the image, give --trust, "
            f"or give {flags}"
        )


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _places(taken: Given) -> list[tuple[str, str]]:
    """Returns pairs (option, path) for all files that the options `taken` from an image would
    load."""
    places = [("model", taken["model"])] if "model" in taken else []
    places += [(name, str(taken[name])) for name in FILES if name in taken]
    places += [("lora", str(split_scale(text)[0])) for text in taken.get("lora", ())]
    places += [("embedding", str(split_name(text)[0])) for text in taken.get("embedding", ())]
    layout = taken.get("layout")
    if not isinstance(layout, dict):
        return places + ([] if layout is None else [("layout", str(layout))])
    regions = layout.get("regions")
    for region in regions if isinstance(regions, list) else ():
        if isinstance(region, dict):
            adapters = region.get("lora")
            texts = [text for text in adapters if isinstance(text, str)] if isinstance(adapters, list) else []
            places += [("layout", str(split_scale(text)[0])) for text in texts]
            places += [("layout", region[key]) for key in REGION_FILES if isinstance(region.get(key), str)]
    return places
