"""``minflash chat`` as a program: lines from a pipe, and a person at a terminal (a pty)."""

from __future__ import annotations

import codecs
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minflash
from minflash.chat_cli import stoppable
from minflash.resources import resource_dir

TINY = resource_dir("weights") / "tiny"
ENVIRONMENT = {**os.environ, "MINFLASH_DEVICE": "cpu", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
SHORT = ("--max-tokens", "6")


def chat(text: str, *arguments: str, model: Path = TINY) -> Any:
    """Runs a piped chat."""
    command = [sys.executable, "-m", "minflash", "chat", "-m", str(model), *arguments]
    done = subprocess.run(
        command, input=text.encode(), capture_output=True, env=ENVIRONMENT, timeout=60
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def llm() -> Iterator[minflash.LLM]:
    with minflash.load(TINY, device="cpu") as llm:
        yield llm


def talk(llm: minflash.LLM, *texts: str, system: str | None = None) -> tuple[str, list[Any]]:
    """What a chat prints, and its messages."""
    messages: list[Any] = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        answers.append(llm.chat(messages, max_tokens=6))
        messages.append({"role": "assistant", "content": answers[-1]})
    return "".join(f"{answer}\n" for answer in answers), messages


def test_a_pipe_has_no_prompts(llm: minflash.LLM) -> None:
    lines = 'Hello\n\nline one\\\nline two\n"""\nblock\n\nof lines\n"""\n//slash'
    texts = ("Hello", "line one\nline two", "block\n\nof lines", "/slash")
    expected, _ = talk(llm, *texts, system="Be brief.")
    assert chat(lines, *SHORT, "--system", "Be brief.") == (0, expected, "")
    assert chat('"""unfinished\nblock', *SHORT) == (0, talk(llm, "unfinished\nblock")[0], "")
    assert chat("") == (0, "", "")


def test_save_load_reset_system(llm: minflash.LLM, tmp_path: Path) -> None:
    saved, again = tmp_path / "saved.json", tmp_path / "again.json"
    code, _, errors = chat(f"/system Be kind.\nHello\n/save {saved}\n/quit\nignored\n", *SHORT)
    assert (code, errors) == (0, "")
    expected, messages = talk(llm, "Hello", system="Be kind.")
    assert json.loads(saved.read_text()) == {"messages": messages}
    assert [path.name for path in tmp_path.iterdir()] == ["saved.json"]
    code, shown, errors = chat(f"/load {saved}\nMore\n/save {again}\n/reset\nHello\n", *SHORT)
    both, messages = talk(llm, "Hello", "More", system="Be kind.")
    assert (code, shown, errors) == (0, both.removeprefix(expected) + expected, "")
    assert json.loads(again.read_text()) == {"messages": messages}
    assert chat(f"/load {saved}\n/system\n/reset\nHello\n", *SHORT)[1] == talk(llm, "Hello")[0]


def test_errors_are_lines_and_the_chat_goes_on(llm: minflash.LLM, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"messages": [{"role": "user"}]}')
    lines = ["/dance", "/save", f"/load {bad}", f"/load {tmp_path}/none", "x " * 600, "Hello"]
    code, shown, errors = chat("\n".join(lines), *SHORT)
    assert (code, shown) == (1, talk(llm, "Hello")[0])
    found = errors.splitlines()
    assert len(found) == 5 and all(line.startswith("minflash: error: ") for line in found)
    for line, word in zip(found, ("/dance", "file", "role", "none", "context"), strict=True):
        assert word in line


def test_wrong_usage(tmp_path: Path) -> None:
    code, shown, errors = chat("Hello\n", "--temperature", "-1")
    assert (code, shown) == (2, "") and "temperature" in errors and errors.count("\n") == 1
    plain = tmp_path / "plain"
    shutil.copytree(TINY, plain)
    (plain / "chat_template.jinja").unlink()
    code, shown, errors = chat("Hello\n", model=plain)
    assert (code, shown) == (1, "") and "template" in errors and errors.count("\n") == 1


def test_help_tells_the_commands() -> None:
    code, shown, _ = chat("/help\n")
    assert code == 0
    for word in ("/reset", "/system", "/save", "/load", "/quit", "Ctrl-C", "Ctrl-D"):
        assert word in shown


class Person:
    """Types into a terminal and reads what is there."""

    def __init__(self) -> None:
        # Slow enough to be interrupted, and saying an escape code at the start.
        code = (
            "import sys, time, dataclasses, minflash.llm as m\n"
            "real = m.LLM.stream\n"
            "def slow(*a, **k):\n"
            "    for n, chunk in enumerate(real(*a, **{**k, 'ignore_eos': True})):\n"
            "        text = '\\x1b[2J<begin>' if n == 0 else f'<{n}>'\n"
            "        yield dataclasses.replace(chunk, text=text)\n"
            "        time.sleep(0.03)\n"
            "m.LLM.stream = slow\n"
            "from minflash.cli import main\n"
            f"sys.exit(main(['chat', '-m', {str(TINY)!r}]))\n"
        )
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ours, theirs = pty.openpty()
        # A terminal of its own, so that Ctrl-C typed here is a signal there.
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{code}",
            ],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def reads(self, text: str, seconds: float = 20) -> str:
        """Waits for ``text``; returns what came up to it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} is not in {self.seen!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.seen += self._decoder.decode(os.read(self._ours, 4096))
                except OSError:  # the other end is closed
                    break
        before, found, self.seen = self.seen.partition(text)
        assert found, before
        return before + found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_a_person_at_a_terminal(tmp_path: Path) -> None:
    person, saved = Person(), tmp_path / "chat.json"
    try:
        assert "tiny on cpu" in person.reads("> ")
        person.type("Hello\n")
        shown = person.reads("<3>")
        assert "\x1b" not in shown and "<begin>" in shown
        person.type("\x03")
        assert "stopped" in person.reads("> ")  # the answer ends, the program does not
        person.type("half a line")
        person.reads("half a line")
        time.sleep(0.3)  # readline waits for keys again; before, CPython sees no interrupt
        person.type("\x03")
        person.reads("> ")
        person.type("two\\\n")
        person.reads("... ")
        person.type("lines\n")
        person.reads("<3>")
        person.type("\x03")
        person.reads("> ")
        person.type(f"/save {saved}\n")
        person.reads("4 messages")
        person.reads("> ")
        person.type("\x04")
        assert person.process.wait(20) == 0
    finally:
        person.close()
    messages = json.loads(saved.read_text())["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "two\nlines" and "<2>" in messages[1]["content"]
    assert "<200>" not in messages[1]["content"]


def test_the_second_interrupt_is_the_usual_one() -> None:
    calls: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stoppable(lambda: calls.append(1), True):
        signal.raise_signal(signal.SIGINT)
        assert calls == [1]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
