"""Converting a foreign checkpoint to the weight file; the only file that knows foreign tensor names.

A Hugging Face folder, a hub id or a GGUF file becomes the folder that docs/format.md describes. Each
matrix goes through memory in ranges of rows: read, joined from its parts (q, k and v; gate and up),
rounded or copied, written. The source must hold every tensor that its config asks for, and no other.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .checkpoint import CheckpointWriter, expected_tensors
from .config import ModelConfig
from .convert_types import Choice, Wanted, choose, exact_parts, fits_exactly, matrix_of
from .errors import ConvertError, MinflashError
from .huggingface import PICKLES, HuggingFaceSource, fetch, is_hub_id, pickle_message
from .packing import BLOCK_ROWS, Layout, Matrix, interleave
from .quantize import QuantizationError, quantize_measured
from .source import GGUFSource, Source

logger = logging.getLogger("minflash")

# Our name -> the source's names, in the order in which they are joined. {0} is the layer.
_HUGGING_FACE = {
    "embed": ["model.embed_tokens.weight"],
    "attn_norm": ["model.layers.{0}.input_layernorm.weight"],
    "wqkv": [f"model.layers.{{0}}.self_attn.{part}_proj.weight" for part in "qkv"],
    "wqkv_bias": [f"model.layers.{{0}}.self_attn.{part}_proj.bias" for part in "qkv"],
    "q_norm": ["model.layers.{0}.self_attn.q_norm.weight"],
    "k_norm": ["model.layers.{0}.self_attn.k_norm.weight"],
    "wo": ["model.layers.{0}.self_attn.o_proj.weight"],
    "wo_bias": ["model.layers.{0}.self_attn.o_proj.bias"],
    "ffn_norm": ["model.layers.{0}.post_attention_layernorm.weight"],
    "w_gate_up": [f"model.layers.{{0}}.mlp.{part}_proj.weight" for part in ("gate", "up")],
    "w_gate_up_bias": [f"model.layers.{{0}}.mlp.{part}_proj.bias" for part in ("gate", "up")],
    "w_down": ["model.layers.{0}.mlp.down_proj.weight"],
    "w_down_bias": ["model.layers.{0}.mlp.down_proj.bias"],
    "final_norm": ["model.norm.weight"],
    "lm_head": ["lm_head.weight"],
}
_GGUF = {
    "embed": ["token_embd.weight"],
    "attn_norm": ["blk.{0}.attn_norm.weight"],
    "wqkv": [f"blk.{{0}}.attn_{part}.weight" for part in "qkv"],
    "wqkv_bias": [f"blk.{{0}}.attn_{part}.bias" for part in "qkv"],
    "q_norm": ["blk.{0}.attn_q_norm.weight"],
    "k_norm": ["blk.{0}.attn_k_norm.weight"],
    "wo": ["blk.{0}.attn_output.weight"],
    "wo_bias": ["blk.{0}.attn_output.bias"],
    "ffn_norm": ["blk.{0}.ffn_norm.weight"],
    "w_gate_up": [f"blk.{{0}}.ffn_{part}.weight" for part in ("gate", "up")],
    "w_gate_up_bias": [f"blk.{{0}}.ffn_{part}.bias" for part in ("gate", "up")],
    "w_down": ["blk.{0}.ffn_down.weight"],
    "w_down_bias": ["blk.{0}.ffn_down.bias"],
    "final_norm": ["output_norm.weight"],
    "lm_head": ["output.weight"],
}
_NAMES = {"hf": _HUGGING_FACE, "gguf": _GGUF}
# Tensors without information: rotary frequencies, which follow from the config.
_HARMLESS_ENDS = (
    "rotary_emb.inv_freq",
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
)

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

        GGUF files of the llama architecture hold the rows of a head of q and k in pairs (i, i + head_dim / 2),
        as interleaved rotary embedding wants them (llama.cpp, convert_hf_to_gguf.py, permute).
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


def convert(
    source: str | Path,
    out: str | Path,
    *,
    quant: str | None = None,
    group_size: int | None = None,
    head_quant: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Convert a Hugging Face folder, hub id or GGUF file to the folder ``out``, and return its path.

    quant: type of the layers' matrices, "bf16", "fp16", "fp8", "int8" or "int4" ("fp32" as well); None
        keeps them as stored: bf16 and fp16 as they are, float32 as bf16 or fp16 where those hold all values
        (else bf16, or fp32 from GGUF), the GGUF types Q8_0, Q4_0 and Q4_1 without any loss, and others
        quantized again to int4 or int8.
    group_size: 32, 64 or 128; default 64 with int4, else the largest that divides every matrix's columns.
    head_quant: type of the embedding and output head; default int8 with int4 layers, else like the layers.
    overwrite: replace a converted model at ``out``, after success.
    progress: a progress bar on a stderr that is a terminal.
    report: takes each line of news (default: the logger "minflash").

    ``out`` appears only when it is complete. Raises ConvertError, ConfigError, CheckpointError,
    DownloadError, TokenizerError or ArgumentError.
    """
    wanted = Wanted(quant, group_size, head_quant)
    opened = open_source(source)
    try:
        return _Conversion(opened, Path(out), wanted, progress, report or logger.info).run(
            overwrite
        )
    finally:
        opened.close()


