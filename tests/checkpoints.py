"""Small random Hugging Face checkpoints, the same on every machine and with every NumPy.

The weights come from an integer hash (the finaliser of SplitMix64, Steele et al., OOPSLA 2014), not
from a random generator whose stream may change. ``CASES`` names one checkpoint per architecture and
quirk; tests/golden/ holds the logits of transformers for each (tools/make_golden.py).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minflash.config import ModelConfig
from minflash.numeric import bf16_to_fp32, fp32_to_bf16
from minflash.packing import Layout, Matrix, interleave

Tensors = dict[str, NDArray[Any]]  # bf16 tensors are uint16 bit patterns


def hashed(seed: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Uniform multiples of 2^-23 in [-1, 1) that depend on the text ``seed`` and nothing else."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64(zlib.crc32(seed.encode())) * np.uint64(0x9E3779B97F4A7C15)
        z = z + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    top = (z >> np.uint64(40)).astype(np.float64)  # 24 bits
    return (top / 2**23 - 1).astype(np.float32).reshape(shape)


def _base(architecture: str, model_type: str, **keys: Any) -> dict[str, Any]:
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 257,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {**config, **keys}


def _llama(**keys: Any) -> dict[str, Any]:
    return _base("LlamaForCausalLM", "llama", **keys)


def _mistral(**keys: Any) -> dict[str, Any]:
    return _base("MistralForCausalLM", "mistral", **keys)


def _qwen2(**keys: Any) -> dict[str, Any]:
    return _base("Qwen2ForCausalLM", "qwen2", **keys)


def _qwen3(**keys: Any) -> dict[str, Any]:
    return _base("Qwen3ForCausalLM", "qwen3", **keys)


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_QWEN_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 1.5,
    "mscale_all_dim": 0.5,
    "truncate": False,
}
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
}


def _heads(n_heads: int, n_kv_heads: int, dim: int) -> dict[str, int]:
    return {
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "hidden_size": dim,
    }


# Case name -> config.json. A prompt has 48 tokens: it crosses every window and original context,
# except that of llama_longrope_short.
CASES: dict[str, dict[str, Any]] = {
    "llama2": _llama(),
    "llama_biases": _llama(**_heads(3, 1, 96), attention_bias=True, mlp_bias=True, vocab_size=331),
    "llama_head_dim_96": _llama(**_heads(2, 1, 192), vocab_size=331),
    "llama3": _llama(
        **_heads(4, 2, 64), rope_scaling=_LLAMA3, rope_theta=500000.0, eos_token_id=[2, 3]
    ),
    "llama3_parameters": _llama(
        head_dim=32, rope_theta=None, rope_parameters={**_LLAMA3, "rope_theta": 500000.0}
    ),
    "smollm2": _llama(
        **_heads(9, 3, 288), intermediate_size=160, tie_word_embeddings=True, rope_theta=100000.0
    ),
    "llama_linear": _llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_dynamic": _llama(
        rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=32
    ),
    "llama_yarn": _llama(rope_scaling=_YARN, max_position_embeddings=64, tie_word_embeddings=True),
    "llama_longrope_short": _llama(
        rope_scaling=_LONGROPE, original_max_position_embeddings=64, max_position_embeddings=256
    ),
    "llama_longrope": _llama(
        rope_scaling={**_LONGROPE, "original_max_position_embeddings": 16},
        max_position_embeddings=64,
    ),
    "mistral": _mistral(**_heads(5, 1, 160), sliding_window=None),
    "mistral_window": _mistral(**_heads(4, 2, 64), sliding_window=7, head_dim=32, vocab_size=331),
    "qwen2": _qwen2(
        **_heads(7, 1, 224), sliding_window=5, use_sliding_window=False, tie_word_embeddings=True
    ),
    "qwen2_window": _qwen2(
        **_heads(4, 2, 64),
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen2_yarn": _qwen2(rope_scaling=_QWEN_YARN, max_position_embeddings=32, rope_theta=1000000.0),
    "qwen3": _qwen3(**_heads(5, 1, 96), head_dim=32, vocab_size=331),
    "qwen3_window": _qwen3(
        **_heads(4, 2, 64),
        head_dim=48,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    ),
}

TOKENS = 48


def tokens(case: str) -> list[int]:
    """The prompt of a case, 48 ids of its vocabulary."""
    vocab_size = int(CASES[case]["vocab_size"])
    return [int(value) for value in (hashed(f"{case}/tokens", (TOKENS,)) + 1) / 2 * vocab_size]


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names -> shapes. ``*_proj.weight`` is [rows, cols]."""
    facts = ModelConfig.from_hf(config)
    dim, hidden, head_dim = facts.dim, facts.hidden_dim, facts.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (facts.vocab_size, dim)}
    projections = {
        "self_attn.q_proj": (facts.q_dim, dim, facts.qkv_bias),
        "self_attn.k_proj": (facts.kv_dim, dim, facts.qkv_bias),
        "self_attn.v_proj": (facts.kv_dim, dim, facts.qkv_bias),
        "self_attn.o_proj": (dim, facts.q_dim, facts.out_bias),
        "mlp.gate_proj": (hidden, dim, facts.mlp_bias),
        "mlp.up_proj": (hidden, dim, facts.mlp_bias),
        "mlp.down_proj": (dim, hidden, facts.mlp_bias),
    }
    for layer in range(facts.n_layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, cols, bias) in projections.items():
            shapes[f"{prefix}{name}.weight"] = (rows, cols)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes[prefix + "input_layernorm.weight"] = shapes[
            prefix + "post_attention_layernorm.weight"
        ] = (dim,)
        if facts.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = shapes[
                prefix + "self_attn.k_norm.weight"
            ] = (head_dim,)
    shapes["model.norm.weight"] = (dim,)
    if not facts.tied:
        shapes["lm_head.weight"] = (facts.vocab_size, dim)
    return shapes


