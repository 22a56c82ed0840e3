"""The subject: where an image starts. One file per method; each names its paper."""

import importlib

_SUBMODULES = ("initial", "losses", "initno", "excite", "stability", "layout", "collage")


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
