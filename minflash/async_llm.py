"""A generation for asyncio: it runs in a thread of its own, and the event loop is never blocked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .chunk import Chunk

    Start = Callable[[threading.Event], Generator[Chunk, None, None]]


async def in_thread(start: Start) -> AsyncGenerator[Chunk, None]:
    """The chunks of ``start(cancelled)``, which is called and read in a thread.

    When the reader leaves or its task is cancelled, ``cancelled`` is set: the generation then ends
    within two steps and gives its turn to the next.
    """
    loop, cancelled = asyncio.get_running_loop(), threading.Event()
    queue: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()

    def put(item: Chunk | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def work() -> None:
        try:
            with contextlib.closing(start(cancelled)) as chunks:
                for chunk in chunks:
                    put(chunk)
                    if cancelled.is_set():
                        break
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=work, name="minflash", daemon=True).start()
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        cancelled.set()
