"""generate, stream and chat without an LLM in hand: loaded when first used, and kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from .arguments import Message, Options, Prompt
from .chunk import Chunk
from .llm import LLM
from .loading import load

if TYPE_CHECKING:
    from typing_extensions import Unpack

ModelName: TypeAlias = "LLM | str | os.PathLike[str] | None"

_loaded: dict[str, LLM] = {}
_loading = threading.Lock()


def generate(
    prompt: Prompt,
    *,
    model: ModelName = None,
    tools: Sequence[Any] | None = None,
    **options: Unpack[Options],
) -> str:
    """``LLM.generate`` of a model that is loaded at the first call and kept by this process.

    ``model``: an LLM, or what ``load`` takes; None: the default model.
    """
    return _model(model).generate(prompt, tools=tools, **options)


def stream(
    prompt: Prompt,
    *,
    model: ModelName = None,
    tools: Sequence[Any] | None = None,
    **options: Unpack[Options],
) -> Generator[Chunk, None, None]:
    """``LLM.stream`` of a model that is loaded at the first call and kept by this process."""
    return _model(model).stream(prompt, tools=tools, **options)


def chat(
    messages: str | Sequence[Message],
    *,
    model: ModelName = None,
    tools: Sequence[Any] | None = None,
    **options: Unpack[Options],
) -> str:
    """``LLM.chat`` of a model that is loaded at the first call and kept by this process."""
    return _model(model).chat(messages, tools=tools, **options)


def _model(model: ModelName) -> LLM:
    if isinstance(model, LLM):
        return model
    with _loading:
        key = str(model) if model is not None else os.environ.get("MINFLASH_MODEL", "")
        if key not in _loaded:
            _loaded[key] = load(model)
        return _loaded[key]
