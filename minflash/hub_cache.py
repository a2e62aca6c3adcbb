"""The models in the cache of huggingface_hub, found by its layout: no package, no network.

A repository "owner/name" is the folder models--owner--name; refs/main names the commit that counts,
and snapshots/COMMIT holds links to the files. It is described in the documentation of
huggingface_hub, "Understand caching".
"""

from __future__ import annotations

import os
from pathlib import Path

from .cache import CachedModel
from .config import ModelConfig
from .errors import ConfigError, MinflashError
from .huggingface import HuggingFaceSource, is_hub_id

_PREFIX = "models--"


def hub_dir() -> Path:
    """HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else in ~/.cache."""
    if chosen := os.environ.get("HF_HUB_CACHE"):
        return _expanded(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    return _expanded(home) / "hub"


def _expanded(path: str) -> Path:
    """Where no home folder is known, ``~`` stays: nothing lies there."""
    return Path(os.path.expanduser(os.path.expandvars(path)))


def hub_models() -> list[CachedModel]:
    """The complete models, by name: with a config.json and all safetensors. Reads headers alone.

    What this user may not read is passed over: the cache may be shared with others.
    """
    try:
        folders = sorted(hub_dir().glob(f"{_PREFIX}*--*"))
    except OSError:
        return []
    found = map(_hub_model, folders)
    return [model for model in found if model is not None]


def hub_snapshot(name: str) -> Path | None:
    """The folder with the files of the repository ``name``, or None when it is not here."""
    if not is_hub_id(name):
        return None
    folder = hub_dir() / (_PREFIX + name.replace("/", "--"))
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    # Unlike Path.is_file, False for what may not be read and for a name that is too long.
    return snapshot if os.path.isfile(snapshot / "config.json") else None


def _hub_model(folder: Path) -> CachedModel | None:
    name = folder.name.removeprefix(_PREFIX).replace("--", "/", 1)
    snapshot = hub_snapshot(name)
    if snapshot is None:
        return None
    try:
        source = HuggingFaceSource(snapshot)  # checks that all files are there
        source.close()
        nbytes = sum(file.stat().st_size for file in snapshot.iterdir() if file.is_file())
    except (MinflashError, OSError):
        return None
    matrices = {kind for tensor, kind in source.kinds.items() if len(source.shapes[tensor]) == 2}
    return CachedModel(
        name, snapshot, nbytes, tuple(sorted(matrices)), "huggingface", _supported(source)
    )


def _supported(source: HuggingFaceSource) -> bool:
    try:
        ModelConfig.from_hf(source.config)
    except ConfigError:
        return False
    return True
