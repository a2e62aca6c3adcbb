"""Writing a converted model: tensors stream into a folder that appears when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError, MinflashError
from .leftovers import hidden_names, lock_folder, remove_leftovers
from .packing import BLOCK_ROWS, LAYOUT_VERSION, Layout, Matrix, pack
from .safetensors_file import TensorInfo, header_bytes, read_json
from .tensors import (
    CONFIG_FILE,
    INDEX_FILE,
    QUANT_METHOD,
    SINGLE_FILE,
    file_order,
    matrix_problem,
    vector_problem,
)

_CHUNK_BYTES = 16 << 20  # of packed bytes, made and written in one go


class CheckpointWriter:
    """Writes a converted model beside ``path`` and renames it to ``path`` when it is complete.

    Every tensor is declared up front, because the header comes before the data: ``layouts``
    {name: Layout} of the matrices and ``vectors`` {name: length}. Then ``write_matrix`` and
    ``write_vector`` once for each of ``names``, in that order, ``copy_file`` for what goes along,
    and ``commit``. Leaving the ``with`` block without a commit, by an exception or not, removes
    everything.

    hf_config: the Hugging Face config.json; its quantization_config is replaced.
    shard_bytes: a weight file ends before the tensor that would make its data larger than this.
    overwrite: replace a converted model at ``path``, after success.

    Raises ConvertError when ``path`` is taken, a file cannot be written or a number is NaN or
    infinite; AssertionError when the calls do not keep to what was declared.
    """

    def __init__(
        self,
        path: str | Path,
        hf_config: Mapping[str, Any],
        layouts: Mapping[str, Layout],
        vectors: Mapping[str, int],
        *,
        shard_bytes: int = 5 * 10**9,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self._overwrite = overwrite
        remove_leftovers(self.path.parent)
        _check_goal(self.path, overwrite)
        quantization = {"quant_method": QUANT_METHOD, "layout_version": LAYOUT_VERSION}
        self._config = {**hf_config, "quantization_config": quantization}
        self._layouts, self._vectors = dict(layouts), dict(vectors)
        self.names = sorted([*layouts, *vectors], key=file_order)
        self._shards = self._plan_shards(shard_bytes)
        self._next = 0  # index into names
        self._file: BinaryIO | None = None
        self._temporary, self._replaced = hidden_names(self.path)
        self._lock: int | None = None  # of the temporary folder
        self._made_parents: list[Path] = []

    def write_matrix(self, name: str, matrix: Matrix | Iterable[Matrix]) -> None:
        """Writes one matrix, whole or as pieces from the top, each but the last of 16 n rows."""
        layout, rows = self._layouts[name], 0
        with self._writing(name) as file:
            for piece in [matrix] if isinstance(matrix, Matrix) else matrix:
                columns = (layout.cols, layout.type, layout.group_size)
                assert (piece.layout.cols, piece.layout.type, piece.layout.group_size) == columns, (
                    name,
                    piece.layout,
                )
                assert rows % BLOCK_ROWS == 0, f"{name}: a piece before the last ends at row {rows}"
                rows += piece.layout.rows
                for packed, part in _packed_parts(piece):
                    _refuse(name, matrix_problem(packed, part))
                    file.write(packed.data)
            assert rows == layout.rows, f"{name}: {rows} rows, {layout.rows} declared"

    def write_vector(self, name: str, values: NDArray[np.float32]) -> None:
        """Writes one norm or bias, float32 [n]."""
        with self._writing(name) as file:
            assert values.shape == (self._vectors[name],) and values.dtype == np.float32, (
                name,
                values.shape,
            )
            _refuse(name, vector_problem(values))
            file.write(np.ascontiguousarray(values, dtype="<f4").data)

    def copy_file(self, name: str, content: bytes | Path) -> None:
        """Puts a file beside the weights, for example tokenizer.json. name: a plain file name."""
        assert name == Path(name).name and not name.startswith("."), name
        assert name not in (CONFIG_FILE, INDEX_FILE) and not name.endswith(".safetensors"), name
        with self._guarded():
            data = content if isinstance(content, bytes) else content.read_bytes()
            self._write_file(name, data)

    def commit(self) -> Path:
        """Makes the model appear at ``path``, durably and whole. Returns ``path``, resolved."""
        assert self._next == len(self.names), f"{self.names[self._next :][:3]} were not written"
        with self._guarded():
            self._write_json(CONFIG_FILE, self._config)
            if len(self._shards) > 1:
                self._write_json(INDEX_FILE, self._index())
            _sync_folder(self._temporary)
            _check_goal(self.path, self._overwrite)  # others may have come in the meantime
            if self.path.exists() and any(self.path.iterdir()):
                self.path.rename(self._replaced)
            self._temporary.rename(self.path)
            _sync_folder(self.path.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)
        self._made_parents.clear()
        self._unlock()
        return self.path

    def abort(self) -> None:
        """Removes everything that was written; what stood at ``path`` stands there again."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk fails again when the buffer is flushed
                self._file.close()
            self._file = None
        if self._replaced.exists():
            if self.path.exists():
                shutil.rmtree(self._replaced, ignore_errors=True)
            else:
                self._replaced.rename(self.path)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._unlock()
        while self._made_parents:
            with contextlib.suppress(OSError):
                self._made_parents.pop().rmdir()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()  # finds nothing to remove after a commit

    def _plan_shards(self, shard_bytes: int) -> dict[str, list[str]]:
        """{file name: names of its tensors}, in order."""
        groups: list[list[str]] = []
        room = -1
        for name in self.names:
            room -= self._nbytes(name)
            if room < 0 or not groups:
                groups.append([])
                room = shard_bytes - self._nbytes(name)
            groups[-1].append(name)
        count = len(groups)
        if count <= 1:
            return {SINGLE_FILE: self.names}
        return {
            f"model-{i:05}-of-{count:05}.safetensors": group for i, group in enumerate(groups, 1)
        }

    def _nbytes(self, name: str) -> int:
        if name in self._vectors:
            return 4 * self._vectors[name]
        row_blocks, row_block_bytes = self._layouts[name].shape
        return row_blocks * row_block_bytes

    def _header(self, names: list[str]) -> bytes:
        tensors, position = {}, 0
        for name in names:
            dtype = "F32" if name in self._vectors else "U8"
            shape = (self._vectors[name],) if name in self._vectors else self._layouts[name].shape
            tensors[name] = TensorInfo(dtype, shape, position, position + self._nbytes(name))
            position = tensors[name].end
        matrices = {name: asdict(self._layouts[name]) for name in names if name in self._layouts}
        metadata = {
            "format": QUANT_METHOD,
            "layout_version": str(LAYOUT_VERSION),
            "producer": f"minflash {_version()}",
            "matrices": json.dumps(matrices, separators=(",", ":")),
        }
        return header_bytes(tensors, metadata)

    def _index(self) -> dict[str, Any]:
        total = sum(map(self._nbytes, self.names))
        weight_map = {name: file for file, names in self._shards.items() for name in names}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[BinaryIO]:
        """The file for ``name``: opened if it is the file's first tensor, closed after its last."""
        assert self._next < len(self.names), f"{name}: all tensors are written"
        assert name == self.names[self._next], (
            f"{name} is written, {self.names[self._next]} is next"
        )
        shard, names = next(item for item in self._shards.items() if name in item[1])
        with self._guarded():
            if name == names[0]:
                self._file = open_new(self._temporary / shard)
                self._file.write(self._header(names))
            assert self._file is not None
            yield self._file
            self._next += 1
            if name == names[-1]:
                file, self._file = self._file, None
                _finish(file)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Makes the temporary folder; turns an OSError into a ConvertError that leaves nothing."""
        try:
            self._make_folder()
            yield
        except OSError as error:
            self.abort()
            reason = error.strerror or str(error)
            raise ConvertError(
                f"{self.path}: the model cannot be written: {reason}; nothing was left there."
                " Make room or choose another folder"
            ) from error

    def _make_folder(self) -> None:
        if self._temporary.exists():
            return
        assert self._next == 0, "the writer was aborted or committed"
        for parent in reversed(self.path.parents):
            if not parent.exists():
                parent.mkdir()
                self._made_parents.append(parent)
        self._temporary.mkdir()
        self._lock = lock_folder(self._temporary)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self._write_file(name, json.dumps(value, indent=2).encode() + b"\n")

    def _write_file(self, name: str, data: bytes) -> None:
        with open_new(self._temporary / name) as file:
            file.write(data)
            _finish(file)


def open_new(path: Path) -> BinaryIO:
    """Every file of a model is opened here: the tests put a full disk in its place."""
    return path.open("xb")


def _version() -> str:
    from . import __version__

    return __version__


def _check_goal(path: Path, overwrite: bool) -> None:
    """Raises ConvertError when ``path`` may not become the model's folder."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ConvertError(f"{path}: is a file; choose the name of a new folder")
    try:
        if not any(path.iterdir()):
            return
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror}") from error
    if not overwrite:
        raise ConvertError(f"{path}: exists already; choose another folder or allow overwriting it")
    if not _is_model(path):  # never delete a folder that someone named by mistake
        raise ConvertError(
            f"{path}: is not a converted model, and only such a folder is overwritten;"
            " choose another folder"
        )


def _is_model(path: Path) -> bool:
    try:
        quantization = read_json(path / CONFIG_FILE).get("quantization_config")
    except MinflashError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _packed_parts(matrix: Matrix) -> Iterator[tuple[NDArray[np.uint8], Layout]]:
    """The packed bytes of a matrix, some row blocks at a time, so that memory stays small."""
    layout = matrix.layout
    step = BLOCK_ROWS * max(1, _CHUNK_BYTES // layout.row_block_bytes)
    for start in range(0, layout.rows, step):
        rows = slice(start, min(start + step, layout.rows))
        part = Layout(rows.stop - start, layout.cols, layout.type, layout.group_size)
        scales = None if matrix.scales is None else matrix.scales[rows]
        biases = None if matrix.biases is None else matrix.biases[rows]
        yield pack(Matrix(part, matrix.codes[rows], scales, biases)), part


def _refuse(name: str, problem: str | None) -> None:
    if problem:
        raise ConvertError(f"tensor {name!r}: {problem}; such a model cannot be converted")


def _finish(file: BinaryIO) -> None:
    """Closes a file whose bytes are then on the disk."""
    try:
        file.flush()
        os.fsync(file.fileno())
    finally:
        file.close()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
