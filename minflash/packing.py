"""The layout of a matrix inside the weight file, and its inverse; docs/format.md has it in full.

A matrix [rows, cols] is cut into row blocks of 16 rows and each row block into tiles. A tile is
what one warp multiplies without looking elsewhere: its codes in the order in which the lanes of
``mma.m16n8k16`` consume them, then the scales (and biases) of its groups. Tiles of a row block are
contiguous along the columns, so that any range of columns is one range of bytes.

Rows and columns are padded with zeros: rows to 16, columns to the width of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError
from .numeric import bf16_to_fp32, fp8_to_fp32

LAYOUT_VERSION = 1
BLOCK_ROWS = 16
TYPES = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")
GROUPED_TYPES = ("fp8", "int8", "int4")
GROUP_SIZES = (32, 64, 128)
INT8_ZERO = 128  # int8 codes are stored as q + 128
_CACHED_VALUES = 1 << 16  # values of one part of a large matrix

_CODE_DTYPE = {
    "fp32": np.uint32, "bf16": np.uint16, "fp16": np.uint16, "fp8": np.uint8, "int8": np.uint8,
    "int4": np.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where the bytes of one packed matrix lie. ``group_size`` is 0 for fp32, bf16 and fp16."""

    rows: int
    cols: int
    type: str
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise CheckpointError(f"type {self.type!r} is not one of {', '.join(TYPES)}")
        allowed = GROUP_SIZES if self.type in GROUPED_TYPES else (0,)
        if self.group_size not in allowed:
            raise CheckpointError(
                f"group size {self.group_size} is not allowed for {self.type}: {allowed}"
            )
        if self.rows < 1 or self.cols < 1:
            raise CheckpointError(f"a matrix of {self.rows} x {self.cols} is empty")

    @property
    def tile_cols(self) -> int:
        """Columns of a tile: one group, at least 32 (64 for int4)."""
        return max(self.group_size, 64 if self.type == "int4" else 32)

    @property
    def tile_groups(self) -> int:
        """Groups along the columns of a tile; 0 for types without groups."""
        return self.tile_cols // self.group_size if self.group_size else 0

    @property
    def tile_code_bytes(self) -> int:
        bits = 4 if self.type == "int4" else 8 * np.dtype(_CODE_DTYPE[self.type]).itemsize
        return BLOCK_ROWS * self.tile_cols * bits // 8

    @property
    def tile_bytes(self) -> int:
        per_group = 4 if self.type == "int4" else 2  # fp16 scale, and fp16 bias for int4
        return self.tile_code_bytes + self.tile_groups * BLOCK_ROWS * per_group

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // BLOCK_ROWS)

    @property
    def tiles(self) -> int:
        """Tiles of one row block."""
        return -(-self.cols // self.tile_cols)

    @property
    def row_block_bytes(self) -> int:
        return self.tiles * self.tile_bytes

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the uint8 tensor in the weight file."""
        return self.row_blocks, self.row_block_bytes

    @property
    def groups(self) -> int:
        """Groups of one row that hold more than padding; 0 for types without groups."""
        return -(-self.cols // self.group_size) if self.group_size else 0


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix in plain row-major order.

    codes: [rows, cols]; uint32 or uint16 bit patterns (fp32, bf16, fp16), e4m3 codes (fp8),
    q + 128 (int8) or q in 0..15 (int4), the latter three as uint8.
    scales, biases: [rows, groups] float16, or None where the type has none.

    The value of an element is ``scale * q`` (int8, fp8) or ``scale * q + bias`` (int4).
    """

    layout: Layout
    codes: NDArray[np.generic]
    scales: NDArray[np.float16] | None = None
    biases: NDArray[np.float16] | None = None


def dequantize(matrix: Matrix) -> NDArray[np.float32]:
    """The matrix's values, float32 [rows, cols]; products are exact, int4 sums are rounded once."""
    layout, codes = matrix.layout, matrix.codes
    if layout.type == "fp32":
        return codes.view(np.float32)
    if layout.type == "bf16":
        return bf16_to_fp32(codes.astype(np.uint16, copy=False))
    if layout.type == "fp16":
        return codes.view(np.float16).astype(np.float32)
    assert matrix.scales is not None
    values = np.empty((layout.rows, layout.cols), np.float32)
    for rows in _slices(layout.rows, layout.cols):
        part = values[rows]
        if layout.type == "fp8":
            part[...] = fp8_to_fp32(codes[rows].astype(np.uint8, copy=False))
        else:
            part[...] = codes[rows]
            if layout.type == "int8":
                part -= INT8_ZERO
        part *= _per_column(matrix.scales[rows], layout)
        if matrix.biases is not None:
            part += _per_column(matrix.biases[rows], layout)
    return values


def _per_column(per_group: NDArray[np.float16], layout: Layout) -> NDArray[np.float32]:
    """[rows, groups] -> float32 [rows, cols]."""
    return np.repeat(per_group.astype(np.float32), layout.group_size, axis=1)[:, : layout.cols]


def _slices(count: int, size: int) -> Iterator[slice]:
    """``count`` rows of ``size`` values in parts whose temporaries stay in the cache."""
    step = max(1, _CACHED_VALUES // size)
    return (slice(begin, begin + step) for begin in range(0, count, step))


def pack(matrix: Matrix) -> NDArray[np.uint8]:
    """Matrix -> uint8 [row_blocks, row_block_bytes], the bytes of the weight file."""
    layout = matrix.layout
    zero = INT8_ZERO if layout.type == "int8" else 0
    codes = _pad(
        matrix.codes, layout.row_blocks * BLOCK_ROWS, layout.tiles * layout.tile_cols, zero
    )
    codes = np.ascontiguousarray(codes, dtype=_CODE_DTYPE[layout.type])
    words = codes.view(_word(layout)).reshape(layout.row_blocks, BLOCK_ROWS, -1)
    out = np.empty((layout.row_blocks, layout.tiles, layout.tile_bytes), dtype=np.uint8)
    places = np.argsort(_word_order(layout), axis=None)  # a tile's codes, then the next one's
    for part in _slices(layout.row_blocks, words[0].nbytes):
        ordered = words[part]
        if layout.type == "int4":
            ordered = _exchange(ordered[:, :8] | ordered[:, 8:] << np.uint64(4))
        ordered = ordered.reshape(len(ordered), -1).take(places, axis=1)
        out[part, :, : layout.tile_code_bytes] = ordered.view(np.uint8).reshape(
            len(ordered), layout.tiles, layout.tile_code_bytes
        )
    if matrix.scales is not None:
        out[:, :, layout.tile_code_bytes :] = _pack_scales(matrix)
    return out.reshape(layout.shape)


def unpack(data: NDArray[np.uint8], layout: Layout) -> Matrix:
    """The inverse of ``pack``. data: uint8 of ``layout.shape``."""
    data = np.ascontiguousarray(data).reshape(layout.shape)
    codes = _unpack_codes(data.view(_word(layout)), layout)
    codes = np.ascontiguousarray(codes[: layout.rows, : layout.cols])
    if not layout.group_size:
        return Matrix(layout, codes)
    tiles = data.reshape(layout.row_blocks, layout.tiles, layout.tile_bytes)
    scales, biases = _unpack_scales(
        np.ascontiguousarray(tiles[:, :, layout.tile_code_bytes :]), layout
    )
    return Matrix(layout, codes, scales, biases)


def _pad(array: NDArray[np.generic], rows: int, cols: int, value: int) -> NDArray[np.generic]:
    missing = ((0, rows - array.shape[0]), (0, cols - array.shape[1]))
    return np.pad(array, missing, constant_values=value) if missing != ((0, 0), (0, 0)) else array


# The order of codes. Lane (g, q) = (lane / 4, lane % 4) of an mma holds rows g and g + 8 ("half" 0
# and 1) and, of every 32 columns, the 8 from 8 q on. Codes move in words: 8 columns of one row for
# fp8 and int8, 8 columns of rows g and g + 8 for int4, the 32 columns of a row of a tile for the
# others. Axes below: s = slice of 32 columns, h = half, p = pair of slices, w = slice of the pair.


def _word(layout: Layout) -> np.dtype[np.generic]:
    """What moves in one piece: 32 columns of a plain type, 8 bytes of the others."""
    plain = layout.type not in GROUPED_TYPES
    return np.dtype(f"V{layout.tile_code_bytes // BLOCK_ROWS}" if plain else np.uint64)


def _word_order(layout: Layout) -> NDArray[np.intp]:
    """[rows, words of a row] -> which word of the row block; int4 has rows g = 0..7 only."""
    word_bytes, slices = _word(layout).itemsize, layout.tile_cols // 32
    words: NDArray[np.intp] = np.arange(layout.tile_code_bytes // word_bytes)
    if layout.type == "int4":
        words = words.reshape(slices // 2, 8, 4, 2).transpose(1, 0, 3, 2)  # p g q w -> g p w q
    elif layout.type in GROUPED_TYPES:
        words = words.reshape(slices, 8, 4, 2).transpose(3, 1, 0, 2)  # s g q h -> h g s q
    in_tile = words.reshape(8 if layout.type == "int4" else BLOCK_ROWS, 1, -1)
    tiles = np.arange(layout.tiles)[:, None] * (layout.tile_bytes // word_bytes)
    return (in_tile + tiles).reshape(len(in_tile), -1)


def _exchange(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Swap bytes 1 and 2 of every 4, its own inverse.

    Of 4 columns k0..k3 the file has the order k0 k2 k1 k3, so that one mask takes k0 k1 of a 32-bit
    word and a shift k2 k3.
    """
    low, high = np.uint64(0x0000FF000000FF00), np.uint64(0x00FF000000FF0000)
    eight = np.uint64(8)
    swapped: NDArray[np.uint64] = (words & low) << eight | (words & high) >> eight
    return words & ~(low | high) | swapped


def _unpack_codes(words: NDArray[Any], layout: Layout) -> NDArray[np.generic]:
    """[row_blocks, words] -> codes [16 row_blocks, tile_cols tiles]."""
    shape = (layout.row_blocks, BLOCK_ROWS, layout.tiles * layout.tile_cols)
    codes = np.empty(shape, dtype=_CODE_DTYPE[layout.type])
    rows, order = codes.view(_word(layout)), _word_order(layout)
    for part in _slices(layout.row_blocks, codes[0].nbytes):
        found = words[part].take(order, axis=1)
        if layout.type == "int4":
            found, nibble = _exchange(found), np.uint64(0x0F0F0F0F0F0F0F0F)
            np.bitwise_and(found, nibble, out=rows[part, :8])
            np.bitwise_and(found >> np.uint64(4), nibble, out=rows[part, 8:])
        else:
            rows[part] = found
    return codes.reshape(-1, shape[2])


def _pack_scales(matrix: Matrix) -> NDArray[np.uint8]:
    """-> uint8 [row_blocks, tiles, bytes]: per group and g, scale (and bias) of g and g + 8."""
    layout = matrix.layout
    parts = [matrix.scales] if matrix.biases is None else [matrix.scales, matrix.biases]
    rows, groups = layout.row_blocks * BLOCK_ROWS, layout.tiles * layout.tile_groups
    padded = np.stack([_pad(part, rows, groups, 0) for part in parts if part is not None], axis=-1)
    lanes = padded.reshape(layout.row_blocks, 2, 8, layout.tiles, layout.tile_groups, len(parts))
    ordered = np.ascontiguousarray(lanes.transpose(0, 3, 4, 2, 1, 5))  # b t group g h part
    return ordered.reshape(layout.row_blocks, layout.tiles, -1).view(np.uint8)


def _unpack_scales(
    data: NDArray[np.uint8], layout: Layout
) -> tuple[NDArray[np.float16], NDArray[np.float16] | None]:
    parts = 2 if layout.type == "int4" else 1
    ordered = data.view(np.float16).reshape(
        layout.row_blocks, layout.tiles, layout.tile_groups, 8, 2, parts
    )
    padded = ordered.transpose(0, 4, 3, 1, 2, 5).reshape(layout.row_blocks * BLOCK_ROWS, -1, parts)
    kept = padded[: layout.rows, : layout.groups]
    return np.ascontiguousarray(kept[..., 0]), np.ascontiguousarray(
        kept[..., 1]
    ) if parts == 2 else None


def interleave(first: NDArray[np.generic], second: NDArray[np.generic]) -> NDArray[np.generic]:
    """Rows of two matrices in turns of 8, so that a row block holds 8 rows of each.

    ``w_gate_up`` is stored so: gate row i and up row i meet in one lane.
    [rows, ...] x 2 -> [2 rows, ...].
    """
    rows = first.shape[0]
    shape = (rows // 8, 8, *first.shape[1:])
    return np.stack([first.reshape(shape), second.reshape(shape)], axis=1).reshape(
        2 * rows, *first.shape[1:]
    )


def deinterleave(both: NDArray[np.generic]) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """The inverse of ``interleave``."""
    rows = both.shape[0] // 2
    turns = both.reshape(rows // 8, 2, 8, *both.shape[1:])
    return turns[:, 0].reshape(rows, *both.shape[1:]), turns[:, 1].reshape(rows, *both.shape[1:])
