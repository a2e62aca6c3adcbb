"""The sequence that a KV cache holds, as data: what ``save_state`` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError, ContextError


@dataclass(frozen=True)
class CacheLayout:
    """How one kind of engine keeps keys and values. Its name changes when the meaning does."""

    name: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # dtype, shape; -1: by the positions
    block: int = 1  # positions of one step of the length that -1 stands for

    def shapes(self, positions: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape by tensor name, for so many positions."""
        n = -(-positions // self.block)
        return {
            name: (dtype, tuple(n if size < 0 else size for size in shape))
            for name, (dtype, shape) in self.tensors.items()
        }


@dataclass(frozen=True)
class CacheState:
    """Token ids from position 0 on, their frequencies (see ``KeptTokens``), keys and values."""

    layout: CacheLayout
    ids: Sequence[int]
    rope_keys: Sequence[int]
    tensors: Mapping[str, Any]  # NumPy arrays

    def check(self, layout: CacheLayout, max_context: int) -> None:
        """Raises CheckpointError or ContextError unless an engine of ``layout`` can hold it."""
        if self.layout != layout:
            raise CheckpointError(
                f"the state has layout {self.layout.name}, this engine's is {layout.name}: it was "
                "saved on another device or by another version; read the text again instead"
            )
        if len(self.ids) > max_context:
            raise ContextError(
                f"the state holds {len(self.ids)} positions, the context {max_context}; load the "
                "model with a larger max_context"
            )
