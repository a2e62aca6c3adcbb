"""The engine over the kernels that read prompts: when they are used, what stays the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from kernel_models import (
    EmulatedDevice,
    RandomModel,
    assert_within_bound,
    model_config,
    random_tokens,
    references,
)

from minflash.checkpoint import Checkpoint
from minflash.config import RopeConfig
from minflash.cuda_engine import LEAST_PREFILL, CudaEngine
from minflash.device import CudaDevice
from minflash.engine import CpuEngine
from minflash.errors import ContextError, DeviceError
from minflash.sampling import Sampling
from minflash.step_model import StepModel
from minflash.tuning import choose

GREEDY = Sampling()
CONTEXT = 400
PROMPT = random_tokens(model_config(), 61, 4)
LONG = random_tokens(model_config(), 300, 5)


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel(model_config(), "bf16", seed=3)


def open_engine(model: RandomModel, **tuning: int) -> tuple[CudaEngine, EmulatedDevice]:
    device = EmulatedDevice()
    small = {"stages": 8, "stage_bytes": 4096, "in_flight_bytes": 12288}
    chosen = choose(model.config, model.matrices, device.facts, **small | tuning)
    step = StepModel(model, device, CONTEXT, tuning=chosen, watchdog_ns=120 * 10**9)
    return CudaEngine.over(step), device


def gpu_engine(model: RandomModel, **tuning: int) -> tuple[CudaEngine, Any]:
    device = CudaDevice()
    chosen = choose(model.config, model.matrices, device.facts, **tuning)
    return CudaEngine.over(StepModel(model, device, CONTEXT, tuning=chosen)), device


@pytest.fixture(params=[open_engine, pytest.param(gpu_engine, marks=pytest.mark.gpu)])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


def last_logits(engine: CudaEngine, prompt: list[int]) -> np.ndarray:
    """Logits that the first token after a prompt is chosen from."""
    seen = []

    def note(logits: Any, position: int) -> int:
        seen.append(logits.copy())
        return int(logits.argmax())

    list(engine.tokens(prompt, GREEDY, 1, choose=note))
    return seen[0]


@pytest.mark.parametrize("n", [15, 16, 17, 24, 25, 61])
def test_tokens_are_those_of_the_cpu(model: RandomModel, make: Any, n: int) -> None:
    engine, _ = make(model)
    expected = list(CpuEngine(cast(Checkpoint, model), CONTEXT).tokens(PROMPT[:n], GREEDY, 6))
    assert list(engine.tokens(PROMPT[:n], GREEDY, 6)) == expected
    assert engine.forwarded == n + 5
    engine.close()


def test_a_prompt_is_one_launch_and_the_step_that_ends_it(model: RandomModel) -> None:
    engine, device = open_engine(model)
    positions: list[tuple[int, int]] = []
    device.before_launch = lambda args: positions.append(
        (int(args["position"]), int(args["n_columns"]))
    )
    list(engine.tokens(PROMPT, GREEDY, 1))
    assert device.launches == ["prefill_few", "step_one"] and positions == [(0, 61), (60, 1)]
    engine.reset()
    list(engine.tokens(LONG[:65], GREEDY, 1))
    assert device.launches[2:] == ["prefill", "step_one"] and positions[2:] == [(0, 65), (64, 1)]
    engine.reset()
    list(engine.tokens(PROMPT[:LEAST_PREFILL], GREEDY, 1))
    assert device.launches[4:] == ["prefill_few", "step_one"]
    engine.reset()
    list(engine.tokens(PROMPT[: LEAST_PREFILL - 1], GREEDY, 1))
    assert device.launches[6:] == ["step_many"] * 2
    engine.close()


def test_a_prompt_longer_than_the_workspace_takes_several(model: RandomModel) -> None:
    engine, device = open_engine(model, prefill_tokens=128)
    whole, _ = open_engine(model)
    cut = last_logits(engine, LONG)
    assert device.launches == ["prefill", "prefill", "prefill_few", "step_one"]
    np.testing.assert_array_equal(cut, last_logits(whole, LONG))
    none, device = open_engine(model, prefill_tokens=1)
    list(none.tokens(PROMPT, GREEDY, 1))
    assert set(device.launches) == {"step_many"}
    for opened in (engine, whole, none):
        opened.close()


def test_the_same_prompt_gives_the_same_bits(model: RandomModel, make: Any) -> None:
    """Again, after a start with fewer tokens, and after prompts that share a part of it."""
    engine, _ = make(model)
    exact, rounded = references(model, PROMPT)
    first = last_logits(engine, PROMPT)
    assert_within_bound(first, exact[-1], rounded[-1])
    np.testing.assert_array_equal(last_logits(engine, PROMPT), first)
    assert engine.reused == 60
    for shared in (1, 8, 30, 40, 55, 60):
        for length in (shared, shared + 1, 61, 120):
            other = [*PROMPT[:shared], *LONG[: length - shared]]
            engine.reset()
            list(engine.tokens(other, GREEDY, 3))
            again = last_logits(engine, PROMPT)
            assert engine.reused >= shared
            if len(other) >= LEAST_PREFILL:
                np.testing.assert_array_equal(again, first)
            else:  # a part was read by steps: the same numbers in another order
                assert_within_bound(again, exact[-1], rounded[-1])
    engine.close()


def test_only_what_is_new_is_read(model: RandomModel) -> None:
    engine, device = open_engine(model)
    list(engine.tokens(PROMPT, GREEDY, 1))
    begins: list[int] = []
    device.before_launch = lambda args: begins.append(int(args["position"]))
    longer = [*PROMPT, *LONG[:40]]
    list(engine.tokens(longer, GREEDY, 1))
    assert (engine.reused, begins) == (61, [61, 100])
    assert device.launches[2:] == ["prefill_few", "step_one"]
    engine.close()


def test_rope_that_depends_on_the_length(model: RandomModel) -> None:
    rope = RopeConfig(kind="dynamic", factor=4.0, original_context=40)
    dynamic = RandomModel(replace(model.config, rope=rope), "bf16", seed=3)
    engine, _ = open_engine(dynamic)
    for prompt in (PROMPT[:30], PROMPT, LONG[:45]):
        cpu = CpuEngine(cast(Checkpoint, dynamic), CONTEXT)
        assert list(engine.tokens(prompt, GREEDY, 4)) == list(cpu.tokens(prompt, GREEDY, 4))
    engine.close()


def test_cancelled_between_launches(model: RandomModel, make: Any) -> None:
    engine, _ = make(model, prefill_tokens=128)
    expected = last_logits(engine, LONG)
    engine.reset()
    before = engine.forwarded
    looks = iter([False, True])
    assert list(engine.tokens(LONG, GREEDY, 4, cancelled=lambda: next(looks))) == []
    assert engine.forwarded - before == 256
    np.testing.assert_array_equal(last_logits(engine, LONG), expected)
    assert engine.reused == 256
    engine.close()


def test_a_prompt_past_the_context_is_an_error(model: RandomModel) -> None:
    engine, _ = open_engine(model)
    with pytest.raises(ContextError, match="is past the context of 400 positions"):
        list(engine.tokens([*LONG, *LONG], GREEDY, 1))
    assert list(engine.tokens(PROMPT, GREEDY, 1))
    engine.close()


def test_an_alarm_in_a_long_prompt(model: RandomModel) -> None:
    """The watchdog names the wait, and the model works again."""
    engine, _ = open_engine(model)
    expected = last_logits(engine, PROMPT)
    engine.reset()
    step = engine._open_model()
    patience = int(step._args["watchdog_ns"])
    step._args["watchdog_ns"] = 5_000_000
    step._arrivals += 1  # one arrival more than there will ever be
    with pytest.raises(
        DeviceError, match=r"longer than 0.005 s: grid barrier, block [01], phase 1"
    ):
        list(engine.tokens(PROMPT, GREEDY, 4))
    step._args["watchdog_ns"] = patience
    np.testing.assert_array_equal(last_logits(engine, PROMPT), expected)
    engine.close()


def test_logits_of_all_positions_and_a_long_prompt(model: RandomModel) -> None:
    """Both share the cache."""
    engine, _ = open_engine(model)
    expected = engine.logits(PROMPT)
    assert list(engine.tokens(PROMPT, GREEDY, 1)) == [int(expected[-1].argmax())]
    assert engine.reused == 60
    np.testing.assert_array_equal(engine.logits(PROMPT), expected)
    engine.close()
