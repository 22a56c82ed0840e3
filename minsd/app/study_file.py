"""Reads and writes study.json, which states what a study draws: prompts, seeds, model and methods."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minsd import files
from minsd.app.prompt_sets import Item, check, slug
from minsd.app.prompts import located

NAME = "study.json"
KINDS = {  # key of study.json -> its type
    "set": str | None,
    "seeds": str,
    "model": str,
    "options": str,
    "prompts": list,
    "methods": dict,
    "versions": dict,
}


@dataclass(frozen=True)
class Study:
    """The contents of a study.json."""

    set: str | None  # the name of the prompt set or file
    seeds: str  # the seeds of every prompt (0-3), or apart:K for K seeds of its own per prompt
    model: str
    options: str  # of minsd.generate, for all methods
    prompts: list[Item]
    methods: dict[str, list[str]]  # method -> its options of minsd.generate
    versions: dict[str, str]

    def with_methods_of(self, other: "Study", path: Path) -> "Study":
        """Returns this study with the methods of another one added. Raises ValueError if the two
        studies differ in prompts, seeds, model or options, or if they have a method of the same
        name with different options. `path` is the file to name in the error message."""
        for key in ("prompts", "seeds", "model", "options"):
            if getattr(self, key) != getattr(other, key):
                raise ValueError(f"{path} has other {key}: a study keeps them; take a new folder")
        for name, words in other.methods.items():
            if self.methods.get(name, words) != words:
                raise ValueError(f"{path} has a method {name} with other options: give this one another name")
        both = self.methods | other.methods
        folders(both)
        return replace(self, methods=both)


def folders(methods: Iterable[str]) -> dict[str, str]:
    """Returns a dict that maps each method to the name of its folder in the study. Raises
    ValueError if two methods would share a folder."""
    found = {name: slug(name) for name in methods}
    names = list(found.values())
    if len(set(names)) < len(names):
        raise ValueError(f"two methods would share the folder {max(names, key=names.count)}")
    return found


def read(folder: Path) -> Study | None:
    """Returns the study in a folder, or None if the folder holds no study.json. Raises ValueError,
    with a message of one line, if the file is no valid study: a key is unknown, missing or of
    another type, or a prompt or method has another form."""
    path = folder / NAME
    if not path.is_file():
        return None
    held = files.read_json(path)
    with located(f"{path}: "):
        _check(held)
    for number, item in enumerate(held["prompts"], 1):
        with located(f"{path}, prompt {number}: "):
            check(item)
    return Study(**held)


def _check(held: Any) -> None:
    """Raises ValueError if the contents of a study.json have another form than `Study`. Prompts are
    not checked."""
    if not isinstance(held, Mapping):
        raise ValueError("not a study: it must be an object")
    unknown = [key for key in held if key not in KINDS]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(KINDS)}")
    for key, kind in KINDS.items():
        if key not in held:
            raise ValueError(f"there is no {key!r}")
        if not isinstance(held[key], kind):
            what = {list: "a list", dict: "an object"}.get(kind, "text")
            raise ValueError(f"{key!r} must be {what}")
    for name, words in held["methods"].items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"method {name!r} must have a list of options")
    folders(held["methods"])


def add(folder: Path, study: Study) -> None:
    """Writes a study to its folder. If the folder holds a study already, adds the methods of
    `study` to that one and keeps its other methods, also those that another process has just added.
    Raises ValueError as `read` and `Study.with_methods_of` do."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        text = json.dumps(asdict(joined(folder, study)), ensure_ascii=False, indent=1) + "\n"
        files.write(folder / NAME, text)


def joined(folder: Path, study: Study) -> Study:
    """Returns the study in a folder with the methods of `study` added, or `study` itself if the
    folder holds none. Writes nothing. Raises ValueError as `read` and `Study.with_methods_of`
    do."""
    old = read(folder)
    return study if old is None else old.with_methods_of(study, folder / NAME)
