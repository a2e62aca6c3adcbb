"""The engine over the kernel, here on the emulated device: what the GPU path does around launches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_models import EmulatedDevice, RandomModel, bound, references

from minflash.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from minflash.config import ModelConfig
from minflash.cuda_engine import CudaEngine
from minflash.engine import CpuEngine
from minflash.sampling import Sampling
from minflash.tensors import expected_tensors
from minflash.tuning import Tuning, choose

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96,
    "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 331, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
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


def small_tuning(config: ModelConfig, device: EmulatedDevice) -> Tuning:
    return choose(config, device.facts, stages=8, stage_bytes=4096, in_flight_bytes=12288)


def open_engine(
    checkpoint: Checkpoint, max_context: int | None = None, **changes: Any
) -> tuple[CudaEngine, EmulatedDevice]:
    device = EmulatedDevice()
    for name, value in changes.items():
        setattr(device, name, value)
    tuning = small_tuning(checkpoint.config, device)
    return CudaEngine(checkpoint, max_context, device=device, tuning=tuning), device


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
