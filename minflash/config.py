"""ModelConfig: the facts of a model. Every quirk of a Hugging Face config.json is resolved here, once.

The keys, their defaults and their meaning are those of the transformers library, version 5
(``configuration_llama.py``, ``configuration_mistral.py``, ``configuration_qwen2.py``,
``configuration_qwen3.py`` and ``modeling_rope_utils.py``). Three rules:

- A shape that is missing is an error; other keys that are missing take transformers' default.
- A key that would change the result and is not supported is an error, never ignored.
- An error names the file, the key, the value found and the rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
QUANT_METHODS = ("minflash",)

# Largest values that are believed. Real models stay far below; a damaged file is caught here and
# not by an allocation of terabytes.
MAX_DIM = 1 << 17
MAX_HIDDEN_DIM = 1 << 20
MAX_HEAD_DIM = 1 << 10
MAX_HEADS = 1 << 12
MAX_LAYERS = 1 << 10
MAX_VOCAB = 1 << 24
MAX_CONTEXT = 1 << 27

# Keys of other models that change the result. Only these values (or a missing key) are accepted.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rope_interleaved": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "clip_qkv": (None,),
    "qk_layernorm": (None, False),
    "use_qk_norm": (None, False),
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "alibi": (None, False),
}  # fmt: skip


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; fields keep the names of Hugging Face's ``rope_parameters``.

    ``from_hf`` resolves ``factor`` and ``original_context``, so that ``rope.frequencies`` needs
    nothing else: for dynamic, ``original_context`` is the config's max_position_embeddings.
    """

    kind: str = "default"  # default, linear, dynamic, llama3, yarn, longrope
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0  # original_max_position_embeddings; positions
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and semantics of one decoder-only transformer."""

    architecture: str  # llama, mistral, qwen2, qwen3
    dim: int
    hidden_dim: int
    head_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_context: int  # positions
    norm_eps: float
    rope: RopeConfig
    tied: bool  # the output head is the embedding
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # per layer: positions a query sees, itself included; 0: all
    bos_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    @property
    def q_dim(self) -> int:
        """Rows of the query projection."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.n_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
        """The meaning of a Hugging Face config.json.

        config: the parsed file. source: its name, for messages. Raises ConfigError.

        ``max_context`` is max_position_embeddings, except where RoPE scaling reaches further:
        times ``factor`` for linear and dynamic, original context times ``factor`` for yarn.
        """
        keys = _Keys(config, source)
        architecture = _architecture(keys)
        _reject_unsupported(keys, architecture)
        n_heads = keys.integer("num_attention_heads", 1, MAX_HEADS)
        dim = keys.integer("hidden_size", 1, MAX_DIM)
        head_dim = _head_dim(keys, architecture, dim, n_heads)
        n_layers = keys.integer("num_hidden_layers", 1, MAX_LAYERS)
        vocab_size = keys.integer("vocab_size", 1, MAX_VOCAB)
        positions = keys.integer(
            "max_position_embeddings",
            1,
            MAX_CONTEXT,
            {"llama": 2048, "mistral": 131072}.get(architecture, 32768),
        )
        rope = _rope(keys, head_dim, positions)
        optional_bias = architecture in ("llama", "qwen3") and keys.boolean("attention_bias", False)
        return cls(
            architecture=architecture,
            dim=dim,
            hidden_dim=_hidden_dim(keys),
            head_dim=head_dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=_n_kv_heads(keys, architecture, n_heads),
            vocab_size=vocab_size,
            max_context=_max_context(rope, positions),
            norm_eps=keys.number("rms_norm_eps", 1e-12, 1.0, 1e-6),
            rope=rope,
            tied=keys.boolean("tie_word_embeddings", False),
            qkv_bias=architecture == "qwen2" or optional_bias,
            out_bias=optional_bias,
            mlp_bias=architecture == "llama" and keys.boolean("mlp_bias", False),
            qk_norm=architecture == "qwen3",
            windows=_windows(keys, architecture, n_layers),
            bos_token_ids=keys.token_ids(
                "bos_token_id", vocab_size, 1 if architecture in ("llama", "mistral") else None
            ),
            eos_token_ids=keys.token_ids(
                "eos_token_id", vocab_size, 2 if architecture in ("llama", "mistral") else None
            ),
        )


