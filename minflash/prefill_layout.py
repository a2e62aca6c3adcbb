"""What the kernels that read prompts need: its workspace and its count of barriers."""

from __future__ import annotations

from collections.abc import Mapping

from .config import ModelConfig
from .packing import Layout
from .tuning import Tuning

PREFILL_TILE = 128  # tokens of one tile of a product, as kOperandColumns of cuda/tiles.cuh
FEW_TOKENS = 64  # that prefill_few reads, as kFewColumns there
DEALT_ROW_WARPS = 4  # that have query rows in a block which attends to one span
_PHASES_PER_LAYER = 8  # a matrix whose columns' sums are needed has one more


def prefill_tokens(tuning: Tuning, max_context: int) -> int:
    """Tokens of a prompt that there is room for in one launch: whole tiles, no more than needed."""
    most = tuning.prefill_tokens // PREFILL_TILE * PREFILL_TILE
    return min(most, -(-max_context // PREFILL_TILE) * PREFILL_TILE)


def prefill_parts(tuning: Tuning) -> int:
    """Most parts, units of attention times spans of the past, that their blocks leave behind."""
    return 4 * tuning.grid


def prefill_part_bytes(config: ModelConfig, tuning: Tuning) -> int:
    """Bytes of workspace for them: struct Part of cuda/prefill_attention.cuh for each warp."""
    return prefill_parts(tuning) * DEALT_ROW_WARPS * (4 + 2 * config.head_dim) * 16


def prefill_token_bytes(config: ModelConfig, layouts: Mapping[str, Layout]) -> dict[str, int]:
    """Bytes of workspace that one token of a prompt takes, by part, see cuda/prefill.cu."""

    def padded(*kinds: str) -> int:
        return max(layouts[k].tiles * layouts[k].tile_cols for k in kinds)

    def sums(*kinds: str) -> int:
        return max(_sum_groups(layouts[kind]) for kind in kinds)

    inputs = ("wqkv", "w_gate_up")
    qkv = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    return {
        "tokens": 4, "residual": 4 * config.dim, "qkv": 4 * qkv,
        "x": 2 * padded(*inputs), "attended": 2 * padded("wo"), "hidden": 2 * padded("w_down"),
        "x_sums": 4 * sums(*inputs), "attended_sums": 4 * sums("wo"),
        "hidden_sums": 4 * sums("w_down"),
    }  # fmt: skip


def _sum_groups(layout: Layout) -> int:
    """Groups of columns whose sums the kernel needs, as Matrix::has_sums of cuda/tensor.cuh."""
    if layout.type not in ("int8", "int4"):
        return 0
    return layout.tiles * layout.tile_cols // layout.group_size


def prefill_barriers(config: ModelConfig, layouts: Mapping[str, Layout]) -> int:
    """Grid barriers of one launch: the last layer ends with its keys and values."""
    phases = _PHASES_PER_LAYER + sum(_sum_groups(layouts[kind]) > 0 for kind in ("wo", "w_down"))
    return (config.n_layers - 1) * phases + 2


_PREFILL_TYPES = {
    "tokens": "int", "residual": "float", "qkv": "float", "x": "u8", "attended": "u8",
    "hidden": "u8", "x_sums": "float", "attended_sums": "float", "hidden_sums": "float",
}  # fmt: skip


def parts_before(name: str, per_token: Mapping[str, int]) -> int:
    """Bytes of one token before a part.

    Parts lie one after another, each args.prefill_tokens times its bytes of one token long.
    """
    names = list(per_token)
    return sum(per_token[part] for part in names[: names.index(name)])


def prefill_struct(begin: int, per_token: Mapping[str, int]) -> str:
    members = []
    for name in per_token:
        c_type, before = _PREFILL_TYPES[name], parts_before(name, per_token)
        members.append(
            f"  __device__ __forceinline__ {c_type}* {name}() const {{ return ({c_type}*)"
            f"(args.workspace + {begin} + (u64)args.prefill_tokens * {before}); }}"
        )
    head = [
        "struct PrefillWorkspace {",
        "  const StepArgs& args;",
        "  __device__ __forceinline__ explicit PrefillWorkspace(const StepArgs& args)"
        " : args(args) {}",
    ]
    return "\n".join([*head, *members, "};"])
