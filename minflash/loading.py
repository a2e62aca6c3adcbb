"""Loading: from what a user names (a folder, a file, a hub id, nothing) to an LLM."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .arguments import as_path, check_load, unknown_load_argument
from .errors import ArgumentError, CheckpointError, ConfigError, MinflashError
from .llm import LLM
from .notice import say_once
from .packing import LAYOUT_VERSION
from .sampling import Sampling
from .states import fingerprint

_GGUF_MAGIC = b"GGUF"
_SOURCE_FILES = ("*.safetensors", "*.json", "*.jinja")  # what a conversion reads of a folder

_LOAD_ARGUMENTS = ("device", "quantize", "group_size", "max_context", "progress")


def load(
    path_or_repo: str | os.PathLike[str] | None = None,
    *,
    device: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    max_context: int | None = None,
    progress: bool = True,
    **unknown: object,
) -> LLM:
    """Loads a model; what is not in minflash's format yet is converted into the cache first.

    ``path_or_repo``: a converted folder, a Hugging Face folder or hub id, a GGUF file, a name that
    ``minflash list`` prints, or None for the environment's MINFLASH_MODEL, else the default model
    (fetched at the first call).
    ``device``: "cuda", "cpu", or None for MINFLASH_DEVICE, else cuda if usable, else cpu with a
    notice. ``quantize`` and ``group_size``: as in ``convert``, default: keep as stored.
    ``max_context``: positions, default: the model's own, bounded by free memory.
    ``progress``: progress bars on stderr for long work.

    Raises a MinflashError: CheckpointError, ConfigError, ConvertError, DownloadError, DeviceError,
    TokenizerError, ContextError or ArgumentError.
    """
    for name in unknown:
        raise ArgumentError(unknown_load_argument(name, _LOAD_ARGUMENTS))
    check_load(quantize, group_size, max_context, progress)
    folder = model_folder(path_or_repo, quantize=quantize, group_size=group_size, progress=progress)
    return _open(folder, device, max_context, progress)


def _open(folder: Path, device: str | None, max_context: int | None, progress: bool) -> LLM:
    from .checkpoint import open_checkpoint
    from .engine import open_engine

    defaults, eos_token_ids = generation_defaults(folder)
    with open_checkpoint(folder) as checkpoint:
        tokenizer = None
        if (folder / "tokenizer.json").is_file():
            from .tokenizer import Tokenizer

            tokenizer = Tokenizer.load(folder, checkpoint.config.vocab_size)
        engine = open_engine(checkpoint, device, max_context, progress=progress)
    return LLM(
        engine,
        tokenizer,
        path=folder,
        defaults=defaults,
        eos_token_ids=eos_token_ids,
        fingerprint=fingerprint(folder.glob("*.safetensors")),
    )


def model_folder(
    source: str | os.PathLike[str] | None,
    *,
    quantize: str | None = None,
    group_size: int | None = None,
    progress: bool = True,
) -> Path:
    """The converted folder of ``source``, made in the cache when it is not one already.

    ``source``: as ``load`` takes it. A path that is there comes before a name of the cache, and
    that before a hub id. Without ``quantize`` weights stay as they are stored.
    """
    source = source if source is not None else os.environ.get("MINFLASH_MODEL") or None
    if source is None:
        from .default_model import default_model

        _refuse_quantize("the default model", quantize, group_size)
        return default_model(progress=progress)
    options = {"quant": quantize, "group_size": group_size}
    from .cache import cached_model
    from .huggingface import is_hub_id

    path = as_path("a model", source)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        if _is_converted(path):
            _refuse_quantize(str(path), quantize, group_size)
            return path
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: holds no config.json, so that it is not a model's folder"
            )
        return _converted(str(path), path.resolve().name, _folder_identity(path), options, progress)
    if os.path.exists(path):
        _check_gguf(path)
        return _converted(str(path), path.stem, _file_identity(path), options, progress)
    if isinstance(source, str) and (named := cached_model(source)) is not None:
        _refuse_quantize(source, quantize, group_size)
        return named
    if isinstance(source, str) and is_hub_id(source):
        # Fetched once: remove the conversion from the cache to fetch a newer revision.
        return _converted(source, source.replace("/", "--"), source, options, progress)
    raise CheckpointError(
        f"{path}: there is no such file or folder, and it is not a hub id (owner/name); a model "
        "is a converted folder, a Hugging Face folder, a GGUF file or a name of minflash list"
    )


def generation_defaults(folder: Path) -> tuple[Sampling, frozenset[int]]:
    """Sampling and end-of-text tokens of a folder's generation_config.json; greedy without one.

    Its sampling values count when ``do_sample`` is true (temperature 1 then, unless it says more),
    its ``repetition_penalty`` always.
    Raises ConfigError when the file is not usable.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return Sampling(), frozenset()
    values = _read_json(path)
    eos = values.get("eos_token_id")
    eos_list = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in eos_list):
        raise ConfigError(
            f"{path}: eos_token_id must be a token id or a list of them, found {eos!r}"
        )
    chosen: dict[str, Any] = {"temperature": 1.0} if values.get("do_sample") else {}
    names = ("temperature", "top_k", "top_p", "min_p") if values.get("do_sample") else ()
    for name in (*names, "repetition_penalty"):
        if values.get(name) is not None:
            chosen[name] = values[name]
    try:
        return Sampling(**chosen), frozenset(eos_list)
    except ArgumentError as error:
        raise ConfigError(f"{path}: {error}") from error


def _converted(
    source: str, name: str, identity: object, options: dict[str, Any], progress: bool
) -> Path:
    """The conversion of ``source`` in the cache, made once however many processes ask for it."""
    from . import cache
    from .convert import convert

    facts = json.dumps([identity, options, LAYOUT_VERSION], sort_keys=True)
    key = hashlib.sha256(facts.encode()).hexdigest()[:12]
    quant = "-".join(str(value) for value in options.values() if value is not None)
    folder = cache.models_dir() / "-".join(filter(None, (name, quant, key)))
    if _is_converted(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with cache.file_lock(folder.with_name(folder.name + ".lock")):
        if not _is_converted(folder):
            if progress:
                say_once(f"converting {source} into {folder}, once")
            convert(source, folder, progress=progress, **options)
    return folder


def _is_converted(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    quantization = _read_json(path).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "minflash"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must be a JSON object, found {type(value).__name__}")
    return value


def _refuse_quantize(what: str, quantize: str | None, group_size: int | None) -> None:
    if quantize is not None or group_size is not None:
        raise ArgumentError(
            f"{what} is already converted, so that quantize={quantize!r} and "
            f"group_size={group_size} cannot apply; leave them out, or name the original model"
        )


def _check_gguf(path: Path) -> None:
    if path.is_file():
        try:
            with path.open("rb") as file:
                if file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC:
                    return
        except OSError as error:
            raise MinflashError(f"{path}: cannot be read: {error.strerror}") from error
    hint = "name the folder that holds it" if path.suffix in (".safetensors", ".json") else ""
    raise CheckpointError(
        f"{path}: is not a GGUF file (it does not begin with GGUF); "
        + (hint or "a model is a converted folder, a Hugging Face folder or a GGUF file")
    )


def _folder_identity(folder: Path) -> list[object]:
    found = {path for pattern in _SOURCE_FILES for path in folder.glob(pattern)}
    return [str(folder.resolve()), *(_file_identity(path) for path in sorted(found))]


def _file_identity(path: Path) -> list[object]:
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]
