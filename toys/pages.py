"""Pages that a run leaves behind: one HTML file with its numbers in it, which asks no network.

A page is a template with four marks: {{STYLE}} and {{SCRIPT}} (page.css and page.js, which all pages share), {{FACTS}}
(JSON) and {{PACKED}} (numbers too many for JSON).
"""

from __future__ import annotations

import base64
import json
import os
import re
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


def fill(template: Path, facts: dict, packed: str) -> str:
    """The page: the template with its four marks filled."""
    page = template.read_text(encoding="utf-8")
    filled = {
        "STYLE": (HERE / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": (HERE / "page.js").read_text(encoding="utf-8"),
        "FACTS": json.dumps(facts).replace("</", "<\\/"),  # a word of the facts cannot end the script
        "PACKED": packed,
    }
    for mark, value in filled.items():
        page = page.replace(f"{{{{{mark}}}}}", value)
    return page


def write(path: Path, template: Path, facts: dict, packed: str) -> Path:
    """Fill the template and write the page, whole or not at all; returns its path."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(fill(template, facts, packed), encoding="utf-8")
    os.replace(temporary, path)
    return path


def read(path: Path) -> tuple[dict, str]:
    """The facts and the packed numbers of a page, so that it can be filled into a newer template."""
    text = path.read_text(encoding="utf-8")
    facts, packed = re.search(r"const facts = (.*);$", text, re.M), re.search(r'unpack\("([^"]*)"', text)
    if not facts or not packed:
        raise ValueError(f"{path} is no page of a run; make it again with its run.")
    return json.loads(facts[1]), packed[1]


def possible(counts: set[int], gamma: float) -> list[int]:
    """The numbers of steps that have a grid at this timestep shift, increasing."""

    def fits(steps: int) -> bool:
        try:
            return len(tmd.make_grid(steps, gamma)) > 1
        except ValueError:
            return False

    return [steps for steps in sorted(counts) if fits(steps)]
