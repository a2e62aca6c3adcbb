"""From a checked request to a generation that can wait for its turn.

What the model has to say about a request is asked here, before it waits: whether the prompt fits,
whether the grammar can be honoured. The private methods of LLM are used where the public ones take
no event that ends one generation and no other.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .arguments import parse
from .chunk import NO_TOKEN, Chunk
from .context import room
from .errors import ArgumentError, MinflashError
from .server_errors import ApiError, api_error, blaming, unsupported
from .server_protocol import Generation
from .server_scoring import score_prompt, token_texts

if TYPE_CHECKING:
    from .llm import LLM

_FORMS = ("response_format", "regex", "grammar")


@dataclass(frozen=True)
class Work:
    """A generation that has not begun."""

    chunks: Generator[Chunk, None, None]  # begins at the first chunk, in the thread that reads it
    prompt_tokens: int
    before: str  # the prompt's text, where a completion is to repeat it
    # Its tokens, where their log-probabilities are asked for; filled in before the first chunk.
    prompt: list[Chunk] = field(default_factory=list)


def prepare(llm: LLM, asked: Generation, cancelled: threading.Event) -> Work:
    """Checks everything; ``cancelled`` will end this generation. Raises ApiError."""
    with blaming("messages" if asked.is_chat else "prompt"):
        tokens = _tokens(llm, asked)
        before = _repeated(llm, asked, tokens)
    with blaming("logit_bias"):  # an error when the model has no such tokens
        llm.detokenize([token for token, _ in parse(asked.options).sampling.logit_bias])
    chunks = _answer(llm, asked, len(tokens), cancelled) if asked.generates else _nothing()
    if not (asked.echo and "logprobs" in asked.options):
        return Work(chunks, len(tokens), before)
    prompt: list[Chunk] = []
    texts = token_texts(llm, asked.prompt, tokens, before)

    def scored() -> Generator[Chunk, None, None]:
        prompt.extend(score_prompt(llm, tokens, texts, asked.options["logprobs"], cancelled))
        if cancelled.is_set():
            yield Chunk("", NO_TOKEN, finish_reason="cancelled")
        else:
            yield from chunks

    return Work(scored(), len(tokens), before, prompt)


def _nothing() -> Generator[Chunk, None, None]:
    """An answer of no tokens."""
    yield Chunk("", NO_TOKEN, finish_reason="length")


def _answer(
    llm: LLM, asked: Generation, prompt_tokens: int, cancelled: threading.Event
) -> Generator[Chunk, None, None]:
    options = dict(asked.options)
    if asked.is_chat and "max_tokens" not in options:  # an answer goes on to its own end
        options["max_tokens"] = llm.max_context - prompt_tokens
    if asked.tools.form is not None:
        options["response_format"] = asked.tools.form
    try:
        return llm._start(asked.prompt, asked.tools.definitions, options, cancelled)
    except MinflashError as error:
        raise _form_error(asked, error) from error


def _form_error(asked: Generation, error: MinflashError) -> ApiError:
    """All else was checked before: what remains is the form that was asked for."""
    form = next((name for name in _FORMS if name in asked.options), None)
    if asked.tools.form is not None:  # of our own making, from the functions' parameters
        form = "tools"
    if form is not None and not isinstance(error, ArgumentError):  # no llguidance
        return unsupported(form, str(error))
    return api_error(error, form)


def _tokens(llm: LLM, asked: Generation) -> list[int]:
    """The prompt's. Raises ContextError when they leave no room for the answer."""
    if asked.is_chat:
        tokens = _chat_tokens(llm, asked)
    else:
        tokens = llm._fitting_tokens(asked.prompt)
    if asked.generates:
        room(len(tokens), asked.options.get("max_tokens"), llm.max_context)
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
