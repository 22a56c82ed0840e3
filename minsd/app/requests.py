"""From options to typed requests: everything that can be found wrong before a model is loaded is
reported here, in one line.

`read` takes the parsed command line, merges the settings of an image (`--like`) or the lines of a
prompts file into it, and returns a `Command`, what holds for the whole run, and a `Request` per
prompt. Nothing heavy is imported until a file needs it.
"""

import difflib
import os
import random
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minsd.adapters import split_scale
from minsd.app.options import EXAMPLE, OPTIONS, Given, check_ranges
from minsd.app.prompts import located, read_prompts
from minsd.config import MODELS, STRENGTH
from minsd.words import split

if TYPE_CHECKING:
    from minsd.noise.layout import Layout
    from minsd.noise.steer import Steer


CANDIDATE_SEEDS = "candidate_seeds"  # no option: what --like takes from an image that was selected


@dataclass(frozen=True)
class Command:
    """What holds for the whole run."""

    model: str
    vae: Path | None
    tokenizer: Path | None
    prediction_type: str | None
    controlnet: Path | None
    lora: tuple[str, ...]  # FILE or FILE:SCALE, as given
    device: str | None
    dtype: str | None
    attention: str
    compile: bool
    out: Path
    resume: bool
    save_noise: bool
    layout_preview: bool
    attention_maps: bool
    list_tokens: bool
    quiet: bool
    json: bool


@dataclass(frozen=True)
class NoiseMethod:
    """How the initial noise is found. None: not an option of this method."""

    name: str  # of noise.methods.METHODS; or "invert"
    candidates: int | None = None
    score: str | None = None
    optimize_steps: int | None = None
    optimize_mode: str | None = None
    candidate_seeds: tuple[int, ...] | None = None  # those of the image that --like repeats


@dataclass(frozen=True)
class InitImage:
    """Where image to image begins, and the fraction of the steps that it runs."""

    path: Path
    strength: float


@dataclass(frozen=True)
class ControlRequest:
    """A ControlNet, its conditioning image (None: the layout's own), and its weight."""

    net: Path
    image: Path | None
    scale: float


@dataclass(frozen=True)
class Request:
    """What one prompt is drawn with, checked. None: the model's own default."""

    where: str  # how an error in it begins: "prompts.jsonl, line 2: "
    prompt: str
    negative_prompt: str
    seeds: list[int]
    steps: int | None
    guidance_scale: float | None
    sampler: str | None
    karras: bool
    height: int | None  # pixels
    width: int | None
    method: NoiseMethod
    wants_subjects: bool
    subjects: list[str | int] | None  # words or token indices; None: found in the prompt
    excite: bool | None  # latent updates while denoising; None: as the method does
    steer: "Steer | None"  # an objective
    pairs: str | None  # nouns with their attributes; None: found in the prompt
    noise: Path | None
    init: InitImage | None
    layout: "Layout | None"
    crop_margin: float | None
    control: ControlRequest | None
    invert: Path | None


