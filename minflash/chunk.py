"""What a stream yields, and what a generation took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .memory import peak_memory_bytes

if TYPE_CHECKING:
    from .engine import Engine


NO_TOKEN = -1


@dataclass(frozen=True)
class Stats:
    """What one generation took. Rates are in tokens per second."""

    prompt_tokens: int
    generation_tokens: int  # the end-of-text token included
    prompt_tps: float  # prompt tokens that were read by the time to the first token
    generation_tps: float  # tokens after the first by the time after the first; 0 with one token
    time_to_first_token: float  # seconds
    peak_memory_bytes: int  # on the CPU: the largest size this process had so far
    reused_tokens: int = 0  # of the prompt: in the cache already, and not read again
    gb_per_s: float | None = None  # read from the GPU's memory after the first token; CPU: None
    percent_of_bus: float | None = None  # of what the card's memory clock and width allow


@dataclass(frozen=True)
class Chunk:
    """One token of a stream, and the text that it made certain (often none, or several tokens')."""

    text: str
    token: int  # NO_TOKEN in the last chunk of a generation that was cancelled before its next one
    logprob: float | None = None  # log-probability of the token, with logprobs=n
    top_logprobs: tuple[tuple[int, float], ...] | None = None  # n tokens, the likeliest first
    finish_reason: str | None = None  # of the last chunk: "stop", "length" or "cancelled"
    stats: Stats | None = None  # of the last chunk


class Clock:
    """Counts the tokens of one generation and when they came."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.tokens = 0
        self._stats: Stats | None = None
        self._begin = self._first = self._last = time.perf_counter()

    def tick(self) -> None:
        self._last = time.perf_counter()
        if self.tokens == 0:
            self._first = self._last
        self.tokens += 1

    def stats(self, engine: Engine) -> Stats:
        """The sums, made at the first call: the last chunk and last_stats are then the same."""
        if self._stats is None:
            self._stats = self._sums(engine)
        return self._stats

    def _sums(self, engine: Engine) -> Stats:
        to_first, after = self._first - self._begin, self._last - self._first
        rate = (self.tokens - 1) / after if after else 0.0
        gb_per_s, percent = self._bandwidth(engine, rate)
        return Stats(
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.tokens,
            prompt_tps=(self.prompt_tokens - engine.reused) / to_first if to_first else 0.0,
            generation_tps=rate,
            time_to_first_token=to_first,
            peak_memory_bytes=peak_memory_bytes(engine),
            reused_tokens=engine.reused,
            gb_per_s=gb_per_s,
            percent_of_bus=percent,
        )

    def _bandwidth(self, engine: Engine, rate: float) -> tuple[float | None, float | None]:
        """At the position in the middle of the answer."""
        bandwidth = getattr(engine, "bandwidth", None)  # of a GPU
        if bandwidth is None or not rate:
            return None, None
        found: tuple[float, float | None] = bandwidth(rate, self.prompt_tokens + self.tokens // 2)
        return found
