"""Choosing tokens on the host: for what a kernel does not do in its own tail.

An engine gives a chooser the logits of every step. That is correct on all devices and slower on a
GPU, which has to wait for the host before each step.
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

    def allowed(self) -> NDArray[np.bool_]:
        """bool [vocab_size]"""
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
        self._sampling, self._prompt, self._ends = sampling, prompt, ends
        self._constraint, self._logprobs = constraint, logprobs
        self._answer: list[int] = []
        self.logprob: float | None = None  # of the token that was chosen last
        self.top_logprobs: TopLogprobs | None = None

    @property
    def finished(self) -> bool:
        """The grammar, if there is one, is complete."""
        return self._constraint is not None and self._constraint.finished

    def __call__(self, logits: NDArray[np.float32], position: int) -> int:
        """The token for place ``position`` of the sequence, from ``logits`` [vocab_size]."""
        allowed = self._constraint.allowed() if self._constraint is not None else None
        scores = adjusted(logits, self._sampling, self._prompt, self._answer, self._ends, allowed)
        if np.isneginf(scores).all() and not np.isneginf(logits).all():
            raise MinflashError(
                f"no token is allowed at position {position}: the grammar and min_tokens or "
                "logit_bias exclude each other; leave one of them out"
            )
        token = sample(scores, self._sampling, position)
        self._answer.append(token)
        if self._constraint is not None and token not in self._ends:
            self._constraint.accept(token)
        if self._logprobs is not None:
            self._note(log_probabilities(np.asarray(logits, np.float32)), token, self._logprobs)
        return token

    def _note(self, logprobs: NDArray[np.float32], token: int, n: int) -> None:
        best = np.argsort(-logprobs, kind="stable")[:n]
        self.logprob = float(logprobs[token])
        self.top_logprobs = tuple((int(t), float(logprobs[t])) for t in best)
