"""A running server for tests, and plain HTTP requests to it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from typing import Any

import openai
import uvicorn

from minflash.chunk import Chunk
from minflash.llm import LLM
from minflash.resources import resource_dir
from minflash.server import Settings, create_app

TINY = resource_dir("weights") / "tiny"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "Hello"}]


class PacedLLM:
    """An LLM whose tokens come when the test lets them, and which counts them."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.produced = 0
        self.delay = 0.0  # seconds before each token
        self.gate = threading.Event()  # nothing comes while it is clear
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def _start(self, *asked: Any) -> Generator[Chunk, None, None]:
        """Checks as the model does at the call."""
        return self._paced(self._llm._start(*asked))

    def _paced(self, chunks: Generator[Chunk, None, None]) -> Generator[Chunk, None, None]:
        with contextlib.closing(chunks):
            for chunk in chunks:
                time.sleep(self.delay)
                assert self.gate.wait(20)
                self.produced += 1
                yield chunk


class Server:
    """``url`` and what a test wants to look at."""

    def __init__(self, port: int, service: Any) -> None:
        self.port, self.url, self.service = port, f"http://127.0.0.1:{port}", service

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers, body as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, **{"Content-Type": "application/json", **headers})

    def get(self, path: str, **headers: str) -> tuple[int, Any, Any]:
        return self.request("GET", path, None, **headers)

    def request(
        self, method: str, path: str, data: bytes | None, **headers: str
    ) -> tuple[int, Any, Any]:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                status, found, content = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, found, content = error.code, error.headers, error.read()
        is_json = found.get_content_type() == "application/json"
        return status, found, json.loads(content) if is_json else content.decode()


@contextlib.contextmanager
def running(llm: Any, settings: Settings | None = None, app: Any = None) -> Iterator[Server]:
    """A server in a thread of this process, at a free port; of an ``app`` that is there already."""
    app = app or create_app(llm, settings)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Server(port, app.state.service)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 15) -> None:
    """Waits for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def connect(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20)


def tool(name: str, parameters: Any = None) -> Any:
    """The definition of a function, without parameters unless they are given."""
    function = {"name": name, **({} if parameters is None else {"parameters": parameters})}
    return {"type": "function", "function": function}


def error_of(answer: tuple[int, Any, Any]) -> tuple[int, str, str]:
    """Status, param and code of an error, which has OpenAI's four fields."""
    status, _, body = answer
    assert set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["message"]
    return status, body["error"]["param"], body["error"]["code"]
