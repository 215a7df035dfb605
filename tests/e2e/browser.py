"""A real headless browser, driven over its debugging pipe: real clicks and keys, screenshots, the console's errors."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"]
FLAGS += ["--disable-dev-shm-usage"]  # which is small in a container
PATIENCE_SECONDS = 300  # on a busy machine a browser takes long to start, too
KEYS = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Escape": 27}
KEYS |= {"Delete": 46, "PageDown": 34, "PageUp": 33, "Tab": 9, "Enter": 13}


class Browser:
    """One browser with one page. A command that is not answered in time raises TimeoutError."""

    def __init__(self, profile: Path, width: int = 1360, height: int = 900, dark: bool = False) -> None:
        assert BROWSER is not None
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        # The pipe has to lie on descriptors 3 and 4.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', BROWSER, *FLAGS]
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Performance"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.prefer("dark" if dark else "light")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(PATIENCE_SECONDS)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _next(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise TimeoutError("the browser has gone")
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        """Keeps uncaught exceptions, console errors and what the browser itself logs as an error."""
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"].get("exception", {}).get("description", str(params)))
        elif (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert")) or (
            method == "Log.entryAdded" and params["entry"]["level"] == "error"
        ):
            self.complaints.append(json.dumps(params))

    def prefer(self, scheme: str) -> None:
        """Light or dark."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, page: Path, fragment: str = "", ready: str = "document.documentElement?.dataset.ready") -> None:
        """Loads a file and waits until `ready` is true in it."""
        self.send("Page.navigate", url=page.resolve().as_uri() + fragment)
        self.wait(f"location.protocol === 'file:' && ({ready})")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression (JSON types); promises are waited for."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", expression))
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(condition)
            time.sleep(0.03)

    def center(self, selector: str) -> tuple[float, float]:
        """Scrolls an element into view; its middle in the window."""
        place = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); "
            "node.scrollIntoView({block: 'center', behavior: 'instant'}); const box = node.getBoundingClientRect(); "
            "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        self.settle()
        return place[0], place[1]

    def settle(self) -> None:
        """Two frames, so that what was waiting to be drawn is drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")

    def mouse(self, kind: str, x: float, y: float, clicks: int = 1) -> None:
        button = "none" if kind == "mouseMoved" else "left"
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=clicks)

    def click(self, selector: str) -> None:
        x, y = self.center(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)
        self.settle()

    def drag(self, selector: str, start: float, end: float) -> None:
        """Across an element, from one share of its width to another."""
        x, y = self.center(selector)
        wide = self.run(f"document.querySelector({json.dumps(selector)}).clientWidth")
        at = [x + (share - 0.5) * wide for share in (start, (start + end) / 2, end)]
        self.send("Input.dispatchMouseEvent", type="mousePressed", x=at[0], y=y, button="left", clickCount=1)
        for place in at[1:]:
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=place, y=y, button="left", buttons=1)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", x=at[2], y=y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str) -> None:
        """A key, as a person presses it, to what has the focus."""
        text = {} if key in KEYS else {"text": key}
        code = KEYS.get(key, ord(key[0]))
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)
            text = {}
        self.settle()

    def type(self, selector: str, text: str) -> None:
        """Replaces what a field holds."""
        self.run(f"(() => {{ const n = document.querySelector({json.dumps(selector)}); n.focus(); n.select?.(); }})()")
        if text:
            self.send("Input.insertText", text=text)
        else:
            self.press("Delete")
        self.settle()

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Of the window, or of the whole page."""
        if whole:
            height = self.run("document.documentElement.scrollHeight")
            width = self.run("innerWidth")
            self.send(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
            time.sleep(0.4)
            self.settle()
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
