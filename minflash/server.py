"""The web service: OpenAI's protocol and a chat page over one loaded model (docs/server.md)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .arguments import parse
from .server_answers import SSE_END, Answer, sse
from .server_errors import ApiError, Body, api_error
from .server_http import (
    EventStream,
    JsonResponse,
    check_host,
    check_key,
    error_response,
    read_json,
    unless_gone,
)
from .server_metrics import CONTENT_TYPE, Metrics
from .server_page import load_page
from .server_protocol import (
    Generation,
    check_fields,
    parse_chat,
    parse_completion,
    parse_tokenize,
)
from .server_queue import Job, ModelQueue
from .server_tokens import TokenTexts
from .server_work import Work, prepare
from .tool_calls import CallReader

if TYPE_CHECKING:
    from .chunk import Chunk
    from .llm import LLM

Handler = Callable[[Request], Awaitable[Response]]
_log = logging.getLogger("minflash")
_CLIENT_LEFT = 499  # for the metrics; nobody reads the answer


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    api_key: str | None = None  # None: everybody may ask
    queue: int = 16  # requests that may wait beside the running one
    cors: tuple[str, ...] = ()  # origins whose pages may ask; "*": all
    hosts: tuple[str, ...] = ()  # further names that this machine is asked by; "*": all
    max_request_bytes: int = 4 << 20


class Service:
    """The endpoints. One object serves one model."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm, self.settings = llm, settings
        self.model = llm.path.resolve().name if llm.path else "minflash"
        self.metrics = Metrics()
        self.queue = ModelQueue(settings.queue, self._ended)
        self._texts = TokenTexts(llm)
        self._page, self._policy = load_page()

    def routes(self) -> list[Route]:
        def route(path: str, handler: Handler, method: str, open: bool = False) -> Route:
            return Route(path, partial(self._respond, path, handler, open), methods=[method])

        return [
            route("/", self.page, "GET", open=True),
            route("/health", self.health, "GET", open=True),
            route("/metrics", self.show_metrics, "GET"),
            route("/v1/models", self.models, "GET"),
            route("/v1/models/{name:path}", self.one_model, "GET"),
            route("/v1/completions", self.completions, "POST"),
            route("/v1/chat/completions", self.chat, "POST"),
            route("/tokenize", self.tokenize, "POST"),
            route("/detokenize", self.detokenize, "POST"),
        ]

    async def page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": self._policy, "X-Content-Type-Options": "nosniff"}
        return Response(self._page, media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        status = "closed" if self.llm._closed else "ok"
        status = "shutting down" if self.queue.closing else status
        return JsonResponse({"status": status}, status_code=200 if status == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        self.metrics.set("minflash_queue_length", self.queue.waiting)
        self.metrics.set("minflash_running", self.queue.running)
        return Response(self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JsonResponse(self._model())

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, parse_chat(await self._body(request)))

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, parse_completion(await self._body(request)))

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        asked, special = parse_tokenize(body)
        self._check_model(body.get("model"))
        if isinstance(asked, str):
            work = partial(self.llm.tokenize, asked, add_bos=special)
        else:
            work = partial(self.llm.apply_chat_template, asked)
        tokens = await asyncio.to_thread(work)
        limit = self.llm.max_context
        return JsonResponse({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        check_fields(body, ("model", "tokens"))
        self._check_model(body.get("model"))
        tokens: Any = body.get("tokens")  # checked by detokenize
        text = await asyncio.to_thread(self.llm.detokenize, tokens)
        return JsonResponse({"prompt": text})

    async def _respond(self, path: str, handler: Handler, open: bool, request: Request) -> Response:
        """The handler's response, or that of its error; counted."""
        try:
            check_host(request, self.settings.hosts)
            if not open:
                check_key(request, self.settings.api_key)
            response = await handler(request)
        except ClientDisconnect:
            response = Response(status_code=_CLIENT_LEFT)
        except Exception as error:
            response = error_response(_told(error, path))
        labels = {"path": path, "status": str(response.status_code)}
        self.metrics.add("minflash_requests_total", labels=labels)
        return response

    async def _body(self, request: Request) -> Body:
        return await read_json(request, self.settings.max_request_bytes)

    def _model(self) -> Body:
        limit = self.llm.max_context
        return {
            "id": self.model,
            "object": "model",
            "created": 0,
            "owned_by": "minflash",
            "max_model_len": limit,
        }

    def _check_model(self, name: Any) -> None:
        if name not in (None, self.model, "default"):
            raise ApiError(
                404,
                f"there is no model {name!r:.100} here; this server has {self.model!r}, "
                "also called 'default'",
                param="model",
                code="model_not_found",
            )

    async def _generate(self, request: Request, asked: Generation) -> Response:
        self._check_model(asked.model)
        self.queue.check_room()  # before any work
        cancelled = threading.Event()
        work = await asyncio.to_thread(prepare, self.llm, asked, cancelled)
        answer = self._answer(asked, work)
        job = Job(work.chunks, work.prompt_tokens, cancelled)
        self.queue.submit(job)
        try:
            # What goes wrong before the first token is an error with a status of its own.
            wanted = _first(job) if asked.stream else _all(job)
            chunks = await unless_gone(request.receive, wanted)
        except BaseException:
            self.queue.drop(job)
            raise
        if not asked.stream:
            return JsonResponse(answer.whole(chunks, job.tokens))
        events = _events(job, answer, chunks[0], asked.include_usage)
        return EventStream(events, partial(self.queue.drop, job))

    def _answer(self, asked: Generation, work: Work) -> Answer:
        return Answer(
            self.model,
            asked.is_chat,
            work.prompt_tokens,
            self._texts.of,
            before=work.before,
            reader=self._reader(asked) if asked.tools.names else None,
            logprobs="logprobs" in asked.options,
            prompt=work.prompt,
        )

    def _reader(self, asked: Generation) -> CallReader:
        tokenizer = self.llm._need_tokenizer("calls are read from text")
        decoder = tokenizer.stream() if asked.options.get("stop") else None
        # JSON that was asked for is the answer, whatever the names of its members.
        bare = parse(asked.options).grammar is None
        return CallReader(asked.tools.names, self._special_text, decoder, bare=bare)

    def _special_text(self, token: int) -> str:
        return "" if self.llm.detokenize([token]) else self._texts.text(token)

    def _ended(self, job: Job) -> None:
        """Counts a job that has left the queue."""
        count = self.metrics
        if job.cancelled:
            count.add("minflash_generations_cancelled_total")
        if not job.started:
            return
        count.add("minflash_prompt_tokens_total", job.prompt_tokens)
        count.add("minflash_generation_tokens_total", job.tokens)
        count.observe("minflash_queue_seconds", job.started - job.submitted)
        count.observe("minflash_generation_seconds", job.ended - job.started)
        if job.first:
            count.observe("minflash_first_token_seconds", job.first - job.started)


async def _all(job: Job) -> list[Chunk]:
    return [chunk async for chunk in job]


async def _first(job: Job) -> list[Chunk]:
    return [await anext(job)]


async def _events(
    job: Job, answer: Answer, first: Chunk, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The server-sent events of an answer whose first chunk is there."""
    last = first
    try:
        for event in (answer.opening(), answer.event(first)):
            if event is not None:
                yield sse(event)
        async for last in job:
            event = answer.event(last)
            if event is not None:
                yield sse(event)
        if include_usage:
            yield sse(answer.closing(job.tokens, last.stats))
        yield SSE_END
    except Exception as error:
        yield sse(_told(error, "a stream").body())


def _told(error: Exception, place: str) -> ApiError:
    """The error as clients see it; what is not their doing goes to the log too."""
    answer = api_error(error)
    if answer is not error and answer.status >= 500:
        _log.error("%s: %s: %s", place, type(error).__name__, error, exc_info=error)
    return answer


def create_app(llm: LLM, settings: Settings | None = None) -> Starlette:
    """The ASGI application over a loaded model, which stays the caller's to close.

    ``app.state.service.queue`` tells about the queue.
    """
    service = Service(llm, settings or Settings())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if service.queue.closing:  # started a second time
            service.queue.open()
        yield
        await service.queue.close()

    middleware = []
    if service.settings.cors:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(service.settings.cors),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            )
        )
    app = Starlette(
        routes=service.routes(),
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; see docs/server.md"
    return error_response(ApiError(error.status_code, message, headers=error.headers))
