"""The ways to run minsd: wheel, editable, bare checkout, from elsewhere; and the trap of a bare top-level `kernels`."""

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    "model_index.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/vocab.json",
    "scheduler/scheduler_config.json",
)
WORKS = (
    "import minsd, minsd.kernels, minsd.weights.load, minsd.samplers.ddim, minsd.noise.initial\n"
    "assert minsd.noise.initial.noise([0], (4, 2, 2)).shape == (1, 4, 2, 2)\n"
    "assert (minsd.weights.load.SHAPES_FOLDER / 'unet' / 'diffusion_pytorch_model.safetensors').is_file()\n"
    "print(minsd.weights.load.__file__)"
)


def run(*command, cwd, path="", python=sys.executable):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    result = subprocess.run(
        [python, *command], cwd=cwd, env=env | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout: what git knows, nothing that was built in it."""
    target = tmp_path_factory.mktemp("source") / "minsd"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source), cwd=out)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_model_and_no_top_level_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"minsd/weights/shapes/{name}" for name in MODEL} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "minsd",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    assert "minsd/kernels/__init__.py" in names and not [n for n in names if "/run/" in n]


def test_the_sdist_holds_the_model(source, tmp_path):
    pytest.importorskip("setuptools")
    copy = shutil.copytree(source, tmp_path / "copy")
    run("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=copy)
    names = tarfile.open(next(tmp_path.glob("*.tar.gz"))).getnames()
    for name in (
        "setup.py",
        "README.md",
        "LICENSE",
        "kernels/__init__.py",
        *(f"weights/shapes/{m}" for m in MODEL),
    ):
        assert any(n.endswith("/" + name) for n in names), name


def test_a_normal_install_works_from_elsewhere_and_from_the_checkout(wheel, source, tmp_path):
    installed = tmp_path / "site"
    run("-m", "pip", "install", "-q", "--no-deps", "--target", str(installed), str(wheel), cwd=tmp_path)
    assert run("-c", WORKS, cwd=tmp_path, path=str(installed)).startswith(str(installed))
    assert run("-c", WORKS, cwd=source, path=str(installed)).startswith(
        str(source)
    )  # there, the checkout itself
    listed = run("-m", "minsd.generate", "--list-tokens", "a star", cwd=tmp_path, path=str(installed))
    assert "star</w>" in listed


def test_an_editable_install_works_from_elsewhere(source, tmp_path):
    run("-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    python = next((tmp_path / "venv").glob("bin/python")).as_posix()
    packages = Path(run("-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path, python=python))
    (packages / "borrowed.pth").write_text(
        "\n".join(site.getsitepackages())
    )  # torch and the rest, not installed again
    run("-m", "pip", "--python", python, "install", "-q", "--no-deps", "-e", str(source), cwd=tmp_path)
    assert run("-c", WORKS, cwd=tmp_path, python=python).startswith(str(source))
    assert "star</w>" in run("-m", "minsd.generate", "--list-tokens", "a star", cwd=tmp_path, python=python)


@pytest.mark.parametrize("module", ["minsd.generate", "bench.unet"])
def test_a_bare_checkout_runs_modules(source, module):
    assert "usage" in run("-m", module, "--help", cwd=source)


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_a_package_called_kernels_is_not_shadowed(source, tmp_path, where):
    """transformers imports the PyPI package of that name when it is there."""
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / "__init__.py").write_text("MARK = 'theirs'")
    path = f"{tmp_path / 'other'}:{source}" if where == "elsewhere" else str(tmp_path / "other")
    code = "import minsd, kernels, minsd.kernels\nassert kernels.MARK == 'theirs'\nassert minsd.kernels.attention\nprint('ok')"
    assert run("-c", code, cwd=source if where == "checkout" else tmp_path, path=path) == "ok"


def test_importing_minsd_loads_nothing_heavy(source):
    code = "import sys, minsd\nassert not {'torch', 'transformers', 'numpy', 'triton'} & set(sys.modules)\nprint('load' in dir(minsd))"
    assert run("-c", code, cwd=source) == "True"


def test_everything_public_resolves_from_minsd(source):
    code = (
        "import minsd\n"
        "minsd.load, minsd.config.MODELS['sd15'].unet, minsd.unet.UNet, minsd.vae.VAE, minsd.noise.initial.noise\n"
        "minsd.samplers.SAMPLERS['ddim'], minsd.samplers.ddim.sample, minsd.samplers.ddim.invert, minsd.kernels.attention\n"
        "print(hasattr(minsd, 'nothing'))"
    )
    assert run("-c", code, cwd=source) == "False"
