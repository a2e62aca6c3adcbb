"""Small GGUF files for tests, written by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")  # GPU machines may lack it; the [test] extra has it

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
