"""Small GGUF files for tests, written by the gguf package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, tensors
from numpy.typing import NDArray

from minflash.config import ModelConfig

gguf = pytest.importorskip("gguf")  # GPU machines may lack it; the [test] extra has it

Types = Callable[[str], str]  # GGUF tensor name -> ggml type

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
DIM, HIDDEN, HEADS, KV_HEADS, VOCAB = 64, 96, 4, 2, 40


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A GGUF file by the gguf package. A tensor is an array or (packed bytes, ggml type)."""
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "llama"))
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
             str: writer.add_string, list: writer.add_array}  # fmt: skip
    for key, value in metadata.items():
        if key != "general.architecture":
            kinds[type(value)](key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def facts(architecture: str = "llama", **changed: Any) -> dict[str, Any]:
    """Metadata of a small model; a value of None leaves a key out."""
    values: dict[str, Any] = {
        "block_count": 1, "context_length": 128, "embedding_length": DIM,
        "feed_forward_length": HIDDEN, "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 500000.0,
    }  # fmt: skip
    values.update(changed)
    named = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    return {"general.architecture": architecture, **named}


EMBEDDING = {"token_embd.weight": np.zeros((VOCAB, DIM), np.float32)}


def quantized(kind: str, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((48, 96)) * 0.1).astype(np.float32)
    values[3, :32] = 0
    values[4, :32] = 0.25  # a constant group
    ggml = gguf.GGMLQuantizationType[kind]
    return gguf.quants.quantize(values, ggml), ggml


def gguf_name(name: str) -> str:
    for theirs, ggml in NAMES.items():
        name = name.replace(theirs, ggml)
    return name


def permuted(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Row h, 2 i + p of the file is row h, p * half + i of the model; written as loops."""
    out, head_dim = np.empty_like(values), len(values) // heads
    for head in range(heads):
        for i in range(head_dim // 2):
            for p in range(2):
                row = head * head_dim + 2 * i + p
                out[row] = values[head * head_dim + p * head_dim // 2 + i]
    return out


def write_gguf(
    path: Path, case: str, types: Types, change: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """A GGUF file of a case; returns what the gguf package reads, named and ordered as in HF."""
    config = ModelConfig.from_hf(CASES[case])
    architecture = "llama" if config.architecture == "mistral" else config.architecture
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if any(config.windows):
        writer.add_sliding_window(config.windows[0])
    read: dict[str, Any] = {}
    for name, values in {**tensors(case, "fp32"), **change}.items():
        kind = gguf.GGMLQuantizationType[types(gguf_name(name)) if values.ndim == 2 else "F32"]
        stored = gguf.quants.quantize(values, kind)
        read[name] = np.asarray(gguf.quants.dequantize(stored, kind), dtype=np.float32)
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.n_heads if ".q_proj." in name else config.n_kv_heads
            stored = permuted(stored, heads)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read
