"""minsd: Stable Diffusion 1.x, 2.x and XL in plain PyTorch, built around the initial noise.

    import minsd
    sd = minsd.load("shapes")
    images = sd("a red circle and a blue square", seeds=[0, 1])

Submodules are imported when they are first used, so `import minsd` alone imports nothing heavy.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ below imports on first use
    import minsd.adapters as adapters
    import minsd.app as app
    import minsd.attention as attention
    import minsd.config as config
    import minsd.controlnet as controlnet
    import minsd.emphasis as emphasis
    import minsd.files as files
    import minsd.generate as generate
    import minsd.graphs as graphs
    import minsd.guidance as guidance
    import minsd.image as image
    import minsd.judge as judge
    import minsd.judges as judges
    import minsd.kernels as kernels
    import minsd.noise as noise
    import minsd.pipeline as pipeline
    import minsd.samplers as samplers
    import minsd.text as text
    import minsd.unet as unet
    import minsd.vae as vae
    import minsd.weights as weights
    import minsd.words as words
    from minsd.pipeline import load as load

__version__ = "0.1.0"

# In a checkout, `kernels`, `weights`, `samplers` and `noise` lie beside this package; setup.py installs
# them inside it. Make `minsd.kernels` etc. resolve here too, and take the checkout's root off sys.path,
# where a bare `kernels` would shadow the PyPI package that transformers imports.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if all(os.path.exists(os.path.join(_root, name)) for name in ("setup.py", "kernels")):
    __path__.append(_root)
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _root]

_SUBMODULES = (
    "adapters",
    "app",
    "attention",
    "config",
    "controlnet",
    "emphasis",
    "files",
    "generate",
    "graphs",
    "guidance",
    "image",
    "judge",
    "judges",
    "kernels",
    "noise",
    "pipeline",
    "samplers",
    "text",
    "unet",
    "vae",
    "weights",
    "words",
)


def __getattr__(name: str) -> Any:
    if name == "load":
        from minsd.pipeline import load

        return load
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "load", *_SUBMODULES})
