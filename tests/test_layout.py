"""The house: imports go down the rungs, never in a circle, and no file outgrows one reading."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
FILES = [f for f in FILES or map(str, (p.relative_to(ROOT) for p in ROOT.rglob("*.py"))) if not f.startswith(".")]
OURS = {f.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."): f for f in FILES if "tests/" not in f}
RUNGS = ("tmd_minimal", "settings", "toys", "wan_scale", "toy_2d", "toy_video", "results", "tutorials")


def imports(file: str, text: str | None = None) -> set[str]:
    """Modules of this repository that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text() if text is None else text)):
        assert getattr(node, "attr", "") != "import_module", f"{file}: write an import that can be read"
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: write imports from the root, as in `from toys import ladder`"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inside & OURS.keys()) or {node.module}
    return {name for name in names if name in OURS}


GRAPH = {module: imports(file) for module, file in OURS.items()}


def packages(file: str, text: str | None = None) -> set[str]:
    """Packages that a file imports, by the names under which they are installed, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return {name.replace("_", "-") for name in names - sys.stdlib_module_names - set(RUNGS)}


def installed(*files: str) -> set[str]:
    """Packages that requirements files name."""
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines() if line.strip()]
    return {line.split("==")[0] for line in lines}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path of imports that leads back to where it began, or []."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        found = next((c for other in sorted(graph.get(module, ())) if (c := visit(other))), [])
        path.pop()
        done.add(module)
        return found

    return next((c for module in sorted(graph) if (c := visit(module))), [])


def too_high(graph: dict[str, set[str]]) -> list[str]:
    """Imports that a rung may not make, as "importer -> imported"."""
    may = {
        "tmd_minimal": set(),
        "settings": {"tmd_minimal"},
        "toys": {"tmd_minimal", "settings", "toys"},
        "wan_scale": {"tmd_minimal", "settings", "wan_scale"},
        "toy_2d": {"tmd_minimal", "settings", "toys"},
        "toy_video": {"tmd_minimal", "settings", "toys"},
    }
    rung = lambda module: module.split(".")[0]
    allowed = lambda module: may[rung(module)] | ({"toys"} if module == "wan_scale.shapes" else set())
    edges = ((a, b) for a, found in sorted(graph.items()) for b in sorted(found) if rung(a) in may)
    return [f"{a} -> {b}" for a, b in edges if rung(b) not in allowed(a)]


def test_no_import_circles():
    """No module imports itself by way of others."""
    assert not circle(GRAPH), " -> ".join(circle(GRAPH))


def test_data_flows_one_way():
    """tmd_minimal imports nothing of ours, toys only it and the settings, wan_scale no toys but in `shapes`."""
    assert not GRAPH["tmd_minimal"] and not too_high(GRAPH), too_high(GRAPH)


def test_a_rung_imports_what_its_requirements_install():
    """`make toy` and `make video` install requirements.txt alone; `make wan` its own as well."""
    small, all_ = installed("requirements.txt"), installed("requirements.txt", "wan_scale/requirements.txt")
    all_ |= {"tokenizers", "pyarrow"}  # comes with transformers; for one form of data, and a sentence without it
    for file in OURS.values():
        if not file.startswith(("results/", "tutorials/")):
            assert packages(file) <= (all_ if file.startswith("wan_scale/") else small), file
    assert packages("a.py", "import os\ndef f():\n    import imageio_ffmpeg.x") == {"imageio-ffmpeg"}


def test_the_checks_can_fail():
    """A made-up circle and a made-up import of a higher rung are both found."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    graph = {"toys.planar": {"toy_2d"}, "wan_scale.model": {"toys.ladder"}, "wan_scale.shapes": {"toys.ruler"}}
    assert too_high(graph) == [
        "toys.planar -> toy_2d",
        "wan_scale.model -> toys.ladder",
    ]
    assert imports("settings.py", "def f():\n    from toys import ladder") == {"toys.ladder"}
    for hidden in ("from . import ladder", "import importlib\nimportlib.import_module('toys.ladder')"):
        with pytest.raises(AssertionError):
            imports("settings.py", hidden)


def test_every_module_belongs_to_a_rung():
    """The root holds the rungs and nothing else."""
    assert {module.split(".")[0] for module in OURS} == set(RUNGS)


@pytest.mark.parametrize("file, most", [("tmd_minimal.py", 850), ("toy_2d.py", 150), ("toy_video.py", 150)])
def test_the_files_one_reads_first_are_short(file, most):
    """The method in one sitting, and each story on a few screens."""
    assert len((ROOT / file).read_text().splitlines()) <= most


def test_no_file_outgrows_its_job():
    """Every other module stays at 350 lines or fewer."""
    lines = {f: len((ROOT / f).read_text().splitlines()) for f in OURS.values() if f != "tmd_minimal.py"}
    assert not {f: n for f, n in lines.items() if n > 350}
