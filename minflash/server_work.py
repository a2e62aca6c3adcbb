"""From a checked request to a generation that can wait for its turn.

What the model has to say about a request is asked here, before it waits: whether the prompt fits,
whether the grammar can be honoured. The private methods of LLM are used where the public ones take
no event that ends one generation and no other.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arguments import parse
from .context import room
from .errors import ArgumentError, MinflashError
from .server_errors import ApiError, api_error, blaming, unsupported
from .server_protocol import Generation

if TYPE_CHECKING:
    from .chunk import Chunk
    from .llm import LLM

_FORMS = ("response_format", "regex", "grammar")


@dataclass(frozen=True)
class Work:
    """A generation that has not begun."""

    chunks: Generator[Chunk, None, None]  # begins at the first chunk, in the thread that reads it
    prompt_tokens: int
    before: str  # the prompt's text, where a completion is to repeat it


def prepare(llm: LLM, asked: Generation, cancelled: threading.Event) -> Work:
    """Checks everything; ``cancelled`` will end this generation. Raises ApiError."""
    with blaming("messages" if asked.is_chat else "prompt"):
        tokens = _tokens(llm, asked)
        room(len(tokens), asked.options.get("max_tokens"), llm.max_context)
        before = _repeated(llm, asked, tokens)
    with blaming("logit_bias"):  # an error when the model has no such tokens
        llm.detokenize([token for token, _ in parse(asked.options).sampling.logit_bias])
    options = dict(asked.options)
    if asked.is_chat and "max_tokens" not in options:  # an answer goes on to its own end
        options["max_tokens"] = llm.max_context - len(tokens)
    if asked.tools.form is not None:
        options["response_format"] = asked.tools.form
    try:
        chunks = llm._start(asked.prompt, asked.tools.definitions, options, cancelled)
    except MinflashError as error:
        raise _form_error(asked, error) from error
    return Work(chunks, len(tokens), before)


def _form_error(asked: Generation, error: MinflashError) -> ApiError:
    """All else was checked before: what remains is the form that was asked for."""
    form = next((name for name in _FORMS if name in asked.options), None)
    if asked.tools.form is not None:  # of our own making, from the functions' parameters
        form = "tools"
    if form is not None and not isinstance(error, ArgumentError):  # no llguidance
        return unsupported(form, str(error))
    return api_error(error, form)


def _tokens(llm: LLM, asked: Generation) -> list[int]:
    if asked.is_chat:
        return _chat_tokens(llm, asked)
    if isinstance(asked.prompt, str):
        return llm.tokenize(asked.prompt)
    llm.detokenize(asked.prompt)  # an error when the model has no such tokens
    tokens: list[int] = asked.prompt
    return tokens


def _chat_tokens(llm: LLM, asked: Generation) -> list[int]:
    try:
        return llm.apply_chat_template(asked.prompt, tools=asked.tools.definitions)
    except ArgumentError as error:
        if asked.tools.definitions is None:
            raise
        llm.apply_chat_template(asked.prompt)  # raises where the messages are at fault
        raise api_error(error, "tools") from error


def _repeated(llm: LLM, asked: Generation, tokens: list[int]) -> str:
    if not asked.echo:
        return ""
    return asked.prompt if isinstance(asked.prompt, str) else llm.detokenize(tokens)
