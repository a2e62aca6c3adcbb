"""Does the GPU compute this model right? The engine beside the reference, within a derived bound.

The rule is that of docs/design.md, section 6: with ``exact`` the reference in float64 on the stored
weights and ``rounded`` the same reference rounding where the kernel rounds,

    max|kernel - exact| <= 2 max|rounded - exact| + 1e-6 max|exact|

over all logits of a sequence. A token that the kernel chose must be the best one of ``exact``, or
come as close to it as that bound allows: twice the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .engine import Engine
from .errors import DeviceError
from .memory import free_memory_bytes
from .numeric import bf16_to_fp32, fp32_to_bf16
from .packing import Layout, Matrix
from .reference import Reference
from .sampling import Sampling

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived an old fisherman who had never learned "
    "to swim. Every morning he looked at the water and said: \u201cToday I shall begin.\u201d",
)
ANSWER_TOKENS = 12  # generated after each sequence, one at a time: the kernel of one column
PASSES = 3  # the kernel, the reference in float64, the reference that rounds
_RANDOM_TOKENS = 45  # not a multiple of the columns of a step

Array = NDArray[Any]


class Weights(Protocol):
    """What is needed of a ``Checkpoint``."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def matrices(self) -> Mapping[str, Layout]: ...

    def matrix(self, name: str) -> Matrix: ...

    def vector(self, name: str) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Verdict:
    """One sequence. Errors are of logits, without unit."""

    name: str
    tokens: int
    error: float  # the largest
    bound: float
    logit_range: float  # the largest logit by magnitude, to compare with
    wrong_tokens: int  # chosen tokens that the bound does not excuse

    @property
    def ok(self) -> bool:
        return self.error <= self.bound and self.wrong_tokens == 0


def sequences(
    config: ModelConfig, tokenize: Callable[[str], list[int]] | None, room: int
) -> dict[str, list[int]]:
    """{name: token ids}: the fixed prompts where there is a tokenizer, and random ids.

    room: positions of the context; sequences leave space for the answer.
    """
    most = max(1, min(room, config.max_context) - ANSWER_TOKENS)
    found = {}
    if tokenize is not None:
        found = {f"prompt {i}": tokenize(text)[:most] for i, text in enumerate(PROMPTS, 1)}
    random = np.random.default_rng(7).integers(0, config.vocab_size, _RANDOM_TOKENS).tolist()
    random[:2] = [config.vocab_size - 1, 0]
    found["one token"] = [random[2]]
    found["random"] = random[:most]
    return found


def verify(
    checkpoint: Weights,
    engine: Engine,
    cases: Mapping[str, Sequence[int]],
    done: Callable[[], None] = lambda: None,
) -> Iterator[Verdict]:
    """A verdict for each of ``cases`` {name: token ids}, in order.

    done: called PASSES times for each case, while the work goes on. Raises DeviceError when the
    memory does not hold the reference.
    """
    dtype = _dtype(checkpoint)
    whole = {name: _continued(engine, tokens) for name, tokens in cases.items()}
    found = {}
    for name, tokens in whole.items():
        found[name] = engine.logits(tokens)
        done()
    exact = _reference_logits(checkpoint, dtype, None, whole, done)
    rounding = kernel_rounding(checkpoint.matrices)
    rounded = _reference_logits(checkpoint, dtype, rounding, whole, done)
    for name, tokens in whole.items():
        yield compare(name, tokens, len(cases[name]), found[name], exact[name], rounded[name])


def compare(
    name: str, tokens: Sequence[int], given: int, found: Array, exact: Array, rounded: Array
) -> Verdict:
    """The rule of this module for one sequence, of whose tokens the first ``given`` are the prompt.

    found, exact, rounded: logits [n, vocab_size].
    """
    largest = float(np.abs(exact).max())
    limit = 2 * float(np.abs(rounded - exact).max()) + 1e-6 * largest
    wrong = 0
    for place in range(given - 1, len(tokens) - 1):
        lost = float(exact[place].max() - exact[place, tokens[place + 1]])
        wrong += lost > 2 * limit
    error = float(np.abs(found - exact).max())
    if not np.isfinite(found).all():
        error = float("inf")
    return Verdict(name, len(tokens), error, limit, largest, wrong)


def kernel_rounding(matrices: Mapping[str, Layout]) -> Callable[[str, Array], Array]:
    """The reference's hook that rounds where the kernel rounds: activations and the KV cache."""
    kind = "bf16" if matrices["layers.0.wqkv"].type == "bf16" else "fp16"

    def rounding(name: str, values: Array) -> Array:
        if kind == "bf16":
            return bf16_to_fp32(fp32_to_bf16(values.astype(np.float32))).astype(values.dtype)
        return values.astype(np.float16).astype(values.dtype)

    return rounding


def _continued(engine: Engine, tokens: Sequence[int]) -> list[int]:
    count = max(1, min(ANSWER_TOKENS, engine.max_context - len(tokens)))
    return [*tokens, *engine.tokens(tokens, Sampling(), count)]


def _reference_logits(
    checkpoint: Weights,
    dtype: type[np.floating[Any]],
    rounding: Callable[[str, Array], Array] | None,
    cases: Mapping[str, Sequence[int]],
    done: Callable[[], None],
) -> dict[str, Array]:
    """Logits of all cases; one reference at a time is in memory."""
    longest = max(len(tokens) for tokens in cases.values())
    reference = Reference(checkpoint, dtype=dtype, max_context=longest, rounding=rounding)
    found = {}
    for name, tokens in cases.items():
        found[name] = np.asarray(reference.forward(tokens, 0, all_logits=True))
        done()
    return found


def _dtype(checkpoint: Weights) -> type[np.floating[Any]]:
    """float64; float32 where the memory does not hold that, whose own error is far below bf16's."""
    weights = sum(layout.rows * layout.cols for layout in checkpoint.matrices.values())
    free = 0.9 * free_memory_bytes()
    if 8 * weights < free:
        return np.float64
    if 4 * weights < free:
        return np.float32
    raise DeviceError(
        f"the reference needs {4 * weights / 1e9:.1f} GB of memory for this model, "
        f"{free / 1e9:.1f} GB can be had; verify a smaller model of the same architecture and type"
    )
