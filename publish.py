"""Copy the measured numbers and pictures from runs/ to results/ and set the README's tables from them: make publish.

No number in the README's tables is typed by hand; tests/test_docs.py checks that its tables are the ones written here.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import bench
import claims
import toy_2d
import toy_claims

RUNS, RESULTS = Path("runs/toy_2d"), Path("results/toy_2d")
PICTURES = ("samples.png", "inner_flow.png", "curves.png", "transition.gif")


def tables() -> dict[str, str]:
    """Every table of the README by the name of its marker, from results/ alone."""
    load = lambda name: json.loads((RESULTS / name).read_text())
    return {
        "metrics": toy_2d.markdown(load("metrics.json")),
        "claims": claims.claims_table(toy_claims.RUNG, load("claims.json")),
        "bench": bench.markdown(load("bench.json")),
    }


def fill(text: str, found: dict[str, str]) -> str:
    """Replace what stands between <!-- NAME --> and <!-- /NAME --> by the table of that name."""
    for name, table in found.items():
        text, n = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=table: m[1] + t + m[2], text, flags=re.S)
        if n != 1:
            raise ValueError(f"README.md has {n} places for the table {name!r}; it needs one <!-- {name} --> ... <!-- /{name} -->.")
    return text


def main() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.json", *PICTURES):
        shutil.copy(RUNS / "spirals" / name, RESULTS / name)
    shutil.copy(RUNS / "checkerboard" / "samples.png", RESULTS / "checkerboard.png")
    for name in ("claims.json", "claims.md", "quality_vs_nfe.png"):
        shutil.copy(RUNS / "claims" / name, RESULTS / name)
    shutil.copy(RUNS / "bench.json", RESULTS / "bench.json")
    readme = Path("README.md")
    readme.write_text(fill(readme.read_text(), tables()))


if __name__ == "__main__":
    main()
