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
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .arguments import Message, Options, Prompt
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
    from .llm import LLM, Chunk, Stats, chat, generate, load, stream
    from .sampling import Sampling

_HOME = {
    **dict.fromkeys(("LLM", "Chunk", "Stats", "chat", "generate", "load", "stream"), "llm"),
    **dict.fromkeys(("Message", "Options", "Prompt"), "arguments"),
    **dict.fromkeys(("ArgumentError", "CheckpointError", "ConfigError", "ContextError"), "errors"),
    **dict.fromkeys(("ConvertError", "DeviceError", "DownloadError"), "errors"),
    **dict.fromkeys(("MinflashError", "TokenizerError"), "errors"),
    "ModelConfig": "config",
    "Sampling": "sampling",
    "convert": "convert",
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
