"""ModelConfig: the facts of a model. Every quirk of a config.json is resolved here, once.

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
from dataclasses import dataclass, replace
from typing import Any

from .errors import ConfigError
from .json_keys import REQUIRED, JsonKeys

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

# Keys of other models that change the result. Only these values, null or a missing key will do.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleaved": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "clip_qkv": (),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "no_rope_layers": ([],),
    "attention_chunk_size": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "alibi": (False,),
}


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
        keys = JsonKeys(config, source)
        architecture = _architecture(keys)
        qwen = architecture in ("qwen2", "qwen3")
        _reject_unsupported(keys, architecture)
        n_heads = keys.integer("num_attention_heads", 1, MAX_HEADS)
        dim = keys.integer("hidden_size", 1, MAX_DIM)
        head_dim = _head_dim(keys, architecture, dim, n_heads)
        n_layers = keys.integer("num_hidden_layers", 1, MAX_LAYERS)
        vocab_size = keys.integer("vocab_size", 1, MAX_VOCAB)
        default_positions = {"llama": 2048, "mistral": 131072}.get(architecture, 32768)
        positions = keys.integer("max_position_embeddings", 1, MAX_CONTEXT, default_positions)
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
            bos_token_ids=keys.token_ids("bos_token_id", vocab_size, None if qwen else 1),
            eos_token_ids=keys.token_ids("eos_token_id", vocab_size, None if qwen else 2),
        )


def _architecture(keys: JsonKeys) -> str:
    """llama, mistral, qwen2 or qwen3, from ``architectures`` and ``model_type``."""
    supported = ", ".join(ARCHITECTURES)
    names = keys.names("architectures", f"a list of names, one of them {supported}")
    model_type = keys.get("model_type")
    if not names:
        if model_type not in list(ARCHITECTURES.values()):
            types = ", ".join(ARCHITECTURES.values())
            raise keys.error("model_type", f"one of {types} when architectures is left out")
        return str(model_type)
    found = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if not found:
        raise ConfigError(
            f"{keys.source}: architecture {', '.join(names):.100} is not supported; "
            f"supported architectures: {supported}"
        )
    if model_type is not None and model_type != found[0]:
        raise keys.error("model_type", f"{found[0]!r}, as architectures says")
    return found[0]


def _reject_unsupported(keys: JsonKeys, architecture: str) -> None:
    for key, accepted in _NEUTRAL.items():
        value = keys.get(key)
        same = [
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted
        ]
        if value is not None and not any(same):
            allowed = " or ".join(repr(one) for one in accepted) or "left out"
            rule = f"{allowed}: anything else changes the result and is not supported"
            raise keys.error(key, rule)
    biased = {"attention_bias": ("llama", "qwen2", "qwen3"), "mlp_bias": ("llama",)}
    for key, architectures in biased.items():
        if keys.boolean(key, False) and architecture not in architectures:
            raise keys.error(key, f"false: {architecture} models have no such biases")
    if keys.get("quantization_config") is None:
        return
    quantization = JsonKeys(keys.get("quantization_config"), keys.source, "quantization_config.")
    if quantization.get("quant_method") not in QUANT_METHODS:
        rule = f"{' or '.join(QUANT_METHODS)}; convert from the unquantized model or a GGUF file"
        raise quantization.error("quant_method", rule)


def _hidden_dim(keys: JsonKeys) -> int:
    value = keys.integer("intermediate_size", 8, MAX_HIDDEN_DIM)
    if value % 8:  # w_gate_up interleaves its rows in turns of 8
        raise keys.error("intermediate_size", "a multiple of 8")
    return value


def _head_dim(keys: JsonKeys, architecture: str, dim: int, n_heads: int) -> int:
    """``head_dim``; where it is left out, hidden_size / num_attention_heads (qwen3: 128)."""
    derived = keys.get("head_dim") is None and architecture != "qwen3"
    if derived and dim % (2 * n_heads):
        rule = f"a multiple of 2 x num_attention_heads ({n_heads}) when head_dim is left out"
        raise keys.error("hidden_size", rule)
    value = keys.integer("head_dim", 2, MAX_HEAD_DIM, dim // n_heads if derived else 128)
    if value % 2:
        raise keys.error("head_dim", "even: rotary embedding turns pairs")
    return value


def _n_kv_heads(keys: JsonKeys, architecture: str, n_heads: int) -> int:
    # A null means "as many as heads" everywhere, a missing key only for llama.
    missing = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(architecture, n_heads)
    default = n_heads if "num_key_value_heads" in keys.values else missing
    value = keys.integer("num_key_value_heads", 1, MAX_HEADS, default)
    if n_heads % value:
        rule = f"a divisor of num_attention_heads, {n_heads} (left out, it means {missing})"
        raise keys.error("num_key_value_heads", rule)
    return value


def _windows(keys: JsonKeys, architecture: str, n_layers: int) -> tuple[int, ...]:
    """Per layer the sliding window, 0 for full attention.

    llama has none. mistral applies ``sliding_window`` (4096 when the key is missing, none when it
    is null) to all layers. qwen applies it only with ``use_sliding_window``, to the layers that
    ``layer_types`` names or else to those from ``max_window_layers`` on.
    """
    window = _window_size(keys, architecture)
    qwen = architecture in ("qwen2", "qwen3")
    first = keys.integer("max_window_layers", 0, 1 << 31, 28) if qwen else 0
    windows = tuple(window if layer >= first else 0 for layer in range(n_layers))
    types = keys.names("layer_types", "a list of names")
    if not types:
        return windows
    named = {"full_attention": 0, "attention": 0, "sliding_attention": window}
    if len(types) != n_layers or not set(types) <= set(named):
        rule = f"num_hidden_layers ({n_layers}) times full_attention or sliding_attention"
        raise keys.error("layer_types", rule)
    chosen = tuple(named[name] for name in types)
    if "sliding_attention" in types and not window:
        rule = f"full_attention throughout: no sliding window is set for this {architecture} model"
        raise keys.error("layer_types", rule)
    if not qwen and chosen != windows:
        rule = f"what sliding_window says: {architecture} models treat all layers alike"
        raise keys.error("layer_types", rule)
    return chosen


def _window_size(keys: JsonKeys, architecture: str) -> int:
    qwen = architecture in ("qwen2", "qwen3")
    if architecture == "llama" or (qwen and not keys.boolean("use_sliding_window", False)):
        return 0
    if "sliding_window" in keys.values and keys.get("sliding_window") is None:
        return 0
    return keys.integer("sliding_window", 1, MAX_CONTEXT, 4096)


def _rope(keys: JsonKeys, head_dim: int, positions: int) -> RopeConfig:
    scaling, parameters = keys.get("rope_scaling") or {}, keys.get("rope_parameters") or {}
    if scaling and parameters and scaling != parameters:
        raise keys.error("rope_scaling", "equal to rope_parameters when both are given")
    name = "rope_scaling" if scaling else "rope_parameters"
    rope = JsonKeys(scaling or parameters, keys.source, f"{name}.")
    if "full_attention" in rope.values or "sliding_attention" in rope.values:
        raise keys.error(name, "one set of values for all layers, not one per layer type")
    key = "type" if rope.get("rope_type") is None else "rope_type"
    kind = rope.get(key, "default")
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise rope.error(key, f"one of {', '.join(ROPE_KINDS)}")
    if rope.number("partial_rotary_factor", 0, 1, 1) != 1:
        raise rope.error("partial_rotary_factor", "1: partial rotation is not supported")
    inside = rope.get("rope_theta") is not None
    theta = (rope if inside else keys).number("rope_theta", 1.001, 1e15, 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    original = _original_context(keys, rope, kind, positions)
    scaled = RopeConfig(kind, theta, _rope_factor(rope, kind, positions / original), original)
    return replace(scaled, **_rope_details(keys, rope, kind, head_dim))


def _original_context(keys: JsonKeys, rope: JsonKeys, kind: str, positions: int) -> int:
    if kind not in ("llama3", "yarn", "longrope"):
        return positions
    # A value beside the rope parameters wins over the one inside them, as in transformers.
    name = "original_max_position_embeddings"
    holder = rope if keys.get(name) is None else keys
    return holder.integer(name, 2, MAX_CONTEXT, max(positions, 2))


def _rope_factor(rope: JsonKeys, kind: str, ratio: float) -> float:
    # longrope may leave it out and yarn may say null: the ratio of the two contexts then.
    derived = kind == "longrope" or (kind == "yarn" and "factor" in rope.values)
    return rope.number("factor", 1e-6, 1e6, ratio if derived else REQUIRED)


def _rope_details(keys: JsonKeys, rope: JsonKeys, kind: str, head_dim: int) -> dict[str, Any]:
    """The fields of RopeConfig that only one or two kinds have."""
    if kind == "dynamic" and head_dim == 2:
        raise keys.error("head_dim", "at least 4 with dynamic RoPE")  # it divides by head_dim - 2
    if kind == "llama3":
        low = rope.number("low_freq_factor", 1e-6, 1e6)
        high = rope.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            raise rope.error("high_freq_factor", f"greater than low_freq_factor ({low:g})")
        return {"low_freq_factor": low, "high_freq_factor": high}
    if kind == "longrope":
        return {
            "attention_factor": rope.optional_number("attention_factor", 0, 1e6),
            "short_factor": rope.numbers("short_factor", head_dim // 2, 1e-9, 1e9),
            "long_factor": rope.numbers("long_factor", head_dim // 2, 1e-9, 1e9),
        }
    if kind == "yarn":
        return {
            "attention_factor": rope.optional_number("attention_factor", 0, 1e6),
            "beta_fast": rope.number("beta_fast", 0, 1e6, 32.0) or 32.0,
            "beta_slow": rope.number("beta_slow", 0, 1e6, 1.0) or 1.0,
            "mscale": rope.optional_number("mscale", 0, 1e6),
            "mscale_all_dim": rope.optional_number("mscale_all_dim", 0, 1e6),
            "truncate": rope.boolean("truncate", True),
        }
    return {}


def _max_context(rope: RopeConfig, positions: int) -> int:
    if rope.kind not in ("linear", "dynamic", "yarn"):
        return positions
    return min(MAX_CONTEXT, max(positions, math.floor(rope.original_context * rope.factor)))
