"""Rounding to each type: errors against plain formulas, and the groups that go wrong easily."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from minflash.errors import ConvertError
from minflash.numeric import fp32_to_bf16
from minflash.packing import GROUP_SIZES, dequantize, pack, unpack
from minflash.quantize import QuantizationError, quantization_error, quantize, quantize_measured

Floats = NDArray[np.float32]
FP16_STEP = 2.0**-24  # the smallest positive float16


def normal(rows: int, cols: int, seed: int = 0, scale: float = 0.02) -> Floats:
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * scale).astype(np.float32)


def heavy(rows: int, cols: int) -> Floats:
    values = np.random.default_rng(1).standard_t(4, size=(rows, cols)) * 0.02
    return values.astype(np.float32)


def rms(values: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.asarray(values, dtype=np.float64) ** 2)))


def plain_int4(values: Floats, group_size: int) -> Floats:
    """min -> 0, max -> 15, with scale and bias rounded to float16; an independent reading."""
    groups = values.reshape(len(values), -1, group_size)
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    scale = ((high - low) / np.float32(15)).astype(np.float16).astype(np.float64)
    bias = low.astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint((groups - bias) / scale), 0, 15)
    return (codes * scale + bias).astype(np.float32).reshape(values.shape)


def test_floats_round_to_nearest() -> None:
    values = normal(17, 40)
    assert np.array_equal(dequantize(quantize(values, "fp32")), values)
    assert np.array_equal(quantize(values, "bf16").codes, fp32_to_bf16(values))
    assert np.array_equal(dequantize(quantize(values, "fp16")), values.astype(np.float16))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("make", [normal, heavy])
def test_int4_search_beats_plain_rounding(make, group_size) -> None:  # type: ignore[no-untyped-def]
    values = make(64, 512)
    matrix, error = quantize_measured(values, "int4", group_size)
    plain = rms(plain_int4(values, group_size) - values)
    ours = rms(dequantize(matrix) - values)
    assert ours < 0.93 * plain
    assert error.relative == pytest.approx(ours / rms(values), rel=1e-4)
    assert error.relative_plain == pytest.approx(plain / rms(values), rel=1e-4)


def test_int4_search_is_near_an_exhaustive_one() -> None:
    """One group at a time, over a fine grid of spans and many rounds."""
    values = normal(1, 64 * 20, seed=3)
    ours = dequantize(quantize(values, "int4", 64)).reshape(-1, 64)
    for group, row in zip(ours, values.reshape(-1, 64).astype(np.float64), strict=True):
        best = min(
            lloyd(row, below, above)
            for below in np.linspace(1.05, 0.7, 12)
            for above in np.linspace(1.05, 0.7, 12)
        )
        assert ((group - row) ** 2).sum() < 1.1 * best


def lloyd(row: NDArray[np.float64], below: float, above: float) -> float:
    """Squared error after six rounds of codes and least squares from one start, in float64."""
    middle, half = (row.max() + row.min()) / 2, (row.max() - row.min()) / 2
    bias, scale = middle - half * below, half * (below + above) / 15
    for _ in range(6):
        codes = np.clip(np.rint((row - bias) / scale), 0, 15)
        scale, bias = np.polyfit(codes, row, 1)
    codes = np.clip(np.rint((row - bias) / scale), 0, 15)
    return float(((codes * scale + bias - row) ** 2).sum())


def test_int4_without_search_is_plain_rounding() -> None:
    values = normal(16, 256)
    matrix, error = quantize_measured(values, "int4", 64, search=False)
    assert np.array_equal(dequantize(matrix), plain_int4(values, 64))
    assert error.relative == pytest.approx(error.relative_plain, rel=1e-4)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_int4_keeps_what_is_on_a_grid(group_size: int) -> None:
    """Codes 0..15 with a scale and bias of float16 come back exactly."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (8, 4, group_size))
    codes[:, :, 0], codes[:, :, 1] = 0, 15
    scales = rng.uniform(0.001, 0.1, (8, 4, 1)).astype(np.float16).astype(np.float32)
    biases = (-8 * scales).astype(np.float16).astype(np.float32)
    values = (codes * scales + biases).astype(np.float32).reshape(8, -1)
    assert np.array_equal(dequantize(quantize(values, "int4", group_size)), values)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_int8_error_is_at_most_half_a_step(group_size: int) -> None:
    values = heavy(32, 256)
    matrix = quantize(values, "int8", group_size)
    step = np.repeat(matrix.scales.astype(np.float32), group_size, axis=1)  # type: ignore[union-attr]
    # 127 steps of a scale that float16 rounded by up to 2^-11 of itself
    assert (np.abs(dequantize(matrix) - values) <= step * (0.5 + 127 * 2**-11)).all()
    assert rms(dequantize(matrix) - values) < 0.02 * rms(values)
    codes = matrix.codes.astype(int) - 128
    assert codes.min() >= -127 and codes.max() == 127


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_fp8_error_is_at_most_half_a_mantissa_step(group_size: int) -> None:
    values = heavy(32, 256)
    matrix = quantize(values, "fp8", group_size)
    step = np.repeat(matrix.scales.astype(np.float32), group_size, axis=1)  # type: ignore[union-attr]
    # half of 2^-3 of the value, or half of the subnormal step 2^-9; and the rounding of the scale
    bound = np.maximum(np.abs(values) * (2.0**-4 + 2.0**-10), step * 2.0**-10)
    assert (np.abs(dequantize(matrix) - values) <= bound * 1.0001).all()
    assert not ((matrix.codes & 0x7F) == 0x7F).any()


