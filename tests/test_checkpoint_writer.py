"""CheckpointWriter: what it writes, and that a failed write leaves nothing behind."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weight_files import (
    HF_CONFIG,
    new_writer,
    plan,
    random_matrix,
    random_vector,
    started,
    write_all,
    write_model,
)

from minflash import checkpoint_writer
from minflash.checkpoint import CheckpointWriter, open_checkpoint
from minflash.errors import ConvertError
from minflash.leftovers import lock_folder, remove_leftovers
from minflash.packing import Layout, Matrix


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


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
    """A file of a disk that takes ``room`` bytes more, then raises ``error``."""

    room = 0
    error: BaseException

    def write(self, data: Any) -> int:
        FullDisk.room -= memoryview(data).nbytes
        if FullDisk.room < 0:
            raise FullDisk.error
        return super().write(data)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 1])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_full_disk_or_an_interrupt_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    existing: bool,
    interrupted: bool,
) -> None:
    total = sum(map(len, tree(write_model(tmp_path / "other")).values()))
    goal = tmp_path / "deep" / "model"
    if existing:
        write_model(goal)
    before = tree(tmp_path)

    def full(path: Path) -> FullDisk:
        return FullDisk(io.FileIO(path, "x"))

    full_disk = OSError(errno.ENOSPC, "No space left on device")
    FullDisk.error = KeyboardInterrupt() if interrupted else full_disk
    FullDisk.room = int(share * total) - 1
    monkeypatch.setattr(checkpoint_writer, "open_new", full)
    with (
        pytest.raises(KeyboardInterrupt if interrupted else ConvertError) as caught,
        new_writer(goal, overwrite=existing) as writer,
    ):
        write_all(writer, *plan(HF_CONFIG))
        writer.commit()
    assert tree(tmp_path) == before
    assert existing or [entry.name for entry in tmp_path.iterdir()] == ["other"]
    assert interrupted or "No space left on device" in str(caught.value)


def test_the_limit_of_the_system_leaves_nothing(tmp_path: Path) -> None:
    """The same with a write that the system itself refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ConvertError, match="File too large"):
            write_model(tmp_path / "deep" / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


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


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from weight_files import started\n"
        "from pathlib import Path\n"
        "writer = started(Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path, here = tmp_path / "model", Path(__file__).parent
    for _ in range(2):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
        killed = subprocess.run([sys.executable, "-c", script, path], env=environment)
        assert killed.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()  # what the one before left is gone
        assert left.name.endswith(".partial") and any(left.iterdir())
    alive = started(tmp_path / "other")
    write_model(tmp_path / "third")
    assert not left.exists() and len(list(tmp_path.iterdir())) == 2  # the third, and what is alive
    alive.abort()
    assert [p.name for p in tmp_path.iterdir()] == ["third"]


def test_a_writer_in_another_container_is_left_alone(tmp_path: Path) -> None:
    """Its process id means nothing here, but its folder is locked."""
    dead, kept = 2**22 + 1, tmp_path / ".model.partial"
    kept.mkdir()
    replaced = tmp_path / f".old.{dead}-00000000.replaced"
    replaced.mkdir()
    running = tmp_path / f".model.{dead}-0123abcd.partial"
    running.mkdir()
    lock = lock_folder(running)
    remove_leftovers(tmp_path)
    assert running.exists() and kept.exists() and (tmp_path / "old").exists()
    os.close(lock)
    remove_leftovers(tmp_path)
    assert not running.exists() and not replaced.exists()
