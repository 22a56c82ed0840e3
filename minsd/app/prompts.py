"""Prompts files: many prompts, each with options of its own over those of the command line.

A .txt file has a prompt a line, and # comments; a .jsonl file an object a line, whose keys are the command line's long options:

    {"prompt": "a red circle", "seeds": "0-3", "steps": 20}
    {"layout": "layout.json", "seed": 7, "init_noise": "initno"}

What is wrong in a line is told with the file's name and the line's number; here what can be seen in the line alone, by
minsd/arguments.py what its options make together, and by minsd/run.py what the model does not take.
"""

import copy
import json
from argparse import Action, Namespace
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

# The options that a line of a prompts file may set; the others hold for the whole run.
PER_LINE = (
    "prompt",
    "negative_prompt",
    "seed",
    "seeds",
    "num_images",
    "steps",
    "guidance_scale",
    "sampler",
    "karras",
    "height",
    "width",
    "init_image",
    "strength",
    "noise",
    "init_noise",
    "candidates",
    "score",
    "optimize_steps",
    "optimize_mode",
    "subjects",
    "token_indices",
    "excite",
    "layout",
    "crop_margin",
    "control_image",
    "control_scale",
)


def read_prompts(path: Path, args: Namespace, options: Mapping[str, Action]) -> list[Namespace]:
    """The lines of a file, each over the command line's own `args`; `options`: the parser's, by name. A line's `where` says
    where it stands. ValueError or FileNotFoundError, in one line."""
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"--prompts takes a .txt file (a prompt a line) or a .jsonl file (an object a line), not {path.name}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no prompts file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    lines = []
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
                raise ValueError(
                    f'{line.where}a line must be an object, such as {{"prompt": "a red circle", "seeds": "0-3"}}'
                )
            if not any(key in given for key in ("prompt", "layout")):
                raise ValueError(f'{line.where}there is no "prompt"')
            if "seeds" in given or "seed" in given:  # these replace the command line's seeds of either kind
                line.seed = line.seeds = line.num_images = None
            for key, value in given.items():
                set_option(line, options, key, value)
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    return lines


@contextmanager
def located(line: Namespace):
    """What is wrong with a line, found within the block, is told with where it stands."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{line.where}{error}") from None
    except ValueError as error:
        raise ValueError(f"{line.where}{error}") from None


def set_option(line: Namespace, options: Mapping[str, Action], key: str, value) -> None:
    """One key of an object in a prompts file, as if it had been given on the command line."""
    name = key.replace("-", "_")
    if name not in PER_LINE:
        if name in options:
            raise ValueError(f"{line.where}{key!r} holds for the whole run: give it on the command line")
        raise ValueError(f"{line.where}unknown key {key!r}; known are {', '.join(PER_LINE)}")
    action = options[name]
    if isinstance(value, list) and action.type is None:
        value = ",".join(map(str, value))
    kind = (
        bool
        if action.nargs == 0
        else (float, int)
        if action.type is float
        else int
        if action.type is int
        else str
    )
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = {bool: "true or false", int: "a whole number", str: "text"}.get(kind, "a number")
        raise ValueError(f"{line.where}{key!r} must be {wanted}, not {json.dumps(value)}")
    if action.choices and value not in action.choices:
        raise ValueError(f"{line.where}{key!r} must be one of {', '.join(action.choices)}, not {value!r}")
    with suppress(OverflowError):  # of a whole number too large, which is refused as any other of its size
        value = float(value) if action.type is float else value
    setattr(line, name, Path(value) if action.type is Path else value)
