"""Every command and code block of the README and of the chapters is run, in small sizes, and every
picture that they show exists.

Commands run in this process, in one folder and in order, as a reader would. The embedded model draws
images of 64 pixels in two steps. The commands that cannot run here are listed in PARSED: their options
must be accepted by the parser.
"""

import io
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

path = list(sys.path)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benches are not installed
from bench import pictures  # noqa: E402

sys.path[:] = path  # the root would hide PyPI's `kernels`

from minsd import generate, judge  # noqa: E402
from minsd.app import options, study  # noqa: E402
from minsd.noise import initno  # noqa: E402

ROOT = pictures.ROOT
DOCUMENTS = ("README.md", "minsd/app/README.md")  # run in this order in one folder
CHAPTERS = [f"{folder}/README.md" for folder in pictures.CHAPTERS]

# Commands that are not run, by a part of the command -> why. Only their options are checked.
PARSED = {
    "path/to/": "needs a published checkpoint",
    "--model sdxl": "needs the network",
    "--nproc-per-node": "needs several GPUs",
    "--engine ray": "needs a cluster",
    "python -m minsd.weights.shapes": "trains for an hour",
}
OTHERS = ("pip install ", "ray start ", "git clone ", "ruff check", "python -m pytest")  # of other programs

# Options that make a command cheap: given to every command that draws, instead of what it has.
SMALL = {"--steps": "2", "--height": "64", "--width": "64"}
FEWER = {"--candidates": "2", "--optimize-steps": "1", "--objective-set": "steps=2", "--seeds": "0-1"}
SIMPLER = {'"num_inference_steps": 50': '"num_inference_steps": 2', "128": "64"}  # in Python blocks

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(source: str) -> list[list[str]]:
    """The commands of a shell block, as words, with comments left out and variables filled in."""
    known: dict[str, str] = {}
    found = []
    for line in source.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\([^)]*\)", "value", line)  # the output of another command
        words = [re.sub(r"\$(\w+)", lambda m: known[m[1]], w) for w in shlex.split(line, comments=True)]
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            known[name] = value
        if words:
            found.append(words)
    return found


def program(words: list[str]) -> tuple[str, list[str]]:
    """(program, arguments) of a command: "generate", "compare", "judge" or "study"; "" for others."""
    text = shlex.join(words)
    if text.startswith(OTHERS):
        return "", []
    if words[0] == "minsd":
        name = words[1] if words[1] in ("compare", "judge") else "generate"
        return name, words[1 if name == "generate" else 2 :]
    module = words[words.index("-m") + 1]
    return module.rpartition(".")[2], words[words.index("-m") + 2 :]


def small(name: str, words: list[str]) -> list[str]:
    """The same arguments with fewer candidates, steps and pixels."""
    for flag, value in FEWER.items():
        if flag in words and (flag != "--seeds" or words[words.index(flag) + 1] != "0"):
            words[words.index(flag) + 1] = value
    how = [word for flag, value in SMALL.items() if flag not in words for word in (flag, value)]
    if name == "generate" and "--like" not in words:
        return [*words, *how]
    if name == "compare" or (name == "study" and words[0] == "draw"):
        return [*words, "--options", shlex.join(how)]
    return words


def parsed(name: str, words: list[str]) -> None:
    """Raises an error unless the program's parser accepts the arguments."""
    if name == "generate":
        options.parse(words)
    elif name == "judge":
        judge.options().parse_args(words)
    elif name == "compare":
        study.parser("minsd").parse_args([name, *words])
    elif name == "study":
        study.parser("study").parse_args(words)


def run(words: list[str]) -> None:
    """Runs one command of the README in this process, in a small size. It must end with 0."""
    name, arguments = program(words)
    if not name:
        return
    assert name in ("generate", "judge", "compare", "study") or any(
        key in shlex.join(words) for key in PARSED
    )
    parsed(name, arguments)
    if any(key in shlex.join(words) for key in PARSED):
        return
    arguments = small(name, arguments)
    told = io.StringIO()
    with redirect_stderr(told), redirect_stdout(told):
        if name == "generate":
            code = generate.main(arguments)
        elif name == "judge":
            code = judge.main(arguments)
        else:
            code = study.main([name, *arguments] if name == "compare" else arguments, name)
    assert code == 0, f"{shlex.join(words)}\n{told.getvalue()[-2000:]}"


