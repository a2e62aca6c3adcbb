"""A Hugging Face config.json made from the metadata of a GGUF file.

Keys: github.com/ggml-org/ggml, docs/gguf.md, "Standardized key-value pairs". A key that changes the
result and is not supported is an error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError

if TYPE_CHECKING:
    from .gguf import GGUFFile

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_LLAMA3_FREQS = (
    1.0,
    4.0,
    8192,
)  # low_freq_factor, high_freq_factor, original context of every Llama 3.x


def hf_config(gguf: GGUFFile) -> dict[str, Any]:
    """The dict that config.json of the same model would hold. Raises ConfigError."""
    facts = _Facts(gguf)
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[facts.architecture]],
        "model_type": facts.architecture,
        "vocab_size": facts.vocab_size(),
        "hidden_size": facts.integer("embedding_length"),
        "intermediate_size": facts.integer("feed_forward_length"),
        "num_hidden_layers": facts.integer("block_count"),
        "num_attention_heads": facts.integer("attention.head_count"),
        "max_position_embeddings": facts.integer("context_length"),
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    config["num_key_value_heads"] = facts.integer(
        "attention.head_count_kv", config["num_attention_heads"]
    )
    config["head_dim"] = facts.head_dim(config["hidden_size"], config["num_attention_heads"])
    config["rope_theta"] = facts.real("rope.freq_base", 10000.0)
    config["rope_scaling"] = facts.rope_scaling(config["rope_theta"], config["head_dim"])
    config.update(facts.biases())
    config.update(facts.window(config["max_position_embeddings"]))
    config.update(token_ids(gguf))
    return config


def token_ids(gguf: GGUFFile) -> dict[str, Any]:
    """bos_token_id and eos_token_id; the latter a list when a turn ends with a token of its own."""
    ids: dict[str, Any] = {}
    metadata = gguf.metadata
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if isinstance(bos, int):
        ids["bos_token_id"] = bos
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    if distinct:
        ids["eos_token_id"] = distinct if len(distinct) > 1 else distinct[0]
    return ids


class _Facts:
    """Typed access to the keys that begin with the architecture's name."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        architecture = gguf.metadata.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise self.error(
                f"general.architecture is {architecture!r}; supported are "
                f"{', '.join(_ARCHITECTURES)} (Mistral and SmolLM2 files say llama)"
            )
        self.architecture = str(architecture)
        if self.get("expert_count"):
            raise self.error("it is a mixture of experts, which is not supported")

    def get(self, key: str) -> Any:
        return self.gguf.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if (
            isinstance(value, np.ndarray)
            and len(value)
            and value.dtype.kind in "iu"
            and (value == value[0]).all()
        ):
            value = int(value[0])  # one number per layer, all the same
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.error(
                f"{self.architecture}.{key} is {_shown(value)}; a positive integer is needed"
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A float32 in its shortest decimal form: 1e-05, not 9.999999747378752e-06."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.error(
                f"{self.architecture}.{key} is {_shown(value)}; a positive number is needed"
            )
        return float(str(np.float32(value)))

    def vocab_size(self) -> int:
        embedding = self.gguf.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise self.error("the matrix token_embd.weight is missing")
        tokens = self.gguf.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) > embedding.shape[0]:
            raise self.error(
                f"the tokenizer has {len(tokens)} tokens, the embedding {embedding.shape[0]} rows"
            )
        return embedding.shape[0]

    def head_dim(self, dim: int, heads: int) -> int:
        size = self.integer("attention.key_length", max(1, dim // heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.integer(key, size) != size:
                raise self.error(
                    f"{self.architecture}.{key} is {self.get(key)}; "
                    f"another number than the head size, {size}, is not supported"
                )
        return size

    def biases(self) -> dict[str, Any]:
        tensors = self.gguf.tensors
        qkv, out = "blk.0.attn_q.bias" in tensors, "blk.0.attn_output.bias" in tensors
        mlp = "blk.0.ffn_gate.bias" in tensors
        if self.architecture == "llama":
            if qkv != out:
                raise self.error(
                    "biases for only one of the q, k, v and the output projection are not supported"
                )
            return {"attention_bias": qkv, "mlp_bias": mlp}
        if mlp or (self.architecture == "qwen2" and (out or not qkv)):
            raise self.error(
                f"the tensors of layer 0 do not have the biases of {self.architecture}"
            )
        return {"attention_bias": qkv} if self.architecture == "qwen3" else {}

    def window(self, context: int) -> dict[str, Any]:
        """A sliding window makes a llama file a Mistral model."""
        window = self.integer("attention.sliding_window", context)
        if window >= context:
            return {} if self.architecture == "llama" else {"use_sliding_window": False}
        if (
            self.architecture != "llama"
            or self.biases()["attention_bias"]
            or self.biases()["mlp_bias"]
        ):
            raise self.error(
                f"a sliding window of {window} is only supported for Mistral (llama without biases)"
            )
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": window,
        }

    def rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        kind = self.get("rope.scaling.type")
        if kind is None and self.get("rope.scale_linear") is not None:
            kind = "linear"
        if "rope_freqs.weight" in self.gguf.tensors:
            if kind not in (None, "none"):
                raise self.error(f"rope_freqs.weight together with {kind} scaling is not supported")
            return self.llama3(self.factors("rope_freqs.weight", head_dim), theta, head_dim)
        if kind in (None, "none"):
            return None
        if kind == "linear":
            factor = self.real("rope.scaling.factor", self.real("rope.scale_linear", 1.0))
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            return self.yarn()
        if kind == "longrope":
            return self.longrope(head_dim)
        raise self.error(
            f"rope scaling {kind!r} is not supported; linear, yarn, longrope and llama3 are"
        )

    def yarn(self) -> dict[str, Any]:
        for key in ("attn_factor", "yarn_log_multiplier", "yarn_attn_factor", "yarn_ext_factor"):
            value = self.get(f"rope.scaling.{key}")
            if value not in (None, 0.0 if key == "yarn_log_multiplier" else 1.0):
                raise self.error(
                    f"{self.architecture}.rope.scaling.{key} = {value} is not supported"
                )
        return {
            "rope_type": "yarn",
            "factor": self.real("rope.scaling.factor"),
            "original_max_position_embeddings": self.integer(
                "rope.scaling.original_context_length"
            ),
            "beta_fast": self.real("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self.real("rope.scaling.yarn_beta_slow", 1.0),
        }

    def longrope(self, head_dim: int) -> dict[str, Any]:
        return {
            "rope_type": "longrope",
            "short_factor": self.factors("rope_factors_short.weight", head_dim).tolist(),
            "long_factor": self.factors("rope_factors_long.weight", head_dim).tolist(),
            "original_max_position_embeddings": self.integer(
                "rope.scaling.original_context_length"
            ),
            "attention_factor": self.real("rope.scaling.attn_factor", 1.0),
        }

    def factors(self, name: str, head_dim: int) -> NDArray[np.float32]:
        """The divisors of the rotation frequencies, float32 [head_dim / 2]."""
        tensor = self.gguf.tensors.get(name)
        if tensor is None or tensor.type != "F32" or tensor.shape != (head_dim // 2,):
            raise self.error(
                f"rope scaling needs the tensor {name}, F32 of shape ({head_dim // 2},)"
            )
        return self.gguf.values(name)

    def llama3(
        self, divisors: NDArray[np.float32], theta: float, head_dim: int
    ) -> dict[str, Any] | None:
        """Finds the llama3 parameters behind rope_freqs.weight: its last divisor is the factor."""
        if (divisors == 1).all():
            return None
        factor = float(divisors[-1])
        low, high, context = _LLAMA3_FREQS
        expected = _llama3_divisors(factor, theta, head_dim)
        if not np.allclose(divisors, expected, rtol=1e-4, atol=0):
            worst = int(np.argmax(np.abs(divisors / expected - 1)))
            raise self.error(
                f"rope_freqs.weight is not the llama3 scaling with factor {factor:g}: element "
                f"{worst} is {divisors[worst]:g}, not {expected[worst]:g}; "
                "convert the original Hugging Face model instead"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(context),
        }

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.gguf.path}: {message}")


def _llama3_divisors(factor: float, theta: float, head_dim: int) -> NDArray[np.float64]:
    """What llama3 scaling divides each frequency by, float64 [head_dim / 2].

    Source: transformers, modeling_rope_utils.
    """
    low, high, context = _LLAMA3_FREQS
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]
