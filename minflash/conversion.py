"""One run of the converter: what is written, piece by piece, and what is reported about it."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .checkpoint import CheckpointWriter
from .convert_types import Choice, Wanted, choose, exact_parts, fits_exactly, matrix_of
from .errors import ConvertError
from .packing import BLOCK_ROWS, Layout, Matrix, interleave
from .quantize import QuantizationError, quantize_measured
from .source import Source

SLICE_VALUES = 1 << 21  # of a matrix, in one piece through memory
MAX_WORKERS = 4
Array = NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One tensor of the source. head_dim: not 0 when its rows are permuted within each head."""

    name: str
    rows: int
    head_dim: int = 0

    def read(self, get: Callable[[int, int], Array], start: int, stop: int) -> Array:
        """Rows start..stop in our order, where get(start, stop) reads them in the source's.

        GGUF files of the llama architecture hold the rows of each head of q and k in pairs
        (i, i + head_dim / 2), as interleaved rotary embedding wants them (llama.cpp,
        convert_hf_to_gguf.py, permute).
        """
        if not self.head_dim:
            return get(start, stop)
        first = start // self.head_dim * self.head_dim
        last = -(-stop // self.head_dim) * self.head_dim
        rows = get(first, last)
        pairs = rows.reshape(-1, self.head_dim // 2, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)[start - first : stop - first]


@dataclass(frozen=True)
class Target:
    """One tensor of the weight file and the parts it is joined from."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def kind(self) -> str:
        """The name without its layer: wqkv, embed, ..."""
        return self.name.rpartition(".")[2]

    def rows(self, get: Callable[[Part, int, int], Array], start: int, stop: int) -> Array:
        """Rows start..stop, multiples of 16, joined from what get(part, start, stop) gives."""
        if self.kind.startswith("w_gate_up"):  # two parts whose rows take turns
            halves = [part.read(partial(get, part), start // 2, stop // 2) for part in self.parts]
            return interleave(*halves)
        pieces, begin = [], 0
        for part in self.parts:
            low, high = max(start, begin), min(stop, begin + part.rows)
            if low < high:
                pieces.append(part.read(partial(get, part), low - begin, high - begin))
            begin += part.rows
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def slices(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that go through memory together."""
        rows, cols = self.shape
        step = max(1, SLICE_VALUES // cols // BLOCK_ROWS) * BLOCK_ROWS
        for start in range(0, rows, step):
            yield start, min(rows, start + step)


class Conversion:
    """One run of ``convert``: the types are chosen when it is made, the work is done by ``run``."""

    def __init__(
        self,
        source: Source,
        targets: list[Target],
        wanted: Wanted,
        progress: bool,
        report: Callable[[str], None],
    ) -> None:
        self.source, self.targets, self.report, self.progress = source, targets, report, progress
        self.matrices = {target.name: target for target in targets if len(target.shape) == 2}
        group = wanted.default_group(target.shape[1] for target in self.matrices.values())
        self.choices = {
            name: self._choose(target, wanted, group) for name, target in self.matrices.items()
        }
        self.errors: dict[tuple[str, str], QuantizationError] = {}  # (kind of matrix, type)

    def run(self, out: Path, overwrite: bool) -> Path:
        """Writes the model to ``out``, which appears only when it is complete."""
        files = self.source.files()
        vectors = {
            target.name: target.shape[0] for target in self.targets if len(target.shape) == 1
        }
        layouts = {name: self._layout(target) for name, target in self.matrices.items()}
        with CheckpointWriter(
            out, self.source.config, layouts, vectors, overwrite=overwrite
        ) as writer:
            self._report_notes(files)  # once it is known that ``out`` is free
            with ThreadPoolExecutor(_workers()) as pool, self._bar() as bar:
                for target in self.targets:
                    if target.name in vectors:
                        writer.write_vector(target.name, self._vector(target))
                    else:
                        writer.write_matrix(target.name, self._pieces(target, pool, bar))
            for name, content in files.items():
                writer.copy_file(name, content)
            path = writer.commit()
        self._report_errors()
        return path

    def _layout(self, target: Target) -> Layout:
        choice = self.choices[target.name]
        return Layout(target.shape[0], target.shape[1], choice.type, choice.group_size)

    def _choose(self, target: Target, wanted: Wanted, group: int) -> Choice:
        def fits(type: str) -> bool:
            return all(fits_exactly(self._values(target, *rows), type) for rows in target.slices())

        kinds = [self.source.kinds[part.name] for part in target.parts]
        return choose(target.name, kinds, wanted, group, fits, self.source.format == "gguf")

    def _values(self, target: Target, start: int, stop: int) -> NDArray[np.float32]:
        def read(part: Part, low: int, high: int) -> Array:
            return self.source.values(part.name, low, high)

        return target.rows(read, start, stop)

    def _vector(self, target: Target) -> NDArray[np.float32]:
        values = self._values(target, 0, target.shape[0])
        if not np.isfinite(values).all():
            raise self._located(target, 0, target.shape[0], "infinite or not a number")
        return np.ascontiguousarray(values, dtype=np.float32)

    def _pieces(self, target: Target, pool: ThreadPoolExecutor, bar: Any) -> Iterator[Matrix]:
        """The matrix from the top, in pieces that the pool prepares a little ahead."""
        jobs = (partial(self._piece, target, start, stop) for start, stop in target.slices())
        key = (target.kind, self.choices[target.name].type)
        for matrix, error in _ahead(pool, jobs, 2 * _workers()):
            self.errors[key] = self.errors.get(key, QuantizationError()) + error
            yield matrix
            bar.update(matrix.layout.rows * matrix.layout.cols)

    def _piece(self, target: Target, start: int, stop: int) -> tuple[Matrix, QuantizationError]:
        choice = self.choices[target.name]
        try:
            if choice.exact:
                return self._exact_piece(target, choice, start, stop), QuantizationError()
            values = self._values(target, start, stop)
            return quantize_measured(values, choice.type, choice.group_size)
        except ConvertError as error:
            raise self._located(target, start, stop, str(error)) from error

    def _exact_piece(self, target: Target, choice: Choice, start: int, stop: int) -> Matrix:
        stored: dict[tuple[str, int], dict[str, Array]] = {}  # each part is read once for all keys

        def read(key: str, part: Part, low: int, high: int) -> Array:
            if (part.name, low) not in stored:
                matrix = self.source.matrix(part.name, low, high)
                stored[part.name, low] = exact_parts(matrix, choice.type)
            return stored[part.name, low][key]

        keys = ["codes"]
        if choice.group_size:
            keys += ["scales", "biases"] if choice.type == "int4" else ["scales"]
        parts = {key: target.rows(partial(read, key), start, stop) for key in keys}
        matrix = matrix_of(parts, choice.type, choice.group_size)
        if not choice.group_size and not _finite(matrix):
            raise ConvertError("infinite or not a number; the source checkpoint is damaged")
        return matrix

    def _located(self, target: Target, start: int, stop: int, message: str) -> ConvertError:
        """The error with the source's names of the tensors: the damaged ones, else all parts."""
        damaged = []

        def read(part: Part, low: int, high: int) -> Array:
            values = self.source.values(part.name, low, high)
            if not np.isfinite(values).all():
                damaged.append(part.name)
            return values

        target.rows(read, start, stop)
        names = ", ".join(damaged or [part.name for part in target.parts])
        rows = f"rows {start}..{stop - 1} of {target.name}"
        return ConvertError(f"{self.source.path}: tensor {names} ({rows}): {message}")

    def _bar(self) -> Any:
        from tqdm import tqdm

        total = sum(target.shape[0] * target.shape[1] for target in self.matrices.values())
        quiet = not self.progress or not sys.stderr.isatty()
        return tqdm(total=total, unit="w", unit_scale=True, desc="converting", disable=quiet)

    def _report_notes(self, files: Mapping[str, object]) -> None:
        if "tokenizer.json" not in files:
            self.report("there is no tokenizer.json: the model will take and give token ids only")
        notes: dict[str, list[str]] = {}
        for name, choice in self.choices.items():
            if choice.note:
                notes.setdefault(choice.note, []).append(name)
        for note, names in notes.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.report(f"{names[0]}{more}: {note}")

    def _report_errors(self) -> None:
        lossy = {key: error for key, error in self.errors.items() if error.squared}
        if not lossy:
            self.report("every value was kept exactly")
            return
        self.report("relative RMS error    type  minflash  plain rounding")
        for (kind, type), error in lossy.items():
            numbers = f"{error.relative:8.5f}        {error.relative_plain:8.5f}"
            self.report(f"  {kind:<18} {type:>5}  {numbers}")


def _finite(matrix: Matrix) -> bool:
    codes = matrix.codes
    exponent = {"fp32": 0x7F800000, "bf16": 0x7F80, "fp16": 0x7C00}[matrix.layout.type]
    return not bool(((codes & codes.dtype.type(exponent)) == exponent).any())  # type: ignore[operator]


def _workers() -> int:
    """Threads that quantize; NumPy lets them run at once."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def _ahead(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]], depth: int) -> Iterator[T]:
    """The results of jobs in order, with at most ``depth`` of them under way or waiting."""
    pending: deque[Future[T]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) >= depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
