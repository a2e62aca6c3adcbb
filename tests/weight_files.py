"""Small random weight files, and a way to damage them: helpers of the tests of the weight file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minflash.checkpoint import CheckpointWriter, expected_tensors
from minflash.config import ModelConfig
from minflash.packing import Layout, Matrix

HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
CODE_DTYPES = {"fp32": np.uint32, "bf16": np.uint16, "fp16": np.uint16}


def random_matrix(layout: Layout, seed: int = 0) -> Matrix:
    """Random codes (any bits for fp32, bf16 and fp16; no NaN for fp8) and scales."""
    rng = np.random.default_rng(seed)
    dtype = CODE_DTYPES.get(layout.type, np.uint8)
    shape = (layout.rows, layout.cols)
    high = 16 if layout.type == "int4" else int(np.iinfo(dtype).max) + 1
    codes = rng.integers(0, high, shape, dtype=dtype)
    if layout.type == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0x7E
    if not layout.group_size:
        return Matrix(layout, codes)
    parts = rng.normal(size=(2, layout.rows, layout.groups)).astype(np.float16)
    return Matrix(layout, codes, parts[0], parts[1] if layout.type == "int4" else None)


def plan(
    hf_config: dict[str, Any], layer_type: str = "int4", group: int = 32, head_type: str = "int8"
) -> tuple[dict[str, Layout], dict[str, int]]:
    """What a CheckpointWriter needs: the layouts of the matrices, the lengths of the vectors."""
    layouts, vectors = {}, {}
    for name, shape in expected_tensors(ModelConfig.from_hf(hf_config)).items():
        if len(shape) == 1:
            vectors[name] = shape[0]
            continue
        type = head_type if name in ("embed", "lm_head") else layer_type
        group_size = group if type in ("fp8", "int8", "int4") else 0
        layouts[name] = Layout(shape[0], shape[1], type, group_size)
    return layouts, vectors


def random_vector(name: str, length: int) -> NDArray[np.float32]:
    return np.random.default_rng(len(name)).normal(size=length).astype(np.float32)


def write_all(
    writer: CheckpointWriter, layouts: dict[str, Layout], vectors: dict[str, int]
) -> None:
    for seed, name in enumerate(writer.names):
        if name in layouts:
            writer.write_matrix(name, random_matrix(layouts[name], seed))
        else:
            writer.write_vector(name, random_vector(name, vectors[name]))


def write_model(
    path: Path, hf_config: dict[str, Any] = HF_CONFIG, shard_bytes: int = 10**9, **types: Any
) -> Path:
    """A converted model with random weights at ``path``."""
    layouts, vectors = plan(hf_config, **types)
    with CheckpointWriter(path, hf_config, layouts, vectors, shard_bytes=shard_bytes) as writer:
        write_all(writer, layouts, vectors)
        return writer.commit()


def new_writer(path: Path, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(path, HF_CONFIG, *plan(HF_CONFIG), **options)


def started(path: Path) -> CheckpointWriter:
    """A writer after its first tensor."""
    writer = new_writer(path)
    matrix = random_matrix(plan(HF_CONFIG)[0][writer.names[0]])
    writer.write_matrix(writer.names[0], matrix)
    return writer


@dataclass
class Parts:
    """A safetensors file taken apart: change the parts, then ``save``."""

    path: Path
    header: dict[str, Any]
    data: bytearray
    matrices: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Parts:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        matrices = json.loads(header["__metadata__"]["matrices"])
        return cls(path, header, bytearray(raw[8 + length :]), matrices)

    def save(self) -> None:
        if "matrices" in self.header.get("__metadata__", {}):
            self.header["__metadata__"]["matrices"] = json.dumps(self.matrices)
        self.save_text(json.dumps(self.header).encode())

    def save_text(self, text: bytes) -> None:
        self.path.write_bytes(len(text).to_bytes(8, "little") + text + self.data)

    def drop(self, name: str) -> None:
        """Removes a tensor and closes the gap."""
        begin, end = self.header.pop(name)["data_offsets"]
        del self.data[begin:end]
        self.matrices.pop(name, None)
        for entry in self.entries():
            if entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]

    def append(self, name: str, entry: dict[str, Any], data: bytes) -> None:
        begin = len(self.data)
        self.data += data
        self.header[name] = {**entry, "data_offsets": [begin, begin + len(data)]}

    def entries(self) -> list[dict[str, Any]]:
        return [entry for name, entry in self.header.items() if name != "__metadata__"]
