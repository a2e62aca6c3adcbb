"""Engines: what turns token ids into the next token ids, on one device, for one sequence at a time.

``open_engine`` chooses the device: a missing GPU is said, never hidden.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Protocol

from .errors import ArgumentError, DeviceError
from .memory import cpu_context
from .notice import say_once
from .probe import cuda_problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .checkpoint import Checkpoint
    from .config import ModelConfig
    from .reference import Reference
    from .sampling import Sampling

DEVICES = ("cuda", "cpu")
PREFILL_TOKENS = 256  # tokens of one forward: bounds the memory that a long prompt takes


class Engine(Protocol):
    """One model on one device. Not safe for use by several threads at once: LLM holds a lock."""

    config: ModelConfig
    max_context: int  # positions
    device: str

    def tokens(
        self, prompt: Sequence[int], sampling: Sampling, count: int
    ) -> Generator[int, None, None]:
        """Reads the prompt, then yields up to ``count`` chosen tokens. Closing it stops."""
        ...

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n_tokens, vocab_size] after each of ``tokens``, which start a sequence."""
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
        self._reference: Reference | None = Reference(checkpoint, max_context=self.max_context)

    def tokens(
        self, prompt: Sequence[int], sampling: Sampling, count: int
    ) -> Generator[int, None, None]:
        from .sampling import sample

        reference = self._open_reference()
        for begin in range(0, len(prompt), PREFILL_TOKENS):
            part = prompt[begin : begin + PREFILL_TOKENS]
            logits = reference.forward(part, begin, length=len(prompt))
        end = len(prompt) + count
        for position in range(len(prompt), end):
            token = sample(logits, sampling, position)
            yield token
            if position + 1 < end:  # the last token is never read
                logits = reference.forward([token], position)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        reference = self._open_reference()
        parts = []
        for begin in range(0, len(tokens), PREFILL_TOKENS):
            part = tokens[begin : begin + PREFILL_TOKENS]
            parts.append(reference.forward(part, begin, length=len(tokens), all_logits=True))
        return np.concatenate(parts).astype(np.float32, copy=False)

    def close(self) -> None:
        self._reference = None

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
