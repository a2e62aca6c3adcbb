"""Choosing a token: samplings, a history, and what a choice and its report must be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from minflash.sampling import (
    Sampling,
    gumbel,
    log_probabilities,
    philox4x32,
    random_bits,
    sample,
    threshold,
)

PROMPT = [5, 77, 300, 12, 9, 250, 31, 8, 119, 64]
ANSWER = [7, 7, 300, 330, 7]
ENDS = frozenset({0, 15, 330})
BIAS = ((0, 3.5), (9, -100.0), (64, 1.25), (330, 2.0))
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
DRAWS = {
    "greedy": Sampling(),
    "temperature": Sampling(0.9, seed=11),
    "top_k": Sampling(1.1, top_k=12, seed=12),
    "top_p": Sampling(1.0, top_p=0.8, seed=13),
    "min_p": Sampling(1.0, min_p=0.05, seed=14),
    "filters": Sampling(1.3, top_k=60, top_p=0.9, min_p=0.02, seed=15),
}
SAMPLINGS = {
    "temperature": Sampling(temperature=0.8),
    "top_k": Sampling(temperature=1.0, top_k=5),
    "top_k 1": Sampling(temperature=1.0, top_k=1),
    "top_k beyond the vocabulary": Sampling(temperature=1.3, top_k=5000),
    "top_p": Sampling(temperature=1.0, top_p=0.7),
    "top_p of one token": Sampling(temperature=0.5, top_p=1e-6),
    "min_p": Sampling(temperature=1.5, min_p=0.1),
    "min_p 1": Sampling(temperature=1.5, min_p=1.0),
    "top_k and top_p": Sampling(temperature=2.0, top_k=20, top_p=0.9),
    "all": Sampling(temperature=1.2, top_k=50, top_p=0.95, min_p=0.02),
}


def assert_sampled(token: int, logits: np.ndarray, sampling: Sampling, position: int) -> None:
    """The token is the specification's, or their difference is within the last bits of log and exp.

    One unit in the last place of a log or exp moves a score, or a threshold, by less than 1e-5.
    """
    if token == sample(logits, sampling, position):
        return
    scaled = logits / np.float32(sampling.temperature)
    assert sampling.seed is not None
    bits = random_bits(np.arange(-(-logits.size // 4), dtype=np.uint32), position, sampling.seed)
    scores = scaled + gumbel(bits.reshape(-1)[: logits.size])
    limit = threshold(scaled, sampling)
    surely_kept = scaled >= limit + 1e-5
    assert scaled[token] >= limit - 1e-5
    assert scores[token] >= scores[surely_kept].max(initial=-np.inf) - 1e-5


def draws(logits: np.ndarray, sampling: Sampling, n: int) -> np.ndarray:
    """``sample`` for the positions 0 to n - 1 at once; the first ones are compared with it."""
    scaled = logits / np.float32(sampling.temperature)
    scores = np.where(scaled >= threshold(scaled, sampling), scaled, np.float32(-np.inf))
    blocks = -(-scores.size // 4)
    counters = np.zeros((n, blocks, 4), np.uint32)
    counters[:, :, 0], counters[:, :, 1] = np.arange(blocks), np.arange(n)[:, None]
    words = philox4x32(counters.reshape(-1, 4), (sampling.seed & 0xFFFFFFFF, sampling.seed >> 32))
    tokens = np.argmax(scores + gumbel(words.reshape(n, -1)[:, : scores.size]), axis=1)
    assert tokens[:300].tolist() == [sample(logits, sampling, place) for place in range(300)]
    return tokens


def bits_of(allowed: np.ndarray) -> np.ndarray:
    """bool [vocab_size] -> uint32 [vocab_size / 32, rounded up]."""
    padded = np.pad(allowed, (0, -allowed.size % 32))
    return np.packbits(padded, bitorder="little").view(np.uint32)


def assert_report(
    report: tuple[float, Sequence[tuple[int, float]]], logits: np.ndarray, token: int, n: int
) -> None:
    """Tokens are exact; float32 sums of the specification are within 1e-5."""
    logprob, likeliest = report
    expected, best = log_probabilities(logits), np.argsort(-logits, kind="stable")[:n]
    assert logprob == pytest.approx(float(expected[token]), abs=1e-5)
    assert [token for token, _ in likeliest] == best.tolist()
    assert [value for _, value in likeliest] == pytest.approx(expected[best].tolist(), abs=1e-5)