def read(given: Given) -> tuple[Command, list[Request]]:
    """Returns the run's settings and one request per prompt. ValueError or FileNotFoundError for
    every mistake that can be found before a model is loaded.
    """
    if given["like"] is not None:
        if given["prompts"] is not None:
            raise ValueError("--like is for one image: leave out --prompts")
        given = take_from_image(given)
    lines = _lines(given)
    if given["layout_preview"] and given["layout"] is None:
        raise ValueError("--layout-preview is for --layout FILE")
    unseeded = any(line["seed"] is None and line["seeds"] is None for _, line in lines)
    if given["resume"] and unseeded:
        raise ValueError(
            "--resume needs --seed or --seeds: without, every run draws random seeds and finds nothing done"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if unseeded:
            raise ValueError(
                "several processes need --seed or --seeds: without, each would draw random seeds of its own"
            )
    chance = random.SystemRandom().randrange(
        2**32
    )  # one for all prompts, so that their images can be compared
    requests = []
    for where, line in lines:
        with located(where):
            requests.append(request(line, where, chance))
    _check_files(given)
    if not given["list_tokens"]:
        _check_writable(given["out"])
    return _command(given), requests


def _command(given: Given) -> Command:
    taken = {name: given[name] for name in Command.__dataclass_fields__}
    attention = given["attention"] or "auto"
    return Command(
        **taken | {"model": given["model"] or "shapes", "attention": attention, "lora": tuple(_lora(given))}
    )


def _lines(given: Given) -> list[tuple[str, Given]]:
    """Returns, for each prompt, how an error message about it begins, and its options."""
    if given["prompts"] is not None:
        if given["prompt"] is not None:
            raise ValueError("give a prompt or --prompts FILE, not both")
        return list(read_prompts(given["prompts"], given))
    if given["prompt"] is None and given["layout"] is None and given["invert"] is None:
        raise ValueError(f"a prompt is needed, for example: {EXAMPLE}")
    return [("", given)]


# --- --like -----------------------------------------------------------------------------------------------


def take_from_image(given: Given) -> Given:
    """--like: options left out are taken from an image's settings."""
    from minsd.image import read_settings

    given = dict(given)
    settings = read_settings(given["like"])
    if settings.get("noise_file") and given["noise"] is None:
        raise ValueError(
            f"{given['like']} began from the noise file {settings['noise_file']}: give it with --noise"
        )
    same_method = given["init_noise"] is None and settings.get("init_noise") not in (None, "invert")
    if same_method:
        settings = _take_method(given, settings)
    _take_subjects(given, settings, settings if same_method else given)
    for name, option in OPTIONS.items():
        value = settings.get(name)
        if (
            given[name] is not None
            or value is None
            or not (option.like or (same_method and option.like_method))
        ):
            continue
        if name == "seed" and given["seeds"] is not None:
            continue
        given[name] = Path(value) if option.kind is Path and isinstance(value, str) else value
    return given


def _take_method(given: Given, settings: Given) -> Given:
    """Takes over how the image's noise was found. Returns the image's settings with the seed that
    was asked for, before any selection.

    A selection is repeated, from the same candidates unless another seed or number is given.
    """
    ranked = settings.get("candidates")
    if ranked:
        settings = settings | {"seed": ranked[0]["seed"]}
        if given["candidates"] in (None, len(ranked)) and given["seed"] is None and given["seeds"] is None:
            given[CANDIDATE_SEEDS] = tuple(candidate["seed"] for candidate in ranked)
        given["candidates"] = given["candidates"] or len(ranked)
    if given["objective"] is None and settings.get("objective"):
        _take_objective(given, settings["objective"])
    elif given["excite"] is None and given["objective"] is None:
        given["excite"] = settings.get("excite") is not None
    return settings


def _take_objective(given: Given, objective: Given) -> None:
    """Takes over an image's objective. ValueError for one in a file: an image must not name a
    program to run.
    """
    if "sha256" in objective:
        raise ValueError(
            f"{given['like']} was made with {objective['name']} (sha256 {objective['sha256'][:12]}...): "
            "give --objective yourself, if you trust that file"
        )
    given["objective"] = objective["name"]
    settings = {k: v for k, v in objective["settings"].items() if k not in ("candidates",)}
    if given["objective_set"] is None and settings:
        given["objective_set"] = ",".join(f"{k}={v}" for k, v in settings.items())


def _take_subjects(given: Given, settings: Given, method: Given) -> None:
    """Takes over the image's subjects if the run asks for subjects and the command line names
    none. `method`: the settings that state the run's noise method.
    """
    asks = method.get("init_noise") == "initno" or method.get("score") == "attention"
    asks = asks or given["excite"] or given["attention_maps"]
    named = given["token_indices"] is not None or given["subjects"] is not None
    subjects = settings.get("subjects")
    if asks and subjects and not named:
        words = all(isinstance(subject, str) for subject in subjects)
        given["subjects" if words else "token_indices"] = ",".join(map(str, subjects))


# --- one prompt -------------------------------------------------------------------------------------------


def request(given: Given, where: str, chance: int) -> Request:
    """Checks and completes one prompt's options. `chance`: the seed to use where none is given."""
    steer = _steer(given)
    method = _method(given) if steer is None else _steered(given, steer)
    asked = _subjects(given)
    excite = (
        None if given["excite"] is False and method.name != "initno" else given["excite"]
    )  # nothing to turn off
    wants = bool(method.name == "initno" or excite or given["attention_maps"] or method.score == "attention")
    wants = wants or (asked is not None and steer is not None)
    if asked is not None and not wants:
        raise ValueError(
            "--subjects and --token-indices are for --init-noise initno, --excite, --score attention, "
            "--objective or --attention-maps"
        )
    layout = _layout(given)
    by_captions = (
        layout is not None and layout.regions and method.name == "select" and method.score == "attention"
    )
    if by_captions and not (excite or given["attention_maps"]):
        if asked is not None:
            raise ValueError(
                "with a layout, select --score attention ranks by the regions' captions: leave out --subjects"
            )
        wants = False
    if layout is not None:
        given = given | {"prompt": layout.prompt, "negative_prompt": layout.negative_prompt}
        given |= {
            name: getattr(layout, name) for name in ("width", "height") if getattr(layout, name) is not None
        }
    control = _control(given, layout)
    if given["invert"] is not None:
        _check_invert(given, method)
        method = NoiseMethod("invert")
        given = given | {"prompt": given["prompt"] or "", "sampler": "ddim"}
    _check_values(given)
    return Request(
        where,
        given["prompt"],
        given["negative_prompt"] or "",
        _seeds(given, 0 if given["invert"] is not None else chance),
        steps=given["steps"],
        guidance_scale=given["guidance_scale"],
        sampler=given["sampler"],
        karras=bool(given["karras"]),
        height=given["height"],
        width=given["width"],
        method=method,
        wants_subjects=wants,
        subjects=asked,
        excite=excite,
        steer=steer,
        pairs=given["pairs"],
        noise=given["noise"],
        init=_init_image(given),
        layout=layout,
        crop_margin=given["crop_margin"],
        control=control,
        invert=given["invert"],
    )


def _steer(given: Given) -> "Steer | None":
    """Returns the objective with its driver and settings, checked. ValueError for options that do
    not go with it.
    """
    if given["objective"] is None:
        for name in ("objective_set", "pairs"):
            if given[name] is not None:
                raise ValueError(f"{OPTIONS[name].flag} is for --objective")
        return None
    if given["score"] is not None:
        raise ValueError("--score and --objective both say what candidates are ranked by: give one")
    if given["excite"] is not None:
        raise ValueError("--excite is --objective excite: leave out --excite and --no-excite")
    if given["invert"] is not None:
        raise ValueError("--invert finds the noise of one image: leave out --objective")
    if given["optimize_mode"] is not None:
        raise ValueError("--optimize-mode is for optimisation by inversion stability: leave out --objective")
    from minsd.noise.steer import choose, read_settings

    settings: dict[str, object] = {**read_settings(given["objective_set"] or "")}
    for option, setting in (("optimize_steps", "steps"), ("candidates", "candidates")):
        if given[option] is not None:
            if setting in settings:
                raise ValueError(
                    f"{OPTIONS[option].flag} and --objective-set {setting}= are the same: give one"
                )
            settings[setting] = given[option]
    name = given["init_noise"] or "random"
    steer = choose(
        given["objective"], driver=name if name in ("select", "optimize") else None, settings=settings
    )
    if name == "initno" and steer.driver != "refine":
        raise ValueError(
            f"--init-noise initno finds the noise, and {steer.name} by {steer.driver} would as well: give one"
        )
    return steer


def _steered(given: Given, steer: "Steer") -> NoiseMethod:
    """Returns how the initial noise is found where there is an objective."""
    if steer.driver == "refine":
        plain = {"objective": None, "optimize_steps": None, "candidates": None}
        return _method(given | plain)
    if steer.driver == "optimize":
        return NoiseMethod(_method(given | {"init_noise": "optimize", "candidates": None}).name)
    from minsd.noise.steer import Selecting

    how = Selecting(**{k: v for k, v in steer.settings.items() if k in Selecting.__dataclass_fields__})
    count = how.candidates if how.search is None else 1
    method = _method(given | {"init_noise": "select", "candidates": count, "score": "attention"})
    return replace(method, score=None)


def _method(given: Given) -> NoiseMethod:
    """Returns how the initial noise is found, with the method's defaults filled in."""
    name = given["init_noise"] or "random"
    score = given["score"]
    candidates = given["candidates"]
    if name != "random":
        for other in ("noise", "init_image"):
            if given[other] is not None:
                raise ValueError(
                    f"--init-noise {name} finds the initial noise itself: leave out {OPTIONS[other].flag}"
                )
    if name == "select":
        score = score or "attention"
        candidates = 100 if candidates is None else candidates
    elif score is not None and (name != "initno" or score != "attention"):
        raise ValueError(
            "--score is for --init-noise select (or, as attention, for initno to begin from the best of "
            "--candidates)"
        )
    elif score is None and candidates is not None:
        raise ValueError("--candidates is for --init-noise select, or for initno with --score attention")
    elif score is not None:
        candidates = 16 if candidates is None else candidates
    OPTIONS["candidates"].check(candidates)
    if name != "optimize":
        for other in ("optimize_steps", "optimize_mode"):
            if given[other] is not None:
                raise ValueError(f"{OPTIONS[other].flag} is for --init-noise optimize")
        return NoiseMethod(name, candidates, score, candidate_seeds=given.get(CANDIDATE_SEEDS))
    steps = 100 if given["optimize_steps"] is None else given["optimize_steps"]
    return NoiseMethod(name, candidates, score, steps, given["optimize_mode"] or "full")


def _subjects(given: Given) -> list[str | int] | None:
    words = given["subjects"]
    indices = given["token_indices"]
    if words is not None and indices is not None:
        raise ValueError("give --subjects or --token-indices, not both")
    if words is not None:
        return [*split(words)]
    if indices is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", indices):
        raise ValueError(f"--token-indices takes positions such as 2,5, not {indices!r}")
    return [int(part) for part in indices.split(",")]


def _layout(given: Given) -> "Layout | None":
    """Reads the layout. Prompts given on the command line replace the layout's own."""
    if given["layout"] is None:
        if given["crop_margin"] is not None:
            raise ValueError(
                "--crop-margin is for --layout FILE (in a prompts file it can be a line's own, crop_margin)"
            )
        return None
    OPTIONS["crop_margin"].check(given["crop_margin"])
    from minsd.noise.layout import load

    layout = load(given["layout"])
    for name in ("prompt", "negative_prompt"):
        if given[name] is not None and given[name] != getattr(layout, name):
            layout = replace(layout, **{name: given[name]})
    if given["compile"] and any(region.lora for region in layout.regions):
        raise ValueError("--compile cannot take in adapters by region (the layout's lora): leave it out")
    for path in (path for region in layout.regions for path, _ in region.lora):
        if not path.exists():
            raise FileNotFoundError(f"there is no LoRA {path}")
    for name in ("width", "height"):
        own = getattr(layout, name)
        if own is not None and given[name] not in (None, own):
            raise ValueError(f"the layout is for a {name} of {own} pixels: leave out --{name}")
    return layout


def _control(given: Given, layout: "Layout | None") -> ControlRequest | None:
    """Returns the ControlNet and its conditioning image. ValueError where only one of the two is
    given.
    """
    net = given["controlnet"]
    image = given["control_image"]
    if given["control_scale"] is not None and net is None:
        raise ValueError("--control-scale is for --controlnet")
    OPTIONS["control_scale"].check(given["control_scale"])
    if image is not None and net is None:
        raise ValueError("--controlnet and --control-image go together: give both")
    images = [image, *([] if layout is None else layout.control_images)]
    if net is not None and not any(images):
        raise ValueError(
            "--controlnet needs a control image: --control-image FILE, or a control_image in the --layout"
        )
    for path in filter(None, images if net is not None else []):
        check_image(path)
    # The settings of an image spell out every region's scale, asked for or not.
    if layout is not None and isinstance(given["layout"], Path) and not given["layout_preview"]:
        _check_region_control(layout, given["layout"].is_dir(), net, image)
    if net is None:
        return None
    own = None if layout is None else layout.control_image
    return ControlRequest(
        net, image or own, 1.0 if given["control_scale"] is None else given["control_scale"]
    )


def _check_region_control(layout: "Layout", published: bool, net: Path | None, image: Path | None) -> None:
    """Reject per-region control settings that would otherwise be ignored silently.

    `published`: a NoiseCollage folder, which always contains control images, used or not.
    """
    for k, region in enumerate(layout.regions, 1):
        keys = [key for key in ("control_image", "control_scale") if getattr(region, key) is not None]
        if keys and net is None and not published:
            remove = f"remove the key{'s' * (len(keys) > 1)}"
            raise ValueError(
                f"{layout.source}region {k} has a {' and a '.join(keys)}: "
                f"give --controlnet FOLDER, or {remove}"
            )
        if "control_scale" in keys and not (region.control_image or image or layout.control_image):
            mend = "give it a control_image, give --control-image FILE for all regions, or remove the key"
            raise ValueError(f"{layout.source}region {k} has a control_scale and no control image: {mend}")


def _check_invert(given: Given, method: NoiseMethod) -> None:
    """Raises ValueError for options that do not go with --invert, which finds the noise of one
    image by ddim.
    """
    others = ("noise", "init_image", "layout", "excite", "attention_maps", "seeds", "num_images")
    clashes = [OPTIONS[name].flag for name in others if given[name]]
    if method.name != "random":
        clashes.insert(0, "--init-noise")
    if clashes:
        raise ValueError(f"--invert finds the noise of one image: leave out {clashes[0]}")
    if given["sampler"] not in (None, "ddim"):
        raise ValueError(f"--invert runs ddim backwards: leave out --sampler {given['sampler']}")
    check_image(given["invert"])


def _check_values(given: Given) -> None:
    """Raises ValueError for values out of range, and for options that need another option."""
    for name in ("prompt", "negative_prompt"):
        try:
            (given[name] or "").encode()
        except UnicodeEncodeError:
            raise ValueError(f"the {name.replace('_', ' ')} is not text in UTF-8") from None
    check_ranges(given)
    if given["karras"] and given["sampler"] != "dpmpp_2m":
        raise ValueError("--karras is for --sampler dpmpp_2m")
    if given["strength"] is not None and given["init_image"] is None:
        raise ValueError("--strength is for --init-image")
    if given["noise"] is not None and not given["noise"].exists():
        raise FileNotFoundError(f"there is no noise file {given['noise']}")


def _init_image(given: Given) -> InitImage | None:
    if given["init_image"] is None:
        return None
    check_image(given["init_image"])
    return InitImage(given["init_image"], STRENGTH if given["strength"] is None else given["strength"])


def _seeds(given: Given, default: int) -> list[int]:
    """One seed per image."""
    if given["seeds"] is not None:
        if given["seed"] is not None or given["num_images"] is not None:
            raise ValueError(
                "--seeds already says how many images and from which seeds: leave out --seed and --num-images"
            )
        seeds = parse_seeds(given["seeds"])
    else:
        first = default if given["seed"] is None else given["seed"]
        seeds = list(range(first, first + (given["num_images"] or 1)))
    if max(seeds) >= 2**63:
        raise ValueError(f"seeds go up to 2^63 - 1, not to {max(seeds)}")
    return seeds


def parse_seeds(text: str) -> list[int]:
    """ "0-9,12" -> [0, ..., 9, 12]."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"--seeds takes numbers and ranges such as 0-9,12, not {text!r}")
        first = int(match[1])
        last = int(match[2] or match[1])
        if last < first or last - first >= 1_000_000:
            raise ValueError(
                f"--seeds: {part.strip()} is not a range of at most a million seeds, lowest first"
            )
        seeds += range(first, last + 1)
    return seeds


# --- files ------------------------------------------------------------------------------------------------


def _check_files(given: Given) -> None:
    """FileNotFoundError for files of the whole run that are not there, before anything heavy is
    imported.
    """
    from minsd.weights import hub

    model = given["model"] or "shapes"
    if model not in MODELS and not Path(model).exists():
        if Path(model).suffix in (".safetensors", ".ckpt") or not hub.is_id(model):
            near = difflib.get_close_matches(model, MODELS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise FileNotFoundError(
                f"there is no model {model!r}: give a diffusers folder, a .safetensors file, a hub id, "
                f"or one of {', '.join(MODELS)}{hint}"
            )
    for name, what in (("vae", "VAE"), ("tokenizer", "folder"), ("controlnet", "ControlNet")):
        if given[name] is not None and not given[name].exists():
            raise FileNotFoundError(
                f"there is no {what} {given[name]}: {OPTIONS[name].flag} takes {OPTIONS[name].metavar}"
            )
    for path, _ in (split_scale(text) for text in _lora(given)):
        if not path.exists():
            raise FileNotFoundError(f"there is no LoRA {path}: give a .safetensors file or its folder")


def _lora(given: Given) -> list[str]:
    """Returns the adapters as FILE:SCALE. The metadata of images saved by earlier versions has
    [file, scale] pairs instead.
    """
    return [part if isinstance(part, str) else ":".join(map(str, part)) for part in given["lora"] or []]


def check_image(path: Path) -> None:
    """FileNotFoundError or ValueError where a file is not an image that can be read."""
    from minsd.image import read

    read(path)


def _check_writable(out: Path) -> None:
    """ValueError where --out, or the nearest parent that exists, cannot be written to. The first
    image makes the folder.
    """
    folder = out
    try:
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"--out {str(out)[:200]} cannot be written to: {str(folder)[:200]}: {error.strerror}"
        ) from None
