"""Converts options to typed requests. Every mistake that can be found before a model is loaded is
reported here, in one line.

`read` takes the parsed command line, merges the settings of an image (`--like`) or the lines of a
prompts file into it, and returns a `Command` (the settings of the whole run) and one `Request` per
prompt. Heavy packages such as torch are imported only when a file needs them.
"""

import difflib
import random
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minsd.adapters import split_name, split_scale
from minsd.app.like import CANDIDATE_SEEDS, take_from_image
from minsd.app.options import EXAMPLE, OPTIONS, Given, check_ranges
from minsd.app.prompts import located, read_prompts
from minsd.app.ranks import Share
from minsd.app.seeds import Seeds, consecutive, parse
from minsd.config import MODELS, STRENGTH
from minsd.files import exists
from minsd.words import split, words

if TYPE_CHECKING:
    from minsd.noise.layout import Layout
    from minsd.noise.steer import Steer


# How the embedded model draws a layout by default: measured best in bench/results/README.md.
CROP_MARGIN = 0.25
LAYOUT_CANDIDATES = 50
# Options that say where the noise comes from, and those beside which nothing is chosen for a layout.
FINDS_NOISE = ("init_noise", "score", "candidates", "noise", "init_image", "objective")
DECIDES = (*FINDS_NOISE, "crop_margin", "excite", "subjects", "token_indices", "controlnet", "layout_preview")

MOST_IMAGES = 10_000_000  # of one run; they would take 11 days on 100 GPUs at 10 s per image


@dataclass(frozen=True)
class Command:
    """The settings of the command line that hold for the whole run."""

    model: str
    vae: Path | None
    tokenizer: Path | None
    prediction_type: str | None
    controlnet: Path | None
    prompt_weights: bool | None
    clip_skip: int | None
    embedding: tuple[str, ...]  # FILE or FILE:NAME, as given
    lora: tuple[str, ...]  # FILE or FILE:SCALE, as given
    device: str | None
    dtype: str | None
    attention: str
    compile: bool
    out: Path
    resume: bool
    wait: bool
    engine: str | None
    save_noise: bool
    layout_preview: bool
    layout_overlay: bool
    attention_maps: bool
    preview: int | None
    list_tokens: bool
    quiet: bool
    json: bool
    debug: bool
    notes: tuple[str, ...] = ()  # lines to print before anything is loaded


@dataclass(frozen=True)
class NoiseMethod:
    """How the initial noise of an image is found (--init-noise). A field is None if the method does
    not have this option."""

    name: str  # of noise.methods.METHODS; or "invert"
    candidates: int | None = None
    score: str | None = None
    optimize_steps: int | None = None
    optimize_mode: str | None = None
    candidate_seeds: tuple[int, ...] | None = None  # those of the image that --like repeats


@dataclass(frozen=True)
class InitImage:
    """The image from which an image-to-image generation begins (`path`), and the fraction of the
    sampling steps that run (`strength`)."""

    path: Path
    strength: float


@dataclass(frozen=True)
class ControlRequest:
    """A ControlNet, its control image (None if only regions of the layout have one), and the scale
    of the ControlNet."""

    net: Path
    image: Path | None
    scale: float


@dataclass(frozen=True, slots=True)
class Request:
    """The checked settings of one prompt. A field is None if the prompt does not use it, or if the
    model's default applies.
    """

    where: str  # how error messages about this prompt begin: "prompts.jsonl, line 2: "
    prompt: str
    negative_prompt: str
    seeds: Seeds
    steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
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
    layout_method: str | None
    control: ControlRequest | None
    invert: Path | None


