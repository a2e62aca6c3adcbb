"""Choosing the tokens of one answer with its history: penalties, masks, log-probabilities.

The CPU engine gives a chooser the logits of every step. The step kernel does the same in its tail
and tells the chooser what it took.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import MinflashError
from .sampling import Sampling, adjusted, log_probabilities, sample

if TYPE_CHECKING:
    TopLogprobs = tuple[tuple[int, float], ...]  # (token id, log-probability), the likeliest first


class Constraint(Protocol):
    """Which tokens may come next, as a grammar says."""

    @property
    def finished(self) -> bool:
        """Nothing but the end may follow."""
        ...

    def bits(self) -> NDArray[np.uint32]:
        """uint32 [vocab_size / 32, rounded up]: the lowest bit first, set for allowed tokens."""
        ...

    def accept(self, token: int) -> None: ...


class Chooser:
    """Chooses the tokens of one answer: ``adjusted`` and ``sample`` with their history."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        ends: Collection[int] = (),
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> None:
        """sampling: seeded. ends: tokens that end the answer. logprobs: see ``Options``."""
        self.sampling, self.prompt, self.ends = sampling, prompt, ends
        self.constraint, self.asked = constraint, logprobs
        self.answer: list[int] = []
        self.logprob: float | None = None  # of the token that was chosen last
        self.top_logprobs: TopLogprobs | None = None

    @property
    def finished(self) -> bool:
        """The grammar, if there is one, is complete."""
        return self.constraint is not None and self.constraint.finished

    def __call__(self, logits: NDArray[np.float32], position: int) -> int:
        """The token for place ``position`` of the sequence, from ``logits`` [vocab_size]."""
        allowed = None
        if self.constraint is not None:
            bits = self.constraint.bits().view(np.uint8)
            allowed = np.unpackbits(bits, bitorder="little", count=logits.size).astype(np.bool_)
        scores = adjusted(logits, self.sampling, self.prompt, self.answer, self.ends, allowed)
        if np.isneginf(scores).all() and not np.isneginf(logits).all():
            raise none_allowed(position)
        token = sample(scores, self.sampling, position)
        if self.asked is None:
            self.took(token)
        else:
            self.took(token, *_logprobs(np.asarray(logits, np.float32), token, self.asked))
        return token

    def took(
        self, token: int, logprob: float | None = None, top_logprobs: TopLogprobs | None = None
    ) -> None:
        """Goes on with a token that was chosen, here or by the kernel."""
        self.logprob, self.top_logprobs = logprob, top_logprobs
        self.answer.append(token)
        if self.constraint is not None and token not in self.ends:
            self.constraint.accept(token)


def none_allowed(position: int) -> MinflashError:
    return MinflashError(
        f"no token is allowed at position {position}: the grammar and min_tokens or "
        "logit_bias exclude each other; leave one of them out"
    )


def _logprobs(logits: NDArray[np.float32], token: int, n: int) -> tuple[float, TopLogprobs]:
    logprobs, best = log_probabilities(logits), np.argsort(-logits, kind="stable")[:n]
    return float(logprobs[token]), tuple((int(t), float(logprobs[t])) for t in best)
