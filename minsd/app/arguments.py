"""Arguments, checked and completed: everything that can be known wrong before a model is loaded, in one line each.

`check` takes what the command line gave, with the settings of a picture (--like) or the lines of a prompts file
(minsd/prompts.py), and makes of it what each prompt is drawn with. Nothing heavy is imported until a file needs it.
"""

import dataclasses
import os
import random
import re
import tempfile
from argparse import Action, Namespace
from collections.abc import Mapping
from pathlib import Path

from minsd.app.prompts import located, read_prompts

EXAMPLE = 'python -m minsd.generate "a red circle and a blue square"'
LARGEST = 16384  # pixels a side


def check(args: Namespace, options: Mapping[str, Action]) -> list[Namespace]:
    """The arguments of each prompt, its seeds a list. `options`: the parser's, by name. ValueError or FileNotFoundError for
    everything that can be known wrong before a model is loaded."""
    if args.like is not None:
        if args.prompts is not None:
            raise ValueError("--like is for one picture: leave out --prompts")
        take_from_picture(args)
    args.model, args.attention = args.model or "shapes", args.attention or "auto"
    if args.prompts is not None:
        if args.prompt is not None:
            raise ValueError("give a prompt or --prompts FILE, not both")
        lines = read_prompts(args.prompts, args, options)
    elif args.prompt is None and args.layout is None and args.invert is None:
        raise ValueError(f"a prompt is needed, for example: {EXAMPLE}")
    else:
        lines = [args]
    if args.layout_preview and args.layout is None:
        raise ValueError("--layout-preview is for --layout FILE")
    args.lora = [part if isinstance(part, str) else ":".join(map(str, part)) for part in args.lora or []]
    if args.lora:
        from minsd.noise.layout import split_scale

        args.adapters = [split_scale(text) for text in args.lora]
    if args.resume and any(line.seed is None and line.seeds is None for line in lines):
        raise ValueError(
            "--resume needs --seed or --seeds: without, every run draws seeds of its own and nothing is done twice"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.save_noise is not None:
            raise ValueError("--save-noise is for one process: seeds give the same noise anywhere")
        if any(line.seed is None and line.seeds is None for line in lines):
            raise ValueError(
                "several processes need --seed or --seeds: without, each would draw seeds of its own"
            )
    chance = random.SystemRandom().randrange(2**32)  # one for all prompts: they can be compared
    for line in lines:
        with located(line):
            check_line(line, chance)
    if not args.list_tokens:
        check_out(args)
    return lines


# What --like takes from a picture, by the same name there.
LIKE = (
    "prompt",
    "negative_prompt",
    "model",
    "vae",
    "prediction_type",
    "seed",
    "steps",
    "guidance_scale",
    "sampler",
    "karras",
    "height",
    "width",
    "init_image",
    "strength",
    "layout",
    "crop_margin",
    "controlnet",
    "control_image",
    "control_scale",
    "lora",
    "invert",
    "dtype",
    "device",
    "tokenizer",
    "attention",
)
LIKE_METHOD = ("init_noise", "score", "optimize_steps", "optimize_mode")  # only together
PATHS = ("vae", "tokenizer", "init_image", "layout", "controlnet", "control_image", "invert")


def take_from_picture(args) -> None:
    """--like: what the command line leaves open is as in the picture."""
    from minsd.image import read_settings

    settings = read_settings(args.like)
    if settings.get("noise_file") and args.noise is None:
        raise ValueError(
            f"{args.like} began from the noise file {settings['noise_file']}: give it with --noise"
        )
    keys = LIKE
    if args.init_noise is None and settings.get("init_noise") not in (
        None,
        "invert",
    ):  # else this run has a method of its own
        keys += LIKE_METHOD
        if ranked := settings.get("candidates"):  # the search began at the first of them, and is made again
            settings |= {"seed": ranked[0]["seed"]}
            args.candidates = args.candidates or len(ranked)
        if args.excite is None:
            args.excite = settings.get("excite") is not None
    method = (settings if "init_noise" in keys else vars(args)).get
    looks = (
        method("init_noise") == "initno"
        or method("score") == "attention"
        or args.excite
        or args.attention_maps
    )
    if looks and args.token_indices is None and args.subjects is None and settings.get("subjects"):
        words = all(isinstance(subject, str) for subject in settings["subjects"])
        setattr(args, "subjects" if words else "token_indices", ",".join(map(str, settings["subjects"])))
    for key in keys:
        if (
            getattr(args, key) is None
            and settings.get(key) is not None
            and not (key == "seed" and args.seeds is not None)
        ):
            setattr(
                args,
                key,
                Path(settings[key]) if key in PATHS and isinstance(settings[key], str) else settings[key],
            )


def check_line(line, chance: int) -> None:
    """What one prompt is drawn with: ranges, files, contradictions; its seeds become a list."""
    check_method(line)
    check_layout(line)
    check_control(line)
    check_invert(line)
    for name in ("prompt", "negative_prompt"):
        if (getattr(line, name) or "").encode(errors="replace") != (getattr(line, name) or "").encode(
            errors="surrogatepass"
        ):
            raise ValueError(f"the {name.replace('_', ' ')} is not text in UTF-8")
    for name in ("height", "width"):
        value = getattr(line, name)
        if value is not None and (not 8 <= value <= LARGEST or value % 8):
            nearest = min(max(8, round(value / 8) * 8), LARGEST)
            raise ValueError(
                f"--{name} must be a multiple of 8 from 8 to {LARGEST}, not {value}; the nearest is {nearest}"
            )
    if line.steps is not None and not 1 <= line.steps <= 1000:
        raise ValueError(f"--steps must be from 1 to 1000, not {line.steps}")
    if line.guidance_scale is not None and not abs(line.guidance_scale) <= 1000:
        raise ValueError(f"--guidance-scale must be a number such as 7.5, not {line.guidance_scale}")
    if line.karras and line.sampler != "dpmpp_2m":
        raise ValueError("--karras is for --sampler dpmpp_2m")
    if line.strength is not None and line.init_image is None:
        raise ValueError("--strength is for --init-image")
    if line.strength is not None and not 0 <= line.strength <= 1:
        raise ValueError(f"--strength must be from 0 to 1, not {line.strength}")
    if line.init_image is not None:
        check_picture(line.init_image)
    if line.num_images is not None and not 1 <= line.num_images <= 1_000_000:
        raise ValueError(f"--num-images must be from 1 to a million, not {line.num_images}")
    if line.seeds is not None and (line.seed is not None or line.num_images is not None):
        raise ValueError(
            "--seeds already says how many pictures and from which seeds: leave out --seed and --num-images"
        )
    if line.seed is not None and not 0 <= line.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, not {line.seed}")
    if line.seeds is not None:
        line.seeds = parse_seeds(line.seeds)
    else:
        first, stride = (
            chance if line.seed is None else line.seed,
            line.candidates or 1,
        )  # no seed is a candidate twice
        line.seeds = list(range(first, first + (line.num_images or 1) * stride, stride))
    if line.seeds[-1] + (line.candidates or 1) > 2**63 or max(line.seeds) >= 2**63:
        raise ValueError(f"seeds go up to 2^63 - 1, not to {max(line.seeds) + (line.candidates or 1) - 1}")
    if line.noise is not None and not line.noise.is_file():
        raise FileNotFoundError(f"there is no noise file {line.noise}")


def parse_seeds(text: str) -> list[int]:
    """ "0-9,12" -> [0, ..., 9, 12]."""
    seeds = []
    for part in text.split(","):
        if not (m := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)):
            raise ValueError(f"--seeds takes numbers and ranges such as 0-9,12, not {text!r}")
        first, last = int(m[1]), int(m[2] or m[1])
        if last < first or last - first >= 1_000_000:
            raise ValueError(
                f"--seeds: {part.strip()} is not a range of at most a million seeds, lowest first"
            )
        seeds += range(first, last + 1)
    return seeds


