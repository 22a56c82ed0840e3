"""Every option of the command line, in one table.

The parser, the keys of a prompts file, the settings that `--like` reads from an image, the
settings that identify an image for `--resume`, and the range checks all come from `OPTIONS`. To
add an option, add a row here and read it in minsd/app/requests.py. Nothing heavy is imported, so
that `--help` answers at once.
"""

import argparse
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from minsd import __version__
from minsd.config import CONTROL_SCALE_MOST, SAMPLER_NAMES, STRENGTH, check_size

EXAMPLE = 'python -m minsd.generate "a red circle and a blue square"'
METHODS = ("random", "initno", "select", "optimize", "best")  # noise.methods.METHODS, without its imports
# noise.objectives.NAMES, and the reward that needs no weights
OBJECTIVES = "initno, excite, syngen, boxes, divide, contrast, overlap, saga, nlg, reward:soft-shapes"

IMAGE = "what to draw (each also a key of a line of --prompts FILE.jsonl)"
NOISE = "the initial noise (each also a key of such a line)"
MODEL = "model and hardware"
RUN = "many images, files, messages"

KARRAS = " karras"  # the end of a value of --sampler that also turns on Karras noise levels

Given = dict[str, Any]  # option name -> value, None where it was left out


@dataclass(frozen=True)
class Option:
    """One option of the command line: how it is written, checked, and recorded."""

    name: str  # as in a prompts file and in an image's settings; --its-name on the command line
    group: str
    kind: type  # str, int, float, Path or bool
    metavar: str | None
    help: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # other names, as other Stable Diffusion tools have them
    synonyms: Mapping[str, str] = field(default_factory=dict)  # other tools' values -> choices; see `plain`
    least: float = -math.inf
    most: float = math.inf
    default: Any = None
    repeated: bool = False
    negatable: bool = False
    listed: bool = False  # a list, separated by commas; in JSON it may be a JSON list
    # Whether --like takes the option from an image: always (`like`), or only if the image's noise
    # method is taken over too (`like_method`).
    like: bool = False
    like_method: bool = False
    # The largest value that --like takes from an image without --trust. Larger values mean long
    # work, which the sender of an image should not be able to start.
    unasked: float = math.inf
    # `identity`: the settings that represent this option in an image's identity, separated by
    # spaces. `harmless`: if there are none, why the option changes no pixel.
    identity: str = ""
    harmless: str = ""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def per_line(self) -> bool:
        """Returns whether a line of a prompts file may set this option."""
        return self.group in (IMAGE, NOISE)

    def add_to(self, group: Any) -> None:
        """Adds this option to an argparse parser's argument group."""
        if self.name == "prompt":
            group.add_argument("prompt", nargs="?", metavar=self.metavar, help=self.help)
            group.add_argument("--prompt", dest="prompt_option", help=argparse.SUPPRESS)
        elif self.negatable:
            group.add_argument(self.flag, action=argparse.BooleanOptionalAction, default=None, help=self.help)
        elif self.kind is bool:
            group.add_argument(self.flag, action="store_true", default=self.default, help=self.help)
        else:
            group.add_argument(
                self.flag,
                metavar="{" + ",".join(self.choices) + "}" if self.choices else self.metavar,
                type=self.choose if self.choices else self.kind,
                action="append" if self.repeated else "store",
                default=self.default,
                help=self.help,
            )

    def choose(self, text: str) -> str:
        """Returns the one of this option's choices that `text` means. Case and punctuation do not
        matter. Other tools' names are accepted too, such as "fp16" for "float16". Raises
        ArgumentTypeError if the text means no choice."""
        if self.name == "device" and re.fullmatch(r"cuda:\d+", text):
            return text
        known = {plain(name): name for name in self.choices} | dict(self.synonyms)
        choice = known.get(plain(text))
        if choice is None:
            near = difflib.get_close_matches(plain(text), known, 1)
            hint = f"; did you mean {known[near[0]]}?" if near else ""
            raise argparse.ArgumentTypeError(
                f"invalid choice: {text!r} (choose from {', '.join(self.choices)}{hint})"
            )
        return choice

    def check(self, value: Any) -> None:
        """Raises ValueError for a value outside the option's range. For the options height and
        width, the value must also be a multiple of 8 from 8 to 16384."""
        if self.kind in (int, float) and value is not None and not self.least <= value <= self.most:
            raise ValueError(
                f"{self.flag} must be from {_text(self.least)} to {_text(self.most)}, not {value}"
            )
        if self.name in ("height", "width") and value is not None:
            try:
                check_size(**{"height": 8, "width": 8, self.name: value})
            except ValueError as error:
                raise ValueError(f"--{error}") from None

    def takes(self, value: object) -> bool:
        """Returns whether a JSON value has this option's type."""
        taken = {bool: (bool,), float: (float, int), int: (int,)}.get(self.kind, (str,))
        return isinstance(value, taken) and (not isinstance(value, bool) or self.kind is bool)

    def from_json(self, value: Any) -> Any:
        """Converts a JSON value, from a prompts file or an image's settings, to the value that the
        command line would give. Raises ValueError if the value does not have this option's type, or
        is not among its choices."""
        if self.listed and isinstance(value, list):
            parts: list[object] = list(value)
            if not all(isinstance(part, (str, int)) and not isinstance(part, bool) for part in parts):
                raise ValueError(
                    f"{self.name!r} must be a list of words or whole numbers, not {_short(value)}"
                )
            return ",".join(map(str, parts))
        value = cast(Any, value)  # for type checkers, which would still take it for a list
        if not self.takes(value):
            kinds = {bool: "true or false", float: "a number", int: "a whole number"}
            raise ValueError(f"{self.name!r} must be {kinds.get(self.kind, 'text')}, not {_short(value)}")
        if self.choices:
            try:
                return self.choose(value)
            except argparse.ArgumentTypeError:
                raise ValueError(
                    f"{self.name!r} must be one of {', '.join(self.choices)}, not {_short(value)}"
                ) from None
        if self.kind is float:
            with suppress(OverflowError):  # a huge whole number is unchanged; the range check refuses it
                return float(value)
        return Path(value) if self.kind is Path else value


