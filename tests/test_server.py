"""The web service, asked by the official ``openai`` client and by plain HTTP."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
from web_server import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    TINY,
    Server,
    error_of,
    running,
)

import minflash


def test_models_and_health(client: openai.OpenAI, server: Server) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert server.get("/health")[2] == {"status": "ok"}


def test_chat(client: openai.OpenAI, llm: minflash.LLM) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == llm.chat("Hello", max_tokens=12)
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.usage is not None and answer.model == "tiny" and answer.id
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(llm.apply_chat_template("Hello"))


def test_sampling_reaches_the_model(client: openai.OpenAI, llm: minflash.LLM) -> None:
    answer = client.chat.completions.create(
        model="default",
        messages=MESSAGES,
        max_completion_tokens=12,
        temperature=1.5,
        top_p=0.9,
        seed=7,
        extra_body={"top_k": 50, "min_p": 0.01},
    )
    expected = llm.chat(
        "Hello", max_tokens=12, temperature=1.5, top_p=0.9, seed=7, top_k=50, min_p=0.01
    )
    assert answer.choices[0].message.content == expected


def test_chat_stream(client: openai.OpenAI, llm: minflash.LLM) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    *events, last = list(stream)
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == llm.chat("Hello", max_tokens=12)
    assert [event.choices[0].finish_reason for event in events[-2:]] == [None, "length"]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 12
    assert len({event.id for event in events}) == 1


def test_without_a_limit_a_chat_takes_what_the_context_leaves(
    client: openai.OpenAI, llm: minflash.LLM
) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.total_tokens == llm.max_context
    short = client.completions.create(model="tiny", prompt="a", extra_body={"ignore_eos": True})
    assert short.usage is not None and short.usage.completion_tokens == 256


def test_completion(client: openai.OpenAI, llm: minflash.LLM) -> None:
    expected = llm.generate("Once", max_tokens=10)
    create: Any = client.completions.create
    assert create(model="tiny", prompt="Once", max_tokens=10).choices[0].text == expected
    echoed = create(model="tiny", prompt="Once", max_tokens=10, echo=True).choices[0].text
    assert echoed == "Once" + expected
    tokens = llm.tokenize("Once")
    assert create(model="tiny", prompt=tokens, max_tokens=10).choices[0].text == expected
    events = create(model="tiny", prompt=["Once"], max_tokens=10, echo=True, stream=True)
    assert "".join(event.choices[0].text for event in events) == "Once" + expected


def test_stop(client: openai.OpenAI, llm: minflash.LLM) -> None:
    whole = llm.generate("Once", max_tokens=20)
    middle = whole[5:7]
    answer = client.completions.create(
        model="tiny", prompt="Once", max_tokens=20, stop=[middle, "@@@"]
    )
    assert answer.choices[0].text == whole[: whole.index(middle)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI, llm: minflash.LLM) -> None:
    create: Any = client.chat.completions.create
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6}
    expected = list(llm.stream(MESSAGES, max_tokens=6, logprobs=2))
    whole = create(**options, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [one.logprob for one in whole] == pytest.approx([c.logprob for c in expected])
    assert all(len(one.top_logprobs) == 2 for one in whole)
    assert all(one.token == one.top_logprobs[0].token for one in whole)  # greedy
    assert bytes(whole[0].bytes).decode() == whole[0].token
    events = create(**options, logprobs=True, stream=True)
    streamed = [event.choices[0].logprobs for event in events]
    tokens = [one.token for part in streamed if part is not None for one in part.content]
    assert tokens == [one.token for one in whole]
    old: Any = client.completions.create(model="tiny", prompt="Once", max_tokens=4, logprobs=3)
    found = old.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 4
    assert all(len(top) <= 3 and min(top.values()) < 0 for top in found.top_logprobs)


def test_structured_output(client: openai.OpenAI, server: Server) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )
    content = json.loads(answer.choices[0].message.content or "")
    assert set(content) == {"a", "b"} and content["b"] in ("x", "y")
    digits = server.post(COMPLETIONS, {"prompt": "a", "regex": "[0-9]{4}"})[2]
    assert re.fullmatch("[0-9]{4}", digits["choices"][0]["text"])
    bad = server.post(CHAT, {"messages": MESSAGES, "regex": "("})
    assert error_of(bad)[0] == 400


def test_tokenize(server: Server, llm: minflash.LLM) -> None:
    body = server.post("/tokenize", {"prompt": "Hello"})[2]
    assert body["tokens"] == llm.tokenize("Hello") and body["count"] == len(body["tokens"])
    assert body["max_model_len"] == llm.max_context
    assert server.post("/detokenize", {"tokens": body["tokens"]})[2] == {"prompt": "Hello"}
    chat = server.post("/tokenize", {"messages": MESSAGES})[2]
    assert chat["tokens"] == llm.apply_chat_template("Hello")
    assert error_of(server.post("/tokenize", {"text": "a"}))[:2] == (400, "text")
    assert error_of(server.post("/detokenize", {"tokens": [10**6]}))[0] == 400
    assert error_of(server.post("/detokenize", {}))[0] == 400


def test_messages_of_the_protocol(server: Server, llm: minflash.LLM) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    body = {"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]}
    body["messages"][1] = {"role": "user", "content": parts, "name": None}
    tokens = server.post("/tokenize", body)[2]["tokens"]
    assert tokens == llm.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    )


def test_a_neutral_value_wins_over_the_models_default(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "penalized")
    (folder / "generation_config.json").write_text('{"repetition_penalty": 5.0}')
    with minflash.load(folder, device="cpu") as llm, running(llm) as server:
        said = []
        for fields in ({}, {"repetition_penalty": 1}, {"repetition_penalty": 1.0}):
            body = {"prompt": "Once", "max_tokens": 20, **fields}
            said.append(server.post(COMPLETIONS, body)[2]["choices"][0]["text"])
        assert said[0] == llm.generate("Once", max_tokens=20)
        assert said[1] == said[2] == llm.generate("Once", max_tokens=20, repetition_penalty=1)
        assert said[0] != said[1]


def test_harmless_fields_are_accepted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=1,
        n=1,
        user="me",
        store=False,
        metadata={"a": "b"},
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        logprobs=False,
        response_format={"type": "text"},
        tool_choice="none",
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        (CHAT, {"temprature": 1}, "temprature", "unknown_parameter"),
        (CHAT, {"prompt": "a"}, "prompt", "unknown_parameter"),
        (CHAT, {"n": 2}, "n", "unsupported_parameter"),
        (CHAT, {"n": True}, "n", "unsupported_parameter"),
        (CHAT, {"n": 1.0}, "n", "unsupported_parameter"),
        (CHAT, {"repetition_penalty": True}, "repetition_penalty", "invalid_value"),
        (CHAT, {"presence_penalty": False}, "presence_penalty", "invalid_value"),
        (CHAT, {"min_tokens": False}, "min_tokens", "invalid_value"),
        (CHAT, {"logprobs": True, "top_logprobs": False}, "top_logprobs", "invalid_value"),
        (COMPLETIONS, {"best_of": True}, "best_of", "unsupported_parameter"),
        (CHAT, {"tools": "all"}, "tools", "invalid_value"),
        (CHAT, {"temperature": -1}, "temperature", "invalid_value"),
        (CHAT, {"temperature": "hot"}, "temperature", "invalid_value"),
        (CHAT, {"top_p": 1.5}, "top_p", "invalid_value"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "invalid_value"),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 5}, "max_completion_tokens", None),
        (CHAT, {"max_tokens": 10**6}, "messages", "context_length_exceeded"),
        (CHAT, {"stop": 5}, "stop", "invalid_value"),
        (CHAT, {"stop": [""]}, "stop", "invalid_value"),
        (CHAT, {"stream": "yes"}, "stream", "invalid_value"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        (CHAT, {"messages": []}, "messages", "invalid_value"),
        (CHAT, {"messages": "Hello"}, "messages", "invalid_value"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages[0]", "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, None),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 4000}]}, "messages", None),
        (CHAT, {"response_format": {"type": "poem"}}, "response_format", None),
        (COMPLETIONS, {"suffix": "end"}, "suffix", "unsupported_parameter"),
        (COMPLETIONS, {"best_of": 3}, "best_of", "unsupported_parameter"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt", "unsupported_parameter"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [1, True]}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [10**6]}, "prompt", "invalid_value"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs", "invalid_value"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "invalid_value"),
        (COMPLETIONS, {"max_tokens": False, "echo": True}, "max_tokens", "invalid_value"),
        (COMPLETIONS, {"regex": "a", "grammar": "b"}, None, "invalid_value"),
        (COMPLETIONS, {"echo": 1}, "echo", "invalid_value"),
        (COMPLETIONS, {"seed": -1}, "seed", "invalid_value"),
        (COMPLETIONS, {"model": 5}, "model", "invalid_value"),
    ],
)
def test_nothing_is_ignored(
    server: Server, path: str, fields: Any, param: str | None, code: str | None
) -> None:
    base = {"messages": MESSAGES} if path == CHAT else {"prompt": "a"}
    found = error_of(server.post(path, {**base, "max_tokens": 2, **fields}))
    assert found[0] == 400
    assert param in (None, found[1]) and code in (None, found[2])


def test_errors_of_http(server: Server) -> None:
    assert error_of(server.post(CHAT, b"{"))[2] == "invalid_json"
    assert error_of(server.post(CHAT, b"[" * 10**5))[2] == "invalid_json"
    assert error_of(server.post(CHAT, b'"text"'))[0] == 400
    assert error_of(server.post(CHAT, b"\xff\xfe"))[0] == 400
    assert error_of(server.post(CHAT, b"{}", **{"Content-Type": "text/plain"}))[0] == 415
    assert error_of(server.get(CHAT))[0] == 405
    assert error_of(server.get("/v2"))[0] == 404
    lone = server.post(COMPLETIONS, b'{"prompt": "\\ud800", "echo": true, "max_tokens": 1}')
    assert lone[0] == 200


def test_client_sees_errors_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature" and "temperature" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)


def test_a_bug_is_an_error_without_details(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fails(*args: Any) -> Any:
        raise KeyError("secret")

    def fails_later(*args: Any) -> Any:
        yield from fails()

    for broken in (fails, fails_later):
        monkeypatch.setattr(server.service.llm, "_start", broken)
        for stream in (False, True):
            answer = server.post(CHAT, {"messages": MESSAGES, "stream": stream})
            assert error_of(answer)[0] == 500 and "secret" not in str(answer[2])
        assert "secret" in caplog.text
        caplog.clear()
    monkeypatch.undo()
    assert server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1})[0] == 200


def test_page(server: Server) -> None:
    status, headers, text = server.get("/")
    assert status == 200 and "<title>minflash</title>" in text
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers.get_content_type() == "text/html"
