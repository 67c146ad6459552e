"""python -m results.stills: pictures of the pages in results/, made by headless Chromium, for the pages in Markdown."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import settings

RESULTS = Path(__file__).parent
SHOWN = ("teacher/50", "teacher/4", "dmd2v", "tmd")
STILLS = {  # page: what its address asks for (page.js reads it), width and height in pixels
    "toy_2d/explore.html": ("model=tmd&frame=4", 1060, 780),
    "toy_video/explore.html": ("shade=bright&shape=cross&motion=eight&frame=3&models=" + ",".join(SHOWN), 1060, 780),
}


def shoot(page: Path, view: str, width: int, height: int, browser: str) -> Path:
    """A PNG of the page's window, beside it; returns its path. RuntimeError if there is no picture."""
    picture = page.with_suffix(".png")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        drawn = Path(profile) / "still.png"
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                   "--virtual-time-budget=5000", f"--user-data-dir={profile}", f"--window-size={width},{height}",
                   f"--screenshot={drawn}", f"{page.resolve().as_uri()}#{view}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if not drawn.exists():
            told = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"{browser} drew no picture of {page} ({told}); open the page in it to see why.")
        shutil.move(drawn, picture)
    return picture


def main() -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise RuntimeError("no Chromium found; install the package chromium.")
    for page, (view, width, height) in STILLS.items():
        if (RESULTS / page).exists():
            print(shoot(RESULTS / page, view, width, height, browser))


if __name__ == "__main__":
    sys.exit(settings.command("results.stills", main))