def plain(text: str) -> str:
    """Returns a name in lower case and without spaces and punctuation, so that "DPM++ 2M" and
    "dpm++_2m" become the same.
    """
    return re.sub(r"[^a-z0-9+]", "", text.lower())


def _short(value: object) -> str:
    """Returns a value as JSON for error messages, cut off after 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + " ..."


def _text(bound: float) -> str:
    return "2^63 - 1" if bound == 2**63 - 1 else f"{bound:.15g}"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError for a wrong command line, where argparse would
    print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(" ".join(f"{message} (--help lists the options)".split()))


def positive(text: str) -> int:
    """Converts the text of an option to a whole number of at least 1. Raises ArgumentTypeError for
    any other text."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def parser() -> Parser:
    p = Parser(
        prog="python -m minsd.generate",
        description="Draw images from a prompt.",
        epilog=f"example: {EXAMPLE}",
        allow_abbrev=False,
    )
    groups = {title: p.add_argument_group(title) for title in (IMAGE, NOISE, MODEL, RUN)}
    for option in OPTIONS.values():
        option.add_to(groups[option.group])
    groups[RUN].add_argument("--version", action="version", version=f"minsd {__version__}")
    return p


def parse(argv: Sequence[str]) -> Given:
    """Parses the command line. Returns a dict option name -> value, in which options that are not
    given are None. Raises ValueError, with a message of one line, for a command line that cannot be
    parsed."""
    argv = [_spelled(word) for word in argv]
    for word, following in zip(argv, [*argv[1:], ""]):
        if word.startswith("--save-noise=") or (
            word == "--save-noise" and following.endswith(".safetensors")
        ):
            raise ValueError(
                "--save-noise takes no value any more: the noise of each image goes to "
                "DIR/extra/NNNNN-SEED-noise.safetensors"
            )
    namespace, rest = parser().parse_known_args(argv)
    given = vars(namespace)
    prompt = given.pop("prompt_option")
    if prompt is not None:
        rest += [] if given["prompt"] is None else [given["prompt"]]
        given["prompt"] = prompt
    if rest:
        raise ValueError(" ".join(_unrecognized(rest, given["prompt"]).split()))
    return normalised(given)


