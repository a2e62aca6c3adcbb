"""HTTP around the model: bodies with a limit, keys, errors as JSON, streams that notice the end."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import re
import socket
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .server_answers import to_json
from .server_errors import ApiError, Body

Result = TypeVar("Result")

# RFC 6761, and the domain kept for private networks, which containers call their machine by.
_LOCAL_NAMES = (".localhost", ".internal")


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def error_response(error: ApiError) -> Response:
    return JsonResponse(error.body(), status_code=error.status, headers=error.headers)


def check_key(request: Request, key: str | None) -> None:
    """Raises ApiError unless the request brings the key; no key means that none is asked for."""
    if key is None:
        return
    given = request.headers.get("authorization", "").encode("latin-1")
    # compare_digest takes the same time wherever the difference lies.
    if not hmac.compare_digest(given, b"Bearer " + key.encode()):
        raise ApiError(
            401,
            "a valid API key is needed: send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def check_host(request: Request, allowed: Collection[str]) -> None:
    """Raises ApiError when a connection within this machine was meant for a name elsewhere.

    Whoever owns a name can let it lead to 127.0.0.1. A browser then takes this server for the site
    of their page, and lets the page ask and read (DNS rebinding). Addresses lead nowhere else, and
    nobody owns the names that are kept for local use.
    """
    address = request.scope.get("server") or ("", None)
    if not _is_loopback(address[0]) or "*" in allowed:
        return
    host = request.headers.get("host", "")
    name = re.sub(r":[0-9]*$", "", host).strip("[]").rstrip(".").lower()
    known = {"localhost", socket.gethostname().lower(), *map(str.lower, allowed)}
    if name in known or name.endswith(_LOCAL_NAMES) or _is_address(name):
        return
    raise ApiError(
        403,
        f"this server answers to localhost and to addresses, not to the host {host!r:.100}; "
        "start it with --allow-host NAME if that is a name of this machine",
        code="host_not_allowed",
    )


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False


def _is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback
    return False


async def read_json(request: Request, limit: int) -> Body:
    """The body as a JSON object. Raises ApiError: 413 above ``limit`` bytes, 415, 400."""
    # A page of another site can send other types here without asking; JSON makes a browser ask.
    media_type = request.headers.get("content-type", "").partition(";")[0]
    if media_type.strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    data = await _read(request, limit)
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body


async def _read(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "0")
    data = bytearray()
    if int(length) <= limit:  # the HTTP parser let digits pass only
        async for piece in request.stream():
            data += piece
            if len(data) > limit:
                break
        else:
            return bytes(data)
    raise ApiError(
        413,
        f"the request has more than {limit} bytes; shorten it, or start the server with a larger "
        "--max-request-bytes",
        code="request_too_large",
        headers={"Connection": "close"},  # what is left of the body is not read
    )


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client leaves (ClientDisconnect)."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; ``ended`` is called at the end, also when the client leaves early."""

    def __init__(self, events: AsyncGenerator[bytes, None], ended: Callable[[], None]) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._events, self._ended = events, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect, OSError):
                await unless_gone(receive, self._send(send))
        finally:
            self._ended()
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
