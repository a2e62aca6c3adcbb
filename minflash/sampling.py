"""How the next token is chosen from the logits: documented so that every device does the same.

The CUDA kernel follows this text; results agree bit for bit except for the last bits of ``log``,
``log1p`` and ``exp``. All arithmetic is float32, rounded to nearest, unless a line says otherwise.

1. **Greedy.** A temperature below 1e-4 means argmax; of equal logits the lowest token id wins.
2. **Temperature.** ``scaled[t] = logits[t] / temperature``; ``top = max(scaled)``.
3. **Filters** are one threshold: token ``t`` is kept when ``scaled[t] >= threshold``. Each filter
   can only raise it; tokens that tie with the last one kept are kept too.

   - top_k: the k-th largest ``scaled``. 0 or -1 (or k >= vocab_size): off.
   - top_p: each token that top_k kept weighs ``floor(exp(scaled[t] - top) * 2**32)``, an integer,
     so that sums do not depend on their order. The threshold is the largest value ``v`` for which
     the weights of kept tokens with ``scaled >= v`` sum to ``ceil(top_p * total)`` or more (the
     product in float64; ``total`` is the sum over what top_k kept). 1: off.
   - min_p: ``top + log(min_p)``. 0: off.

4. **Random numbers** are counter-based: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random
   numbers: as easy as 1, 2, 3", SC 2011) with key ``(seed & 0xffffffff, seed >> 32)`` and counter
   ``(token_id // 4, position, 0, 0)``; token ``t`` takes word ``t % 4`` of the result as ``bits``.
   ``position`` is the place in the sequence of the token being chosen, counted from 0. A token's
   number depends on nothing else: not on the device, the batch or the tokens drawn before.
5. **Gumbel-max.** ``v = min((float(bits) + 0.5) * 2**-32, 1 - 2**-24)`` lies in [2**-33, 1);
   ``gumbel = -log(-log1p(-v))``; the token is the argmax of ``scaled[t] + gumbel[t]`` over kept
   tokens (lowest id at a tie), which draws from softmax(scaled) of the kept tokens. (Taking the
   logarithm at 1 - v keeps 32-bit resolution for the large Gumbel values that decide the draw.)

Before all of that the logits are adjusted, in this order (``adjusted``); by default by nothing:

a. logit_bias: ``logits[t] += bias`` for the tokens it names.
b. repetition_penalty ``r`` (off: 1), once for each token of the prompt and of the answer so far:
   ``logits[t] / r`` where that logit is positive, ``logits[t] * r`` elsewhere.
c. presence_penalty and frequency_penalty (off: 0), for each token of the answer so far, which came
   ``n`` times: ``logits[t] -= presence_penalty + n * frequency_penalty``.
d. min_tokens: as long as the answer has fewer tokens, those that would end it become -inf.
e. The mask of allowed tokens (a grammar's): all others become -inf.

A penalty that is not off may change the greedy choice too. ``log_probabilities`` are those of the
model: of the logits as they were before a to e, without temperature and filters.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, MinflashError

GREEDY_BELOW = 1e-4  # temperatures below this choose the largest logit
SEED_BITS = 64
HOTTEST = float(np.finfo(np.float32).max)  # all tokens are as likely; above it there is no float32
MAX_LOGPROBS = 100  # of the likeliest tokens, beside the chosen one's

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are greedy: no randomness at all.

    Raises ArgumentError when a value is outside its range.
    """

    temperature: float = 0.0  # >= 0; 0: always the most likely token
    top_k: int = 0  # >= 1, or 0 or -1: off
    top_p: float = 1.0  # in (0, 1]; 1: off
    min_p: float = 0.0  # in [0, 1]; 0: off
    seed: int | None = None  # in [0, 2**64); None: a fresh one for each generation
    repetition_penalty: float = 1.0  # in [0.01, 100]; 1: off; above 1: fewer repetitions
    presence_penalty: float = 0.0  # in [-100, 100]; 0: off; for tokens that the answer holds
    frequency_penalty: float = 0.0  # in [-100, 100]; 0: off; as often as the answer holds them
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added, in [-100, 100])
    min_tokens: int = 0  # >= 0; before so many tokens nothing ends the answer but a stop string

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, math.inf, "0 means greedy")
        object.__setattr__(self, "temperature", min(float(self.temperature), HOTTEST))
        _check_integer("top_k", self.top_k, -1, 2**31 - 1, "0 turns it off")
        _check_number("top_p", self.top_p, 0.0, 1.0, "1 turns it off")
        if self.top_p == 0:
            raise ArgumentError("top_p must be above 0, found 0; temperature=0 means greedy")
        _check_number("min_p", self.min_p, 0.0, 1.0, "0 turns it off")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, 2**SEED_BITS - 1, "leave it out for a random one")
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "1 turns it off")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -100.0, 100.0, "0 turns it off")
        _check_integer("min_tokens", self.min_tokens, 0, 2**31 - 1, "0 turns it off")
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))

    @property
    def adjusts(self) -> bool:
        """Whether logits are adjusted before a token is chosen, in steps a to d."""
        penalties = self.presence_penalty, self.frequency_penalty, self.min_tokens
        return bool(any(penalties) or self.repetition_penalty != 1 or self.logit_bias)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def filters(self) -> bool:
        """Whether a draw is not from all tokens."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def seeded(self) -> Sampling:
        """The same with a seed: its own, or a fresh one of 64 bits from the operating system."""
        if self.seed is not None or self.greedy:
            return self
        return replace(self, seed=secrets.randbits(SEED_BITS))


def sample(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The token id chosen from ``logits`` [vocab_size] for place ``position`` of the sequence.

    Raises MinflashError when the logits are not finite, ArgumentError when a draw has no seed.
    """
    logits = np.asarray(logits, dtype=np.float32)
    best = int(np.argmax(logits))  # the first NaN, if there is one
    if not np.isfinite(logits[best]):
        raise MinflashError(
            f"the model gave {logits[best]} as a logit (token {best}, position {position}): its "
            "weights are damaged or overflow; check the checkpoint, or convert it again"
        )
    if sampling.greedy:
        return best
    if sampling.seed is None:
        raise ArgumentError("a random draw needs a seed: use Sampling(...).seeded()")
    scaled = logits / np.float32(sampling.temperature)
    return _gumbel_argmax(scaled, scaled >= threshold(scaled, sampling), sampling.seed, position)


