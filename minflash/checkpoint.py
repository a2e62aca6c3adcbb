"""The weight file of minflash: which tensors a model has, and a reader that checks all of it.

docs/format.md describes the folder. Whatever is wrong with it is a CheckpointError (or a
ConfigError for config.json) that names the file, the tensor and the rule. Opening looks at headers
only; the scales of a matrix are checked when it is first read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint_writer import CheckpointWriter
from .config import ModelConfig
from .errors import CheckpointError, ConfigError
from .packing import LAYOUT_VERSION, TYPES, Layout, Matrix, unpack
from .safetensors_file import (
    SafetensorsFile,
    SafetensorsHeader,
    TensorInfo,
    is_count,
    parse_json,
    read_json,
    read_safetensors_header,
    short,
)
from .tensors import (
    CONFIG_FILE,
    INDEX_FILE,
    QUANT_METHOD,
    SINGLE_FILE,
    expected_tensors,
    file_order,
    matrix_problem,
    vector_problem,
)

__all__ = [
    "Checkpoint", "CheckpointWriter", "SafetensorsFile", "SafetensorsHeader", "TensorInfo",
    "expected_tensors", "file_order", "open_checkpoint", "read_json", "read_safetensors_header",
]  # fmt: skip

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


class Checkpoint:
    """A converted model, memory-mapped. Made by ``open_checkpoint``.

    Attributes: path, config, hf_config (config.json as a dict), matrices {name: Layout}, names (all
    tensors in file order), nbytes (of all tensors).
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        hf_config: dict[str, Any],
        files: list[SafetensorsFile],
    ) -> None:
        self.path, self.config, self.hf_config = path, config, hf_config
        self._files = {name: file for file in files for name in file.tensors}
        self.names = list(self._files)
        self.matrices: dict[str, Layout] = {}
        for file in files:
            self.matrices.update(_layouts(file))
        self._checked: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(file.tensors[name].nbytes for name, file in self._files.items())

    def matrix(self, name: str) -> Matrix:
        """One matrix in row-major order, copied out of the file. Raises CheckpointError."""
        data = self.raw(name)
        if name not in self.matrices:
            raise CheckpointError(f"{self.path}: tensor {short(name)} is a vector, not a matrix")
        return unpack(data, self.matrices[name])

    def vector(self, name: str) -> NDArray[np.float32]:
        """One norm or bias, a float32 [n] copy. Raises CheckpointError."""
        data = self.raw(name)
        if name in self.matrices:
            raise CheckpointError(f"{self.path}: tensor {short(name)} is a matrix, not a vector")
        return data.view("<f4").astype(np.float32)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a matrix, uint8 [row_blocks, row_block_bytes], or of a vector, [4 n].

        A read-only view of the file. Numbers are checked at the first call. Raises CheckpointError.
        """
        if name not in self._files:
            raise CheckpointError(f"{self.path}: there is no tensor {short(name)}")
        file, layout = self._files[name], self.matrices.get(name)
        data = file.data(name)
        data = data if layout is None else data.reshape(layout.shape)
        if name not in self._checked:
            problem = (
                vector_problem(data.view("<f4")) if layout is None else matrix_problem(data, layout)
            )
            if problem:
                raise CheckpointError(
                    f"{file.path}: tensor {short(name)}: {problem}; convert the model again"
                )
            self._checked.add(name)
        return data

    def close(self) -> None:
        """Lets go of the files; views given out before stay valid."""
        for file in set(self._files.values()):
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens the converted model in the folder ``path``.

    Raises CheckpointError (ConfigError for config.json), which names the file, the tensor and rule.
    """
    path = Path(path)
    _check_folder(path)
    hf_config = read_json(path / CONFIG_FILE, ConfigError)
    _check_quantization_config(hf_config.get("quantization_config"), path)
    config = ModelConfig.from_hf(hf_config, source=str(path / CONFIG_FILE))
    files = _open_files(path)
    try:
        checkpoint = Checkpoint(path, config, hf_config, files)
        _check_tensors(checkpoint, files)
    except BaseException:
        for file in files:
            file.close()
        raise
    return checkpoint


def _check_folder(path: Path) -> None:
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not is_folder:
        found = "is a file" if exists else "does not exist"
        raise CheckpointError(
            f"{path}: {found}; a converted model is a folder, as `minflash convert` writes it"
        )


def _check_quantization_config(value: object, path: Path) -> None:
    where = path / CONFIG_FILE
    if not isinstance(value, dict) or value.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{where}: quantization_config does not say quant_method {QUANT_METHOD!r}:"
            f" this model is not converted; run `minflash convert {path} -o OUT`"
        )
    _check_version(value.get("layout_version"), where)


def _check_version(version: object, where: Path) -> None:
    if not is_count(version):
        raise CheckpointError(f"{where}: layout_version must be an integer, found {short(version)}")
    assert isinstance(version, int)
    if version > LAYOUT_VERSION:
        raise CheckpointError(
            f"{where}: layout version {short(version)} is newer than {LAYOUT_VERSION}, the one this"
            " minflash reads; update minflash (pip install -U minflash)"
        )
    if version < LAYOUT_VERSION:
        raise CheckpointError(
            f"{where}: layout version {version} is older than {LAYOUT_VERSION}, the one this"
            " minflash reads; convert the model again from its source"
        )


