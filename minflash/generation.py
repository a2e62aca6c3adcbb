"""One generation: from the engine's tokens to chunks of text, and why it ended."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .choosing import Chooser, Constraint
from .chunk import NO_TOKEN, Chunk, Clock
from .notice import logger
from .sampling import Sampling
from .stopping import TextStream

if TYPE_CHECKING:
    from .engine import Engine
    from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """A generation that was checked and can run."""

    prompt: Sequence[int]
    count: int  # tokens at most
    sampling: Sampling
    ends: frozenset[int]  # tokens that end the text
    stop: tuple[str, ...] = ()
    before: Sequence[int] = ()  # tokens that decide whether the first word keeps its space
    constraint: Constraint | None = None
    logprobs: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def chooser(self, sampling: Sampling) -> Chooser | None:
        """Chooses with the answer's history, where an option needs it."""
        if self.constraint is None and self.logprobs is None and not sampling.adjusts:
            return None
        return Chooser(
            sampling,
            self.prompt,
            ends=self.ends,
            constraint=self.constraint,
            logprobs=self.logprobs,
        )


def run(
    engine: Engine, tokenizer: Tokenizer | None, job: Job, clock: Clock
) -> Generator[Chunk, None, None]:
    """The chunks of a job, the last with the reason and the figures."""
    sampling = job.sampling.seeded()
    chooser = job.chooser(sampling)
    text = TextStream(tokenizer.stream(job.before) if tokenizer else None, job.stop)
    tokens = engine.tokens(
        job.prompt, sampling, job.count, choose=chooser, cancelled=job.cancelled.is_set
    )
    try:
        for token in tokens:
            clock.tick()
            piece = "" if token in job.ends else text.push(token)
            reason = _reason(job, token, clock.tokens, text.stopped, chooser)
            logprob = chooser.logprob if chooser else None
            top = chooser.top_logprobs if chooser else None
            if reason is None:
                yield Chunk(piece, token, logprob, top)
                continue
            if reason == "length" and job.constraint is not None:
                logger.warning(
                    "the answer was cut after %d tokens, before its grammar was complete; give it "
                    "a larger max_tokens",
                    job.count,
                )
            piece, stats = piece + text.flush(), clock.stats(engine)
            yield Chunk(piece, token, logprob, top, finish_reason=reason, stats=stats)
            return
        # Cancelled before the first token, or between two.
        stats = clock.stats(engine)
        yield Chunk(text.flush(), NO_TOKEN, finish_reason="cancelled", stats=stats)
    finally:
        tokens.close()


def _reason(
    job: Job, token: int, tokens: int, stopped: bool, chooser: Chooser | None
) -> str | None:
    if token in job.ends or stopped or (chooser is not None and chooser.finished):
        return "stop"
    if tokens == job.count:
        return "length"
    return "cancelled" if job.cancelled.is_set() else None
