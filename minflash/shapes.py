"""Named shapes: the dims of well-known models, for measuring without their weights."""

from __future__ import annotations

from .config import ModelConfig, RopeConfig
from .errors import ArgumentError
from .packing import GROUP_SIZES, GROUPED_TYPES, Layout
from .tensors import expected_tensors

# dim, hidden_dim, head_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_context, tied, theta
SHAPES = {
    "smollm2-135m": (576, 1536, 64, 30, 9, 3, 49152, 8192, True, 1e5),
    "llama-3.2-1b": (2048, 8192, 64, 16, 32, 8, 128256, 131072, True, 5e5),
    "llama-3.1-8b": (4096, 14336, 128, 32, 32, 8, 128256, 131072, False, 5e5),
    "llama-3.1-70b": (8192, 28672, 128, 80, 64, 8, 128256, 131072, False, 5e5),
}


def shape_config(name: str) -> ModelConfig:
    """The config of a named shape. Raises ArgumentError with the names there are."""
    if name not in SHAPES:
        raise ArgumentError(f"shape must be one of {', '.join(SHAPES)}, found {name!r}")
    dim, hidden, head_dim, layers, heads, kv_heads, vocab, context, tied, theta = SHAPES[name]
    return ModelConfig(
        architecture="llama", dim=dim, hidden_dim=hidden, head_dim=head_dim, n_layers=layers,
        n_heads=heads, n_kv_heads=kv_heads, vocab_size=vocab, max_context=context, norm_eps=1e-5,
        rope=RopeConfig(theta=theta), tied=tied, qkv_bias=False, out_bias=False, mlp_bias=False,
        qk_norm=False, windows=(0,) * layers,
    )  # fmt: skip


def shape_layouts(config: ModelConfig, quant: str, group_size: int | None) -> dict[str, Layout]:
    """{name: Layout} of all matrices converted with ``--quant quant``: int4 has an int8 head."""
    shapes = {name: s for name, s in expected_tensors(config).items() if len(s) == 2}
    fitting = [g for g in GROUP_SIZES if all(cols % g == 0 for _, cols in shapes.values())]
    widest = max(fitting)
    if group_size is not None and quant not in GROUPED_TYPES:
        raise ArgumentError(f"{quant} has no groups, found group size {group_size}; leave it out")
    if group_size is not None and group_size not in fitting:
        raise ArgumentError(
            f"the group size must be of {', '.join(map(str, fitting))} for this shape, "
            f"found {group_size}"
        )
    default = min(64, widest) if quant == "int4" else widest
    group = (group_size or default) if quant in GROUPED_TYPES else 0
    outer = ("int8", widest) if quant == "int4" else (quant, group)
    return {
        name: Layout(*shape, *(outer if name in ("embed", "lm_head") else (quant, group)))
        for name, shape in shapes.items()
    }
