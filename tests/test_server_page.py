"""The chat page: in a real browser where there is one."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from browser import browser, missing
from web_server import TINY, PacedLLM, running, until

import minflash
from minflash.chunk import Chunk
from minflash.server import Settings
from minflash.server_page import load_page

EVIL = '<img src=x onerror="document.title=\'broken\'"><b>bold</b> & "quotes"\n\n'
ENTER, ESCAPE = "\ue007", "\ue00c"


class Says(PacedLLM):
    """A model that says one thing, first what a page must not take for HTML."""

    def _start(self, prompt: Any, tools: Any, options: Any, cancelled: Any) -> Any:
        return self._says(super()._start(prompt, tools, {**options, "ignore_eos": True}, cancelled))

    def _says(self, chunks: Generator[Chunk, None, None]) -> Generator[Chunk, None, None]:
        for number, chunk in enumerate(chunks):
            yield dataclasses.replace(chunk, text=EVIL if number == 0 else f"word{number} ")


def test_page_loads_nothing_from_elsewhere() -> None:
    text, policy = load_page()
    assert not re.search(r"https?:|//\w|innerHTML|outerHTML|document\.write|eval\(", text)
    assert "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.skipif(missing() is not None, reason=f"Chromium: {missing()}")
def test_page_in_a_browser(tmp_path: Path) -> None:
    with minflash.load(TINY, device="cpu") as llm:
        paced = Says(llm)
        paced.delay = 0.02
        with running(paced, Settings(api_key="sesame")) as server, browser(tmp_path) as page:
            page.open(server.url)
            until(lambda: page.run("return document.getElementById('settings').open"))  # asks
            page.type("#key", f"sesame{ENTER}")
            until(lambda: page.run("return document.getElementById('model').textContent") == "tiny")
            page.press(ESCAPE)
            page.type("#input", f"Tell me <i>more</i>.{ENTER}")
            until(lambda: "word30" in page.run("return document.body.innerText"))
            assert page.run("return document.getElementById('send').hidden") is True
            assert "tokens/s" in page.run("return document.getElementById('speed').textContent")
            page.press(ESCAPE)  # stops
            until(lambda: page.run("return document.getElementById('stop').hidden"))
            until(lambda: not server.service.queue.running)
            produced = paced.produced
            assert produced < 300
            texts = page.run(
                "return [...document.querySelectorAll('article')].map(a => a.textContent)"
            )
            assert texts[0] == "Tell me <i>more</i>." and texts[1].startswith(EVIL + "word1 ")
            assert page.run("return document.querySelectorAll('article *').length") == 0
            assert page.run("return document.title") == "minflash"
            assert page.run("return document.activeElement.id") == "input"
            page.type("#input", f"And now?{ENTER}")
            until(lambda: paced.produced > produced + 5)
            page.run("document.getElementById('stop').click()")
            until(lambda: not server.service.queue.running)
            if "MINFLASH_SCREENSHOT" in os.environ:
                page.screenshot(Path(os.environ["MINFLASH_SCREENSHOT"]))
            assert [line for line in page.log() if "401" not in line] == []
