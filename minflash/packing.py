"""The layout of a matrix inside the weight file, and its inverse. docs/format.md describes it in full.

A matrix [rows, cols] is cut into row blocks of 16 rows and each row block into tiles. A tile is what
one warp multiplies without looking elsewhere: its codes in the order in which the lanes of
``mma.m16n8k16`` consume them, then the scales (and biases) of its groups. Tiles of a row block are
contiguous along the columns, so that any range of columns is one range of bytes.

Rows and columns are padded with zeros: rows to 16, columns to the width of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

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

_CODE_DTYPE = {"fp32": np.uint32, "bf16": np.uint16, "fp16": np.uint16, "fp8": np.uint8, "int8": np.uint8,
               "int4": np.uint8}  # fmt: skip


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
            raise CheckpointError(f"group size {self.group_size} is not allowed for {self.type}: {allowed}")
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
        """Groups of one row, those that only hold padding not counted; 0 for types without groups."""
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
    """The matrix's values as float32 [rows, cols]; products are exact, int4 sums are rounded once."""
    layout, codes = matrix.layout, matrix.codes
    if layout.type == "fp32":
        return codes.view(np.float32)
    if layout.type == "bf16":
        return bf16_to_fp32(codes.astype(np.uint16, copy=False))
    if layout.type == "fp16":
        return codes.view(np.float16).astype(np.float32)
    assert matrix.scales is not None
    if layout.type == "fp8":
        values = fp8_to_fp32(codes.astype(np.uint8, copy=False))
    else:
        values = codes.astype(np.float32)
        if layout.type == "int8":
            values -= INT8_ZERO
    values *= _per_column(matrix.scales, layout)
    if matrix.biases is not None:
        values += _per_column(matrix.biases, layout)
    return values


def _per_column(per_group: NDArray[np.float16], layout: Layout) -> NDArray[np.float32]:
    """[rows, groups] -> float32 [rows, cols]."""
    return np.repeat(per_group.astype(np.float32), layout.group_size, axis=1)[:, : layout.cols]


def pack(matrix: Matrix) -> NDArray[np.uint8]:
    """Matrix -> uint8 [row_blocks, row_block_bytes], the bytes of the weight file."""
    layout = matrix.layout
    zero = INT8_ZERO if layout.type == "int8" else 0
    codes = _pad(matrix.codes, layout.row_blocks * BLOCK_ROWS, layout.tiles * layout.tile_cols, zero)
    tiles = codes.reshape(layout.row_blocks, BLOCK_ROWS, layout.tiles, layout.tile_cols).swapaxes(1, 2)
    out = np.empty((layout.row_blocks, layout.tiles, layout.tile_bytes), dtype=np.uint8)
    out[:, :, : layout.tile_code_bytes] = _pack_codes(tiles, layout.type)
    if matrix.scales is not None:
        out[:, :, layout.tile_code_bytes :] = _pack_scales(matrix)
    return out.reshape(layout.shape)


def unpack(data: NDArray[np.uint8], layout: Layout) -> Matrix:
    """The inverse of ``pack``. data: uint8 of ``layout.shape``."""
    tiles = data.reshape(layout.row_blocks, layout.tiles, layout.tile_bytes)
    codes = _unpack_codes(np.ascontiguousarray(tiles[:, :, : layout.tile_code_bytes]), layout)
    codes = codes.swapaxes(1, 2).reshape(layout.row_blocks * BLOCK_ROWS, layout.tiles * layout.tile_cols)
    codes = np.ascontiguousarray(codes[: layout.rows, : layout.cols])
    if not layout.group_size:
        return Matrix(layout, codes)
    scales, biases = _unpack_scales(np.ascontiguousarray(tiles[:, :, layout.tile_code_bytes :]), layout)
    return Matrix(layout, codes, scales, biases)


def _pad(array: NDArray[np.generic], rows: int, cols: int, value: int) -> NDArray[np.generic]:
    missing = ((0, rows - array.shape[0]), (0, cols - array.shape[1]))
    return np.pad(array, missing, constant_values=value) if missing != ((0, 0), (0, 0)) else array


# The order of codes. Lane (g, q) = (lane / 4, lane % 4) of an mma holds rows g and g + 8 ("half" 0 and
# 1) and, of every 32 columns, the 8 from 8 q on. Axes below: s = 32-column slice, h = half.


