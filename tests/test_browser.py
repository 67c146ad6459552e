"""The driver of Chromium sees what the tests of pages rest on: errors, requests, keys, clicks, widths."""

import shutil
import subprocess
from pathlib import Path

import browser
import pytest
from browser import needs_browser, opened

ROOT = Path(__file__).resolve().parents[1]
HEAD = '<!doctype html><html><head><meta name="viewport" content="width=device-width"></head><body>'
FAULTY = """<button onclick="clicks++">Play</button><p style="width: 450px">wide</p>
<script>let clicks = 0; const keys = []; document.addEventListener("keydown", (event) => keys.push(event.key));
console.error("a plain error"); setTimeout(() => { throw new Error("thrown later"); });</script>
<img src="http://page.invalid/picture.png">"""


@needs_browser
def test_faults_and_keys_are_seen(tmp_path):
    """Errors in the console, thrown errors, requests, a page wider than a phone, keys and clicks: all are found."""
    path = tmp_path / "page.html"
    path.write_text(HEAD + FAULTY, encoding="utf-8")
    with opened(path, 390) as page:
        assert page.wait("document.documentElement.clientWidth === 390") and not page.fits()
        page.press("ArrowRight", " ", "a")
        page.click("button")
        assert page.js("[keys, clicks]") == [["ArrowRight", " ", "a"], 1]
        told = "\n".join(page.errors)
        assert "a plain error" in told and "thrown later" in told and page.asked == ["http://page.invalid/picture.png"]
        with pytest.raises(RuntimeError, match="nothing"):
            page.js("nothing.here")
        page.size(600)
        assert page.fits() and page.picture(tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"


def test_a_needed_browser_that_is_missing_fails(monkeypatch):
    """Where TMD_NEEDS_BROWSER is set a missing Chromium is no reason to skip, and the test fails in one sentence."""
    monkeypatch.setattr(browser, "BROWSER", None)
    for needed in (True, False):
        monkeypatch.setattr(browser, "NEEDED", needed)

        @needs_browser
        def test():
            pass

        skip = next(mark for mark in test.pytestmark if mark.name == "skipif")
        assert skip.args[0] is not needed
    with pytest.raises(RuntimeError, match="install the package chromium"), opened(None):
        pass


@pytest.mark.parametrize(
    ("there", "user", "apt", "needed"),
    [(True, 1, "exit 1", "1"), (False, 0, "", "1"), (False, 0, "exit 1", ""), (False, 1, "", ""), (False, 0, None, "")],
)
def test_the_gate_installs_a_browser_and_then_needs_it(tmp_path, there, user, apt, needed):
    """.ci/run: Chromium there or installed by apt-get as root, its tests are needed; else they are skipped, said so."""
    bin = tmp_path / "bin"
    bin.mkdir()
    chromium = f"#!/bin/sh\n[ -n '{there or ''}' ]"  # without it a stub that does not start, as some systems have

    def tool(name, text):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)

    for name in ("bash", "dirname"):
        (bin / name).symlink_to(shutil.which(name))
    tool("chromium", chromium)
    tool("id", f"#!/bin/sh\necho {user}")
    tool("make", '#!/bin/sh\necho "made $1, needed ${TMD_NEEDS_BROWSER:-}"')
    if apt is not None:
        works = f'[ "$1" = update ] || printf "#!/bin/sh\\n" > {bin}/chromium'
        tool("apt-get", f"#!/bin/sh\n{apt or works}")
    gate = ROOT / ".ci/run"
    done = subprocess.run([bin / "bash", gate], capture_output=True, text=True, env={"PATH": str(bin)}, timeout=60)
    assert done.returncode == 0 and done.stdout == f"made test, needed {needed}\n"
    assert ("are skipped" in done.stderr) == (not needed) and ("could not" in done.stderr) == (
        apt == "exit 1" and not there
    )