_REQUIRED: Any = object()


class _Keys:
    """Checked access to a mapping of JSON values. A null counts as a missing key unless said."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        if not isinstance(values, Mapping):
            where = f"{source}: {prefix.rstrip('.')}" if prefix else source
            raise ConfigError(f"{where} must be a JSON object, found {type(values).__name__}")
        self.values, self.source, self.prefix = values, source, prefix

    def error(self, key: str, rule: str) -> ConfigError:
        found = repr(self.values[key]) if key in self.values else "nothing"
        if len(found) > 100:
            found = found[:97] + "..."
        return ConfigError(f"{self.source}: {self.prefix}{key} must be {rule}, found {found}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def _value(self, key: str, default: Any, rule: str) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise self.error(key, f"{rule} and cannot be left out")
        return value

    def integer(self, key: str, low: int, high: int, default: Any = _REQUIRED) -> int:
        rule = f"an integer from {low} to {high}"
        value = self._value(key, default, rule)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, rule)
        return value

    def number(self, key: str, low: float, high: float, default: Any = _REQUIRED) -> float:
        rule = f"a finite number from {low:g} to {high:g}"
        value = self._value(key, default, rule)
        # Comparing comes before float(): an integer of 400 digits has no float. NaN fails it too.
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
        ):
            raise self.error(key, rule)
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        return None if self.get(key) is None else self.number(key, low, high)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def factors(self, key: str, count: int) -> tuple[float, ...]:
        rule = f"a list of {count} finite positive numbers (head_dim / 2)"
        values = self.get(key)
        if not isinstance(values, (list, tuple)) or len(values) != count:
            raise self.error(key, rule)
        for value in values:
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 1e-9 <= value <= 1e9
            ):
                raise self.error(key, rule)
        return tuple(float(value) for value in values)

    def token_ids(self, key: str, vocab_size: int, default: int | None) -> tuple[int, ...]:
        """An id, a list of ids or null; a missing key is ``default`` where the vocabulary has it."""
        if key not in self.values:
            return () if default is None or default >= vocab_size else (default,)
        value = self.values[key]
        ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise self.error(
                    key,
                    f"a token id from 0 to {vocab_size - 1} (vocab_size - 1), a list of them, or null",
                )
        return tuple(ids)


def _architecture(keys: _Keys) -> str:
    """llama, mistral, qwen2 or qwen3, from ``architectures`` and ``model_type``."""
    supported = ", ".join(ARCHITECTURES)
    names, model_type = keys.get("architectures", []), keys.get("model_type")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise keys.error("architectures", f"a list of names, one of them {supported}")
    if not names:
        if model_type not in ARCHITECTURES.values():
            raise keys.error(
                "model_type",
                f"one of {', '.join(ARCHITECTURES.values())} when architectures is missing",
            )
        return str(model_type)
    found = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if not found:
        raise ConfigError(
            f"{keys.source}: architecture {', '.join(names)} is not supported; supported architectures: {supported}"
        )
    if model_type is not None and model_type != found[0]:
        raise keys.error(
            "model_type", f"{found[0]!r}, which is what architectures {list(names)} says"
        )
    return found[0]


def _reject_unsupported(keys: _Keys, architecture: str) -> None:
    for key, accepted in _NEUTRAL.items():
        value = keys.get(key)
        if not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted
        ):
            choices = " or ".join(repr(one) for one in accepted if one is not None)
            raise keys.error(
                key,
                f"{choices or 'left out'}: anything else changes the result and is not supported",
            )
    for key, allowed in (("attention_bias", ("llama", "qwen2", "qwen3")), ("mlp_bias", ("llama",))):
        if keys.boolean(key, False) and architecture not in allowed:
            raise keys.error(key, f"false: {architecture} models have no such biases")
    quantization = keys.get("quantization_config")
    if quantization is not None:
        method = _Keys(quantization, keys.source, "quantization_config.")
        if method.get("quant_method") not in QUANT_METHODS:
            raise method.error(
                "quant_method",
                f"one of {', '.join(QUANT_METHODS)} (convert from the unquantized checkpoint or from a GGUF file)",
            )


def _hidden_dim(keys: _Keys) -> int:
    value = keys.integer("intermediate_size", 8, MAX_HIDDEN_DIM)
    if value % 8:  # w_gate_up interleaves its rows in turns of 8
        raise keys.error("intermediate_size", "a multiple of 8")
    return value


def _head_dim(keys: _Keys, architecture: str, dim: int, n_heads: int) -> int:
    default = 128 if architecture == "qwen3" else dim // n_heads
    if keys.get("head_dim") is None:
        if architecture != "qwen3" and dim % n_heads:
            raise keys.error(
                "hidden_size",
                f"a multiple of num_attention_heads ({n_heads}) when head_dim is left out",
            )
        if default % 2 or not 2 <= default <= MAX_HEAD_DIM:
            rule = (
                f"even and from 2 to {MAX_HEAD_DIM}; hidden_size / num_attention_heads is {default}"
            )
            raise keys.error("head_dim", rule)
    value = keys.integer("head_dim", 2, MAX_HEAD_DIM, default)
    if value % 2:
        raise keys.error("head_dim", "even (rotary embedding turns pairs)")
    return value


def _n_kv_heads(keys: _Keys, architecture: str, n_heads: int) -> int:
    # A null means "as many as heads" everywhere; a missing key only for llama.
    missing = "num_key_value_heads" not in keys.values
    default = (
        {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(architecture, n_heads) if missing else n_heads
    )
    value = keys.integer("num_key_value_heads", 1, MAX_HEADS, default)
    if n_heads % value:
        raise keys.error(
            "num_key_value_heads",
            f"a divisor of num_attention_heads ({n_heads}; default {default})",
        )
    return value


def _windows(keys: _Keys, architecture: str, n_layers: int) -> tuple[int, ...]:
    """Per layer the sliding window, 0 for full attention.

    llama has none. mistral applies ``sliding_window`` (4096 when the key is missing, none when it
    is null) to all layers. qwen applies it only with ``use_sliding_window``, to the layers that
    ``layer_types`` names or else to those from ``max_window_layers`` on.
    """
    window = _window_size(keys, architecture)
    first = (
        keys.integer("max_window_layers", 0, 1 << 31, 28)
        if architecture in ("qwen2", "qwen3")
        else 0
    )
    windows = tuple(window if layer >= first else 0 for layer in range(n_layers))
    types = keys.get("layer_types")
    if types is None:
        return windows
    named = {"full_attention": 0, "attention": 0, "sliding_attention": window}
    if not isinstance(types, (list, tuple)) or len(types) != n_layers:
        raise keys.error("layer_types", f"a list of num_hidden_layers ({n_layers}) names")
    if not all(isinstance(kind, str) and kind in named for kind in types):
        raise keys.error("layer_types", "made of full_attention and sliding_attention")
    if "sliding_attention" in types and not window:
        raise keys.error(
            "layer_types",
            f"full_attention throughout: this {architecture} config sets no sliding window",
        )
    chosen = tuple(named[kind] for kind in types)
    if architecture == "mistral" and chosen != windows:
        raise keys.error(
            "layer_types", "the same for all layers and agree with sliding_window (mistral)"
        )
    return chosen


def _window_size(keys: _Keys, architecture: str) -> int:
    if architecture == "llama":
        return 0
    if architecture != "mistral" and not keys.boolean("use_sliding_window", False):
        return 0
    if "sliding_window" in keys.values and keys.values["sliding_window"] is None:
        return 0
    return keys.integer("sliding_window", 1, MAX_CONTEXT, 4096)


def _rope(keys: _Keys, head_dim: int, positions: int) -> RopeConfig:
    scaling, parameters = keys.get("rope_scaling") or {}, keys.get("rope_parameters") or {}
    if scaling and parameters and scaling != parameters:
        raise keys.error(
            "rope_scaling", "left out, or equal to rope_parameters, when rope_parameters is given"
        )
    name = "rope_scaling" if scaling else "rope_parameters"
    rope = _Keys(scaling or parameters, keys.source, f"{name}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise rope.error(
            "rope_type" if "rope_type" in rope.values else "type", f"one of {', '.join(ROPE_KINDS)}"
        )
    if any(name in rope.values for name in ("full_attention", "sliding_attention")):
        raise keys.error(
            name, "one set of values for all layers; values per layer type are not supported"
        )
    if rope.number("partial_rotary_factor", 0, 1, 1) != 1:
        raise rope.error("partial_rotary_factor", "1: partial rotation is not supported")
    theta = (rope if rope.get("rope_theta") is not None else keys).number(
        "rope_theta", 1.0001, 1e15, 10000.0
    )
    if kind == "default":
        return RopeConfig(theta=theta)
    return _scaled_rope(keys, rope, kind, theta, head_dim, positions)


def _scaled_rope(
    keys: _Keys, rope: _Keys, kind: str, theta: float, head_dim: int, positions: int
) -> RopeConfig:
    # A value beside the rope parameters wins over the one inside them, as in transformers.
    holder = keys if keys.get("original_max_position_embeddings") is not None else rope
    original = positions
    if kind in ("llama3", "yarn", "longrope"):
        original = holder.integer(
            "original_max_position_embeddings", 2, MAX_CONTEXT, max(positions, 2)
        )
    default_factor = (
        positions / original
        if kind == "longrope" or (kind == "yarn" and "factor" in rope.values)
        else _REQUIRED
    )
    factor = rope.number("factor", 1e-6, 1e6, default_factor)
    if kind in ("linear", "dynamic"):
        if kind == "dynamic" and head_dim == 2:
            raise keys.error(
                "head_dim", "at least 4 with dynamic RoPE, whose formula divides by head_dim - 2"
            )
        return RopeConfig(kind, theta, factor, original)
    if kind == "llama3":
        low = rope.number("low_freq_factor", 1e-6, 1e6)
        high = rope.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            raise rope.error("high_freq_factor", f"greater than low_freq_factor ({low:g})")
        return RopeConfig(kind, theta, factor, original, low, high)
    attention = rope.optional_number("attention_factor", 0, 1e6)
    if kind == "longrope":
        short, long = (
            rope.factors("short_factor", head_dim // 2),
            rope.factors("long_factor", head_dim // 2),
        )
        return RopeConfig(
            kind,
            theta,
            factor,
            original,
            attention_factor=attention,
            short_factor=short,
            long_factor=long,
        )
    return RopeConfig(
        kind, theta, factor, original,
        beta_fast=rope.number("beta_fast", 0, 1e6, 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 0, 1e6, 1.0) or 1.0,
        attention_factor=attention,
        mscale=rope.optional_number("mscale", 0, 1e6),
        mscale_all_dim=rope.optional_number("mscale_all_dim", 0, 1e6),
        truncate=rope.boolean("truncate", True),
    )  # fmt: skip


def _max_context(rope: RopeConfig, positions: int) -> int:
    if rope.kind not in ("linear", "dynamic", "yarn"):
        return positions
    return min(MAX_CONTEXT, max(positions, math.floor(rope.original_context * rope.factor)))
