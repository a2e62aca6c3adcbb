"""One generation at a time on the model, the others waiting in order.

The model runs in a thread of its own. A job's chunks travel to the event loop and wait there for
whoever reads them, so that a client that reads slowly does not hold up the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

from .chunk import NO_TOKEN, Chunk
from .server_errors import ApiError


class Job:
    """One generation, from the queue to its last chunk. Made in the event loop."""

    def __init__(
        self,
        chunks: Generator[Chunk, None, None],
        prompt_tokens: int,
        cancelled: threading.Event | None = None,
    ) -> None:
        """``chunks`` has not begun; it will be read in the model's thread. ``cancelled`` is the
        event that ends this generation and no other, also while it reads its prompt.
        """
        self.prompt_tokens = prompt_tokens
        self.tokens = 0  # made so far
        self.submitted = time.perf_counter()
        self.started = self.first = self.ended = 0.0  # 0: not yet
        self._chunks = chunks
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()
        self._cancelled = cancelled or threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stops the generation after the token it is at, or before it has begun."""
        self._cancelled.set()

    def __aiter__(self) -> Job:
        """The chunks as they come, for one reader; raises what the generation raised."""
        return self

    async def __anext__(self) -> Chunk:
        item = await self._items.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def run(self) -> None:
        """Generates; in the model's thread."""
        self.started = time.perf_counter()
        try:
            if not self.cancelled:
                self._generate()
        except BaseException as error:
            self.post(error)
        finally:
            self.ended = time.perf_counter()
            self.post(None)

    def _generate(self) -> None:
        with contextlib.closing(self._chunks):
            for chunk in self._chunks:
                self.first = self.first or time.perf_counter()
                self.tokens += chunk.token != NO_TOKEN
                self.post(chunk)
                if self.cancelled:
                    return

    def post(self, item: Chunk | BaseException | None) -> None:
        """Hands something to the reader, from any thread; None is the end."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


class ModelQueue:
    """Runs jobs one after the other. All methods belong to the event loop's thread."""

    def __init__(self, limit: int, ended: Callable[[Job], None] = lambda job: None) -> None:
        """``limit``: jobs that may wait beside the running one; ``ended`` hears of each end."""
        self.limit = limit
        self._ended = ended
        self.open()
        self._usual = 1.0  # seconds of a job, a running mean

    def open(self) -> None:
        """Takes jobs; again after ``close``, when an application is started a second time."""
        self.closing = False
        self._futures: dict[Job, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, "minflash-model")

    @property
    def running(self) -> int:
        return sum(future.running() for future in self._futures.values())

    @property
    def waiting(self) -> int:
        return len(self._futures) - self.running

    def check_room(self) -> None:
        """Raises ApiError unless a job may come: 429 when the queue is full, 503 at the end."""
        if self.closing:
            raise _closing()
        if len(self._futures) > self.limit:
            seconds = str(self._retry_after())
            raise ApiError(
                429,
                f"{self.limit} requests are waiting already, which is the limit; "
                f"try again in {seconds} s",
                type="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": seconds},
            )

    def submit(self, job: Job) -> None:
        """Puts a job at the end. Raises ApiError as ``check_room``."""
        self.check_room()
        future = self._futures[job] = self._thread.submit(job.run)
        loop = asyncio.get_running_loop()

        def done(future: Future[None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._remove, job)

        future.add_done_callback(done)

    def drop(self, job: Job) -> None:
        """Stops a job, or takes it out of the queue; nothing happens to one that has ended."""
        future = self._futures.get(job)
        if future is not None and not job.ended:
            job.cancel()
            future.cancel()

    def refuse(self) -> None:
        """From now on new jobs and waiting ones are refused; what runs goes on."""
        self.closing = True
        for job, future in list(self._futures.items()):
            if future.cancel():
                job.cancel()
                job.post(_closing())

    async def close(self, grace: float = 0.0) -> None:
        """Refuses what waits, gives what runs ``grace`` seconds, stops it, ends the thread."""
        self.refuse()
        end = time.perf_counter() + grace
        while self._futures and time.perf_counter() < end:
            await asyncio.sleep(0.02)
        for job in self._futures:
            job.cancel()
            job.post(_closing())
        await asyncio.to_thread(self._thread.shutdown)

    def _remove(self, job: Job) -> None:
        self._futures.pop(job, None)  # of an earlier start it is not here
        if job.started:
            self._usual += (job.ended - job.started - self._usual) / 4
        self._ended(job)

    def _retry_after(self) -> int:
        return min(60, max(1, round(self._usual * len(self._futures))))


def _closing() -> ApiError:
    return ApiError(503, "the server is shutting down", type="server_error", code="shutting_down")
