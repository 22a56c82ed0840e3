"""The command line: python -m minsd.generate "a red circle and a blue square"

`main` parses; `check` finds everything that can be known wrong before a model is loaded, and makes of the arguments (and
of each line of a prompts file) what one prompt is drawn with; minsd/run.py draws. Heavy imports wait until the arguments
are known to be good, so that --help and most errors answer at once.
"""

import argparse
import copy
import dataclasses
import errno
import json
import os
import random
import re
import signal
import sys
import tempfile
import warnings
from pathlib import Path

from minsd import __version__

SAMPLERS = ("ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", "unipc", "lcm")  # samplers.SAMPLERS, without its imports
LARGEST = 16384  # pixels a side
METHODS = ("random", "initno", "select", "optimize")
EXAMPLE = 'python -m minsd.generate "a red circle and a blue square"'


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (--help lists the options)")


def parser() -> Parser:
    p = Parser(prog="python -m minsd.generate", description="Draw pictures from a prompt.", epilog=f"example: {EXAMPLE}",
               allow_abbrev=False)
    a = p.add_argument_group("what to draw (each also a key of a line of --prompts FILE.jsonl)").add_argument
    a("prompt", nargs="?", metavar="PROMPT", help="what to draw; may be empty (\"\")")
    a("--negative-prompt", metavar="TEXT", help="what to steer away from")
    a("--seed", metavar="N", type=int, help="seed of the first picture (default: a random one, printed)")
    a("--seeds", metavar="LIST", help="one picture a seed, such as 0-9,12")
    a("--num-images", metavar="N", type=int, help="how many pictures, from consecutive seeds (default: 1)")
    a("--steps", metavar="N", type=int, help="sampling steps (default: the model's, mostly 50)")
    a("--guidance-scale", metavar="G", type=float, help="how strongly the prompt steers (default: the model's)")
    a("--sampler", choices=SAMPLERS, help="default: the model's, mostly ddim")
    a("--karras", action="store_true", default=None, help="levels closer together where there is little noise (dpmpp_2m)")
    a("--height", metavar="H", type=int, help="pixels, a multiple of 8 (default: the model's)")
    a("--width", metavar="W", type=int, help="pixels, a multiple of 8 (default: the model's)")
    a("--init-image", metavar="FILE", type=Path, help="begin from this picture, cut and scaled to the size")
    a("--strength", metavar="S", type=float, help="how far to go from --init-image, 0 to 1 (default: 0.8)")
    a("--noise", metavar="FILE", type=Path, help="initial noise from a file that --save-noise wrote")
    a("--layout", metavar="FILE|DIR", type=Path, help="captions for regions of the picture: a layout.json, or a NoiseCollage folder")
    a("--control-image", metavar="FILE", type=Path, help="what the --controlnet looks at (edges, a pose, ...), taken as it is")
    a("--control-scale", metavar="S", type=float, help="how much the ControlNet counts (default: 1)")
    a = p.add_argument_group("the initial noise (each also a key of such a line)").add_argument
    a("--init-noise", choices=METHODS, help="optimise it by attention maps (initno), select or optimise it by inversion stability")
    a("--candidates", metavar="K", type=int, help="select: the best of K seeds from --seed on (default: 100)")
    a("--score", choices=("stability", "attention"), help="select: by what (default: stability)")
    a("--optimize-steps", metavar="N", type=int, help="optimize: gradient steps (default: 100)")
    a("--optimize-mode", choices=("full", "detach"), help="optimize: through the inversion too, or not (default: full)")
    a("--subjects", metavar="WORDS", help="what must not be neglected, such as \"cat, rabbit\" (default: found in the prompt)")
    a("--token-indices", metavar="LIST", help="the same by token position, such as 2,5 (--list-tokens)")
    a("--excite", action=argparse.BooleanOptionalAction, default=None,
      help="move the latents towards the subjects while denoising (initno does; --no-excite: it does not)")
    a = p.add_argument_group("with what").add_argument
    a("--model", metavar="NAME|DIR|FILE|ID", help="shapes (the embedded model, default), a diffusers folder, a .safetensors file, a hub id")
    a("--vae", metavar="DIR|FILE", type=Path, help="another VAE than the model's own")
    a("--tokenizer", metavar="DIR", type=Path, help="for single files: a folder with vocab.json and merges.txt")
    a("--prediction-type", choices=("epsilon", "v_prediction"), help="what the network predicts, where its files do not say")
    a("--controlnet", metavar="DIR|FILE", type=Path, help="a ControlNet for --control-image, or for those of the --layout")
    a("--lora", metavar="FILE[:SCALE]", action="append", help="an adapter, added to the weights; may be given several times")
    a("--device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one")
    a("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on cuda, else float32")
    a("--attention", choices=("auto", "triton", "sdpa", "reference"), help="who computes attention (default: auto)")
    a("--compile", action="store_true", help="torch.compile the UNet: minutes at first, faster steps after")
    a = p.add_argument_group("many pictures, files, messages").add_argument
    a("--prompts", metavar="FILE", type=Path, help="a prompt a line (.txt), or an object of options a line (.jsonl)")
    a("--resume", action="store_true", help="leave out what --out holds already")
    a("--out", metavar="DIR", type=Path, default=Path("outputs"), help="where pictures go (default: outputs)")
    a("--save-noise", metavar="FILE", type=Path, help="write the initial noise (safetensors)")
    a("--invert", metavar="FILE", type=Path, help="find the noise that draws this picture, save it, and draw from it")
    a("--layout-preview", action="store_true", help="draw the --layout itself to DIR/extra, and stop")
    a("--attention-maps", action="store_true", help="for each picture a sheet of where its subjects' words looked, in DIR/extra")
    a("--like", metavar="PNG", type=Path, help="make this picture again; other options override its settings")
    a("--list-tokens", action="store_true", help="print the prompt's tokens and their positions, and stop")
    a("--quiet", action="store_true", help="no progress, no notes")
    a("--json", action="store_true", help="one JSON object a picture on standard output")
    a("--debug", action="store_true", help="tracebacks for errors")
    a("--version", action="version", version=f"minsd {__version__}")
    return p