def walk(document: str) -> None:
    """Runs all blocks of a document: writes the files that it shows, and runs commands and Python."""
    text = (ROOT / document).read_text()
    names = {"__name__": document}
    for match in BLOCK.finditer(text):
        language, source = match.groups()
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        file = re.search(r"`([\w-]+\.(?:py|json|jsonl|txt))`.*:$", before, re.DOTALL)
        if file is not None:
            Path(file[1]).write_text(source)
        elif language == "sh":
            for words in commands(source):
                run(words)
        elif language == "python":
            for old, new in SIMPLER.items():
                source = source.replace(old, new)
            line = text[: match.start()].count("\n") + 1
            exec(compile("\n" * line + source, document, "exec"), names)
        else:
            pytest.fail(f"{document}: a {language} block that is neither run nor written to a file")


@pytest.fixture(scope="module")
def place():
    """The folder of all commands. InitNO takes three evaluations in it, since it accepts no noise of 64
    pixels, and would take a hundred.
    """
    short = partial(initno.optimize_batch, rounds=1, round_steps=2, last_steps=1)
    with pictures.workplace() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(initno, "optimize_batch", short)
        yield folder


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_block_runs_as_written(document, place):
    walk(document)


def shown(document: str) -> list[Path]:
    """The files of the pictures that a document shows."""
    text = (ROOT / document).read_text()
    return [(ROOT / document).parent / name for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)]


def test_every_picture_exists_and_is_drawn_by_the_script():
    names = {path.resolve() for document in (*DOCUMENTS, *CHAPTERS) for path in shown(document)}
    names.remove(ROOT / "bench" / "results" / "page.png")  # a screenshot, which takes a browser
    assert names == set(pictures.FOLDER.glob("*.png")) and len(names) > 20
    assert sum(path.stat().st_size for path in names) < 420_000
    made = set(pictures.README_PICTURES)
    for document in CHAPTERS:
        source = "".join(pictures.blocks((ROOT / document).read_text(), "python"))
        made |= set(re.findall(r'save\(\s*"outputs/(\w+)\.png"\s*\)', source))
    assert made == {path.stem for path in names}


def test_every_link_leads_somewhere():
    for document in (*DOCUMENTS, *CHAPTERS, "bench/README.md", "bench/results/README.md", "CONTRIBUTING.md"):
        text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            file = (ROOT / document).parent / name if name else ROOT / document
            assert file.exists(), f"{document}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in anchors, f"{document}: {target}"


def test_pictures_are_compared():
    """A moved object is noticed, and what another processor rounds differently is not."""
    path = pictures.FOLDER / "control.png"
    image = Image.open(path).convert("RGB")
    assert pictures.difference(image, path) == 0
    pixels = np.asarray(image).astype(int)
    other = np.clip(pixels + np.random.default_rng(0).integers(-2, 3, pixels.shape), 0, 255)
    assert 0 < pictures.difference(Image.fromarray(other.astype(np.uint8)), path) < 2
    assert pictures.difference(image.rotate(180), path) > pictures.LIMIT
    assert pictures.difference(image.resize((10, 10)), path) == float("inf")
    assert pictures.difference(image, path.with_name("none.png")) == float("inf")


def compare(images: dict[str, Image.Image]) -> None:
    apart = {
        name: pictures.difference(image, pictures.FOLDER / f"{name}.png") for name, image in images.items()
    }
    changed = {name: value for name, value in apart.items() if value > pictures.LIMIT}
    assert not changed, f"{changed}: look at them, then run python -m bench.pictures"


def test_chapters_start_in_a_fresh_python_of_the_checkout():
    """`import minsd` takes the checkout off the import path, so that `bench` must come first."""
    for document in CHAPTERS:
        source = pictures.blocks((ROOT / document).read_text(), "python")
        (first,) = re.findall(r"^(?:from|import) (?:bench|minsd)", "\n".join(source), re.MULTILINE)[:1]
        assert first == "from bench", document
        assert any(text in "".join(source) for text in ("makedirs", "copytree")), document  # of outputs/


@pytest.mark.slow
@pytest.mark.parametrize("folder", pictures.CHAPTERS)
def test_every_block_of_a_chapter_runs_and_its_figures_are_the_files(folder):
    compare(pictures.chapter(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", pictures.README_PICTURES)
def test_the_pictures_of_the_readme_are_the_files(name):
    compare({name: pictures.README_PICTURES[name]()})
