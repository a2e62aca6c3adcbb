"""Reading a safetensors file: the header with every check, and memory-mapped bytes of its tensors.

The format (safetensors README, "Format"): 8 bytes little-endian header length N, N bytes of UTF-8
JSON ``{"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``,
then the data, covered by the tensors without hole or overlap. A file is untrusted input: nothing is
allocated or read on the word of a number that was not compared with the size of the file first.
"""

from __future__ import annotations

import json
import mmap
import os
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError, MinflashError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_JSON_BYTES = 16_000_000  # config.json and the index; real ones stay under 10 MB
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlist = _REPR.maxtuple = 8


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the header. begin, end: bytes, counted from the start of the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class SafetensorsHeader:
    """A checked header. tensors: in the order of the data; data_start: offset in the file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


class SafetensorsFile:
    """A memory-mapped safetensors file whose header passed every check.

    Attributes: path, tensors {name: TensorInfo} in the order of the data, metadata {str: str}.
    Raises CheckpointError when the file is damaged or cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_regular(self.path) as file:
            header = _parse(file, self.path)
            self._bytes: NDArray[np.uint8] | None = _map(file, self.path)
        self.tensors, self.metadata = header.tensors, header.metadata
        self._data_start = header.data_start

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of one tensor, uint8 [nbytes]: a read-only view of the file, not aligned."""
        if self._bytes is None:
            raise CheckpointError(f"{self.path}: the file is closed")
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: there is no tensor {short(name)}")
        info = self.tensors[name]
        return self._bytes[self._data_start + info.begin : self._data_start + info.end]

    def close(self) -> None:
        """Lets go of the map; it is undone when the last view that ``data`` gave is gone."""
        self._bytes = None

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_safetensors_header(path: str | Path) -> SafetensorsHeader:
    """The checked header of the file at ``path``. Raises CheckpointError."""
    with open_regular(Path(path)) as file:
        return _parse(file, Path(path))


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header as they stand in the file, padded with spaces to 64 n bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, info in tensors.items():
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.begin, info.end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def short(value: object) -> str:
    """repr of a value out of a file, cut to a length and depth that suit a message."""
    return _REPR.repr(value)


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, never waiting. Raises CheckpointError for anything else."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path}: is a directory, a file is needed")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise CheckpointError(f"{path}: is not a regular file")
        return path.open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, MinflashError):
            raise
        raise CheckpointError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def parse_json(
    text: bytes, what: str, error: type[MinflashError] = CheckpointError
) -> dict[str, Any]:
    """bytes -> JSON object. Raises ``error``, whose message begins with ``what``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{what}: the key {short(repeated)} is repeated; each may stand only once")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as problem:
        raise error(
            f"{what}: is not UTF-8 at byte {problem.start}; the file is damaged"
        ) from problem
    except RecursionError as problem:
        raise error(f"{what}: is JSON nested too deeply; the file is damaged") from problem
    except ValueError as problem:
        if isinstance(problem, MinflashError):
            raise
        raise error(f"{what}: is not JSON ({problem}); the file is damaged") from problem
    if not isinstance(value, dict):
        raise error(f"{what}: must be a JSON object, found {short(value)}")
    return value


def read_json(path: str | Path, error: type[MinflashError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in a file of at most 50 MB; every failure raises ``error``."""
    try:
        with open_regular(Path(path)) as file:
            size = _size(file)
            text = file.read(size) if size <= MAX_JSON_BYTES else None
    except (CheckpointError, OSError) as problem:
        raise error(str(problem)) from problem
    if text is None:
        raise error(f"{path}: is larger than {MAX_JSON_BYTES} bytes; this cannot be the right file")
    return parse_json(text, str(path), error)


def is_count(value: object) -> bool:
    """True for an integer that fits 64 bits; JSON's true and false, ints to Python, are none."""
    return type(value) is int and 0 <= value < 1 << 64


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _map(file: BinaryIO, path: Path) -> NDArray[np.uint8]:
    try:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be mapped into memory: {error}") from error


def _parse(file: BinaryIO, path: Path) -> SafetensorsHeader:
    try:
        size, length, text = _read_header(file, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    entries = parse_json(text, f"{path}: the header")
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    tensors = {name: _tensor(name, entry, path) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_cover(ordered, size - 8 - length, path)
    return SafetensorsHeader(ordered, metadata, 8 + length)


def _read_header(file: BinaryIO, path: Path) -> tuple[int, int, bytes]:
    """-> size of the file, length of the header in bytes, its text."""
    size = _size(file)
    if size < 8:
        state = "is empty" if size == 0 else f"has only {size} bytes"
        raise CheckpointError(
            f"{path}: {state}, a safetensors file begins with 8 bytes of header length"
        )
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header length {length} is over the limit of {MAX_HEADER_BYTES} bytes;"
            " this is no safetensors file or it is damaged"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path}: header length {length} reaches beyond the file of {size} bytes;"
            " it is truncated"
        )
    text = file.read(length)
    if len(text) != length or not text.startswith(b"{"):
        raise CheckpointError(
            f"{path}: the header must begin with '{{', found {text[:8]!r}; the file is damaged"
        )
    return size, length, text


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value.values()):
        raise CheckpointError(
            f"{path}: __metadata__ must map strings to strings, found {short(value)}"
        )
    return value


def _tensor(name: str, entry: object, path: Path) -> TensorInfo:
    where = f"{path}: tensor {short(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: needs dtype, shape and data_offsets, found {short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{where}: dtype {short(dtype)} is not one of {', '.join(DTYPE_BITS)}"
        )
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(is_count, shape)):
        raise CheckpointError(
            f"{where}: shape must be a list of integers >= 0, found {short(shape)}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise CheckpointError(
            f"{where}: data_offsets must be two integers >= 0, found {short(offsets)}"
        )
    begin, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if begin > end or bits != 8 * (end - begin):
        needed = short(bits // 8)
        raise CheckpointError(
            f"{where}: {dtype} of shape {short(shape)} needs {needed} bytes,"
            f" data_offsets {short(offsets)} give another size"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_cover(ordered: Mapping[str, TensorInfo], data_bytes: int, path: Path) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    for name, info in ordered.items():
        if info.end > data_bytes:
            raise CheckpointError(
                f"{path}: tensor {short(name)}: ends at byte {info.end} of the data, which has only"
                f" {data_bytes} bytes; the file is truncated or damaged: fetch, convert or save it"
                " again"
            )
    position, before = 0, "the start of the data"
    for name, info in ordered.items():
        where = f"{path}: tensor {short(name)}"
        if info.begin < position:
            raise CheckpointError(
                f"{where}: begins at byte {info.begin} and overlaps {before},"
                f" which ends at {position}"
            )
        if info.begin > position:
            raise CheckpointError(
                f"{where}: begins at byte {info.begin}, a hole after {before},"
                f" which ends at {position}"
            )
        position, before = info.end, short(name)
    if position != data_bytes:
        raise CheckpointError(
            f"{path}: {data_bytes - position} bytes after {before} belong to no tensor;"
            " the file is damaged"
        )
