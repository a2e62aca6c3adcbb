"""How long a context fits into a GPU's memory beside the weights."""

from __future__ import annotations

from collections.abc import Mapping

from .codegen import Program
from .config import ModelConfig
from .context import check_own
from .errors import ContextError, DeviceError
from .notice import say_once
from .packing import Layout

BLOCK_POSITIONS = 16  # positions of one block of the KV cache
MARGIN_BYTES = 256 << 20  # left free: for the kernel itself, and for others on the card


def position_bytes(config: ModelConfig) -> int:
    """Bytes of K and V of one position, all layers, 16 bits a value."""
    return 4 * config.n_layers * config.n_kv_heads * config.head_dim


def step_bytes(config: ModelConfig, matrices: Mapping[str, Layout], context: int) -> int:
    """Bytes that one step must read at position ``context``."""
    skipped = set() if config.tied else {"embed"}
    weights = sum(
        m.row_blocks * m.row_block_bytes for name, m in matrices.items() if name not in skipped
    )
    return weights + context * position_bytes(config)


def cache_block_bytes(config: ModelConfig) -> int:
    """Bytes of one block: K and V of 16 positions, one layer, one KV head, 16 bits a value."""
    return 4 * BLOCK_POSITIONS * config.head_dim


def cache_blocks(positions: int) -> int:
    """Blocks of a KV cache: one more than the positions fill, for steps that begin at the last."""
    return -(-positions // BLOCK_POSITIONS) + 1


def cache_bytes(config: ModelConfig, positions: int) -> int:
    """Bytes of a KV cache for so many positions."""
    return cache_blocks(positions) * BLOCK_POSITIONS * position_bytes(config)


def fixed_bytes(program: Program) -> int:
    """Bytes that do not depend on the context: weights and workspace."""
    return program.weights.nbytes + program.workspace["total"]


def positions_that_fit(config: ModelConfig, fixed: int, free_bytes: int) -> int:
    """Positions for which memory is left beside ``fixed`` bytes; 0 when not even those fit."""
    blocks = (free_bytes - MARGIN_BYTES - fixed) // (BLOCK_POSITIONS * position_bytes(config))
    return max(0, (blocks - 1) * BLOCK_POSITIONS)


def gpu_context(config: ModelConfig, program: Program, free_bytes: int, asked: int | None) -> int:
    """Positions for a GPU: ``asked``, or the model's own within the memory that is free.

    Raises ContextError when ``asked`` is too much, DeviceError when the weights do not fit.
    """
    check_own(asked, config.max_context)
    fixed = fixed_bytes(program)
    room = positions_that_fit(config, fixed, free_bytes)
    wanted = asked or config.max_context
    if wanted <= room:
        return wanted
    free, wanted_bytes = f"{free_bytes / 1e9:.2f} GB", cache_bytes(config, wanted)
    if room < 1:
        raise DeviceError(
            f"the GPU has too little memory: the weights and buffers need {fixed / 1e9:.2f} GB and "
            f"{MARGIN_BYTES / 1e9:.2f} GB stay free, {free} are free now; close other programs on "
            "the GPU, take a smaller model, or convert it with --quant int4"
        )
    if asked is not None:
        raise ContextError(
            f"the GPU has too little memory for max_context {asked}: needs {fixed / 1e9:.2f} GB "
            f"for weights and buffers, {wanted_bytes / 1e9:.2f} GB for keys and values and "
            f"{MARGIN_BYTES / 1e9:.2f} GB to stay free, {free} are free; the largest context that "
            f"fits is {room}"
        )
    say_once(
        f"the context is {room} positions, bounded by {free} of free GPU memory (the model's own "
        f"is {config.max_context})"
    )
    return room
