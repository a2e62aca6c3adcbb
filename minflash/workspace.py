"""What a step's kernels keep in device memory between their phases, and where it lies."""

from __future__ import annotations

from collections.abc import Mapping

from .config import ModelConfig
from .packing import Layout
from .tuning import ATTENTION_ROWS, MANY_COLUMNS, Tuning

PHASES_PER_LAYER = 5
TAIL_BYTES = 16400  # of struct Tail in cuda/ranking.cuh
PROFILE_MARKS = 4  # of a phase, as in cuda/profile.cuh
_ALIGN = 256  # bytes, of every part
_TYPES = {
    "barrier": "u32", "abandoned": "u32", "next_token": "u32", "arrivals": "u32",
    "candidates": "struct Candidate", "residual": "float", "squares": "float", "rounded": "u16",
    "team_arrivals": "u32", "prefill_arrivals": "u32", "team_sums": "float2", "qkv": "float",
    "attended": "u16", "hidden": "u16", "logits": "float", "partials": "float", "profile": "u64",
    "residual_words": "u64", "qkv_words": "u64", "attended_words": "u64", "hidden_words": "u64",
    "tail": "ranking::Tail", "tops": "u64", "scores": "float", "listed": "ranking::Entry",
    "ranked": "ranking::Entry", "noted": "uint2", "mask": "u32",
    "prefill_parts": "uint4",
}  # fmt: skip


def max_teams(config: ModelConfig) -> int:
    """KV heads times the most query row tiles of one step."""
    group = config.n_heads // config.n_kv_heads
    return config.n_kv_heads * -(-group * MANY_COLUMNS // ATTENTION_ROWS)


def team_row_blocks(layouts: Mapping[str, Layout], shared: Mapping[str, int]) -> tuple[int, int]:
    """Most row blocks of a matrix in parts, and most of row blocks times parts.

    shared: {kind: parts}, as ``parts`` of tuning.py chooses them.
    """
    some = [(layouts[k].row_blocks, n) for k, n in shared.items() if n > 1]
    return max((b for b, _ in some), default=0), max((b * n for b, n in some), default=0)


def workspace_offsets(
    config: ModelConfig,
    tuning: Tuning,
    team_blocks: tuple[int, int],
    prefill_bytes: int,
    prefill_part_bytes: int,
) -> dict[str, int]:
    """Offsets of the workspace's parts. Words that blocks spin on have lines of their own.

    What is before the residual must be zero at first, and after a step that was abandoned.
    """
    qkv = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    phases = PHASES_PER_LAYER * config.n_layers + 1
    sizes = {
        "barrier": 4, "abandoned": 4, "next_token": 4, "arrivals": 4 * (max_teams(config) + 1),
        "candidates": 8 * tuning.grid, "tail": TAIL_BYTES,
        "team_arrivals": 4 * team_blocks[0],
        "prefill_arrivals": 8 * tuning.grid,  # units of two spans or more: prefill_parts / 2
        "residual": 4 * MANY_COLUMNS * config.dim, "squares": MANY_COLUMNS * config.dim // 2,
        "rounded": 2 * MANY_COLUMNS * config.dim,
        "team_sums": 8 * 8 * MANY_COLUMNS * team_blocks[1],
        "qkv": 4 * MANY_COLUMNS * qkv,
        "attended": 2 * MANY_COLUMNS * config.n_heads * config.head_dim,
        "hidden": 2 * MANY_COLUMNS * config.hidden_dim,
        "logits": 4 * MANY_COLUMNS * config.vocab_size,
        # [vocab_size] each, read and written only where a step's options need them
        "scores": 4 * config.vocab_size, "listed": 16 * config.vocab_size,
        "ranked": 16 * config.vocab_size, "noted": 8 * config.vocab_size,
        "mask": 4 * -(-config.vocab_size // 32),
        "partials": 4 * tuning.grid * ATTENTION_ROWS * (config.head_dim + 4),
        # The same vectors of one column, in words that carry the number of a phase.
        "residual_words": 8 * config.dim, "qkv_words": 8 * qkv,
        "attended_words": 4 * config.n_heads * config.head_dim,
        "hidden_words": 4 * config.hidden_dim,
        # The largest of each block's scores and logits, in such words whatever the columns.
        "tops": 16 * tuning.grid,
        "profile": 8 * tuning.profile * tuning.grid * phases * PROFILE_MARKS,
        "prefill_parts": prefill_part_bytes, "prefill": prefill_bytes,
    }  # fmt: skip
    offsets, end = {}, 0
    for name, nbytes in sizes.items():
        offsets[name] = end
        end += -(-nbytes // _ALIGN) * _ALIGN
    return {**offsets, "total": end}


def workspace_struct(workspace: Mapping[str, int]) -> str:
    members = [
        f"  __device__ __forceinline__ {c_type}* {name}() const {{ "
        f"return ({c_type}*)(anew(args.workspace) + {workspace[name]}); }}"
        for name, c_type in _TYPES.items()
    ]
    head = [
        "namespace ranking { struct Tail; struct Entry; }",
        "struct Workspace {",
        "  const StepArgs& args;",
        "  __device__ __forceinline__ explicit Workspace(const StepArgs& args) : args(args) {}",
    ]
    return "\n".join([*head, *members, "};"])
