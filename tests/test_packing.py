"""The packed layout: round trips, and docs/format.md read by the letter.

``read_element`` below was written from docs/format.md ("Tiles"), one element at a time, and shares
no code with minflash.packing: where both agree, the document is true.
"""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from weight_files import CODE_DTYPES, random_matrix

from minflash.errors import CheckpointError
from minflash.numeric import FP8_VALUES
from minflash.packing import (
    GROUP_SIZES,
    GROUPED_TYPES,
    TYPES,
    Layout,
    Matrix,
    deinterleave,
    dequantize,
    interleave,
    pack,
    unpack,
)

KINDS = [
    (type, group) for type in TYPES for group in (GROUP_SIZES if type in GROUPED_TYPES else (0,))
]
SHAPES = [
    (1, 1),
    (7, 33),
    (16, 32),
    (16, 64),
    (17, 65),
    (31, 129),
    (48, 96),
    (33, 256),
    (8, 128),
    (40, 200),
]

CODE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5}


def tile_cols(type: str, group: int) -> int:
    return {"fp8": group, "int8": group, "int4": max(group, 64)}.get(type, 32)


def tile_bytes(type: str, group: int) -> int:
    width = tile_cols(type, group)
    groups = width // group if group else 0
    return int(16 * width * CODE_BYTES[type]) + groups * 16 * (
        4 if type == "int4" else 2 if group else 0
    )


