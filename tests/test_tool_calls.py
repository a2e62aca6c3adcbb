"""Calls of functions, read from text that comes in pieces of any size."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest

from minflash.chunk import NO_TOKEN, Chunk
from minflash.stopping import StopStrings
from minflash.tool_calls import Call, CallReader

NAMES = ("weather", "time")
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
MARK, TIME_CALL = "[TOOL_CALLS]", '{"name": "time", "arguments": {}}'
WEATHER = ("weather", {"city": "Paris"})
TIME = ("time", {})


def read(text: str, size: int, reason: str = "stop") -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of an answer that comes ``size`` characters at a time."""
    reader = CallReader(NAMES, lambda token: "")
    places = [*range(0, len(text), size), len(text)]
    chunks = [Chunk(text[begin:end], 5) for begin, end in pairwise(places)]
    chunks.append(Chunk("", 2, finish_reason=reason))
    said = [reader.read(chunk) for chunk in chunks]
    calls = [call for _, found in said for call in found]
    assert reader.found == len(calls) and len({call.id for call in calls}) == len(calls)
    return "".join(text for text, _ in said), [plain(call) for call in calls]


class Spoken:
    """A decoder of tokens that are places in a list of texts; marks are no text."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def push(self, token: int) -> str:
        return "" if token == NO_TOKEN else self._texts[token].replace(MARK, "")

    def flush(self) -> str:
        return ""


def plain(call: Call) -> tuple[str, Any]:
    return call.name, json.loads(call.arguments)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (HERMES, "", [WEATHER]),
        (f"\n{HERMES}\n", "\n", [WEATHER]),
        (f"I look.\n{HERMES}", "I look.", [WEATHER]),
        (HERMES.removesuffix("</tool_call>"), "", [WEATHER]),
        (
            f'{HERMES}\n<tool_call>{{"name": "time", "arguments": {{}}}}</tool_call> Done.',
            " Done.",
            [WEATHER, TIME],
        ),
        ('<tool_call>[{"name": "time", "arguments": "{}"}]</tool_call>', "", [TIME]),
        (
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, '
            '{"name": "time", "arguments": {}}]',
            "",
            [WEATHER, TIME],
        ),
        (' {"name": "weather", "parameters": {"city": "Paris"}}', "", [WEATHER]),
        ('<|python_tag|>{"name": "time", "parameters": {}}', "", [TIME]),
        (
            '{"name": "time", "parameters": {}}; {"name": "weather", "parameters": '
            '{"city": "Paris"}}',
            "",
            [TIME, WEATHER],
        ),
    ],
)
def test_calls_are_told_from_text(answer: str, text: str, calls: list[Any], size: int) -> None:
    assert read(answer, size) == (text, calls)


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "Only text, with a < and [TOOL and a blank at the end. ",
        HERMES.replace("weather", "bomb"),
        '<tool_call>{"name": "weather"}</tool_call> or not',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "{\\"x\\": NaN}"}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "{} {}"}</tool_call>',
        '<tool_call>{"name": "weather", "argum',
        "<tool_call></tool_call>",
        "<tool_call>" + "[" * 100_000,
        '{"name": "bomb", "parameters": {}}',
        '{"answer": 42}',
        '{"name": "time", "parameters": {}} is what I would call',
        'I would call {"name": "time", "parameters": {}}',
        '[TOOL_CALLS] [{"name": "time", "arguments": {}}, {"name": "bomb", "arguments": {}}]',
        "<|python_tag|>print(1)",
        "<tool_call",
    ],
)
def test_all_else_stays_text_as_it_is(answer: str, size: int) -> None:
    if len(answer) < 1000 or size == 1000:
        assert read(answer, size, "length") == (answer, [])


@pytest.mark.parametrize(
    "answer",
    [
        '<tool_call>{{"name": "weather", "arguments": {}}}</tool_call>',
        '[TOOL_CALLS] [{{"arguments": {}, "name": "weather"}}]',
        '{{"id": [1, "}}"], "name": "weather", "parameters": {}}}',
    ],
)
@pytest.mark.parametrize("arguments", [
    '{"x": 12345678901234567.25}',
    '{"x": 1e999, "y": -0.0, "z": 1E2}',
    f'{{"x": {"9" * 5000}}}',
    '{"x": "\\ud800 \\u00e9 é", "x": "twice"}',
    '{ "x" : [1,2 , {"y":null}]\n}',
])  # fmt: skip
def test_arguments_stay_as_they_were_written(answer: str, arguments: str) -> None:
    reader = CallReader(NAMES, lambda token: "")
    said, (call,) = reader.read(Chunk(answer.format(arguments), 5, finish_reason="stop"))
    assert (said, call.name, call.arguments) == ("", "weather", arguments)


def test_spaces_without_end_take_no_time() -> None:
    """A model that has gone astray may write them by the thousand."""
    reader = CallReader(NAMES, lambda token: "")
    begin = time.perf_counter()
    for _ in range(2000):
        assert reader.read(Chunk(" " * 16, 5)) == ("", [])
    assert reader.read(Chunk("<tool", 5, finish_reason="length"))[0] == " " * 32000 + "<tool"
    assert time.perf_counter() - begin < 5


def test_text_passes_as_soon_as_it_is_certain() -> None:
    reader = CallReader(NAMES, lambda token: "")
    pieces = ["Hello", " <b", "ig> [", "TOOL", " box] <tool_", "call>", "{}"]
    said = [reader.read(Chunk(piece, 5))[0] for piece in pieces]
    assert said == ["Hello", " <b", "ig>", "", " [TOOL box]", "", ""]


def test_marks_that_are_special_tokens_are_no_text() -> None:
    """An answer's text leaves special tokens out, so that the mark is known by its token only."""
    special = {7: "[TOOL_CALLS]", 8: "<|im_end|>"}
    for body, text, calls in (
        ('[{"name": "time", "arguments": {}}]', "Well,", [TIME]),
        ("no call", "Well, no call", []),
    ):
        reader = CallReader(NAMES, lambda token: special.get(token, ""))
        chunks = [Chunk("Well,", 5), Chunk("", 7), Chunk(f" {body}", 5)]
        said = [reader.read(one) for one in (*chunks, Chunk("", 8, finish_reason="stop"))]
        assert "".join(piece for piece, _ in said) == text
        assert [plain(call) for _, found in said for call in found] == calls


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "calls"),
    [
        (["I look. Ob", MARK, "[", TIME_CALL, "]"], "Observation", "I look. Ob", [TIME]),
        (["O", "bse", MARK, "[", TIME_CALL, "]"], "Observation", "Obse", [TIME]),
        (["Well, Ob", MARK, "no call"], "Observation", "Well, Obno call", []),
        (["Ob", MARK, f"[{TIME_CALL}]", " O", "b"], "Observation", "Ob[{}] Ob", []),
        (["Obser", MARK, "vation"], "Observation", "", []),
        (["I look.", MARK, f"[{TIME_CALL}]"], "Observation", "I look.", [TIME]),
    ],
)
def test_text_held_back_for_a_stop_string_comes_before_a_mark(
    tokens: list[str], stop: str, text: str, calls: list[Any]
) -> None:
    special = {number: one for number, one in enumerate(tokens) if one == MARK}
    reader = CallReader(NAMES, lambda token: special.get(token, ""), Spoken(tokens))
    stream, stops = Spoken(tokens), StopStrings([stop])
    chunks = [Chunk(stops.push(stream.push(number)), number) for number in range(len(tokens))]
    chunks.append(Chunk(stops.flush(), NO_TOKEN, finish_reason="stop"))
    said = [reader.read(chunk) for chunk in chunks]
    assert "".join(piece for piece, _ in said) == text.replace("{}", TIME_CALL)
    assert [plain(call) for _, found in said for call in found] == calls
