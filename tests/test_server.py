"""The web service, asked by the official ``openai`` client and by plain HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from web_server import PacedLLM, Server, running, until

import minflash
from minflash import cli
from minflash.resources import resource_dir
from minflash.server import Settings

TINY = resource_dir("weights") / "tiny"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[minflash.LLM]:
    with minflash.load(TINY, device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: minflash.LLM) -> Iterator[Server]:
    with running(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with connect(server) as client:
        yield client


def connect(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20)


def error_of(answer: tuple[int, Any, Any]) -> tuple[int, str, str]:
    """Status, param and code of an error, which has OpenAI's four fields."""
    status, _, body = answer
    assert set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["message"]
    return status, body["error"]["param"], body["error"]["code"]


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
        (CHAT, {"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
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
        (COMPLETIONS, {"logprobs": 1, "echo": True}, "echo", "unsupported_parameter"),
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
    def broken(*args: Any, **options: Any) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(server.service.llm, "stream", broken, raising=False)
    for stream in (False, True):
        answer = server.post(CHAT, {"messages": MESSAGES, "stream": stream})
        assert error_of(answer)[0] == 500 and "secret" not in str(answer[2])
    assert "secret" in caplog.text
    monkeypatch.undo()
    assert server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1})[0] == 200


def test_key(llm: minflash.LLM) -> None:
    with running(llm, Settings(api_key="sesame-é")) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame-é"}):
            status, found, body = server.post(CHAT, {"messages": MESSAGES}, **headers)
            assert error_of((status, found, body)) == (401, None, "invalid_api_key")
            assert found["WWW-Authenticate"] == "Bearer"
        assert server.get("/metrics")[0] == 401
        assert server.get("/health")[0] == server.get("/")[0] == 200
        key = "sesame-é".encode().decode("latin-1")
        assert server.get("/v1/models", Authorization=f"Bearer {key}")[0] == 200
    with running(llm, Settings(api_key="sesame")) as server:
        with connect(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with connect(server, "sesame") as client:
            assert client.models.list().data


def test_size_limit(llm: minflash.LLM) -> None:
    with running(llm, Settings(max_request_bytes=1000)) as server:
        assert server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1})[0] == 200
        long = {"messages": [{"role": "user", "content": "a" * 1000}]}
        assert error_of(server.post(CHAT, long))[::2] == (413, "request_too_large")
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as plain:
            plain.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + b"200\r\n" + b" " * 512 + b"\r\n"
            )
            plain.sendall(b"200\r\n" + b" " * 512 + b"\r\n")  # and no end
            assert plain.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_queue_limit(llm: minflash.LLM) -> None:
    paced = PacedLLM(llm)
    paced.gate.clear()
    body = {"messages": MESSAGES, "max_tokens": 2}
    with running(paced, Settings(queue=1)) as server, ThreadPoolExecutor(2) as pool:
        queue = server.service.queue
        running_one = pool.submit(server.post, CHAT, body)
        until(lambda: queue.running == 1)
        waiting_one = pool.submit(server.post, CHAT, body)
        until(lambda: queue.waiting == 1)
        status, headers, answer = server.post(CHAT, body)
        assert error_of((status, headers, answer)) == (429, None, "queue_full")
        assert 1 <= int(headers["Retry-After"]) <= 60
        with connect(server) as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="tiny", messages=MESSAGES)
        metrics = server.get("/metrics")[2]
        assert "minflash_queue_length 1\n" in metrics and "minflash_running 1\n" in metrics
        paced.gate.set()
        assert running_one.result()[0] == waiting_one.result()[0] == 200
        assert server.post(CHAT, body)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_cancels(llm: minflash.LLM, stream: bool) -> None:
    paced = PacedLLM(llm)
    paced.delay = 0.05
    body = {"messages": MESSAGES, "max_tokens": 300, "stream": stream, "ignore_eos": True}
    with running(paced) as server:
        plain = send_raw(server, body)
        until(lambda: paced.produced >= 3)
        plain.close()
        produced = paced.produced
        until(lambda: not server.service.queue.running)
        assert paced.produced <= produced + 2
        assert "minflash_generations_cancelled_total 1\n" in server.get("/metrics")[2]
        assert server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1})[0] == 200


def test_disconnect_leaves_the_queue(llm: minflash.LLM) -> None:
    paced = PacedLLM(llm)
    paced.gate.clear()
    with running(paced) as server:
        body = {"messages": MESSAGES, "max_tokens": 3}
        first, second = send_raw(server, body), send_raw(server, body)
        until(lambda: server.service.queue.waiting == 1)
        second.close()
        until(lambda: server.service.queue.waiting == 0)
        paced.gate.set()
        assert first.recv(100).startswith(b"HTTP/1.1 200")
        first.close()
        assert paced.produced == 3


def send_raw(server: Server, body: Any) -> socket.socket:
    """Sends a chat request and returns the connection, so that the test can drop it."""
    data = json.dumps(body).encode()
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n"
    plain.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    return plain


