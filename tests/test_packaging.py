"""Ways to install and run minsd, the trap of a bare top-level `kernels`, and the public names."""

import importlib.util
import os
import shutil
import signal
import site
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import minsd

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
    "model = minsd.weights.load.SHAPES_FOLDER / 'unet' / 'diffusion_pytorch_model.safetensors'\n"
    "assert model.is_file()\n"
    "print(minsd.weights.load.__file__)"
)


OUTSIDE = ("bench", "tests", "typings")  # top-level folders that are not installed
# DESIGN's "Public surface": every name that resolves after `import minsd` alone.
PUBLIC = """
minsd.load
minsd.config.MODELS minsd.unet.UNet minsd.vae.VAE
minsd.noise.initial.noise
minsd.samplers.SAMPLERS
minsd.samplers.ddim.sample minsd.samplers.ddim.invert
minsd.kernels.attention
minsd.noise.losses.cross_response minsd.noise.losses.self_conflict
minsd.noise.losses.clean_background minsd.noise.losses.alignment minsd.noise.losses.kl_divergence
minsd.noise.losses.automatic_subjects minsd.noise.losses.resolve
minsd.noise.initno.optimize
minsd.noise.stability.score minsd.noise.stability.select minsd.noise.stability.optimize
minsd.noise.layout.load minsd.noise.layout.Layout
minsd.noise.collage.predictor
minsd.guidance.classifier_free minsd.attention.AttentionRecorder
minsd.kernels.flash minsd.kernels.reference
minsd.weights.load minsd.weights.lora.read
minsd.graphs minsd.controlnet
""".split()
SD = "minsd.pipeline.StableDiffusion"
HOW = "negative_prompt steps sampler guidance_scale"
COLLAGE = "guidance_scale background_weight background_drop ladder seed"
# The parameters of the callables among them: "*" stands before the keyword-only ones.
PARAMETERS = {
    "minsd.load": "model device dtype * tokenizer",
    f"{SD}.__call__": f"prompt seeds * noise {HOW} height width refine",
    f"{SD}.sample": "prompts noise * negative_prompt guidance_scale",  # the rest goes to denoise
    f"{SD}.denoise": "predict noise * seeds steps sampler",
    f"{SD}.encode_prompt": "prompts",
    f"{SD}.encode": "",
    f"{SD}.decode": "latents",
    f"{SD}.predictor": "context uncond guidance_scale",
    "minsd.unet.UNet.forward": "x t context * record",
    "minsd.text.TextEncoder.ids": "prompt",
    "minsd.noise.initial.noise": "seeds shape",
    **{f"minsd.samplers.SAMPLERS[{name!r}]": "predict x schedule steps * generator refine final"
       for name in ("ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", "unipc", "lcm")},
    "minsd.samplers.ddim.sample": "predict x schedule steps * eta generator refine final",
    "minsd.samplers.ddim.invert": "predict x schedule steps",
    "minsd.kernels.attention": "q k v * scale bias probs backend",
    "minsd.noise.losses.automatic_subjects": "prompt",
    "minsd.noise.losses.resolve": "text prompt subjects",
    "minsd.noise.initno.optimize": "sd prompt subjects seed *",
    "minsd.noise.collage.predictor": f"sd layout * {COLLAGE}",
    "minsd.weights.lora.read": "path sd",
}  # fmt: skip


