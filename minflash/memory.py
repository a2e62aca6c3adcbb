"""Memory: how much is free, how much was used, and how long a context it allows on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from .context import check_own
from .errors import ContextError, DeviceError
from .notice import say_once

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .engine import Engine

MEMORY_SHARE = 0.8  # part of the free memory that a KV cache may grow into
CONTROL_GROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own


def cpu_context(checkpoint: Checkpoint, asked: int | None) -> int:
    """Positions for the CPU: ``asked``, or the model's own within the memory that is free now.

    Raises ContextError when ``asked`` is too much, DeviceError when the weights do not fit.
    """
    config = checkpoint.config
    check_own(asked, config.max_context)
    weight_bytes = sum(4 * layout.rows * layout.cols for layout in checkpoint.matrices.values())
    position_bytes = 4 * 2 * config.n_layers * config.n_kv_heads * config.head_dim  # K, V: float32
    free_bytes = free_memory_bytes()
    room = int((free_bytes - weight_bytes) * MEMORY_SHARE) // position_bytes
    wanted = asked or config.max_context
    if wanted <= room:
        return wanted
    if room < 1:
        raise DeviceError(
            f"the weights take {weight_bytes / 1e9:.1f} GB as float32 on the CPU, and "
            f"{free_bytes / 1e9:.1f} GB of memory are free; free some or take a smaller model"
        )
    if asked is not None:
        raise ContextError(
            f"max_context is {asked} positions of {position_bytes} bytes, but the free memory "
            f"({free_bytes / 1e9:.1f} GB) allows {room}; ask for at most {room}"
        )
    say_once(
        f"the context is {room} positions, bounded by {free_bytes / 1e9:.1f} GB of free memory "
        f"(the model's own is {config.max_context})"
    )
    return room


def free_memory_bytes() -> int:
    """Memory that can be had now: what the system calls available, within the group's limit."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, KeyError):
        free = 1024 * _table(Path("/proc/meminfo"))["MemAvailable:"]
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max": no limit
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        used = int((CONTROL_GROUP / "memory.current").read_text())
        # Pages of files that were read count as used, but are given up when others need them.
        used -= _table(CONTROL_GROUP / "memory.stat")["inactive_file"]
        free = min(free, limit - used)
    return free


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number, perhaps with a unit."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def peak_memory_bytes(engine: Engine) -> int:
    """The engine's own peak where it counts one (a GPU), else the largest size of this process."""
    own = getattr(engine, "peak_memory_bytes", None)
    if own is not None:
        return int(own() if callable(own) else own)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back_freed() -> None:
    """Returns to the system what was freed; glibc keeps the parts below a block still in use."""
    with contextlib.suppress(OSError, AttributeError):  # a C library that has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
