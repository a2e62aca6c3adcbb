"""OpenBLAS, NumPy's library of matrix products: settings for a process that is ours alone."""

from __future__ import annotations

import os

from .memory import CONTROL_GROUP


def prepare_blas() -> None:
    """Settings through the environment; works before NumPy is imported. What is set already stays.

    OpenBLAS starts a thread for every processor it sees, and an idle one spins for a tenth of a
    second. On a busy machine the spinning threads lose their turns to others while the main thread
    waits for them: single tokens were measured to take three times as long.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(_free_processors()))
    # Spin for 2^20 cycles: longer than the gap between two products of a token, which would cost
    # a wake-up each, and shorter than another program's turn.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")


def _free_processors() -> int:
    """Processors that this process may use and others leave idle, at least 1."""
    allowed = len(os.sched_getaffinity(0))
    free = allowed - int(os.getloadavg()[0])
    try:
        quota, period = (CONTROL_GROUP / "cpu.max").read_text().split()
        free = min(free, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no such group, or "max": no limit
        pass
    return max(1, free)