def read(given: Given, lines: Iterable[tuple[str, Given]] | None = None) -> tuple[Command, list[Request]]:
    """Checks the options `given` on the command line, and converts them to typed settings. Returns
    (command, requests): the settings of the whole run, and a list with the settings of each prompt.
    `lines` holds the prompts' options as pairs (where, options), in which `where` is the beginning
    of error messages about that prompt. By default the prompts are those of the command line or its
    prompts file.

    Raises FileNotFoundError for a missing file, and ValueError for every other mistake that can be
    found before a model is loaded.
    """
    notes: list[str] = []
    if given["like"] is not None:
        if given["prompts"] is not None:
            raise ValueError("--like is for one image: leave out --prompts")
        given = take_from_image(given, notes)
    if given["layout_preview"] and given["layout"] is None:
        raise ValueError("--layout-preview is for --layout FILE")
    if given["wait"] and not given["resume"]:
        raise ValueError("--wait is for --resume")
    OPTIONS["preview"].check(given["preview"])
    several = Share.from_environment().world > 1
    if several and given["engine"] == "ray":
        raise ValueError("--engine ray divides the work itself: start one process, without torchrun")
    if given["engine"] == "ray" and ".py:" in (given["objective"] or ""):
        raise ValueError("--engine ray cannot send a function of your own to workers: leave out --engine")
    # The same random seed for all prompts, so that their images can be compared.
    chance = random.SystemRandom().randrange(2**32)
    requests: list[Request] = []
    images = 0
    for where, line in _lines(given) if lines is None else lines:
        if line["seed"] is None and line["seeds"] is None:
            _check_seeded(given, several)
        with located(where):
            requests.append(request(line, where, chance))
            images += requests[-1].seeds.count
            check_count(images)
    if given["layout_method"] is None and any(one.layout_method for one in requests):
        notes.append(
            f"layout: drawn by crops, from the best of {LAYOUT_CANDIDATES} noises "
            "(--layout-method paper draws it as NoiseCollage was published)"
        )
    if given["layout_overlay"] and not any(one.layout for one in requests):
        raise ValueError("--layout-overlay is for --layout FILE")
    _check_files(given)
    if not given["list_tokens"]:
        _check_writable(given["out"])
    return _command(given, notes), requests


def _check_seeded(given: Given, several: bool) -> None:
    """Called for a prompt without seeds, whose seeds would be chosen at random. Raises ValueError
    with --resume, because every run would choose other seeds. Raises ValueError if the run has
    several processes (`several`), because each would choose seeds of its own."""
    if given["resume"]:
        raise ValueError(
            "--resume needs --seed or --seeds: without, every run draws random seeds and finds nothing done"
        )
    if several:
        raise ValueError(
            "several processes need --seed or --seeds: without, each would draw random seeds of its own"
        )


def check_count(images: int) -> None:
    """Raises ValueError if a run would draw more images than MOST_IMAGES."""
    if images > MOST_IMAGES:
        raise ValueError(f"a run draws at most {MOST_IMAGES:,} images: split the list into several runs")


def _command(given: Given, notes: list[str]) -> Command:
    taken: Given = {name: given[name] for name in Command.__dataclass_fields__ if name != "notes"}
    taken |= {"model": given["model"] or "shapes", "attention": given["attention"] or "auto"}
    taken |= {name: tuple(given[name] or ()) for name in ("lora", "embedding")}
    return Command(**taken, notes=tuple(notes))


def _lines(given: Given) -> Iterator[tuple[str, Given]]:
    """Yields (where, options) for each prompt: that of the command line, or those of the prompts
    file. `where` is the beginning of error messages about the prompt, such as "prompts.jsonl, line
    2: ". Raises ValueError if no prompt is given, or both a prompt and a prompts file."""
    if given["prompts"] is not None:
        if given["prompt"] is not None:
            raise ValueError("give a prompt or --prompts FILE, not both")
        yield from read_prompts(given["prompts"], given)
        return
    if given["prompt"] is None and given["layout"] is None and given["invert"] is None:
        raise ValueError(f"a prompt is needed, for example: {EXAMPLE}")
    yield "", given


# --- one prompt -------------------------------------------------------------------------------------------


def request(given: Given, where: str, chance: int) -> Request:
    """Checks the options `given` for one prompt, and returns them with their defaults filled in.
    `where` is the beginning of error messages about the prompt. `chance` is the seed to use if none
    is given.

    Raises FileNotFoundError for a missing file, and ValueError for every other mistake that can be
    found before a model is loaded.
    """
    layout = _layout(given)
    given = _placed(given, layout)
    steer = _steer(given)
    method = _method(given) if steer is None else _steered(given, steer)
    asked = _subjects(given)
    # Without InitNO there is nothing to turn off.
    excite = None if given["excite"] is False and method.name != "initno" else given["excite"]
    wants = bool(
        method.name in ("initno", "best") or excite or given["attention_maps"] or method.score == "attention"
    )
    wants = wants or (asked is not None and steer is not None)
    if asked is not None and not wants:
        raise ValueError(
            "--subjects and --token-indices are for --init-noise initno, --excite, --score attention, "
            "--objective or --attention-maps"
        )
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
        if layout.regions and (steer is None or not steer.replaces_layout):
            _check_drafts(method, steer)
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
        guidance_rescale=given["guidance_rescale"] or None,
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
        layout_method=given["layout_method"],
        control=control,
        invert=given["invert"],
    )


