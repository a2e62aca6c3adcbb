"""The GGUF reader: damaged files are refused with a message."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import EMBEDDING, facts, quantized, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minflash.errors import CheckpointError, ConfigError
from minflash.gguf import LOSSLESS_TYPES, GGUFFile, hf_config


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def number(key: str, value: int, kind: int = 4) -> bytes:
    return text(key) + struct.pack("<II", kind, value)


def info(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", kind, offset)


def image(
    keys: list[bytes] | None = None, infos: list[bytes] | None = None, **changed: Any
) -> bytes:
    """The bytes of a small file, every part of which can be put wrong."""
    keys = [number("a", 1)] if keys is None else keys
    infos = [info("w", (32, 4)), info("v", (8,), 0, 512)] if infos is None else infos
    head = changed.get("magic", b"GGUF") + struct.pack("<I", changed.get("version", 3))
    head += struct.pack("<QQ", changed.get("tensors", len(infos)), changed.get("keys", len(keys)))
    head += b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + bytes(changed.get("data", 544))


DAMAGED = {
    "another format": (image(magic=b"GGML"), "does not begin with"),
    "an old version": (image(version=1), "version 1; versions 2 and 3"),
    "big-endian": (image(version=3 << 24), "big-endian"),
    "a huge tensor count": (image(tensors=1 << 60), "1152921504606846976 tensors: does not fit"),
    "a huge key count": (
        image()[:16] + struct.pack("<Q", 1 << 62),
        "4611686018427387904 metadata keys",
    ),
    "too many tensors": (image(tensors=3), "tensor|offset|dimensions|shape"),
    "no data": (image(data=0), "tensor w ends at byte"),
    "data cut short": (image(data=543), "tensor v ends at byte"),
    "a repeated key": (image([number("a", 1), number("a", 2)]), "'a' is repeated"),
    "an empty key": (image([number("", 1)]), "empty"),
    "an unknown value type": (image([number("a", 1, 13)]), "a has the unknown value type 13"),
    "a long string": (
        image([text("a") + struct.pack("<IQ", 8, 1 << 50)]),
        "a with 1125899906842624 bytes",
    ),
    "not UTF-8": (
        image([text("a") + struct.pack("<IQ", 8, 2) + b"\xff\xfe"]),
        "a is not valid UTF-8",
    ),
    "many strings": (image([text("a") + struct.pack("<IIQ", 9, 8, 1 << 20)]), "1048576 strings"),
    "too many strings": (image([text("a") + struct.pack("<IIQ", 9, 8, 1 << 40)]), "at most"),
    "a long array": (
        image([text("a") + struct.pack("<IIQ", 9, 6, 1 << 61)]),
        "numbers: does not fit",
    ),
    "an array of arrays": (
        image([text("a") + struct.pack("<IIQ", 9, 9, 1)]),
        "unknown value type 9",
    ),
    "no dimensions": (image(infos=[info("w", ())]), "w has 0 dimensions"),
    "five dimensions": (image(infos=[info("w", (1,) * 5)]), "w has 5 dimensions"),
    "a dimension of 0": (image(infos=[info("w", (0, 4))]), "dimension is 0"),
    "a huge matrix": (image(infos=[info("w", (1 << 40, 1 << 40))]), "w ends at byte"),
    "an unknown tensor type": (image(infos=[info("w", (32, 4), 77)]), "w has the unknown type 77"),
    "a part of a block": (image(infos=[info("w", (33, 4), 2)]), "rows of 33, Q4_0 needs"),
    "a crooked offset": (image(infos=[info("w", (8,), 0, 8)]), "not a multiple of 32"),
    "a far offset": (image(infos=[info("w", (8,), 0, 1 << 62)]), "w ends at byte"),
    "an overlap": (image(infos=[info("w", (32, 4)), info("v", (8,), 0, 480)]), "w and v overlap"),
    "a repeated tensor": (
        image(infos=[info("w", (8,)), info("w", (8,), 0, 64)]),
        "w is listed twice",
    ),
    "a crooked alignment": (image([number("general.alignment", 12)]), "alignment is 12"),
    "an alignment of 0": (image([number("general.alignment", 0)]), "alignment is 0"),
    "an alignment as text": (image([text("general.alignment") + struct.pack("<I", 8) + text("x")]),
                             "alignment is 'x'"),
    "one part of several": (image([number("split.count", 3)]), "one of 3 parts"),
    "an empty file": (b"", "the file is empty"),
    "four bytes": (b"GGUF", "the version: does not fit"),
}  # fmt: skip


def refused(path: Path, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as raised:
        GGUFFile(path)
    assert str(path) in str(raised.value)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    content, message = DAMAGED[damage]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    refused(path, message)


@pytest.mark.parametrize("version", [2, 3])
def test_the_undamaged_image_opens(tmp_path: Path, version: int) -> None:
    (tmp_path / "m.gguf").write_bytes(image(version=version))
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert file.matrix("w").codes.shape == (4, 32)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    refused(tmp_path / "missing.gguf", "cannot be read: No such file")
    refused(tmp_path, "a folder, not a GGUF file")


def outcome(path: Path, content: bytes, use: Callable[[GGUFFile], Any]) -> None:
    """Any bytes either open and can be used, or give a CheckpointError or ConfigError."""
    path.write_bytes(content)
    try:
        use(GGUFFile(path))
    except (CheckpointError, ConfigError) as error:
        assert str(path) in str(error)


def use_all(file: GGUFFile) -> None:
    for name in file.tensors:
        if file.tensors[name].type in LOSSLESS_TYPES:
            file.values(name)
    hf_config(file)


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", facts(), EMBEDDING).read_bytes()
    for end in range(0, len(whole), 61):
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            GGUFFile(tmp_path / "cut.gguf")


@settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_bytes_changed(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data, ggml = quantized("Q4_1")
    path = tmp_path / "m.gguf"
    if not path.exists():
        write(path, facts(), {**EMBEDDING, "w": (data, ggml)})
    content = bytearray(path.read_bytes())
    for position, value in changes:
        content[position] = value
    outcome(tmp_path / "changed.gguf", bytes(content), use_all)
