"""The programs of examples/ run, and stay short."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_model import write_source

import minflash

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


PACKAGE = str(Path(minflash.__file__).parent.parent)  # for programs that run elsewhere
PATHS = os.pathsep.join(filter(None, [PACKAGE, os.environ.get("PYTHONPATH")]))


@pytest.fixture
def environment(converted: Path) -> dict[str, str]:
    chosen = {"MINFLASH_MODEL": str(converted), "MINFLASH_DEVICE": "cpu", "PYTHONPATH": PATHS}
    return {**os.environ, **chosen}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_fewer_than_80_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80


def test_the_assistant_answers_until_the_end_of_input(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "assistant.py")],
        input="Hello\n\nAnd then?\n" + "a" * 200 + "\n",
        capture_output=True, text=True, env=environment, timeout=120, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") >= 5
    assert "starting anew: the prompt has" in done.stderr  # the small model holds 128 tokens


def test_the_web_service_streams_and_refuses(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        from starlette.testclient import TestClient
    except (ImportError, RuntimeError) as error:  # RuntimeError: its HTTP library is missing
        pytest.skip(f"starlette's test client cannot be used: {error}")

    monkeypatch.setenv("MINFLASH_MODEL", str(converted))
    monkeypatch.setenv("MINFLASH_DEVICE", "cpu")
    app = runpy.run_path(str(EXAMPLES / "web_service.py"))["app"]
    with TestClient(app) as client:
        assert client.get("/health").json() == {"device": "cpu", "max_context": 128}
        body = {"prompt": "Hello", "max_tokens": 8, "temperature": 0}
        answer = client.post("/complete", json=body)
        assert answer.status_code == 200
        with minflash.load(converted, device="cpu") as llm:
            assert answer.text == llm.generate("Hello", max_tokens=8, temperature=0)
        for wrong in ({}, {"prompt": ""}, {"prompt": "x" * 500}, {"prompt": "x", "top_p": 7}):
            refused = client.post("/complete", json=wrong)
            assert refused.status_code == 400 and refused.json()["error"]
        assert client.post("/complete", content=b"{").status_code == 400


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A display: the one that is there, else Xvfb's."""
    pytest.importorskip("tkinter", reason="tkinter is not installed")
    if os.environ.get("DISPLAY"):
        yield
        return
    if shutil.which("Xvfb") is None:
        pytest.skip("there is no display and no Xvfb")
    number = f":{90 + os.getpid() % 900}"
    server = subprocess.Popen(["Xvfb", number, "-screen", "0", "800x600x24"])
    socket = Path(f"/tmp/.X11-unix/X{number[1:]}")
    until = time.monotonic() + 20
    while not socket.exists() and time.monotonic() < until:
        time.sleep(0.05)
    monkeypatch.setenv("DISPLAY", number)
    yield
    server.terminate()
    server.wait()


def test_the_window_shows_an_answer(display: None, converted: Path) -> None:
    import tkinter

    window_class = runpy.run_path(str(EXAMPLES / "window.py"))["Window"]
    with minflash.load(converted, device="cpu") as llm:
        root = tkinter.Tk()
        window = window_class(root, llm)
        window.entry.insert(0, "Hello")
        window.ask()
        assert window.button["state"] == "normal"
        until = time.monotonic() + 60
        while window.button["state"] == "normal" and time.monotonic() < until:
            root.update()
        assert window.button["state"] == "disabled"
        text = window.text.get("1.0", "end")
        root.destroy()
    assert text.startswith("> Hello\n") and len(text) > 15


@pytest.mark.gpu
def test_own_work_on_another_stream(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama_head_dim_96")
    longer = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (source / "config.json").write_text(json.dumps(longer))
    model = minflash.convert(source, tmp_path / "model", progress=False)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_stream.py"), str(model)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": PATHS},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "same text" in done.stdout
