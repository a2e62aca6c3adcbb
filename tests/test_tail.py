"""The step's tail against minflash/sampling.py: adjustments, masks, log-probabilities, rankings.

On the kernel's own logits, so that a token is the specification's but for the last bits of log and
exp; on the emulated device and, where there is one, on a GPU.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import emulator
import numpy as np
import pytest
from emulator import ORDERS
from kernel_models import Machine, RandomModel, Run, crowded_model, model_config
from sampled import (
    ANSWER,
    BIAS,
    DRAWS,
    ENDS,
    PENALTIES,
    PROMPT,
    bits_of,
)
from tail_checks import check, tied_model

from minflash.codegen import generate
from minflash.sampling import Sampling, adjusted, threshold
from minflash.step_model import CHAINED
from minflash.tail import PLAIN, Extras, noted_tokens
from minflash.tuning import DeviceFacts, choose

pytestmark = pytest.mark.skipif(
    shutil.which(emulator.compiler()) is None, reason="the emulated device needs g++"
)


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel(model_config(), "bf16")


ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bias": {"logit_bias": BIAS},
    "repetition": {"repetition_penalty": 1.5},
    "repetition below 1": {"repetition_penalty": 0.3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "min_tokens": {"min_tokens": 6},
    "min_tokens reached": {"min_tokens": 5, "logit_bias": ((15, 100.0),)},
    "penalties": PENALTIES,
    "all": {**PENALTIES, "logit_bias": BIAS, "min_tokens": 9},
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
def test_extras_are_the_specification(
    machine: Machine, model: RandomModel, adjustment: str, draw: str
) -> None:
    """Each alone and with a mask and log-probabilities, after one token and after three."""
    step = machine.open(model, Run(2, "random"))
    sampling = replace(DRAWS[draw], **ADJUSTMENTS[adjustment])
    allowed = np.random.default_rng(3).random(331) < 0.4
    plain = check(step, sampling)
    assert check(step, sampling, logprobs=5) == plain  # which change nothing
    check(step, sampling, allowed=allowed, tokens=(1, 2, 3))
    check(step, sampling, allowed=allowed, logprobs=20, tokens=(1, 2, 3))


def test_each_extra_changes_the_choice(machine: Machine, model: RandomModel) -> None:
    """Else the test above would prove nothing."""
    step = machine.open(model)
    position, tokens = 2, (3,)
    ticket = step.step(tokens, position, logits=True)
    first, best = step.token(ticket), np.argsort(-step.read_logits(1)[0])
    second = int(best[1])
    noted = noted_tokens(331, Sampling(logit_bias=((second, 50.0),)), [], [], [first])
    step.note_tokens(noted)
    for extras in (Extras(adjust=True), Extras(mask=bits_of(np.arange(331) != first))):
        assert step.token(step.step(tokens, position, extras=extras)) == second
    step.note_tokens(noted_tokens(331, Sampling(), [first], [], [first]))
    ended = Extras(adjust=True, ban_ends=True)
    assert step.token(step.step(tokens, position, extras=ended)) == second
    harsh = Sampling(repetition_penalty=100.0)
    assert step.token(step.step(tokens, position, sampling=harsh, extras=PLAIN)) == first
    step.note_tokens(noted_tokens(331, harsh, [first]))
    adjust = Extras(adjust=True)
    assert step.token(step.step(tokens, position, sampling=harsh, extras=adjust)) == second


def test_the_kernel_counts_what_it_chose(machine: Machine, model: RandomModel) -> None:
    """A penalty of frequency that leaves no token twice, without the host between."""
    sampling = Sampling(frequency_penalty=100.0)
    step = machine.open(model)
    step.note_tokens(noted_tokens(331, sampling, [4]))
    options: dict[str, Any] = {"sampling": sampling, "extras": Extras(adjust=True)}
    tickets = [step.step([4], 0, **options)]
    tickets += [step.step([CHAINED], position, **options) for position in range(1, 25)]
    chosen = [step.token(ticket) for ticket in tickets]
    assert len(set(chosen)) == 25
    greedy = [step.token(step.step([4], 0)) for _ in range(2)]
    assert greedy == [chosen[0]] * 2  # steps without extras do not look at the counts


RANKINGS = [
    Sampling(temperature, top_k, top_p, seed=seed)
    for seed, (temperature, top_k, top_p) in enumerate([
        (0.00011, 2, 1.0), (0.00011, 300, 0.5), (0.01, 40, 0.9), (0.01, 330, 1.0),
        (1.0, 331, 0.999), (1.0, 330, 0.999), (1.0, 40, 0.3), (1.0, 0, 0.9999999999),
        (3.0, 200, 0.5), (100.0, 3, 1.0), (100.0, 40, 0.5), (100.0, 0, 0.2), (1000.0, 100, 0.9),
    ])
]  # fmt: skip


@pytest.mark.parametrize("grid", [1, 2, 7])
def test_rankings(machine: Machine, model: RandomModel, grid: int) -> None:
    """All values in one bin, in the last bin, spread: distances of 0.001 to 50000."""
    step = machine.open(model, Run(grid, "random", grid))
    for position, sampling in enumerate(RANKINGS):
        check(step, sampling, position=position)
        check(step, replace(sampling, logit_bias=BIAS), logprobs=2, position=position)


@pytest.mark.parametrize("grid", [1, 7])
def test_few_allowed_tokens(machine: Machine, model: RandomModel, grid: int) -> None:
    """Fewer than top_k asks for; excluded ones are in no bin."""
    step = machine.open(model, Run(grid))
    for few in ([330], [0, 31, 32], [7, 63, 64, 200, 319, 320]):
        allowed = np.isin(np.arange(331), few)
        for sampling in (*DRAWS.values(), Sampling(5.0, 3, 0.9, seed=1)):
            assert check(step, sampling, allowed=allowed, logprobs=3) in few


@pytest.mark.parametrize("draw", DRAWS)
def test_nothing_allowed_is_told_apart_from_nan(
    machine: Machine, model: RandomModel, draw: str
) -> None:
    broken = RandomModel(model_config(), "bf16")
    broken.put("final_norm", np.full(96, np.nan))
    none = Extras(mask=bits_of(np.zeros(331, np.bool_)))
    for which, extras, expected in ((model, none, 0xFFFFFFFE), (broken, PLAIN, 0xFFFFFFFF)):
        step = machine.open(which)
        ticket = step.step([4], 0, sampling=DRAWS[draw], extras=extras)
        assert step.token(ticket) == expected


@pytest.mark.parametrize("values", [(0.0,), (0.1, 0.0, 0.2), (-0.125, 0.25)])
def test_ties(machine: Machine, values: tuple[float, ...]) -> None:
    """Many equal values: the lowest tokens come first, and filters keep ties."""
    step = machine.open(tied_model(331, values), Run(7, "random"))
    for draw in DRAWS.values():
        check(step, draw, logprobs=100)
    check(step, Sampling(1.0, top_k=100, top_p=0.5, seed=8), logprobs=0)


@pytest.mark.parametrize("grid", [1, 7])
def test_filters_that_end_within_a_crowded_bin(machine: Machine, grid: int) -> None:
    """So that keeping one token more or less shows in the draws."""
    step = machine.open(crowded_model(), Run(grid, "random"))
    step.step([3], 2, logits=True)
    logits = step.read_logits(1)[0]
    middle = float(np.exp(np.median(logits) - logits.max()))
    draws = [(5, 1.0, 0.0), (331, 1.0, middle), (300, 1.0, middle), (0, 0.5, 0.0), (60, 0.4, 0.0)]
    kept = [cells(logits, Sampling(1.0, *draw))[0] >= 0 for draw in draws]
    assert [int(k.sum()) for k in kept[:3]] == [5, 166, 166] and 10 < kept[4].sum() < 50
    for draw, tokens in zip(draws, kept, strict=True):
        seen = {check(step, Sampling(1.0, *draw, seed=seed)) for seed in range(15)}
        assert seen <= set(np.flatnonzero(tokens).tolist()) and len(seen) > 3


def test_reports_of_a_small_vocabulary(machine: Machine) -> None:
    step = machine.open(tied_model(37, tuple(range(37))), Run(2))
    for n in (0, 1, 36, 37, 38, 100):
        check(step, Sampling(), logprobs=n)


def test_the_tail_is_bitwise_repeatable(machine: Machine, model: RandomModel) -> None:
    """In any order of blocks, warps and copies; each step leaves the tail as it found it."""
    sampling = Sampling(1.2, 60, 0.9, 0.01, seed=3, **PENALTIES)  # type: ignore[arg-type]
    runs = []
    for seed, order in enumerate(ORDERS):
        step = machine.open(model, Run(7, order, seed))
        step.note_tokens(noted_tokens(331, sampling, [4]))
        told = []
        for position in range(4):
            extras = Extras(adjust=True, logprobs=10)
            ticket = step.step([5], position, sampling=sampling, extras=extras)
            told.append((step.token(ticket), step.logprobs(ticket, 10)))
        tail = np.empty(16, "u1")  # all but the bins, which a step empties before it fills them
        step.device.download(int(step._args["workspace"]) + step.program.workspace["tail"], tail)
        assert not tail.any()
        runs.append(told)
    assert all(run == runs[0] for run in runs)


def test_an_abandoned_step_leaves_an_empty_tail(model: RandomModel) -> None:
    """What a step must find empty is before the residual, where the host clears."""
    tuning = choose(model.config, model.matrices, DeviceFacts(90, 132, 232448))
    workspace = generate(model.config, model.matrices, tuning).workspace
    assert workspace["tail"] < workspace["residual"]


# Distributions: the specification's, by chi-square over the kernel's draws of many seeds

QUANTILES = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74}  # 0.9999, by degrees of freedom


def cells(scores: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Up to 6 cells: the cell of each token (-1: never drawn), and the cells' probabilities."""
    scaled = scores.astype(np.float32) / np.float32(sampling.temperature)
    kept = (scaled >= threshold(scaled, sampling)) & np.isfinite(scaled)
    weights = np.where(kept, np.exp(scaled.astype(np.float64) - scaled.max()), 0)
    weights /= weights.sum()
    order = np.argsort(-weights)
    cell = np.full(weights.size, -1)
    before = np.cumsum(weights[order]) - weights[order]
    cell[order] = np.minimum((before * 6).astype(int), 5)
    cell[~kept] = -1
    used, cell[kept] = np.unique(cell[kept], return_inverse=True)
    return cell, np.bincount(cell[kept], weights[kept], minlength=used.size)


