"""The model in NumPy: the specification of every operator, and the ``cpu`` device.

In float64 it is the truth of the tests, in float32 it is the device of a machine without a GPU.
First one pure function per operator, then the model that puts them together. Shapes stand in
brackets: n tokens of one forward, s positions that they may see.

The formulas are those of LLaMA (arXiv 2302.13971): RMSNorm (1910.07467), rotary embedding
(2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202); Mistral's sliding window
(2310.06825) and Qwen3's norms of queries and keys (2505.09388).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .config import ModelConfig
from .errors import ArgumentError, ContextError
from .packing import Matrix, deinterleave, dequantize
from .rope import rotation

Array = NDArray[np.floating[Any]]
Rounding = Callable[[str, Array], Array]

QUERY_BLOCK = 256  # queries whose scores are held at a time; bounds the memory of a long prompt
FIRST_CAPACITY = 256  # positions of a fresh KV cache


# Operators


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """[..., dim] -> [..., dim]: x / sqrt(mean(x^2) + eps) * weight."""
    mean = np.sum(x * x, axis=-1, keepdims=True) / x.dtype.type(x.shape[-1])
    normed: Array = x / np.sqrt(mean + x.dtype.type(eps)) * weight
    return normed


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """[n, cols] x [rows, cols] -> [n, rows]: each row of x times the matrix, plus the bias."""
    y: Array = (weight @ x[0])[None] if len(x) == 1 else x @ weight.T
    return y if bias is None else y + bias


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pairs (i, i + head_dim / 2) of each head.

    x [n, heads, head_dim]; cos, sin [n, head_dim / 2] -> [n, heads, head_dim].
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Array) -> Array:
    """[..., s] -> [..., s], sums to 1 along the last axis; -inf becomes 0."""
    powers: Array = np.exp(x - np.max(x, axis=-1, keepdims=True))
    powers /= np.sum(powers, axis=-1, keepdims=True)
    return powers


def attention(
    q: Array, k: Array, v: Array, visible: NDArray[np.bool_] | None, rounded: Rounding
) -> Array:
    """Grouped-query attention: head h reads KV head h / (n_heads / n_kv_heads).

    q [n, n_heads, head_dim]; k, v [n_kv_heads, s, head_dim]; visible [n, s], None: all
    -> [n, n_heads, head_dim].
    """
    n, n_heads, head_dim = q.shape
    n_kv_heads, s, _ = k.shape
    group = n_heads // n_kv_heads
    grouped = q.reshape(n, n_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    scaled = (grouped / np.sqrt(q.dtype.type(head_dim))).reshape(n_kv_heads, group * n, head_dim)
    scores = (scaled @ k.swapaxes(1, 2)).reshape(n_kv_heads, group, n, s)
    if visible is not None:
        scores = np.where(visible, scores, q.dtype.type(-np.inf))
    probabilities = rounded("probability", softmax(scores))
    mixed = probabilities.reshape(n_kv_heads, group * n, s) @ v
    return (
        mixed.reshape(n_kv_heads, group, n, head_dim)
        .transpose(2, 0, 1, 3)
        .reshape(n, n_heads, head_dim)
    )


def visibility(
    positions: NDArray[np.int64], keys: NDArray[np.int64], window: int
) -> NDArray[np.bool_]:
    """Which keys a query sees: none after itself, and the last ``window`` of the others (0: all).

    positions [n], keys [s] -> bool [n, s].
    """
    distance = positions[:, None] - keys[None, :]
    return (distance >= 0) & (distance < window) if window else distance >= 0


def swiglu(gate: Array, up: Array) -> Array:
    """[n, hidden_dim] x 2 -> [n, hidden_dim]: silu(gate) * up, where silu(x) = x / (1 + e^-x)."""
    with np.errstate(over="ignore"):  # e^-x of a very negative x is infinite, and silu(x) then 0
        hidden: Array = gate / (1 + np.exp(-gate)) * up
    return hidden


def columns_first(values: Array, dtype: DTypeLike) -> Array:
    """A copy with contiguous columns, whose product with one vector is nearly twice as fast."""
    copy = np.empty(values.shape, dtype, order="F")
    for begin in range(0, len(values), 128):  # rows whose lines stay in the cache until all is read
        copy[begin : begin + 128] = values[begin : begin + 128]
    return copy


# The model


class Weights(Protocol):
    """What the reference needs of a ``Checkpoint``."""

    @property
    def config(self) -> ModelConfig: ...

    def matrix(self, name: str) -> Matrix: ...

    def vector(self, name: str) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, dequantized. Biases and norms that the model lacks are None."""

    window: int  # positions, 0: all
    attn_norm: Array  # [dim]
    wqkv: Array  # [(n_heads + 2 n_kv_heads) head_dim, dim]: queries, keys, values
    wqkv_bias: Array | None
    q_norm: Array | None  # [head_dim]
    k_norm: Array | None  # [head_dim]
    wo: Array  # [dim, n_heads head_dim]
    wo_bias: Array | None
    ffn_norm: Array  # [dim]
    w_gate_up: Array  # [2 hidden_dim, dim]: all gate rows, then all up rows
    w_gate_up_bias: Array | None
    w_down: Array  # [dim, hidden_dim]
    w_down_bias: Array | None


