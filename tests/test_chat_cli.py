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
        command, input=text.encode(), capture_output=True, env=ENVIRONMENT, timeout=120
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


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
    (tmp_path / "file").touch()
    none, beside = f"{tmp_path}/none/x", f"{tmp_path}/file/x"
    expected = {
        "/dance": "there is no command /dance",
        "/save": "/save needs the name of a file",
        f"/load {bad}": "role",
        f"/load {none}": f"{none}: cannot be read: No such file or directory; name a file",
        f"/save {none}": f"{none}: cannot be written: No such file or directory; name a file",
        f"/save {beside}": f"{beside}: cannot be written: Not a directory; name a file",
        f"/save {tmp_path}": f"{tmp_path}: is a folder; name a file in it",
        "/save /": "/: is a folder; name a file in it",
        "/save ~nobody-at-all/x": "write the path without ~",
        f"/save {'x' * 300}": "cannot be written: File name too long",
        "/load a\0b": "the file of /load must be the path",
        "x " * 600: "context",
    }
    code, shown, errors = chat("\n".join([*expected, "Hello"]), *SHORT)
    assert (code, shown) == (1, talk(llm, "Hello")[0])
    found = errors.splitlines()
    assert all(line.startswith("minflash: error: ") for line in found)
    for line, words in zip(found, expected.values(), strict=True):
        assert words in line and ".tmp" not in line and "/reset" not in line


def test_a_full_context_tells_of_reset(llm: minflash.LLM) -> None:
    code, shown, errors = chat("Hello\n" + "x " * 600 + "\n/reset\nHello\n", *SHORT)
    assert (code, shown) == (1, talk(llm, "Hello")[0] * 2)
    assert "context" in errors and errors.endswith("; /reset forgets the conversation\n")


def test_a_reader_that_leaves_ends_the_chat_silently() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "minflash", "chat", "-m", str(TINY), *SHORT]
    try:
        done = subprocess.run(
            command, input=b"Hello\n" * 3, stdout=write, stderr=subprocess.PIPE, env=ENVIRONMENT,
            timeout=120,
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


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


# An answer that goes on until it is stopped, and says an escape code at the start. It waits after
# <3> for the interrupt, so that no clock decides how far it gets.
SLOW_ANSWERS = """
import dataclasses, fcntl, signal, sys, termios, time
# A shell starts what it puts into the background with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # a terminal of its own: Ctrl-C typed there is a signal here
import minflash.llm
from minflash.cli import main

real, cancel, cancelled = minflash.llm.LLM.stream, minflash.llm.LLM.cancel, []

def stream(*arguments, **options):
    cancelled.clear()
    for n, chunk in enumerate(real(*arguments, **options | {"ignore_eos": True})):
        yield dataclasses.replace(chunk, text=f"<{n}>" if n else "\\x1b[2J<begin>")
        if n == 3:
            while not cancelled:  # no Event: its lock would wait for this thread itself
                time.sleep(0.005)

def cancel_and_say(llm):
    cancel(llm)
    cancelled.append(True)

minflash.llm.LLM.stream, minflash.llm.LLM.cancel = stream, cancel_and_say
sys.exit(main(sys.argv[1:]))
"""


class Person:
    """Types into a terminal and reads what is there."""

    def __init__(self) -> None:
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW_ANSWERS, "chat", "-m", str(TINY)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def reads(self, text: str, seconds: float = 60) -> str:
        """Waits for ``text``; returns what came up to it."""
        assert self._sees(text, seconds), f"{text!r} is not in {self.seen!r}"
        before, found, self.seen = self.seen.partition(text)
        return before + found

    def gives_up_the_line(self) -> None:
        """Ctrl-C at the prompt, until there is a new one.

        readline must wait for keys by then: CPython (Modules/readline.c) asks for signals only when
        one ends that wait, and an interrupt just before it shows with the next key or interrupt.
        """
        end = time.monotonic() + 60
        while not self._is_asleep():
            assert time.monotonic() < end, "it never waits for keys"
            time.sleep(0.005)
        self.type("\x03")
        while not self._sees("> ", 10):
            assert time.monotonic() < end, f"no new prompt in {self.seen!r}"
            self.type("\x03")
        self.reads("> ")

    def _sees(self, text: str, seconds: float) -> bool:
        """Reads until ``text`` has come, or the time is over, or the program has ended."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            if time.monotonic() > end:
                return False
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.seen += self._decoder.decode(os.read(self._ours, 4096))
                except OSError:  # the other end is closed
                    return text in self.seen
        return True

    def _is_asleep(self) -> bool:
        """As Linux tells it of the main thread; a sandbox may say so always."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "S"

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
        person.gives_up_the_line()
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
        assert person.process.wait(60) == 0
    finally:
        person.close()
    messages = json.loads(saved.read_text())["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "two\nlines"
    for answer in (messages[1]["content"], messages[3]["content"]):
        assert "<2>" in answer and "<6>" not in answer  # <3>, and at most two steps more


def test_the_second_interrupt_is_the_usual_one() -> None:
    calls: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stoppable(lambda: calls.append(1), True):
        signal.raise_signal(signal.SIGINT)
        assert calls == [1]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
