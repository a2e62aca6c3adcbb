"""Filters and log-probabilities of flat distributions: thousands of tokens at the edge.

They make long lists for the block that arrives last: more tokens than it has threads, and more than
the ring's shared memory holds.
"""

from __future__ import annotations

import shutil

import emulator
import numpy as np
import pytest
from kernel_models import Machine, Run, crowded_model
from test_kernel_sampling import assert_sampled
from test_tail import assert_report, check, tied_model

from minflash.sampling import Sampling, threshold
from minflash.tail import Extras

pytestmark = pytest.mark.skipif(
    shutil.which(emulator.compiler()) is None, reason="the emulated device needs g++"
)

VOCAB = 12_000

# (temperature, top_k, top_p, min_p): the first four keep few tokens, so that one too many shows.
FLAT = [
    (1000.0, 0, 0.0005, 0.0),
    (1000.0, 9000, 0.0005, 0.0),
    (1000.0, 7, 1.0, 0.0),
    (1.0, 0, 0.004, 0.0),
    (1000.0, 0, 0.7, 0.0),
    (1000.0, 5000, 1.0, 0.0),
    (1000.0, 5000, 0.5, 0.99),
    (1.0, 0, 0.5, 0.0),
    (1.0, 6000, 0.9, 0.0),
]


@pytest.mark.parametrize("grid", [1, 7])
def test_thousands_of_tokens_at_the_edge(machine: Machine, grid: int) -> None:
    """In one bin, with a temperature that brings all scores together, or in a few."""
    step = machine.open(crowded_model(VOCAB), Run(grid, "random"))
    step.step([3], 2, logits=True)
    logits = step.read_logits(1)[0]
    assert np.sum(np.abs(logits - np.median(logits)) < 0.06) > 0.9 * VOCAB
    for index, (temperature, *filters) in enumerate(FLAT):
        few = index < 4
        sampling = Sampling(temperature, *filters)
        scaled = logits / np.float32(temperature)
        kept = scaled >= threshold(scaled, sampling)
        assert (2 < kept.sum() < 60) if few else kept.sum() > 1000
        seen = set()
        for seed in range(8 if few else 2):
            sampling = Sampling(temperature, *filters, seed=seed)
            token = step.token(step.step([3], 2, sampling=sampling))
            assert_sampled(token, logits, sampling, 3)
            seen.add(token)
        assert seen <= set(np.flatnonzero(kept).tolist()) and (not few or len(seen) > 2)


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