def open_source(source: str | Path) -> Source:
    """The checkpoint at a path or of a hub id. Raises ConvertError when there is nothing to convert."""
    path = Path(source).expanduser()
    if not path.exists():
        if path.suffix != ".gguf" and is_hub_id(str(source)):
            return HuggingFaceSource(fetch(str(source)))
        raise ConvertError(
            f"{source}: there is no such file or folder; give a Hugging Face folder, a hub id (owner/name) or a GGUF file"
        )
    if path.is_dir():
        return HuggingFaceSource(path)
    if path.suffix in PICKLES:
        raise ConvertError(pickle_message(path))
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise ConvertError(
            f"{path}: give the folder that holds it, together with config.json: {path.parent}"
        )
    return GGUFSource(path)


def plan_tensors(source: Source, config: ModelConfig) -> list[Target]:
    """All tensors of the weight file with their parts. ConvertError: the source has a gap or a leftover."""
    unused = {name for name in source.shapes if not name.endswith(_HARMLESS_ENDS)}
    targets = []
    for name, shape in expected_tensors(config).items():
        layer, kind = (name.split(".")[1], name.split(".")[2]) if "." in name else ("", name)
        names = [pattern.format(layer) for pattern in _NAMES[source.format][kind]]
        parts = tuple(map(Part, names, *_part_rows(kind, shape[0], config, source.rotated)))
        for part in parts:
            _check_part(source, part, shape[1:])
            unused.discard(part.name)
        targets.append(Target(name, shape, parts))
    if config.tied:  # some checkpoints store a tied head a second time
        unused -= set(_NAMES[source.format]["lm_head"])
    if unused:
        shown = ", ".join(sorted(unused)[:5])
        raise ConvertError(
            f"{source.path}: {len(unused)} tensors are left over, which {config.architecture} with this config "
            f"does not have: {shown}{', ...' if len(unused) > 5 else ''}"
        )
    return targets


def _part_rows(
    kind: str, rows: int, config: ModelConfig, rotated: bool
) -> tuple[list[int], list[int]]:
    """Of each part: its rows, and head_dim where it is permuted (else 0)."""
    if kind.startswith("wqkv"):
        head_dim = config.head_dim if rotated else 0
        return [config.q_dim, config.kv_dim, config.kv_dim], [head_dim, head_dim, 0]
    if kind.startswith("w_gate_up"):
        return [config.hidden_dim] * 2, [0, 0]
    return [rows], [0]


def _check_part(source: Source, part: Part, rest: tuple[int, ...]) -> None:
    if part.name not in source.shapes:
        raise ConvertError(f"{source.path}: tensor {part.name} is missing; its config asks for it")
    shape, expected = source.shapes[part.name], (part.rows, *rest)
    if shape != expected:
        raise ConvertError(
            f"{source.path}: tensor {part.name} has shape {shape}, but its config says {expected}"
        )
    if source.format == "hf" and source.kinds[part.name] not in ("fp32", "bf16", "fp16"):
        raise ConvertError(
            f"{source.path}: tensor {part.name} has dtype {source.kinds[part.name]}; F32, BF16 and F16 are supported. "
            "Convert the original, unquantized model instead"
        )


