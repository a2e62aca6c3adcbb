"""The kernels that read prompts: the cache that they fill and the step that ends the last token.

The tolerance is that of docs/design.md. Where only the pieces differ that a prompt is read in, or
the blocks and warps that work on it, the bits must be equal.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

import emulator
import numpy as np
import pytest
from emulator import ORDERS
from kernel_cache import fill_cache, read_cache
from kernel_cases import DYNAMIC, LONGROPE, MODELS
from kernel_models import (
    Machine,
    RandomModel,
    Run,
    assert_within_bound,
    both_references,
    bound,
    default_kv_type,
    feed,
    model_config,
    random_tokens,
)
from seeded_bugs import DROPPED, Bug
from seeded_prefill_bugs import BUGS, symptom

from minflash.errors import ContextError
from minflash.numeric import bf16_to_fp32
from minflash.step_model import StepModel

pytestmark = pytest.mark.skipif(
    shutil.which(emulator.compiler()) is None, reason="the emulated device needs g++"
)
SMALL = ("bf16", "int4 64, 3 layers, windows 40, 0, 9")


def prefill(
    step: StepModel, tokens: Sequence[int], widths: Sequence[int], begin: int = 0
) -> list[str]:
    """Reads all tokens, in launches of ``widths`` tokens; the last width again and again.

    Returns the kernels that this takes.
    """
    done, number, kernels = 0, 0, []
    while done < len(tokens):
        width = widths[min(number, len(widths) - 1)]
        part = tokens[done : done + width]
        step.prefill(part, begin + done)
        kernels.append("prefill_few" if len(part) <= 64 else "prefill")
        done, number = done + width, number + 1
    return kernels


def cached(step: StepModel, begin: int, end: int, kv_type: str) -> tuple[Any, Any]:
    """Keys and values of positions as float32 [n_layers, n_kv_heads, positions, head_dim]."""
    step.wait()
    bits = (part[:, :, begin:end] for part in read_cache(step))
    if kv_type == "bf16":
        keys, values = (bf16_to_fp32(part) for part in bits)
    else:
        keys, values = (part.view(np.float16).astype(np.float32) for part in bits)
    return keys, values


def check(
    machine: Machine,
    model: RandomModel,
    run: Run,
    n: int,
    widths: Sequence[int] = (512,),
    past: int = 0,
) -> None:
    """``n`` tokens after a past: the cache, and the logits of the steps that come next."""
    step, pair = machine.open(model, run), both_references(model, run.kv_type)
    kv_type = run.kv_type or default_kv_type(model)
    fill_cache(step, pair, past, kv_type)
    before = read_cache(step)
    tokens = random_tokens(model.config, n + 9)
    launches = len(step.device.launches)  # type: ignore[attr-defined]
    kernels = prefill(step, tokens[:n], widths, past)
    assert step.device.launches[launches:] == kernels  # type: ignore[attr-defined]
    found, end = cached(step, past, past + n, kv_type), past + n
    for now, then in zip(read_cache(step), before, strict=True):
        np.testing.assert_array_equal(now[:, :, :past], then[:, :, :past])
        np.testing.assert_array_equal(now[:, :, end:], then[:, :, end:])
    step.step(tokens[n - 1 : n], end - 1, logits=True, resumes=True)
    ended = step.read_logits(1)
    logits = feed(step, tokens[n:], (8, 1), end)
    expected = [r.forward(tokens, past, all_logits=True) for r in pair]
    for part, name in zip(found, ("_keys", "_values"), strict=True):
        assert_within_bound(part, *(getattr(r, name)[:, :, past:end] for r in pair))
    assert_within_bound(ended, *(part[n - 1 : n] for part in expected))
    assert_within_bound(logits, *(part[n:] for part in expected))


@pytest.mark.parametrize("name", MODELS)
def test_every_type_and_architecture(machine: Machine, name: str) -> None:
    check(machine, MODELS[name](), Run(), 150, (9, 130))


@pytest.mark.parametrize("n", [1, 8, 9, 16, 17, 63, 64, 65, 127, 128, 129, 256, 257])
@pytest.mark.parametrize("name", SMALL)
def test_edges_of_tiles(machine: Machine, name: str, n: int) -> None:
    check(machine, MODELS[name](), Run(), n)


@pytest.mark.parametrize("grid", [1, 7, None])
@pytest.mark.parametrize("name", SMALL)
def test_grids(machine: Machine, name: str, grid: int | None) -> None:
    for seed, order in enumerate(ORDERS if machine.kind == "emulated" else ORDERS[:1]):
        check(machine, MODELS[name](), Run(grid, order, seed), 40, (33, 7))


@pytest.mark.parametrize("past", [1, 15, 16, 17, 39, 40, 41, 200])
@pytest.mark.parametrize("name", SMALL)
def test_after_a_past(machine: Machine, name: str, past: int) -> None:
    """Positions within a block of the cache; windows that end before, in and after the chunk."""
    check(machine, MODELS[name](), Run(7, "random"), 50, past=past)


@pytest.mark.parametrize(
    "capability, shared_bytes", [(80, 166912), (89, 101376), (90, 232448), (120, 101376)]
)
@pytest.mark.parametrize("name", ["int8 128, bf16 head", "bf16", "fp8 128"])
def test_the_rules_of_tuning(
    machine: Machine, name: str, capability: int, shared_bytes: int
) -> None:
    """Stages as on real cards, cp.async where those have no bulk copies."""
    run = Run(3, "reverse", capability=capability, shared_bytes=shared_bytes, small=False)
    check(machine, MODELS[name](), run, 70, (66, 4))


@pytest.mark.parametrize("n", [41, 130])
@pytest.mark.parametrize(
    "name",
    [
        "bf16",
        "int4 64, 3 layers, windows 40, 0, 9",
        "bf16, odd windows, q and k norms, int8 head, head_dim 128",
    ],
)
def test_attention_of_a_whole_card(machine: Machine, name: str, n: int) -> None:
    """Several stages of 256 and of 128 positions, of few tokens and of many."""
    run = Run(7, "random", shared_bytes=232448, small=False)
    check(machine, MODELS[name](), run, n, past=330)


def dealt(step: StepModel) -> bool:
    """Whether blocks left spans of attention for each other."""
    begin, end = (step.program.workspace[name] for name in ("prefill_parts", "prefill"))
    parts = np.empty(end - begin, np.uint8)
    step.device.download(step._workspace + begin, parts)
    return bool(parts.any())


@pytest.mark.parametrize("past, n", [(330, 1), (450, 42), (64, 300)])
@pytest.mark.parametrize("name", SMALL)
def test_spans_of_a_long_past(machine: Machine, name: str, past: int, n: int) -> None:
    """Of few tokens each span is another block's, which some layers' windows do not reach."""
    run = Run(40, "random")
    check(machine, MODELS[name](), run, n, past=past)
    assert dealt(machine.last) == (n <= 64)


@pytest.mark.parametrize(
    "type, group, dim, hidden_dim",
    [("bf16", 0, 64, 4128), ("int8", 32, 4128, 64), ("int4", 64, 64, 4160), ("fp8", 32, 2080, 96)],
)
def test_wide_matrices(machine: Machine, type: str, group: int, dim: int, hidden_dim: int) -> None:
    """Many steps along the rows, an odd number of tiles, several tiles of rows a block."""
    config = model_config(dim=dim, hidden_dim=hidden_dim, n_heads=2, n_layers=2, vocab_size=130)
    check(machine, RandomModel(config, type, group), Run(2, "random"), 20)


@pytest.mark.parametrize("kv_type", ["bf16", "fp16"])
@pytest.mark.parametrize("type", ["bf16", "fp16"])
def test_cache_types(machine: Machine, type: str, kv_type: str) -> None:
    check(machine, RandomModel(model_config(), type), Run(kv_type=kv_type), 40)


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=lambda rope: rope.kind)
def test_rope_of_the_whole_sequence(machine: Machine, rope: Any) -> None:
    """The first pieces are rotated for the length of the prompt."""
    model = RandomModel(model_config(rope=rope), "fp16")
    step, pair = machine.open(model), both_references(model)
    tokens = random_tokens(model.config, 50)
    step.prefill(tokens[:20], 0, length=50)
    step.prefill(tokens[20:49], 20, length=50)
    logits = feed(step, tokens[49:], (1,), 49)
    assert_within_bound(logits, *(r.forward(tokens, 0) for r in pair))


@pytest.mark.parametrize(
    "name", ["bf16", "int4 64, 3 layers, windows 40, 0, 9", "fp8 32, fp16 head"]
)
@pytest.mark.parametrize("small", [True, False])
def test_pieces_and_order_do_not_change_a_bit(machine: Machine, name: str, small: bool) -> None:
    """What cuda_engine relies on: where a prompt is cut, the same bits come out."""
    model, shared_bytes = MODELS[name](), 101376 if small else 232448
    tokens = random_tokens(model.config, 290)
    caches = []
    pieces = ((290,), (8, 128, 154), (50, 1, 100), (290,), (250, 20))
    for number, (widths, grid) in enumerate(zip(pieces, (2, 7, 1, None, 40), strict=True)):
        run = Run(grid, ORDERS[number % 3], number)
        step = machine.open(model, run, small=small, shared_bytes=shared_bytes)
        prefill(step, tokens, widths)
        step.wait()
        caches.append(np.stack(read_cache(step)))
    assert dealt(step) == small  # the last few tokens
    for cache in caches[1:]:
        np.testing.assert_array_equal(cache, caches[0])


def test_prefill_and_steps_agree(machine: Machine) -> None:
    """The same tokens by steps and by one launch: caches as near as the bound of each allows."""
    model = MODELS["int4 64, 3 layers, windows 40, 0, 9"]()
    tokens = random_tokens(model.config, 60)
    wide, steps, pair = machine.open(model), machine.open(model), both_references(model)
    prefill(wide, tokens, (60,))
    feed(steps, tokens, (8,))
    for reference in pair:
        reference.forward(tokens, 0)
    for index, name in enumerate(("_keys", "_values")):
        limit = bound(*(getattr(r, name)[:, :, :60] for r in pair))
        one, other = (cached(s, 0, 60, "fp16")[index] for s in (wide, steps))
        assert np.abs(one - other).max() <= 2 * limit


def test_what_does_not_fit_is_said(machine: Machine) -> None:
    step = machine.open(MODELS["bf16"](), max_context=64)
    assert step.prefill_tokens == 128  # a whole tile, though the context is shorter
    with pytest.raises(ContextError, match="position 64 is past the context of 64 positions"):
        step.prefill([1] * 25, 40)
    for wrong in ([], [1] * 129):
        with pytest.raises(AssertionError, match="reads 1 to 128 tokens"):
            step.prefill(wrong, 0)
    step.prefill([1] * 20, 10)
    for position in (9, 30):
        with pytest.raises(AssertionError, match=f"position {position} is not of the last prefill"):
            step.step([1], position, resumes=True)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_clean_under(sanitizer: emulator.Sanitizer) -> None:
    done = emulator.run_sanitized([__file__], sanitizer, timeout_s=600)
    assert done.returncode == 0, done.stdout + done.stderr


# Bugs are planted once, to see that these tests would notice; docs/kernel.md has the whole table
NAMES = ("nobody waits for copies", "first half", "a position too many")
PLANTED = [bug for bug in BUGS if bug.what.endswith(NAMES)]
PLANTED += [Bug(f"no grid barrier {i}", DROPPED["grid barrier"], "", i, 1) for i in (1, 7)]


def test_the_right_source_shows_nothing() -> None:
    assert len(PLANTED) == 5
    assert symptom(None) is None


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.what)
def test_a_planted_bug_is_noticed(bug: Bug) -> None:
    assert symptom(bug) is not None


def sanitized() -> None:
    """What the sanitized process runs: two tiles of columns, windows, integer weights.

    No steps follow: theirs is a race that is meant (docs/kernel.md).
    """
    for name in SMALL:
        model = MODELS[name]()
        step = Machine("emulated").open(model, Run(3, "random"))
        tokens = random_tokens(model.config, 146)
        prefill(step, tokens, (9, 137))
        pair = both_references(model)
        for reference in pair:
            reference.forward(tokens, 0)
        keys, _ = cached(step, 0, 146, default_kv_type(model))
        assert_within_bound(keys, *(r._keys[:, :, :146] for r in pair))


if __name__ == "__main__":
    sys.exit(sanitized())
