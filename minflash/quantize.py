"""Rounding float32 matrices to the types of the weight file.

Types with groups share one float16 scale (int4: and one float16 bias) among the values of a group
along a row. All choices are made with the scale and bias as they are stored, after rounding to
float16, so that the codes fit what a reader will multiply them with.

int4 is searched: for several starting ranges, codes and the least-squares scale and bias for those
codes are improved in turns (Lloyd's algorithm with an affine codebook); each group keeps its best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .numeric import FP8_MAX, fp8_to_fp32, fp32_to_bf16, fp32_to_fp8
from .packing import GROUPED_TYPES, INT8_ZERO, Layout, Matrix, dequantize

Floats = NDArray[np.float32]

FP16_MAX = 65504.0
INT8_MAX = 127
INT4_CENTRE = 8  # int4 codes are searched as q - 8, which keeps the sums small and so exact
INT4_LOW, INT4_HIGH = -8, 7
# What the 16 levels of a first try span: these parts of the group's range below and above its
# middle, each side by itself, since clipping an outlier is often cheaper than a wider step for all
# others. Nine tries and three refinements come within 1 % of the error that 594 tries reach on
# Gaussian and heavy-tailed values.
INT4_SPANS = (1.02, 0.95, 0.88)
INT4_REFINEMENTS = 3
# Values searched at once: the working set, a few float32 arrays, should stay in the caches.
CHUNK_VALUES = 1 << 18


@dataclass(frozen=True)
class QuantizationError:
    """Sums over a matrix of squares; sums of several matrices add up."""

    energy: float = 0.0  # of the values
    squared: float = 0.0  # of the differences after quantization
    plain: float = 0.0  # of the differences after plain rounding without search

    def __add__(self, other: QuantizationError) -> QuantizationError:
        return QuantizationError(
            self.energy + other.energy, self.squared + other.squared, self.plain + other.plain
        )

    @property
    def relative(self) -> float:
        """Root mean square error relative to the root mean square of the values; 0 for zeros."""
        return float(np.sqrt(self.squared / self.energy)) if self.energy else 0.0

    @property
    def relative_plain(self) -> float:
        """The same for plain rounding."""
        return float(np.sqrt(self.plain / self.energy)) if self.energy else 0.0


def quantize(values: Floats, type: str, group_size: int = 0, *, search: bool = True) -> Matrix:
    """Round float32 [rows, cols] to ``type``. A group that cols cuts short is a group of its own.

    fp32 keeps the bits, bf16 and fp16 round to nearest even. fp8 and int8 scale the largest
    magnitude of a group to 448 and 127. int4 takes the smallest to 0 and the largest to 15, and
    then searches for less error unless ``search`` is False. ConvertError: a value is not finite
    or does not fit.
    """
    return quantize_measured(values, type, group_size, search=search)[0]


def quantization_error(values: Floats, matrix: Matrix) -> QuantizationError:
    """The error of ``matrix`` in place of ``values`` float32 [rows, cols]; plain is the same."""
    squared = _sum_of_squares(dequantize(matrix) - values)
    return QuantizationError(_sum_of_squares(values), squared, squared)


def quantize_measured(
    values: Floats, type: str, group_size: int = 0, *, search: bool = True
) -> tuple[Matrix, QuantizationError]:
    """``quantize`` and its error, measured on the way; see there."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    layout = Layout(values.shape[0], values.shape[1], type, group_size)
    if type not in GROUPED_TYPES:
        matrix = Matrix(layout, _round_float(values, type))
        exact = type == "fp32"
        return matrix, QuantizationError() if exact else quantization_error(values, matrix)
    if type == "int4":
        return _int4(values, layout, search)
    return _scaled(values, layout)


def _round_float(values: Floats, type: str) -> NDArray[np.generic]:
    _require_finite(values)
    if type == "fp32":
        return values.view(np.uint32)
    if type == "bf16":
        bits = fp32_to_bf16(values)
        if ((bits & 0x7FFF) == 0x7F80).any():
            raise ConvertError("a value is too large for bf16; keep fp32")
        return bits
    _require_range(float(np.abs(values).max()), FP16_MAX, "fp16")
    return values.astype(np.float16).view(np.uint16)