def check_method(line) -> None:
    """How the initial noise is found, and what goes with it."""
    method = line.init_noise = line.init_noise or "random"
    if method != "random":
        for name, given in (("--noise", line.noise), ("--init-image", line.init_image)):
            if given is not None:
                raise ValueError(
                    f"--init-noise {method} looks for the initial noise itself: leave out {name}"
                )
    if method == "select":
        line.score, line.candidates = (
            line.score or "stability",
            100 if line.candidates is None else line.candidates,
        )
    elif line.score is not None and (method != "initno" or line.score != "attention"):
        raise ValueError(
            "--score is for --init-noise select (or, as attention, for initno to begin from the best of --candidates)"
        )
    elif line.score is None and line.candidates is not None:
        raise ValueError("--candidates is for --init-noise select, or for initno with --score attention")
    elif line.score is not None:
        line.candidates = 16 if line.candidates is None else line.candidates
    if line.candidates is not None and not 1 <= line.candidates <= 100_000:
        raise ValueError(f"--candidates must be from 1 to 100000, not {line.candidates}")
    for name in ("optimize_steps", "optimize_mode"):
        if getattr(line, name) is not None and method != "optimize":
            raise ValueError(f"--{name.replace('_', '-')} is for --init-noise optimize")
    if method == "optimize":
        line.optimize_steps = 100 if line.optimize_steps is None else line.optimize_steps
        line.optimize_mode = line.optimize_mode or "full"
        if not 0 <= line.optimize_steps <= 100_000:
            raise ValueError(f"--optimize-steps must be from 0 to 100000, not {line.optimize_steps}")
    if line.excite is False and method != "initno":
        line.excite = None  # there is nothing to leave out
    line.looks = method == "initno" or line.excite or line.attention_maps or line.score == "attention"
    if line.subjects is not None and line.token_indices is not None:
        raise ValueError("give --subjects or --token-indices, not both")
    if (line.subjects is not None or line.token_indices is not None) and not line.looks:
        raise ValueError(
            "--subjects and --token-indices are for --init-noise initno, --excite, --score attention or --attention-maps"
        )
    if line.token_indices is not None:
        if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", line.token_indices):
            raise ValueError(f"--token-indices takes positions such as 2,5, not {line.token_indices!r}")
        line.subjects = [int(part) for part in line.token_indices.split(",")]
    elif line.subjects is not None:
        line.subjects = [part.strip() for part in line.subjects.split(",")]