def tensors(case: str, dtype: str = "bf16") -> Tensors:
    """The tensors of a case: "bf16" (uint16 bit patterns) or "fp32" (the same values as float32).

    Matrices are scaled so that logits and attention scores are of order 1 to 5.
    """
    out: Tensors = {}
    for name, shape in tensor_shapes(CASES[case]).items():
        values = hashed(f"{case}/{name}", shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.3 * values
        elif len(shape) == 2:
            values = values * np.float32(3 / np.sqrt(shape[1]))
        bits = fp32_to_bf16(values.astype(np.float32))
        out[name] = bits if dtype == "bf16" else bf16_to_fp32(bits)
    return out


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """A plain safetensors file; uint16 arrays are written as BF16."""
    names = {"float32": "F32", "uint16": "BF16", "float16": "F16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        header[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape),
                        "data_offsets": [offset, offset + array.nbytes]}  # fmt: skip
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_checkpoint(folder: Path, case: str, dtype: str = "bf16") -> Path:
    """A Hugging Face folder with config.json and model.safetensors; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CASES[case], indent=2))
    write_safetensors(folder / "model.safetensors", tensors(case, dtype))
    return folder


@dataclass(frozen=True)
class MemoryCheckpoint:
    """A checkpoint with our names, all ``Reference`` needs. Does not go through convert.py."""

    config: ModelConfig
    arrays: dict[str, NDArray[np.float32]]

    def matrix(self, name: str) -> Matrix:
        values = np.ascontiguousarray(self.arrays[name])
        return Matrix(Layout(values.shape[0], values.shape[1], "fp32"), values.view(np.uint32))

    def vector(self, name: str) -> NDArray[np.float32]:
        return self.arrays[name]


def memory_checkpoint(
    config: Mapping[str, Any], source: Mapping[str, NDArray[np.float32]]
) -> MemoryCheckpoint:
    """Hugging Face tensors in float32 -> our names, all matrices of type fp32."""
    facts = ModelConfig.from_hf(config)
    arrays = {
        "embed": source["model.embed_tokens.weight"],
        "final_norm": source["model.norm.weight"],
    }
    if not facts.tied:
        arrays["lm_head"] = source["lm_head.weight"]
    for layer in range(facts.n_layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        arrays[ours + "attn_norm"] = source[theirs + "input_layernorm.weight"]
        arrays[ours + "ffn_norm"] = source[theirs + "post_attention_layernorm.weight"]
        for part, name in ((".weight", ""), (".bias", "_bias")):
            attn = {x: source.get(f"{theirs}self_attn.{x}_proj{part}") for x in "qkvo"}
            mlp = {x: source.get(f"{theirs}mlp.{x}_proj{part}") for x in ("gate", "up", "down")}
            if attn["q"] is not None:
                arrays[f"{ours}wqkv{name}"] = np.concatenate([attn["q"], attn["k"], attn["v"]])
            if attn["o"] is not None:
                arrays[f"{ours}wo{name}"] = attn["o"]
            if mlp["gate"] is not None:
                arrays[f"{ours}w_gate_up{name}"] = interleave(mlp["gate"], mlp["up"])
                arrays[f"{ours}w_down{name}"] = mlp["down"]
        if facts.qk_norm:
            for norm in ("q_norm", "k_norm"):
                arrays[ours + norm] = source[f"{theirs}self_attn.{norm}.weight"]
    return MemoryCheckpoint(facts, arrays)


def checkpoint(case: str) -> MemoryCheckpoint:
    """The checkpoint of a case in memory."""
    return memory_checkpoint(CASES[case], tensors(case, "fp32"))
