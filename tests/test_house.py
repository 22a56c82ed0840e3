"""The house's order: no circle between files, and no import from a lower floor to a higher one.

Every import counts, including those inside functions and under TYPE_CHECKING, and so does every name
that is reached through `import minsd`, such as minsd.load or minsd.noise.layout.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import minsd

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("bench", "tests")  # top-level packages that are not installed

# Floor -> its files and folders, and the floors directly below it.
# A file may import from its own floor and from every floor below, directly or not.
FLOORS = {
    "doors": ("generate __main__", "app"),
    # run with python -m
    "training": ("weights.shapes.train weights.shapes.distil weights.shapes.extras", "pipeline"),
    "app": ("app judge", "pipeline"),
    "pipeline": ("pipeline", "noise"),
    "noise": ("noise", "judges guidance"),
    "judges": ("judges", "weights"),
    "weights": ("weights", "networks"),
    "networks": ("unet vae text controlnet", "attention"),
    "attention": ("attention", "kernels services"),
    "guidance": ("guidance", "samplers services"),
    "samplers": ("samplers", "config"),
    "services": ("image graphs adapters files words emphasis", "kernels"),  # for all above the kernels
    "kernels": ("kernels", "config"),
    "config": ("config", ""),
}
# minsd/__init__.py holds the version, which every file may read; its lazy `load` imports the pipeline.
EXEMPT = "minsd"


def files() -> dict[str, Path]:
    """Installed name -> file, for every file of the program."""
    found = {}
    for path in ROOT.glob("*/**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if (ROOT / parts[0] / "__init__.py").is_file() and parts[0] not in OUTSIDE:
            parts = parts if parts[0] == "minsd" else ("minsd", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def attribute_chain(node: ast.AST) -> list[str]:
    """["minsd", "noise", "layout"] for the expression minsd.noise.layout; [] for other expressions."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        chain = attribute_chain(node.value)
        return [*chain, node.attr] if chain else []
    return []


def longest_module(dotted: str, names: set[str]) -> str:
    """The file that a dotted name lies in: minsd.noise.layout for minsd.noise.layout.load."""
    while dotted not in names:
        dotted = dotted.rpartition(".")[0]
    return dotted


def absolute(name: str, level: int, package: str) -> str:
    """A relative import's module, as an absolute name. `package` is the one whose file imports."""
    if level == 0:
        return name
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])])


def imports(source: str, module: str, is_package: bool, names: set[str]) -> set[str]:
    """The files among `names` that a file imports, without itself and EXEMPT.

    ValueError for an import whose target is computed at run time.
    """
    package = module if is_package else module.rpartition(".")[0]
    tree = ast.parse(source)
    dotted: set[str] = set()
    whole = False  # `import minsd` binds the package itself
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
            bound = {alias.name.split(".")[0] for alias in node.names if alias.asname is None}
            whole |= "minsd" in bound
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level, package)
            dotted |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and attribute_chain(node.func)[-1:] == ["import_module"]:
            target = node.args[0]
            if isinstance(target, ast.Constant):
                name = str(target.value)
                dotted.add(absolute(name.lstrip("."), len(name) - len(name.lstrip(".")), package))
            elif not is_package:
                raise ValueError(f"{module}: only an __init__ file may import a computed name")
    if whole:
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        dotted |= {".".join(attribute_chain(node)) for node in attributes}
    found = set()
    for name in dotted:
        if name == "minsd.load":
            name = "minsd.pipeline"
        if name.split(".")[0] == "minsd":
            found.add(longest_module(name, names))
    return found - {module, EXEMPT}


def graph() -> dict[str, set[str]]:
    """Every file of the program but EXEMPT -> the files that it imports."""
    known = files()
    names = set(known)
    return {
        module: imports(path.read_text(), module, path.name == "__init__.py", names)
        for module, path in sorted(known.items())
        if module != EXEMPT
    }


def floor_of(module: str) -> str:
    """The floor of a module, by the longest entry that fits. ValueError where none fits."""
    name = module.removeprefix("minsd.")
    fitting = {
        entry: floor
        for floor, (entries, _) in FLOORS.items()
        for entry in entries.split()
        if name == entry or name.startswith(entry + ".")
    }
    if not fitting:
        raise ValueError(f"{module} is on no floor: add it to FLOORS")
    return fitting[max(fitting, key=len)]


def floors_below(floor: str) -> set[str]:
    """The floors that a file of this floor may import, its own among them."""
    return {floor}.union(*(floors_below(lower) for lower in FLOORS[floor][1].split()))


def upward(edges: dict[str, set[str]]) -> list[str]:
    """The imports that go against the order."""
    return [
        f"{module} ({floor_of(module)}) imports {other} ({floor_of(other)})"
        for module, others in edges.items()
        for other in sorted(others)
        if floor_of(other) not in floors_below(floor_of(module))
    ]


def test_no_file_imports_upward():
    assert upward(graph()) == []


def test_no_circle_between_files():
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail("circle: " + " -> ".join(error.args[1]))


def test_every_submodule_is_reachable_and_typed():
    """minsd/__init__.py names its submodules twice: for __getattr__, and under TYPE_CHECKING."""
    submodules = {name.split(".")[1] for name in files() if name not in ("minsd", "minsd.__main__")}
    assert set(minsd._SUBMODULES) == submodules
    tree = ast.parse(Path(minsd.__file__).read_text())
    for_checkers = {node.names[0].asname for node in ast.walk(tree) if isinstance(node, ast.Import)}
    assert for_checkers - {None} == submodules


def test_every_floor_is_inhabited_and_the_walk_finds_known_imports():
    edges = graph()
    assert {floor_of(module) for module in edges} == set(FLOORS)
    assert "minsd.pipeline" in edges["minsd.weights.shapes.extras"]  # by the attribute minsd.load
    assert "minsd.weights.load" in edges["minsd.pipeline"]  # inside a function
    assert "minsd.kernels.flash" in set().union(*edges.values())  # inside a function of kernels/
    assert "minsd.samplers.schedule" in edges["minsd.samplers.ddim"]  # a relative import


@pytest.mark.parametrize(
    "line",
    [
        "from minsd.app import run",
        "def f():\n    from minsd.pipeline import load",
        "if TYPE_CHECKING:\n    from minsd.pipeline import StableDiffusion",
        "import minsd\nminsd.load()",
        "import minsd.pipeline as p",
        "from ..pipeline import load",
        "import importlib\nimportlib.import_module('minsd.pipeline')",
    ],
)
def test_an_upward_import_is_found(line):
    names = set(files())
    assert upward({"minsd.noise.new": imports(line, "minsd.noise.new", False, names)})