class Reference:
    """A model with its KV cache, one sequence.

    checkpoint: a ``Checkpoint``; its weights are dequantized here, once, and it may then be closed.
    dtype: np.float32 or np.float64, of all values and of the cache.
    max_context: positions the cache may grow to; default the model's own, which is also the limit.
    rounding: a function (name, values) -> values, applied where the kernel keeps fewer bits:
        "activation" (what enters a matrix product), "q", "k", "v", "probability" (of attention).
    """

    def __init__(
        self,
        checkpoint: Weights,
        *,
        dtype: DTypeLike = np.float32,
        max_context: int | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        self.config = checkpoint.config
        self.dtype = np.dtype(dtype)
        self.max_context = self.config.max_context if max_context is None else max_context
        if not 1 <= self.max_context <= self.config.max_context:
            raise ContextError(
                f"max_context must be from 1 to the model's own {self.config.max_context}, "
                f"found {self.max_context}"
            )
        self.length = 0  # positions that the cache holds
        self._rounded: Rounding = rounding or (lambda name, values: values)
        self._load(checkpoint)
        self._keys: Array  # [n_layers, n_kv_heads, capacity, head_dim]
        self._values: Array  # like _keys
        self._allocate(min(FIRST_CAPACITY, self.max_context))

    def forward(
        self,
        tokens: Sequence[int],
        position: int,
        *,
        length: int | None = None,
        all_logits: bool = False,
        hidden: bool = False,
    ) -> Array:
        """The logits after ``tokens``, which stand at ``position`` and the positions after it.

        tokens: ids, at least one. position: 0 .. ``self.length``; keys and values from there on are
        replaced. length: positions of the whole sequence for dynamic and longrope frequencies, when
        a prompt is cut into several calls; default position + len(tokens).
        Returns [vocab_size] of the last token, or [n, vocab_size] with ``all_logits``, or what
        enters the head, [n, dim], with ``hidden``.
        Raises ArgumentError (tokens, position, length) and ContextError (more than max_context).
        """
        ids = self._checked_tokens(tokens, position)
        end = position + len(ids)
        if length is None:
            length = end
        if length < end:
            raise ArgumentError(
                f"length must be at least position + tokens = {end}, found {length}"
            )
        if end > self._keys.shape[2]:
            self._allocate(min(self.max_context, max(end, 2 * self._keys.shape[2])))
        positions = np.arange(position, end)
        cos, sin = rotation(self.config.rope, self.config.head_dim, positions, length)
        turn = cos.astype(self.dtype), sin.astype(self.dtype)

        self.length = position  # an interrupt from here on leaves a valid, shorter cache
        x = self.embed[ids].astype(self.dtype)
        for index, layer in enumerate(self.layers):
            x = x + self._attention(index, layer, x, positions, turn)
            x = x + self._feed_forward(layer, x)
        self.length = end

        last = x if all_logits or hidden else x[-1:]
        normed = rms_norm(last, self.final_norm, self.config.norm_eps)
        if hidden:
            return normed
        logits = linear(self._rounded("activation", normed), self.lm_head)
        return logits if all_logits else logits[0]

    def cached(self, n: int) -> tuple[Array, Array]:
        """Copies of the first n positions' keys and values, [n_layers, n_kv_heads, n, head_dim]."""
        return self._keys[:, :, :n].copy(), self._values[:, :, :n].copy()

    def restore(self, keys: Array, values: Array) -> None:
        """The inverse of ``cached``."""
        self.length, n = 0, keys.shape[2]
        if n > self._keys.shape[2]:
            self._allocate(n)
        self._keys[:, :, :n], self._values[:, :, :n] = keys, values
        self.length = n

    def _attention(
        self,
        index: int,
        layer: Layer,
        x: Array,
        positions: NDArray[np.int64],
        turn: tuple[Array, Array],
    ) -> Array:
        """[n, dim] -> [n, dim]; appends the keys and values of the n tokens to the cache."""
        config, n, end = self.config, len(x), int(positions[-1]) + 1
        normed = self._rounded("activation", rms_norm(x, layer.attn_norm, config.norm_eps))
        qkv = linear(normed, layer.wqkv, layer.wqkv_bias).reshape(n, -1, config.head_dim)
        first_v = config.n_heads + config.n_kv_heads
        q, k, v = qkv[:, : config.n_heads], qkv[:, config.n_heads : first_v], qkv[:, first_v:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = (
                rms_norm(q, layer.q_norm, config.norm_eps),
                rms_norm(k, layer.k_norm, config.norm_eps),
            )
        q = self._rounded("q", rotate(q, *turn))
        self._keys[index, :, positions[0] : end] = self._rounded("k", rotate(k, *turn)).swapaxes(
            0, 1
        )
        self._values[index, :, positions[0] : end] = self._rounded("v", v).swapaxes(0, 1)
        blocks = [
            self._attend(
                index,
                layer.window,
                q[start : start + QUERY_BLOCK],
                positions[start : start + QUERY_BLOCK],
            )
            for start in range(0, n, QUERY_BLOCK)
        ]
        mixed = self._rounded("activation", np.concatenate(blocks).reshape(n, config.q_dim))
        return linear(mixed, layer.wo, layer.wo_bias)

    def _attend(self, index: int, window: int, q: Array, positions: NDArray[np.int64]) -> Array:
        """Attention of a block of queries over the part of the cache that any of them sees."""
        begin = max(0, int(positions[0]) - window + 1) if window else 0
        end = int(positions[-1]) + 1
        k, v = self._keys[index, :, begin:end], self._values[index, :, begin:end]
        visible = None if len(q) == 1 else visibility(positions, np.arange(begin, end), window)
        return attention(q, k, v, visible, self._rounded)

    def _feed_forward(self, layer: Layer, x: Array) -> Array:
        """[n, dim] -> [n, dim]."""
        normed = self._rounded("activation", rms_norm(x, layer.ffn_norm, self.config.norm_eps))
        gate, up = np.split(linear(normed, layer.w_gate_up, layer.w_gate_up_bias), 2, axis=1)
        return linear(
            self._rounded("activation", swiglu(gate, up)), layer.w_down, layer.w_down_bias
        )

    def _checked_tokens(self, tokens: Sequence[int], position: int) -> NDArray[np.int64]:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise ArgumentError(
                f"tokens must be a list of at least one token id, found {tokens!r:.100}"
            )
        bad = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(bad):
            raise ArgumentError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}, found {bad[0]}"
            )
        if not 0 <= position <= self.length:
            raise ArgumentError(
                f"position must be from 0 to {self.length}, the positions filled so far, "
                f"found {position}"
            )
        if position + len(ids) > self.max_context:
            raise ContextError(
                f"{position} + {len(ids)} positions exceed the context of {self.max_context}; "
                "load with a larger max_context, or shorten the prompt"
            )
        return ids.astype(np.int64)

    def _allocate(self, capacity: int) -> None:
        """Give the cache room for ``capacity`` positions; what it holds stays."""
        config = self.config
        shape = (config.n_layers, config.n_kv_heads, capacity, config.head_dim)
        keys, values = np.zeros(shape, self.dtype), np.zeros(shape, self.dtype)
        if self.length:
            keys[:, :, : self.length] = self._keys[:, :, : self.length]
            values[:, :, : self.length] = self._values[:, :, : self.length]
        self._keys, self._values = keys, values

    def _load(self, checkpoint: Weights) -> None:
        """Dequantize every weight, once."""
        config = self.config

        def matrix(name: str) -> Array:
            return columns_first(dequantize(checkpoint.matrix(name)), self.dtype)

        def gate_up(name: str) -> Array:
            both = np.concatenate(deinterleave(dequantize(checkpoint.matrix(name))))
            return columns_first(both, self.dtype)

        def vector(name: str, present: bool = True) -> Array | None:
            return checkpoint.vector(name).astype(self.dtype) if present else None

        def norm(name: str) -> Array:
            return checkpoint.vector(name).astype(self.dtype)

        def layer(index: int) -> Layer:
            name = f"layers.{index}."
            bias = vector(name + "w_gate_up_bias", config.mlp_bias)
            return Layer(
                window=config.windows[index],
                attn_norm=norm(name + "attn_norm"),
                wqkv=matrix(name + "wqkv"),
                wqkv_bias=vector(name + "wqkv_bias", config.qkv_bias),
                q_norm=vector(name + "q_norm", config.qk_norm),
                k_norm=vector(name + "k_norm", config.qk_norm),
                wo=matrix(name + "wo"),
                wo_bias=vector(name + "wo_bias", config.out_bias),
                ffn_norm=norm(name + "ffn_norm"),
                w_gate_up=gate_up(name + "w_gate_up"),
                w_gate_up_bias=None if bias is None else np.concatenate(deinterleave(bias)),
                w_down=matrix(name + "w_down"),
                w_down_bias=vector(name + "w_down_bias", config.mlp_bias),
            )

        self.embed = matrix("embed")
        self.layers = [layer(index) for index in range(config.n_layers)]
        self.final_norm = norm("final_norm")
        self.lm_head = self.embed if config.tied else matrix("lm_head")