def adjusted(
    logits: NDArray[np.float32],
    sampling: Sampling,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    ends: Collection[int] = (),
    allowed: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Steps a to e: a copy of ``logits`` [vocab_size] as the choice sees them.

    prompt, answer: the token ids so far. ends: tokens that end an answer. allowed [vocab_size]: the
    mask of a grammar.
    """
    logits = np.array(logits, dtype=np.float32)
    for token, bias in sampling.logit_bias:
        logits[token] += np.float32(bias)
    if sampling.repetition_penalty != 1:
        seen, penalty = np.unique([*prompt, *answer]), np.float32(sampling.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens, counts = np.unique(answer, return_counts=True)
        by_count = np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
        logits[tokens] -= np.float32(sampling.presence_penalty) + by_count
    if len(answer) < sampling.min_tokens:
        logits[list(ends)] = -np.inf
    if allowed is not None:
        logits[~allowed] = -np.inf
    return logits


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """log softmax of ``logits`` [..., vocab_size], in float32 but for the sum in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total), dtype=np.float32)


def threshold(scaled: NDArray[np.float32], sampling: Sampling) -> np.float32:
    """The smallest of ``scaled`` [vocab_size] that the filters keep; -inf when all are off."""
    limit = np.float32(-np.inf)
    top = scaled.max()
    if 0 < sampling.top_k < scaled.size:
        limit = np.partition(scaled, scaled.size - sampling.top_k)[scaled.size - sampling.top_k]
    if sampling.top_p < 1.0:
        limit = _top_p_threshold(scaled[scaled >= limit], top, sampling.top_p)
    if (share := np.float32(sampling.min_p)) > 0.0:  # which may round to 0
        limit = max(limit, top + np.log(share))
    return np.float32(limit)


