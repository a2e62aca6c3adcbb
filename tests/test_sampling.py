"""Sampling: random numbers against published vectors, filters by hand, draws by chi-square."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from sampled import draws

from minflash.errors import ArgumentError, MinflashError
from minflash.sampling import Sampling, gumbel, philox4x32, random_bits, sample, threshold

# Known-answer vectors of Random123 (kat_vectors, "philox4x32 10").
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def log_probabilities(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


def kept(probabilities: list[float], **filters: float) -> list[int]:
    scaled = log_probabilities(*probabilities)
    return np.flatnonzero(
        scaled >= threshold(scaled, Sampling(temperature=1.0, **filters))
    ).tolist()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32(np.array([counter, counter], np.uint32), key)
    for row in words:
        assert " ".join(f"{word:08x}" for word in row) == expected


def test_random_bits_depend_on_token_position_and_seed_only():
    all_blocks = random_bits(np.arange(10, dtype=np.uint32), 7, 2**40 + 5)
    assert np.array_equal(random_bits(np.array([3], np.uint32), 7, 2**40 + 5)[0], all_blocks[3])
    assert not np.array_equal(random_bits(np.arange(10, dtype=np.uint32), 8, 2**40 + 5), all_blocks)
    assert not np.array_equal(random_bits(np.arange(10, dtype=np.uint32), 7, 5), all_blocks)


def test_gumbel_is_finite_at_both_ends_and_matches_its_definition():
    ends = gumbel(np.array([0, 0xFFFFFFFF], np.uint32))
    assert ends[0] == pytest.approx(33 * math.log(2), rel=1e-5)
    assert ends[1] == pytest.approx(-math.log(24 * math.log(2)), rel=1e-5)
    values = gumbel(philox4x32(np.arange(400_000, dtype=np.uint32).reshape(-1, 4), (1, 2)))
    assert values.mean() == pytest.approx(0.5772, abs=0.01)
    assert values.var() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_greedy_takes_the_lowest_id_of_equal_logits():
    logits = np.array([1, 3, 2, 3], np.float32)
    assert sample(logits, Sampling(), 0) == 1
    assert sample(logits, Sampling(temperature=1e-6, seed=3), 0) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error(bad):
    with pytest.raises(MinflashError, match="token 1, position 9"):
        sample(np.array([0, bad, 1], np.float32), Sampling(), 9)


def test_masked_logits_are_never_drawn():
    logits = np.full(50, -np.inf, np.float32)
    logits[[13, 49]] = 0.0
    draws = {sample(logits, Sampling(temperature=5.0, seed=1), position) for position in range(100)}
    assert draws == {13, 49}


def test_filters_by_hand():
    probabilities = [0.05, 0.4, 0.1, 0.25, 0.2]
    assert kept(probabilities) == [0, 1, 2, 3, 4]
    assert kept(probabilities, top_k=-1) == [0, 1, 2, 3, 4]
    assert kept(probabilities, top_k=99) == [0, 1, 2, 3, 4]
    assert kept(probabilities, top_k=1) == [1]
    assert kept(probabilities, top_k=3) == [1, 3, 4]
    assert kept(probabilities, top_p=0.1) == [1]
    assert kept(probabilities, top_p=0.6) == [1, 3]
    assert kept(probabilities, top_p=0.7) == [1, 3, 4]
    assert kept(probabilities, min_p=0.3) == [1, 3, 4]
    assert kept(probabilities, min_p=1.0) == [1]
    # 0.4 and 0.25 of the 0.85 that top_k keeps are 76 %, so that top_p stops there.
    assert kept(probabilities, top_k=3, top_p=0.75) == [1, 3]
    assert kept(probabilities, top_k=3, top_p=0.75, min_p=0.9) == [1]


def test_ties_at_the_edge_are_kept():
    assert kept([0.25, 0.25, 0.25, 0.25], top_k=2) == [0, 1, 2, 3]
    assert kept([0.25, 0.25, 0.25, 0.25], top_p=0.3) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0, seed=11), [0.04, 0.4, 0.1, 0.01, 0.25, 0.2]),
        (Sampling(temperature=0.5, seed=2**63 + 1), [0.0016, 0.16, 0.01, 0.0001, 0.0625, 0.04]),
        (Sampling(temperature=1.0, top_k=3, seed=12), [0, 0.4, 0, 0, 0.25, 0.2]),
        (Sampling(temperature=1.0, top_p=0.8, seed=13), [0, 0.4, 0, 0, 0.25, 0.2]),
        (Sampling(temperature=1.0, min_p=0.2, seed=14), [0, 0.4, 0.1, 0, 0.25, 0.2]),
        (Sampling(temperature=1.0, top_k=5, top_p=0.9, seed=16), [0, 0.4, 0.1, 0, 0.25, 0.2]),
        (Sampling(temperature=1.0, top_k=5, min_p=0.3, seed=17), [0, 0.4, 0, 0, 0.25, 0.2]),
        (Sampling(temperature=1.0, top_p=0.97, min_p=0.11, seed=18), [0, 0.4, 0.1, 0, 0.25, 0.2]),
        (Sampling(temperature=2.0, top_k=4, top_p=0.9, min_p=0.1, seed=15),
         [0, 0.4**0.5, 0.1**0.5, 0, 0.5, 0.2**0.5]),
    ],
)  # fmt: skip
def test_draws_follow_the_distribution(sampling, expected):
    """Chi-square with 6 cells; 25.7 is the 0.9999 quantile of 5 degrees of freedom."""
    logits = log_probabilities(0.04, 0.4, 0.1, 0.01, 0.25, 0.2)
    n = 100_000
    counts = np.bincount(draws(logits, sampling, n), minlength=6)
    goal = np.array(expected) / sum(expected) * n
    assert np.all(counts[goal == 0] == 0)
    cells = goal > 0
    assert np.sum((counts[cells] - goal[cells]) ** 2 / goal[cells]) < 25.7


def test_rare_tokens_of_a_large_vocabulary_get_their_share():
    """Half of the mass on one token, the rest spread over 49,151: 2,000 draws."""
    logits = np.zeros(49_152, np.float32)
    logits[5] = math.log(49_151)
    draws = [sample(logits, Sampling(temperature=1.0, seed=4), i) for i in range(600)]
    share = np.mean([token == 5 for token in draws])
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(600)
    rest = np.array([token for token in draws if token != 5])
    assert len(set(rest.tolist())) > 0.97 * rest.size
    assert abs(rest.mean() / 49_152 - 0.5) < 4 * 0.289 / math.sqrt(rest.size)


def test_same_seed_same_token_and_a_seed_is_needed():
    logits = np.zeros(1000, np.float32)
    first = [sample(logits, Sampling(temperature=1.0, seed=8), i) for i in range(20)]
    assert first == [sample(logits, Sampling(temperature=1.0, seed=8), i) for i in range(20)]
    assert first != [sample(logits, Sampling(temperature=1.0, seed=9), i) for i in range(20)]
    with pytest.raises(ArgumentError, match="seed"):
        sample(logits, Sampling(temperature=1.0), 0)


def test_seeded_draws_a_fresh_seed_once():
    assert Sampling().seeded() == Sampling()
    assert Sampling(temperature=1.0, seed=3).seeded().seed == 3
    one, two = Sampling(temperature=1.0).seeded(), Sampling(temperature=1.0).seeded()
    assert one.seed is not None and one.seed != two.seed
    assert one.seeded() is one


@pytest.mark.filterwarnings("error")
def test_numbers_beyond_float32_keep_their_meaning() -> None:
    logits = np.array(
        [9.0, 8.0, 1.0, -np.inf], np.float32
    )  # the last as a grammar's mask leaves it
    hot = Sampling(temperature=1e300, seed=1)
    counts = np.bincount([sample(logits, hot, position) for position in range(900)], minlength=4)
    # As likely as each other: a third of 900, within 5 standard deviations of sqrt(900 * 2 / 9).
    assert counts[3] == 0 and np.abs(counts[:3] - 300).max() < 71
    kept = {sample(logits, replace(hot, top_k=2), position) for position in range(100)}
    assert kept == {0, 1}
    draws = {sample(logits, replace(hot, min_p=1e-300), position) for position in range(100)}
    assert draws == {0, 1, 2}


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": 10**400},
        {"temperature": None},
        {"top_k": -2},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": "x"},
    ],
)
def test_bad_parameters_name_the_rule_the_value_and_the_way_out(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ArgumentError) as caught:
        Sampling(**arguments)
    assert name in str(caught.value) and "must be" in str(caught.value) and ";" in str(caught.value)
    assert repr(value) in str(caught.value) or f"{value:g}" in str(caught.value)
