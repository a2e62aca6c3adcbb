"""Reader of GGUF files, versions 2 and 3 (specification: github.com/ggml-org/ggml, docs/gguf.md).

The file is memory-mapped and untrusted: every count, length, offset and dimension is checked before
it is used, and nothing is allocated from a number that the file's size does not bear out. Damage is
a ``CheckpointError`` that names the file, the key or tensor, and the rule.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError
from .gguf_config import hf_config
from .gguf_header import Cursor, map_file
from .packing import INT8_ZERO, Layout, Matrix, dequantize

__all__ = ["LOSSLESS_TYPES", "GGUFFile", "GGUFTensor", "hf_config"]

LOSSLESS_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
DEFAULT_ALIGNMENT = 32
BLOCK = 32  # elements of one block of Q8_0, Q4_0, Q4_1

# ggml_type: id -> (name, elements of a block, bytes of a block)
_TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip
_TYPE_IDS = {name: number for number, (name, _, _) in _TENSOR_TYPES.items()}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies. shape is row-major (GGUF lists dimensions the other way round)."""

    name: str
    type: str  # ggml's name of the type: "F32", "Q4_1", ...
    shape: tuple[int, ...]  # (rows, cols) of a matrix, (n,) of a vector
    offset: int  # bytes from the start of the file
    nbytes: int