def _top_p_threshold(kept: NDArray[np.float32], top: np.float32, top_p: float) -> np.float32:
    descending = np.sort(kept)[::-1]
    weights = np.floor(np.exp(descending - top).astype(np.float64) * 2.0**32).astype(np.uint64)
    mass = np.cumsum(weights)
    goal = np.uint64(math.ceil(top_p * float(mass[-1])))
    return np.float32(descending[np.searchsorted(mass, goal)])


def _gumbel_argmax(
    scaled: NDArray[np.float32], kept: NDArray[np.bool_], seed: int, position: int
) -> int:
    """Step 5. Only the counters of kept tokens are computed: blocks of four tokens share one."""
    padding = -scaled.size % 4
    scores = np.where(kept, scaled, np.float32(-np.inf))
    scores = np.pad(scores, (0, padding), constant_values=-np.inf).reshape(-1, 4)
    blocks = np.flatnonzero(np.isfinite(scores).any(axis=1)).astype(np.uint32)
    noisy = scores[blocks] + gumbel(random_bits(blocks, position, seed))
    winner = int(np.argmax(noisy))
    return int(blocks[winner // 4]) * 4 + winner % 4


def random_bits(blocks: NDArray[np.uint32], position: int, seed: int) -> NDArray[np.uint32]:
    """Philox words [n, 4] for the blocks of four token ids ``blocks`` [n] (token_id // 4)."""
    counter = np.zeros((blocks.size, 4), np.uint32)
    counter[:, 0] = blocks
    counter[:, 1] = position
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10: counters [n, 4] and one key of two words -> words [n, 4]."""
    c0, c1, c2, c3 = (counter[:, word].astype(np.uint64) for word in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = _MULTIPLIER_0 * c0, _MULTIPLIER_1 * c2  # exact: 32 x 32 bits in 64
        c0 = (product_1 >> _WORD_BITS) ^ c1 ^ np.uint64(k0)
        c2 = (product_0 >> _WORD_BITS) ^ c3 ^ np.uint64(k1)
        c1, c3 = product_1 & _LOW_WORD, product_0 & _LOW_WORD
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Random words [...] -> float32 [...] of the standard Gumbel distribution, all finite."""
    v = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    v = np.minimum(v, np.float32(1.0 - 2.0**-24))
    return np.asarray(-np.log(-np.log1p(-v)), dtype=np.float32)


def _bias_pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    """Pairs or a mapping (its keys may be digits, as in JSON) -> pairs by token id."""
    way_out = "give a mapping from token ids to numbers from -100 to 100"
    try:
        items = bias.items() if isinstance(bias, Mapping) else bias
        named = {int(token) if isinstance(token, str) else token: add for token, add in items}
    except (TypeError, ValueError):
        raise ArgumentError(f"logit_bias must map tokens, found {bias!r:.60}; {way_out}") from None
    for token, add in named.items():
        _check_integer("a token id of logit_bias", token, 0, 2**31 - 1, way_out)
        _check_number(f"logit_bias of token {token}", add, -100.0, 100.0, way_out)
    return tuple(sorted((operator.index(token), float(add)) for token, add in named.items()))


def _check_number(name: str, value: object, low: float, high: float, way_out: str) -> None:
    try:
        number = float(value) if not isinstance(value, (bool, str)) else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (low <= number <= high and math.isfinite(number)):
        limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ArgumentError(f"{name} must be a number {limits}, found {value!r}; {way_out}")


def _check_integer(name: str, value: object, low: int, high: int, way_out: str) -> None:
    try:
        number = operator.index(value) if not isinstance(value, bool) else low - 1  # type: ignore[arg-type]
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        rule = f"{name} must be a whole number from {low} to {high}"
        raise ArgumentError(f"{rule}, found {value!r}; {way_out}")