def _require_finite(values: Floats) -> None:
    if not np.isfinite(values).all():
        count = int(values.size - np.isfinite(values).sum())
        raise ConvertError(
            f"{count} of {values.size} values are infinite or not a number; the source is damaged"
        )


def _require_range(largest: float, limit: float, type: str) -> None:
    # 0.999: room for the rounding of the scale itself
    if largest > limit * 0.999:
        raise ConvertError(
            f"a value of magnitude {largest:.6g} does not fit {type}, whose limit with float16 "
            f"scales is {limit:.6g}; choose bf16"
        )


def _sum_of_squares(values: Floats) -> float:
    flat = values.reshape(-1)
    return (
        float(np.dot(flat, flat))
        if flat.size < 1 << 16
        else float(
            sum(
                np.dot(part, part).astype(np.float64)
                for part in np.array_split(flat, flat.size >> 15)
            )
        )
    )


def _pieces(layout: Layout) -> list[tuple[slice, slice, int]]:
    """The columns of whole groups and of a tail group: (columns, groups, values per group)."""
    whole = layout.cols // layout.group_size
    pieces = []
    if whole:
        pieces.append((slice(0, whole * layout.group_size), slice(0, whole), layout.group_size))
    if tail := layout.cols - whole * layout.group_size:
        pieces.append((slice(layout.cols - tail, layout.cols), slice(whole, whole + 1), tail))
    return pieces


# int8 and fp8: one scale per group


def _scaled(values: Floats, layout: Layout) -> tuple[Matrix, QuantizationError]:
    codes = np.empty(values.shape, dtype=np.uint8)
    scales = np.empty((layout.rows, layout.groups), dtype=np.float16)
    error = QuantizationError()
    for columns, groups, size in _pieces(layout):
        rows_at_once = max(1, CHUNK_VALUES // (columns.stop - columns.start))
        for row in range(0, layout.rows, rows_at_once):
            rows = slice(row, row + rows_at_once)
            block = values[rows, columns].reshape(-1, groups.stop - groups.start, size)
            part_codes, part_scales, part_error = _scaled_block(block, layout.type)
            codes[rows, columns] = part_codes.reshape(len(block), -1)
            scales[rows, groups] = part_scales
            error += part_error
    return Matrix(layout, codes, scales), error


def _scaled_block(
    values: Floats, type: str
) -> tuple[NDArray[np.uint8], NDArray[np.float16], QuantizationError]:
    """float32 [rows, groups, size] -> codes of the same shape, scales [rows, groups], error."""
    largest = np.maximum(values.max(axis=2), -values.min(axis=2))
    _check_extremes(values, largest)
    top = FP8_MAX if type == "fp8" else float(INT8_MAX)
    _require_range(float(largest.max()), top * FP16_MAX, type)
    scales = (largest / np.float32(top)).astype(np.float16)
    stored = scales.astype(np.float32)[:, :, None]
    scaled = values * _inverse(stored)
    if type == "fp8":
        codes = fp32_to_fp8(scaled)
        restored = fp8_to_fp32(codes)
    else:
        restored = np.rint(scaled, out=scaled)
        np.clip(restored, -INT8_MAX, INT8_MAX, out=restored)
        codes = (restored + np.float32(INT8_ZERO)).astype(np.uint8)
    restored *= stored
    restored -= values
    squared = _sum_of_squares(restored)
    return codes, scales, QuantizationError(_sum_of_squares(values), squared, squared)


def _check_extremes(values: Floats, *extremes: Floats) -> None:
    """NaN and infinity survive in a group's extremes, so that only those need a look."""
    if not all(np.isfinite(extreme).all() for extreme in extremes):
        _require_finite(values)


def _inverse(scales: Floats) -> Floats:
    """1 / scale, and 0 for a scale of 0 (a group of zeros, or one too small for float16)."""
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)