def _steer(given: Given) -> "Steer | None":
    """Returns the objective of --objective, checked, with its settings and its driver. The driver
    states how the objective is used: to select noise, to optimise noise, or to update the latents
    while denoising. Returns None without --objective. Raises ValueError for options that cannot be
    combined with the objective and, without --objective, for options that need it."""
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
        # `best` has candidates of its own, besides an objective that is followed while denoising.
        if given[option] is not None and (option, given["init_noise"]) != ("candidates", "best"):
            if setting in settings:
                raise ValueError(
                    f"{OPTIONS[option].flag} and --objective-set {setting}= are the same: give one"
                )
            settings[setting] = given[option]
    name = given["init_noise"] or "random"
    steer = choose(
        given["objective"], driver=name if name in ("select", "optimize") else None, settings=settings
    )
    if name in ("initno", "best") and steer.driver != "refine":
        raise ValueError(
            f"--init-noise {name} finds the noise, and {steer.name} by {steer.driver} would as well: give one"
        )
    return steer


def _check_drafts(method: NoiseMethod, steer: "Steer | None") -> None:
    """Raises ValueError if the noise is chosen by drafts, which are the first steps of a run: with
    --init-noise best, or with an objective's setting search=halving. It is called if the image will
    be drawn with the regions of a layout, because drafts are drawn without these regions."""
    by = "--init-noise best" if method.name == "best" else "search=halving"
    if method.name == "best" or (steer is not None and steer.settings.get("search") == "halving"):
        raise ValueError(
            f"{by} drafts the prompt without the layout's regions: use --init-noise select, which ranks "
            "noises by where the regions' captions attend"
        )


def _steered(given: Given, steer: "Steer") -> NoiseMethod:
    """Returns how the initial noise is found if there is an objective. If the objective's driver is
    "select" or "optimize", the objective finds the noise. If the driver is "refine", which updates
    the latents while denoising, the noise is found as --init-noise states."""
    if steer.driver == "refine":
        plain: Given = {"optimize_steps": None} | (
            {} if given["init_noise"] == "best" else {"candidates": None}
        )
        return _method(given | plain)
    if steer.driver == "optimize":
        return NoiseMethod(_method(given | {"init_noise": "optimize", "candidates": None}).name)
    from minsd.noise.steer import Selecting

    how = Selecting(**{k: v for k, v in steer.settings.items() if k in Selecting.__dataclass_fields__})
    count = 1 if how.search == "zero-order" else how.candidates
    method = _method(given | {"init_noise": "select", "candidates": count, "score": "attention"})
    return replace(method, score=None)


def _method(given: Given) -> NoiseMethod:
    """Returns how the initial noise is found (--init-noise), with the method's defaults filled in.
    Raises ValueError for options that the method does not have."""
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
    elif name == "best" and score is None:
        candidates = 8 if candidates is None else candidates
    elif score is not None and (name != "initno" or score != "attention"):
        raise ValueError(
            "--score is for --init-noise select (or, as attention, for initno to begin from the best of "
            "--candidates)"
        )
    elif score is None and candidates is not None:
        raise ValueError(
            "--candidates is for --init-noise select and best, or for initno with --score attention"
        )
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
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*", indices):
        raise ValueError(f"--token-indices takes positions such as 2,5, not {indices[:60]!r}")
    return [int(part) for part in indices.split(",")]


def _layout(given: Given) -> "Layout | None":
    """Reads the layout of --layout. Returns None if there is none. A prompt or negative prompt
    given on the command line replaces that of the layout. Raises ValueError for options that cannot
    be combined with the layout, and FileNotFoundError for a missing file."""
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
        if not exists(path):
            raise FileNotFoundError(f"there is no LoRA {path}")
    for name in ("width", "height"):
        own = getattr(layout, name)
        if own is not None and given[name] not in (None, own):
            raise ValueError(f"the layout is for a {name} of {own} pixels: leave out --{name}")
    return layout


def _placed(given: Given, layout: "Layout | None") -> Given:
    """Adds the options that --layout-method implies, and returns all options. The method "crops"
    sets a crop margin. If no option says where the noise comes from, "crops" also selects the noise
    by attention. The method "paper" sets nothing. Raises ValueError for options that contradict the
    method.

    If the user names no method, "crops" is used with the embedded model, for which it was measured
    to be best. It is not used with --like, or with options that already decide how the layout is
    drawn or where the noise comes from.
    """
    named = given["layout_method"]
    if layout is None:
        if named is not None:
            raise ValueError("--layout-method is for --layout FILE")
        return given
    if named == "paper" and given["crop_margin"] is not None:
        raise ValueError("--layout-method paper has no crops: leave out --crop-margin")
    decided = [name for name in DECIDES if given[name] not in (None, False)]
    usual = given["model"] in (None, "shapes") and given["like"] is None and not decided
    usual = usual and all(words(region.prompt) for region in layout.regions)
    if named == "paper" or not layout.regions or not (named == "crops" or usual):
        return given
    given = given | {"layout_method": "crops"}
    if given["crop_margin"] is None:
        given["crop_margin"] = CROP_MARGIN
    if not any(given[name] is not None for name in FINDS_NOISE):
        given |= {"init_noise": "select", "score": "attention", "candidates": LAYOUT_CANDIDATES}
    return given


