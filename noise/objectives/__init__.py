"""Objectives: one published method per file, its equation at the head, at most 60 lines.

Each objective is a class. `cls(sd, asks, **options)` is called once per run, with one Ask per image
(noise/look.py), and the instance is called with a `Look` (one UNet evaluation). The class may have
the attributes `driver` (the driver that the method is published with), `how` (the driver's
settings), and `begin()`, which is called when a run begins. A plain function is an objective too.
`find` imports an objective of this package by its name; noise/steer.py imports a user's own.
"reward:NAME" names the objective that maximises the reward NAME of reward.py.
"""

import importlib

# Name on the command line -> module of this package, and the class in it.
NAMES = {
    "initno": ("initno", "InitNO"),
    "excite": ("excite", "Excite"),
    "syngen": ("syngen", "SynGen"),
    "boxes": ("boxes", "Boxes"),
    "divide": ("divide", "DivideAndBind"),
    "contrast": ("contrast", "Contrast"),
    "overlap": ("overlap", "Overlap"),
    "saga": ("saga", "Saga"),
    "nlg": ("nlg", "NoiseLevelGuidance"),
}


def find(name: str) -> type:
    """Imports and returns the class of the objective called `name`, a key of `NAMES` or
    "reward:NAME". Raises ValueError for an unknown reward."""
    kind, _, rest = name.partition(":")
    if kind == "reward":
        return importlib.import_module(f"{__name__}.reward").of(rest)
    module, cls = NAMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)
