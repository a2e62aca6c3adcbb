"""minflash: decodes a large language model with one kernel launch per step.

>>> import minflash
>>> print(minflash.generate("The capital of France is", max_tokens=8))  # doctest: +SKIP
>>> with minflash.load("path/to/model") as llm:  # doctest: +SKIP
...     for chunk in llm.stream([{"role": "user", "content": "Why is the sky blue?"}]):
...         print(chunk.text, end="", flush=True)

Names are imported when first used, so that ``import minflash`` itself costs almost nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .arguments import Message, Options, Prompt
    from .chunk import Chunk, Stats
    from .config import ModelConfig
    from .convert import convert
    from .errors import (
        ArgumentError,
        CheckpointError,
        ConfigError,
        ContextError,
        ConvertError,
        DeviceError,
        DownloadError,
        MinflashError,
        TokenizerError,
    )
    from .llm import LLM
    from .loading import load
    from .sampling import Sampling
    from .scoring import Score
    from .shortcuts import chat, generate, stream

_HOME = {
    **dict.fromkeys(("chat", "generate", "stream"), "shortcuts"),
    **dict.fromkeys(("Chunk", "Stats"), "chunk"),
    **dict.fromkeys(("Message", "Options", "Prompt"), "arguments"),
    **dict.fromkeys(("ArgumentError", "CheckpointError", "ConfigError", "ContextError"), "errors"),
    **dict.fromkeys(("ConvertError", "DeviceError", "DownloadError"), "errors"),
    **dict.fromkeys(("MinflashError", "TokenizerError"), "errors"),
    "LLM": "llm",
    "ModelConfig": "config",
    "Sampling": "sampling",
    "Score": "scoring",
    "convert": "convert",
    "load": "loading",
}  # public name -> the module that defines it

__all__ = [
    "LLM",
    "ArgumentError",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "ContextError",
    "ConvertError",
    "DeviceError",
    "DownloadError",
    "Message",
    "MinflashError",
    "ModelConfig",
    "Options",
    "Prompt",
    "Sampling",
    "Score",
    "Stats",
    "TokenizerError",
    "__version__",
    "chat",
    "convert",
    "generate",
    "load",
    "stream",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'minflash' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``minflash.chat`` and ``minflash.convert`` the functions.

    The import system would replace them by the modules of the same names once those are imported.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
