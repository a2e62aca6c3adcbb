"""The web service among clients: keys, limits, the queue, leaving, ending."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from web_server import (
    CHAT,
    MESSAGES,
    TINY,
    PacedLLM,
    Server,
    connect,
    error_of,
    running,
    until,
)

import minflash
from minflash import cli
from minflash.server import Settings, create_app


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


def test_a_key_is_compared_in_constant_time(
    llm: minflash.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every decision is compare_digest's, on the whole header."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, key: bytes) -> bool:
        compared.append((given, key))
        return given == b"as if equal"

    monkeypatch.setattr("minflash.server_http.hmac.compare_digest", compare)
    with running(llm, Settings(api_key="sesame")) as server:
        assert server.get("/v1/models", Authorization="Bearer sesame")[0] == 401
        assert server.get("/v1/models", Authorization="as if equal")[0] == 200
        assert server.get("/v1/models")[0] == 401
    assert [given for given, _ in compared] == [b"Bearer sesame", b"as if equal", b""]
    assert {key for _, key in compared} == {b"Bearer sesame"}


def test_size_limit(llm: minflash.LLM) -> None:
    with running(llm, Settings(max_request_bytes=1000)) as server:
        assert server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1})[0] == 200
        long = {"messages": [{"role": "user", "content": "a" * 1000}]}
        assert error_of(server.post(CHAT, long))[::2] == (413, "request_too_large")
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as plain:
            plain.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
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
    paced.delay = 0.2  # a server on a busy machine hears of the disconnect within two steps
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


def test_leaving_ends_nobody_elses_generation(llm: minflash.LLM) -> None:
    """A program streams from the LLM that it also serves, and a client leaves while it waits."""
    options: Any = {"max_tokens": 30, "ignore_eos": True}
    expected = [chunk.token for chunk in llm.stream("Once", **options)]
    with running(llm) as server:
        own = llm.stream("Once", **options)
        said = [next(own)]
        plain = send_raw(server, {"messages": MESSAGES, "max_tokens": 300, "ignore_eos": True})
        until(lambda: server.service.queue.running)
        plain.close()
        until(lambda: not server.service.queue.running)
        said += own
        assert [chunk.token for chunk in said] == expected
        assert said[-1].finish_reason == "length"
        assert server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1})[0] == 200


def test_disconnect_leaves_the_queue(llm: minflash.LLM) -> None:
    paced = PacedLLM(llm)
    paced.gate.clear()
    with running(paced) as server:
        body = {"messages": MESSAGES, "max_tokens": 3}
        first = send_raw(server, body)
        until(lambda: server.service.queue.running == 1)
        second = send_raw(server, body)
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
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
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
        # The last answer may be here a moment before it is counted.
        for _ in range(100):
            status, headers, text = server.get("/metrics")
            values = dict(re.findall(r"^(minflash_\S+) (\S+)$", text, re.MULTILINE))
            if values.get("minflash_generation_seconds_count") == "3":
                break
            time.sleep(0.05)
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
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

    from minflash.server_errors import ApiError
    from minflash.server_queue import Job, ModelQueue

    paced = PacedLLM(llm)
    paced.delay = 0.02

    async def scene() -> None:
        queue = ModelQueue(4)
        options = {"max_tokens": 400, "ignore_eos": True}
        stop = threading.Event(), threading.Event()
        jobs = [Job(paced._start("a", None, options, event), 1, event) for event in stop]
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


def test_an_application_can_be_started_again(llm: minflash.LLM) -> None:
    app = create_app(llm)
    asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    for _ in range(2):
        with running(llm, app=app) as server, connect(server) as client:
            assert server.get("/health")[:1] == (200,)
            assert client.chat.completions.create(**asked).usage is not None


def test_health_tells_of_a_closed_model() -> None:
    with minflash.load(TINY, device="cpu") as own, running(own) as server:
        assert server.get("/health")[0] == 200
        own.close()
        status, _, body = server.get("/health")
        assert (status, body) == (503, {"status": "closed"})


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
