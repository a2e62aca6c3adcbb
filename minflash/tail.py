"""What a step's tail is told beside the sampling, and tells: cuda/adjust.cuh, cuda/decide.cuh."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .sampling import MAX_LOGPROBS, Sampling

if TYPE_CHECKING:
    from .choosing import TopLogprobs

NO_TOKEN = 0xFFFFFFFF  # what a step chooses when no logit is a number
EXCLUDED = 0xFFFFFFFE  # and when all tokens are excluded, or all logits are -inf
IN_PROMPT, ENDS_ANSWER = 1 << 31, 1 << 30  # of a token's word; the bits below count it
_DENOMINATOR_BITS = 44  # behind the point of a report's total

REPORT = np.dtype([
    ("total", "u8"), ("top", "f4"), ("chosen", "f4"),
    ("likeliest", [("token", "u4"), ("logit", "f4")], (MAX_LOGPROBS,)),
])  # fmt: skip


@dataclass(frozen=True)
class Extras:
    """What one step does beside plain sampling. The default costs nothing."""

    adjust: bool = False  # biases and penalties, by the words that were noted for the tokens
    ban_ends: bool = False  # min_tokens: what ends the answer is excluded
    mask: NDArray[np.uint32] | None = None  # [vocab_size / 32, up]: a bit for each allowed token
    logprobs: int | None = None  # report the chosen token's, and those of so many of the likeliest


PLAIN = Extras()


def noted_tokens(
    vocab_size: int,
    sampling: Sampling,
    prompt: Sequence[int],
    answer: Sequence[int] = (),
    ends: Collection[int] = (),
) -> NDArray[np.uint32]:
    """The word and the bias of every token, uint32 [vocab_size, 2]; a bias is a float32's bits."""
    noted = np.zeros((vocab_size, 2), np.uint32)
    noted[:, 0] = np.bincount(np.asarray(answer, np.int64), minlength=vocab_size)
    noted[list(prompt), 0] |= np.uint32(IN_PROMPT)
    noted[list(ends), 0] |= np.uint32(ENDS_ANSWER)
    for token, bias in sampling.logit_bias:
        noted[token, 1:].view(np.float32)[:] = bias
    return noted


def read_report(report: Any, n: int) -> tuple[float, TopLogprobs]:
    """Log-probability of the chosen token, and (token, log-probability) of the n likeliest."""
    rest = math.log(int(report["total"])) - _DENOMINATOR_BITS * math.log(2)

    def logprob(logit: np.float32) -> float:
        return float(np.float32(float(logit - report["top"]) - rest))

    best = report["likeliest"][:n]
    likeliest = tuple((int(token), logprob(logit)) for token, logit in best)
    return logprob(report["chosen"]), likeliest
