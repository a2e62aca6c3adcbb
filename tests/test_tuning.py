"""The rules of tuning give configurations that work on every card, for every shape."""

from __future__ import annotations

from dataclasses import astuple
from itertools import pairwise

import pytest

from minflash.codegen import KERNELS, generate
from minflash.config import ModelConfig
from minflash.errors import DeviceError
from minflash.packing import Layout
from minflash.shapes import shape_config, shape_layouts
from minflash.tuning import DeviceFacts, Tuning, choose, chunk_tiles, parts

SHAPES = ("smollm2-135m", "llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b")
MULTIPROCESSORS = (82, 108, 114, 128, 132, 148, 170)
SHARED_BYTES = (101376, 166912, 232448)  # 99, 163 and 227 KiB of a block
QUANTS = ("bf16", "fp16", "fp8", "int8", "int4")
CARDS = [
    DeviceFacts(80, 108, 166912), DeviceFacts(86, 82, 101376), DeviceFacts(89, 128, 101376),
    DeviceFacts(90, 132, 232448), DeviceFacts(90, 114, 232448), DeviceFacts(100, 148, 232448),
    DeviceFacts(120, 170, 101376),
]  # fmt: skip


def shape(name: str, quant: str) -> tuple[ModelConfig, dict[str, Layout]]:
    config = shape_config(name)
    return config, shape_layouts(config, quant, None)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_card_gets_a_configuration_that_works(name: str, quant: str) -> None:
    config, layouts = shape(name, quant)
    facts = [*CARDS, *(DeviceFacts(90, m, s) for m in MULTIPROCESSORS for s in SHARED_BYTES)]
    for device in facts:
        tuning = choose(config, layouts, device)
        check_tuning(tuning, device, config)
        check_shared_memory(config, layouts, tuning)


def check_tuning(tuning: Tuning, device: DeviceFacts, config: ModelConfig) -> None:
    assert tuning.bulk_copy == (device.compute_capability >= 90)
    assert tuning.grid == device.multiprocessors
    assert tuning.shared_bytes == device.shared_bytes
    assert 32 * (tuning.warps + 1) <= 1024
    # A stage holds a block of 16 positions of K and V.
    assert tuning.stage_bytes >= 64 * config.head_dim
    assert tuning.stage_bytes % 128 == 0
    # More bytes in flight than one stage, or copies could not overlap.
    assert tuning.stage_bytes < tuning.in_flight_bytes


def check_shared_memory(config: ModelConfig, layouts: dict[str, Layout], tuning: Tuning) -> None:
    program = generate(config, layouts, tuning)
    for name in KERNELS:
        m = program.maps[name]
        assert m.stages % tuning.warps == 0 < m.stages  # a warp owns fixed stages
        assert m.total_bytes <= tuning.shared_bytes
        assert m.stage_data % 128 == 0 and m.scratch % 128 == 0  # bulk copies need 16
        assert m.stages * (8 + 8) + 16 <= m.stage_data  # the mbarriers lie before, and two words
        assert m.stage_data + m.stages * tuning.stage_bytes <= m.scratch
        # Before `reduce`: activations, their sums over groups, partial sums of two row blocks.
        sums = sum_count(layouts, m.panel_cols)
        activations = m.columns * (2 * m.panel_cols + 64 + 4 * sums)
        assert activations + 2 * tuning.warps * 16 * m.columns * 4 <= m.reduce
        assert m.reduce % 16 == 0 and m.scratch + m.reduce < m.total_bytes
        assert m.panel_cols >= 128 and m.panel_cols % 128 == 0
        assert tuning.warps % m.slots == 0


def sum_count(layouts: dict[str, Layout], cols: int) -> int:
    """Sums over groups of so many activations, for the smallest groups of integers."""
    groups = [m.group_size for m in layouts.values() if m.type in ("int4", "int8")]
    return -(-cols // min(groups)) if groups else 0


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", SHAPES)
def test_teams_cover_a_matrix_with_a_panel_each(name: str, quant: str) -> None:
    config, layouts = shape(name, quant)
    for device in CARDS:
        tuning = choose(config, layouts, device)
        panel_cols = generate(config, layouts, tuning).maps["step_many"].panel_cols
        for layout in set(layouts.values()):
            count, most = parts(layout, tuning, panel_cols), panel_cols // layout.tile_cols
            assert tuning.grid % count == 0
            assert (count == 1) >= (layout.tiles <= most)  # no team where one panel is all
            if count > 1:
                tiles = -(-layout.tiles // count)
                assert tiles <= most and (count - 1) * tiles < layout.tiles


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", SHAPES)
def test_chunks_fill_stages_without_overflow(name: str, quant: str) -> None:
    config, layouts = shape(name, quant)
    for device in CARDS:
        tuning = choose(config, layouts, device)
        for layout in set(layouts.values()):
            tiles = chunk_tiles(layout, tuning)
            assert 1 <= tiles <= layout.tiles
            assert tiles * layout.tile_bytes <= tuning.stage_bytes
            # Whole lines of L2, except where all of a row block is one copy.
            assert tiles == layout.tiles or tiles * layout.tile_bytes % 128 == 0


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_and_workspace_do_not_overlap(name: str) -> None:
    config, layouts = shape(name, "int4")
    program = generate(config, layouts, choose(config, layouts, CARDS[3]))
    offsets = sorted(program.weights.offsets.values())
    assert all(offset % 256 == 0 for offset in offsets)
    for tensor, layout in layouts.items():
        begin = program.weights.offsets[tensor]
        end = begin + layout.row_blocks * layout.row_block_bytes
        assert end <= min((o for o in offsets if o > begin), default=program.weights.nbytes)
    # All layers alike: a layer's tensors lie layer_bytes after those of the layer before.
    for kind in ("attn_norm", "wqkv", "w_down"):
        places = [program.weights.offsets[f"layers.{i}.{kind}"] for i in range(config.n_layers)]
        assert {b - a for a, b in pairwise(places)} == {program.weights.layer_bytes}
    work = list(program.workspace.values())
    assert work == sorted(work)  # a part that nothing uses is empty
    assert all(offset % 256 == 0 for offset in work)


def test_overrides_replace_single_fields() -> None:
    config, layouts = shape("llama-3.2-1b", "bf16")
    plain = choose(config, layouts, CARDS[3])
    changed = choose(config, layouts, CARDS[3], warps=4)
    assert changed.warps == 4
    different = [a != b for a, b in zip(astuple(plain), astuple(changed), strict=True)]
    assert sum(different) == 1


def test_too_little_shared_memory_is_an_error_with_numbers() -> None:
    config, layouts = shape("llama-3.1-70b", "bf16")
    with pytest.raises(DeviceError, match="49152 bytes of shared memory"):
        generate(config, layouts, choose(config, layouts, DeviceFacts(75, 40, 49152)))
