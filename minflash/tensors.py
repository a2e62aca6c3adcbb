"""The tensors of a weight file: names, order and shapes, and the rules for their numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .packing import BLOCK_ROWS, Layout

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
QUANT_METHOD = "minflash"  # in config.json, and the format in each file's metadata

_CHUNK_BYTES = 1 << 21  # of a matrix, looked at in one go
_LAYER_ORDER = ("attn_norm", "wqkv", "wqkv_bias", "q_norm", "k_norm", "wo", "wo_bias", "ffn_norm",
                "w_gate_up", "w_gate_up_bias", "w_down", "w_down_bias")  # fmt: skip


def file_order(name: str) -> tuple[int, int, int]:
    """Sort key of a tensor's name: its place in the file. Raises ValueError for an unknown name."""
    outside = {"embed": (0, 0, 0), "final_norm": (2, 0, 0), "lm_head": (2, 0, 1)}
    if name in outside:
        return outside[name]
    prefix, layer, kind = name.split(".")
    if prefix != "layers":
        raise ValueError(f"no tensor of a weight file is called {name!r}")
    return 1, int(layer), _LAYER_ORDER.index(kind)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: (rows, cols) of a matrix or (length,) of a vector} of a model, in file order."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, config.dim)}
    layer = _layer_tensors(config)
    for index in range(config.n_layers):
        shapes.update({f"layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes["final_norm"] = (config.dim,)
    if not config.tied:
        shapes["lm_head"] = (config.vocab_size, config.dim)
    return shapes


def _layer_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    dim, hidden = config.dim, config.hidden_dim
    heads = config.n_heads * config.head_dim
    qkv = heads + 2 * config.n_kv_heads * config.head_dim
    present = {
        "wqkv_bias": config.qkv_bias, "q_norm": config.qk_norm, "k_norm": config.qk_norm,
        "wo_bias": config.out_bias, "w_gate_up_bias": config.mlp_bias,
        "w_down_bias": config.mlp_bias,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (dim,), "wqkv": (qkv, dim), "wqkv_bias": (qkv,), "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,), "wo": (dim, heads), "wo_bias": (dim,), "ffn_norm": (dim,),
        "w_gate_up": (2 * hidden, dim), "w_gate_up_bias": (2 * hidden,),
        "w_down": (dim, hidden), "w_down_bias": (dim,),
    }  # fmt: skip
    return {name: shapes[name] for name in _LAYER_ORDER if present.get(name, True)}


def vector_problem(values: NDArray[np.float32]) -> str | None:
    """What is wrong with the numbers of a vector, or None."""
    return None if np.isfinite(values).all() else "holds NaN or infinity"


def matrix_problem(data: NDArray[np.uint8], layout: Layout) -> str | None:
    """What is wrong with the numbers of a packed matrix, or None. data: uint8 of ``layout.shape``.

    Scales and biases must be finite and fp8 codes no NaN. The values of fp32, bf16 and fp16 are the
    model's own and not looked at. Codes are not unpacked, and about 2 MB at a time are read.
    """
    if not layout.group_size:
        return None
    step = max(1, _CHUNK_BYTES // layout.row_block_bytes)
    for start in range(0, layout.row_blocks, step):
        tiles = data[start : start + step].reshape(-1, layout.tile_bytes)
        codes, scales = np.split(tiles, [layout.tile_code_bytes], axis=1)
        exponents = scales.view("<u2") & 0x7C00
        if (exponents == 0x7C00).any():
            where = _rows(exponents == 0x7C00, start, layout)
            return f"a scale or bias in {where} is NaN or infinite"
        if layout.type == "fp8" and ((codes & 0x7F) == 0x7F).any():
            return f"an fp8 code in {_rows((codes & 0x7F) == 0x7F, start, layout)} is NaN"
    return None


def _rows(bad: NDArray[np.bool_], start: int, layout: Layout) -> str:
    """Names the rows of the first bad tile. bad: [tiles, ...], from row block ``start`` on."""
    block = start + int(np.argmax(bad.any(axis=1))) // layout.tiles
    return f"rows {BLOCK_ROWS * block} to {BLOCK_ROWS * block + BLOCK_ROWS - 1}"
