"""The weight file, written and read back; what a failed write leaves behind."""

from __future__ import annotations

import errno
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from weight_files import HF_CONFIG, plan, random_matrix, random_vector, write_all, write_model

from minflash import checkpoint_writer
from minflash.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    SafetensorsFile,
    expected_tensors,
    file_order,
    open_checkpoint,
    read_safetensors_header,
)
from minflash.config import ModelConfig
from minflash.errors import CheckpointError, ConvertError
from minflash.packing import Layout, Matrix

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


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


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


@pytest.mark.parametrize(
    "type,group",
    [("int4", 32), ("int4", 64), ("int8", 128), ("fp8", 32), ("fp16", 0), ("bf16", 0), ("fp32", 0)],
)
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
    assert sorted(reversed(names), key=file_order) == names
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


# The writer


def new_writer(path: Path, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(path, HF_CONFIG, *plan(HF_CONFIG), **options)


def test_pieces_of_rows(tmp_path: Path) -> None:
    layouts, vectors = plan(HF_CONFIG)
    whole = write_model(tmp_path / "whole")
    with new_writer(tmp_path / "pieces") as writer:
        for seed, name in enumerate(writer.names):
            if name in vectors:
                writer.write_vector(name, random_vector(name, vectors[name]))
            else:
                matrix = random_matrix(layouts[name], seed)
                writer.write_matrix(
                    name,
                    (cut(matrix, start, start + 16) for start in range(0, matrix.layout.rows, 16)),
                )
        pieces = writer.commit()
    assert tree(pieces) == tree(whole)


def cut(matrix: Matrix, start: int, stop: int) -> Matrix:
    layout = matrix.layout
    part = Layout(min(stop, layout.rows) - start, layout.cols, layout.type, layout.group_size)
    scales = None if matrix.scales is None else matrix.scales[start:stop]
    biases = None if matrix.biases is None else matrix.biases[start:stop]
    return Matrix(part, matrix.codes[start:stop], scales, biases)


def test_small_chunks_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_model(tmp_path / "whole")
    monkeypatch.setattr(checkpoint_writer, "_CHUNK_BYTES", 1)
    assert tree(write_model(tmp_path / "chunks")) == tree(whole)


def test_files_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "source.json").write_bytes(b"[1]")
    with new_writer(tmp_path / "deep" / "er" / "model") as writer:
        write_all(writer, *plan(HF_CONFIG))
        writer.copy_file("tokenizer.json", b"{}")
        writer.copy_file("generation_config.json", tmp_path / "source.json")
        path = writer.commit()
    assert (path / "tokenizer.json").read_bytes() == b"{}"
    assert (path / "generation_config.json").read_bytes() == b"[1]"
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_misuse_is_an_assertion(tmp_path: Path) -> None:
    layouts, vectors = plan(HF_CONFIG)
    small = Layout(1, 48, "int8", 32)
    misuses: list[Callable[[CheckpointWriter], object]] = [
        lambda writer: writer.write_vector(
            "final_norm", random_vector("final_norm", 48)
        ),  # not its turn
        lambda writer: writer.write_matrix("embed", random_matrix(small)),  # too few rows
        lambda writer: writer.write_matrix(
            "embed", random_matrix(Layout(37, 48, "bf16"))
        ),  # another type
        lambda writer: writer.copy_file("../tokenizer.json", b""),
        lambda writer: writer.copy_file("model.safetensors", b""),
        lambda writer: writer.commit(),  # nothing written
    ]
    for misuse in misuses:
        with pytest.raises(AssertionError), new_writer(tmp_path / "model") as writer:
            misuse(writer)
        assert not list(tmp_path.iterdir())


def test_without_commit_nothing_is_left(tmp_path: Path) -> None:
    with new_writer(tmp_path / "deep" / "model") as writer:
        write_all(writer, *plan(HF_CONFIG))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError, ValueError])
