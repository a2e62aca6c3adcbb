"""Reading a Hugging Face model folder, config.json and safetensors, and fetching one from the hub.

Only safetensors are read. PyTorch's own files (.bin, .pt, .pth) are pickles, which run code when
they are loaded; they are refused.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError, ConfigError, ConvertError, DownloadError
from .numeric import bf16_to_fp32
from .packing import Layout, Matrix
from .safetensors_file import read_json, read_safetensors_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_KINDS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype("<u4"),
    "bf16": np.dtype("<u2"),
    "fp16": np.dtype("<u2"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def is_hub_id(text: str) -> bool:
    """Whether text has the form of a hub id, "owner/name"."""
    return _HUB_ID.fullmatch(text) is not None


def fetch(repo_id: str) -> Path:
    """The folder with a hub model's config, tokenizer and safetensors, fetched at the first call.

    huggingface_hub keeps it in its own cache; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE count.
    Raises DownloadError.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DownloadError(
            f"{repo_id}: fetching needs the package huggingface_hub (pip install huggingface_hub); "
            "or give the path of a local folder"
        ) from error
    patterns = ["config.json", "model*.safetensors", INDEX, *COMPANIONS]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (
        Exception
    ) as error:  # huggingface_hub, its HTTP library and the system all have their own
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        cause = (
            "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {_first_line(error)}"
        )
        raise DownloadError(
            f"{repo_id}: there is no such file or folder, and it could not be fetched from the "
            f"Hugging Face Hub ({cause}). Check the name and the network (HF_TOKEN for a gated "
            "model), or download the model elsewhere and give the path of its folder"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


class HuggingFaceSource:
    """A folder with config.json and one or several safetensors files. See ``source.Source``.

    Files are read, not mapped: mapped pages would count as this process's memory.
    """

    format = "hf"
    rotated = False

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise ConvertError(f"{path}: is not a folder with config.json and {SINGLE}")
        if not (path / "config.json").exists():
            raise ConvertError(
                f"{path}: there is no config.json; is this the folder of a Hugging Face model?"
            )
        self.config: dict[str, Any] = read_json(path / "config.json", ConfigError)
        self.kinds: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._handles: dict[Path, int] = {}
        try:
            expected = _weight_files(path)
            for file in sorted(set(expected.values())) if expected else [_single_file(path)]:
                self._add(path / file)
            self._check_index(expected)
        except OSError as error:
            self.close()
            raise ConvertError(f"{path}: cannot be read: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def matrix(self, name: str, start: int, stop: int) -> Matrix:
        kind, (_, cols) = self.kinds[name], self.shapes[name]
        codes = self._read(name, start, stop, cols).reshape(stop - start, cols)
        return Matrix(Layout(stop - start, cols, kind), codes)

    def values(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        shape = self.shapes[name][1:]
        codes = self._read(name, start, stop, int(np.prod(shape))).reshape(stop - start, *shape)
        if self.kinds[name] == "bf16":
            return bf16_to_fp32(codes)
        return (
            codes.view("<f4")
            if self.kinds[name] == "fp32"
            else codes.view("<f2").astype(np.float32)
        )

    def files(self) -> dict[str, bytes | Path]:
        return {name: self.path / name for name in COMPANIONS if (self.path / name).is_file()}

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _add(self, file: Path) -> None:
        header = read_safetensors_header(file)
        for name, info in header.tensors.items():
            if name in self.kinds:
                raise CheckpointError(f"{file}: tensor {name!r} is also in {self._places[name][0]}")
            self.kinds[name] = _KINDS.get(info.dtype, info.dtype)
            self.shapes[name] = info.shape
            self._places[name] = (file, header.data_start + info.begin)
        self._handles[file] = os.open(file, os.O_RDONLY)

    def _check_index(self, expected: dict[str, str]) -> None:
        for name, file in expected.items():
            if name not in self._places or self._places[name][0].name != file:
                raise CheckpointError(
                    f"{self.path / INDEX}: tensor {name!r} is not in {file}, as the index says"
                )

    def _read(self, name: str, start: int, stop: int, row_values: int) -> NDArray[Any]:
        """Elements start * row_values .. stop * row_values as bit patterns."""
        dtype = _DTYPES[self.kinds[name]]
        file, begin = self._places[name]
        out = np.empty((stop - start) * row_values, dtype=dtype)
        view = memoryview(out).cast("B")
        position = begin + start * row_values * dtype.itemsize
        while len(view):
            try:
                count = os.preadv(self._handles[file], [view], position)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
            if not count:
                raise CheckpointError(
                    f"{file}: tensor {name!r}: the file was cut short while it was read"
                )
            view, position = view[count:], position + count
        return out


def _weight_files(path: Path) -> dict[str, str]:
    """Tensor name -> file name as the index says; empty without an index."""
    if not (path / INDEX).exists():
        return {}
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path / INDEX}: weight_map is missing or empty; it must name the file of each tensor"
        )
    for name, file in weight_map.items():
        # A plain file name: an index is untrusted, and "../../x" would read outside the folder.
        if (
            not isinstance(file, str)
            or not file.endswith(".safetensors")
            or Path(file).name != file
        ):
            raise CheckpointError(
                f"{path / INDEX}: tensor {name!r}: {file!r} is not the name of a safetensors file"
            )
        if not (path / file).exists():
            raise ConvertError(
                f"{path}: {file} is missing, which {INDEX} names; fetch the model again"
            )
    return dict(weight_map)


def _single_file(path: Path) -> str:
    found = sorted(entry.name for entry in path.glob("*.safetensors"))
    if SINGLE in found or len(found) == 1:
        return SINGLE if SINGLE in found else found[0]
    if found:
        raise ConvertError(
            f"{path}: {len(found)} safetensors files and no {INDEX} that says what they hold"
        )
    if pickles := sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLES):
        raise ConvertError(pickle_message(path / pickles[0]))
    if ggufs := sorted(entry.name for entry in path.glob("*.gguf")):
        raise ConvertError(
            f"{path}: a folder with GGUF files; give the file itself: {path / ggufs[0]}"
        )
    raise ConvertError(f"{path}: there is no {SINGLE} and no {INDEX}")


def pickle_message(file: Path) -> str:
    return (
        f"{file}: PyTorch's pickled checkpoints are not read, because loading one runs code from "
        "the file; only safetensors and GGUF are. Most models on the hub have a model.safetensors; "
        "else save it again with transformers: model.save_pretrained(folder)"
    )
