"""Execute the notebooks of this folder: make tutorials.

    python tutorials/execute.py                   # all, in the full setting, outputs stored in place
    python tutorials/execute.py 03-stage-1.ipynb  # this one
    python tutorials/execute.py --quick           # all in a small setting, nothing is stored (make test does it)
    python tutorials/execute.py --check           # are the stored outputs those of these notebooks and of this code?

The metadata of a stored notebook say what it was executed with: digests of its own cells, of every file of the
repository that it imports, and of the measured results that it reads.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
# calls in a notebook that read files of results/
PUBLISHED = {"weights.pt", "metrics.json", "teacher.json", "teacher.safetensors"}
READS = {"claims(": {"claims.json"}, "published(": PUBLISHED}
LIMIT = 180  # seconds that a reader should have to wait at most, on two free cores; slow ones are a third slower


def code(notebook) -> str:
    return "\n".join(
        cell.source for cell in notebook.cells if cell.cell_type == "code" and not cell.source.startswith("%")
    )


def imported(text: str) -> set[Path]:
    """Files of the repository that Python code imports."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    places = [folder / f"{name.replace('.', '/')}.py" for name in names for folder in (FOLDER, ROOT)]
    return {place for place in places if place.exists()}


def digest(notebook) -> dict[str, str]:
    """What the outputs depend on: the cells, the files they import, directly or not, the results they read."""
    text = code(notebook)
    names = set(re.findall(r"[\w-]+\.json", text)).union(*(files for call, files in READS.items() if call in text))
    kept = lambda file: file.name in names and not file.parent.name.startswith("teacher-")  # claims.json tells of those
    results = {file for file in (ROOT / "results").rglob("*.*") if kept(file)}
    found, todo = set(), imported(text)
    while todo:
        file = todo.pop()
        found.add(file)
        todo |= imported(file.read_text(encoding="utf-8")) - found
    short = lambda text: hashlib.sha256(text.encode()).hexdigest()[:16]
    cells = short("\n".join(f"{cell.cell_type}\n{cell.source}" for cell in notebook.cells))
    read = {str(file.relative_to(ROOT)): file for file in sorted(found | results)}
    return {"cells": cells, **{name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in read.items()}}


def execute(path: Path, quick: bool) -> float:
    """Run a notebook from scratch, in place unless quick; returns the seconds.

    RAISES RuntimeError, which names the cell that failed.
    """
    notebook = nbformat.read(path, 4)
    how = {
        "timeout": 900,
        "kernel_name": "python3",
        "coalesce_streams": True,
        "resources": {"metadata": {"path": str(FOLDER)}},
    }
    client = NotebookClient(notebook, **how)
    os.environ.update(
        {"TMD_TUTORIALS": "quick" if quick else "full", "OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    )
    start = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as e:
        raise RuntimeError(f"{path.name} fails: {str(e).strip()}") from e
    seconds = time.perf_counter() - start
    if not quick:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "executed": {"setting": "full", "seconds": round(seconds), **digest(notebook)},
        }
        temporary = path.with_suffix(".tmp")
        nbformat.write(notebook, temporary)
        os.replace(temporary, path)
    return seconds


def stale(path: Path) -> list[str]:
    """What is wrong with a stored notebook: nothing if it was executed whole, in the full setting, with this code."""
    notebook = nbformat.read(path, 4)
    stored, now = notebook.metadata.get("executed", {}), digest(notebook)
    wrong = [
        f"{what} changed"
        for what in sorted({*stored, *now} - {"setting", "seconds"})
        if stored.get(what) != now.get(what)
    ]
    if stored.get("setting") != "full":
        wrong.append("it was not executed in the full setting")
    for cell in notebook.cells:
        if cell.cell_type == "code" and (
            cell.execution_count is None or any(o.output_type == "error" for o in cell.outputs)
        ):
            wrong.append(
                f"a cell was not executed or failed: {cell.source.splitlines()[0] if cell.source else 'an empty one'}"
            )
    return wrong


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", help="notebooks of this folder (default: all)")
    p.add_argument("--quick", action="store_true", help="a small setting; nothing is stored")
    p.add_argument("--check", action="store_true", help="execute nothing, say which stored outputs are stale")
    args = p.parse_args(argv)
    status = 0
    for path in [FOLDER / Path(name).name for name in args.names] or sorted(FOLDER.glob("*.ipynb")):
        if args.check:
            wrong = stale(path)
            print(f"{path.name}: {'; '.join(wrong) + ': run make tutorials' if wrong else 'as executed'}")
            status |= bool(wrong)
            continue
        try:
            seconds = execute(path, args.quick)
        except (RuntimeError, OSError) as e:
            print(e, file=sys.stderr)
            status = 1
            continue
        late = f", more than the {LIMIT} s it should take" if seconds > LIMIT and not args.quick else ""
        print(f"{path.name}: {seconds:.0f} s{late}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