# The options that a line of a prompts file may set; the others hold for the whole run.
PER_LINE = (
    "prompt", "negative_prompt", "seed", "seeds", "num_images", "steps", "guidance_scale", "sampler", "karras", "height", "width",
    "init_image", "strength", "noise", "init_noise", "candidates", "score", "optimize_steps", "optimize_mode", "subjects",
    "token_indices", "excite", "layout", "control_image", "control_scale",
)
# What --like takes from a picture, by the same name there.
LIKE = (
    "prompt", "negative_prompt", "model", "vae", "prediction_type", "seed", "steps", "guidance_scale", "sampler", "karras", "height",
    "width", "init_image", "strength", "layout", "controlnet", "control_image", "control_scale", "lora", "invert", "dtype", "device",
    "tokenizer", "attention",
)
LIKE_METHOD = ("init_noise", "score", "optimize_steps", "optimize_mode")  # only together
PATHS = ("vae", "tokenizer", "init_image", "layout", "controlnet", "control_image", "invert")


def parse_seeds(text: str) -> list[int]:
    """"0-9,12" -> [0, ..., 9, 12]."""
    seeds = []
    for part in text.split(","):
        if not (m := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)):
            raise ValueError(f"--seeds takes numbers and ranges such as 0-9,12, not {text!r}")
        first, last = int(m[1]), int(m[2] or m[1])
        if last < first or last - first >= 1_000_000:
            raise ValueError(f"--seeds: {part.strip()} is not a range of at most a million seeds, lowest first")
        seeds += range(first, last + 1)
    return seeds


def take_from_picture(args) -> None:
    """--like: what the command line leaves open is as in the picture."""
    from minsd.image import read_settings

    settings = read_settings(args.like)
    if settings.get("noise_file") and args.noise is None:
        raise ValueError(f"{args.like} began from the noise file {settings['noise_file']}: give it with --noise")
    keys = LIKE
    if args.init_noise is None and settings.get("init_noise") not in (None, "invert"):  # else this run has a method of its own
        keys += LIKE_METHOD
        if ranked := settings.get("candidates"):  # the search began at the first of them, and is made again
            settings |= {"seed": ranked[0]["seed"]}
            args.candidates = args.candidates or len(ranked)
        if args.excite is None:
            args.excite = settings.get("excite") is not None
    method = (settings if "init_noise" in keys else vars(args)).get
    looks = method("init_noise") == "initno" or method("score") == "attention" or args.excite or args.attention_maps
    if looks and args.token_indices is None and args.subjects is None and settings.get("subjects"):
        words = all(isinstance(subject, str) for subject in settings["subjects"])
        setattr(args, "subjects" if words else "token_indices", ",".join(map(str, settings["subjects"])))
    for key in keys:
        if getattr(args, key) is None and settings.get(key) is not None and not (key == "seed" and args.seeds is not None):
            setattr(args, key, Path(settings[key]) if key in PATHS and isinstance(settings[key], str) else settings[key])


