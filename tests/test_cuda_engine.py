"""The engine over the kernel, on the emulated device: what the GPU path does around launches."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from engines import HF_CONFIG, small_tuning
from kernel_models import EmulatedDevice, RandomModel, bound, references, without_last_block

from minflash import engine as engine_module
from minflash import probe
from minflash.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from minflash.codegen import generate
from minflash.config import ModelConfig, RopeConfig
from minflash.cuda_engine import AHEAD, CudaEngine, model_problem
from minflash.engine import CpuEngine
from minflash.errors import CheckpointError, ContextError, DeviceError, MinflashError
from minflash.gpu_memory import MARGIN_BYTES, cache_bytes, gpu_context
from minflash.sampling import Sampling
from minflash.step_model import StepModel
from minflash.tensors import expected_tensors
from minflash.upload import Upload

PROMPT = [5, 77, 300, 12, 9, 250, 31, 8, 119, 64]  # a chunk of 8 and one of 2
GREEDY = Sampling()


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel(ModelConfig.from_hf(HF_CONFIG), "bf16", seed=3)


@pytest.fixture(scope="module")
def checkpoint(
    model: RandomModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Checkpoint]:
    """The model's weight file, opened."""
    names = expected_tensors(model.config)
    vectors = {name: shape[0] for name, shape in names.items() if len(shape) == 1}
    folder = tmp_path_factory.mktemp("engine") / "model"
    with CheckpointWriter(folder, HF_CONFIG, model.matrices, vectors) as writer:
        for name in names:
            if name in vectors:
                writer.write_vector(name, model.vector(name))
            else:
                writer.write_matrix(name, model.matrix(name))
        writer.commit()
    with open_checkpoint(folder) as opened:
        yield opened


def open_engine(
    checkpoint: Checkpoint, max_context: int | None = None, **changes: Any
) -> tuple[CudaEngine, EmulatedDevice]:
    device = EmulatedDevice()
    for name, value in changes.items():
        setattr(device, name, value)
    tuning = small_tuning(checkpoint, device)
    engine = CudaEngine(checkpoint, max_context, device=device, tuning=tuning)
    engine._open_model()._args["watchdog_ns"] = 120 * 10**9  # the machine may be busy
    return engine, device


@pytest.fixture
def engine(checkpoint: Checkpoint) -> Iterator[CudaEngine]:
    engine, _ = open_engine(checkpoint, 64)
    yield engine
    engine.close()


def test_logits_are_the_references_within_the_bound(engine: CudaEngine, model: RandomModel) -> None:
    exact, rounded = references(model, PROMPT)
    logits = engine.logits(PROMPT)
    assert logits.dtype == np.float32
    assert np.abs(logits - exact).max() <= bound(exact, rounded)


def test_greedy_tokens_are_the_references(engine: CudaEngine, checkpoint: Checkpoint) -> None:
    expected = list(CpuEngine(checkpoint).tokens(PROMPT, GREEDY, 6))
    assert list(engine.tokens(PROMPT, GREEDY, 6)) == expected
    assert list(engine.tokens(PROMPT, GREEDY, 1)) == expected[:1]


def test_drawn_tokens_are_the_references(engine: CudaEngine, checkpoint: Checkpoint) -> None:
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=7)
    expected = list(CpuEngine(checkpoint).tokens(PROMPT, sampling, 6))
    assert list(engine.tokens(PROMPT, sampling, 6)) == expected


def test_rope_that_depends_on_the_length_is_as_on_the_cpu(model: RandomModel) -> None:
    rope = RopeConfig(kind="dynamic", factor=4.0, original_context=12)
    dynamic = RandomModel(replace(model.config, rope=rope), "bf16", seed=3)
    device = EmulatedDevice()
    tuning = small_tuning(model, device)
    engine = CudaEngine.over(StepModel(dynamic, device, 64, tuning=tuning, watchdog_ns=120 * 10**9))
    tokens = [*PROMPT, *PROMPT]
    exact, rounded = references(dynamic, tokens)
    assert np.abs(engine.logits(tokens) - exact).max() <= bound(exact, rounded)
    expected = list(CpuEngine(cast(Checkpoint, dynamic), 64).tokens(PROMPT, GREEDY, 6))
    assert list(engine.tokens(PROMPT, GREEDY, 6)) == expected


def test_steps_are_launched_ahead_but_never_too_many(checkpoint: Checkpoint) -> None:
    engine, device = open_engine(checkpoint, 64)
    tokens = engine.tokens(PROMPT, GREEDY, 20)
    next(tokens)
    assert device.launches == ["step_many", "step_many", *["step_one"] * AHEAD]
    for _ in range(3):
        next(tokens)
    assert len(device.launches) == 2 + AHEAD + 3
    assert len(list(tokens)) == 16
    assert len(device.launches) == 2 + 19  # the last token is never read
    engine.close()