class GGUFFile:
    """A memory-mapped GGUF file.

    ``metadata``: key -> int, float, bool, str, list[str] or a numeric NumPy array.
    ``tensors``: name -> GGUFTensor, in the file's order.

    Raises CheckpointError when the file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._bytes = map_file(self.path)
        cursor = Cursor(self.path, self._bytes)
        tensor_count, key_count = cursor.header()
        self.metadata: dict[str, Any] = cursor.metadata(key_count)
        self._check_split()
        infos = cursor.tensor_infos(tensor_count)
        self.tensors = self._place(infos, cursor.position)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the mapping (the memory goes when no view of it is left)."""
        self._bytes = np.empty(0, dtype=np.uint8)

    def data(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of a tensor: a read-only memory-mapped view, uint8 [nbytes]."""
        tensor = self._tensor(name)
        return self._bytes[tensor.offset : tensor.offset + tensor.nbytes]

    def matrix(self, name: str) -> Matrix:
        """A 2-D tensor of LOSSLESS_TYPES without any loss.

        The result is fp32, fp16, bf16, or int8 or int4 in groups of 32. Raises CheckpointError for
        other types, and for scales that are not finite.
        """
        tensor = self._tensor(name)
        if len(tensor.shape) != 2:
            raise self._error(
                f"tensor {name} has shape {tensor.shape}; a matrix has two dimensions"
            )
        rows, cols = tensor.shape
        raw = self.data(name)
        if tensor.type == "F32":
            return Matrix(Layout(rows, cols, "fp32"), raw.view("<u4").reshape(rows, cols))
        if tensor.type in ("F16", "BF16"):
            kind = "fp16" if tensor.type == "F16" else "bf16"
            return Matrix(Layout(rows, cols, kind), raw.view("<u2").reshape(rows, cols))
        if tensor.type not in LOSSLESS_TYPES:
            raise self._error(
                f"tensor {name} has type {tensor.type}; without loss are read only "
                + ", ".join(LOSSLESS_TYPES)
            )
        blocks = raw.reshape(rows, cols // BLOCK, -1)
        matrix = (
            _int8(blocks)
            if tensor.type == "Q8_0"
            else _int4(blocks, has_minimum=tensor.type == "Q4_1")
        )
        self._check_scales(name, matrix)
        return matrix

    def values(self, name: str) -> NDArray[np.float32]:
        """A tensor of any type as float32 [shape].

        Types outside LOSSLESS_TYPES need the optional package ``gguf``.
        """
        tensor = self._tensor(name)
        raw = self.data(name)
        if tensor.type == "F32":
            return raw.view("<f4").reshape(tensor.shape).astype(np.float32)
        if tensor.type == "F16":
            return raw.view("<f2").reshape(tensor.shape).astype(np.float32)
        if tensor.type == "BF16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
        if tensor.type in LOSSLESS_TYPES and len(tensor.shape) == 2:
            return dequantize(self.matrix(name))
        return self._foreign_values(tensor)

    def _foreign_values(self, tensor: GGUFTensor) -> NDArray[np.float32]:
        try:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize as dequantize_foreign
        except ImportError:
            raise self._error(
                f"tensor {tensor.name} has type {tensor.type}, which needs the package gguf: "
                f"pip install gguf, or choose a file with {', '.join(LOSSLESS_TYPES)} only"
            ) from None
        rows = int(np.prod(tensor.shape[:-1]))
        try:
            kind = GGMLQuantizationType(_TYPE_IDS[tensor.type])
            values = dequantize_foreign(self.data(tensor.name).reshape(rows, -1), kind)
        except (NotImplementedError, ValueError, KeyError) as error:
            raise self._error(
                f"tensor {tensor.name}: the package gguf cannot dequantize {tensor.type} "
                f"({error}); "
                f"choose a file with {', '.join(LOSSLESS_TYPES)}"
            ) from error
        return np.asarray(values, dtype=np.float32).reshape(tensor.shape)

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise self._error(f"tensor {name} is missing") from None

    def _place(
        self, infos: list[tuple[str, int, tuple[int, ...], int]], end: int
    ) -> dict[str, GGUFTensor]:
        """Turns offsets into places in the file; checks alignment, the file's end and overlaps."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise self._error(
                f"general.alignment is {alignment!r}; it must be a multiple of 8, at most {1 << 20}"
            )
        start = -(-end // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, type_id, shape, offset in infos:
            if name in tensors:
                raise self._error(f"tensor {name} is listed twice")
            tensor = self._sized(name, type_id, shape, start + offset)
            if offset % alignment:
                raise self._error(
                    f"tensor {name} begins at {offset}, not a multiple of {alignment} bytes"
                )
            if tensor.offset + tensor.nbytes > len(self._bytes):
                raise self._error(
                    f"tensor {name} ends at byte {tensor.offset + tensor.nbytes}, "
                    f"but the file has {len(self._bytes)}: it is cut short or damaged"
                )
            tensors[name] = tensor
        self._check_overlaps(tensors)
        return tensors

    def _sized(self, name: str, type_id: int, shape: tuple[int, ...], offset: int) -> GGUFTensor:
        if type_id not in _TENSOR_TYPES:
            raise self._error(f"tensor {name} has the unknown type {type_id}")
        type_name, block, block_bytes = _TENSOR_TYPES[type_id]
        if shape[-1] % block:
            raise self._error(
                f"tensor {name} has rows of {shape[-1]}, {type_name} needs a multiple of {block}"
            )
        count = 1
        for size in shape:  # Python integers: a product that overflows 64 bits is seen, not wrapped
            count *= size
        return GGUFTensor(name, type_name, shape, offset, count // block * block_bytes)

    def _check_overlaps(self, tensors: dict[str, GGUFTensor]) -> None:
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in itertools.pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                raise self._error(f"tensors {before.name} and {after.name} overlap")

    def _check_split(self) -> None:
        count = self.metadata.get("split.count", 0)
        if isinstance(count, int) and count > 1:
            raise self._error(
                f"it is one of {count} parts; join them first: "
                "llama-gguf-split --merge FIRST_PART OUT.gguf"
            )

    def _check_scales(self, name: str, matrix: Matrix) -> None:
        for what, part in (("scale", matrix.scales), ("bias", matrix.biases)):
            if part is not None and not np.isfinite(part).all():
                row, group = (int(index) for index in np.argwhere(~np.isfinite(part))[0])
                raise self._error(
                    f"tensor {name}: the {what} of row {row}, group {group} is not a finite number"
                )

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")


def _int8(blocks: NDArray[np.uint8]) -> Matrix:
    """Q8_0: fp16 d, 32 signed bytes; the value is d * q. blocks: uint8 [rows, groups, 34]."""
    rows, groups, _ = blocks.shape
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[..., 0]
    codes = (blocks[:, :, 2:] ^ INT8_ZERO).reshape(
        rows, groups * BLOCK
    )  # q + 128 of a two's complement byte
    return Matrix(Layout(rows, groups * BLOCK, "int8", BLOCK), codes, scales)


def _int4(blocks: NDArray[np.uint8], *, has_minimum: bool) -> Matrix:
    """Q4_0: fp16 d, 16 bytes, d * (q - 8). Q4_1: fp16 d, fp16 m, 16 bytes, d * q + m.

    Byte j holds element j in its low half and element j + 16 in its high half.
    blocks: uint8 [rows, groups, 18 or 20].
    """
    rows, groups, _ = blocks.shape
    head = 4 if has_minimum else 2
    numbers = np.ascontiguousarray(blocks[:, :, :head]).view("<f2")
    scales = np.ascontiguousarray(numbers[..., 0])
    with np.errstate(over="ignore"):  # an infinite bias is reported by the caller
        biases = np.ascontiguousarray(numbers[..., 1]) if has_minimum else np.float16(-8) * scales
    packed = blocks[:, :, head:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(rows, groups * BLOCK)
    return Matrix(Layout(rows, groups * BLOCK, "int4", BLOCK), codes, scales, biases)
