"""How likely a text is to a model, and its embedding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError
from .sampling import log_probabilities

POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class Score:
    """Log-probabilities (natural) of a text's tokens, each given those before it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...]  # None for the first, which nothing precedes

    @property
    def total(self) -> float:
        """The sum: the log-probability of all that follows the first token."""
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; NaN when there is only one token."""
        count = len(self.tokens) - 1
        return math.exp(-self.total / count) if count else math.nan


def score(tokens: Sequence[int], parts: Iterable[NDArray[np.float32]]) -> Score:
    """The score of ``tokens``, from their logits in parts [n, vocab_size]."""
    found: list[float | None] = [None]
    for logits in parts:
        following = np.array(tokens[len(found) : len(found) + len(logits)], np.int64)
        logprobs = log_probabilities(logits[: len(following)])
        found += np.take_along_axis(logprobs, following[:, None], axis=1)[:, 0].tolist()
    return Score(tuple(tokens), tuple(found))


def pool(hidden: NDArray[np.float32], pooling: str) -> NDArray[np.float32]:
    """[n, dim] -> [dim]: the mean of all tokens or the last one, scaled to length 1."""
    vector = hidden.mean(axis=0) if pooling == "mean" else hidden[-1]
    length = np.linalg.norm(vector)
    return np.asarray(vector / length if length else vector, dtype=np.float32)


def text_or_list(text: Any) -> Any:
    """What to embed: one text as it is, several or token ids as a list, of one kind.

    Raises ArgumentError for what is none of these, or nothing at all.
    """
    if isinstance(text, str):
        return text
    listed = isinstance(text, Iterable) and not isinstance(text, (bytes, Mapping))
    given = list(text) if listed else []
    if not given:
        raise ArgumentError(
            "embed takes a string, a list of strings or a list of token ids, none of them empty, "
            f"found {text!r:.60}"
        )
    if len({isinstance(one, str) for one in given}) > 1:
        raise ArgumentError(f"embed takes strings or token ids, not both, found {given!r:.60}")
    return given


def check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise ArgumentError(f"pooling must be one of {', '.join(POOLINGS)}, found {pooling!r}")
