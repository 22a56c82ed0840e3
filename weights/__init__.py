"""Turns files into networks: model folders, single-file checkpoints, models by Hugging Face hub id,
and adapters (ControlNets, LoRAs). The folder `shapes/` holds the embedded model.

Submodules (`minsd.weights.lora`, ...) are imported on first use, so importing this package imports
nothing heavy.
"""

import importlib
from types import ModuleType

_SUBMODULES = (
    "controlnet",
    "embedding",
    "hub",
    "ldm_keys",
    "load",
    "lora",
    "safetensors_file",
    "shapes",
    "single_file",
)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