def find_code(type: str, r: int, k: int) -> tuple[int, int]:
    """-> byte of a code in its tile, first bit. r: row of the block, k: column of the tile."""
    h, g = divmod(r, 8)
    if type in ("fp32", "bf16", "fp16"):
        return int(CODE_BYTES[type]) * (512 * (k // 32) + 32 * r + k % 32), 0
    if type in ("fp8", "int8"):
        s, q, c = k // 32, k % 32 // 8, k % 8
        return 512 * s + 64 * g + 16 * q + 8 * h + c, 0
    p, w, q, j, u, v = k // 64, k // 32 % 2, k % 32 // 8, k // 4 % 2, k // 2 % 2, k % 2
    return 512 * p + 64 * g + 16 * q + 8 * w + 4 * j + 2 * v + u, 4 * h


def find_scale(type: str, group: int, r: int, k: int) -> int:
    """-> byte offset of the scale in its tile; the bias of int4 follows it."""
    h, g = divmod(r, 8)
    size = 4 if type == "int4" else 2
    return int(16 * tile_cols(type, group) * CODE_BYTES[type]) + size * (
        16 * (k // group) + 2 * g + h
    )


def read_element(data: bytes, cols: int, type: str, group: int, row: int, col: int) -> float:
    """The value of one element, from the bytes of the tensor."""
    width = tile_cols(type, group)
    tiles = -(-cols // width)
    tile = (row // 16 * tiles + col // width) * tile_bytes(type, group)
    r, k = row % 16, col % width
    byte, bit = find_code(type, r, k)
    at = tile + byte
    if type == "fp32":
        return float(struct.unpack_from("<f", data, at)[0])
    if type == "bf16":
        return float(struct.unpack("<f", b"\0\0" + data[at : at + 2])[0])
    if type == "fp16":
        return float(struct.unpack_from("<e", data, at)[0])
    scale_at = tile + find_scale(type, group, r, k)
    scale = struct.unpack_from("<e", data, scale_at)[0]
    if type == "fp8":
        return float(scale * float(FP8_VALUES[data[at]]))
    if type == "int8":
        return float(scale * (data[at] - 128))
    bias = struct.unpack_from("<e", data, scale_at + 2)[0]
    product = np.float32(scale * (data[at] >> bit & 15))
    return float(product + np.float32(bias))


@pytest.mark.parametrize("rows,cols", SHAPES)
@pytest.mark.parametrize("type,group", KINDS)
def test_round_trip(type: str, group: int, rows: int, cols: int) -> None:
    layout = Layout(rows, cols, type, group)
    matrix = random_matrix(layout, rows * 1000 + cols)
    packed = pack(matrix)
    assert packed.dtype == np.uint8 and packed.shape == layout.shape
    back = unpack(packed, layout)
    assert back.layout == layout
    np.testing.assert_array_equal(back.codes, matrix.codes)
    assert back.codes.dtype == matrix.codes.dtype
    for found, given in ((back.scales, matrix.scales), (back.biases, matrix.biases)):
        assert (found is None) == (given is None)
        if found is not None and given is not None:
            np.testing.assert_array_equal(found.view(np.uint16), given.view(np.uint16))


@pytest.mark.parametrize("rows,cols", [(17, 65), (33, 200)])
@pytest.mark.parametrize("type,group", KINDS)
def test_document(type: str, group: int, rows: int, cols: int) -> None:
    """docs/format.md and packing.py give every element the same place and value."""
    layout = Layout(rows, cols, type, group)
    matrix = random_matrix(layout, 5)
    data = pack(matrix).tobytes()
    assert len(data) == -(-rows // 16) * -(-cols // tile_cols(type, group)) * tile_bytes(
        type, group
    )
    with np.errstate(invalid="ignore"):  # random bits hold NaN
        values = dequantize(matrix)
    for row, col in itertools.product(range(rows), range(cols)):
        np.testing.assert_equal(
            read_element(data, cols, type, group, row, col), float(values[row, col])
        )


@pytest.mark.parametrize("type,group", KINDS)
def test_places_fill_the_tile(type: str, group: int) -> None:
    """The formulas of docs/format.md use every bit of a tile once."""
    width, used = tile_cols(type, group), np.zeros(tile_bytes(type, group), dtype=np.int64)
    bits = int(8 * CODE_BYTES[type])
    for r, k in itertools.product(range(16), range(width)):
        byte, bit = find_code(type, r, k)
        used[byte : byte + max(1, bits // 8)] |= 255 if bits >= 8 else (15 << bit)
    if group:
        size = 4 if type == "int4" else 2
        for r, k in itertools.product(range(16), range(0, width, group)):
            at = find_scale(type, group, r, k)
            assert not used[at : at + size].any()
            used[at : at + size] = 255
    assert (used == 255).all()


def test_worked_example() -> None:
    """The example at the end of "Tiles" in docs/format.md."""
    assert tile_bytes("int4", 32) == 640
    assert find_code("int4", 13, 43) == (347, 4)
    assert find_scale("int4", 32, 13, 43) == 620
    layout = Layout(32, 128, "int4", 32)
    codes = np.zeros((32, 128), dtype=np.uint8)
    scales, biases = np.zeros((2, 32, 4), dtype=np.float16)
    codes[29, 107], scales[29, 3], biases[29, 3] = 11, 0.5, -4
    data = pack(Matrix(layout, codes, scales, biases)).tobytes()
    assert {at: byte for at, byte in enumerate(data) if byte} == {
        2267: 0xB0,
        2541: 0x38,
        2543: 0xC4,
    }
    assert read_element(data, 128, "int4", 32, 29, 107) == 0.5 * 11 - 4


@pytest.mark.parametrize("type,group", KINDS)
def test_padding(type: str, group: int) -> None:
    """Padding is zeros, except that the code of zero of int8 is 128."""
    layout = Layout(3, 5, type, group)
    wide = Layout(16, layout.tile_cols, type, group)
    back = unpack(pack(random_matrix(layout)), wide)
    padding = np.ones(back.codes.shape, dtype=bool)
    padding[:3, :5] = False
    assert (back.codes[padding] == (128 if type == "int8" else 0)).all()
    if back.scales is not None:
        assert (back.scales[3:] == 0).all() and (back.scales[:, layout.groups :] == 0).all()


@pytest.mark.parametrize("type,group", KINDS)
def test_row_blocks_are_independent(type: str, group: int) -> None:
    """Rows from a multiple of 16 on may be packed apart: the writer works in pieces."""
    matrix = random_matrix(Layout(40, 96, type, group))
    packed, parts = pack(matrix), []
    for rows in (slice(0, 16), slice(16, 40)):
        layout = Layout(rows.stop - rows.start, 96, type, group)
        scales = None if matrix.scales is None else matrix.scales[rows]
        biases = None if matrix.biases is None else matrix.biases[rows]
        parts.append(pack(Matrix(layout, matrix.codes[rows], scales, biases)))
    np.testing.assert_array_equal(np.concatenate(parts), packed)


@pytest.mark.parametrize("rows,cols", [(8, 1), (40, 3), (96, 16)])
def test_interleave(rows: int, cols: int) -> None:
    first = np.arange(rows * cols).reshape(rows, cols)
    second = -first - 1
    both = interleave(first, second)
    for row in range(rows):
        np.testing.assert_array_equal(both[16 * (row // 8) + row % 8], first[row])
        np.testing.assert_array_equal(both[16 * (row // 8) + 8 + row % 8], second[row])
    back = deinterleave(both)
    np.testing.assert_array_equal(back[0], first)
    np.testing.assert_array_equal(back[1], second)
    np.testing.assert_array_equal(interleave(first[:, 0], second[:, 0]), both[:, 0])


def test_dequantize_int4_is_affine() -> None:
    layout = Layout(1, 64, "int4", 32)
    codes = np.arange(64, dtype=np.uint8).reshape(1, 64) % 16
    scales = np.array([[0.1, 2]], dtype=np.float16)
    biases = np.array([[-0.7, 3]], dtype=np.float16)
    scale, bias = np.repeat(np.float64(scales), 32, 1), np.repeat(np.float64(biases), 32, 1)
    expected = np.float32(scale * codes).astype(np.float64) + bias  # one rounding, of the sum
    np.testing.assert_array_equal(
        dequantize(Matrix(layout, codes, scales, biases)), np.float32(expected)
    )


def test_dequantize_int8_is_exact() -> None:
    layout = Layout(1, 256, "int8", 128)
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    scales = np.array([[0.1, 3]], dtype=np.float16)
    expected = (np.arange(256.0) - 128) * np.repeat(np.float64(scales[0]), 128)
    np.testing.assert_array_equal(dequantize(Matrix(layout, codes, scales))[0], expected)


def test_dequantize_fp8_is_exact() -> None:
    layout = Layout(1, 256, "fp8", 64)
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    scales = np.array([[0.1, 3, -1, 2**-24]], dtype=np.float16)
    expected = FP8_VALUES.astype(np.float64) * np.repeat(np.float64(scales[0]), 64)
    np.testing.assert_array_equal(dequantize(Matrix(layout, codes, scales))[0], expected)


@pytest.mark.parametrize(
    "type,bits,values",
    [
        ("fp32", [0x3FC00000, 0xC0100000, 0x00000001], [1.5, -2.25, 2.0**-149]),
        ("bf16", [0x3F81, 0xFF7F, 0x0001], [1.0078125, -255 * 2.0**120, 2.0**-133]),
        ("fp16", [0x3C01, 0xFBFF, 0x0001], [1 + 2.0**-10, -65504, 2.0**-24]),
    ],
)
def test_dequantize_plain_types_is_exact(type: str, bits: list[int], values: list[float]) -> None:
    codes = np.array([bits], dtype=CODE_DTYPES[type])
    found = dequantize(Matrix(Layout(1, 3, type), codes))
    assert found.dtype == np.float32
    assert found[0].tolist() == values


@pytest.mark.parametrize(
    "rows,cols,type,group",
    [
        (1, 1, "int3", 32),
        (1, 1, "int4", 0),
        (1, 1, "int4", 16),
        (1, 1, "bf16", 32),
        (0, 1, "bf16", 0),
        (1, -1, "bf16", 0),
    ],
)
def test_impossible_layouts(rows: int, cols: int, type: str, group: int) -> None:
    with pytest.raises(CheckpointError):
        Layout(rows, cols, type, group)
