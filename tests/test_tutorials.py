"""The notebooks run from scratch, are stored as executed by the code as it is, and call the repository's own lines."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

import tmd_minimal as tmd
from toys import tiny_video

pytest.importorskip("diffusers")  # the last notebook needs it
nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tutorials"))
import execute  # noqa: E402

NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_six():
    """There are six lessons, each linked from the README and each but the last to the next."""
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]
    readme = (ROOT / "README.md").read_text()
    for path, following in zip(NOTEBOOKS, [*NOTEBOOKS[1:], None]):
        assert f"tutorials/{path.name}" in readme
        assert following is None or following.name in path.read_text()


@pytest.mark.slow  # the next test knows whether the stored outputs come from these very cells and files
@every
def test_runs_from_scratch(path):
    """Every cell runs, and its assertions hold, in the quick setting."""
    execute.execute(path, quick=True)


@every
def test_stored_outputs_are_of_this_code(path):
    """What is stored was executed in full, with these cells and files, in a time a reader waits (make tutorials)."""
    assert not execute.stale(path)
    assert nbformat.read(path, 4).metadata["executed"]["seconds"] <= execute.LIMIT
    assert path.stat().st_size < 2e6


@every
def test_teaches(path):
    """A notebook says what one will be able to do, has exercises with hidden answers, pictures and measured results."""
    notebook = nbformat.read(path, 4)
    words = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.search(r"After this", words[:1200]) and 2 <= words.count("<details>") == words.count("</details>") <= 4
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs if "data" in o]
    assert sum("image/png" in o["data"] for o in outputs) >= 3
    assert "claims(" in execute.code(notebook) or "bench.json" in execute.code(notebook)


@every
def test_names_nothing_of_this_machine(path):
    """No absolute path, no traceback, no warning of a library in what a reader sees."""
    for cell in nbformat.read(path, 4).cells:
        for output in cell.get("outputs", []):
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"(^|[\s\"'(])/(home|root|work|tmp|usr)/|Traceback|Warning:", text), text[:300]
            assert output.get("name") != "stderr", text[:300]


@every
def test_writes_the_algorithm_nowhere(path):
    """A notebook defines no function or class that tmd_minimal has; it calls them."""
    taken = {name for name in vars(tmd) if not name.startswith("_")}
    for node in ast.walk(ast.parse(execute.code(nbformat.read(path, 4)))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert node.name not in taken, node.name


def test_a_stale_notebook_is_told(tmp_path):
    """A changed cell, a cell that was not executed and another setting each make stored outputs stale."""
    notebook = nbformat.read(NOTEBOOKS[0], 4)
    notebook.cells[0].source += "."
    notebook.metadata["executed"]["setting"] = "quick"
    next(cell for cell in notebook.cells if cell.cell_type == "code").execution_count = None
    nbformat.write(notebook, tmp_path / "01.ipynb")
    told = "; ".join(execute.stale(tmp_path / "01.ipynb"))
    assert "cells changed" in told and "full setting" in told and "not executed" in told


def test_published_weights_are_those_of_the_table():
    """results/toy_video/weights.pt scores what metrics.json says, to the rounding of half precision."""
    ladder, nets = tiny_video.published()
    wanted = json.loads((ROOT / "results/toy_video/metrics.json").read_text())["models"]
    for name, how in (("tmd", ladder.cfg.student_config()), ("dmd2v", ladder.cfg.student_config(H=0, N=1))):
        found = ladder.judge(lambda how=how, name=name: ladder.student_samples(nets[name], how))[0]
        for key in ("total", "quality", "semantic", "motion", "diversity"):
            assert found[key] == pytest.approx(wanted[name][key], abs=0.01), (name, key)