DISTRIBUTIONS = {
    "temperature": Sampling(1.0),
    "top_k": Sampling(1.5, top_k=7),
    "top_p": Sampling(0.8, top_p=0.7),
    "min_p": Sampling(1.2, min_p=0.2),
    "top_k and top_p": Sampling(2.0, 30, 0.8),
    "top_k and min_p": Sampling(2.0, 30, min_p=0.3),
    "top_p and min_p": Sampling(1.5, top_p=0.9, min_p=0.1),
    "all filters": Sampling(2.0, 40, 0.95, 0.15),
    "penalties": Sampling(1.0, **PENALTIES),  # type: ignore[arg-type]
    "bias": Sampling(1.0, logit_bias=((7, 6.0), (9, 5.0), (330, 5.5))),
    "min_tokens": Sampling(1.0, min_tokens=9, logit_bias=((15, 50.0), (3, 7.0))),
    "mask": Sampling(1.0),
    "everything": Sampling(1.5, 40, 0.95, 0.02, logit_bias=BIAS, min_tokens=9, **PENALTIES),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_of_the_kernel_follow_the_distribution(machine: Machine, name: str) -> None:
    """1e5 draws on a GPU, 240 on the emulated device, which takes its time."""
    config = model_config(dim=64, hidden_dim=32, n_layers=1, n_heads=1)
    model = RandomModel(config, "bf16", seed=8)
    step = machine.open(model, Run(1))
    sampling, n = DISTRIBUTIONS[name], 100_000 if machine.kind == "cuda" else 240
    allowed = None
    if name in ("mask", "everything"):
        allowed = np.random.default_rng(1).random(331) < 0.3
    check(step, replace(sampling, seed=1), allowed=allowed, position=0)
    ban = len(ANSWER) < sampling.min_tokens
    mask = None if allowed is None else bits_of(allowed)
    extras = Extras(sampling.adjusts, ban, mask)
    step.step([3], 0, logits=True)
    logits = step.read_logits(1)[0]
    cell, goal = cells(adjusted(logits, sampling, PROMPT, ANSWER, ENDS, allowed), sampling)
    counts = np.zeros(goal.size)
    noted = noted_tokens(331, sampling, PROMPT, ANSWER, ENDS)

    def launch(seed: int) -> int:
        if sampling.adjusts:  # as the kernel counts
            step.note_tokens(noted)
        return step.step([3], 0, sampling=replace(sampling, seed=seed), extras=extras)

    for begin in range(0, n, 20):
        for ticket in [launch(seed) for seed in range(begin, begin + 20)]:
            token = step.token(ticket)
            assert cell[token] >= 0
            counts[cell[token]] += 1
    chi_square = float(np.sum((counts - n * goal) ** 2 / (n * goal)))
    assert goal.size >= 2 and chi_square < QUANTILES[goal.size - 1]
