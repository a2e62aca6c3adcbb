"""Engines: what turns token ids into the next token ids, on one device, for one sequence at a time.

``open_engine`` chooses the device: a missing GPU is said, never hidden.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from .cache_state import CacheLayout, CacheState
from .errors import ArgumentError, DeviceError
from .kept import KeptTokens
from .memory import cpu_context, give_back_freed
from .notice import say_once
from .probe import cuda_problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .checkpoint import Checkpoint
    from .config import ModelConfig
    from .reference import Reference
    from .sampling import Sampling

Choose: TypeAlias = "Callable[[NDArray[np.float32], int], int]"  # (logits, position) -> token
Cancelled: TypeAlias = "Callable[[], bool]"

DEVICES = ("cuda", "cpu")
PREFILL_TOKENS = 256  # tokens of one forward: bounds the memory that a long prompt takes


class Engine(Protocol):
    """One model on one device. Not safe for use by several threads at once: LLM holds a lock.

    The cache of keys and values stays: a prompt begins where it first differs from what the cache
    holds of the sequence before.
    """

    config: ModelConfig
    max_context: int  # positions
    device: str
    forwarded: int  # tokens that went through the model so far, for tests and figures
    reused: int  # tokens of the last prompt that were in the cache already

    def tokens(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        count: int,
        *,
        choose: Choose | None = None,
        cancelled: Cancelled | None = None,
    ) -> Generator[int, None, None]:
        """Reads the prompt, then yields up to ``count`` chosen tokens. Closing it stops.

        choose: chooses in place of ``sampling``: a ``Chooser``, or a function that is given the
        logits on the host, for which each step on a GPU waits.
        cancelled: asked between steps; ends the tokens early.
        """
        ...

    def logit_parts(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Logits [n, vocab_size] after each of ``tokens``, which start a sequence, n at a time."""
        ...

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The same in one piece, [n_tokens, vocab_size]."""
        ...

    def hidden(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """What enters the output head at each of ``tokens``: [n_tokens, dim], normed."""
        ...

    def reset(self) -> None:
        """Forgets the sequence: the next prompt begins from nothing."""
        ...

    @property
    def cache_layout(self) -> CacheLayout: ...

    def save_cache(self) -> CacheState:
        """The sequence in the cache, copied."""
        ...

    def load_cache(self, state: CacheState) -> None:
        """Puts a sequence into the cache. Raises CheckpointError when it does not fit."""
        ...

    def close(self) -> None:
        """Gives back all memory. May be called twice."""
        ...


class CpuEngine:
    """The NumPy reference as an engine: correct everywhere, not fast."""

    device = "cpu"

    def __init__(self, checkpoint: Checkpoint, max_context: int | None = None) -> None:
        """``max_context`` in positions; None: the model's own, bounded by the free memory.

        Raises ContextError when ``max_context`` is more than the model or the memory allows, and
        DeviceError when the weights do not fit.
        """
        from .reference import Reference

        self.config = checkpoint.config
        self.max_context = cpu_context(checkpoint, max_context)
        self.forwarded = self.reused = 0
        self._kept = KeptTokens(self.config)
        self._reference: Reference | None = Reference(checkpoint, max_context=self.max_context)

    def tokens(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        count: int,
        *,
        choose: Choose | None = None,
        cancelled: Cancelled | None = None,
    ) -> Generator[int, None, None]:
        from .sampling import sample

        logits, end = None, len(prompt) + count
        self.reused = self._kept.shared(prompt)
        for logits in self._parts(prompt, self.reused):  # noqa: B007 (the last counts)
            if cancelled is not None and cancelled():
                return
        assert logits is not None
        for position in range(len(prompt), end):
            if choose is not None:
                token = choose(logits, position)
            else:
                token = sample(logits, sampling, position)
            yield token
            if position + 1 == end or (cancelled is not None and cancelled()):
                return  # the last token is never read
            logits = self._forward([token], position, position + 1)

    def logit_parts(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        return self._parts(tokens, 0, all_logits=True)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        return np.concatenate(list(self.logit_parts(tokens)))

    def hidden(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        return np.concatenate(list(self._parts(tokens, 0, hidden=True)))

    def reset(self) -> None:
        self._kept.cut(0)

    def save_cache(self) -> CacheState:
        keys, values = self._open_reference().cached(len(self._kept))
        kept, tensors = self._kept, {"keys": keys, "values": values}
        return CacheState(self.cache_layout, list(kept.ids), list(kept.rope_keys), tensors)

    def load_cache(self, state: CacheState) -> None:
        state.check(self.cache_layout, self.max_context)
        self._kept.cut(0)
        self._open_reference().restore(state.tensors["keys"], state.tensors["values"])
        self._kept.replace(state.ids, state.rope_keys)

    def close(self) -> None:
        self._reference = None
        give_back_freed()

    @property
    def cache_layout(self) -> CacheLayout:
        config = self.config
        shape = (config.n_layers, config.n_kv_heads, -1, config.head_dim)
        return CacheLayout("cpu-float32-1", {"keys": ("F32", shape), "values": ("F32", shape)})

    def _parts(
        self, tokens: Sequence[int], begin: int, **options: bool
    ) -> Iterator[NDArray[np.float32]]:
        """What ``_forward`` returns for parts of ``tokens`` from ``begin`` on."""
        for position in range(begin, len(tokens), PREFILL_TOKENS):
            part = tokens[position : position + PREFILL_TOKENS]
            yield self._forward(part, position, len(tokens), **options)

    def _forward(
        self, tokens: Sequence[int], position: int, length: int, **options: bool
    ) -> NDArray[np.float32]:
        reference = self._open_reference()
        self._kept.cut(position)  # first: an interrupt leaves what is true
        result = reference.forward(tokens, position, length=length, **options)
        self._kept.add(tokens, length)
        self.forwarded += len(tokens)
        return result.astype("float32", copy=False)

    def _open_reference(self) -> Reference:
        if self._reference is None:
            raise DeviceError("this engine is closed; load the model again")
        return self._reference


def open_engine(
    checkpoint: Checkpoint, device: str | None, max_context: int | None, *, progress: bool = True
) -> Engine:
    """The engine for ``device``: "cuda", "cpu", or None for MINFLASH_DEVICE, else what there is.

    The checkpoint may be closed once the engine is made. progress: a bar on stderr, where that is a
    terminal and the model is large.
    Raises DeviceError when "cuda" is asked for and cannot be used, ArgumentError for other names.
    """
    device = device or os.environ.get("MINFLASH_DEVICE") or None
    if device is not None and device not in DEVICES:
        raise ArgumentError(f"device must be one of {', '.join(DEVICES)}, found {device!r}")
    if device == "cpu":
        return CpuEngine(checkpoint, max_context)
    problem = cuda_problem()
    if problem is not None and device == "cuda":
        raise DeviceError(f'device="cuda" cannot be used: {problem}; device="cpu" always works')
    if problem is None and device is None:
        problem = _model_problem(checkpoint)
    if problem is None:
        return _cuda_engine(checkpoint, max_context, progress)
    say_once(f"running on the CPU with the NumPy reference, which is slow: {problem}")
    return CpuEngine(checkpoint, max_context)


def _model_problem(checkpoint: Checkpoint) -> str | None:
    module = importlib.import_module(".cuda_engine", __package__)
    problem: str | None = module.model_problem(checkpoint)
    return problem


def _cuda_engine(checkpoint: Checkpoint, max_context: int | None, progress: bool) -> Engine:
    module = importlib.import_module(".cuda_engine", __package__)
    engine: Engine = module.CudaEngine(checkpoint, max_context, progress=progress)
    return engine
