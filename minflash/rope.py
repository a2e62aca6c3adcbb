"""Rotary position embedding: the inverse frequencies of every kind, in float64.

The formulas are those of the transformers library, ``modeling_rope_utils.py``. The papers behind
them: RoFormer (arXiv 2104.09864), position interpolation (2306.15595), YaRN (2309.00071), LongRoPE
(2402.13753), and the Llama 3.1 model card for llama3.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .config import RopeConfig

Frequencies = NDArray[np.float64]
LENGTH_DEPENDENT = ("dynamic", "longrope")  # kinds whose frequencies depend on the length


def frequencies(
    rope: RopeConfig, head_dim: int, length: int, max_context: int = 0
) -> tuple[Frequencies, float]:
    """-> inverse frequencies float64 [head_dim / 2], radians per position, and attention scaling.

    length: positions of the sequence; only dynamic and longrope depend on it.
    max_context: positions; stands in for ``rope.original_context`` when that is 0.

    The cosine and the sine of ``position * frequency`` are multiplied by the attention scaling.
    """
    original = rope.original_context or max_context
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    if rope.kind == "dynamic":
        return _dynamic_theta(rope, head_dim, length, original) ** -exponents, 1.0
    inverse = rope.theta**-exponents
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inverse, original), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inverse, head_dim, original), _yarn_scaling(rope)
    if rope.kind == "longrope":
        factors = rope.long_factor if length > original else rope.short_factor
        return inverse / np.array(factors), _longrope_scaling(rope, original)
    return inverse, 1.0


def rotation(
    rope: RopeConfig, head_dim: int, positions: NDArray[np.int64], length: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosines and sines, float64 [positions, head_dim / 2] each, attention scaling included."""
    inverse, scaling = frequencies(rope, head_dim, length)
    angles = positions[:, None] * inverse
    return np.cos(angles) * scaling, np.sin(angles) * scaling


def _dynamic_theta(rope: RopeConfig, head_dim: int, length: int, original: int) -> float:
    """The base grows with the sequence once that is longer than the original context."""
    stretch = rope.factor * max(length, original) / original - (rope.factor - 1)
    return float(rope.theta * stretch ** (head_dim / (head_dim - 2)))


def _llama3(rope: RopeConfig, inverse: Frequencies, original: int) -> Frequencies:
    """Short wavelengths stay, long ones are divided by the factor, those between are blended."""
    turns = original * inverse / (2 * math.pi)  # full turns within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * inverse / rope.factor + blend * inverse


def _yarn(rope: RopeConfig, inverse: Frequencies, head_dim: int, original: int) -> Frequencies:
    """Pairs below ``low`` stay, pairs above ``high`` are divided by the factor, a ramp between."""

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes so many turns within the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in transformers: a step in place of a division by zero
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    blended: Frequencies = inverse / rope.factor * ramp + inverse * (1 - ramp)
    return blended


def _yarn_scaling(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope_scaling(rope: RopeConfig, original: int) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))
