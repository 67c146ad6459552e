"""The driver of Chromium sees what the tests of pages rest on: errors, requests, keys, clicks, widths."""

import browser
import pytest
from browser import needs_browser, opened

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
        skip = next(mark for mark in needs_browser(lambda: None).pytestmark if mark.name == "skipif")
        assert skip.args[0] is not needed
    with pytest.raises(RuntimeError, match="install the package chromium"), opened(None):
        pass
