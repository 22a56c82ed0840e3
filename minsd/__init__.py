"""minsd: Stable Diffusion 1.x/2.x in plain PyTorch, built around the initial noise.

    import minsd
    sd = minsd.load("shapes")
    images = sd("a red circle and a blue square", seeds=[0, 1])

Everything named in the README resolves from here lazily: importing minsd alone imports nothing heavy.
"""

import importlib
import os
import sys

__version__ = "0.1.0"

# In a checkout, `kernels`, `weights`, `samplers` and `noise` lie beside this package instead of inside it
# (setup.py's package_dir puts them inside when installing). Make `minsd.kernels` etc. resolve, and keep the
# checkout's root off sys.path, where a bare `kernels` would shadow the PyPI package that transformers imports.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_root, "setup.py")) and os.path.isdir(os.path.join(_root, "kernels")):
    __path__.append(_root)
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _root]

_SUBMODULES = (
    "app",
    "attention",
    "config",
    "controlnet",
    "generate",
    "graphs",
    "guidance",
    "image",
    "pipeline",
    "text",
    "unet",
    "vae",
    "kernels",
    "noise",
    "samplers",
    "weights",
)


def __getattr__(name):
    if name == "load":
        from .pipeline import load

        return load
    if name in _SUBMODULES:
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), "load", *_SUBMODULES})
