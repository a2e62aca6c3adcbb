"""Bars on stderr for work that takes long: where that is a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from typing import Any


def bar(total: int, what: str, unit: str) -> Any:
    """A tqdm bar of ``total`` units, for a ``with`` block; ``update(n)`` moves it."""
    from tqdm import tqdm

    quiet = sys.stderr is None or not sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=quiet)