def check(args) -> list[argparse.Namespace]:
    """Everything that can be known wrong before a model is loaded; -> the arguments of each prompt, its seeds a list."""
    if args.like is not None:
        if args.prompts is not None:
            raise ValueError("--like is for one picture: leave out --prompts")
        take_from_picture(args)
    args.model, args.attention = args.model or "shapes", args.attention or "auto"
    if args.prompts is not None:
        if args.prompt is not None:
            raise ValueError("give a prompt or --prompts FILE, not both")
        lines = read_prompts(args)
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
        raise ValueError("--resume needs --seed or --seeds: without, every run draws seeds of its own and nothing is done twice")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.save_noise is not None:
            raise ValueError("--save-noise is for one process: seeds give the same noise anywhere")
        if any(line.seed is None and line.seeds is None for line in lines):
            raise ValueError("several processes need --seed or --seeds: without, each would draw seeds of its own")
    chance = random.SystemRandom().randrange(2**32)  # one for all prompts: they can be compared
    for line in lines:
        try:
            check_line(line, chance)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{line.where}{error}") from None
    if not args.list_tokens:
        check_out(args)
    return lines


def read_prompts(args) -> list[argparse.Namespace]:
    """The lines of --prompts FILE over the command line's own options."""
    path = args.prompts
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--prompts takes a .txt file (a prompt a line) or a .jsonl file (an object a line), not {path.name}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no prompts file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    options, lines = {a.dest: a for a in parser()._actions}, []
    for number, content in enumerate(text.split("\n"), 1):
        content = content.strip()
        if not content or (path.suffix == ".txt" and content.startswith("#")):
            continue
        line = copy.copy(args)
        line.where = f"{path}, line {number}: "
        if path.suffix == ".txt":
            line.prompt = content
        else:
            try:
                given = json.loads(content)
            except json.JSONDecodeError as error:
                raise ValueError(f"{line.where}not JSON: {error.msg} at column {error.colno}") from None
            except RecursionError:
                raise ValueError(f"{line.where}brackets within brackets, too many") from None
            if not isinstance(given, dict):
                raise ValueError(f"{line.where}a line must be an object, such as {{\"prompt\": \"a red circle\", \"seeds\": \"0-3\"}}")
            if not any(key in given for key in ("prompt", "layout")):
                raise ValueError(f"{line.where}there is no \"prompt\"")
            if "seeds" in given or "seed" in given:  # these replace the command line's seeds of either kind
                line.seed = line.seeds = line.num_images = None
            for key, value in given.items():
                set_option(line, options, key, value)
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    return lines


def set_option(line, options: dict, key: str, value) -> None:
    """One key of an object in a prompts file, as if it had been given on the command line."""
    name = key.replace("-", "_")
    if name not in PER_LINE:
        if name in options:
            raise ValueError(f"{line.where}{key!r} holds for the whole run: give it on the command line")
        raise ValueError(f"{line.where}unknown key {key!r}; known are {', '.join(PER_LINE)}")
    action = options[name]
    if isinstance(value, list) and action.type is None:
        value = ",".join(map(str, value))
    kind = bool if action.nargs == 0 else (float, int) if action.type is float else int if action.type is int else str
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = {bool: "true or false", int: "a whole number", str: "text"}.get(kind, "a number")
        raise ValueError(f"{line.where}{key!r} must be {wanted}, not {json.dumps(value)}")
    if action.choices and value not in action.choices:
        raise ValueError(f"{line.where}{key!r} must be one of {', '.join(action.choices)}, not {value!r}")
    setattr(line, name, Path(value) if action.type is Path else value)


