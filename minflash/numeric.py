"""Number formats that NumPy lacks: bf16 and fp8 (e4m3), as bit patterns.

bf16 is the upper half of an IEEE float32. fp8 is E4M3 of the OCP 8-bit floating point
specification (OFP8 1.0): 1 sign, 4 exponent, 3 mantissa bits, bias 7, largest value 448, no
infinity, NaN is 0x7f and 0xff.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FP8_MAX = 448.0


def bf16_to_fp32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """uint16 bit patterns [...] -> float32 [...], exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 [...] -> uint16 bit patterns [...], rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def _fp8_table() -> NDArray[np.float32]:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0)
    )
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


FP8_VALUES = _fp8_table()  # [256] float32, indexed by code


def fp8_to_fp32(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """e4m3 codes [...] -> float32 [...], exact."""
    return FP8_VALUES[codes]


def fp32_to_fp8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 [...] -> e4m3 codes [...], rounded to nearest even, saturating at +-448."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    magnitude = np.minimum(bits & 0x7FFFFFFF, np.float32(FP8_MAX).view(np.uint32))
    # From 2^-6 on a code is the upper bits of the float32, less the difference of the exponents'
    # biases; below, codes count steps of 2^-9, which is what the last bit of 2^14 + x stands for.
    normal = ((magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20) - ((127 - 7) << 3)
    counted = (magnitude.view(np.float32) + np.float32(2**14)).view(np.uint32)
    below = magnitude < np.float32(2**-6).view(np.uint32)
    codes: NDArray[np.uint8] = np.where(below, counted, normal).astype(np.uint8)  # the low byte
    codes[np.isnan(values)] = 0x7F
    codes |= (bits >> 24 & 0x80).astype(np.uint8)
    return codes
