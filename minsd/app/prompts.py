"""Prompts files: many prompts, each with options that override those of the command line.

A .txt file has one prompt per line, and # comments. A .jsonl file has one object per line, whose
keys are the command line's long options:

    {"prompt": "a red circle", "seeds": "0-3", "steps": 20}
    {"layout": "layout.json", "seed": 7, "init_noise": "initno"}

Errors name the file and the line. This module checks each value alone; minsd/app/requests.py
checks how a line's options go together, and minsd/app/jobs.py what the model accepts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minsd.app.options import OPTIONS, PER_LINE, Given, named, normalised
from minsd.files import parse_json


def read_prompts(path: Path, given: Given) -> Iterator[tuple[str, Given]]:
    """Reads a prompts file. The options of each line override the options `given` on the command
    line.

    Yields (where, options) for each line, where `where` is the beginning of error messages about
    that line, such as "prompts.jsonl, line 2: ". Raises ValueError, or FileNotFoundError for a
    missing file, with a message of one line.
    """
    found = False
    for number, content in enumerate(_text(path).split("\n"), 1):
        content = content.strip()
        if not content or (path.suffix == ".txt" and content.startswith("#")):
            continue
        found = True
        where = f"{path}, line {number}: "
        with located(where):
            line = {"prompt": content} if path.suffix == ".txt" else _options(content)
        replaced = (
            {"seed": None, "seeds": None, "num_images": None} if {"seed", "seeds"} & line.keys() else {}
        )
        yield where, normalised(given | replaced | line)
    if not found:
        raise ValueError(f"{path} holds no prompts")


@contextmanager
def located(where: str) -> Iterator[None]:
    """Within the `with` block, `where` is put before the message of any ValueError or
    FileNotFoundError that is raised. `where` is the place of the mistake, such as "prompts.jsonl,
    line 2: "."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}{error}") from None
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _text(path: Path) -> str:
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            "--prompts takes a .txt file (one prompt per line) or a .jsonl file (one object per line), "
            f"not {path.name}"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no prompts file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _options(content: str) -> Given:
    """Returns the options in one line of a .jsonl file. Raises ValueError unless the line is an
    object whose keys are known options, with a prompt or a layout among them."""
    line = parse_json(content, unique=True)
    if not isinstance(line, dict):
        raise ValueError('a line must be an object, such as {"prompt": "a red circle", "seeds": "0-3"}')
    if "prompt" not in line and "layout" not in line:
        raise ValueError('there is no "prompt"')
    return {name: value for name, value in (_option(key, value) for key, value in line.items())}


def _option(key: str, value: Any) -> tuple[str, Any]:
    name = named(key)
    if name is None:
        raise ValueError(f"unknown key {key!r}; known are {', '.join(PER_LINE)}")
    if not OPTIONS[name].per_line:
        raise ValueError(f"{key!r} holds for the whole run: give it on the command line")
    if name == "objective" and ".py" in str(value):
        raise ValueError(
            "a prompts file cannot name a file to run: give --objective FILE.py:NAME on the command line"
        )
    try:
        return name, OPTIONS[name].from_json(value)
    except ValueError as error:
        raise ValueError(str(error).replace(repr(name), repr(key), 1)) from None
