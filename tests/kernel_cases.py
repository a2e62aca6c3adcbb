"""Models for the tests of the kernels: one for each type and group size, each with its hazards."""

from __future__ import annotations

import numpy as np
from kernel_models import RandomModel, model_config

from minflash.config import RopeConfig
from minflash.packing import GROUP_SIZES, GROUPED_TYPES
from minflash.quantize import quantize

LLAMA3 = RopeConfig("llama3", 500000.0, 8.0, 64, 1.0, 4.0)
YARN = RopeConfig("yarn", 10000.0, 4.0, 128)
DYNAMIC = RopeConfig("dynamic", 10000.0, 2.0, 32)
LONGROPE = RopeConfig(
    "longrope", 10000.0, 4.0, 32, short_factor=(1.0,) * 32,
    long_factor=tuple(1 + i / 8 for i in range(32)),
)  # fmt: skip

MODELS = {
    "bf16": lambda: RandomModel(model_config(), "bf16"),
    "bf16, odd windows, q and k norms, int8 head, head_dim 128": lambda: RandomModel(
        model_config(head_dim=128, qk_norm=True, tied=False, windows=(0, 21)),
        "bf16", 0, ("int8", 32),
    ),
    "fp16, all biases, yarn, as many KV heads as heads": lambda: RandomModel(
        model_config(
            n_heads=2, n_kv_heads=2, qkv_bias=True, out_bias=True, mlp_bias=True, rope=YARN
        ), "fp16",
    ),
    "fp16, head_dim 96, llama3, window 17": lambda: RandomModel(
        model_config(head_dim=96, n_heads=2, rope=LLAMA3, windows=(17,)), "fp16"
    ),
    "fp8 32, fp16 head": lambda: RandomModel(model_config(), "fp8", 32, ("fp16", 0)),
    "fp8 64, untied, 5 heads on 1": lambda: RandomModel(
        model_config(dim=192, hidden_dim=320, n_heads=5, tied=False), "fp8", 64
    ),
    "fp8 128": lambda: RandomModel(model_config(dim=128, hidden_dim=384, n_heads=2), "fp8", 128),
    "int8 32, all biases": lambda: RandomModel(
        model_config(qkv_bias=True, out_bias=True, mlp_bias=True), "int8", 32
    ),
    "int8 64, 6 heads on 3": lambda: RandomModel(
        model_config(dim=64, hidden_dim=192, n_heads=6, n_kv_heads=3), "int8", 64
    ),
    "int8 128, bf16 head": lambda: RandomModel(
        model_config(dim=256, hidden_dim=384, n_heads=4, n_kv_heads=2), "int8", 128, ("bf16", 0)
    ),
    "int4 32, head_dim 96, q and k norms": lambda: RandomModel(
        model_config(head_dim=96, qk_norm=True), "int4", 32, ("int8", 32)
    ),
    "int4 64, 3 layers, windows 40, 0, 9": lambda: RandomModel(
        model_config(dim=128, hidden_dim=192, n_layers=3, windows=(40, 0, 9)),
        "int4", 64, ("int8", 64),
    ),
    "int4 128, int4 head, 1 layer": lambda: RandomModel(
        model_config(dim=128, hidden_dim=256, head_dim=128, n_layers=1, n_heads=2),
        "int4", 128, ("int4", 64),
    ),
}  # fmt: skip
TYPES = [("bf16", 0), ("fp16", 0)] + [(t, g) for t in GROUPED_TYPES for g in GROUP_SIZES]


def growing_model(type: str, group: int, factor: float) -> RandomModel:
    """Two phases make the residual ``factor`` times as large as others do."""
    model = RandomModel(model_config(dim=128, hidden_dim=192, n_layers=3), type, group)
    for name in ("layers.0.wo", "layers.1.w_down"):
        shape = model.matrices[name].rows, model.matrices[name].cols
        values = np.random.default_rng(5).standard_normal(shape) * (factor * 2 / np.sqrt(shape[1]))
        model.put(name, quantize(values.astype(np.float32), type, group, search=False))
    return model
