"""Headless Chromium for tests: open a page from disk, ask it, press keys, look at it. No network, no driver to install.

Chromium is driven over its own pipe (`--remote-debugging-pipe`: JSON messages that end in a zero byte), so keys and
clicks are the ones of a person, and a window can be as narrow as a phone's. A test is marked so:

    @needs_browser
    def test_the_page(tmp_path):
        with opened(tmp_path / "page.html", width=390) as page:
            assert page.js("document.title") == "A page"
            page.press("ArrowRight")
            page.picture(tmp_path / "page.png")
            assert page.errors == [] and page.asked == []

Without Chromium such a test is skipped; with TMD_NEEDS_BROWSER=1 in the environment (.ci/run sets it) it fails.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
NEEDED = os.environ.get("TMD_NEEDS_BROWSER") == "1"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
         "--autoplay-policy=no-user-gesture-required", "--remote-debugging-pipe", "about:blank")  # fmt: skip
# Chromium reads at descriptor 3 and writes at 4.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
KEYS = {" ": ("Space", 32), "Enter": ("Enter", 13), "Escape": ("Escape", 27), "Tab": ("Tab", 9), "Home": ("Home", 36),
        "End": ("End", 35), "ArrowLeft": ("ArrowLeft", 37), "ArrowUp": ("ArrowUp", 38),
        "ArrowRight": ("ArrowRight", 39), "ArrowDown": ("ArrowDown", 40)}  # fmt: skip
PRINTED = {" ": " ", "Enter": "\r"}  # the named keys that also write a character


def needs_browser(test):
    """Marks a test that opens a page: `browser`, and skipped where there is no Chromium (unless it is needed)."""
    test = pytest.mark.skipif(not BROWSER and not NEEDED, reason="no Chromium here")(test)
    return pytest.mark.browser(test)


class Page:
    """An open page. `errors`: console errors and exceptions so far; `asked`: addresses that are not on this disk."""

    def __init__(self, to: int, back: int):
        self.to, self.back, self.rest, self.count, self.session = to, back, b"", 0, None
        self.errors, self.asked, self.events = [], [], set()

    def call(self, method: str, timeout: float = 30.0, **params) -> dict:
        """One command of Chromium's protocol; RuntimeError if it fails or nothing comes back."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data) :]
        end = time.monotonic() + timeout
        while True:
            found = self.read(end, method)
            if found.get("id") == message["id"]:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return found["result"]
            self.note(found)

    def read(self, end: float, why: str) -> dict:
        """The next message; RuntimeError after the time `end` or when Chromium is gone."""
        while b"\0" not in self.rest:
            if not select.select([self.back], [], [], max(0.0, end - time.monotonic()))[0]:
                raise RuntimeError(f"Chromium did not answer in time ({why}).")
            part = os.read(self.back, 1 << 20)
            if not part:
                raise RuntimeError(f"Chromium ended ({why}).")
            self.rest += part
        one, self.rest = self.rest.split(b"\0", 1)
        return json.loads(one)

    def note(self, event: dict) -> None:
        method, told = event.get("method"), event.get("params", {})
        self.events.add(method)
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = told["request"]["url"]
            if url.split(":", 1)[0] not in ("file", "data", "blob", "about"):
                self.asked.append(url)

    def go(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.events.discard("Page.loadEventFired")
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + 60
        while "Page.loadEventFired" not in self.events:
            self.note(self.read(end, f"loading {path.name}"))

    def js(self, code: str):
        """The value of an expression or promise in the page, through JSON; RuntimeError if it throws."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return found["result"].get("value")

    def wait(self, code: str, timeout: float = 20.0):
        """Until an expression is true; its value. RuntimeError if it never is."""
        end = time.monotonic() + timeout
        while not (value := self.js(code)):
            if time.monotonic() > end:
                raise RuntimeError(f"never true in {timeout:.0f} s: {code}")
            time.sleep(0.05)
        return value

    def press(self, *keys: str) -> None:
        """Press keys one after the other, as a keyboard does: "ArrowRight", " ", "Tab", "a" ..."""
        for key in keys:
            code, number = KEYS.get(key) or (f"Key{key.upper()}" if key.isalpha() else f"Digit{key}", ord(key.upper()))
            how = {"key": key, "code": code, "windowsVirtualKeyCode": number}
            text = PRINTED.get(key, key if len(key) == 1 else "")
            down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
            self.call("Input.dispatchKeyEvent", **down, **how)
            self.call("Input.dispatchKeyEvent", type="keyUp", **how)

    def click(self, where: str, x: float = 0.5, y: float = 0.5) -> None:
        """Click the element that a CSS selector finds, at a share of its width and height, as a mouse does."""
        box = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(where)}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
        )
        at = {"x": box[0] + x * box[2], "y": box[1] + y * box[3], "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def choose(self, where: str, value: str) -> None:
        """Give an input or a menu a value, with the events that a person's hand gives."""
        self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(where)}); e.value = {json.dumps(value)};"
            " for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )

    def size(self, width: int, height: int = 900) -> None:
        """The window in CSS pixels; below 500 as a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def fits(self) -> bool:
        """Nothing of the page lies beside the window."""
        return self.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

    def picture(self, path: Path, whole: bool = True) -> Path:
        """A PNG of the page, the whole of it or only the window; returns its path."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def downloads(self, folder: Path) -> None:
        """What the page downloads from now on lands in folder."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder.resolve()))


def pipe() -> list[int]:
    """Both ends of a pipe, above the descriptors 3 and 4, which Chromium's own ends become."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    os.close(ends[0]), os.close(ends[1])
    return moved


@contextlib.contextmanager
def opened(path: Path, width: int = 1280, height: int = 900):
    """The Page of a file in a window of so many pixels; Chromium ends with the block."""
    if not BROWSER:
        raise RuntimeError("no Chromium found; install the package chromium, or leave TMD_NEEDS_BROWSER unset.")
    (read, ours), (back, write) = pipe(), pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [sys.executable, "-c", LAUNCH, str(read), str(write), BROWSER, f"--user-data-dir={profile}", *FLAGS]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        chromium = subprocess.Popen(command, pass_fds=(read, write), **quiet)
        os.close(read), os.close(write)
        page = Page(ours, back)
        try:
            targets = page.call("Target.getTargets", timeout=60)["targetInfos"]
            target = next(t["targetId"] for t in targets if t["type"] == "page")
            page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.call(f"{domain}.enable")
            page.size(width, height)
            page.go(path)
            yield page
        finally:
            os.close(ours), os.close(back)
            chromium.terminate()
            try:
                chromium.wait(10)
            except subprocess.TimeoutExpired:
                chromium.kill()
                chromium.wait()