def _open_files(path: Path) -> list[SafetensorsFile]:
    """The weight files in order, with the promises of the index kept."""
    if not (path / INDEX_FILE).exists():
        files = [SafetensorsFile(path / SINGLE_FILE)]
    elif (path / SINGLE_FILE).exists():
        raise CheckpointError(
            f"{path}: holds both {SINGLE_FILE} and {INDEX_FILE}; only one may be there"
        )
    else:
        weight_map = _weight_map(path / INDEX_FILE)
        files = [SafetensorsFile(path / name) for name in sorted(set(weight_map.values()))]
        _check_index(weight_map, files, path / INDEX_FILE)
    for file in files:
        _check_file_metadata(file)
    return files


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map must map tensors to files, found {short(weight_map)}"
        )
    for name, file in weight_map.items():
        # A file name with a slash or ".." could reach any file of the machine.
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{index}: tensor {short(name)}: {short(file)} is not the plain name"
                " of a .safetensors file in this folder"
            )
    return weight_map


def _check_index(weight_map: Mapping[str, str], files: list[SafetensorsFile], index: Path) -> None:
    owner: dict[str, str] = {}
    for file in files:
        for name in file.tensors:
            if name in owner:
                raise CheckpointError(
                    f"{file.path}: tensor {short(name)} is repeated, {owner[name]} holds it already"
                )
            if weight_map.get(name) != file.path.name:
                said = short(weight_map[name]) if name in weight_map else "nowhere"
                raise CheckpointError(
                    f"{file.path}: tensor {short(name)} lies here, the index puts it {said}"
                )
            owner[name] = file.path.name
    for name, said in weight_map.items():
        if name not in owner:
            raise CheckpointError(f"{index}: tensor {short(name)} is missing in {said}")


def _check_file_metadata(file: SafetensorsFile) -> None:
    found = file.metadata.get("format")
    if found != QUANT_METHOD:
        raise CheckpointError(
            f"{file.path}: metadata format must be {QUANT_METHOD!r}, found {short(found)};"
            " convert the model"
        )
    version = file.metadata.get("layout_version", "")
    _check_version(int(version) if re.fullmatch("[0-9]{1,9}", version) else version, file.path)


def _layouts(file: SafetensorsFile) -> dict[str, Layout]:
    """The layouts that the metadata of one file declares, compared with its tensors."""
    what = f"{file.path}: metadata entry 'matrices'"
    declared = parse_json(
        file.metadata.get("matrices", "null").encode("utf-8", "surrogatepass"), what
    )
    layouts = {name: _layout(name, entry, file) for name, entry in declared.items()}
    for name, info in file.tensors.items():
        layout = layouts.get(name)
        dtype, shape = ("F32", info.shape[:1]) if layout is None else ("U8", layout.shape)
        if info.dtype != dtype:
            kind = "vector (not in 'matrices')" if layout is None else f"{layout.type} matrix"
            raise CheckpointError(
                f"{file.path}: tensor {short(name)}: a {kind} has dtype {dtype}, found {info.dtype}"
            )
        if info.shape != shape or not shape:
            raise CheckpointError(
                f"{file.path}: tensor {short(name)}: the shape must be {short(shape)},"
                f" found {short(info.shape)}"
            )
    return layouts


def _layout(name: str, entry: object, file: SafetensorsFile) -> Layout:
    where = f"{file.path}: tensor {short(name)}"
    if name not in file.tensors:
        raise CheckpointError(f"{where}: declared in 'matrices' but missing in the file")
    if not isinstance(entry, dict) or entry.keys() != {"rows", "cols", "type", "group_size"}:
        raise CheckpointError(
            f"{where}: 'matrices' must give rows, cols, type and group_size, found {short(entry)}"
        )
    if not all(is_count(entry[key]) for key in ("rows", "cols", "group_size")):
        raise CheckpointError(
            f"{where}: rows, cols and group_size must be integers >= 0, found {short(entry)}"
        )
    if not isinstance(entry["type"], str) or entry["type"] not in TYPES:
        raise CheckpointError(
            f"{where}: type {short(entry['type'])} is not one of {', '.join(TYPES)}"
        )
    try:
        return Layout(**entry)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_tensors(checkpoint: Checkpoint, files: list[SafetensorsFile]) -> None:
    """Names, shapes and order are those that config.json implies; no gaps and no leftovers."""
    path, config, names = checkpoint.path, checkpoint.config, checkpoint.names
    if config.n_layers > len(names):  # before a list of that length is made
        raise CheckpointError(
            f"{path}: config.json gives {config.n_layers} layers,"
            f" the files hold {len(names)} tensors"
        )
    expected = expected_tensors(config)
    present = set(names)
    for name in expected:
        if name not in present:
            raise CheckpointError(
                f"{_where(files)}: tensor {short(name)} is missing; config.json asks for it"
            )
    for file in files:
        for name in file.tensors:
            if name not in expected:
                raise CheckpointError(
                    f"{file.path}: tensor {short(name)} is left over; config.json has no use for it"
                )
            _check_shape(file, name, checkpoint.matrices.get(name), expected[name])
    for found, name in zip(names, expected, strict=True):
        if found != name:
            raise CheckpointError(
                f"{_where(files)}: tensor {short(found)} stands where {short(name)} belongs"
            )


def _where(files: list[SafetensorsFile]) -> Path:
    return files[0].path if len(files) == 1 else files[0].path.parent


def _check_shape(
    file: SafetensorsFile, name: str, layout: Layout | None, expected: tuple[int, ...]
) -> None:
    found = file.tensors[name].shape if layout is None else (layout.rows, layout.cols)
    if found != expected:
        raise CheckpointError(
            f"{file.path}: tensor {short(name)}: config.json implies shape {list(expected)},"
            f" found {short(list(found))}"
        )
