"""What the web service refuses before a request waits: what the model cannot do, foreign hosts."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from web_server import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    PacedLLM,
    Server,
    error_of,
    running,
    until,
)

import minflash
from minflash.server import Settings


@pytest.fixture(scope="module")
def busy(llm: minflash.LLM) -> Any:
    """A server whose model is at work, so that nothing else gets its turn."""
    paced = PacedLLM(llm)
    paced.gate.clear()
    with running(paced) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.post, CHAT, {"messages": MESSAGES, "max_tokens": 2})
        until(lambda: server.service.queue.running)
        yield server
        paced.gate.set()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regex": "("}, "regex"),
        ({"grammar": "start: missing"}, "grammar"),
        ({"response_format": {"type": "json_schema", "schema": {"$ref": "#/a"}}}, None),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}, "regex": "a"}, "logit_bias"),
    ],
)
def test_what_the_model_cannot_do_is_refused_at_once(
    busy: Server, fields: Any, param: str | None
) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    param = param or next(iter(fields))
    for path, asked in ((CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": "a"})):
        found = error_of(busy.post(path, {**asked, **fields}))
        assert found == (400, param, "invalid_value")
    assert busy.service.queue.running == 1


def test_without_llguidance_a_form_is_unsupported(
    llm: minflash.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "_grammars", None)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with running(llm) as server:
        answer = server.post(COMPLETIONS, {"prompt": "a", "regex": "a"})
        assert error_of(answer) == (400, "regex", "unsupported_parameter")
        assert "pip install" in answer[2]["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "Hi", "messages": MESSAGES}, "prompt"),
        ({"messages": MESSAGES, "add_special_tokens": False}, "add_special_tokens"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "Hi", "add_special_tokens": "no"}, "add_special_tokens"),
        ({"prompt": "Hi", "add_special_tokens": 0}, "add_special_tokens"),
        ({"prompt": 5}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_tokenize_ignores_nothing(server: Server, fields: Any, param: str) -> None:
    assert error_of(server.post("/tokenize", fields)) == (400, param, "invalid_value")


def test_tokenize_without_special_tokens(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        server.service.llm, "tokenize", lambda text, add_bos: [asked.append(add_bos)]
    )
    for value in (True, False, None):
        server.post("/tokenize", {"prompt": "Hi", "messages": None, "add_special_tokens": value})
    assert asked == [True, False, True]


def test_media_types_are_case_insensitive(server: Server) -> None:
    for media_type in ("Application/JSON", "application/JSON ; charset=UTF-8"):
        headers = {"Content-Type": media_type}
        assert server.post("/tokenize", {"prompt": "a"}, **headers)[0] == 200
    assert error_of(server.post("/tokenize", {}, **{"Content-Type": "text/json"}))[0] == 415


@pytest.mark.parametrize(
    "host",
    ["page.example", "page.example:80", "127.0.0.1.page.example", "localhost.page.example", ""],
)
def test_a_page_cannot_ask_under_its_own_name(server: Server, host: str) -> None:
    """Its name may lead here (DNS rebinding), and to a browser this is then the page's own site."""
    headers = {"Host": host, "Origin": f"http://{host}"}
    asked = server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1}, **headers)
    assert error_of(asked) == (403, None, "host_not_allowed")
    for path in ("/", "/health", "/metrics", "/v1/models"):
        assert error_of(server.get(path, **headers))[0] == 403


def test_hosts_that_may_ask(server: Server, llm: minflash.LLM) -> None:
    names = ("localhost", "LOCALHOST:8000", "localhost.", "a.localhost", "host.docker.internal:80")
    addresses = ("127.0.0.1:1", "127.0.1.1", "[::1]:8000", "[::1]", "0.0.0.0:8000", "192.168.1.5")
    for host in (*names, *addresses, socket.gethostname()):
        assert server.get("/health", Host=host)[0] == 200, host
    with running(llm, Settings(hosts=("Chat.example",))) as other:
        assert other.get("/health", Host="chat.example:443")[0] == 200
        assert other.get("/health", Host="localhost")[0] == 200
        assert other.get("/health", Host="page.example")[0] == 403
    with running(llm, Settings(hosts=("*",))) as anybody:
        assert anybody.get("/health", Host="page.example")[0] == 200


def test_from_other_machines_any_name_will_do() -> None:
    from starlette.requests import Request

    from minflash.server_http import check_host

    scope: Any = {"type": "http", "headers": [(b"host", b"box.example")]}
    for address in (("192.168.1.5", 8000), ("/run/socket", None), None):
        check_host(Request({**scope, "server": address}), ())
