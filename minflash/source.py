"""A foreign checkpoint as the converter sees it: a config, and tensors read in ranges of rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError
from .gguf import LOSSLESS_TYPES, GGUFFile, hf_config
from .packing import Matrix

# ggml's types that are imported without loss -> kind. int4s is int4 whose bias is -8 scale.
_GGUF_KINDS = {
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "Q8_0": "int8",
    "Q4_0": "int4s",
    "Q4_1": "int4",
}
FLOAT_KINDS = ("fp32", "bf16", "fp16")
GROUPED_KINDS = ("int8", "int4", "int4s")  # in groups of 32


class Source(Protocol):
    """An opened checkpoint. Errors are minflash.errors that name the file and the tensor."""

    path: Path
    config: dict[str, Any]  # a Hugging Face config.json
    format: str  # "hf" or "gguf": whose tensor names
    rotated: bool  # rows of q and k are permuted for interleaved rotary embedding
    kinds: dict[str, str]  # tensor -> one of FLOAT_KINDS, GROUPED_KINDS, or the foreign type's name
    shapes: dict[str, tuple[int, ...]]

    def matrix(self, name: str, start: int, stop: int) -> Matrix:
        """Rows start..stop as stored, for FLOAT_KINDS and GROUPED_KINDS."""
        ...

    def values(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of a matrix, or elements of a vector, of any kind as float32."""
        ...

    def files(self) -> dict[str, bytes | Path]:
        """The tokenizer and its companions, by the name they have in a Hugging Face folder."""
        ...

    def close(self) -> None: ...


class GGUFSource:
    """A GGUF file."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self.config = hf_config(self._file)
        self.rotated = self._file.metadata.get("general.architecture") == "llama"
        tensors = self._file.tensors
        self.kinds = {
            name: _GGUF_KINDS.get(tensor.type, tensor.type) for name, tensor in tensors.items()
        }
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        assert set(_GGUF_KINDS) == set(LOSSLESS_TYPES)

    def matrix(self, name: str, start: int, stop: int) -> Matrix:
        return self._rows(name, start, stop).matrix(name)

    def values(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        if len(self.shapes[name]) == 1:
            return self._file.values(name)[start:stop]
        return self._rows(name, start, stop).values(name)

    def files(self) -> dict[str, bytes | Path]:
        from .gguf_tokenizer import tokenizer_files

        if "tokenizer.ggml.tokens" not in self._file.metadata:
            return {}
        return dict(tokenizer_files(self._file))

    def close(self) -> None:
        self._file.close()

    def _rows(self, name: str, start: int, stop: int) -> GGUFFile:
        """The same file with one tensor, cut to rows start..stop (rows are contiguous in GGUF)."""
        tensor = self._file.tensors[name]
        rows = tensor.shape[0]
        if not 0 <= start < stop <= rows:
            raise CheckpointError(
                f"{self.path}: tensor {name} has no rows {start}..{stop}, only {rows}"
            )
        row_bytes = tensor.nbytes // rows
        view = copy.copy(self._file)
        view.tensors = {
            name: replace(
                tensor,
                shape=(stop - start, *tensor.shape[1:]),
                offset=tensor.offset + start * row_bytes,
                nbytes=(stop - start) * row_bytes,
            )
        }
        return view