def normalised(given: Given) -> Given:
    """Returns the options in a single form: a seed of -1 becomes None, which means a random seed,
    and the sampler "dpmpp_2m karras" becomes the sampler "dpmpp_2m" and the option `karras`."""
    given = dict(given)
    if given["seed"] == -1:
        given["seed"] = None
    if given["sampler"] is not None and given["sampler"].endswith(KARRAS):
        given["sampler"] = given["sampler"].removesuffix(KARRAS)
        given["karras"] = True
    return given


def named(key: str) -> str | None:
    """Returns the name of the option that `key` means. `key` is the option's own name, with hyphens
    or underscores, or the option's name in another tool, such as "cfg_scale". Returns None if there
    is no such option."""
    name = key.replace("-", "_")
    if name in OPTIONS:
        return name
    return next((option.name for option in OPTIONS.values() if name in option.aliases), None)


def _spelled(word: str) -> str:
    """If a word of the command line is an option under another tool's name, returns the word with
    this program's name for the option, so that --cfg_scale=7 becomes --guidance-scale=7. Returns
    any other word unchanged."""
    if word == "-n":
        return OPTIONS["num_images"].flag
    if not re.match(r"--[a-zA-Z]", word):
        return word
    flag, equals, value = word.partition("=")
    name = named(flag[2:])
    return word if name is None else f"--{name.replace('_', '-')}{equals}{value}"


def _unrecognized(rest: Sequence[str], prompt: str | None) -> str:
    """Returns the error message for the words `rest` of the command line, which the parser does not
    know. `prompt` is the word that the parser took for the prompt."""
    flags = [word for word in rest if word.startswith("-")]
    if not flags:
        whole = " ".join([prompt or "", *rest]).strip()
        return f'unrecognized arguments: {" ".join(rest)}: put the prompt in quotes, such as "{whole}"'
    flag = flags[0].partition("=")[0]
    names = [option.flag for option in OPTIONS.values()]
    aliases = {
        "--" + alias.replace("_", "-"): option.flag for option in OPTIONS.values() for alias in option.aliases
    }
    near = difflib.get_close_matches(flag.replace("_", "-"), [*names, *aliases], 1)
    hint = f"; did you mean {aliases.get(near[0], near[0])}?" if near else ""
    return f"unrecognized arguments: {' '.join(rest)}{hint} (--help lists the options)"


def check_ranges(given: Given) -> None:
    """Raises ValueError if one of the options is outside its range. Only options that a line of a
    prompts file may set are checked."""
    for name in PER_LINE:
        OPTIONS[name].check(given[name])


# What other tools call samplers and dtypes, in the form that `plain` returns.
SAMPLERS_ELSEWHERE = {
    **{plain(name): ours for ours, name in SAMPLER_NAMES.items()},
    **{plain("k_" + ours): ours for ours in ("euler", "euler_a", "heun", "dpmpp_2m")},
    "eulerancestral": "euler_a",
    "keulerancestral": "euler_a",
    "plms": "pndm",
    "dpm++2m": "dpmpp_2m",
    "dpmsolver++": "dpmpp_2m",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpm++2mkarras": "dpmpp_2m" + KARRAS,
    "dpmpp2mkarras": "dpmpp_2m" + KARRAS,
    "kdpmpp2mkarras": "dpmpp_2m" + KARRAS,
    "unipcbh2": "unipc",
}
DTYPES_ELSEWHERE = {
    "fp32": "float32",
    "full": "float32",
    "f32": "float32",
    "fp16": "float16",
    "half": "float16",
    "f16": "float16",
    "bf16": "bfloat16",
}

