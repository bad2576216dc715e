"""Headless Chromium by its DevTools protocol over pipes: no driver, no port, no package."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from select import select
from typing import Any

import pytest

# The protocol's ends are the descriptors 3 and 4 of the browser.
LAUNCHER = """
import os, sys
from fcntl import F_DUPFD, fcntl
ends = [fcntl(int(end), F_DUPFD, 10) for end in sys.argv[1:3]]
for end, wanted in zip(ends, (3, 4)):
    os.dup2(end, wanted)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""
SECONDS = 60  # without a word from the browser; then something is broken


def chromium() -> str | None:
    """The browser's path; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@dataclass(eq=False)
class Browser:
    """One tab. `problems`: uncaught errors, messages to the console, requests beyond files and `server`."""

    write_end: int
    read_end: int
    session: str = ""
    server: str = ""
    """The beginning of the addresses that a page may ask."""
    numbers: Iterator[int] = field(default_factory=lambda: count(1))
    waiting: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") != number:
                self.events.append(answer)
                continue
            assert "error" not in answer, answer
            result: dict[str, Any] = answer["result"]
            return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.waiting:
            ready, _, _ = select([self.read_end], [], [], SECONDS)
            assert ready, "the browser says nothing"
            more = os.read(self.read_end, 1 << 20)
            assert more, "the browser has ended"
            self.waiting += more
        line, _, self.waiting = self.waiting.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def wait_for(self, event: str) -> None:
        while not any(each.get("method") == event for each in self.events):
            self.events.append(self._next())

    def open(self, page: Path | str) -> None:
        """Load a file or an address, and wait until it has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled into view. It must be visible there."""
        x, y, hit = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect(); "
            "const x = b.x + b.width / 2, y = b.y + b.height / 2; "
            "return [x, y, e.contains(document.elementFromPoint(x, y))]; })()"
        )
        assert hit, f"{selector} is not where a click would meet it"
        return x, y

    def click(self, selector: str) -> None:
        x, y = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str, code: int, text: str = "") -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, windowsVirtualKeyCode=code, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window and the colours that its user prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """A PNG of what is in the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    @property
    def problems(self) -> list[str]:
        found = []
        for event in self.events:
            method, of = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(of["exceptionDetails"].get("exception", {}).get("description")))
            elif method == "Log.entryAdded" and of["entry"]["level"] == "error":
                found.append(of["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                own = ("file:", "data:", "blob:", *([self.server] if self.server else []))
                if not of["request"]["url"].startswith(own):
                    found.append(f"asked for {of['request']['url']}")
        return found


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in that folder."""
    path = chromium()
    assert path is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(to_read), str(from_write), path, *flags],
        pass_fds=(to_read, from_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    made = Browser(to_write, from_read)
    try:
        target = made.call("Target.createTarget", url="about:blank")["targetId"]
        made.session = made.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            made.call(f"{domain}.enable")
        yield made
    finally:
        process.terminate()
        process.wait(SECONDS)
        os.close(to_write)
        os.close(from_read)


in_chromium = pytest.mark.skipif(chromium() is None, reason="Chromium is not installed")


def luminance(colour: str) -> float:
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