def _pack_codes(tiles: NDArray[np.generic], type: str) -> NDArray[np.uint8]:
    """[row_blocks, tiles, 16, tile_cols] -> uint8 [row_blocks, tiles, tile_code_bytes]."""
    blocks, count, _, cols = tiles.shape
    lanes = tiles.reshape(blocks, count, 2, 8, cols // 32, 4, 8)  # b t h g s q c
    if type in ("fp32", "bf16", "fp16"):
        ordered = lanes.transpose(0, 1, 4, 2, 3, 5, 6)  # s h g q c: 16 rows of 32 columns, row-major
    elif type in ("fp8", "int8"):
        ordered = lanes.transpose(0, 1, 4, 3, 5, 2, 6)  # s g q h c: 16 bytes a lane
    else:
        words = lanes.reshape(blocks, count, 2, 8, cols // 32, 4, 2, 2, 2)  # c = 4 j + 2 u + v
        words = words[:, :, 0] | (words[:, :, 1] << 4)  # type: ignore[operator]  # b t g s q j u v
        pairs = words.reshape(blocks, count, 8, cols // 64, 2, 4, 2, 2, 2)  # s = 2 p + w
        # p g q w j v u: byte order k0 k2 k1 k3, so that one mask takes k0 k1 and a shift k2 k3
        ordered = pairs.transpose(0, 1, 3, 2, 5, 4, 6, 8, 7)
    flat = np.ascontiguousarray(ordered).reshape(blocks, count, -1)
    return flat.view(np.uint8)


def _unpack_codes(data: NDArray[np.uint8], layout: Layout) -> NDArray[np.generic]:
    """uint8 [row_blocks, tiles, tile_code_bytes] -> [row_blocks, tiles, 16, tile_cols]."""
    blocks, count, slices = layout.row_blocks, layout.tiles, layout.tile_cols // 32
    values = data.view(_CODE_DTYPE[layout.type])
    if layout.type in ("fp32", "bf16", "fp16"):
        lanes = values.reshape(blocks, count, slices, 2, 8, 4, 8).transpose(0, 1, 3, 4, 2, 5, 6)
    elif layout.type in ("fp8", "int8"):
        lanes = values.reshape(blocks, count, slices, 8, 4, 2, 8).transpose(0, 1, 5, 3, 2, 4, 6)
    else:
        pairs = values.reshape(blocks, count, slices // 2, 8, 4, 2, 2, 2, 2).transpose(0, 1, 3, 2, 5, 4, 6, 8, 7)
        words = pairs.reshape(blocks, count, 8, slices, 4, 8)
        lanes = np.stack([words & 15, words >> 4], axis=2)
    return lanes.reshape(blocks, count, BLOCK_ROWS, layout.tile_cols)


def _pack_scales(matrix: Matrix) -> NDArray[np.uint8]:
    """-> uint8 [row_blocks, tiles, bytes]: per group, per row pair (g, g + 8), scale (and bias) of both."""
    layout = matrix.layout
    parts = [matrix.scales] if matrix.biases is None else [matrix.scales, matrix.biases]
    rows, groups = layout.row_blocks * BLOCK_ROWS, layout.tiles * layout.tile_groups
    padded = np.stack([_pad(part, rows, groups, 0) for part in parts if part is not None], axis=-1)
    lanes = padded.reshape(layout.row_blocks, 2, 8, layout.tiles, layout.tile_groups, len(parts))
    ordered = np.ascontiguousarray(lanes.transpose(0, 3, 4, 2, 1, 5))  # b t group g h part
    return ordered.reshape(layout.row_blocks, layout.tiles, -1).view(np.uint8)


def _unpack_scales(data: NDArray[np.uint8], layout: Layout) -> tuple[NDArray[np.float16], NDArray[np.float16] | None]:
    parts = 2 if layout.type == "int4" else 1
    ordered = data.view(np.float16).reshape(layout.row_blocks, layout.tiles, layout.tile_groups, 8, 2, parts)
    padded = ordered.transpose(0, 4, 3, 1, 2, 5).reshape(layout.row_blocks * BLOCK_ROWS, -1, parts)
    kept = padded[: layout.rows, : layout.groups]
    return np.ascontiguousarray(kept[..., 0]), np.ascontiguousarray(kept[..., 1]) if parts == 2 else None


def interleave(first: NDArray[np.generic], second: NDArray[np.generic]) -> NDArray[np.generic]:
    """Rows of two matrices in turns of 8, so that a row block holds 8 rows of each.

    ``w_gate_up`` is stored so: gate row i and up row i meet in one lane. [rows, ...] x 2 -> [2 rows, ...].
    """
    rows = first.shape[0]
    shape = (rows // 8, 8, *first.shape[1:])
    return np.stack([first.reshape(shape), second.reshape(shape)], axis=1).reshape(2 * rows, *first.shape[1:])


def deinterleave(both: NDArray[np.generic]) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """The inverse of ``interleave``."""
    rows = both.shape[0] // 2
    turns = both.reshape(rows // 8, 2, 8, *both.shape[1:])
    return turns[:, 0].reshape(rows, *both.shape[1:]), turns[:, 1].reshape(rows, *both.shape[1:])