def check_layout(line) -> None:
    """Reads the layout: its prompt and its size are the picture's."""
    line.regions = None
    if line.crop_margin is not None and line.layout is None:
        raise ValueError(
            "--crop-margin is for --layout FILE (in a prompts file it can be a line's own, crop_margin)"
        )
    if line.layout is None:
        return
    if line.crop_margin is not None and not 0 <= line.crop_margin <= 1000:
        raise ValueError(f"--crop-margin must be 0 or more, such as 0.25, not {line.crop_margin}")
    from minsd.noise import layout

    line.regions = layout.load(line.layout)
    if line.prompt is not None and line.prompt != line.regions.prompt:
        line.regions = dataclasses.replace(line.regions, prompt=line.prompt)
    if line.negative_prompt is not None and line.negative_prompt != line.regions.negative_prompt:
        line.regions = dataclasses.replace(line.regions, negative_prompt=line.negative_prompt)
    if line.compile and any(region.lora for region in line.regions.regions):
        raise ValueError("--compile cannot take in adapters by region (the layout's lora): leave it out")
    line.prompt, line.negative_prompt = line.regions.prompt, line.regions.negative_prompt
    if (
        line.init_noise == "select"
        and line.score == "attention"
        and line.regions.regions
        and not (line.excite or line.attention_maps)
    ):
        if line.subjects is not None:
            raise ValueError(
                "with a layout, select --score attention asks where the regions' captions look: leave out --subjects"
            )
        line.looks = False
    for path in (path for region in line.regions.regions for path, _ in region.lora):
        if not path.exists():
            raise FileNotFoundError(f"there is no LoRA {path}")
    for name in ("width", "height"):
        if (said := getattr(line.regions, name)) is not None:
            if getattr(line, name) not in (None, said):
                raise ValueError(f"the layout is for a {name} of {said} pixels: leave out --{name}")
            setattr(line, name, said)


