"""The cache between calls: what a prompt shares with the sequence before is not read again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from engines import cpu_engine, cuda_engine, gpu_engine
from kernel_models import RandomModel, model_config
from small_model import write_source

import minflash
from minflash.checkpoint import Checkpoint
from minflash.config import RopeConfig
from minflash.cuda_engine import LEAST_PREFILL
from minflash.engine import CpuEngine, Engine
from minflash.errors import CheckpointError, ContextError, MinflashError
from minflash.kept import KeptTokens
from minflash.llm import LLM
from minflash.sampling import Sampling
from minflash.states import load, save

GREEDY = Sampling()
PROMPT = [5, 77, 300, 12, 9, 250, 31, 8, 119, 64]
CONFIG = model_config()


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel(CONFIG, "bf16", seed=3)


@pytest.fixture(
    params=[cpu_engine, cuda_engine, pytest.param(gpu_engine, marks=pytest.mark.gpu)],
    ids=["cpu", "emulated", "gpu"],
)
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def engine(make: Any, model: RandomModel) -> Iterator[Engine]:
    engine = make(model)
    yield engine
    engine.close()


def forwarded(engine: Engine, prompt: list[int], count: int = 1) -> tuple[list[int], int]:
    before = engine.forwarded
    return list(engine.tokens(prompt, GREEDY, count)), engine.forwarded - before


def part(engine: Engine, shared: int, prompt: list[int]) -> int:
    """Tokens of a prompt that are read: of a short one on the GPU whole steps."""
    in_steps = engine.device == "cuda" and len(prompt) < LEAST_PREFILL
    return len(prompt) - (shared // 8 * 8 if in_steps else shared)


def test_only_what_differs_is_read(engine: Engine, model: RandomModel) -> None:
    answer, read = forwarded(engine, PROMPT, 5)
    assert read == len(PROMPT) + 4  # the last token is never read
    turn = [*PROMPT, *answer, 7, 8, 9]
    fresh, _ = forwarded(cpu_engine(model), turn, 5)
    assert forwarded(engine, turn, 5) == (fresh, part(engine, len(turn) - 4, turn) + 4)
    # The same prompt again: its last token is read once more, as it gives the logits.
    assert forwarded(engine, turn, 5) == (fresh, part(engine, len(turn) - 1, turn) + 4)
    other = [*PROMPT[:4], 1, 2]
    fresh, _ = forwarded(cpu_engine(model), other, 3)
    assert forwarded(engine, other, 3) == (fresh, part(engine, 4, other) + 2)
    assert forwarded(engine, PROMPT, 5) == (answer, part(engine, 4, PROMPT) + 4)
    engine.reset()
    assert forwarded(engine, PROMPT, 5) == (answer, len(PROMPT) + 4)


def test_a_closed_or_cancelled_generation_leaves_a_true_cache(
    engine: Engine, model: RandomModel
) -> None:
    expected, _ = forwarded(cpu_engine(model), PROMPT, 8)
    for taken in (0, 1, 3):
        tokens = engine.tokens(PROMPT, GREEDY, 20)
        for _ in range(taken):
            next(tokens)
        tokens.close()
        assert forwarded(engine, PROMPT, 8)[0] == expected
        assert forwarded(engine, [*PROMPT, *expected[:4]], 4)[0] == expected[4:]
    looks = iter([False, False, True])
    cancelled = engine.tokens([3, *PROMPT], GREEDY, 20, cancelled=lambda: next(looks, True))
    assert len(list(cancelled)) <= 3
    again = [3, *PROMPT]
    assert forwarded(engine, again, 1)[1] == part(engine, len(PROMPT), again)
    assert forwarded(engine, PROMPT, 8)[0] == expected


def test_logits_and_a_prompt_after_them(engine: Engine, model: RandomModel) -> None:
    expected, _ = forwarded(cpu_engine(model), PROMPT, 4)
    whole = engine.logits(PROMPT)
    assert forwarded(engine, PROMPT, 4) == (expected, part(engine, len(PROMPT) - 1, PROMPT) + 3)
    np.testing.assert_array_equal(engine.logits(PROMPT), whole)
    np.testing.assert_array_equal(np.concatenate(list(engine.logit_parts(PROMPT))), whole)


def test_an_interrupt_in_a_forward_leaves_a_true_cache(
    model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = cpu_engine(model)
    expected, _ = forwarded(cpu_engine(model), PROMPT, 8)
    forwarded(engine, PROMPT, 8)
    feed_forward = engine._open_reference()._feed_forward

    def interrupted(*arguments: Any) -> Any:
        feed_forward(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._open_reference(), "_feed_forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(engine.tokens([*PROMPT[:5], 1, 2, 3], GREEDY, 2))
    assert engine._kept.ids == PROMPT[:5]
    assert forwarded(engine, PROMPT, 8) == (expected, 5 + 7)


@pytest.mark.parametrize(
    ("rope", "shared"),
    [
        (RopeConfig(kind="default"), (7, 9, 13)),
        (RopeConfig(kind="dynamic", factor=4.0, original_context=12), (7, 9, 0)),
        (RopeConfig(kind="longrope", original_context=12), (7, 9, 0)),
    ],
)
def test_frequencies_that_change_with_the_length_are_not_mixed(
    rope: RopeConfig, shared: tuple[int, ...]
) -> None:
    kept = KeptTokens(replace(CONFIG, rope=rope))
    kept.add(range(10), length=10)
    assert [kept.shared(list(range(n))) for n in (8, 10)] == list(shared[:2])
    assert kept.shared([]) == 0 and kept.shared([9]) == 0
    kept.add(range(10, 13), length=13)
    assert kept.shared([*range(13), 0]) == shared[2]
    kept.cut(0)
    kept.add(range(14), length=14)
    assert kept.shared(list(range(14))) == 13


def test_dynamic_rope_gives_what_a_fresh_start_gives(model: RandomModel) -> None:
    rope = RopeConfig(kind="dynamic", factor=4.0, original_context=12)
    dynamic = RandomModel(replace(CONFIG, rope=rope), "bf16", seed=3)
    engine = cpu_engine(dynamic)
    answer, _ = forwarded(engine, PROMPT, 5)
    turn = [*PROMPT, *answer]
    fresh, _ = forwarded(cpu_engine(dynamic), turn, 5)
    assert forwarded(engine, turn, 5) == (fresh, len(turn) + 4)


def test_the_second_turn_of_a_conversation_starts_at_once() -> None:
    config = model_config(dim=192, hidden_dim=512, n_layers=4, max_context=2048)
    engine = CpuEngine(cast(Checkpoint, RandomModel(config, "bf16", seed=1)), 2048)
    prompt = np.random.default_rng(0).integers(0, 331, 1900).tolist()
    forwarded, seconds = [], []
    for turn in ([], [1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]):
        begin, before = time.perf_counter(), engine.forwarded
        next(engine.tokens([*prompt, *turn], GREEDY, 1))
        seconds.append(time.perf_counter() - begin)
        forwarded.append(engine.forwarded - before)
    assert forwarded == [1900, 3, 3, 3, 3]
    assert min(seconds[1:]) < seconds[0] / 10  # other programs may have had one's time


# Saved states


def test_a_saved_state_goes_on_in_another_engine(
    engine: Engine, make: Any, model: RandomModel, tmp_path: Path
) -> None:
    answer, _ = forwarded(engine, PROMPT, 6)
    path = tmp_path / "state.safetensors"
    save(path, engine, "model")
    other = make(model)
    assert load(path, other, "model") == len(PROMPT) + 5
    turn = [*PROMPT, *answer[:4]]
    assert forwarded(other, turn, 2) == (answer[4:], part(other, len(turn) - 1, turn) + 1)
    assert sorted(tmp_path.iterdir()) == [path]
    other.reset()
    save(path, other, "model")
    assert load(path, engine, "model") == 0
    assert forwarded(engine, PROMPT, 6)[0] == answer
    other.close()


def test_states_that_do_not_fit_are_refused(model: RandomModel, tmp_path: Path) -> None:
    cpu, cuda, path = cpu_engine(model), cuda_engine(model), tmp_path / "state"
    forwarded(cpu, PROMPT)
    save(path, cpu, "model one")
    with pytest.raises(CheckpointError, match=r"another model \(fingerprint model one, this.*two"):
        load(path, cpu, "model two")
    with pytest.raises(CheckpointError, match=r"'cpu-float32-1', and this engine's is 'cuda-block"):
        load(path, cuda, "model one")
    with pytest.raises(ContextError, match="holds 10 positions, the context 8"):
        load(path, cpu_engine(model, 8), "model one")
    wide = RandomModel(model_config(n_layers=3), "bf16")
    with pytest.raises(CheckpointError, match=r"the tensors are .* they must be"):
        load(path, cpu_engine(wide), "model one")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        load(path, cpu, "model one")
    with pytest.raises(MinflashError, match="cannot be written"):
        save(tmp_path / "no" / "folder", cpu, "model one")
    # What was in the cache is still there.
    assert forwarded(cpu, PROMPT)[1] == 1
    cuda.close()


def test_one_wrong_byte_in_a_state_is_found(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "state"
    expected, _ = forwarded(engine, PROMPT, 3)
    save(path, engine, "model")
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")  # of the data
    for place in np.linspace(begin, len(whole) - 1, 9, dtype=int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"the state is damaged.* save it again"):
            load(path, engine, "model")
    old = whole.replace(b'"version":"2"', b'"version":"1"')  # had no hash
    path.write_bytes(old)
    with pytest.raises(CheckpointError, match=r"version 2 .*version '1'\); read .* save it again"):
        load(path, engine, "model")
    assert old != whole and forwarded(engine, PROMPT, 3)[0] == expected
    path.write_bytes(whole)
    assert load(path, engine, "model") == len(PROMPT) + 2


def test_states_of_an_llm(converted: Path, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with minflash.load(converted, device="cpu") as llm:
        text = llm.generate("Once upon", max_tokens=8, ignore_eos=True)
        llm.save_state(path)
    with minflash.load(converted, device="cpu") as llm:
        assert llm.load_state(path) == len("Once upon") + 7
        assert llm.generate("Once upon", max_tokens=8, ignore_eos=True) == text
        assert llm._engine.forwarded == 1 + 7
        assert llm.last_stats is not None and llm.last_stats.reused_tokens == 8
        llm.reset()
        llm.generate("Once upon", max_tokens=1)
        assert llm._engine.forwarded == 8 + 9
    source = write_source(tmp_path / "source", "qwen2")
    other = minflash.convert(source, tmp_path / "other", progress=False)
    with minflash.load(other, device="cpu") as llm, pytest.raises(CheckpointError, match="another"):
        llm.load_state(path)
    engine = CpuEngine(cast(Checkpoint, RandomModel(CONFIG, "bf16")), 32)
    with LLM(engine) as llm, pytest.raises(MinflashError, match="not loaded from files"):
        llm.save_state(path)


def test_the_same_prompt_gives_the_same_bits_on_the_gpu(model: RandomModel) -> None:
    engine, seen = cuda_engine(model), []

    def note(logits: Any, position: int) -> int:
        seen.append(logits.copy())
        return int(logits.argmax())

    for _ in range(2):
        list(engine.tokens(PROMPT, GREEDY, 3, choose=note))
    list(engine.tokens([*PROMPT, 1, 2, 3], GREEDY, 1, choose=note))
    np.testing.assert_array_equal(seen[:3], seen[3:6])
    engine.reset()
    list(engine.tokens([*PROMPT, 1, 2, 3], GREEDY, 1, choose=note))
    np.testing.assert_array_equal(seen[6], seen[7])
    engine.close()