def _control(given: Given, layout: "Layout | None") -> ControlRequest | None:
    """Returns the ControlNet with its control image and scale, or None if no ControlNet is given.
    Raises ValueError for a control image or scale without a ControlNet, for a ControlNet without a
    control image, and for settings of the layout's regions that would be ignored."""
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
    # Only for a layout from a file: the layout in an image's settings always has every region's
    # scale, even if the user gave none.
    if layout is not None and isinstance(given["layout"], Path) and not given["layout_preview"]:
        _check_region_control(layout, given["layout"].is_dir(), net, image)
    if net is None:
        return None
    own = None if layout is None else layout.control_image
    return ControlRequest(
        net, image or own, 1.0 if given["control_scale"] is None else given["control_scale"]
    )


def _check_region_control(layout: "Layout", published: bool, net: Path | None, image: Path | None) -> None:
    """Raises ValueError if a region of the layout has control settings (a control image or scale)
    that would be ignored silently. `net` and `image` are the ControlNet and the control image of
    the command line, or None.

    `published` states that the layout is a NoiseCollage folder. Such a folder always contains
    control images, so it is accepted without a ControlNet.
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
    """Raises ValueError for options that cannot be combined with --invert, which finds the noise of
    one image by running ddim backwards. Raises FileNotFoundError if that image is missing. `method`
    is the noise method of --init-noise."""
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
    """Raises ValueError for values out of range, and for options that need another option that is
    not given. Raises FileNotFoundError for a missing noise file."""
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
    if given["noise"] is not None and not exists(given["noise"]):
        raise FileNotFoundError(f"there is no noise file {given['noise']}")


def _init_image(given: Given) -> InitImage | None:
    if given["init_image"] is None:
        return None
    check_image(given["init_image"])
    return InitImage(given["init_image"], STRENGTH if given["strength"] is None else given["strength"])


def _seeds(given: Given, default: int) -> Seeds:
    """Returns the seeds of a prompt, one per image. `default` is the first seed if the options
    contain none. Raises ValueError for seeds that are invalid or given in two ways."""
    if given["seeds"] is not None:
        if given["seed"] is not None or given["num_images"] is not None:
            raise ValueError(
                "--seeds already says how many images and from which seeds: leave out --seed and --num-images"
            )
        return parse(given["seeds"])
    return consecutive(default if given["seed"] is None else given["seed"], given["num_images"] or 1)


# --- files ------------------------------------------------------------------------------------------------


def _check_files(given: Given) -> None:
    """Raises FileNotFoundError if a file that the whole run needs is missing (model, VAE,
    tokenizer, ControlNet, embedding or LoRA). This check comes before heavy packages are imported.
    """
    from minsd.weights import hub

    model = given["model"] or "shapes"
    if model not in MODELS and not exists(Path(model)):
        if Path(model).suffix in (".safetensors", ".ckpt") or not hub.is_id(model):
            near = difflib.get_close_matches(model, MODELS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise FileNotFoundError(
                f"there is no model {model!r}: give a diffusers folder, a .safetensors file, a hub id, "
                f"or one of {', '.join(MODELS)}{hint}"
            )
    for name, what in (("vae", "VAE"), ("tokenizer", "folder"), ("controlnet", "ControlNet")):
        if given[name] is not None and not exists(given[name]):
            raise FileNotFoundError(
                f"there is no {what} {given[name]}: {OPTIONS[name].flag} takes {OPTIONS[name].metavar}"
            )
    for path, _ in map(split_name, given["embedding"] or ()):
        if not exists(path):
            raise FileNotFoundError(
                f"there is no embedding {path}: give a .safetensors, .pt or .bin file, or FILE:NAME"
            )
    for path, _ in (split_scale(text) for text in given["lora"] or ()):
        if not exists(path):
            raise FileNotFoundError(f"there is no LoRA {path}: give a .safetensors file or its folder")


def check_image(path: Path) -> None:
    """Raises FileNotFoundError if an image file is missing, and ValueError if it cannot be read."""
    from minsd.image import read

    read(path)


def _check_writable(out: Path) -> None:
    """Raises ValueError if files cannot be written to the output folder or, if it does not exist
    yet, to its nearest parent that exists. Does not create the folder, which is done with the first
    image."""
    folder = out
    try:
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"--out {str(out)[:200]} cannot be written to: {str(folder)[:200]}: {error.strerror}"
        ) from None
