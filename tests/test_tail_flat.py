"""Filters and log-probabilities of flat distributions: thousands of tokens at the edge.

They make long lists for the block that arrives last: more tokens than it has threads, and more than
the ring's shared memory holds.
"""

from __future__ import annotations

import shutil
from functools import cache

import emulator
import numpy as np
import pytest
from kernel_models import Machine, Run, crowded_model
from sampled import assert_report
from tail_checks import check, tied_model

from minflash.sampling import Sampling, gumbel, random_bits, sample, threshold
from minflash.tail import Extras

pytestmark = pytest.mark.skipif(
    shutil.which(emulator.compiler()) is None, reason="the emulated device needs g++"
)

VOCAB = 12_000

# (temperature, top_k, top_p, min_p)
FLAT = [
    (1000.0, 0, 0.0005, 0.0),
    (1000.0, 9000, 0.0005, 0.0),
    (1000.0, 7, 1.0, 0.0),
    (1.0, 0, 0.004, 0.0),
    (1000.0, 0, 0.7, 0.0),
    (1000.0, 5000, 1.0, 0.0),
    (1000.0, 5000, 0.5, 0.9),
    (1.0, 0, 0.5, 0.0),
    (1.0, 6000, 0.9, 0.0),
]
SEEDS, POSITION = 500, 3


@cache
def noise_of_seeds() -> np.ndarray:
    """[SEEDS, VOCAB]"""
    blocks = np.arange(VOCAB // 4, dtype=np.uint32)
    seeds = range(SEEDS)
    return np.stack([gumbel(random_bits(blocks, POSITION, s)).reshape(-1) for s in seeds])


def telling_seeds(scaled: np.ndarray, n_kept: int) -> list[int]:
    """Seeds that draw a token which is among the last that are kept, or would draw one of the first
    that are not; where neither the last bits of log nor those of exp can matter."""
    ranked = np.argsort(-scaled, kind="stable")
    scores = scaled[ranked] + noise_of_seeds()[:, ranked]
    best = np.argmax(scores[:, :n_kept], axis=1)
    best_of_more = np.argmax(scores[:, : 2 * n_kept], axis=1)
    two = np.partition(scores[:, :n_kept], n_kept - 2, axis=1)[:, n_kept - 2 :]
    sure = two[:, 1] - two[:, 0] > 1e-5
    last_kept = np.where(sure & (best <= n_kept - 3), n_kept - best, VOCAB)
    first_dropped = np.where(sure & (best_of_more >= n_kept + 3), best_of_more - n_kept, VOCAB)
    return [*np.argsort(last_kept)[:4], *np.argsort(first_dropped)[:4]]


@pytest.mark.parametrize("grid", [1, 7])
def test_thousands_of_tokens_at_the_edge(machine: Machine, grid: int) -> None:
    """In one bin, with a temperature that brings all scores together, or in a few."""
    step = machine.open(crowded_model(VOCAB), Run(grid, "random"))
    step.step([3], POSITION - 1, logits=True)
    logits = step.read_logits(1)[0]
    assert np.sum(np.abs(logits - np.median(logits)) < 0.06) > 0.9 * VOCAB
    for temperature, *filters in FLAT:
        sampling = Sampling(temperature, *filters)
        scaled = logits / np.float32(temperature)
        n_kept = int(np.sum(scaled >= threshold(scaled, sampling)))
        assert 4 < n_kept < 0.9 * VOCAB
        for seed in telling_seeds(scaled, n_kept):
            sampling = Sampling(temperature, *filters, seed=int(seed))
            token = step.token(step.step([3], POSITION - 1, sampling=sampling))
            assert token == sample(logits, sampling, POSITION)


@pytest.mark.parametrize("grid", [1, 7])
def test_all_scores_are_equal(machine: Machine, grid: int) -> None:
    """The list is the whole vocabulary, and what the filters keep is all of it."""
    step = machine.open(tied_model(VOCAB, (0.0,)), Run(grid))
    for draw in ((0, 0.3, 0.0), (50, 1.0, 0.0), (50, 0.3, 0.5), (0, 1.0, 1.0)):
        tokens = {check(step, Sampling(0.7, *draw, seed=seed)) for seed in range(3)}
        assert len(tokens) == 3
    check(step, Sampling(), logprobs=100)


@pytest.mark.parametrize("n", [0, 1, 20, 100])
def test_reports_of_a_crowd(machine: Machine, n: int) -> None:
    """Hundreds of logits are listed for a few; ties among the likeliest, too."""
    for model in (crowded_model(VOCAB), tied_model(VOCAB, tuple(range(30)))):
        step = machine.open(model, Run(7, "random"))
        ticket = step.step([3], 2, logits=True, extras=Extras(logprobs=n))
        logits, token = step.read_logits(1)[0], step.token(ticket)
        assert_report(step.logprobs(ticket, n), logits, token, n)
