"""What a KV cache holds, so that a prompt begins where it first differs from the sequence before.

Keys that are reused may have been made in other pieces than a fresh start would make them (those
of tokens that the model chose: one by one; those of a short prompt: in steps), so that
results may differ within rounding; ``reset`` gives a fresh start.
"""

from __future__ import annotations

from collections.abc import Sequence

from .config import ModelConfig
from .rope import LENGTH_DEPENDENT


class KeptTokens:
    """The tokens whose keys and values are in a cache, from position 0 on.

    Each has the key of the RoPE frequencies that its position was rotated with: where those depend
    on the length of the sequence, a prompt of another length cannot use it.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._rope = config.rope
        self._original = config.rope.original_context or config.max_context
        self.ids: list[int] = []
        self.rope_keys: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def shared(self, prompt: Sequence[int]) -> int:
        """How many tokens of ``prompt`` need no forward; never the last, which gives the logits."""
        same = _shared_front(prompt, self.ids, min(len(prompt) - 1, len(self.ids)))
        if self._rope.kind not in LENGTH_DEPENDENT:
            return same
        keys = [self._rope_key(len(prompt))] * same
        return _shared_front(self.rope_keys, keys, same)

    def cut(self, position: int) -> None:
        """Forgets what stands at ``position`` and after it: about to be written."""
        del self.ids[position:], self.rope_keys[position:]

    def add(self, tokens: Sequence[int], length: int) -> None:
        """The next tokens are in the cache, rotated for a sequence of ``length`` positions."""
        self.ids.extend(map(int, tokens))
        self.rope_keys.extend([self._rope_key(length)] * len(tokens))

    def replace(self, ids: Sequence[int], rope_keys: Sequence[int]) -> None:
        """The cache holds these now."""
        self.ids, self.rope_keys = list(map(int, ids)), list(map(int, rope_keys))

    def _rope_key(self, length: int) -> int:
        if self._rope.kind == "dynamic":
            return max(length, self._original)
        return int(self._rope.kind == "longrope" and length > self._original)


def _shared_front(a: Sequence[int], b: list[int], end: int) -> int:
    """How many of the first ``end`` elements are equal before the first that differ.

    By halves, as lists are compared many times faster than their elements one by one.
    """
    a, begin = list(a[:end]), 0
    if a == b[:end]:  # a conversation goes on
        return end
    while begin < end:
        middle = (begin + end + 1) // 2
        if a[begin:middle] == b[begin:middle]:
            begin = middle
        else:
            end = middle - 1
    return begin