def test_at_most_two_steps_run_after_a_cancel(checkpoint: Checkpoint) -> None:
    engine, device = open_engine(checkpoint, 64)
    got: list[int] = []
    for token in engine.tokens(PROMPT, GREEDY, 20, cancelled=lambda: len(got) == 4):
        got.append(token)
    assert len(got) == 4
    of_the_tokens = 2 + 3  # the prompt's second step chose the first of them
    assert len(device.launches) <= of_the_tokens + 2
    engine.close()


def test_only_the_last_chunk_of_a_prompt_computes_the_head(checkpoint: Checkpoint) -> None:
    heads: list[tuple[int, int]] = []
    engine, _ = open_engine(
        checkpoint,
        64,
        before_launch=lambda args: heads.append((int(args["n_columns"]), int(args["head"]))),
    )
    assert len(list(engine.tokens([*PROMPT, *PROMPT[:3]], GREEDY, 1))) == 1
    assert heads == [(8, 0), (5, 1)]
    engine.close()


def test_a_closed_generation_leaves_the_engine_usable(engine: CudaEngine) -> None:
    expected = list(engine.tokens(PROMPT, GREEDY, 5))
    for taken in (0, 1, 3):
        tokens = engine.tokens(PROMPT[::-1], GREEDY, 20)
        for _ in range(taken):
            next(tokens)
        tokens.close()
        assert list(engine.tokens(PROMPT, GREEDY, 5)) == expected


def test_a_generation_fills_the_context_to_its_last_position(checkpoint: Checkpoint) -> None:
    engine, _ = open_engine(checkpoint, len(PROMPT) + 3)
    assert len(list(engine.tokens(PROMPT, GREEDY, 3))) == 3
    with pytest.raises(ContextError, match="position 13 is past the context of 13"):
        list(engine.tokens([*PROMPT, 1, 2, 3, 4], GREEDY, 1))
    engine.close()


def fill_with_nan(step: StepModel) -> None:
    """All keys and values."""
    step.write_cache(np.full_like(step.read_cache(4), 0xFF))


def test_logits_that_are_not_finite_are_an_error(
    checkpoint: Checkpoint, model: RandomModel
) -> None:
    """After which the model can be used, whatever else the cache holds."""
    engine, _ = open_engine(checkpoint, 64)
    fill_with_nan(engine._open_model())
    with pytest.raises(MinflashError, match=r"no finite logit \(position 10\): its weights are"):
        list(engine.tokens(PROMPT, GREEDY, 5))
    exact, rounded = references(model, PROMPT)
    assert np.abs(engine.logits(PROMPT) - exact).max() <= bound(exact, rounded)
    for fail in (engine.logits, engine.hidden, lambda tokens: [*engine.logit_parts(tokens)][-1]):
        fill_with_nan(engine._open_model())
        assert not np.isfinite(fail(PROMPT)).all()
        assert np.abs(engine.logits(PROMPT) - exact).max() <= bound(exact, rounded)
    engine.close()


@pytest.mark.parametrize("blocks", [2, 4, 7])
def test_an_alarm_of_one_column_names_what_did_not_come(
    checkpoint: Checkpoint, model: RandomModel, blocks: int
) -> None:
    """A missing block's results: who waits, the number they should carry, and what is there."""
    facts = replace(EmulatedDevice().facts, multiprocessors=blocks)
    engine, _ = open_engine(checkpoint, 64, facts=facts)
    step = engine._open_model()
    whole, patience = step._launch, int(step._args["watchdog_ns"])
    step._args["watchdog_ns"], step._launch = 5_000_000, without_last_block(step)
    first = step._phases
    with pytest.raises(DeviceError) as caught:
        step.token(step.step([PROMPT[0]], 0))
    alarm = r"of another block, block (\d+), phase (\d+), expected (\d+), seen (\d+);"
    found = re.search("0.005 s: result " + alarm, str(caught.value))
    assert found is not None, caught.value
    block, phase, expected, seen = map(int, found.groups())
    assert block < blocks - 1 and seen != expected
    assert phase >= 1 and expected == first + phase - 1  # what the phase before should have written
    step._args["watchdog_ns"], step._launch = patience, whole
    exact, rounded = references(model, PROMPT)
    assert np.abs(engine.logits(PROMPT) - exact).max() <= bound(exact, rounded)
    engine.close()


def test_an_alarm_names_what_waited_and_the_model_works_again(
    checkpoint: Checkpoint, model: RandomModel
) -> None:
    engine, _ = open_engine(checkpoint, 64)
    step = engine._open_model()
    fill_with_nan(step)  # what a step on garbage may leave
    step._args["watchdog_ns"], patience = 5_000_000, int(step._args["watchdog_ns"])
    step._arrivals += 1  # one arrival more than there will ever be
    with pytest.raises(
        DeviceError,
        match=r"longer than 0.005 s: grid barrier, block [01], phase 1, expected 3, seen [12]",
    ):
        list(engine.tokens(PROMPT, GREEDY, 4))
    step._args["watchdog_ns"] = patience
    exact, rounded = references(model, PROMPT)
    assert np.abs(engine.logits(PROMPT) - exact).max() <= bound(exact, rounded)
    engine.close()