def test_eight_clients(client: openai.OpenAI, llm: minflash.LLM) -> None:
    def ask(number: int) -> str:
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"Hello {number % 4}"}],
            max_tokens=10,
            stream=True,
        )
        return "".join(event.choices[0].delta.content or "" for event in stream)

    expected = [llm.chat(f"Hello {number % 4}", max_tokens=10) for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == expected


def test_metrics(llm: minflash.LLM) -> None:
    with running(llm) as server:
        for _ in range(3):
            server.post(CHAT, {"messages": MESSAGES, "max_tokens": 4, "ignore_eos": True})
        server.post(CHAT, {"messages": 1})
        status, headers, text = server.get("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    values = dict(re.findall(r"^(minflash_\S+) (\S+)$", text, re.MULTILINE))
    assert values['minflash_requests_total{path="/v1/chat/completions",status="200"}'] == "3"
    assert values['minflash_requests_total{path="/v1/chat/completions",status="400"}'] == "1"
    assert values["minflash_generation_tokens_total"] == "12"
    assert int(values["minflash_prompt_tokens_total"]) == 3 * len(llm.apply_chat_template("Hello"))
    assert values["minflash_generation_seconds_count"] == "3"
    assert float(values["minflash_generation_seconds_sum"]) > 0
    families = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(families) == len(set(families)) == text.count("# HELP")


def test_cors_is_off_unless_asked_for(server: Server, llm: minflash.LLM) -> None:
    origin = "http://page.example"
    assert "Access-Control-Allow-Origin" not in server.get("/health", Origin=origin)[1]
    with running(llm, Settings(cors=(origin,), api_key="sesame")) as open_server:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        status, found, _ = open_server.request("OPTIONS", CHAT, None, **headers)
        assert status == 200 and found["Access-Control-Allow-Origin"] == origin
        assert (
            open_server.get(CHAT, Origin="http://other")[1].get("Access-Control-Allow-Origin")
            is None
        )
        assert (
            open_server.get("/v1/models", Origin=origin)[1]["Access-Control-Allow-Origin"] == origin
        )


def test_tools_reach_the_template(tmp_path: Path) -> None:
    folder = tmp_path / "tools"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{% for m in messages %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}"
        "{% endfor %}"
    )
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"x":7}'}}
    messages: Any = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with (
        minflash.load(folder, device="cpu") as llm,
        running(llm) as server,
        connect(server) as client,
    ):
        answer = client.chat.completions.create(
            model="tools", messages=messages, tools=[tool], max_tokens=1
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(llm.tokenize("weather;Hello7"))


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[Any, Server]]:
    """``minflash serve`` as a program of its own."""
    environment = {**os.environ, "MINFLASH_DEVICE": "cpu", "MINFLASH_API_KEY": ""}
    command = [sys.executable, "-m", "minflash", "serve", "--port", "0"]
    command += ["-m", str(TINY)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    line = process.stderr.readline().decode()
    found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
    assert found, line + process.stderr.read().decode()
    server = Server(int(found[1]), None)
    until(lambda: _answers(server))
    try:
        yield process, server
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _answers(server: Server) -> bool:
    try:
        return server.get("/health")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_shutdown_finishes_what_runs(program: Any, number: int) -> None:
    process, server = program
    with connect(server) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, extra_body={"ignore_eos": True}
        )
        events = iter(stream)
        next(events)
        process.send_signal(number)
        assert list(events)[-1].choices[0].finish_reason == "length"
    assert process.wait(20) == 0
    assert process.stderr.read() == b""


def test_the_second_interrupt_waits_for_nothing(program: Any) -> None:
    process, server = program
    plain = send_raw(server, {"messages": MESSAGES, "ignore_eos": True, "stream": True})
    assert plain.recv(100).startswith(b"HTTP/1.1 200")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    plain.close()
    assert b"Traceback" not in process.stderr.read()


def test_shutdown_stops_what_takes_too_long(llm: minflash.LLM) -> None:
    import asyncio

    from minflash.server_protocol import ApiError
    from minflash.server_queue import Job, ModelQueue

    paced = PacedLLM(llm)
    paced.delay = 0.02

    async def scene() -> None:
        queue = ModelQueue(4)
        jobs = [
            Job(lambda: paced.stream("a", max_tokens=400, ignore_eos=True), 1) for _ in range(2)
        ]
        for job in jobs:
            queue.submit(job)
        await anext(jobs[0])
        await queue.close(grace=0.1)
        with pytest.raises(ApiError, match="shutting down"):
            async for _ in jobs[0]:
                pass
        with pytest.raises(ApiError, match="shutting down"):
            await anext(jobs[1])
        with pytest.raises(ApiError, match="shutting down"):
            queue.submit(jobs[1])

    asyncio.run(scene())
    assert 1 <= paced.produced < 100


def test_a_port_in_use_is_one_line(server: Server) -> None:
    command = [sys.executable, "-m", "minflash", "serve", "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"--port" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--api-key", ""), "--api-key"),
        (("--port", "70000"), "65535"),
        (("--queue", "-1"), "--queue"),
        (("--max-request-bytes", "0"), "at least 1"),
    ],
)
def test_wrong_usage(capsys: Any, arguments: tuple[str, ...], word: str) -> None:
    assert cli.main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def test_without_the_extra(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve"]) == 1
    assert 'pip install "minflash[server]"' in capsys.readouterr().err


def test_page(server: Server) -> None:
    status, headers, text = server.get("/")
    assert status == 200 and "<title>minflash</title>" in text
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers.get_content_type() == "text/html"
