"""The kernels of samples.cu with their data, as the tests and the sanitized process run them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from . import FOLDER, EmulatedModule, Order

PTX = Path(__file__).parents[2] / "cuda" / "ptx.cuh"
Array = np.ndarray[Any, Any]

BUGS = (
    "none",
    "no_grid_barrier",
    "no_wait",
    "no_empty_wait",
    "partials_not_published",
    "early_release",
)
CONVERSIONS = ("f16_f32", "e4m3_f16", "f32_f16", "f32_bf16", "exp2", "sinpi", "rsqrt")
RULES = (
    *("over_arrival", "unaligned_copy", "copy_outside", "no_init", "barrier_counts"),
    *("copy_over_copy", "end_in_flight", "overrun", "mixed_warp", "missing_warp"),
    *("missing_bytes", "missing_block", "missing_lane", "race", "read_past_end", "own_watchdog"),
    "changing_source",
)
RING_BYTES = 2 * 16 * 8 + 64 * 4 * 8 * 4  # mbarriers and partial sums of samples.cu
ROWS, COLS = (448, 192), (192, 448)  # of the pipeline's two matrices


@cache
def module() -> EmulatedModule:
    """All sample kernels: one compile for all tests."""
    source = PTX.read_text().replace("#pragma once", "")
    samples = (FOLDER / "samples.cu").read_text()
    return EmulatedModule(
        f'#line 1 "ptx.cuh"\n{source}\n#line 1 "samples.cu"\n{samples}', optimize=1
    )


def arguments(**fields: Array | int) -> Array:
    """A launch argument: arrays become their addresses, numbers int32."""
    types = [(k, "<u8" if isinstance(v, np.ndarray) else "<i4") for k, v in fields.items()]
    out = np.zeros((), np.dtype(types, align=True))
    for name, value in fields.items():
        out[name] = value.ctypes.data if isinstance(value, np.ndarray) else value
    return out


def aligned(nbytes: int) -> Array:
    """Zeroed bytes at a multiple of 16, as device memory is."""
    raw = np.zeros(nbytes + 16, np.uint8)
    start = -raw.ctypes.data % 16
    return raw[start : start + nbytes]


def bf16(values: Array) -> Array:
    """float32 -> bf16 bits, to nearest even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack(weights: Array) -> Array:
    """bf16 bits [rows, cols] -> [rows / 8, cols / 64, 8, 64] at a multiple of 16."""
    rows, cols = weights.shape
    out = aligned(weights.nbytes).view(np.uint16)
    out[:] = weights.reshape(rows // 8, 8, cols // 64, 64).swapaxes(1, 2).reshape(-1)
    return out


@cache
def pipeline_data() -> tuple[list[Array], Array, Array]:
    """Weights in bf16 bits, x in bf16 bits, and y in float64."""
    rng = np.random.default_rng(0)
    weights = [bf16(rng.normal(0, 0.1, (r, c))) for r, c in zip(ROWS, COLS, strict=True)]
    x = bf16(rng.normal(0, 1, COLS[0]))
    hidden = np.maximum(from_bf16(weights[0]).astype(float) @ from_bf16(x), 0)
    return weights, x, from_bf16(weights[1]).astype(float) @ from_bf16(bf16(hidden))


def pipeline_error(
    grid: int, order: Order, *, seed: int = 0, bulk: int = 1, bug: str = "none", stages: int = 8
) -> float:
    """The largest error of y, relative to the largest y; NaN or infinite when y is garbage."""
    weights, x, truth = pipeline_data()
    packed = [pack(w) for w in weights]
    hidden = np.full(ROWS[0], 0x7FC0, np.uint16)
    y = np.full(ROWS[1], np.nan, np.float32)
    barrier = np.zeros(1, np.uint32)
    shape = {"rows0": ROWS[0], "rows1": ROWS[1], "cols0": COLS[0], "cols1": COLS[1]}
    buffers = {"w0": packed[0], "w1": packed[1], "x": x, "hidden": hidden, "y": y}
    options = {"stages": stages, "bulk": bulk, "bug": BUGS.index(bug)}
    args = arguments(**buffers, barrier=barrier, **shape, **options)
    smem = RING_BYTES + stages * 1024
    # A machine under load may halt a right kernel for a while; one with a bug is not waited for.
    timeout_s = 20 if bug == "none" and stages % 4 == 0 else 0.3
    module().launch("pipeline", grid, 160, smem, args, order=order, seed=seed, timeout_s=timeout_s)
    return float(np.abs(y - truth).max() / np.abs(truth).max())


def converted(name: str, values: Array) -> Array:
    """uint32 words through one conversion of samples.cu."""
    words, out = np.ascontiguousarray(values, np.uint32), np.zeros(len(values), np.uint32)
    args = arguments(words=words, out=out, n=len(values), what=CONVERSIONS.index(name))
    module().launch("convert", 2, 64, 0, args)
    return out


def broken_rule(rule: str, *, grid: int = 1, timeout_s: float = 0.2, **options: Any) -> int:
    """Run the `rules` kernel; returns what it left in its word."""
    word, source = np.zeros(1, np.uint32), aligned(96)
    args = arguments(rule=RULES.index(rule), word=word, source=source)
    module().launch("rules", grid, 64, 1024, args, timeout_s=timeout_s, **options)
    return int(word[0])
