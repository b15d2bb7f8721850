"""The machine's Chromium, driven through its DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import websocket


class Page:
    """One tab."""

    def __init__(self, connection: websocket.WebSocket) -> None:
        self._connection = connection
        self._ids = itertools.count(1)
        self.complaints: list[str] = []
        """What scripts threw and what the browser refused to do."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description", details["text"]))
            elif (
                message.get("method") == "Log.entryAdded"
                and message["params"]["entry"]["source"] == "security"
            ):
                self.complaints.append(message["params"]["entry"]["text"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && typeof $ === 'function'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']['exception'].get('description')}")
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 120.0) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self._true(condition):
            assert time.monotonic() < end, f"never true: {condition}\n{self.text('body')}\n{self.complaints}"
            time.sleep(0.05)

    def _true(self, condition: str) -> bool:
        try:
            return bool(self.evaluate(condition))
        except RuntimeError:  # between two pages
            return False

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def click(self, selector: str) -> None:
        """A real click, which misses what is hidden or covered."""
        place = self.evaluate(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.scrollIntoView({{block: "
            "'nearest'}); const box = node.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        code = {"Enter": 13, "Escape": 27}[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call(
            "Input.dispatchKeyEvent", type="keyDown", **common, **({"text": "\r"} if key == "Enter" else {})
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def shape(self, width: int, height: int, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A fresh browser with one empty tab; the test is skipped where there is none."""
    ours = Path(sys.executable).parent  # where make test puts it on a machine that has none
    path = os.pathsep.join([str(ours), os.environ.get("PATH", os.defpath)])
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if program is None:
        pytest.skip("no browser on this machine")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--remote-debugging-port=0",
        ]
        command = [program, *options, f"--user-data-dir={profile}", "--remote-allow-origins=*", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            connection = _connect(Path(profile) / "DevToolsActivePort", process)
            yield Page(connection)
            connection.close()
        finally:
            process.terminate()
            process.wait(30)


def _connect(port_file: Path, process: subprocess.Popen[bytes]) -> websocket.WebSocket:
    """To the first tab, once the browser has written where it listens."""
    import urllib.request

    end = time.monotonic() + 60
    while not (port_file.exists() and port_file.read_text().strip()):
        assert process.poll() is None, "the browser ended at once"
        assert time.monotonic() < end, "the browser does not listen"
        time.sleep(0.05)
    port = port_file.read_text().split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
        tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
    return websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=300)
