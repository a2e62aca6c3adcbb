"""What only a GPU can show: all its multiprocessors, no local memory, memory given back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from kernel_cache import fill_cache
from kernel_cases import MODELS, TYPES
from kernel_models import (
    Machine,
    RandomModel,
    Run,
    assert_within_bound,
    both_references,
    default_kv_type,
    feed,
    model_config,
    random_tokens,
    references,
    without_last_block,
)
from sampled import SAMPLINGS, assert_sampled

from minflash.codegen import KERNELS, PREFILLS
from minflash.errors import DeviceError
from minflash.sampling import Sampling

pytestmark = pytest.mark.gpu
ALL = Run(None, small=False, shared_bytes=1 << 30)  # the whole card, by the rules of tuning


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine("cuda")
    yield machine
    machine.close()


def middle_model(type: str = "int4", group: int = 64, **changes: object) -> RandomModel:
    """Large enough that every multiprocessor gets rows of most matrices."""
    config = model_config(
        dim=1024, hidden_dim=2816, head_dim=128, n_heads=8, n_kv_heads=2, n_layers=3,
        vocab_size=20011, max_context=8192, windows=(0, 1000, 0), **changes,
    )  # fmt: skip
    return RandomModel(config, type, group, ("int8", 32) if group else None)


@pytest.mark.parametrize("type, group", TYPES)
def test_all_multiprocessors(machine: Machine, type: str, group: int) -> None:
    """And no kernel uses local memory: no register spills, no stack frame."""
    model = middle_model(type, group)
    tokens = random_tokens(model.config, 40)
    step = machine.open(model, ALL, max_context=128)
    logits = feed(step, tokens, (1, 8, 2, 7))
    assert step.device.local_bytes == dict.fromkeys((*KERNELS, *PREFILLS), 0)  # type: ignore[attr-defined]
    assert_within_bound(logits, *references(model, tokens))


@pytest.mark.parametrize("type, group", TYPES)
def test_a_long_prompt_on_all_multiprocessors(machine: Machine, type: str, group: int) -> None:
    """Three tiles of columns, the last not full; ten times the same bits."""
    model = middle_model(type, group)
    tokens = random_tokens(model.config, 330)
    exact, rounded = references(model, tokens)
    step = machine.open(model, ALL, max_context=400)
    first = None
    for _ in range(10):
        step.prefill(tokens[:321], 0)
        logits = feed(step, tokens[321:], (8, 1), 321)
        first = logits if first is None else first
        np.testing.assert_array_equal(logits, first)
    assert_within_bound(logits, exact[321:], rounded[321:])


def test_bulk_copies_and_cp_async_give_the_same(machine: Machine) -> None:
    """Equal to the last bit: the same sums in the same order."""
    model = middle_model()
    tokens = random_tokens(model.config, 30)
    small = replace(ALL, max_context=64, shared_bytes=101376)
    logits = [feed(machine.open(model, small, capability=c), tokens, (8, 1)) for c in (80, 90)]
    assert (logits[0] == logits[1]).all()


def test_twenty_runs_are_bitwise_equal(machine: Machine) -> None:
    model = middle_model()
    tokens = random_tokens(model.config, 60)
    step = machine.open(model, ALL, max_context=64)
    first = feed(step, tokens, (8, 8, 8, 8, 7, 1))
    for _ in range(19):
        assert (feed(step, tokens, (8, 8, 8, 8, 7, 1)) == first).all()


@pytest.mark.parametrize("width", range(1, 9))
def test_every_number_of_columns(machine: Machine, width: int) -> None:
    model = middle_model("bf16", 0)
    tokens = random_tokens(model.config, 3 * width + 1)
    logits = feed(machine.open(model, ALL, max_context=64), tokens, (width,))
    assert_within_bound(logits, *references(model, tokens))


@pytest.mark.parametrize("type, group", [("bf16", 0), ("int4", 64)])
def test_long_contexts(machine: Machine, type: str, group: int) -> None:
    """Splits grow with the position; a window ends within a split."""
    model = middle_model(type, group)
    step, pair = machine.open(model, ALL), both_references(model)
    for length in (1023, 4095, 4096, 4097, 8184):
        for width in (1, 8):
            fill_cache(step, pair, length, default_kv_type(model))
            tokens = random_tokens(model.config, width, length)
            logits = feed(step, tokens, (width,), length)
            expected = [r.forward(tokens, length, all_logits=True) for r in pair]
            assert_within_bound(logits, *expected)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampling_of_a_large_vocabulary(machine: Machine, name: str) -> None:
    step = machine.open(middle_model(), ALL, max_context=64)
    for seed in range(20):
        sampling = Sampling(**(vars(SAMPLINGS[name]) | {"seed": seed}))
        ticket = step.step([seed], seed, logits=True, sampling=sampling)
        assert_sampled(step.token(ticket), step.read_logits(1)[0], sampling, seed + 1)


@pytest.mark.measures
def test_memory_is_given_back(machine: Machine) -> None:
    model = middle_model("bf16", 0)
    machine.open(model, ALL).close()  # CUDA's own allocations
    before = None
    for _ in range(5):
        step = machine.open(model, ALL)
        used = step.device.free_bytes()
        step.close()
        free = step.device.free_bytes()
        assert free - used > 10**7
        assert before is None or abs(free - before) <= 1 << 21
        before = free


def test_a_barrier_that_never_completes_is_an_error_and_the_model_goes_on(machine: Machine) -> None:
    model = MODELS["bf16"]()
    step = machine.open(model, ALL)
    tokens = random_tokens(model.config, 20)
    right = feed(step, tokens, (8, 1))
    step._arrivals += 1  # as if a block had not come
    begin = time.monotonic()
    with pytest.raises(DeviceError, match=r"barrier, block \d+, phase 1, expected \d+, seen \d+"):
        step.token(step.step([1, 2], 0))
    assert time.monotonic() - begin < 3  # a second of patience, here
    assert (feed(step, tokens, (8, 1)) == right).all()


def test_a_result_that_never_comes_is_an_error_and_the_model_goes_on(machine: Machine) -> None:
    """One column has no barriers: what a missing block should have written is waited for."""
    model = middle_model("bf16", 0)  # with work for every block
    step = machine.open(model, ALL)
    tokens = random_tokens(model.config, 20)
    right = feed(step, tokens, (8, 1))
    whole, step._launch = step._launch, without_last_block(step)
    begin = time.monotonic()
    with pytest.raises(
        DeviceError,
        match=r"result of another block, block \d+, phase \d+, expected \d+, seen \d+",
    ):
        step.token(step.step([1], 0))
    assert time.monotonic() - begin < 3
    step._launch = whole
    assert (feed(step, tokens, (8, 1)) == right).all()


def test_launches_are_far_ahead_of_the_host(machine: Machine) -> None:
    """64 launches without waiting, and every token is there in order."""
    model = MODELS["bf16"]()
    step = machine.open(model, ALL)
    tickets = [step.step([3], 0)] + [step.step([-1], p) for p in range(1, 60)]
    step.wait()
    tokens = [step.token(ticket) for ticket in tickets]
    logits = feed(machine.open(model, ALL), [3, *tokens[:-1]], (1,))
    assert np.array_equal(tokens, logits.argmax(axis=1))
