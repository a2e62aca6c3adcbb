"""Saving what an LLM has read: token ids, keys and values, as a safetensors file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .arguments import as_path
from .cache_state import CacheLayout, CacheState
from .errors import ArgumentError, CheckpointError, MinflashError
from .safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from .engine import Engine

FORMAT, VERSION = "minflash-state", "2"  # 2: with a hash of the data
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_DTYPES = {"I64": np.int64, "F32": np.float32, "U8": np.uint8}


def fingerprint(paths: Iterable[Path]) -> str:
    """Tells models apart: a hash of the files' sizes and of samples spread over each of them."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for n in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * n // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def save(path: str | os.PathLike[str], engine: Engine, model: str) -> None:
    """Writes the sequence in the engine's cache. model: its fingerprint.

    Raises MinflashError when the file cannot be written; nothing is left then.
    """
    from safetensors.numpy import save_file

    goal = as_path("the path of a state", path)
    if os.path.isdir(goal):  # unlike Path.is_dir, False for a name that is too long
        raise ArgumentError(f"{goal}: is a folder; name a file in it for the state")
    state = engine.save_cache()
    tensors = {name: np.ascontiguousarray(value) for name, value in state.tensors.items()}
    tensors["ids"] = np.array(state.ids, np.int64)
    tensors["rope_keys"] = np.array(state.rope_keys, np.int64)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "layout": state.layout.name,
        "positions": str(len(state.ids)),
        "sha256": _digest(tensors),
    }
    part = goal.with_name(f".{goal.name}.{os.getpid()}.part")
    try:
        save_file(tensors, str(part), metadata)
        os.replace(part, goal)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, Exception):
            raise MinflashError(
                f"{goal}: the state cannot be written: {getattr(error, 'strerror', None) or error}"
            ) from error
        raise


def load(path: str | os.PathLike[str], engine: Engine, model: str) -> int:
    """Puts a saved sequence into the engine's cache; returns how many positions it has.

    Raises CheckpointError when the file is damaged, of another model or of another kind of engine,
    and ContextError when it is longer than the context.
    """
    with SafetensorsFile(as_path("the path of a state", path)) as file:
        _check_metadata(file, model)
        layout = engine.cache_layout
        if file.metadata.get("layout") != layout.name:
            raise CheckpointError(
                f"{file.path}: the state has layout {file.metadata.get('layout')!r}, and this "
                f"engine's is {layout.name!r}: it was saved on another kind of device; read the "
                "text again instead"
            )
        state = _state(file, layout, engine.config.vocab_size)
        engine.load_cache(state)
    return len(state.ids)


def _check_metadata(file: SafetensorsFile, model: str) -> None:
    found = file.metadata
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise CheckpointError(
            f"{file.path}: is not a state of version {VERSION} that LLM.save_state has written "
            f"(format {found.get('format')!r}, version {found.get('version')!r}); read the text "
            "again and save it again"
        )
    if found.get("model") != model:
        raise CheckpointError(
            f"{file.path}: the state was saved with another model (fingerprint "
            f"{str(found.get('model'))[:12]}, this one's is {model[:12]}); load that model"
        )


def _state(file: SafetensorsFile, layout: CacheLayout, vocab_size: int) -> CacheState:
    positions = file.tensors["ids"].shape[:1] if "ids" in file.tensors else ()
    if len(positions) != 1:
        raise CheckpointError(f"{file.path}: the tensor ids is missing")
    n = positions[0]
    expected = {"ids": ("I64", (n,)), "rope_keys": ("I64", (n,)), **layout.shapes(n)}
    found = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
    if found != expected:
        raise CheckpointError(
            f"{file.path}: the tensors are {found}, they must be {expected}; save the state again"
        )
    tensors = {name: _array(file, name) for name in expected}
    if _digest(tensors) != file.metadata.get("sha256"):
        raise CheckpointError(
            f"{file.path}: the state is damaged: its data do not have the SHA-256 that was saved "
            "with them; read the text again and save it again"
        )
    ids, rope_keys = tensors.pop("ids"), tensors.pop("rope_keys")
    if n and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise CheckpointError(f"{file.path}: ids must be from 0 to {vocab_size - 1}")
    return CacheState(layout, ids.tolist(), rope_keys.tolist(), tensors)


def _array(file: SafetensorsFile, name: str) -> NDArray[np.generic]:
    info = file.tensors[name]
    values = np.frombuffer(file.data(name).tobytes(), _DTYPES[info.dtype])
    array: NDArray[np.generic] = values.reshape(info.shape)
    return array


def _digest(tensors: Mapping[str, NDArray[np.generic]]) -> str:
    """SHA-256 of names and values; wrong keys would make wrong text without any other sign."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].data)
    return digest.hexdigest()