@pytest.mark.parametrize("launched", [False, True])
def test_an_interrupt_around_a_launch_leaves_the_model_usable(
    checkpoint: Checkpoint, model: RandomModel, launched: bool
) -> None:
    """Ctrl-C before or after the driver's call, so that nobody counted the launch."""
    engine, _ = open_engine(checkpoint, 64)
    step = engine._open_model()
    real = dict(step._launch)

    def interrupted(args: np.ndarray) -> None:
        if launched:
            real["step_many"](args)
        raise KeyboardInterrupt

    step._launch = {**real, "step_many": interrupted}
    with pytest.raises(KeyboardInterrupt):
        list(engine.tokens(PROMPT, GREEDY, 4))
    step._launch = real
    engine.reset()
    exact, rounded = references(model, PROMPT)
    assert np.abs(engine.logits(PROMPT) - exact).max() <= bound(exact, rounded)
    engine.close()


def test_the_context_is_the_models_own_or_what_fits(checkpoint: Checkpoint) -> None:
    engine, device = open_engine(checkpoint)
    assert engine.max_context == 512
    assert engine.peak_memory_bytes >= checkpoint.nbytes
    engine.close()
    assert not device._arrays
    with pytest.raises(ContextError, match="max_context is 513, but the model's own is 512"):
        open_engine(checkpoint, 513)


def test_too_little_memory_says_needs_has_and_what_fits(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    config = checkpoint.config
    program = generate(config, checkpoint.matrices, small_tuning(checkpoint, EmulatedDevice()))
    fixed = program.weights.nbytes + program.workspace["total"] + MARGIN_BYTES
    for room in (16, 304):
        free = fixed + cache_bytes(config, room)
        with pytest.raises(ContextError, match=f"needs .* are free; the largest.* fits is {room}$"):
            gpu_context(config, program, free, 511)
        assert gpu_context(config, program, free, room) == room
        assert gpu_context(config, program, free, None) == room
        assert f"the context is {room} positions, bounded by" in caplog.text
    with pytest.raises(DeviceError, match=r"the weights and buffers need .* are free now; close"):
        gpu_context(config, program, fixed - 1, None)


def test_a_closed_engine_says_so(checkpoint: Checkpoint) -> None:
    engine, _ = open_engine(checkpoint, 64)
    engine.close()
    engine.close()
    with pytest.raises(DeviceError, match="this engine is closed; load the model again"):
        engine.logits([1])


def test_bad_numbers_in_the_weight_file_are_found_during_the_upload(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raw(self: Checkpoint, name: str) -> Any:
        if name == "layers.1.ffn_norm":
            raise CheckpointError("layers.1.ffn_norm holds NaN")
        return original(self, name)

    original = Checkpoint.raw
    monkeypatch.setattr(Checkpoint, "raw", raw)
    device = EmulatedDevice()
    with pytest.raises(CheckpointError, match="ffn_norm holds NaN"):
        CudaEngine(checkpoint, 64, device=device, tuning=small_tuning(checkpoint, device))
    assert not device._arrays


def test_an_upload_copies_every_byte_in_any_order(checkpoint: Checkpoint) -> None:
    for names in (checkpoint.names, checkpoint.names[::-1]):
        device = EmulatedDevice()
        with Upload(checkpoint, progress=True) as upload:
            for name in names:
                data = checkpoint.raw(name)
                address = device.allocate(data.nbytes)
                upload.copy_to(device, name, address)
                assert np.array_equal(device._view(address, data.nbytes), data.reshape(-1))


class FakeRuntime:
    """cupy.cuda.runtime of a driver or a card that is too old."""

    class CUDARuntimeError(RuntimeError):
        pass

    def driverGetVersion(self) -> int:
        return 11080

    def runtimeGetVersion(self) -> int:
        return 12090

    def getDeviceCount(self) -> int:
        raise self.CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is ...")

    def getDevice(self) -> int:
        return 0

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        return {"name": b"Tesla T4", "major": 7, "minor": 5}


def test_an_old_driver_and_an_old_card_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = type("cupy", (), {"cuda": type("cuda", (), {"runtime": FakeRuntime()})})
    monkeypatch.setitem(sys.modules, "cupy", fake)
    assert "offers CUDA 11.8, and CuPy needs 12.9; update" in (probe._cupy_problem() or "")
    assert "T4 has compute capability 7.5, and the kernel needs 8.0" in (
        probe._card_problem() or ""
    )


def test_a_model_that_the_kernel_cannot_run_goes_to_the_cpu_only_when_no_device_is_named(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert model_problem(checkpoint) is None
    monkeypatch.delenv("MINFLASH_DEVICE", raising=False)
    monkeypatch.setattr("minflash.engine.cuda_problem", lambda: None)
    monkeypatch.setattr(checkpoint, "config", replace(checkpoint.config, head_dim=16))
    monkeypatch.setattr("minflash.engine.CpuEngine", lambda *_: "the CPU's")
    assert engine_module.open_engine(checkpoint, None, None) == "the CPU's"
    assert "supports head_dim 64, 96 and 128, this model has 16" in caplog.text
