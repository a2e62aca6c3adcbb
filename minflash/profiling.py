"""Where a step's time goes, phase by phase: the marks of the in-kernel timer made times.

A kernel compiled with ``Tuning.profile`` notes the clock in each block and phase: when the phase
begins, when its activations are loaded, when its part of the weights is used up, and when its
results are written. With several columns the block then waits at the grid barrier; with one there
is none, and waiting for other blocks is part of loading (cuda/profile.cuh, cuda/exchange.cuh).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .step_model import StepModel
from .workspace import PHASES_PER_LAYER

PHASES = ("qkv", "attention", "out", "gate and up", "down")  # of a layer; after the last: head


@dataclass(frozen=True)
class PhaseTime:
    """Microseconds of one phase in one layer: means over blocks and layers, which add up.

    ``stall_us`` is the wait at the grid barrier, near zero with one column; ``most_work_us`` what
    the slowest block took to get there. The head has no barrier after it.
    """

    phase: str
    count: int  # in a step
    load_us: float
    stream_us: float
    write_us: float
    stall_us: float
    most_work_us: float

    @property
    def total_us(self) -> float:
        return self.load_us + self.stream_us + self.write_us + self.stall_us


def phase_times(model: StepModel, step_us: float) -> list[PhaseTime]:
    """The phases of the last step of ``model``, scaled so that all of them take ``step_us``."""
    marks = model.read_profile().astype(np.int64)  # [blocks, phases, marks]
    begin, written = marks[:, :, 0], marks[:, :, 3]
    clock = float(np.mean(written[:, -1] - begin[:, 0])) / step_us  # ticks of a microsecond
    loaded = _within(marks[:, :, 1], begin, written)
    streamed = _within(marks[:, :, 2], loaded, written)
    following = np.concatenate([begin[:, 1:], written[:, -1:]], axis=1)
    parts = [loaded - begin, streamed - loaded, written - streamed, following - written]
    times = [
        _phase(name, [part[:, at:-1:PHASES_PER_LAYER] / clock for part in parts])
        for at, name in enumerate(PHASES)
    ]
    return [*times, _phase("head", [part[:, -1:] / clock for part in parts])]


def _within(
    mark: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
) -> NDArray[np.int64]:
    """A block without work in a phase leaves no mark, or an older step's: then it is ``low``."""
    return np.where((mark < low) | (mark > high), low, mark)


def _phase(name: str, parts: list[NDArray[np.float64]]) -> PhaseTime:
    """parts: load, stream, write, stall, each [blocks, layers]."""
    work = parts[0] + parts[1] + parts[2]
    load, stream, write, stall = (float(part.mean()) for part in parts)
    slowest = float(work.max(axis=0).mean())
    return PhaseTime(name, work.shape[1], load, stream, write, stall, slowest)


def as_table(times: list[PhaseTime]) -> str:
    """The times as text, one phase a line."""
    names = ("load", "stream", "write", "stall", "slowest", "total us")
    head = f"{'phase':12} {'times':>5}" + "".join(f"{name:>9}" for name in names)
    rows = [
        f"{t.phase:12} {t.count:5}{t.load_us:9.2f}{t.stream_us:9.2f}{t.write_us:9.2f}"
        f"{t.stall_us:9.2f}{t.most_work_us:9.2f}{t.total_us:9.2f}"
        for t in times
    ]
    return "\n".join([head, *rows])
