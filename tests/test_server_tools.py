"""Functions that a model may call, asked for by the official ``openai`` client."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from small_model import ScriptedEngine
from web_server import CHAT, MESSAGES, TINY, Server, connect, error_of, running, tool

import minflash
from minflash.chunk import NO_TOKEN, Chunk

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{% for m in messages %}"
    "{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}={{ c.function.arguments.city }}{% endfor %}{{ m.tool_call_id }}\n"
    "{% endfor %}"
)


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [tool("weather", CITY), tool("time")]
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[minflash.LLM]:
    """The tiny model with a template that knows tools, and a token [TOOL_CALLS] as Mistral's."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("models") / "tools")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "[TOOL_CALLS]"))
    with minflash.load(folder, device="cpu") as llm:
        yield llm


def says(
    llm: Any, monkeypatch: pytest.MonkeyPatch, *chunks: Chunk, finish_reason: str = "stop"
) -> None:
    """From now on the model's answer is this."""

    def start(*asked: Any) -> Iterator[Chunk]:
        yield from chunks
        yield Chunk("", NO_TOKEN, finish_reason=finish_reason)

    monkeypatch.setattr(llm, "_start", start)


def pieces(text: str) -> list[Chunk]:
    """A text as chunks of five characters."""
    return [Chunk(text[place : place + 5], 50) for place in range(0, len(text), 5)]


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    """The only choice of an answer to "Hello"."""
    fields = {"model": "tools", "messages": MESSAGES, "tools": TOOLS, **fields}
    return client.chat.completions.create(**fields).choices[0]


def ask_events(client: openai.OpenAI, **fields: Any) -> list[Any]:
    fields = {"model": "tools", "messages": MESSAGES, "tools": TOOLS, "stream": True, **fields}
    return list(client.chat.completions.create(**fields))


def ask_streaming(client: openai.OpenAI, **fields: Any) -> tuple[str, list[Any], str]:
    """Text, calls put together and the reason of the end."""
    text, calls, reason = "", [], ""
    for event in ask_events(client, **fields):
        (choice,) = event.choices
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            assert call.index == len(calls)
            calls.append(call)
    return text, calls, reason