def check_line(line, chance: int) -> None:
    """What one prompt is drawn with: ranges, files, contradictions; its seeds become a list."""
    check_method(line)
    check_layout(line)
    check_control(line)
    for name in ("prompt", "negative_prompt"):
        if (getattr(line, name) or "").encode(errors="replace") != (getattr(line, name) or "").encode(errors="surrogatepass"):
            raise ValueError(f"the {name.replace('_', ' ')} is not text in UTF-8")
    for name in ("height", "width"):
        value = getattr(line, name)
        if value is not None and (not 8 <= value <= LARGEST or value % 8):
            nearest = min(max(8, round(value / 8) * 8), LARGEST)
            raise ValueError(f"--{name} must be a multiple of 8 from 8 to {LARGEST}, not {value}; the nearest is {nearest}")
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
        raise ValueError("--seeds already says how many pictures and from which seeds: leave out --seed and --num-images")
    if line.seed is not None and not 0 <= line.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, not {line.seed}")
    if line.seeds is not None:
        line.seeds = parse_seeds(line.seeds)
    else:
        first, stride = chance if line.seed is None else line.seed, line.candidates or 1  # no seed is a candidate twice
        line.seeds = list(range(first, first + (line.num_images or 1) * stride, stride))
    if line.seeds[-1] + (line.candidates or 1) > 2**63 or max(line.seeds) >= 2**63:
        raise ValueError(f"seeds go up to 2^63 - 1, not to {max(line.seeds) + (line.candidates or 1) - 1}")
    if line.noise is not None and not line.noise.is_file():
        raise FileNotFoundError(f"there is no noise file {line.noise}")


def check_method(line) -> None:
    """How the initial noise is found, and what goes with it."""
    method = line.init_noise = line.init_noise or "random"
    if method != "random":
        for name, given in (("--noise", line.noise), ("--init-image", line.init_image)):
            if given is not None:
                raise ValueError(f"--init-noise {method} looks for the initial noise itself: leave out {name}")
    if method == "select":
        line.score, line.candidates = line.score or "stability", 100 if line.candidates is None else line.candidates
    elif line.score is not None and (method != "initno" or line.score != "attention"):
        raise ValueError("--score is for --init-noise select (or, as attention, for initno to begin from the best of --candidates)")
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
        raise ValueError("--subjects and --token-indices are for --init-noise initno, --excite, --score attention or --attention-maps")
    if line.token_indices is not None:
        if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", line.token_indices):
            raise ValueError(f"--token-indices takes positions such as 2,5, not {line.token_indices!r}")
        line.subjects = [int(part) for part in line.token_indices.split(",")]
    elif line.subjects is not None:
        line.subjects = [part.strip() for part in line.subjects.split(",")]


def check_layout(line) -> None:
    """Reads the layout: its prompt and its size are the picture's."""
    line.regions = None
    if line.layout is None:
        return
    from minsd.noise import layout

    line.regions = layout.load(line.layout)
    if line.prompt is not None and line.prompt != line.regions.prompt:
        line.regions = dataclasses.replace(line.regions, prompt=line.prompt)
    if line.negative_prompt is not None and line.negative_prompt != line.regions.negative_prompt:
        line.regions = dataclasses.replace(line.regions, negative_prompt=line.negative_prompt)
    if line.compile and any(region.lora for region in line.regions.regions):
        raise ValueError("--compile cannot take in adapters by region (the layout's lora): leave it out")
    line.prompt, line.negative_prompt = line.regions.prompt, line.regions.negative_prompt
    if line.init_noise == "select" and line.score == "attention" and line.regions.regions and not (line.excite or line.attention_maps):
        if line.subjects is not None:
            raise ValueError("with a layout, select --score attention asks where the regions' captions look: leave out --subjects")
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
    images = [line.control_image, *([] if line.regions is None else line.regions.control_images)]
    if line.control_scale is not None and line.controlnet is None:
        raise ValueError("--control-scale is for --controlnet")
    if line.control_scale is not None and not abs(line.control_scale) <= 100:
        raise ValueError(f"--control-scale must be a number such as 0.8, not {line.control_scale}")
    if line.control_image is not None and line.controlnet is None:
        raise ValueError("--controlnet and --control-image go together: give both")
    if line.controlnet is not None and not any(images):
        raise ValueError("--controlnet needs a control image: --control-image FILE, or a control_image in the --layout")
    for path in filter(None, images if line.controlnet is not None else []):
        check_picture(path)
    if line.invert is None:
        return
    given = {"--init-noise": line.init_noise != "random", "--noise": line.noise, "--init-image": line.init_image, "--layout": line.layout,
             "--excite": line.excite, "--attention-maps": line.attention_maps, "--seeds": line.seeds, "--num-images": line.num_images}
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
        raise ValueError(f"{option} {str(path)[:200]} cannot be written to: {str(folder)[:200]}: {error.strerror}") from None


