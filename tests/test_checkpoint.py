"""The weight file, written and read back, by minflash and by the program in docs/format.md."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from numpy.typing import NDArray
from weight_files import HF_CONFIG, random_matrix, random_vector, write_model

from minflash.checkpoint import (
    Checkpoint,
    SafetensorsFile,
    expected_tensors,
    file_order,
    open_checkpoint,
    read_safetensors_header,
)
from minflash.config import ModelConfig
from minflash.errors import CheckpointError
from minflash.packing import Layout, dequantize

LAYER_NAMES = [
    "attn_norm",
    "wqkv",
    "wqkv_bias",
    "q_norm",
    "k_norm",
    "wo",
    "wo_bias",
    "ffn_norm",
    "w_gate_up",
    "w_down",
]
STORED = [("int4", 32), ("int4", 64), ("int4", 128), ("int8", 64), ("int8", 128), ("fp8", 32)]
STORED += [("fp16", 0), ("bf16", 0), ("fp32", 0)]


def check_contents(checkpoint: Checkpoint) -> None:
    """The tensors are those that ``write_all`` makes."""
    for seed, name in enumerate(checkpoint.names):
        if name in checkpoint.matrices:
            expected = random_matrix(checkpoint.matrices[name], seed)
            found = checkpoint.matrix(name)
            np.testing.assert_array_equal(found.codes, expected.codes)
            for part, other in ((found.scales, expected.scales), (found.biases, expected.biases)):
                np.testing.assert_array_equal(part, other)
        else:
            vector = checkpoint.vector(name)
            assert vector.dtype == np.float32 and vector.flags.aligned
            np.testing.assert_array_equal(vector, random_vector(name, len(vector)))


@pytest.mark.parametrize("type,group", STORED)
def test_write_and_read(tmp_path: Path, type: str, group: int) -> None:
    path = write_model(tmp_path / "model", layer_type=type, group=group, head_type="bf16")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.names == list(expected_tensors(checkpoint.config))
        assert checkpoint.names[1:11] == [f"layers.0.{name}" for name in LAYER_NAMES]
        assert checkpoint.matrices["layers.1.w_gate_up"] == Layout(80, 48, type, group)
        assert checkpoint.nbytes == sum(checkpoint.raw(name).nbytes for name in checkpoint.names)
        check_contents(checkpoint)


@pytest.mark.parametrize("shard_bytes", [1, 4000, 9000])
def test_shards(tmp_path: Path, shard_bytes: int) -> None:
    path = write_model(tmp_path / "model", shard_bytes=shard_bytes)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2 and not (path / "model.safetensors").exists()
    for shard in shards:
        tensors = read_safetensors_header(shard).tensors
        assert sum(info.nbytes for info in tensors.values()) <= shard_bytes or len(tensors) == 1
    with open_checkpoint(path) as checkpoint:
        check_contents(checkpoint)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == checkpoint.nbytes
        assert list(index["weight_map"]) == checkpoint.names


def test_safetensors_library_reads_it(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    with (
        open_checkpoint(path) as checkpoint,
        safetensors.safe_open(path / "model.safetensors", "numpy") as file,
    ):
        assert set(file.keys()) == set(checkpoint.names)
        assert file.metadata()["format"] == "minflash"
        for name in checkpoint.names:
            assert file.get_tensor(name).tobytes() == checkpoint.raw(name).tobytes()


def test_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {
        "b": np.arange(6, dtype=np.int64).reshape(2, 3),
        "a": np.float16([1, 2, 3]),
        "empty": np.zeros((0, 4)),
        "scalar": np.float32(7),
    }
    save_file(
        {name: np.asarray(value) for name, value in tensors.items()}, tmp_path / "x.safetensors"
    )
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert {name: info.shape for name, info in file.tensors.items()} == {
            n: np.shape(t) for n, t in tensors.items()
        }
        for name, value in tensors.items():
            assert file.data(name).tobytes() == np.asarray(value).tobytes()
        with pytest.raises(CheckpointError, match="no tensor 'c'"):
            file.data("c")


def test_config_is_kept(tmp_path: Path) -> None:
    hf_config = {
        **HF_CONFIG,
        "note": "grüße",
        "quantization_config": {"quant_method": "minflash", "layout_version": 0},
    }
    path = write_model(tmp_path / "model", hf_config)
    with open_checkpoint(path) as checkpoint:
        wanted = {
            **hf_config,
            "quantization_config": {"quant_method": "minflash", "layout_version": 1},
        }
        assert checkpoint.hf_config == wanted
        assert checkpoint.config == ModelConfig.from_hf(HF_CONFIG)


def test_tied_model_has_no_head(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", {**HF_CONFIG, "tie_word_embeddings": True})
    with open_checkpoint(path) as checkpoint:
        assert "lm_head" not in checkpoint.names and checkpoint.names[-1] == "final_norm"


@pytest.mark.parametrize(
    "model_type,hf_class",
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")],
)
def test_file_order_is_the_order_of_expected_tensors(model_type: str, hf_class: str) -> None:
    config = {
        **HF_CONFIG,
        "num_hidden_layers": 12,
        "model_type": model_type,
        "architectures": [hf_class],
    }
    config["mlp_bias"] = model_type == "llama"
    names = list(expected_tensors(ModelConfig.from_hf(config)))
    assert sorted(sorted(names), key=file_order) == names
    with pytest.raises(ValueError):
        file_order("layers.0.mystery")


def test_views_outlive_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "model"))
    view = checkpoint.raw("embed")
    assert not view.flags.writeable and view.shape == checkpoint.matrices["embed"].shape
    before = view.tobytes()
    checkpoint.close()
    assert view.tobytes() == before
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.raw("embed")


def test_wrong_questions(tmp_path: Path) -> None:
    with open_checkpoint(write_model(tmp_path / "model")) as checkpoint:
        for ask, name in (
            (checkpoint.matrix, "final_norm"),
            (checkpoint.vector, "embed"),
            (checkpoint.raw, "layers.9.wo"),
        ):
            with pytest.raises(CheckpointError, match=name):
                ask(name)


def test_opening_reads_no_data(tmp_path: Path) -> None:
    """A large model opens without allocating for its size."""
    config = {**HF_CONFIG, "vocab_size": 400_000}
    path = write_model(tmp_path / "model", config)
    tracemalloc.start()
    with open_checkpoint(path) as checkpoint:
        checkpoint.raw("embed")  # 26 MB, scales checked
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert checkpoint.nbytes > 50_000_000 and peak < 6_000_000


# The document


def document_reader() -> Callable[[Path, str], NDArray[np.float32]]:
    """The program at the end of docs/format.md."""
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    read: Callable[[Path, str], NDArray[np.float32]] = names["read"]
    return read


@pytest.mark.parametrize("type,group", STORED)
def test_the_reader_of_the_document(tmp_path: Path, type: str, group: int) -> None:
    path = write_model(
        tmp_path / "model", shard_bytes=20_000, layer_type=type, group=group, head_type=type
    )
    read = document_reader()
    with open_checkpoint(path) as checkpoint, np.errstate(invalid="ignore"):
        for name in checkpoint.names[:6] + checkpoint.names[-2:]:
            if name in checkpoint.matrices:
                expected = dequantize(checkpoint.matrix(name))
            else:
                expected = checkpoint.vector(name)
            np.testing.assert_array_equal(read(path, name), expected)
