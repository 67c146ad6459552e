"""What the notebooks share: the look of the pictures, real lines of the code, animations, measured claims.

With TMD_TUTORIALS=quick in the environment the notebooks run in the small setting of the tests.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import sys
import textwrap
from pathlib import Path

import torch
from IPython.display import Image, Markdown

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt

from toys import claims_2d, claims_video, verdicts

QUICK = os.environ.get("TMD_TUTORIALS") == "quick"  # what the tests run: every cell, a fraction of the updates
torch.set_num_threads(1)  # networks so small that a second thread only waits
torch.manual_seed(0)
plt.rcParams.update(
    {"figure.dpi": 90, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
)


def steps(full: int, quick: int) -> int:
    """`full`, or `quick` in the setting of the tests."""
    return quick if QUICK else full


def source(thing, start: str = "", end: str = "") -> Markdown:
    """The lines of a function or class as they stand in the repository.

    With `start` and `end`: from the first line that contains `start` to the next that contains `end`.
    RAISES ValueError where those words are not there, so that a lesson cannot talk about lines that are gone.
    """
    thing = inspect.unwrap(thing)  # what is beneath torch.no_grad
    lines, first = inspect.getsourcelines(thing)
    for words in filter(None, (start, end)):
        if not any(words in line for line in lines):
            raise ValueError(f"{thing.__name__} has no line with {words!r} any more; mend this lesson.")
    if start:
        skipped = next(i for i, line in enumerate(lines) if start in line)
        lines, first = lines[skipped:], first + skipped
    if end:
        lines = lines[: next(i for i, line in enumerate(lines) if end in line) + 1]
    file = Path(inspect.getsourcefile(thing)).resolve().relative_to(ROOT)
    return Markdown(
        f"[`{file}`](../{file}), from line {first}:\n```python\n{textwrap.dedent(''.join(lines)).rstrip()}\n```"
    )


def animate(draw, frames: int, fps: int = 8, **subplots) -> Image:
    """A picture that moves wherever the notebook is read: draw(axes, i) paints frame i on cleared axes."""
    from PIL import Image as Picture

    pictures = []
    fig, axes = plt.subplots(**subplots)
    for i in range(frames):
        for ax in fig.axes:
            ax.clear()
        draw(axes, i)
        with io.BytesIO() as file:
            fig.savefig(file, format="png")
            pictures.append(Picture.open(file).convert("RGB").quantize(64))
    plt.close(fig)
    with io.BytesIO() as file:
        pictures[0].save(file, "gif", save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)
        # a GIF under the name of a PNG: code hosts drop image/gif, browsers look at the bytes
        return Image(file.getvalue(), format="png")


def claims(*names: str, rung: str = "toy_2d") -> Markdown:
    """The measured rows of claims ("C1", "trap 2"); rung: "toy_2d" (the plane) or "toy_video"."""
    how = {"toy_2d": claims_2d.RUNG, "toy_video": claims_video.rung("tiny")}[rung]
    result = json.loads((ROOT / f"results/{rung}/claims.json").read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if row["claim"] in names]
    if missing := set(names) - {row["claim"] for row in rows}:
        raise ValueError(f"results/{rung}/claims.json has no rows of {', '.join(sorted(missing))}.")
    scores = ", ".join(
        f"{how.labels[k]} ({'higher' if sign > 0 else 'lower'} is better)" for k, sign in how.scores.items()
    )
    updates, usual = result["models"]["dmd2v"]["updates"], how.ladder.settings()
    usual = usual.stage1_updates + usual.iterations
    more = {"toy_2d": "", "toy_video": " (more in rows of more iterations)"}[rung]
    where = {"toy_2d": "On points of two spirals, where a row says no other", "toy_video": "On clips of moving shapes"}
    budget = f"{updates:,} updates per student{more}, where a default run makes {usual:,}"
    told = f"*{where[rung]}; {budget}. A and B: {scores}; mean ± standard deviation over seeds. "
    rule = (
        "A - B: 95 % interval of the differences, seed by seed. **Holds**: on one score the interval is on A's side of "
        "zero, and on none on B's. **Does not hold**: the other way round. **Level**: within the margin. "
        "**Inconclusive**: all else.*"
    )
    return Markdown(verdicts.claims_table(how, {"rows": rows}) + "\n" + told + rule)