# fmt: off
_ROWS = (
    # --- the image
    Option("prompt", IMAGE, str, "PROMPT", 'what to draw; may be empty ("")', like=True, identity="prompt"),
    Option("negative_prompt", IMAGE, str, "TEXT",
           "what to steer away from", like=True, identity="negative_prompt"),
    Option("seed", IMAGE, int, "N", "seed of the first image (default: a random one, printed)",
           least=0, most=2**63 - 1, like=True, identity="seed"),
    Option("seeds", IMAGE, str, "LIST", "one image per seed, such as 0-9,12", listed=True, identity="seed"),
    Option("num_images", IMAGE, int, "N", "how many images, from consecutive seeds (default: 1)",
           aliases=("num_images_per_prompt", "n_samples", "batch_size", "batch_count"),
           least=1, most=1_000_000, identity="seed"),
    Option("steps", IMAGE, int, "N", "sampling steps (default: the model's, mostly 50)",
           aliases=("num_inference_steps", "num_steps", "sampling_steps", "ddim_steps"),
           least=1, most=1000, like=True, unasked=500, identity="steps"),
    Option("guidance_scale", IMAGE, float, "G", "how strongly the prompt steers (default: the model's)",
           aliases=("cfg_scale", "cfg", "guidance", "scale"),
           least=-1000, most=1000, like=True, identity="guidance_scale"),
    Option("guidance_rescale", IMAGE, float, "PART",
           "keep guidance from overexposing, 0 to 1 (default: 0; 0.7 suits models with zero terminal SNR)",
           least=0, most=1, like=True, identity="guidance_rescale"),
    Option("sampler", IMAGE, str, None, "default: the model's, mostly ddim",
           choices=tuple(SAMPLER_NAMES), synonyms=SAMPLERS_ELSEWHERE, aliases=("scheduler", "sampler_name"),
           like=True, identity="sampler"),
    Option("karras", IMAGE, bool, None,
           "Karras noise levels, closer together where there is little noise (dpmpp_2m)",
           like=True, identity="karras"),
    Option("height", IMAGE, int, "H",
           "pixels, a multiple of 8 (default: the model's)", like=True, identity="height"),
    Option("width", IMAGE, int, "W",
           "pixels, a multiple of 8 (default: the model's)", like=True, identity="width"),
    Option("init_image", IMAGE, Path, "FILE",
           "image to image: begin from this image, cropped and scaled to the size",
           like=True, identity="init_image"),
    Option("strength", IMAGE, float, "S",
           f"fraction of the steps to run from --init-image, 0 to 1 (default: {STRENGTH})",
           least=0, most=1, like=True, identity="strength"),
    Option("noise", IMAGE, Path, "FILE|DIR",
           "initial noise from a file (.safetensors, .npy, .pt) or a folder of them, as --save-noise writes",
           identity="noise_file noise_index"),
    Option("layout", IMAGE, Path, "FILE|DIR",
           "captions for regions of the image: a layout.json, or a NoiseCollage folder",
           like=True, identity="layout"),
    Option("crop_margin", IMAGE, float, "FRACTION",
           "early steps: show each region only its box plus a margin of this fraction of it (try 0.25)",
           least=0, most=1000, like=True, identity="crop_margin"),
    Option("layout_method", IMAGE, str, None,
           "how to draw a --layout: by crops, from the best of 50 noises (crops; default of the embedded "
           "model), or as NoiseCollage was published (paper; default of all others)",
           choices=("crops", "paper"), identity="crop_margin init_noise score"),
    Option("control_image", IMAGE, Path, "FILE",
           "conditioning image for --controlnet (edges, a pose, ...), used unprocessed",
           like=True, identity="control_image"),
    Option("control_scale", IMAGE, float, "S", "weight of the ControlNet (default: 1)",
           least=-CONTROL_SCALE_MOST, most=CONTROL_SCALE_MOST, like=True, identity="control_scale"),
    # --- the initial noise
    Option("init_noise", NOISE, str, None,
           "the best of a few candidates that are drafted (best), optimise it by attention maps (initno), "
           "select the best of --candidates, or optimise it by inversion stability or an --objective",
           choices=METHODS, like_method=True, identity="init_noise"),
    Option("candidates", NOISE, int, "K",
           "select, best: choose among K noises, the seed's own one of them (default: 100; best: 8;"
           " with --objective 16)",
           least=1, most=100_000, unasked=1000, identity="candidates"),
    Option("score", NOISE, str, None,
           "select: what the candidates are ranked by (default: attention; stability costs ten times as much "
           "and was no better than chance on the embedded model)",
           choices=("stability", "attention"), like_method=True, identity="score"),
    Option("objective", NOISE, str, "NAME|FILE.py:NAME",
           f"what the noise, or the latents while denoising, are judged by: {OBJECTIVES}, reward: and a "
           "judge such as pickscore, reward:reno, or a function of your own; --init-noise select or optimize "
           "says how it is used",
           identity="objective"),
    Option("objective_set", NOISE, str, "SETTINGS", "settings of the objective, such as lr=5,steps=50",
           identity="objective"),
    Option("pairs", NOISE, str, "GROUPS",
           'nouns with their attributes, such as "red circle; blue square" (default: found in the prompt)',
           like_method=True, identity="pairs"),
    Option("optimize_steps", NOISE, int, "N",
           "optimize: gradient steps (default: 100; with --objective its own, 50 for one in a file)",
           least=0, most=100_000, like_method=True, unasked=1000, identity="optimize_steps"),
    Option("optimize_mode", NOISE, str, None,
           "optimize: differentiate the inversion too, or not (default: full)",
           choices=("full", "detach"), like_method=True, identity="optimize_mode"),
    Option("subjects", NOISE, str, "WORDS",
           'what must not be neglected, such as "cat, rabbit" (default: found in the prompt)',
           listed=True, identity="subjects"),
    Option("token_indices", NOISE, str, "LIST",
           "the same by token position, such as 2,5 (see --list-tokens)",
           listed=True, identity="subjects"),
    Option("excite", NOISE, bool, None,
           "move the latents towards the subjects while denoising (on for initno; --no-excite turns it off)",
           negatable=True, identity="excite"),
    # --- model and hardware
    Option("model", MODEL, str, "NAME|DIR|FILE|ID",
           "shapes (the embedded model, default), shapes-turbo (it in 1 to 4 steps), a diffusers folder, "
           "a .safetensors file, or a hub id",
           like=True, identity="model"),
    Option("vae", MODEL, Path, "DIR|FILE", "another VAE than the model's own", like=True, identity="vae"),
    Option("tokenizer", MODEL, Path, "DIR", "for single files: a folder with vocab.json and merges.txt",
           like=True, identity="tokenizer"),
    Option("prediction_type", MODEL, str, None, "what the network predicts, where its files do not say",
           choices=("epsilon", "v_prediction"), like=True, identity="prediction_type"),
    Option("controlnet", MODEL, Path, "DIR|FILE",
           "a ControlNet for --control-image, or for the control images of --layout",
           like=True, identity="controlnet"),
    Option("prompt_weights", MODEL, bool, None,
           "read (words:1.3), (words), [words] and BREAK as AUTOMATIC1111's web UI does, or never"
           " (default: where a weight such as :1.3 or BREAK makes it unmistakable)",
           negatable=True, like=True, identity="prompt_weights"),
    Option("clip_skip", MODEL, int, "N",
           "take the text states N-1 layers before the model's own last one (default: 1, nothing skipped)",
           like=True, identity="clip_skip"),
    Option("embedding", MODEL, str, "FILE[:NAME]",
           "a textual-inversion embedding: write its name in the prompt; may be given several times",
           repeated=True, like=True, identity="embedding"),
    Option("lora", MODEL, str, "FILE[:SCALE]",
           "an adapter, merged into the weights; may be given several times",
           repeated=True, like=True, identity="lora"),
    Option("device", MODEL, str, None,
           "default: cuda where there is one", choices=("cpu", "cuda", "mps"),
           synonyms={"gpu": "cuda", "metal": "mps"}, like=True, harmless="changes rounding alone"),
    Option("dtype", MODEL, str, None, "default: float16 on cuda, else float32",
           choices=("float32", "float16", "bfloat16"), synonyms=DTYPES_ELSEWHERE, aliases=("precision",),
           like=True, identity="dtype"),
    Option("attention", MODEL, str, None, "attention backend (default: auto)",
           choices=("auto", "triton", "sdpa", "reference"), like=True, harmless="changes rounding alone"),
    Option("compile", MODEL, bool, None,
           "torch.compile the UNet: minutes at first, faster steps after", default=False,
           harmless="changes rounding alone"),
    # --- the run
    Option("prompts", RUN, Path, "FILE",
           "one prompt per line (.txt), or one object of options per line (.jsonl)",
           harmless="its lines are recorded one by one"),
    Option("resume", RUN, bool, None, "skip the images that --out holds already", default=False,
           harmless="says which images to draw"),
    Option("wait", RUN, bool, None, "with --resume, wait for another run that works on --out", default=False,
           harmless="delays the start"),
    Option("engine", RUN, str, None, "draw on a Ray cluster (RAY_ADDRESS, or else this machine)",
           choices=("ray",), harmless="changes rounding alone"),
    Option("out", RUN, Path, "DIR", "where images go (default: outputs)", default=Path("outputs"),
           harmless="says where files go"),
    Option("save_noise", RUN, bool, None, "save the initial noise of each image, in DIR/extra", default=False,
           harmless="writes one more file"),
    Option("invert", RUN, Path, "FILE", "find the noise that draws this image, save it, and draw from it",
           like=True, identity="invert"),
    Option("layout_preview", RUN, bool, None,
           "draw the --layout itself to DIR/extra, and stop", default=False,
           harmless="draws no image"),
    Option("layout_overlay", RUN, bool, None,
           "also save each image with the outlines and captions of its --layout, in DIR/extra", default=False,
           harmless="writes one more file"),
    Option("attention_maps", RUN, bool, None,
           "save a sheet per image of where the words of its subjects attended, in DIR/extra", default=False,
           harmless="writes one more file"),
    Option("preview", RUN, int, "N",
           "show the predicted image after every N steps: DIR/extra/preview.png while drawing, and a sheet"
           " per image",
           least=1, most=1000, harmless="writes one more file"),
    Option("like", RUN, Path, "PNG", "make this image again; other options override its settings",
           harmless="the settings it supplies are recorded one by one"),
    Option("trust", RUN, bool, None,
           "let the image of --like name hub models and files outside its folder, and ask for long work",
           default=False, harmless="the settings that it permits are recorded one by one"),
    Option("list_tokens", RUN, bool, None,
           "print the prompt's tokens and their positions, and stop", default=False,
           harmless="draws no image"),
    Option("quiet", RUN, bool, None,
           "no progress, no notes", default=False, harmless="concerns messages alone"),
    Option("json", RUN, bool, None, "print one JSON object per image on standard output", default=False,
           harmless="concerns messages alone"),
    Option("debug", RUN, bool, None,
           "stop at the first error, with its traceback", default=False, harmless="concerns messages alone"),
)
# fmt: on

OPTIONS: dict[str, Option] = {row.name: row for row in _ROWS}
PER_LINE = tuple(name for name, option in OPTIONS.items() if option.per_line)
# The settings that identify an image, each once. A selection is identified by its first seed and
# its number of candidates, which app/jobs.py adds in front.
IDENTITY = tuple(
    dict.fromkeys(
        key for option in OPTIONS.values() for key in option.identity.split() if key != "candidates"
    )
)
