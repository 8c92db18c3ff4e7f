"""A headless Chromium that opens a page of ours: what it draws, logs and asks the network for.

It is driven over a pipe by the DevTools protocol (`--remote-debugging-pipe`), so that no package is
needed but the browser.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

REQUIRED = "REQUIRE_CHROMIUM"
"""With this set, as in CI, a missing browser is a failure."""


def find_chromium() -> str:
    """The program; the test is skipped, or fails, if there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return path
    message = "no Chromium here: apt-get install chromium"
    if os.environ.get(REQUIRED):
        pytest.fail(message)
    pytest.skip(message)


class Page:
    """One page; leaving the `with` block ends the browser.

    Args:
        path: the file to open.
        width, height: of the window, in CSS pixels.
        dark: whether the user prefers a dark page.
        javascript: whether the page's own scripts run.
        print_media: whether it looks as on paper.
    """

    def __init__(
        self,
        path: Path,
        width: int = 1200,
        height: int = 900,
        dark: bool = False,
        javascript: bool = True,
        print_media: bool = False,
    ) -> None:
        self.problems: list[str] = []
        """Errors and warnings of the console, and exceptions."""
        self.requests: list[str] = []
        """URLs that the page asked for, itself aside."""
        self._profile = TemporaryDirectory(
            prefix="torchtitan-chromium-", ignore_cleanup_errors=True
        )
        self._start()
        self._number = 0
        target = self._call("Target.createTarget", session=False, url="about:blank")
        attached = self._call("Target.attachToTarget", session=False, flatten=True, **target)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        media = "print" if print_media else "screen"
        self._call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._call("Emulation.setScriptExecutionDisabled", value=not javascript)
        self._url = path.resolve().as_uri()
        self._call("Page.navigate", url=self._url)
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def _start(self) -> None:
        words = [find_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu"]
        words += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        words += ["--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb"]
        read_commands, write_commands = os.pipe()
        read_answers, write_answers = os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (read_commands, write_answers)]

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [*words, "about:blank"],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for fd in (read_commands, write_answers, *ends):
            os.close(fd)
        self._to = os.fdopen(write_commands, "wb", buffering=0)
        self._from = os.fdopen(read_answers, "rb", buffering=0)
        self._unread = b""

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript (also where the page's scripts do not run)."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def move_mouse(self, x: float, y: float) -> None:
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, whole: bool = False) -> bytes:
        """A PNG of what the window shows, or of the whole page."""
        answer = self._call(
            "Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole)
        )
        return base64.b64decode(answer["data"])

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        return {
            "clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        }

    def pdf(self) -> bytes:
        """As it is printed."""
        return base64.b64decode(self._call("Page.printToPDF")["data"])

    def _call(self, method: str, session: bool = True, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        """The next answer or event; problems and requests are noted."""
        while b"\0" not in self._unread:
            chunk = self._from.read(1 << 20)
            assert chunk, "the browser has ended"
            self._unread += chunk
        text, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(text)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning"):
                self.problems.append(str(parameters["args"]))
            case "Log.entryAdded":
                self.problems.append(str(parameters["entry"]))
            case "Network.requestWillBeSent" if parameters["request"]["url"] != self._url:
                self.requests.append(parameters["request"]["url"])
        return message

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._to.close()
        self._from.close()
        self._profile.cleanup()
