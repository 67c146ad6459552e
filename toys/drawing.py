"""The look of the pictures: one set of colours, matplotlib without a window, drawing again from saved numbers."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

INK, GREY, BLUE, ORANGE = "#1b2a41", "#b8bfca", "#2c6fbb", "#d9722e"  # baseline and axes, data, teacher, students


def pyplot():
    """matplotlib.pyplot on the Agg backend, loaded when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def redraw(draw: Callable, folder: Path, *args) -> None:
    """Draw a run's pictures again; RuntimeError if its numbers are missing or damaged."""
    try:
        draw(folder, *args)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as e:
        told = f"{folder} holds no whole run to draw ({type(e).__name__})"
        raise RuntimeError(f"{told}; run the command without --redraw first.") from e
