"""Definitions of tools that cannot be obeyed are refused, whether a call is demanded or not."""

from __future__ import annotations

from typing import Any

import pytest
from web_server import CHAT, MESSAGES, Server, error_of, tool

from minflash.server_tools import parse_tools


def changed(**fields: Any) -> Any:
    """The tool "time" with other fields of its function."""
    return [{"type": "function", "function": {"name": "time", **fields}}]


@pytest.mark.parametrize(
    ("tools", "param", "code"),
    [
        ([{"type": "custom", "function": {"name": "a"}}], "tools[0]", "invalid_value"),
        ([{"function": {"name": "a"}}], "tools[0]", "invalid_value"),
        ([{**tool("a"), "strict": True}], "tools[0]", "unknown_parameter"),
        (changed(parameter={}), "tools[0].function", "unknown_parameter"),
        (changed(parameters=False), "tools[0].function.parameters", "invalid_value"),
        (changed(parameters=[]), "tools[0].function.parameters", "invalid_value"),
        (changed(strict="yes"), "tools[0].function.strict", "invalid_value"),
        ([tool("a"), tool("b"), tool("a", {})], "tools[2].function.name", "invalid_value"),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_nothing_of_a_function_is_ignored(
    server: Server, tools: Any, param: str, code: str, choice: str
) -> None:
    body = {"messages": MESSAGES, "tools": tools, "tool_choice": choice, "max_tokens": 5}
    assert error_of(server.post(CHAT, body)) == (400, param, code)


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        {"type": "string"},
        {"type": ["object", "null"]},
        {"type": None},
    ],
)
def test_arguments_are_an_object(server: Server, parameters: Any, choice: str) -> None:
    """Of another type they would be no call, even where one is demanded."""
    body = {"messages": MESSAGES, "tools": [tool("a", parameters)], "tool_choice": choice}
    answer = server.post(CHAT, {**body, "max_tokens": 5})
    assert error_of(answer) == (400, "tools", "invalid_value")
    assert "tools[0].function.parameters" in answer[2]["error"]["message"]


def test_only_a_function_without_parameters_takes_no_arguments() -> None:
    """An empty schema allows any object, as it does elsewhere."""
    for parameters, expected in ((None, False), ({}, None)):
        form = parse_tools({"tools": [tool("a", parameters)], "tool_choice": "required"}).form
        assert form is not None
        (call,) = form["json_schema"]["schema"]["anyOf"]
        assert call["properties"]["arguments"].get("additionalProperties") is expected
