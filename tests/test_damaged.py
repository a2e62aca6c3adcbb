"""Damaged weight files: each gives one MinflashError with the file, the tensor and the rule."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damages import CASES, MODEL, WQKV, Case, poke
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weight_files import Parts, write_model

from minflash.checkpoint import SafetensorsFile, open_checkpoint
from minflash.errors import MinflashError

SHARD_BYTES = 12_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """An undamaged model in one file (False) and in shards (True)."""
    root = tmp_path_factory.mktemp("undamaged")
    return {
        False: write_model(root / "single"),
        True: write_model(root / "sharded", shard_bytes=SHARD_BYTES),
    }


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def read_everything(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.names:
            if name in checkpoint.matrices:
                checkpoint.matrix(name)
            else:
                checkpoint.vector(name)


@pytest.mark.parametrize("sharded", [False, True])
def test_undamaged(models: dict[bool, Path], sharded: bool) -> None:
    read_everything(models[sharded])
    assert len(list(models[sharded].glob("*.safetensors"))) == (3 if sharded else 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_damaged(models: dict[bool, Path], tmp_path: Path, case: Case, traced: None) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models[case.sharded], folder)
    case.damage(folder)
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    with pytest.raises(MinflashError) as caught:
        read_everything(folder)
    seconds = time.process_time() - start  # of the processor: the machine may be busy
    peak = tracemalloc.get_traced_memory()[1] - before
    message = str(caught.value)
    assert str(folder) in message
    for word in case.words:
        assert word in message, message
    assert len(message) < 600
    message.encode()  # can be printed
    assert seconds < 1 and peak < 50_000_000


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "a\0b"):
        if path.name == "file":
            path.write_text("x")
        with pytest.raises(MinflashError):
            open_checkpoint(path)


def test_fp8_codes_are_no_nan(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", layer_type="fp8")
    for value in (b"\x7f", b"\xff"):
        poke(WQKV, 100, value)(folder)
        with (
            open_checkpoint(folder) as checkpoint,
            pytest.raises(MinflashError, match="an fp8 code"),
        ):
            checkpoint.raw(WQKV)


@pytest.mark.parametrize("file", [MODEL, "config.json"])
def test_no_permission(
    models: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The superuser may read everything, so the refusal is simulated for everyone."""
    folder = tmp_path / "model"
    shutil.copytree(models[False], folder)

    def refuse(path: Path, *mode: str) -> Any:
        if path.name == file:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *mode)

    original = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MinflashError, match="cannot be read: Permission denied"):
        open_checkpoint(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_no_permission_for_real(models: dict[bool, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models[False], folder)
    (folder / MODEL).chmod(0)
    with pytest.raises(MinflashError, match="Permission denied"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", [b'{"a":1e999}', b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,1e9]}}']
)
def test_foreign_headers(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(MinflashError, match="tensor 'a'"):
        SafetensorsFile(tmp_path / "x.safetensors")


# Random damage: opening and reading works or raises a MinflashError, nothing else.


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_bytes(models: dict[bool, Path], tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray((models[False] / MODEL).read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    places = st.one_of(st.integers(0, 7), st.integers(8, header - 1), st.integers(0, len(raw) - 1))
    for place, value in data.draw(
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)
    ):
        raw[place] = value
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    expect_no_surprise(models[False], tmp_path, MODEL, bytes(raw))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_json(models: dict[bool, Path], tmp_path: Path, data: st.DataObject) -> None:
    """Any value may stand anywhere in the header, in the metadata and in config.json."""
    parts = Parts.load(models[False] / MODEL)
    values = json.loads((models[False] / "config.json").read_text())
    target: Any = data.draw(st.sampled_from([parts.header, parts.matrices, values]))
    while True:
        key = data.draw(st.sampled_from(sorted(target)))
        if not isinstance(target[key], dict) or not target[key] or data.draw(st.booleans()):
            break
        target = target[key]
    target[key] = data.draw(JSON_VALUES)
    if target is values or target is values.get("quantization_config"):
        return expect_no_surprise(
            models[False], tmp_path, "config.json", json.dumps(values).encode()
        )
    parts.path = tmp_path / "changed"
    if isinstance(parts.header.get("__metadata__"), dict):
        parts.save()
    else:
        parts.save_text(json.dumps(parts.header).encode())
    text = parts.path.read_bytes()
    return expect_no_surprise(models[False], tmp_path, MODEL, text)


def expect_no_surprise(model: Path, folder: Path, file: str, content: bytes) -> None:
    shutil.copytree(model, folder / "model", dirs_exist_ok=True)
    (folder / "model" / file).write_bytes(content)
    try:
        with np.errstate(all="ignore"):
            read_everything(folder / "model")
    except MinflashError as error:
        assert str(folder) in str(error)
