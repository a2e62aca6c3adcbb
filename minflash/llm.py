"""LLM: a loaded model that generates text.

One LLM serves one generation at a time. Called from several threads it takes them in turn; a stream
holds its turn until it is exhausted or closed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    DEFAULT_MAX_TOKENS,
    Message,
    Options,
    Prompt,
    Request,
    is_messages,
    parse,
    token_ids,
)
from .chunk import Chunk, Clock, Stats
from .errors import ArgumentError, ContextError, MinflashError, TokenizerError
from .sampling import Sampling
from .stopping import TextStream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from .config import ModelConfig
    from .engine import Engine
    from .tokenizer import Tokenizer


class LLM:
    """A loaded model. ``load`` makes one; ``close`` or a ``with`` block gives its memory back."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        *,
        path: Path | None = None,
        defaults: Sampling | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        """``defaults``: sampling where a call gives none (greedy); ``path``: for messages."""
        self.path = path
        self.last_stats: Stats | None = None  # of the generation that ended last
        self.defaults = defaults or Sampling()
        self.eos_token_ids = frozenset(eos_token_ids) | frozenset(engine.config.eos_token_ids)
        if tokenizer is not None:
            self.eos_token_ids |= frozenset(tokenizer.eos_token_ids)
        self._engine = engine
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose turn it is
        self._closed = False

    @property
    def config(self) -> ModelConfig:
        return self._engine.config

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return self._engine.device

    @property
    def max_context(self) -> int:
        """Positions that a prompt and its answer may take together."""
        return self._engine.max_context

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer is not None and self._tokenizer.chat_template is not None

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> str:
        """The text that follows ``prompt``; the keyword arguments are those of ``Options``.

        A string is completed as it is (special tokens written in it count as such); a list of
        messages goes through the chat template; a list of token ids is taken as it is.

        Raises ArgumentError, ContextError, TokenizerError.
        """
        self._need_tokenizer("generate returns text")
        return "".join(chunk.text for chunk in self.stream(prompt, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """Like ``generate``, as chunks while they are made: one for each token.

        Text comes as soon as it is certain: never half a character, never part of a stop string.
        Closing the generator stops the generation. Arguments are checked at the call.
        """
        self._check_open()
        request = parse(options, self.defaults)
        if request.stop:
            self._need_tokenizer("stop strings are text")
        tokens = self._prompt_tokens(prompt)
        # An answer starts a text; a completion goes on, so that its first word keeps its space.
        before = () if is_messages(prompt) else tokens
        return self._turn_of(tokens, before, request, self._room(len(tokens), request.max_tokens))

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        **options: Unpack[Options],
    ) -> str:
        """The model's answer to a conversation, or to one message of the user given as a string."""
        tokens = self.apply_chat_template(messages, tools=tools)
        request = parse(options, self.defaults)
        room = self._room(len(tokens), request.max_tokens)
        return "".join(chunk.text for chunk in self._turn_of(tokens, (), request, room))

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = True) -> list[int]:
        """Text -> token ids, as ``generate`` sees them.

        ``add_bos`` puts the begin-of-text token first if the model wants one, never twice.
        ``special``: whether special tokens written in the text count as such; say False for text
        of strangers.
        """
        tokenizer = self._need_tokenizer("tokenize needs one")
        return tokenizer.encode(text, add_bos=add_bos, special=special)

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """Token ids -> text."""
        tokenizer = self._need_tokenizer("detokenize needs one")
        return tokenizer.decode(self._checked(tokens), skip_special=skip_special)

    def apply_chat_template(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """A conversation -> token ids. Special tokens inside contents are plain text there.

        Raises TokenizerError when the model has no chat template.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        tokenizer = self._need_tokenizer("a chat template makes text")
        if tokenizer.chat_template is None:
            raise TokenizerError(
                f"{self._name} has no chat template, so that messages cannot be put together; give "
                "a plain string (minflash run --raw), or add chat_template.jinja to the model"
            )
        return tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=add_generation_prompt
        )

    def logits(self, tokens: str | Sequence[int]) -> NDArray[np.float32]:
        """Logits [n_tokens, vocab_size] after each of the tokens, which start a sequence."""
        ids = self._prompt_tokens(tokens)
        if len(ids) > self.max_context:
            raise ContextError(_too_long(len(ids), self.max_context))
        with self._turn():
            return self._engine.logits(ids)

    def close(self) -> None:
        """Gives back the model's memory; waits for another thread's generation to end."""
        if self._owner == threading.get_ident():  # a stream of this thread that was left unfinished
            self._close()
            return
        with self._lock:
            self._close()

    def __enter__(self) -> LLM:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.device}, {self.max_context} positions"
        return f"<minflash.LLM {self._name}: {self.config.architecture}, {state}>"

    @property
    def _name(self) -> str:
        return str(self.path) if self.path else "this model"

    def _close(self) -> None:
        self._closed = True
        self._engine.close()

    def _check_open(self) -> None:
        if self._closed:
            raise MinflashError(f"{self._name} is closed; load it again")

    def _need_tokenizer(self, reason: str) -> Tokenizer:
        self._check_open()
        if self._tokenizer is None:
            raise TokenizerError(
                f"{self._name} has no tokenizer.json, and {reason}; put the model's tokenizer.json "
                "into its folder, or give token ids to stream and read Chunk.token"
            )
        return self._tokenizer

    def _prompt_tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            tokens = self.tokenize(prompt) if prompt else []
        elif is_messages(prompt):
            tokens = self.apply_chat_template(prompt)  # type: ignore[arg-type]
        else:
            tokens = self._checked(prompt)
        if not tokens:
            raise ArgumentError("the prompt is empty; give at least one character or token")
        return tokens

    def _checked(self, tokens: Any) -> list[int]:
        ids, vocab_size = token_ids("tokens", tokens), self.config.vocab_size
        for place, token in enumerate(ids):
            if not 0 <= token < vocab_size:
                raise ArgumentError(
                    f"token ids must be from 0 to {vocab_size - 1}, found {token} at place {place}"
                )
        return ids

    def _room(self, prompt_tokens: int, asked: int | None) -> int:
        """Tokens to make at most. Raises ContextError when the context does not hold them."""
        room = self.max_context - prompt_tokens
        if room < 1:
            raise ContextError(_too_long(prompt_tokens, self.max_context))
        if asked is not None and asked > room:
            raise ContextError(
                f"the prompt has {prompt_tokens} tokens and max_tokens is {asked}, together "
                f"{prompt_tokens + asked}, but the context holds {self.max_context}; ask for at "
                f"most {room}, shorten the prompt, or load with a larger max_context"
            )
        return asked or min(DEFAULT_MAX_TOKENS, room)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if self._owner == threading.get_ident():
            raise MinflashError(
                "a stream of this LLM is not finished in this thread; exhaust or close it first"
            )
        with self._lock:
            self._check_open()
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def _turn_of(
        self, prompt: list[int], before: Sequence[int], request: Request, count: int
    ) -> Generator[Chunk, None, None]:
        with self._turn():
            clock = Clock(len(prompt))
            tokens = self._engine.tokens(prompt, request.sampling.seeded(), count)
            try:
                yield from self._chunks(before, tokens, request, count, clock)
            finally:
                tokens.close()
                self.last_stats = clock.stats(self._engine)

    def _chunks(
        self,
        before: Sequence[int],
        tokens: Iterator[int],
        request: Request,
        count: int,
        clock: Clock,
    ) -> Iterator[Chunk]:
        decoder = self._tokenizer.stream(before) if self._tokenizer else None
        text = TextStream(decoder, request.stop)
        ends = request.stop_token_ids | (frozenset() if request.ignore_eos else self.eos_token_ids)
        for token in tokens:
            clock.tick()
            piece = "" if token in ends else text.push(token)
            reason = None
            if token in ends or text.stopped:
                reason = "stop"
            elif clock.tokens == count:
                reason = "length"
            if reason is not None:
                self.last_stats = stats = clock.stats(self._engine)
                yield Chunk(piece + text.flush(), token, finish_reason=reason, stats=stats)
                return
            yield Chunk(piece, token)
            self._check_open()


def _too_long(tokens: int, max_context: int) -> str:
    return (
        f"the prompt has {tokens} tokens, but the context holds {max_context} with room for the "
        "answer; shorten it, or load with a larger max_context if the model allows"
    )
