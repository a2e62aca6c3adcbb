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
        return Stats(
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.tokens,
            prompt_tps=(self.prompt_tokens - engine.reused) / to_first if to_first else 0.0,
            generation_tps=(self.tokens - 1) / after if after else 0.0,
            time_to_first_token=to_first,
            peak_memory_bytes=peak_memory_bytes(engine),
            reused_tokens=engine.reused,
        )