def say(args, *words) -> None:
    if not args.quiet:
        print("minsd:", *words, file=sys.stderr)


def go(args, lines) -> None:
    """Load the model and draw."""
    if args.layout_preview:
        from minsd.image import save
        from minsd.noise.layout import preview

        for number, line in enumerate(lines):
            size = {} if line.regions.width else {"size": line.width or 512}
            save(preview(line.regions, **size), path := args.out / "extra" / f"layout-{number}.png")
            say(args, path)
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    import torch

    import minsd
    from minsd.run import plan, run

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one GPU a process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.attention == "triton" and device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError("--attention triton is for a GPU: leave it out")
    sd = minsd.load(args.model, device, dtype, vae=args.vae, tokenizer=args.tokenizer, prediction_type=args.prediction_type)
    if sd.device.type == "cuda":
        torch.cuda.set_device(sd.device)  # or every process of several would take some of the first one, too
    regions = [region for line in lines if line.regions is not None for region in line.regions.regions]
    if args.adapters or any(region.lora for region in regions):
        from minsd.weights import lora

        paths = {path.resolve() for region in regions for path, _ in region.lora}  # as the jobs name them
        args.by_region = {path: lora.read(path, sd) for path in paths}
        lora.merge([(lora.read(path, sd), scale) for path, scale in args.adapters])
    if args.controlnet is not None:
        from minsd.weights.control import load_controlnet

        args.net = load_controlnet(args.controlnet, device=sd.device, dtype=sd.dtype)
    sd.set_attention(args.attention, *([] if args.net is None else [args.net]))
    if args.compile:
        sd.compile()
    if int(os.environ.get("RANK", 0)):
        args.quiet = True
    for note in sd.notes:
        say(args, note)
    if args.list_tokens:
        for line in lines:
            tokens, last = sd.text.tokens(line.prompt), sd.text.max_length - 1
            for position, token in enumerate(tokens):
                print(f"{position:3d}  {token}" + ("  (cut off)" if last <= position < len(tokens) - 1 else ""))
        return
    jobs = plan(sd, args, lines)
    first, last = jobs[0]["seed"], jobs[-1]["seed"]
    many = f", {len(jobs)} pictures" + (f" of {len(lines)} prompts" if len(lines) > 1 else "")
    say(args, f"seed {first}" if len(jobs) == 1 else f"seeds {first} to {last}" + many)
    run(sd, args, jobs)


def main(argv: list[str] | None = None) -> int:
    # OpenMP's threads wait for each other by spinning, which beside other work takes the processors from those waited for.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported
    args = argparse.Namespace(debug=False)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn
            args = parser().parse_args(argv)
            args.made, args.wanted, args.where, args.net, args.adapters, args.by_region = 0, 0, "", None, [], {}
            go(args, check(args))
        return 0
    except KeyboardInterrupt:
        print(f"minsd: stopped: {args.made} of {args.wanted} pictures are done", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        code = 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
        message = str(error) if code == 2 else f"{type(error).__name__}: {error} (--debug shows where)"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message = "the disk is full: free some of it, and give the same command with --resume"
        if wanted := getattr(args, "wanted", 0):
            message = f"{args.made} of {wanted} pictures are done; {message}"
        elif code == 2 and int(os.environ.get("RANK", 0)):
            return code  # all processes find the same: one tells
    print("minsd: error: " + " ".join(message.split()), file=sys.stderr)
    return code


def warn(message, *rest, **more) -> None:
    from tqdm import tqdm

    tqdm.write(f"minsd: warning: {message}", file=sys.stderr)  # above a progress bar, not into it


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun, Slurm and timeout end a run so
    sys.exit(main())
