"""Calls of functions, read from the text of an answer.

Models write them in the way that they were trained with. Three ways are known here:

- ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen, SmolLM; also several
- ``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`` to the end of the answer: Mistral
- ``{"name": ..., "parameters": {...}}``, the whole answer, or what follows ``<|python_tag|>``:
  Llama 3

Whatever does not name one of the functions that were offered, or is no JSON, stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from .chunk import NO_TOKEN, Chunk
from .stopping import Decoder

_OPENINGS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_CLOSING = "</tool_call>"
_MARK = re.compile("|".join(map(re.escape, _OPENINGS)))
_BEGINNINGS = [mark[:end] for mark in _OPENINGS for end in range(len(mark) - 1, 0, -1)]
_BEGUN_MARK = re.compile(rf"(?:{'|'.join(map(re.escape, _BEGINNINGS))})\Z")
# What stands between two calls, and between the parts of a list or an object known to be JSON.
_BETWEEN, _INSIDE = re.compile(r"[ \t\r\n;,]*"), re.compile(r"[ \t\r\n:,]*")


@dataclass(frozen=True)
class Call:
    """A function and its arguments, which are a JSON object as the model wrote it."""

    name: str
    arguments: str
    # Nine letters and digits: Mistral's templates take no other id back.
    id: str = field(default_factory=lambda: secrets.token_hex(5)[:9])


class CallReader:
    """Takes the calls out of one answer while it comes; text passes as soon as it is certain."""

    def __init__(
        self,
        names: Collection[str],
        special_text: Callable[[int], str],
        decoder: Decoder | None = None,
        *,
        bare: bool = True,
    ) -> None:
        """names: functions that may be called. special_text: of a special token, "" of others.
        decoder: makes text of tokens at once; needed where stop strings hold some of it back.
        bare: whether JSON without a mark may be a call.
        """
        self.found = 0  # calls
        self._names, self._special_text = names, special_text
        self._decoder, self._bare = decoder, bare
        self._made = self._given = 0  # characters: of the tokens so far, and of the chunks' texts
        self._marks: list[tuple[int, str]] = []  # special tokens, and the characters before them
        self._hidden: set[str] = set()  # marks that came as special tokens, which are no text
        self._held = ""  # may be a call, or the beginning of one
        self._begun = False  # something else than spaces has come before

    def read(self, chunk: Chunk) -> tuple[str, list[Call]]:
        """The text and the calls that a chunk of the answer makes certain."""
        self._held += self._marked(chunk)
        text, final = "", chunk.finish_reason is not None
        calls: list[Call] = []
        while self._held:
            text += self._take(self._begin())
            end = self._end(final)
            if end is None:
                break
            found = _calls(self._held[:end], self._names)
            block = self._take(end)
            text, calls = text + ("" if found else block), calls + found
        self.found += len(calls)
        return text, calls

    def _begin(self) -> int:
        """Where in ``_held`` a call begins, or may begin.

        Spaces before it belong to it: an answer that is nothing but a call has no text.
        """
        if self._bare and not self._begun and self._held.lstrip().startswith("{"):
            return 0
        found = _MARK.search(self._held) or _BEGUN_MARK.search(self._held)
        return len(self._held[: found.start() if found else None].rstrip())

    def _end(self, final: bool) -> int | None:
        """Where the call ends that may stand at the beginning of ``_held``; None: not yet here."""
        if self._held.lstrip().startswith(_OPENINGS[0]) and _CLOSING in self._held:
            return self._held.index(_CLOSING) + len(_CLOSING)
        return len(self._held) if final else None

    def _take(self, end: int) -> str:
        """Takes so many characters out of ``_held``; gives them as text."""
        text, self._held = self._held[:end], self._held[end:]
        self._begun = self._begun or bool(text)
        for mark in self._hidden:
            text = text.replace(mark, "")
        return text

    def _marked(self, chunk: Chunk) -> str:
        """The chunk's text and the marks that stand in it.

        A token's text may come later than the token, where it could be the beginning of a stop
        string; a mark waits until all text before it is there.
        """
        if self._decoder is not None and chunk.token != NO_TOKEN:
            self._made += len(self._decoder.push(chunk.token))
        if mark := self._mark(chunk):
            self._marks.append((max(self._made, self._given), mark))
        text, rest = "", chunk.text
        while self._marks and self._marks[0][0] <= self._given + len(rest):
            place, mark = self._marks.pop(0)
            before, rest = rest[: place - self._given], rest[place - self._given :]
            text, self._given = text + before + mark, place
        self._given += len(rest)
        return text + rest

    def _mark(self, chunk: Chunk) -> str:
        """The mark that came as a special token: a chunk's text leaves those out."""
        if chunk.text or chunk.token == NO_TOKEN:
            return ""
        mark = self._special_text(chunk.token)
        if mark not in (*_OPENINGS, _CLOSING):
            return ""
        self._hidden.add(mark)
        return mark


def _calls(block: str, names: Collection[str]) -> list[Call]:
    """The calls of a block with its marks; none unless all of it is calls of these functions."""
    body = block.strip().removesuffix(_CLOSING)
    mark = _MARK.match(body)
    try:
        calls = [_call(value, names) for value in _values(body[mark.end() if mark else 0 :])]
    except (ValueError, RecursionError):
        return []
    return [call for call in calls if call] if all(calls) else []


def _values(text: str) -> Iterator[str]:
    """The texts of the JSON values that follow each other, those of lists one by one."""
    for value in _parts(text):
        if value.startswith("["):
            yield from _parts(value, 1, "]")
        else:
            yield value


def _parts(text: str, place: int = 0, closing: str = "") -> Iterator[str]:
    """The texts of the JSON values from ``place`` on, up to ``closing`` or the end."""
    between = _INSIDE if closing else _BETWEEN
    while (place := _end_of(between, text, place)) < len(text) and text[place] != closing:
        _, end = _JSON.raw_decode(text, place)
        yield text[place:end]
        place = end


def _end_of(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    return found.end() if found else place


def _call(text: str, names: Collection[str]) -> Call | None:
    """Raises ValueError for arguments that are not JSON."""
    members = _members(text)
    name = json.loads(members.get("name", "null"))
    if not isinstance(name, str) or name not in names:
        return None
    arguments = members.get("arguments", members.get("parameters", ""))
    if arguments.startswith('"'):  # JSON in JSON, as some models write it
        arguments = json.loads(arguments).strip()
        _JSON.decode(arguments)
    return Call(name, arguments) if arguments.startswith("{") else None


def _members(text: str) -> dict[str, str]:
    """The texts of an object's members by name; none of another value."""
    if not text.startswith("{"):
        return {}
    parts = list(_parts(text, 1, "}"))
    return dict(zip(map(json.loads, parts[::2]), parts[1::2], strict=True))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


# Says where a value ends; its numbers stay text, so that none is too large or too long.
_JSON = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse)
