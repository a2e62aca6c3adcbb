"""A headless Chromium, driven by the W3C WebDriver protocol over plain HTTP."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of element ids in the W3C protocol
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=900,700"),
)


def missing() -> str | None:
    """Why there is no browser to test with, or None."""
    names = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"not installed: {', '.join(names)}" if names else None


class Browser:
    """One page."""

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        arguments = [*OPTIONS, f"--user-data-dir={profile}"]
        chrome = {"binary": shutil.which("chromium"), "args": arguments}
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        session = self._call("POST", "/session", capabilities={"alwaysMatch": wanted})
        self._session = f"/session/{session['sessionId']}"

    def open(self, url: str) -> None:
        self._call("POST", f"{self._session}/url", url=url)

    def run(self, script: str) -> Any:
        """The value that a script returns."""
        return self._call("POST", f"{self._session}/execute/sync", script=script, args=[])

    def type(self, selector: str, text: str) -> None:
        found = self._call("POST", f"{self._session}/element", using="css selector", value=selector)
        self._call("POST", f"{self._session}/element/{found[ELEMENT]}/value", text=text)

    def press(self, key: str) -> None:
        """A key, wherever the focus is."""
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keyboard", "actions": keys}]
        self._call("POST", f"{self._session}/actions", actions=actions)

    def log(self) -> list[str]:
        """What the console has shown, errors of the content policy among it."""
        entries = self._call("POST", f"{self._session}/se/log", type="browser")
        return [entry["message"] for entry in entries]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def close(self) -> None:
        self._call("DELETE", self._session)

    def _call(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self._address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())["value"]


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in the folder ``profile``."""
    command = ["chromedriver", "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    try:
        lines = (line.decode() for line in process.stdout)
        port = next(found[1] for line in lines if (found := re.search(r"on port (\d+)\.", line)))
        page = Browser(f"http://127.0.0.1:{port}", profile)
        try:
            yield page
        finally:
            page.close()
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
