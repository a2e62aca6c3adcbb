"""The parts of a GGUF file before the tensors' data: counts, metadata and tensor descriptions.

Nothing is allocated from a number that the file's size does not bear out.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError

MAX_DIMS = 4
MAX_STRINGS = 1 << 21  # of one array; the largest lists of merges have about half a million

# gguf_metadata_value_type: id -> struct code; 8 is a string, 9 an array
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


def map_file(path: Path) -> NDArray[np.uint8]:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: a folder, not a GGUF file")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: the file is empty")
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class Cursor:
    """Reads the parts of the file before the tensors' data, in order."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.array = data
        self.data = memoryview(data)
        self.position = 0

    def header(self) -> tuple[int, int]:
        """-> (number of tensors, number of metadata keys)."""
        if bytes(self.data[:4]) != b"GGUF":
            raise CheckpointError(
                f"{self.path}: not a GGUF file: it does not begin with the letters GGUF"
            )
        self.position = 4
        version = self.number("I", "the version")
        if version not in (2, 3):
            hint = " (a big-endian file)" if version in (2 << 24, 3 << 24) else ""
            raise CheckpointError(
                f"{self.path}: GGUF version {version}{hint}; versions 2 and 3 are supported"
            )
        tensors, keys = (
            self.number("Q", "the number of tensors"),
            self.number("Q", "the number of keys"),
        )
        self.room(keys, 13, f"{keys} metadata keys")
        self.room(tensors, 32, f"{tensors} tensors")
        return tensors, keys

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            key = self.string(f"metadata key {index}")
            if not key or key in metadata:
                raise CheckpointError(
                    f"{self.path}: metadata key {key!r} is {'repeated' if key else 'empty'}"
                )
            metadata[key] = self.value(key)
        return metadata

    def value(self, key: str) -> Any:
        kind = self.number("I", f"the type of {key}")
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.items(key)
        return self.number(self.scalar(kind, key), key)

    def scalar(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: {key} has the unknown value type {kind}")
        return _SCALARS[kind]

    def items(self, key: str) -> list[str] | NDArray[Any]:
        """An array of strings or of numbers; arrays of arrays are refused, no model needs them."""
        kind = self.number("I", f"the element type of {key}")
        count = self.number("Q", f"the length of {key}")
        if kind == _STRING:
            if count > MAX_STRINGS:
                raise CheckpointError(
                    f"{self.path}: {key} lists {count} strings; at most {MAX_STRINGS} are read"
                )
            self.room(count, 8, f"{key} with {count} strings")
            return [self.string(key) for _ in range(count)]
        code = self.scalar(kind, key)
        dtype = np.dtype("<" + code)
        self.room(count, dtype.itemsize, f"{key} with {count} numbers")
        begin = self.position
        self.position += count * dtype.itemsize
        return self.array[begin : self.position].view(dtype)

    def tensor_infos(self, count: int) -> list[tuple[str, int, tuple[int, ...], int]]:
        """-> (name, type id, row-major shape, offset from the start of the data) of each tensor."""
        infos = []
        for index in range(count):
            name = self.string(f"the name of tensor {index}")
            dims = self.number("I", f"the dimensions of {name}")
            if not 1 <= dims <= MAX_DIMS:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has {dims} dimensions; 1 to {MAX_DIMS} are allowed"
                )
            shape = tuple(self.number("Q", f"the shape of {name}") for _ in range(dims))[::-1]
            if min(shape) < 1:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has shape {shape}: a dimension is 0"
                )
            type_id = self.number("I", f"the type of {name}")
            infos.append((name, type_id, shape, self.number("Q", f"the offset of {name}")))
        return infos

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        self.room(length, 1, f"{what} with {length} bytes")
        begin = self.position
        self.position += length
        try:
            return str(self.data[begin : self.position], "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: {what} is not valid UTF-8 ({error.reason})"
            ) from error

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.room(1, size, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += size
        return value

    def room(self, count: int, size: int, what: str) -> None:
        """Checks that ``count`` items of at least ``size`` bytes can follow."""
        left = len(self.data) - self.position
        if count * size > left:
            raise CheckpointError(
                f"{self.path}: {what}: does not fit into the {left} bytes that are left: "
                "the file is cut short or damaged"
            )
