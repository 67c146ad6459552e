"""Pages that a run leaves behind: one HTML file with its numbers in it, which asks no network.

A page is a template with four marks: {{STYLE}} and {{SCRIPT}} (page.css and page.js, which all pages share), {{FACTS}}
(JSON) and {{PACKED}} (numbers too many for JSON).
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch

import tmd_minimal as tmd

HERE = Path(__file__).parent
LIMIT = 3_000_000  # bytes of a page


class Pack:
    """Arrays one after the other, as numbers of one kind (as in numpy: "<i2"): `add` returns where they begin."""

    def __init__(self, kind: str):
        self.kind, self.parts, self.size = np.dtype(kind), [], 0

    def add(self, numbers: torch.Tensor) -> int:
        start = self.size
        self.parts.append(numbers.detach().cpu().numpy().astype(self.kind).ravel())
        self.size += self.parts[-1].size
        return start

    def array(self) -> np.ndarray:
        return np.concatenate(self.parts)

    def base64(self) -> str:
        """The numbers deflated, as text; `unpack` in page.js reads them."""
        return base64.b64encode(zlib.compress(self.array().tobytes(), 9)).decode()


def write(path: Path, template: Path, facts: dict, pack: Pack) -> Path:
    """Fill the template and write the page, whole or not at all; returns its path."""
    page = template.read_text(encoding="utf-8")
    filled = {
        "STYLE": (HERE / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": (HERE / "page.js").read_text(encoding="utf-8"),
        "FACTS": json.dumps(facts).replace("</", "<\\/"),  # a word of the facts cannot end the script
        "PACKED": pack.base64(),
    }
    for mark, value in filled.items():
        page = page.replace(f"{{{{{mark}}}}}", value)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def possible(counts: set[int], gamma: float) -> list[int]:
    """The numbers of steps that have a grid at this timestep shift, increasing."""

    def fits(steps: int) -> bool:
        try:
            return len(tmd.make_grid(steps, gamma)) > 1
        except ValueError:
            return False

    return [steps for steps in sorted(counts) if fits(steps)]
