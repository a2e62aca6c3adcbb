"""LLM: a loaded model that generates text.

One LLM serves one generation at a time. Called from several threads it takes them in turn; a stream
holds its turn until it is exhausted or closed. The cache of keys and values stays between calls: a
prompt begins where it first differs from the sequence before.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import states
from .arguments import (
    Message,
    Options,
    Prompt,
    as_messages,
    check_vocabulary,
    is_messages,
    parse,
    token_ids,
)
from .async_llm import in_thread
from .chunk import NO_TOKEN, Chunk, Clock, Stats
from .context import room, too_long
from .errors import ArgumentError, ContextError, MinflashError, TokenizerError
from .generation import Job, run
from .sampling import Sampling
from .scoring import Score, check_pooling, pool, score, text_or_list
from .structured import Grammar, GrammarConstraint, Grammars
from .turns import Turns

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
        fingerprint: str | None = None,
    ) -> None:
        """``defaults``: sampling where a call gives none (greedy); ``path``: for messages;
        ``fingerprint``: of the weights, for saved states.
        """
        self.path = path
        self.last_stats: Stats | None = None  # of the generation that ended last
        self.defaults = defaults or Sampling()
        self.eos_token_ids = frozenset(eos_token_ids) | frozenset(engine.config.eos_token_ids)
        if tokenizer is not None:
            self.eos_token_ids |= frozenset(tokenizer.eos_token_ids)
        self._engine = engine
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        self._grammars: Grammars | None = None  # made when first needed
        self._turns = Turns()
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

    def generate(
        self, prompt: Prompt, *, tools: Sequence[Any] | None = None, **options: Unpack[Options]
    ) -> str:
        """The text that follows ``prompt``; the keyword arguments are those of ``Options``.

        A string is completed as it is (special tokens written in it count as such); a list of
        messages goes through the chat template, with ``tools`` (definitions of functions, as in
        OpenAI's interface); a list of token ids is taken as it is.

        Raises ArgumentError, ContextError, TokenizerError.
        """
        self._need_tokenizer("generate returns text")
        return "".join(chunk.text for chunk in self.stream(prompt, tools=tools, **options))

    def stream(
        self, prompt: Prompt, *, tools: Sequence[Any] | None = None, **options: Unpack[Options]
    ) -> Generator[Chunk, None, None]:
        """Like ``generate``, as chunks while they are made: one for each token.

        Text comes as soon as it is certain: never half a character, never part of a stop string.
        Closing the generator stops the generation. Arguments are checked at the call.
        """
        return self._start(prompt, tools, options, threading.Event())

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        **options: Unpack[Options],
    ) -> str:
        """The model's answer to a conversation, or to one message of the user given as a string."""
        return self.generate(as_messages(messages), tools=tools, **options)

    async def agenerate(
        self, prompt: Prompt, *, tools: Sequence[Any] | None = None, **options: Unpack[Options]
    ) -> str:
        """``generate`` for asyncio: the event loop goes on; cancelling the task cancels."""
        self._need_tokenizer("agenerate returns text")
        chunks = self.astream(prompt, tools=tools, **options)
        return "".join([chunk.text async for chunk in chunks])

    def astream(
        self, prompt: Prompt, *, tools: Sequence[Any] | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk, None]:
        """``stream`` for asyncio. What is wrong with the arguments is raised at the first chunk."""
        return in_thread(lambda cancelled: self._start(prompt, tools, options, cancelled))

    async def achat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        **options: Unpack[Options],
    ) -> str:
        """``chat`` for asyncio."""
        return await self.agenerate(as_messages(messages), tools=tools, **options)

    def cancel(self) -> None:
        """Ends the generation that runs now, if any, after at most two steps; returns at once.

        Any thread may call it. The generation's last chunk has finish_reason "cancelled"; generate
        and chat return the text so far.
        """
        self._turns.cancel()

    def reset(self) -> None:
        """Forgets the last sequence: the next prompt is read from its beginning.

        Without it a prompt begins where it first differs from the last sequence, which can change
        results within the rounding of the arithmetic.
        """
        with self._turn():
            self._engine.reset()

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Writes what the model has read and said last (tokens, keys, values) as safetensors.

        ``load_state`` brings it back in another process: a prompt that begins with the same tokens
        then starts at once. Raises MinflashError when the file cannot be written.
        """
        with self._turn():
            states.save(path, self._engine, self._known_fingerprint())

    def load_state(self, path: str | os.PathLike[str]) -> int:
        """Takes up a saved state; returns how many positions it has.

        Raises CheckpointError when it is damaged, of another model or from another kind of device,
        ContextError when it is longer than the context.
        """
        with self._turn():
            return states.load(path, self._engine, self._known_fingerprint())

    def score(self, text: str | Sequence[int]) -> Score:
        """The log-probability of each token of a text (or of token ids), and the perplexity."""
        tokens = self._fitting_tokens(text)
        with self._turn():
            return score(tokens, self._engine.logit_parts(tokens))

    def embed(
        self, text: str | Iterable[int] | Iterable[str], *, pooling: str = "mean"
    ) -> NDArray[np.float32]:
        """float32 [dim] of one text (or its token ids), [n, dim] of several, each of length 1.

        From what enters the output head, over all tokens (``pooling="mean"``) or of the last one.
        A model that was not trained for embeddings gives rough ones.
        """
        import numpy as np

        check_pooling(pooling)
        if isinstance(given := text_or_list(text), list) and isinstance(given[0], str):
            return np.stack([self.embed(one, pooling=pooling) for one in given])
        tokens = self._fitting_tokens(given)
        with self._turn():
            return pool(self._engine.hidden(tokens), pooling)

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
        tokenizer = self._need_tokenizer("a chat template makes text")
        if tokenizer.chat_template is None:
            raise TokenizerError(
                f"{self._name} has no chat template, so that messages cannot be put together; give "
                "a plain string (minflash run --raw), or add chat_template.jinja to the model"
            )
        return tokenizer.apply_chat_template(
            as_messages(messages), tools=tools, add_generation_prompt=add_generation_prompt
        )

    def logits(self, tokens: str | Sequence[int]) -> NDArray[np.float32]:
        """Logits [n_tokens, vocab_size] after each of the tokens, which start a sequence."""
        ids = self._fitting_tokens(tokens)
        with self._turn():
            return self._engine.logits(ids)

    def close(self) -> None:
        """Gives back the model's memory; waits for another thread's generation to end."""
        if self._turns.mine:  # a stream of this thread that was left unfinished
            self._close()
            return
        with self._turns.take():
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
        self._grammars = None  # they hold the vocabulary in a form of their own
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

    def _known_fingerprint(self) -> str:
        if self._fingerprint is None:
            raise MinflashError(
                f"{self._name} was not loaded from files, so that no state can be matched with it"
            )
        return self._fingerprint

    def _fitting_tokens(self, text: str | Sequence[int]) -> list[int]:
        tokens = self._prompt_tokens(text, None)
        if len(tokens) > self.max_context:
            raise ContextError(too_long(len(tokens), self.max_context))
        return tokens

    def _prompt_tokens(self, prompt: Prompt, tools: Sequence[Any] | None) -> list[int]:
        if tools not in (None, [], ()) and not is_messages(prompt):
            raise ArgumentError("tools go with a list of messages, as the chat template names them")
        if isinstance(prompt, str):
            tokens = self.tokenize(prompt) if prompt else []
        elif is_messages(prompt):
            tokens = self.apply_chat_template(prompt, tools=tools)  # type: ignore[arg-type]
        else:
            tokens = self._checked(prompt)
        if not tokens:
            raise ArgumentError("the prompt is empty; give at least one character or token")
        return tokens

    def _checked(self, tokens: Any) -> list[int]:
        ids = token_ids("tokens", tokens)
        check_vocabulary("token ids", ids, self.config.vocab_size)
        return ids

    def _start(
        self,
        prompt: Prompt,
        tools: Sequence[Any] | None,
        options: Mapping[str, Any],
        cancelled: threading.Event,
    ) -> Generator[Chunk, None, None]:
        """Checks everything now; what it returns generates."""
        self._check_open()
        request = parse(options, self.defaults)
        if request.stop:
            self._need_tokenizer("stop strings are text")
        tokens = self._prompt_tokens(prompt, tools)
        vocab_size, bias = self.config.vocab_size, request.sampling.logit_bias
        check_vocabulary("token ids of logit_bias", (token for token, _ in bias), vocab_size)
        check_vocabulary("stop_token_ids", sorted(request.stop_token_ids), vocab_size)
        ends = request.stop_token_ids | (frozenset() if request.ignore_eos else self.eos_token_ids)
        job = Job(
            prompt=tokens,
            count=room(len(tokens), request.max_tokens, self.max_context),
            sampling=request.sampling,
            ends=frozenset(token for token in ends if token < vocab_size),  # of any config.json
            stop=request.stop,
            # An answer starts a text; a completion goes on, so that its first word keeps its space.
            before=() if is_messages(prompt) else tokens,
            constraint=self._constraint(request.grammar, request.stop_token_ids),
            logprobs=request.logprobs,
            cancelled=cancelled,
        )
        return self._run(job)

    def _constraint(
        self, grammar: Grammar | None, stop_token_ids: frozenset[int]
    ) -> GrammarConstraint | None:
        if grammar is None:
            return None
        tokenizer = self._need_tokenizer("a grammar is about text")
        ends = stop_token_ids | self.eos_token_ids
        grammars = self._grammars  # other threads may put theirs in its place
        if grammars is None or grammars.ends != ends:
            grammars = self._grammars = Grammars(tokenizer.source, self.config.vocab_size, ends)
        return grammars.constraint(grammar)

    @contextlib.contextmanager
    def _turn(self, cancelled: threading.Event | None = None) -> Iterator[bool]:
        """This thread's turn, of an open model; False when it was cancelled before."""
        with self._turns.take(cancelled) as came:
            self._check_open()
            yield came

    def _run(self, job: Job) -> Generator[Chunk, None, None]:
        with self._turn(job.cancelled) as came:
            if not came:
                yield Chunk("", NO_TOKEN, finish_reason="cancelled")
                return
            clock = Clock(len(job.prompt))
            try:
                with contextlib.closing(run(self._engine, self._tokenizer, job, clock)) as chunks:
                    for chunk in chunks:
                        self.last_stats = chunk.stats or self.last_stats
                        yield chunk
                        self._check_open()
            finally:
                self.last_stats = clock.stats(self._engine)