def check_control(line) -> None:
    """The ControlNet and what it looks at, which go together."""
    images = [line.control_image, *([] if line.regions is None else line.regions.control_images)]
    if line.control_scale is not None and line.controlnet is None:
        raise ValueError("--control-scale is for --controlnet")
    if line.control_scale is not None and not abs(line.control_scale) <= 100:
        raise ValueError(f"--control-scale must be a number such as 0.8, not {line.control_scale}")
    if line.control_image is not None and line.controlnet is None:
        raise ValueError("--controlnet and --control-image go together: give both")
    if line.controlnet is not None and not any(images):
        raise ValueError(
            "--controlnet needs a control image: --control-image FILE, or a control_image in the --layout"
        )
    for path in filter(None, images if line.controlnet is not None else []):
        check_picture(path)
    if (
        isinstance(line.layout, Path) and not line.layout_preview
    ):  # else of a picture, which spells all out, asked for or not
        check_region_control(line)


def check_region_control(line) -> None:
    """What a layout.json asks of a ControlNet for a region is not passed over. A published folder asks for nothing: its control
    images lie there for whoever has a ControlNet."""
    whole = line.control_image or line.regions.control_image
    for k, region in enumerate(line.regions.regions, 1):
        keys = [key for key in ("control_image", "control_scale") if getattr(region, key) is not None]
        if keys and line.controlnet is None and not line.layout.is_dir():
            gone = f"remove the key{'s' * (len(keys) > 1)}"
            raise ValueError(
                f"{line.regions.source}region {k} has a {' and a '.join(keys)}: give --controlnet FOLDER, or {gone}"
            )
        if "control_scale" in keys and not (region.control_image or whole):
            mend = "give it a control_image, give --control-image FILE for all regions, or remove the key"
            raise ValueError(
                f"{line.regions.source}region {k} has a control_scale and no control image: {mend}"
            )


def check_invert(line) -> None:
    """--invert: a picture's noise is found, not drawn, and by ddim."""
    if line.invert is None:
        return
    given = {
        "--init-noise": line.init_noise != "random",
        "--noise": line.noise,
        "--init-image": line.init_image,
        "--layout": line.layout,
        "--excite": line.excite,
        "--attention-maps": line.attention_maps,
        "--seeds": line.seeds,
        "--num-images": line.num_images,
    }
    if name := next((name for name, value in given.items() if value), None):
        raise ValueError(f"--invert finds the noise of one picture: leave out {name}")
    if line.sampler not in (None, "ddim"):
        raise ValueError(f"--invert goes back the way of ddim: leave out --sampler {line.sampler}")
    check_picture(line.invert)
    line.prompt, line.sampler, line.init_noise = line.prompt or "", "ddim", "invert"
    line.seed = 0 if line.seed is None else line.seed


def check_picture(path: Path) -> None:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture {path}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"{path} is not a picture that can be read") from None


def check_out(args) -> None:
    check_folder("--out", args.out, args.out)
    if args.save_noise is not None:
        if args.save_noise.is_dir():
            raise ValueError(f"--save-noise {args.save_noise} is a folder: name a file in it")
        if not args.save_noise.absolute().parent.is_dir():
            raise FileNotFoundError(f"--save-noise: there is no folder {args.save_noise.absolute().parent}")
        check_folder("--save-noise", args.save_noise, args.save_noise.absolute().parent)


def check_folder(option: str, path: Path, folder: Path) -> None:
    """A folder, or where it will be made (only when the first picture is ready), can be written to."""
    try:
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{option} {str(path)[:200]} cannot be written to: {str(folder)[:200]}: {error.strerror}"
        ) from None