def test_an_exception_leaves_nothing(tmp_path: Path, interrupt: type[BaseException]) -> None:
    with pytest.raises(interrupt), new_writer(tmp_path / "model") as writer:
        writer.write_matrix("embed", random_matrix(plan(HF_CONFIG)[0]["embed"]))
        raise interrupt
    assert not list(tmp_path.iterdir())


class FullDisk(io.BufferedWriter):
    """A file of a disk that takes ``room`` bytes more."""

    room = 0

    def write(self, data: Any) -> int:
        FullDisk.room -= memoryview(data).nbytes
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 1])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, existing: bool
) -> None:
    total = sum(map(len, tree(write_model(tmp_path / "other")).values()))
    goal = tmp_path / "deep" / "model"
    if existing:
        write_model(goal)
    before = tree(tmp_path)

    def full(path: Path) -> FullDisk:
        return FullDisk(io.FileIO(path, "x"))

    FullDisk.room = int(share * total) - 1
    monkeypatch.setattr(checkpoint_writer, "open_new", full)
    with (
        pytest.raises(ConvertError, match="No space left on device"),
        new_writer(goal, overwrite=existing) as writer,
    ):
        write_all(writer, *plan(HF_CONFIG))
        writer.commit()
    assert tree(tmp_path) == before
    assert existing or [entry.name for entry in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_exchange_restores_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    goal = write_model(tmp_path / "model")
    before = tree(tmp_path)
    calls = []
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == call:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_writer(goal, overwrite=True) as writer:
        write_all(writer, *plan(HF_CONFIG))
        writer.commit()
    assert tree(tmp_path) == before


def test_goal_taken(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for path, overwrite, message in (
        (file, False, "is a file"),
        (file, True, "is a file"),
        (folder, False, "exists already"),
        (folder, True, "not a converted model"),
    ):
        with pytest.raises(ConvertError, match=message):
            new_writer(path, overwrite=overwrite)
    assert tree(tmp_path) == {"file": b"x", "folder/notes.txt": b"mine"}


def test_empty_goal_is_used(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    open_checkpoint(write_model(tmp_path / "model")).close()


def test_goal_taken_in_the_meantime(tmp_path: Path) -> None:
    with (
        pytest.raises(ConvertError, match="exists already"),
        new_writer(tmp_path / "model") as writer,
    ):
        write_all(writer, *plan(HF_CONFIG))
        write_model(tmp_path / "model", layer_type="int8")
        writer.commit()
    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert checkpoint.matrices["layers.0.wo"].type == "int8"
    assert len(list(tmp_path.iterdir())) == 1


def test_overwrite_replaces_after_success(tmp_path: Path) -> None:
    goal = write_model(tmp_path / "model", layer_type="int8")
    with pytest.raises(ZeroDivisionError), new_writer(goal, overwrite=True) as writer:
        write_all(writer, *plan(HF_CONFIG))
        raise ZeroDivisionError
    with open_checkpoint(goal) as checkpoint:
        assert checkpoint.matrices["layers.0.wo"].type == "int8"
    with new_writer(goal, overwrite=True) as writer:
        write_all(writer, *plan(HF_CONFIG))
        writer.commit()
    with open_checkpoint(goal) as checkpoint:
        assert checkpoint.matrices["layers.0.wo"].type == "int4"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_not_written(tmp_path: Path, value: float) -> None:
    layouts, _ = plan(HF_CONFIG)
    matrix = random_matrix(layouts["embed"])
    assert matrix.scales is not None
    matrix.scales[20, 1] = value
    with (
        pytest.raises(ConvertError, match="'embed': a scale or bias"),
        new_writer(tmp_path / "model") as writer,
    ):
        writer.write_matrix("embed", matrix)
    vector = np.full(48, value, dtype=np.float32)
    with (
        pytest.raises(ConvertError, match=r"'layers.0.attn_norm': holds NaN"),
        new_writer(tmp_path / "model") as writer,
    ):
        writer.write_matrix("embed", random_matrix(layouts["embed"]))
        writer.write_vector("layers.0.attn_norm", vector)
    assert not list(tmp_path.iterdir())
