"""The step kernel for several columns: what it does otherwise than for one."""

from __future__ import annotations

import re

import numpy as np
import pytest
from kernel_cases import growing_model
from kernel_models import (
    Machine,
    RandomModel,
    Run,
    assert_within_bound,
    feed,
    model_config,
    random_tokens,
    references,
)

WIDE = [("bf16", 0, 64, 4128), ("int8", 32, 4128, 64), ("int4", 64, 64, 4160)]


def wide_model(type: str, group: int, dim: int, hidden_dim: int) -> RandomModel:
    config = model_config(dim=dim, hidden_dim=hidden_dim, n_heads=2, n_layers=1, vocab_size=130)
    return RandomModel(config, type, group)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("grid", [2, 6])
@pytest.mark.parametrize("wide", WIDE, ids=str)
def test_matrices_in_parts(
    machine: Machine, wide: tuple[str, int, int, int], grid: int, capability: int
) -> None:
    """Teams of blocks that share a matrix's columns, whichever of them arrives last."""
    model = wide_model(*wide)
    tokens = random_tokens(model.config, 19)
    expected = references(model, tokens)
    runs = []
    for seed in range(2):
        step = machine.open(model, Run(grid, "random", seed, capability))
        matrices = re.findall(r"constexpr Matrix \w+\{.*, (\d+)\};", step.program.source)
        parts = [int(n) for n in matrices]
        assert max(parts) > 1 and all(grid % n == 0 for n in parts)
        runs.append(feed(step, tokens, (8, 3, 8)))
    assert_within_bound(runs[0], *expected)
    assert np.array_equal(*runs)


def test_a_part_with_fewer_chunks(machine: Machine) -> None:
    """The last of six blocks that share W_down has one chunk of each row block, the others two."""
    config = model_config(
        dim=128, hidden_dim=4736, head_dim=128, n_heads=2, n_layers=1, vocab_size=130
    )
    model = RandomModel(config, "int4", 128)
    tokens = random_tokens(config, 17)
    step = machine.open(model, Run(6, "random"))
    found = re.search(r"constexpr Matrix w_down\{.*, (\d+), (\d+)\};", step.program.source)
    assert found and found[2] == "6"
    tiles, chunk = 4736 // 128, int(found[1])
    assert (tiles + 5) // 6 > chunk >= tiles - 5 * ((tiles + 5) // 6)
    assert_within_bound(feed(step, tokens, (8, 1, 8)), *references(model, tokens))


@pytest.mark.parametrize("type, group", [("bf16", 0), ("fp16", 0), ("fp8", 64), ("int4", 64)])
@pytest.mark.parametrize("factor", [1000.0, 0.001], ids=["grows", "stays"])
def test_a_residual_of_another_size(machine: Machine, type: str, group: int, factor: float) -> None:
    """A layer that makes the residual a thousand times as large, as some models' first ones do.

    The next norm's input is handed on in fp16 before that norm is known.
    """
    model = growing_model(type, group, factor)
    tokens = random_tokens(model.config, 24)
    logits = feed(machine.open(model), tokens, (8, 7, 1))
    assert_within_bound(logits, *references(model, tokens))


@pytest.mark.parametrize("columns", [(1,), (8,)], ids=["one column", "eight"])
def test_prefetching_changes_nothing(machine: Machine, columns: tuple[int, ...]) -> None:
    model = RandomModel(model_config(windows=(30, 0)), "int4", 32, ("int8", 32))
    tokens = random_tokens(model.config, 40)
    with_it, without = (
        feed(machine.open(model, Run(3, "random", prefetch=n)), tokens, columns) for n in (5, 0)
    )
    assert np.array_equal(with_it, without)