# int4: one scale and one bias per group


def _int4(values: Floats, layout: Layout, search: bool) -> tuple[Matrix, QuantizationError]:
    codes = np.empty(values.shape, dtype=np.uint8)
    scales = np.empty((layout.rows, layout.groups), dtype=np.float16)
    biases = np.empty_like(scales)
    error = QuantizationError()
    for columns, groups, size in _pieces(layout):
        count = groups.stop - groups.start
        rows_at_once = max(1, CHUNK_VALUES // (count * size))
        for row in range(0, layout.rows, rows_at_once):
            rows = slice(row, row + rows_at_once)
            # Groups lie along the last axis, so that operations run over long contiguous rows.
            block = np.ascontiguousarray(values[rows, columns].reshape(-1, size).T)
            fit = _Int4Groups(block)
            if search:
                fit.search()
            codes[rows, columns] = fit.codes().T.reshape(-1, count * size)
            scales[rows, groups] = fit.scales.reshape(-1, count)
            biases[rows, groups] = fit.biases.reshape(-1, count)
            error += fit.error()
    return Matrix(layout, codes, scales, biases), error


def _as_fp16(values: NDArray[np.floating[Any]]) -> Floats:
    """Rounded (and clipped) to float16, as float32."""
    rounded = np.clip(values, -FP16_MAX, FP16_MAX).astype(np.float16)
    return np.asarray(rounded, dtype=np.float32)


def _direct_error(values: Floats, scales: Floats, biases: Floats) -> NDArray[np.float64]:
    """Squared errors [groups] of float32 [size, groups] with the nearest codes, no shortcuts."""
    codes = np.clip(np.rint((values - biases) * _inverse(scales)), 0, 15)
    differences = codes.astype(np.float64) * scales + biases - values
    return np.asarray((differences * differences).sum(axis=0))


class _Int4Groups:
    """Many groups of one size, each with the best scale and bias so far.

    With q' = q - 8 and c = w - mean, the squared error of a group's codes is
    sum (c - scale q' - shift)^2, where shift = bias + 8 scale - mean; it follows from the sums of
    q', q'^2, q' c, c and c^2 alone, and so does the least-squares scale and shift.
    scales, biases: float32 [groups], values that float16 holds.
    """

    def __init__(self, values: Floats) -> None:
        """values: float32 [size, groups]. Starts with plain rounding: min -> 0, max -> 15."""
        self.values, self.size = values, np.float32(len(values))
        self.low, self.high = values.min(axis=0), values.max(axis=0)
        _check_extremes(values, self.low, self.high)
        _require_range(float(np.maximum(-self.low, self.high).max()), FP16_MAX, "int4")
        self.mean = np.add.reduce(values, axis=0) / self.size
        self.centred = values - self.mean
        self.levels = np.empty_like(values)  # q' of the last try
        self.buffer = self.centred * self.centred
        self.sum_c = np.add.reduce(self.centred, axis=0)
        self.sum_cc = np.add.reduce(self.buffer, axis=0)
        self.scales, self.biases = self._plain()
        sums = self._sums(self.scales, self.biases)
        self.best = self._squared_error(sums, self.scales, self.biases)
        self.plain = self.best.astype(np.float64)

    def search(self) -> None:
        """Least squares from every span; then codes and (scale, bias) of the best, in turns."""
        middle = (self.low + self.high) * np.float32(0.5)
        half = (self.high - self.low) * np.float32(0.5)
        for below in INT4_SPANS:
            low = middle - half * np.float32(below)
            for above in INT4_SPANS:
                high = middle + half * np.float32(above)
                self._try(_as_fp16((high - low) / 15), _as_fp16(low))
        for _ in range(INT4_REFINEMENTS):
            self._try(self.scales, self.biases)
        self._settle()

    def codes(self) -> NDArray[np.uint8]:
        """[size, groups] 0..15, the nearest levels of the best scales and biases."""
        self._round(self.scales, self.biases)
        return (self.levels + np.float32(INT4_CENTRE)).astype(np.uint8)

    def error(self) -> QuantizationError:
        """After ``codes``, which may have lowered the error that the search saw."""
        np.multiply(self.levels, self.scales, out=self.buffer)
        self.buffer += self._shift(self.scales, self.biases)
        self.buffer -= self.centred
        energy = (self.mean.astype(np.float64) ** 2 * float(self.size) + self.sum_cc).sum()
        return QuantizationError(
            float(energy), _sum_of_squares(self.buffer), float(self.plain.sum())
        )

    def _plain(self) -> tuple[Floats, Floats]:
        return _as_fp16((self.high - self.low) / 15), _as_fp16(self.low)

    def _settle(self) -> None:
        """Plain rounding again where it is better after all.

        Sums of float32 cannot tell errors that are tiny beside the values, such as those of a group
        with one huge outlier; these few are compared directly. Others have about 6e-3 here.
        """
        groups = np.flatnonzero(self.best < np.float32(1e-4) * self.sum_cc)
        scales, biases = (part[groups] for part in self._plain())
        values = self.values[:, groups]
        plain = _direct_error(values, scales, biases)
        worse = _direct_error(values, self.scales[groups], self.biases[groups]) > plain
        self.scales[groups[worse]], self.biases[groups[worse]] = scales[worse], biases[worse]
        self.plain[groups] = plain

    def _try(self, scales: Floats, biases: Floats) -> None:
        """Nearest levels, then their least squares; kept where the error is the least yet."""
        sums = self._sums(scales, biases)
        scales, biases = self._least_squares(sums, scales)
        error = self._squared_error(sums, scales, biases)
        better = error < self.best
        np.copyto(self.best, error, where=better)
        np.copyto(self.scales, scales, where=better)
        np.copyto(self.biases, biases, where=better)

    def _shift(self, scales: Floats, biases: Floats) -> Floats:
        return np.asarray(biases + np.float32(INT4_CENTRE) * scales - self.mean)

    def _round(self, scales: Floats, biases: Floats) -> None:
        inverse = _inverse(scales)
        np.multiply(self.centred, inverse, out=self.levels)
        self.levels -= self._shift(scales, biases) * inverse
        np.rint(self.levels, out=self.levels)
        np.clip(self.levels, INT4_LOW, INT4_HIGH, out=self.levels)

    def _sums(self, scales: Floats, biases: Floats) -> tuple[Floats, Floats, Floats]:
        """Sums [groups] of q', q'^2 and q' c for the nearest levels of these scales and biases."""
        self._round(scales, biases)
        np.multiply(self.levels, self.centred, out=self.buffer)
        sum_qc = np.add.reduce(self.buffer, axis=0)
        np.multiply(self.levels, self.levels, out=self.buffer)
        return np.add.reduce(self.levels, axis=0), np.add.reduce(self.buffer, axis=0), sum_qc

    def _least_squares(
        self, sums: tuple[Floats, Floats, Floats], scales: Floats
    ) -> tuple[Floats, Floats]:
        """The best scales and biases [groups] for the levels behind ``sums``, as float16 values."""
        sum_q, sum_qq, sum_qc = sums
        spread = self.size * sum_qq - sum_q * sum_q
        moment = self.size * sum_qc - sum_q * self.sum_c
        # No spread: all levels are one, and every scale does as well as the present one.
        rounded = _as_fp16(np.divide(moment, spread, out=scales.copy(), where=spread > 0))
        bias = (self.sum_c - rounded * sum_q) / self.size + self.mean
        return rounded, _as_fp16(bias - np.float32(INT4_CENTRE) * rounded)

    def _squared_error(
        self, sums: tuple[Floats, Floats, Floats], scales: Floats, biases: Floats
    ) -> Floats:
        sum_q, sum_qq, sum_qc = sums
        shift = self._shift(scales, biases)
        cross = scales * (scales * sum_qq - np.float32(2) * sum_qc)
        moved = shift * (np.float32(2) * (scales * sum_q - self.sum_c) + self.size * shift)
        return np.asarray(self.sum_cc + cross + moved)