class _Conversion:
    """One run of ``convert``."""

    def __init__(
        self,
        source: Source,
        out: Path,
        wanted: Wanted,
        progress: bool,
        report: Callable[[str], None],
    ) -> None:
        self.source, self.out, self.report, self.progress = source, out, report, progress
        quantization = source.config.get("quantization_config")
        if isinstance(quantization, Mapping) and quantization.get("quant_method") == "minflash":
            raise ConvertError(
                f"{source.path}: is a converted model already; convert the original instead"
            )
        self.config = ModelConfig.from_hf(source.config, source=str(source.path))
        self.targets = plan_tensors(source, self.config)
        self.matrices = {target.name: target for target in self.targets if len(target.shape) == 2}
        group = wanted.default_group(target.shape[1] for target in self.matrices.values())
        self.choices = {
            name: self._choose(target, wanted, group) for name, target in self.matrices.items()
        }
        self.errors: dict[tuple[str, str], QuantizationError] = {}

    def run(self, overwrite: bool) -> Path:
        self._report_notes()
        files = self.source.files()
        vectors = {
            target.name: target.shape[0] for target in self.targets if len(target.shape) == 1
        }
        layouts = {
            name: self._layout(target.shape[0], name) for name, target in self.matrices.items()
        }
        with (
            CheckpointWriter(
                self.out, self.source.config, layouts, vectors, overwrite=overwrite
            ) as writer,
            ThreadPoolExecutor(_workers()) as pool,
            self._bar() as bar,
        ):
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

    def _layout(self, rows: int, name: str) -> Layout:
        choice = self.choices[name]
        return Layout(rows, self.matrices[name].shape[1], choice.type, choice.group_size)

    def _choose(self, target: Target, wanted: Wanted, group: int) -> Choice:
        def fits(type: str) -> bool:
            return all(fits_exactly(self._values(target, *rows), type) for rows in target.slices())

        kinds = [self.source.kinds[part.name] for part in target.parts]
        return choose(target.name, kinds, wanted, group, fits, self.source.format == "gguf")

    def _vector(self, target: Target) -> NDArray[np.float32]:
        values = self._values(target, 0, target.shape[0])
        if not np.isfinite(values).all():
            raise self._located(target, 0, target.shape[0], "a value is infinite or not a number")
        return np.ascontiguousarray(values, dtype=np.float32)

    def _values(self, target: Target, start: int, stop: int) -> NDArray[np.float32]:
        return target.rows(
            lambda part, low, high: self.source.values(part.name, low, high), start, stop
        )

    def _pieces(self, target: Target, pool: ThreadPoolExecutor, bar: Any) -> Iterator[Matrix]:
        """The matrix from the top, in pieces that the pool prepares a little ahead."""
        jobs = (partial(self._piece, target, start, stop) for start, stop in target.slices())
        for matrix, error in _ahead(pool, jobs, 2 * _workers()):
            key = (target.kind, self.choices[target.name].type)
            self.errors[key] = self.errors.get(key, QuantizationError()) + error
            yield matrix
            bar.update(matrix.layout.rows * matrix.layout.cols)

    def _piece(self, target: Target, start: int, stop: int) -> tuple[Matrix, QuantizationError]:
        choice = self.choices[target.name]
        try:
            if choice.exact:
                matrix = self._exact_piece(target, choice, start, stop)
                return matrix, QuantizationError()
            return quantize_measured(
                self._values(target, start, stop), choice.type, choice.group_size
            )
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
            raise ConvertError(
                "a value is infinite or not a number; the source checkpoint is damaged"
            )
        return matrix

    def _located(self, target: Target, start: int, stop: int, message: str) -> ConvertError:
        """The error with the names of the source's tensors: those with a damaged value, else all parts."""
        damaged = []
        for part in target.parts:
            values = self.source.values(part.name, 0, part.rows)
            if not np.isfinite(values).all():
                damaged.append(part.name)
        names = ", ".join(damaged or [part.name for part in target.parts])
        return ConvertError(
            f"{self.source.path}: tensor {names} (rows {start}..{stop} of {target.name}): {message}"
        )

    def _bar(self) -> Any:
        import sys

        from tqdm import tqdm

        total = sum(
            shape[0] * shape[1] for shape in (target.shape for target in self.matrices.values())
        )
        quiet = not self.progress or not sys.stderr.isatty()
        return tqdm(total=total, unit="w", unit_scale=True, desc="converting", disable=quiet)

    def _report_notes(self) -> None:
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
            self.report("every value was kept exactly" if self.errors else "")
            return
        self.report("relative RMS error    type  minflash  plain rounding")
        for (kind, type), error in lossy.items():
            self.report(
                f"  {kind:<18} {type:>5}  {error.relative:8.5f}  {error.relative_plain:8.5f}"
            )


def _finite(matrix: Matrix) -> bool:
    exponent = {"fp32": 0x7F800000, "bf16": 0x7F80, "fp16": 0x7C00}[matrix.layout.type]
    codes = matrix.codes
    return not bool(((codes & codes.dtype.type(exponent)) == exponent).any())


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
