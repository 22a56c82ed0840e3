"""Packaging. The top-level folders install inside minsd, where they cannot shadow PyPI packages called `kernels` etc.;
minsd/__init__.py makes a bare checkout look the same."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
FOLDERS = ("kernels", "weights", "weights/shapes", "samplers", "noise")

setup(
    name="minsd",
    version=re.search(r'__version__ = "(.+)"', (HERE / "minsd" / "__init__.py").read_text())[1],
    description="Stable Diffusion 1.x/2.x in plain PyTorch, built around the initial noise",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=["minsd", "minsd.app", *(f"minsd.{folder.replace('/', '.')}" for folder in FOLDERS)],
    package_dir={"minsd": "minsd", **{f"minsd.{folder.replace('/', '.')}": folder for folder in FOLDERS}},
    package_data={
        "minsd.weights.shapes": [
            "README.md",
            "model_index.json",
            *(f"{d}/*" for d in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "extras/outlines")),
            "extras/*.safetensors",
        ]
    },
    install_requires=[
        "torch>=2.6",
        "safetensors>=0.4.3",
        "transformers>=4.49",
        "huggingface_hub",
        "tqdm",
        "numpy",
        "pillow",
        "triton>=3.2; sys_platform == 'linux'",
    ],
    extras_require={
        "test": ["pytest", "hypothesis", "diffusers", "peft", "scipy", "ruff"],
        "bench": ["matplotlib", "diffusers"],
    },
)
