"""Tuning: how the step kernel divides shared memory and work.

The rules read the device's attributes, never a table of card names. Nothing here changes a result
beyond the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from .config import ModelConfig
from .errors import DeviceError
from .packing import Layout

MANY_COLUMNS = 8  # tokens of one step of the kernel that reads prompts: the width of an mma
ATTENTION_ROWS = 8  # query rows of one unit of attention, as in cuda/attention.cuh
_RING_BYTES_PER_STAGE = 16  # two mbarriers
_REDUCE_BYTES = 256
_SELECT_BYTES = 2048 * 8 + 64
_LEAST_WINDOW, _MOST_WINDOW = 4, 32
_PANEL_STEP = 128  # columns: a multiple of every tile's width


@dataclass(frozen=True)
class DeviceFacts:
    """What tuning asks of a device."""

    compute_capability: int  # 90 for 9.0
    multiprocessors: int
    shared_bytes: int  # dynamic shared memory that one block may ask for


@dataclass(frozen=True)
class Tuning:
    """Choices that hold for all kernels of a module. Fields may be overridden for experiments."""

    warps: int = 8  # consumer warps
    stages: int = 24  # most stages of the ring; a kernel takes fewer where memory is short
    stage_bytes: int = 8192
    in_flight_bytes: int = (
        40960  # most bytes of copies that have not landed, see docs/experiments.md
    )
    bulk_copy: bool = True  # cp.async.bulk, sm_90 and newer; else cp.async
    grid: int = 132  # blocks
    shared_bytes: int = 232448
    max_splits: int = 64  # of the past, per KV head
    split_blocks: int = 8  # least blocks of 16 positions of a split
    prefill_tokens: int = 512  # most tokens of a prompt that one launch reads; 0: only steps do
    profile: bool = False  # compile the in-kernel timer in


@dataclass(frozen=True)
class SharedMap:
    """Where things lie in the shared memory of one kernel; offsets in bytes."""

    columns: int
    stages: int
    panel_cols: int
    column_stride: int
    window: int  # row blocks whose partial sums are kept
    slots: int  # attention results kept at a time
    stage_data: int
    scratch: int
    sums: int  # within scratch, as are the following
    partials: int
    reduce: int
    total_bytes: int


def choose(config: ModelConfig, device: DeviceFacts, **overrides: int | bool) -> Tuning:
    """The tuning for a model on a device. ``overrides`` replace single fields."""
    block = 64 * config.head_dim  # 16 positions of K and V
    chosen = Tuning(
        bulk_copy=device.compute_capability >= 90,
        grid=device.multiprocessors,
        shared_bytes=device.shared_bytes,
        stage_bytes=8192 // block * block if block <= 8192 else block,
    )
    return replace(chosen, **overrides)  # type: ignore[arg-type]


def chunk_tiles(layout: Layout, tuning: Tuning) -> int:
    """Tiles of one copy: as many as a stage holds, fewer where the warps of a block would idle."""
    most = max(1, tuning.stage_bytes // layout.tile_bytes)
    row_blocks = -(-layout.row_blocks // tuning.grid)  # of one block
    chunks = max(-(-layout.tiles // most), -(-tuning.warps // row_blocks))
    return max(1, -(-layout.tiles // chunks))


def shared_map(
    config: ModelConfig, layouts: Mapping[str, Layout], tuning: Tuning, columns: int
) -> SharedMap:
    """The largest ring that leaves a fair room, then the widest panel and window that fit.

    A fair room for activations is a third of shared memory, or what all columns need; where not
    even the smallest ring leaves that, less. Raises DeviceError when nothing fits.
    """
    rings = range(tuning.stages // tuning.warps * tuning.warps, 0, -tuning.warps)
    for share, stages in product((3, 6, 12), rings):
        found = _with_stages(config, layouts, tuning, columns, stages, tuning.shared_bytes // share)
        if found is not None:
            return found
    raise DeviceError(
        f"the kernel for {columns} columns does not fit into {tuning.shared_bytes} bytes of shared "
        f"memory: {tuning.warps} stages of {tuning.stage_bytes} bytes and its activations need more"
    )


def _with_stages(
    config: ModelConfig,
    layouts: Mapping[str, Layout],
    tuning: Tuning,
    columns: int,
    stages: int,
    fair_bytes: int,
) -> SharedMap | None:
    stage_data = _round_up(stages * _RING_BYTES_PER_STAGE, 128)
    scratch = stage_data + stages * tuning.stage_bytes
    room = tuning.shared_bytes - scratch - _REDUCE_BYTES
    slots = _attention_slots(config, tuning, room)
    if slots is None or room < _SELECT_BYTES:
        return None
    window_bytes = tuning.warps * 16 * columns * 4
    widest = _round_up(max(layout.cols for layout in layouts.values()), _PANEL_STEP)
    panel = min(widest, _widest_panel(room - _LEAST_WINDOW * window_bytes, columns))
    if panel < min(widest, _least_panel(config, columns, fair_bytes)):
        return None
    stride = _column_stride(panel)
    sums = columns * stride
    partials = sums + columns * (panel // 32) * 4
    window = min(_MOST_WINDOW, (room - partials) // window_bytes)
    used = max(partials + window * window_bytes, _attention_bytes(config, slots), _SELECT_BYTES)
    reduce = _round_up(used, 128)
    return SharedMap(
        columns, stages, panel, stride, window, slots, stage_data, scratch, sums, partials, reduce,
        scratch + reduce + _REDUCE_BYTES,
    )  # fmt: skip


def _least_panel(config: ModelConfig, columns: int, fair_bytes: int) -> int:
    """Columns of activations that take ``fair_bytes``; one column is normed as a whole."""
    fair = fair_bytes // (2 * columns) // _PANEL_STEP * _PANEL_STEP
    whole = _round_up(config.dim, _PANEL_STEP) if columns == 1 else _PANEL_STEP
    return max(fair, whole)


def _column_stride(panel_cols: int) -> int:
    """Bytes from column to column: eight columns meet different banks."""
    return panel_cols * 2 + 64


def _widest_panel(room: int, columns: int) -> int:
    per_step = columns * (_PANEL_STEP * 2 + _PANEL_STEP // 32 * 4)
    return max(0, (room - columns * 64) // per_step) * _PANEL_STEP


def _attention_bytes(config: ModelConfig, slots: int) -> int:
    queries, fresh = ATTENTION_ROWS * (config.head_dim * 2 + 16), 64 * config.head_dim
    return queries + fresh + slots * ATTENTION_ROWS * (config.head_dim + 2) * 4


def _attention_slots(config: ModelConfig, tuning: Tuning, room: int) -> int | None:
    """Most warps whose results lie in shared memory at a time: a divisor of the warps, or None."""
    for slots in range(tuning.warps, 0, -1):
        if tuning.warps % slots == 0 and _attention_bytes(config, slots) <= room - 128:
            return slots
    return None


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
