"""A web service of one's own: POST /complete {"prompt": "..."} streams text, GET /health answers.

pip install starlette uvicorn
MINFLASH_MODEL=path/to/model uvicorn --app-dir examples web_service:app
curl -N http://127.0.0.1:8000/complete -d '{"prompt": "Once upon a time", "max_tokens": 50}'

For the interface of OpenAI there is ``minflash serve``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import minflash

ALLOWED = ("max_tokens", "temperature", "top_p", "seed", "stop")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    with minflash.load(progress=False) as llm:
        app.state.llm = llm
        yield


async def complete(request: Request) -> Response:
    try:
        body = await request.json()
        prompt = body["prompt"]
        options = {name: body[name] for name in ALLOWED if name in body}
        chunks = request.app.state.llm.astream(prompt, **options)
        first = await anext(chunks)  # what is wrong with the request is raised here
    except (KeyError, TypeError, ValueError, minflash.MinflashError) as error:
        return JSONResponse({"error": str(error)}, status_code=400)

    async def text() -> AsyncIterator[str]:
        yield first.text
        async for chunk in chunks:  # a client that leaves ends this, and the generation with it
            yield chunk.text

    return StreamingResponse(text(), media_type="text/plain; charset=utf-8")


async def health(request: Request) -> Response:
    llm = request.app.state.llm
    return JSONResponse({"device": llm.device, "max_context": llm.max_context})


app = Starlette(
    routes=[Route("/complete", complete, methods=["POST"]), Route("/health", health)],
    lifespan=lifespan,
)
