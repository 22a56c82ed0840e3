"""The part of packaging that needs code; the metadata is in pyproject.toml.

The top-level folders install inside minsd, where they cannot shadow PyPI packages such as `kernels`.
minsd/__init__.py makes a bare checkout look the same.
"""

from setuptools import find_packages, setup

OUTSIDE = ("bench", "bench.*", "tests", "tests.*")  # not installed

folders = {
    name if name.split(".")[0] == "minsd" else f"minsd.{name}": name.replace(".", "/")
    for name in find_packages(exclude=OUTSIDE)
}

setup(
    packages=list(folders),
    package_dir=folders,
    include_package_data=False,  # the list below says what is shipped
    package_data={
        "": ["README.md", "py.typed"],
        "minsd.app": ["web.html"],
        "minsd.weights.shapes": [
            "model_index.json",
            *(f"{part}/*" for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")),
            "extras/outlines/*",
            "extras/*.safetensors",
        ],
    },
)
