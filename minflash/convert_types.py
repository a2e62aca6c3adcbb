"""Which type each matrix of a converted model gets, and whether that keeps every value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError
from .numeric import bf16_to_fp32, fp32_to_bf16
from .packing import GROUP_SIZES, GROUPED_TYPES, TYPES, Layout, Matrix, dequantize
from .source import FLOAT_KINDS, GROUPED_KINDS

HEAD = ("embed", "lm_head")
STORED_GROUP = 32  # of GROUPED_KINDS
DEFAULT_INT4_GROUP = 64
# ggml types of about four bits or fewer; those with more go to int8
_SMALL_FOREIGN = ("Q4_K", "Q3_K", "Q2_K", "IQ", "TQ", "MXFP4")


@dataclass(frozen=True)
class Wanted:
    """What the caller asked for. None: keep as stored, or the default."""

    quant: str | None
    group_size: int | None
    head_quant: str | None

    def __post_init__(self) -> None:
        for what, value in (("quant", self.quant), ("head_quant", self.head_quant)):
            if value is not None and value not in TYPES:
                raise ArgumentError(f"{what} is {value!r}; it must be one of {', '.join(TYPES)}")
        if self.group_size is None:
            return
        if self.group_size not in GROUP_SIZES:
            raise ArgumentError(
                f"group_size is {self.group_size!r}; it must be one of {GROUP_SIZES}"
            )
        if not {self.quant, self.head_quant} & set(GROUPED_TYPES):
            raise ArgumentError(
                f"group_size needs quant or head_quant to be one of {', '.join(GROUPED_TYPES)}; "
                f"quant is {self.quant!r}"
            )

    def type(self, name: str) -> str | None:
        """What was asked for the matrix ``name``; the head's default is int8 with int4 layers."""
        if name not in HEAD:
            return self.quant
        return self.head_quant or ("int8" if self.quant == "int4" else self.quant)

    def default_group(self, columns: Iterable[int]) -> int:
        """The group size for matrices with these numbers of columns."""
        if self.group_size is not None:
            return self.group_size
        if self.quant == "int4":
            return DEFAULT_INT4_GROUP
        counts = set(columns)
        return next(
            (size for size in (128, 64, 32) if all(count % size == 0 for count in counts)), 32
        )


@dataclass(frozen=True)
class Choice:
    """The type of one matrix. exact: every value stays. note: what the user should know."""

    type: str
    group_size: int
    exact: bool
    note: str = ""


def choose(
    name: str,
    kinds: Sequence[str],
    wanted: Wanted,
    default_group: int,
    fits: Callable[[str], bool],
    lossless_floats: bool,
) -> Choice:
    """The type of the matrix ``name``.

    kinds: how its parts are stored. fits: whether a type holds all its values exactly.
    lossless_floats: float32 values that fit no shorter type stay fp32, else they become bf16.
    """
    asked = wanted.type(name)
    if asked is None:
        return _as_stored(kinds, fits, lossless_floats)
    if asked not in GROUPED_TYPES:
        return Choice(asked, 0, set(kinds) == {asked})
    if wanted.group_size in (None, STORED_GROUP) and _common_group_type(kinds) == asked:
        return Choice(asked, STORED_GROUP, True)
    return Choice(asked, default_group, False)


def _as_stored(kinds: Sequence[str], fits: Callable[[str], bool], lossless_floats: bool) -> Choice:
    distinct = set(kinds)
    if distinct <= set(FLOAT_KINDS):
        return _as_stored_float(distinct, fits, lossless_floats)
    if (common := _common_group_type(kinds)) is not None:
        return Choice(common, STORED_GROUP, True)
    if distinct <= set(FLOAT_KINDS) | set(GROUPED_KINDS) and distinct & set(FLOAT_KINDS):
        return Choice("fp32", 0, True, f"{_listed(kinds)} in one matrix: kept exactly as fp32")
    small = all(kind.startswith(("int4", *_SMALL_FOREIGN)) for kind in kinds)
    type = "int4" if small else "int8"
    return Choice(
        type,
        STORED_GROUP,
        False,
        f"{_listed(kinds)} cannot be kept exactly: quantized again to {type} g{STORED_GROUP}",
    )


def _as_stored_float(distinct: set[str], fits: Callable[[str], bool], lossless: bool) -> Choice:
    if len(distinct) == 1 and "fp32" not in distinct:
        return Choice(next(iter(distinct)), 0, True)
    for type in ("bf16", "fp16"):
        if fits(type):
            return Choice(type, 0, True)
    if lossless:
        return Choice("fp32", 0, True)
    return Choice(
        "bf16", 0, False, "float32 values that bf16 and fp16 cannot hold: rounded to bf16"
    )


def _common_group_type(kinds: Sequence[str]) -> str | None:
    """The type with groups of 32 that holds all these kinds exactly; int8 also holds int4s."""
    distinct = set(kinds)
    if distinct <= {"int4", "int4s"}:
        return "int4"
    return "int8" if distinct <= {"int8", "int4s"} else None


def _listed(kinds: Sequence[str]) -> str:
    shown = {"int8": "Q8_0", "int4s": "Q4_0", "int4": "Q4_1"}
    return ", ".join(sorted({shown.get(kind, kind) for kind in kinds}))


def fits_exactly(values: NDArray[np.float32], type: str) -> bool:
    """Whether every value of float32 [...] is a value of bf16 or fp16."""
    if type == "bf16":
        return bool(np.array_equal(bf16_to_fp32(fp32_to_bf16(values)), values))
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def exact_parts(matrix: Matrix, type: str) -> dict[str, NDArray[np.generic]]:
    """codes (and scales, biases) of a stored matrix in a type that holds it exactly."""
    if matrix.layout.type == type:
        parts = {"codes": matrix.codes, "scales": matrix.scales, "biases": matrix.biases}
        return {key: part for key, part in parts.items() if part is not None}
    if type == "int8":  # from Q4_0: codes 0..15 mean -8..7 and the bias goes without saying
        assert matrix.layout.type == "int4" and matrix.scales is not None
        return {"codes": matrix.codes.astype(np.uint8) + np.uint8(120), "scales": matrix.scales}
    values = dequantize(matrix)
    if type == "fp32":
        return {"codes": values.view(np.uint32)}
    return {
        "codes": fp32_to_bf16(values)
        if type == "bf16"
        else values.astype(np.float16).view(np.uint16)
    }


def matrix_of(parts: Mapping[str, NDArray[np.generic]], type: str, group_size: int) -> Matrix:
    """The opposite of ``exact_parts``."""
    codes = parts["codes"]
    layout = Layout(codes.shape[0], codes.shape[1], type, group_size)
    return Matrix(layout, codes, parts.get("scales"), parts.get("biases"))  # type: ignore[arg-type]
