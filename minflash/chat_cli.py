"""``minflash chat``: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from .arguments import as_path
from .errors import ArgumentError, ContextError, MinflashError, TokenizerError
from .generation_cli import add_model_arguments, add_sampling_arguments, generation_options

if TYPE_CHECKING:
    from .chunk import Stats
    from .llm import LLM

HELP = """\
/help           this text
/reset          forget the conversation; the system message stays
/system [TEXT]  set the system message, or remove it
/save FILE      write the conversation as JSON
/load FILE      take up a saved conversation
/quit           leave; so does Ctrl-D

A message may have several lines: end a line with \\ to go on, or put the message between lines that
begin and end with three quotes ("\"\"). A message that begins with // loses one of them.
Ctrl-C stops the answer.
"""
EPILOG = """examples:
  minflash chat
  minflash chat -m ./my-model --system "You are brief." --temperature 0.7
  printf 'Name a river.\\nAnd a lake.\\n' | minflash chat

commands inside:
""" + "".join(f"  {line}\n" if line else "\n" for line in HELP.splitlines())
QUOTES = '"""'
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line ends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``chat`` to ``parser``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_model_arguments(parser)
    add_sampling_arguments(parser, max_tokens="what the context leaves")


def run(args: argparse.Namespace) -> int:
    """Talks until the input ends; returns the exit code (1 when a line of a pipe failed)."""
    from .loading import load

    options = generation_options(args)
    with load(args.model, device=args.device, max_context=args.max_context) as llm:
        if not llm.has_chat_template:
            raise TokenizerError(
                f"{args.model or 'the model'} has no chat template, so that it cannot chat; "
                "minflash run --raw completes a text"
            )
        terminal = Terminal()
        session = Session(llm, options, terminal, args.system)
        terminal.tell(f"{_name(llm)} on {llm.device}; /help tells what you can do, Ctrl-D leaves")
        return session.run()


class Terminal:
    """Reads messages. On a pipe there are no prompts, and every line is a message."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        for stream in (sys.stdout, sys.stderr):
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="replace")  # a terminal that cannot show a character
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() its history and editing)

    def message(self) -> str:
        """The next message, which may have several lines. Raises EOFError at the end."""
        line = self._line("> ")
        if line.lstrip().startswith(QUOTES):
            return self._block(line.lstrip().removeprefix(QUOTES))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line("... ", end=""))
        return "\n".join(lines).strip()

    def write(self, text: str) -> None:
        """A piece of an answer. What a model says must not command a terminal (escape codes)."""
        sys.stdout.write(_CONTROL.sub("\ufffd", text) if self.interactive else text)
        sys.stdout.flush()

    def tell(self, text: str) -> None:
        """A remark, for people only."""
        if self.interactive:
            print(f"[{text}]", file=sys.stderr, flush=True)

    def _block(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self._line("... ", end=QUOTES))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str, end: str | None = None) -> str:
        """A line without its end. ``end``: what the end of a pipe counts as inside a message."""
        try:
            if self.interactive:
                return input(prompt)
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ArgumentError(f"the input must be UTF-8 text: {error}") from error
        if not line and end is not None:
            return end
        if not line:
            raise EOFError
        return line.removesuffix("\n")


class Session:
    """A conversation with one model."""

    def __init__(self, llm: LLM, options: Any, terminal: Terminal, system: str | None) -> None:
        self.llm, self.options, self.terminal = llm, options, terminal
        self.system = system
        self.messages: list[dict[str, str]] = []  # without the system message
        self.failed = self._stopped = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._set_system,
            "/save": self._save,
            "/load": self._load,
        }

    def run(self) -> int:
        """Message after message. Returns the exit code."""
        while True:
            try:
                text = self.terminal.message()
            except EOFError:
                if self.terminal.interactive:
                    print()
                break
            except KeyboardInterrupt:  # at the prompt: only the line is given up
                if not self.terminal.interactive:
                    raise
                print()
                continue
            if text.partition(" ")[0] in ("/quit", "/exit"):
                break
            try:
                self._take(text)
            except KeyboardInterrupt:  # the second one during an answer
                if not self.terminal.interactive:
                    raise
                print()
            except BrokenPipeError:  # whoever read the answers has left: main ends silently
                raise
            except (MinflashError, OSError) as error:
                self.failed = True
                print(f"minflash: error: {error}", file=sys.stderr, flush=True)
        return int(self.failed and not self.terminal.interactive)

    def _take(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if text.startswith("//"):
            self._answer(text[1:])
        elif word in self._commands:
            self._commands[word](rest.strip())
        elif text.startswith("/"):
            raise ArgumentError(f"there is no command {word}; /help lists them, // begins a text")
        elif text:
            self._answer(text)

    def _answer(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            with stoppable(self._stop, self.terminal.interactive):
                answer = self._print_answer()
        except ContextError as error:
            if len(self.messages) == 1:
                raise
            raise ContextError(f"{error}; /reset forgets the conversation") from error
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:  # an error, or stopped before the first word: as if it had not been asked
                self.messages.pop()

    def _stop(self) -> None:
        self._stopped = True
        self.llm.cancel()

    def _print_answer(self) -> str:
        pieces, last, self._stopped = [], None, False
        options = dict(self.options)
        if options.get("max_tokens") is None:
            prompt = self.llm.apply_chat_template(self._conversation())
            options["max_tokens"] = max(1, self.llm.max_context - len(prompt))
        with contextlib.closing(self.llm.stream(self._conversation(), **options)) as chunks:
            for last in chunks:
                pieces.append(last.text)
                self.terminal.write(last.text)
                if self._stopped:  # perhaps before there was anything to cancel
                    self.llm.cancel()
        print(flush=True)
        if last is not None and last.stats is not None:
            self.terminal.tell(_summary(last.stats, last.finish_reason))
        return "".join(pieces)

    def _conversation(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]

    def _help(self, rest: str) -> None:
        print(HELP, end="", flush=True)

    def _reset(self, rest: str) -> None:
        self.messages = []
        self.terminal.tell("a new conversation")

    def _set_system(self, rest: str) -> None:
        self.system = rest or None
        self.terminal.tell("system message set" if rest else "no system message")

    def _save(self, rest: str) -> None:
        path = _path(rest, "/save")
        text = json.dumps({"messages": self._conversation()}, ensure_ascii=False, indent=1)
        # Beside it first: an interrupt must not leave half a file in place of an older one.
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            partial.write_text(text + "\n", encoding="utf-8", errors="replace")
            partial.replace(path)
        except OSError as error:
            raise MinflashError(
                f"{path}: cannot be written: {error.strerror}; name a file in a folder that is "
                "there and can be written, as in /save talk.json"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self.terminal.tell(f"{len(self.messages)} messages in {path}")

    def _load(self, rest: str) -> None:
        path = _path(rest, "/load")
        messages = _read_messages(path)
        self.system = (
            messages.pop(0)["content"] if messages[:1] and _is_system(messages[0]) else None
        )
        self.messages = messages
        self.terminal.tell(f"{len(self.messages)} messages from {path}")


@contextlib.contextmanager
def stoppable(stop: Callable[[], None], wanted: bool) -> Iterator[None]:
    """Inside, the first Ctrl-C calls ``stop``, and a second one is the usual KeyboardInterrupt."""
    if not wanted:
        yield
        return

    def interrupted(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _read_messages(path: Path) -> list[dict[str, str]]:
    """The messages of a saved conversation; raises ArgumentError when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MinflashError(
            f"{path}: cannot be read: {error.strerror}; name a file that /save has written"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{path}: not a saved conversation: {error}") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ArgumentError(
            f'{path}: not a saved conversation: {{"messages": [{{"role": ..., "content": ...}}]}} '
            "is needed, all of it text"
        )
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )


def _is_system(message: dict[str, str]) -> bool:
    return message["role"] == "system"


def _path(rest: str, command: str) -> Path:
    if not rest:
        raise ArgumentError(f"{command} needs the name of a file, as in {command} talk.json")
    path = as_path(f"the file of {command}", rest)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        raise ArgumentError(f"{path}: is a folder; name a file in it")
    return path


def _name(llm: LLM) -> str:
    return llm.path.resolve().name if llm.path else "the model"


def _summary(stats: Stats, reason: str | None) -> str:
    ends = {"length": "; stopped at the limit", "cancelled": "; stopped"}
    return (
        f"{stats.prompt_tokens} + {stats.generation_tokens} tokens, first after "
        f"{stats.time_to_first_token:.2f} s, then {stats.generation_tps:.1f} tokens/s"
        f"{ends.get(reason or '', '')}"
    )