def plain(calls: Any) -> list[tuple[str, Any]]:
    assert all(call.type == "function" and len(call.id) == 9 for call in calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_a_call(client: openai.OpenAI, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says(llm, monkeypatch, *pieces(CALL))
    choice = ask(client)
    assert choice.message.content is None and choice.finish_reason == "tool_calls"
    assert plain(choice.message.tool_calls) == [("weather", {"city": "Oslo"})]
    text, calls, reason = ask_streaming(client)
    assert (text, plain(calls), reason) == ("", [("weather", {"city": "Oslo"})], "tool_calls")


def test_text_and_two_calls(
    client: openai.OpenAI, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    says(llm, monkeypatch, *pieces(f"I look.\n{CALL}\n{time}"))
    expected = [("weather", {"city": "Oslo"}), ("time", {})]
    choice = ask(client)
    assert choice.message.content == "I look." and plain(choice.message.tool_calls) == expected
    text, calls, reason = ask_streaming(client)
    assert (text, plain(calls), reason) == ("I look.", expected, "tool_calls")


def test_a_mark_that_is_a_special_token(
    client: openai.OpenAI, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llm.detokenize([0], skip_special=False) == "[TOOL_CALLS]"
    says(llm, monkeypatch, Chunk("", 0), *pieces('[{"name": "time", "arguments": {}}]'))
    assert plain(ask(client).message.tool_calls) == [("time", {})]
    assert plain(ask_streaming(client)[1]) == [("time", {})]


def test_text_held_back_for_a_stop_string_comes_before_the_mark(llm: Any) -> None:
    """It comes later than the token of the mark, which must not take it for the call's."""
    call = '[{"name": "time", "arguments": {}}]'
    for before in ("Let me look. Ob", "Let me look."):
        script = [*llm.tokenize(before), 0, *llm.tokenize(call), *llm.eos_token_ids]
        speaker = minflash.LLM(ScriptedEngine(llm.config, script), llm._tokenizer)
        with running(speaker) as server, connect(server) as client:
            fields: Any = {"model": "default", "stop": ["Observation", "##"]}
            choice = ask(client, **fields)
            assert choice.message.content == before
            assert plain(choice.message.tool_calls) == [("time", {})]
            text, calls, reason = ask_streaming(client, **fields)
            assert (text, plain(calls), reason) == (before, [("time", {})], "tool_calls")


@pytest.mark.parametrize(
    "fields",
    [{"tools": openai.NOT_GIVEN}, {"tool_choice": "none"}, {"tools": [tool("time")]}],
    ids=["without tools", "tool_choice none", "a function that was not offered"],
)
def test_what_is_no_call_stays_text(
    client: openai.OpenAI, llm: Any, monkeypatch: pytest.MonkeyPatch, fields: Any
) -> None:
    says(llm, monkeypatch, *pieces(CALL))
    choice = ask(client, **fields)
    assert choice.message.content == CALL and choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert ask_streaming(client, **fields) == (CALL, [], "stop")


ANSWER = '{"name": "weather", "parameters": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"regex": "[{].*"}},
        {"extra_body": {"grammar": 'start: "{" /.*/'}},
    ],
    ids=["response_format", "regex", "grammar"],
)
def test_an_answer_whose_form_was_asked_for_is_no_call(
    client: openai.OpenAI, llm: Any, monkeypatch: pytest.MonkeyPatch, fields: Any
) -> None:
    says(llm, monkeypatch, *pieces(ANSWER))
    choice = ask(client, **fields)
    assert (choice.message.content, choice.message.tool_calls) == (ANSWER, None)
    assert ask_streaming(client, **fields) == (ANSWER, [], "stop")
    events = ask_events(client, **fields)
    assert sum(bool(event.choices[0].delta.content) for event in events) == len(pieces(ANSWER))


def test_without_a_form_the_same_answer_is_a_call(
    client: openai.OpenAI, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(llm, monkeypatch, *pieces(ANSWER))
    for fields in ({}, {"response_format": {"type": "text"}}):
        assert plain(ask(client, **fields).message.tool_calls) == [("weather", {"city": "Oslo"})]


def test_an_answer_that_was_cut_says_so(
    client: openai.OpenAI, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(llm, monkeypatch, *pieces(CALL), finish_reason="length")
    choice = ask(client)
    assert choice.message.tool_calls and choice.finish_reason == "length"


def test_a_call_that_the_model_writes(client: openai.OpenAI) -> None:
    """From its tokens to the protocol, the text forced."""
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    choice = ask(client, extra_body={"regex": re.escape(CALL).replace(r"\ ", " ")})
    assert plain(choice.message.tool_calls) == [("weather", {"city": "Oslo"})]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "time"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ({"type": "function", "function": {"name": "time"}}, {"time"}),
    ],
)
def test_a_call_can_be_demanded(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    for seed in range(3):
        asked: Any = {"tool_choice": choice, "temperature": 1, "seed": seed}
        found = ask(client, **asked)
        ((name, arguments),) = plain(found.message.tool_calls)
        assert name in names and found.message.content is None
        assert found.finish_reason == "tool_calls"
        assert arguments in ([{}] if name == "time" else [{"city": "Rome"}, {"city": "Oslo"}])
        _, calls, reason = ask_streaming(client, **asked)
        assert plain(calls) == [(name, arguments)] and reason == "tool_calls"


def test_parameters_may_refer_to_their_definitions(client: openai.OpenAI) -> None:
    """As those that pydantic makes do."""
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    parameters = {
        "properties": {"city": {"$ref": "#/$defs/City"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"City": {"enum": ["Rome"]}},
    }
    second = tool("weather", parameters)
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    found = ask(client, tools=[tool("time"), second], tool_choice=choice)
    assert plain(found.message.tool_calls) == [("weather", {"city": "Rome"})]
    both = ask(client, tools=[tool("other", CITY), second], tool_choice="required")
    assert plain(both.message.tool_calls)[0][0] in ("other", "weather")


def test_values_that_look_like_references_stay(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    names = {"const": {"$ref": "#/$defs/a"}, "b": {"const": {"$ref": "#"}}}
    parameters = {"properties": names, "required": [*names], "additionalProperties": False}
    parameters["$defs"] = {"a": {"enum": [{"$ref": "#/x"}]}}
    found = ask(client, tools=[tool("weather", parameters)], tool_choice="required")
    arguments = {"const": {"$ref": "#/x"}, "b": {"$ref": "#"}}
    assert plain(found.message.tool_calls) == [("weather", arguments)]


def test_a_conversation_with_calls_reaches_the_template(
    client: openai.OpenAI, llm: minflash.LLM
) -> None:
    call = {"id": "call00001", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Oslo"}'}  # type: ignore[assignment]
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": "Rain"},
    ]
    answer = client.chat.completions.create(
        model="tools", messages=messages, tools=TOOLS, max_tokens=1
    )
    text = "weather;time;user:Hello\nassistant:weather=Oslo\ntool:Raincall00001\n"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(llm.tokenize(text))


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0]", "invalid_value"),
        ({"tools": [tool("a", "string")]}, "tools[0].function.parameters", "invalid_value"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "bomb"}}},
            "tool_choice",
            "invalid_value",
        ),
        ({"tool_choice": "required", "regex": "a"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required", "ignore_eos": True}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required", "stop": "}"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required", "stop_token_ids": [5]}, "tool_choice", "invalid_value"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "unsupported_parameter"),
        (
            {"tools": [tool("a", {"$ref": "#/$defs/b"})], "tool_choice": "required"},
            "tools",
            "invalid_value",
        ),
    ],
)
def test_tools_that_cannot_be_obeyed(server: Server, fields: Any, param: str, code: str) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    answer = server.post(CHAT, {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 5, **fields})
    assert error_of(answer) == (400, param, code)


def test_tools_as_openais_own_helper_makes_them(client: openai.OpenAI) -> None:
    """It marks them as strict whatever the choice, and parse() takes no others."""
    pydantic = pytest.importorskip("pydantic")
    weather = pydantic.create_model("weather", city=(str, ...))
    made: Any = openai.pydantic_function_tool(weather)
    assert made["function"]["strict"] is True
    assert ask(client, tools=[made], max_tokens=1).finish_reason == "length"
    assert ask(client, tools=[made], tool_choice="none", max_tokens=1).finish_reason == "length"
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    demanded = ask(client, tools=[made], tool_choice="required", max_tokens=200)
    assert demanded.finish_reason in ("tool_calls", "length")


def test_what_clients_add_to_tools_is_taken(client: openai.OpenAI) -> None:
    more: Any = {**tool("time"), "id": "t1", "cache_control": {"type": "ephemeral"}}
    more["function"] = {**more["function"], "type": "function", "returns": {"type": "string"}}
    assert ask(client, tools=[more], max_tokens=1).finish_reason == "length"


def test_one_call_at_most_where_no_more_can_be(client: openai.OpenAI) -> None:
    one = {"parallel_tool_calls": False, "max_tokens": 1}
    assert ask(client, tools=[], **one).finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="parallel_tool_calls"):
        ask(client, tools=[tool("time")], **one)
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    options: Any = {"tools": [tool("time")], "tool_choice": "required"}
    text = {"type": "text"}
    assert ask(client, **options, **one, response_format=text).finish_reason == "length"


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}},
        {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        {"const": 5},
        {"enum": [[1], None]},
    ],
)
def test_what_no_object_can_be_is_refused_where_a_call_is_demanded(
    server: Server, schema: Any
) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    fields = {"tools": [tool("a", schema)], "tool_choice": "required", "max_tokens": 5}
    answer = server.post(CHAT, {"messages": MESSAGES, **fields})
    assert error_of(answer) == (400, "tools", "invalid_value")


def test_a_template_without_tools_is_their_fault() -> None:
    with minflash.load(TINY, device="cpu") as plain_llm, running(plain_llm) as server:
        answer = server.post(CHAT, {"messages": MESSAGES, "tools": TOOLS})
        assert error_of(answer) == (400, "tools", "invalid_value")


def test_a_call_cannot_be_demanded_without_llguidance(
    llm: minflash.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "_grammars", None)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with running(llm) as server, connect(server) as client:
        with pytest.raises(openai.BadRequestError, match="pip install") as caught:
            ask(client, tool_choice="required")
        assert caught.value.code == "unsupported_parameter"
