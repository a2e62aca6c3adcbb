"""``minflash serve``: the web service as a program. It needs the extra "server"."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, MinflashError
from .generation_cli import add_model_arguments

if TYPE_CHECKING:
    from .llm import LLM

GRACE_SECONDS = 10.0  # for what runs when the server is told to stop
_CONNECTION_SECONDS = 5  # then, for clients that do not read their answers
EPILOG = """examples:
  minflash serve
  minflash serve -m ./my-model --port 9000 --api-key "$KEY"
  curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
       -d '{"messages": [{"role": "user", "content": "Hello"}]}'

The chat page is at http://127.0.0.1:8000/ and the protocol is OpenAI's; see docs/server.md.

environment:
  MINFLASH_API_KEY    the key, where the command line should not show it
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``serve`` to ``parser``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    add("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    add("--api-key", metavar="KEY", help="what clients must send (default: nothing)")
    add("--queue", type=int, default=16, metavar="N", help="requests that may wait (default: 16)")
    add(
        "--cors",
        action="append",
        metavar="ORIGIN",
        help="let pages of this origin ask; * is all (may be repeated; default: none)",
    )
    add(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="answer to this host name too, where clients of this machine, as a proxy, send it; "
        "* is all (may be repeated; addresses and localhost always pass)",
    )
    add(
        "--max-request-bytes",
        type=int,
        default=4 << 20,
        metavar="N",
        help="size limit of a request (default: 4 MiB)",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C or SIGTERM; returns the exit code."""
    _check(args)
    _need_packages()
    from .loading import load
    from .server import Settings

    settings = Settings(
        api_key=args.api_key or os.environ.get("MINFLASH_API_KEY") or None,
        queue=args.queue,
        cors=tuple(args.cors or ()),
        hosts=tuple(args.allow_host or ()),
        max_request_bytes=args.max_request_bytes,
    )
    with (
        _bound_socket(args.host, args.port) as bound,
        load(args.model, device=args.device, max_context=args.max_context) as llm,
    ):
        llm.tokenize("")  # a model without a tokenizer cannot serve text: say so now
        _announce(llm, bound, settings)
        asyncio.run(_serve(llm, settings, bound))
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, least, most in (("port", 0, 65535), ("queue", 0, 10**6)):
        if not least <= getattr(args, name) <= most:
            raise ArgumentError(
                f"--{name} must be from {least} to {most}, found {getattr(args, name)}"
            )
    if args.api_key == "":  # an unset variable of a shell must not open the server
        raise ArgumentError("--api-key is empty; leave it out to serve everybody")
    if args.max_request_bytes < 1:
        raise ArgumentError(
            f"--max-request-bytes must be at least 1, found {args.max_request_bytes}"
        )


def _need_packages() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MinflashError(
            f'minflash serve needs {error.name}: pip install "minflash[server]"'
        ) from error


def _bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen before the model is there."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        raise MinflashError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; "
            "choose another --port or --host (--port 0 takes any free port)"
        ) from error


def _announce(llm: LLM, bound: socket.socket, settings: Any) -> None:
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    name = llm.path.resolve().name if llm.path else "a model"
    print(
        f"minflash: {name} on {llm.device} at http://{shown}:{port} (Ctrl-C ends)", file=sys.stderr
    )
    if settings.api_key is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        print(
            "minflash: everybody who reaches this address can use it: --api-key asks for a key",
            file=sys.stderr,
        )
    sys.stderr.flush()


async def _serve(llm: LLM, settings: Any, bound: socket.socket) -> None:
    import uvicorn

    from .server import create_app

    app = create_app(llm, settings)
    queue = app.state.service.queue

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """As uvicorn's, but the signals are not raised again: the model is to be closed."""
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
            yield

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            closing = asyncio.create_task(queue.close(GRACE_SECONDS))
            while not (closing.done() or self.force_exit):  # polled: uvicorn sets a flag
                await asyncio.sleep(0.02)
            await queue.close()  # a second Ctrl-C waits no longer
            await super().shutdown(sockets)
            if self.force_exit:  # uvicorn leaves this out then
                await self.lifespan.shutdown()

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CONNECTION_SECONDS,
    )
    await Server(config).serve(sockets=[bound])
