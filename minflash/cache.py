"""The cache folder: converted models, and the lock that lets two processes share it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import MinflashError


@dataclass(frozen=True)
class CachedModel:
    """One model of minflash's cache, or of the Hugging Face hub's."""

    name: str  # as load takes it
    path: Path
    nbytes: int  # of all files of its folder
    types: tuple[str, ...]  # types of its matrices, sorted: ("int4", "int8")
    cache: str = "minflash"  # or "huggingface"
    supported: bool = True  # False: no architecture of minflash's


def cache_dir() -> Path:
    """MINFLASH_CACHE_DIR, else XDG_CACHE_HOME/minflash, else ~/.cache/minflash.

    Raises MinflashError when that is below a home folder and none is known, as in a container that
    runs under a number without an account.
    """
    chosen = os.environ.get("MINFLASH_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not chosen:
        # The XDG specification says that a relative path is to be ignored.
        chosen = f"{base if base.startswith('/') else '~/.cache'}/minflash"
    try:
        return Path(chosen).expanduser().absolute()
    except RuntimeError:
        raise MinflashError(
            f"the cache folder {chosen} begins with a home folder that is not known; "
            "set MINFLASH_CACHE_DIR to the whole path of a folder that can be written"
        ) from None


def models_dir() -> Path:
    """The folder of converted models, made when it is missing. Raises MinflashError."""
    return _made(cache_dir() / "models")


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MinflashError(
            f"the cache folder {folder} cannot be made: {error.strerror}; "
            "set MINFLASH_CACHE_DIR to a folder that can be written"
        ) from error
    return folder


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on ``path`` (made when missing); waits while another process has it.

    The system lets go of the lock when the process ends, however it ends. Raises MinflashError when
    the file cannot be opened.
    """
    _made(path.parent)
    try:
        handle = path.open("a")
    except OSError as error:
        raise MinflashError(
            f"the lock file {path} cannot be opened: {error.strerror}; "
            "set MINFLASH_CACHE_DIR to a folder that can be written"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cached_models() -> list[CachedModel]:
    """The complete models of the cache, by name. Folders that are not models are passed over."""
    folder = cache_dir() / "models"
    if not folder.is_dir():
        return []
    found = (_cached_model(path) for path in sorted(folder.iterdir()) if path.is_dir())
    return [model for model in found if model is not None]


def cached_model(name: str) -> Path | None:
    """The folder of the model that ``cached_models`` calls ``name``, or None."""
    if Path(name).name != name or not (model := _cached_model(cache_dir() / "models" / name)):
        return None
    return model.path


def _cached_model(path: Path) -> CachedModel | None:
    """The model in ``path``, or None. Reads the headers alone, so that a listing is quick."""
    if path.name.startswith(".") or not os.path.isfile(path / "config.json"):
        return None
    try:
        files = [file for file in path.iterdir() if file.is_file()]
        nbytes = sum(file.stat().st_size for file in files)
        types = {kind for file in files if file.suffix == ".safetensors" for kind in _types(file)}
    except (OSError, ValueError, AttributeError):
        return None
    return CachedModel(path.name, path, nbytes, tuple(sorted(types))) if types else None


def _types(file: Path) -> set[str]:
    """The matrix types that the header of one weight file declares."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("the header is longer than the file")
        header = json.loads(handle.read(length))
    matrices = json.loads(header.get("__metadata__", {}).get("matrices", "{}"))
    return {str(layout["type"]) for layout in matrices.values()}