@pytest.mark.parametrize("type", ["int4", "int8", "fp8"])
def test_groups_of_zeros_and_constants(type: str) -> None:
    values = np.zeros((16, 128), dtype=np.float32)
    values[1], values[2], values[3, :64] = 0.75, -0.75, 1e-9  # below float16
    values[4, 7] = 3.0  # one value among zeros
    restored = dequantize(quantize(values, type, 32))
    assert np.array_equal(restored[0], values[0])
    assert np.allclose(restored, values, rtol=2**-10, atol=1e-8)
    assert np.isfinite(restored).all()


def test_int4_of_a_huge_outlier_stays_finite_and_no_worse_than_plain() -> None:
    values = normal(16, 128)
    values[0, 5], values[1, 70] = 6.0e4, -6.0e4
    restored = dequantize(quantize(values, "int4", 64))
    assert np.isfinite(restored).all()
    assert rms(restored - values) <= rms(plain_int4(values, 64) - values) * 1.0001


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1.0, 1000.0])
def test_int4_over_the_range_of_float16(scale: float) -> None:
    """Scales that float16 holds only as subnormals cost accuracy, not sense."""
    values = normal(16, 128, scale=scale)
    restored = dequantize(quantize(values, "int4", 64))
    assert np.abs(restored - values).max() <= 0.6 * scale + 20 * FP16_STEP


@pytest.mark.parametrize(
    ("type", "value"),
    [("int4", 7e4), ("int8", 9e6), ("fp8", 3.1e7), ("fp16", 7e4), ("bf16", 3.4e38)],
)
def test_values_too_large_for_a_type_are_refused(type: str, value: float) -> None:
    values = normal(16, 64)
    values[3, 3] = value
    with pytest.raises(ConvertError, match=type):
        quantize(values, type, 32 if type in ("int4", "int8", "fp8") else 0)


@pytest.mark.parametrize("type", ["fp32", "bf16", "fp16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(type: str, bad: float) -> None:
    values = normal(16, 64)
    values[15, 63] = bad
    with pytest.raises(ConvertError, match="1 of 1024 values"):
        quantize(values, type, 32 if type in ("int4", "int8", "fp8") else 0)


@pytest.mark.parametrize("type", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("cols", [1, 20, 32, 33, 150])
def test_a_tail_group_counts_only_its_own_values(type: str, cols: int) -> None:
    values = normal(20, cols) + np.float32(1)  # zeros of padding would widen the range
    matrix = quantize(values, type, 32)
    assert matrix.scales is not None and matrix.scales.shape == (20, -(-cols // 32))
    again = unpack(pack(matrix), matrix.layout)
    assert np.array_equal(dequantize(again), dequantize(matrix))
    tail = values[:, cols // 32 * 32 :]
    if tail.size:
        alone = quantize(np.ascontiguousarray(tail), type, 32)
        assert np.array_equal(dequantize(alone), dequantize(matrix)[:, cols // 32 * 32 :])


def test_rows_do_not_depend_on_each_other() -> None:
    values = normal(300, 2048)  # more than one chunk of the search
    whole = dequantize(quantize(values, "int4", 64))
    part = dequantize(quantize(values[100:116], "int4", 64))
    assert np.array_equal(whole[100:116], part)


def test_errors_add_up() -> None:
    values = normal(32, 128)
    parts = [
        quantize_measured(values[rows], "int4", 32)[1] for rows in (slice(0, 16), slice(16, 32))
    ]
    whole = quantize_measured(values, "int4", 32)[1]
    total = sum(parts, QuantizationError())
    assert total.relative == pytest.approx(whole.relative, rel=1e-6)
    assert total.relative_plain == pytest.approx(whole.relative_plain, rel=1e-6)
    measured = quantization_error(values, quantize(values, "int4", 32))
    assert measured.relative == pytest.approx(whole.relative, rel=1e-5)
