"""Objectives: one published method per file, its equation at the head, at most 60 lines.

Each is a class, made by `cls(sd, asks, **options)` once per run, whose instances are called with a
`Look` (noise/look.py). It may state the driver that it is published with (`driver`), that driver's
settings (`how`), and `begin()`, called when a run begins. A plain function is an objective too.
`find` imports one by its name; noise/steer.py finds a user's own.
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
    """Returns the class of a name in `NAMES`."""
    module, cls = NAMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)