def environment(path: str = "") -> dict[str, str]:
    """This process's environment with another PYTHONPATH."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return kept | {"PYTHONPATH": path}


def run(*command: str, cwd: Path, path: str = "", python: str = sys.executable) -> str:
    """Python's output, stripped. The command must succeed."""
    result = subprocess.run(
        [python, *command], cwd=cwd, env=environment(path), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def checkout() -> Iterator[str]:
    """The files that git tracks or would add; links to folders and ignored files are left out."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return (name for name in sorted(set(listed.stdout.splitlines())) if (ROOT / name).is_file())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout without anything that was built in it."""
    target = tmp_path_factory.mktemp("source") / "minsd"
    for name in checkout():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    options = ("-q", "--no-deps", "--no-build-isolation", "-w", str(out))
    run("-m", "pip", "wheel", *options, str(source), cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The python of a virtual environment with the wheel; dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    python = borrowing(folder)
    run("-m", "pip", "--python", python, "install", "-q", "--no-deps", str(wheel), cwd=folder)
    return python


def site_packages(python: str) -> Path:
    """The folder in which a python finds its packages."""
    code = "import site; print(site.getsitepackages()[0])"
    return Path(run("-c", code, cwd=Path(python).parent, python=python))


def borrowing(folder: Path) -> str:
    """The python of a new virtual environment, which can import this environment's packages."""
    run("-m", "venv", "--without-pip", str(folder / "venv"), cwd=folder)
    python = str(next((folder / "venv").glob("bin/python")))
    (site_packages(python) / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    return python


def test_the_wheel_holds_the_tree_under_one_name(wheel):
    """Exactly the files of the package folders: a new folder or file cannot be forgotten."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tree = set()
    for name in checkout():
        top, *rest = name.split("/")
        if rest and top not in OUTSIDE and not top.startswith("."):
            tree.add(name if top == "minsd" else f"minsd/{name}")
    assert names == tree
    assert {f"minsd/weights/shapes/{name}" for name in MODEL} <= names
    assert {"minsd/kernels/__init__.py", "minsd/__main__.py", "minsd/py.typed"} <= names


def test_type_checkers_find_every_package():
    """typings/minsd links to the folders beside minsd/, so that minsd.kernels etc. resolve statically."""
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {*OUTSIDE, "minsd"}
    links = {path.name: path for path in (ROOT / "typings" / "minsd").iterdir()}
    assert links.pop("__init__.py").resolve() == ROOT / "minsd" / "__init__.py"
    assert set(links) == folders
    assert all(path.resolve() == ROOT / name for name, path in links.items())


def test_the_sdist_holds_the_model(source, tmp_path):
    pytest.importorskip("setuptools")
    copy = shutil.copytree(source, tmp_path / "copy")
    run("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=copy)
    names = tarfile.open(next(tmp_path.glob("*.tar.gz"))).getnames()
    model = [f"weights/shapes/{name}" for name in MODEL]
    others = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels/__init__.py")
    for name in (*others, *model):
        assert any(n.endswith("/" + name) for n in names), name


def test_a_normal_install_works_from_elsewhere_and_from_the_checkout(installed, source, tmp_path):
    found = run("-c", WORKS, cwd=tmp_path, python=installed)
    assert found.startswith(str(site_packages(installed)))
    # In a checkout, the checkout itself is used.
    assert run("-c", WORKS, cwd=source, python=installed).startswith(str(source))
    assert "star</w>" in run(
        "-m", "minsd.generate", "--list-tokens", "a star", cwd=tmp_path, python=installed
    )


def test_an_editable_install_works_from_elsewhere(source, tmp_path):
    python = borrowing(tmp_path)
    options = ("-q", "--no-deps", "--no-build-isolation")
    run("-m", "pip", "--python", python, "install", *options, "-e", str(source), cwd=tmp_path)
    assert run("-c", WORKS, cwd=tmp_path, python=python).startswith(str(source))
    assert "star</w>" in run("-m", "minsd", "--list-tokens", "a star", cwd=tmp_path, python=python)


@pytest.mark.parametrize("module", ["minsd", "minsd.generate", "bench.unet"])
def test_a_bare_checkout_runs_modules(source, module):
    assert "usage" in run("-m", module, "--help", cwd=source)


DOORS = {
    "minsd": ["minsd"],
    "-m minsd": ["python", "-m", "minsd"],
    "-m generate": ["python", "-m", "minsd.generate"],
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_answers_and_gives_its_exit_code(installed, tmp_path, door):
    program, *rest = DOORS[door]
    command = [str(Path(installed).with_name(program)), *rest]
    version = run("-c", "import minsd; print(minsd.__version__)", cwd=tmp_path, python=installed)
    for arguments, code, out, err in (
        (["--version"], 0, f"minsd {version}", ""),
        (["--nosuch"], 2, "", "minsd: error: "),
    ):
        result = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert (result.returncode, result.stdout.strip()) == (code, out), result.stderr
        assert result.stderr.startswith(err) and result.stderr.count("\n") == bool(err)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_stopped_by_sigterm(installed, tmp_path, door):
    """torchrun, Slurm and timeout stop a run with SIGTERM: it ends as by Ctrl-C, reporting progress."""
    program, *rest = DOORS[door]
    command = [str(Path(installed).with_name(program)), *rest]
    process = subprocess.Popen(
        [*command, "a star", "--seeds", "0-999", "--steps", "2"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for _ in range(600):
            if list(tmp_path.glob("outputs/*.png")) or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert " of 1000 " in output.splitlines()[-1] and "Traceback" not in output


def test_an_installed_wheel_draws(installed, tmp_path):
    """Outside the checkout, with the embedded model that the wheel brings."""
    program = str(Path(installed).with_name("minsd"))
    command = [program, "a red circle", "--seed", "0", "--steps", "1", "--device", "cpu"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "outputs").glob("*.png")] == ["00000-0.png"]


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_a_package_called_kernels_is_not_shadowed(source, tmp_path, where):
    """transformers imports the PyPI package of that name when it is there."""
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / "__init__.py").write_text("MARK = 'theirs'")
    path = f"{tmp_path / 'other'}:{source}" if where == "elsewhere" else str(tmp_path / "other")
    code = (
        "import minsd, kernels, minsd.kernels\n"
        "assert kernels.MARK == 'theirs'\n"
        "assert minsd.kernels.attention\n"
        "print('ok')"
    )
    assert run("-c", code, cwd=source if where == "checkout" else tmp_path, path=path) == "ok"


def test_importing_minsd_loads_nothing_heavy(source):
    code = (
        "import sys, minsd\n"
        "assert not {'torch', 'transformers', 'numpy', 'triton'} & set(sys.modules)\n"
        "print('load' in dir(minsd))"
    )
    assert run("-c", code, cwd=source) == "True"


# Imports minsd, then the libraries that take long to import. Every name is then resolved in a fork of
# its own, where no earlier name has imported any submodule.
FORKS = """
import importlib.util, inspect, os, sys
import minsd
for heavy in ('torch', 'numpy', 'PIL.Image', 'safetensors.torch', 'transformers', 'tqdm', 'triton'):
    if importlib.util.find_spec(heavy.split('.')[0]):
        importlib.import_module(heavy)
failed = []
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            value = eval(name, {'minsd': minsd})
            if callable(value) and not isinstance(value, type):
                parameters = inspect.signature(value).parameters.values()
                print('|'.join([name, *(f'{p.kind.name}:{p.name}' for p in parameters)]))
        except AttributeError as error:
            print(f'{name}|{error}', file=sys.stderr)
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print('failed:', failed, file=sys.stderr)
sys.exit(bool(failed))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_everything_public_resolves_after_import_minsd_alone(source):
    has_triton = importlib.util.find_spec("triton") is not None
    names = [name for name in PUBLIC if has_triton or name != "minsd.kernels.flash"]
    answers = run("-c", FORKS, *names, *PARAMETERS, cwd=source).splitlines()
    signatures = {name: rest for name, *rest in (line.split("|") for line in answers)}
    for name, wanted in PARAMETERS.items():
        parameters = [p for p in signatures[name] if p.split(":")[1] != "self"]
        before, _, after = wanted.partition("*")
        by_keyword = {p.split(":")[1] for p in parameters if p.startswith("KEYWORD_ONLY")}
        positional = [p.split(":")[1] for p in parameters if p.startswith("POSITIONAL")]
        assert positional[: len(before.split())] == before.split(), name
        assert set(after.split()) <= by_keyword, name


def test_the_version_is_said_alike():
    assert f"\nversion: {minsd.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {minsd.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_other_name_resolves(source):
    assert run("-c", "import minsd; print(hasattr(minsd, 'nothing'))", cwd=source) == "False"


def test_the_embedded_model_has_its_public_attributes(shapes):
    for name in ("unet", "vae", "text", "schedule"):
        assert hasattr(shapes, name)
    assert shapes.text.tokenizer is not None
