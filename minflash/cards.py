"""Memory and bandwidth of common cards, as their maker's datasheets state them.

They serve ``minflash plan --gpu`` alone: what runs on a GPU asks the GPU itself. A bandwidth is the
bus times its data rate; multiprocessors are CUDA cores by 128 (by 64 on the A100).
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ArgumentError
from .tuning import DeviceFacts

# Shared memory that one block may ask for, by compute capability (CUDA C++ Programming Guide,
# "Compute Capabilities").
_SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True)
class Card:
    """One card's datasheet figures. A gigabyte is 10^9 bytes here."""

    name: str
    memory_gb: float
    gb_per_s: float
    compute_capability: int  # 90 for 9.0
    multiprocessors: int

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(
            self.compute_capability, self.multiprocessors, _SHARED_BYTES[self.compute_capability]
        )


CARDS = {
    card.name: card
    for card in (
        Card("a10", 24, 600, 86, 72),
        Card("a40", 48, 696, 86, 84),
        Card("a100-40gb", 40, 1555, 80, 108),
        Card("a100-80gb-pcie", 80, 1935, 80, 108),
        Card("a100-80gb-sxm", 80, 2039, 80, 108),
        Card("h100-pcie", 80, 2000, 90, 114),  # "2 TB/s"
        Card("h100-sxm", 80, 3350, 90, 132),
        Card("h200-sxm", 141, 4800, 90, 132),
        # An eighth of a DGX B200: "1,440 GB total, 64 TB/s". The number of
        # multiprocessors is not from a datasheet; here it changes the workspace only.
        Card("b200", 180, 8000, 100, 148),
        Card("l4", 24, 300, 89, 58),
        Card("l40s", 48, 864, 89, 142),
        Card("rtx-3060", 12, 360, 86, 28),
        Card("rtx-3080", 10, 760, 86, 68),
        Card("rtx-3090", 24, 936, 86, 82),
        Card("rtx-4060", 8, 272, 89, 24),
        Card("rtx-4070", 12, 504, 89, 46),
        Card("rtx-4080", 16, 717, 89, 76),
        Card("rtx-4090", 24, 1008, 89, 128),
        Card("rtx-5070", 12, 672, 120, 48),
        Card("rtx-5080", 16, 960, 120, 84),
        Card("rtx-5090", 32, 1792, 120, 170),
        Card("rtx-a6000", 48, 768, 86, 84),
        Card("rtx-6000-ada", 48, 960, 89, 142),
        Card("rtx-pro-6000", 96, 1792, 120, 188),  # Workstation; Server is slower
    )
}


def find_card(name: str) -> Card:
    """The card of that name, in any case and spacing. Raises ArgumentError with the names."""
    key = name.lower().replace(" ", "-").replace("_", "-")
    for prefix in ("nvidia-", "geforce-"):
        key = key.removeprefix(prefix)
    if key in CARDS:
        return CARDS[key]
    raise ArgumentError(
        f"--gpu knows {', '.join(CARDS)}, found {name!r}; for another card give --memory and "
        "--bandwidth"
    )
