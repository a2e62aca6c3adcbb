"""Tuning: how the step kernel divides shared memory and work.

The rules read the device's attributes, never a table of card names. Nothing here changes a result
beyond the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import gcd

from .config import ModelConfig
from .errors import DeviceError
from .packing import Layout

MANY_COLUMNS = 8  # tokens of one step of the kernel that reads prompts: the width of an mma
ATTENTION_ROWS = 8  # query rows of one unit of attention, as in cuda/attend.cuh
_RING_BYTES_PER_STAGE = 16  # two mbarriers
_REDUCE_BYTES = 256  # sums of warps, then from 128 on struct Norms and who completes a team
_RANKING_BYTES = 1024 * 16 + 64  # the bins of cuda/ranking.cuh
_FEW_ROW_BLOCKS = 3  # of one block of the grid
_MOST_PARTS = 8  # of the columns of a matrix
_LEAST_WINDOW = 2  # row blocks whose partial sums are kept
_PANEL_STEP = 128  # columns: a multiple of every tile's width
_LINE_BYTES = 128  # of L2: copies that cut lines cost a tenth of the speed (docs/experiments.md)
_STAGE_BYTES = 8192  # about this much
_PREFETCH = 24  # chunks: where a multiprocessor's part of a layer is half a megabyte or more


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
    in_flight_bytes: int = 40960  # most bytes of copies that have not landed
    later_in_flight_bytes: int = 81920  # the same once a matrix has its activations
    prefetch: int = 0  # chunks beyond a full ring that may be brought into L2
    prefetch_ns: int = 150  # from one of them to the next
    bulk_copy: bool = True  # cp.async.bulk, sm_90 and newer; else cp.async
    grid: int = 132  # blocks
    shared_bytes: int = 232448
    max_splits: int = 64  # of the past, per KV head
    split_blocks: int = 8  # least blocks of 16 positions of a split
    prefill_tokens: int = 512  # most tokens of a prompt that one launch reads; 0: only steps do
    prefill_span: int = 256  # positions that a prompt's attention sums up at a time
    profile: bool = False  # compile the in-kernel timer in

    @property
    def threads(self) -> int:
        """Of a block of the step kernel: consumers, the producer's warp, the prefetcher's."""
        return 32 * (self.warps + 1 + (self.prefetch > 0))


@dataclass(frozen=True)
class SharedMap:
    """Where things lie in the shared memory of one kernel; offsets in bytes."""

    columns: int
    stages: int
    panel_cols: int  # most columns of activations at a time
    slots: int  # attention results kept at a time
    stage_data: int
    scratch: int
    reduce: int  # within scratch; what a phase needs lies before it, see Walk in cuda/matvec.cuh
    turns: int  # within scratch: rotations of each column's position
    total_bytes: int


def choose(
    config: ModelConfig,
    matrices: Mapping[str, Layout],
    device: DeviceFacts,
    **overrides: int | bool,
) -> Tuning:
    """The tuning for a model on a device. ``overrides`` replace single fields."""
    stage_bytes = _stage_bytes(config, matrices)
    # What was fastest: the less there is to stream, the more barriers suffer from what is queued
    # before them (docs/experiments.md).
    wide = all(m.type in ("bf16", "fp16") for m in matrices.values())
    in_flight_bytes = (5 if wide else 4) * stage_bytes
    chosen = Tuning(
        bulk_copy=device.compute_capability >= 90,
        grid=device.multiprocessors,
        shared_bytes=device.shared_bytes,
        stage_bytes=stage_bytes,
        in_flight_bytes=in_flight_bytes,
        later_in_flight_bytes=2 * in_flight_bytes,
        prefetch=_PREFETCH if _layer_bytes(matrices) >= device.multiprocessors << 19 else 0,
    )
    return replace(chosen, **overrides)  # type: ignore[arg-type]


def _layer_bytes(matrices: Mapping[str, Layout]) -> int:
    layer = [m for name, m in matrices.items() if name.startswith("layers.0.")]
    return sum(m.row_blocks * m.row_block_bytes for m in layer)


def _stage_bytes(config: ModelConfig, matrices: Mapping[str, Layout]) -> int:
    """Room for the nearest number of tiles of each matrix that are whole lines together, and for
    whole blocks of 16 positions."""
    steps = {_line_tiles(layout) * layout.tile_bytes for layout in matrices.values()}
    block = 64 * config.head_dim  # 16 positions of K and V
    return max(
        *(step * max(1, round(_STAGE_BYTES / step)) for step in steps),
        block * max(1, _STAGE_BYTES // block),
    )


def _line_tiles(layout: Layout) -> int:
    """The least number of tiles whose bytes are whole lines."""
    return _LINE_BYTES // gcd(layout.tile_bytes, _LINE_BYTES)


def chunk_tiles(layout: Layout, tuning: Tuning) -> int:
    """Tiles of one copy: as many as a stage holds, fewer where the warps of a block would idle.

    Where a block has few row blocks, each of them has a chunk for every warp. Chunks are whole
    lines where a stage holds one such number of tiles.
    """
    most = max(1, tuning.stage_bytes // layout.tile_bytes)
    row_blocks = -(-layout.row_blocks // tuning.grid)  # of one block
    chunks = max(-(-layout.tiles // most), tuning.warps if row_blocks <= _FEW_ROW_BLOCKS else 1)
    tiles = max(1, -(-layout.tiles // chunks))
    step = _line_tiles(layout)
    return tiles if step > most else min(_round_up(tiles, step), most // step * step)


def parts(layout: Layout, tuning: Tuning, panel_cols: int) -> int:
    """Blocks that share a matrix's columns in a step of several columns, and add up their sums.

    1 where the activations are one panel anyway. Else the number that divides the grid, makes each
    block's part one panel, and leaves a warp the fewest chunks; 1, and several panels, without one.
    """
    most = panel_cols // layout.tile_cols
    if layout.tiles <= most:
        return 1

    def chunks_of_warp(count: int) -> int:
        row_blocks = -(-layout.row_blocks * count // tuning.grid)
        chunks = -(-_part_tiles(layout, count) // chunk_tiles(layout, tuning))
        return -(-row_blocks * chunks // tuning.warps)

    fitting = [
        count
        for count in range(2, _MOST_PARTS + 1)
        if tuning.grid % count == 0
        and _part_tiles(layout, count) <= most
        and _part_tiles(layout, count) * (count - 1) < layout.tiles  # none is empty
    ]
    return min(fitting, key=chunks_of_warp, default=1)


def _part_tiles(layout: Layout, count: int) -> int:
    return -(-layout.tiles // count)


def shared_map(
    config: ModelConfig, layouts: Mapping[str, Layout], tuning: Tuning, columns: int
) -> SharedMap:
    """The largest ring that leaves a fair room, then the widest panel and window that fit.

    A fair room for activations is a third of shared memory, an eighth for one column, or what they
    need; where not even the smallest ring leaves that, less. Raises DeviceError when nothing fits.
    """
    rings = range(tuning.stages // tuning.warps * tuning.warps, 0, -tuning.warps)
    shares = (8, 12) if columns == 1 else (3, 6, 12)  # of shared memory
    for share, stages in product(shares, rings):
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
    stage_data = _round_up(stages * _RING_BYTES_PER_STAGE + 16, 128)
    scratch = stage_data + stages * tuning.stage_bytes
    turns_bytes = 4 * config.head_dim * columns
    room = (tuning.shared_bytes - scratch - _REDUCE_BYTES - turns_bytes) // 128 * 128
    slots = _attention_slots(config, tuning, columns, room)
    if slots is None or room < _RANKING_BYTES:
        return None
    widest = _round_up(max(layout.cols for layout in layouts.values()), _PANEL_STEP)
    sums = _sums_of_step(layouts)
    partials = _LEAST_WINDOW * tuning.warps * 16 * columns * 4
    panel = min(widest, _widest_panel(room - partials, columns, sums))
    if panel < min(widest, _least_panel(config, columns, fair_bytes)):
        return None
    turns = room + _REDUCE_BYTES
    return SharedMap(
        columns, stages, panel, slots, stage_data, scratch, room, turns,
        scratch + turns + turns_bytes,
    )  # fmt: skip


def _least_panel(config: ModelConfig, columns: int, fair_bytes: int) -> int:
    """Columns of activations that take ``fair_bytes``; one column is normed as a whole."""
    fair = fair_bytes // (2 * columns) // _PANEL_STEP * _PANEL_STEP
    whole = _round_up(config.dim, _PANEL_STEP) if columns == 1 else _PANEL_STEP
    return max(fair, whole)


def _sums_of_step(layouts: Mapping[str, Layout]) -> int:
    """Most sums over groups in _PANEL_STEP columns of activations; only integers need them."""
    integers = [layout for layout in layouts.values() if layout.type in ("int4", "int8")]
    return max((_PANEL_STEP // layout.group_size for layout in integers), default=0)


def _widest_panel(room: int, columns: int, sums: int) -> int:
    """Columns of activations that fit, as Walk in cuda/matvec.cuh lays them out."""
    per_step, padding = columns * (_PANEL_STEP * 2 + sums * 4), columns * 64 + 12
    return max(0, (room - padding) // per_step) * _PANEL_STEP


def _attention_bytes(config: ModelConfig, columns: int, slots: int) -> int:
    queries, fresh = ATTENTION_ROWS * (config.head_dim * 2 + 16), 64 * config.head_dim
    group = config.n_heads // config.n_kv_heads
    rows = min(ATTENTION_ROWS, group) if columns == 1 else ATTENTION_ROWS
    return queries + fresh + slots * rows * (config.head_dim + 6) * 4


def _attention_slots(config: ModelConfig, tuning: Tuning, columns: int, room: int) -> int | None:
    """Most warps whose results lie in shared memory at a time: a divisor of the warps, or None."""
    for slots in range(tuning.warps, 0, -1):
        if tuning.warps % slots == 0 and _attention_bytes(config, columns, slots) <= room:
            return slots
    return None


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
