"""From a model's facts to the source of its kernel: constants, the launch arguments, one string.

Each fact is stated once, here or in the weight file, and everything else is printed from it. The
sources in ``cuda/`` are pasted into one string with ``#line`` directives, because CuPy's cache of
compiled kernels does not look into included files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelConfig
from .errors import DeviceError
from .packing import Layout
from .prefill_layout import (
    DEALT_ROW_WARPS,
    FEW_TOKENS,
    parts_before,
    prefill_barriers,
    prefill_part_bytes,
    prefill_parts,
    prefill_struct,
    prefill_token_bytes,
    prefill_tokens,
)
from .resources import resource_dir
from .sampling import MAX_LOGPROBS
from .tensors import expected_tensors
from .tuning import MANY_COLUMNS, SharedMap, Tuning, chunk_tiles, parts, shared_map
from .workspace import (
    PHASES_PER_LAYER,
    TAIL_BYTES,
    max_teams,
    team_row_blocks,
    workspace_offsets,
    workspace_struct,
)

KERNELS = ("step_one", "step_many")
PREFILLS = ("prefill", "prefill_few")  # kernels that read prompts: the second up to FEW_TOKENS
TAIL_BARRIERS = 1  # of a step that ranks the vocabulary, beside the layers'
ALARM_GRID_BARRIER, ALARM_RING, ALARM_WORD = 1, 2, 3  # what was waited for in vain
_ALIGN = 256  # bytes, of every tensor on the device
_ABSENT = 0xFFFFFFFFFFFFFFFF
_KINDS = {"bf16": "kBf16", "fp16": "kFp16", "fp8": "kFp8", "int8": "kInt8", "int4": "kInt4"}
_LAYER_MATRICES = ("wqkv", "wo", "w_gate_up", "w_down")
_LAYER_VECTORS = (
    "attn_norm", "wqkv_bias", "q_norm", "k_norm", "wo_bias", "ffn_norm", "w_gate_up_bias",
    "w_down_bias",
)  # fmt: skip


def step_args_dtype(head_dim: int) -> np.dtype[np.void]:
    """The launch arguments of both kernels, laid out as C lays out a struct."""
    fields: list[tuple[Any, ...]] = [
        ("weights", "u8*"), ("kv_cache", "u8*"), ("workspace", "u8*"),
        ("mailbox", "u64*"),  # host memory: ticket << 32 | token
        ("alarm", "u32*"),  # host memory [8]: kind, block, phase, expected, seen
        ("kv_layer_bytes", "u64"), ("watchdog_ns", "u64"), ("seed", "u64"),
        ("top_p", "double"),
        ("report", "u8*"),  # host memory: struct Report of cuda/decide.cuh
        ("resumed", "float*"),  # what prefill left of the token before the last layer; null: none
        ("rope_turns", "u64", (head_dim // 2,)),  # one position's advance, in 2^-64 turns
        ("rope_scale", "float"), ("temperature", "float"), ("min_p", "float"),
        ("repetition", "float"), ("presence", "float"), ("frequency", "float"),
        # of a step or a few of a prompt; -1: the token that the previous launch chose
        ("tokens", "int", (FEW_TOKENS,)),
        ("position", "int"),  # of tokens[0]
        ("n_columns", "int"), ("max_blocks", "int"),  # blocks of 16 positions in the cache
        ("head", "int"), ("logits", "int"), ("greedy", "int"), ("filters", "int"),
        ("top_k", "int"),
        ("adjust", "int"), ("ban_ends", "int"), ("mask", "int"),  # steps a-d of sampling.py, e
        ("logprobs", "int"),  # so many of the likeliest tokens; -1: no report
        ("barrier_base", "u32"),  # arrivals at the grid barrier before this launch
        ("first_phase", "u32"),  # the number of its first phase
        ("ticket", "u32"),
        ("prefill_tokens", "int"),  # that the workspace has room for
    ]  # fmt: skip
    columns = [(f[0], _NUMPY_TYPES[f[1]], *f[2:]) for f in fields]
    metadata = {"c": [(f[1], f[0], f[2][0] if len(f) > 2 else 0) for f in fields]}
    packed: Any = np.dtype(columns, align=True)
    described: np.dtype[np.void] = np.dtype(packed, metadata=metadata)
    return described


_NUMPY_TYPES = {
    "u8*": "u8", "float*": "u8", "u64*": "u8", "u32*": "u8", "u64": "u8", "double": "f8",
    "float": "f4", "int": "i4", "u32": "u4",
}  # fmt: skip


@dataclass(frozen=True)
class WeightMap:
    """Where each tensor lies in the weight arena; all layers are alike, ``layer_bytes`` apart."""

    offsets: Mapping[str, int]
    layers: int
    layer_bytes: int
    nbytes: int


@dataclass(frozen=True)
class Program:
    """A model's kernels: what to compile and what a launch needs to know."""

    source: str  # of the steps
    prefill_source: str
    weights: WeightMap
    maps: Mapping[str, SharedMap]  # by kernel name
    tuning: Tuning
    args: np.dtype[np.void]
    workspace: Mapping[str, int]  # offsets in bytes; "total" is the size
    phases: int  # of one step: the embedding, the layers', the head
    barriers: int  # grid barriers of one step of several columns
    prefill_barriers: int
    prefill_tokens: int  # most of one launch; 0: none
    prefill_residual: int  # where one leaves the residual before the last layer, in the workspace
    tail_barriers: int = TAIL_BARRIERS  # more where a step ranks the vocabulary

    def source_of(self, kernel: str) -> str:
        return self.prefill_source if kernel in PREFILLS else self.source

    def barriers_of(self, kernel: str, *, ranks: bool = False) -> int:
        """Grid barriers of one launch; a step for one token has none but its tail's."""
        layers = {"step_one": 0, "step_many": self.barriers}
        layers |= dict.fromkeys(PREFILLS, self.prefill_barriers)
        return layers[kernel] + self.tail_barriers * ranks

    def launch_shape(self, kernel: str) -> tuple[int, int]:
        """Threads and bytes of shared memory of a block."""
        consumers = 32 * self.tuning.warps
        if kernel in PREFILLS:
            return consumers, self.tuning.shared_bytes
        return self.tuning.threads, self.maps[kernel].total_bytes


def generate(
    config: ModelConfig,
    matrices: Mapping[str, Layout],
    tuning: Tuning,
    *,
    kv_type: str = "bf16",
    max_context: int | None = None,
) -> Program:
    """The program for a model. matrices: {name: Layout} as in a Checkpoint; kv_type: bf16 or fp16.

    max_context: positions, when fewer than the model's: a shorter workspace, the same source.

    Raises DeviceError when the kernel cannot run this model, naming why.
    """
    _check(config, matrices)
    layouts = {kind: matrices[f"layers.0.{kind}"] for kind in _LAYER_MATRICES}
    layouts |= {"embed": matrices["embed"], "head": matrices["embed" if config.tied else "lm_head"]}
    weights = weight_map(config, matrices)
    maps = {
        name: shared_map(config, layouts, tuning, columns)
        for name, columns in zip(KERNELS, (1, MANY_COLUMNS), strict=True)
    }
    args = step_args_dtype(config.head_dim)
    per_token = prefill_token_bytes(config, layouts)
    tokens = prefill_tokens(tuning, max_context or config.max_context)
    panel_cols = maps["step_many"].panel_cols
    # Who makes a logit ranks it (cuda/decide.cuh): the head is not in parts.
    shared = {kind: parts(layout, tuning, panel_cols) for kind, layout in layouts.items()}
    shared |= {"embed": 1, "head": 1}
    workspace = workspace_offsets(
        config, tuning, team_row_blocks(layouts, shared), tokens * sum(per_token.values()),
        prefill_part_bytes(config, tuning) if tokens else 0,
    )  # fmt: skip
    constants = "\n".join([
        "#pragma once", '#include "tensor.cuh"',
        _tuning_constants(tuning, maps), _model_constants(config, kv_type),
        _tensor_constants(config, layouts, weights, tuning, shared), _args_struct(args),
        *(_map_struct(n, m) for n, m in zip(("MapOne", "MapMany"), maps.values(), strict=True)),
        workspace_struct(workspace), prefill_struct(workspace["prefill"], per_token),
    ])  # fmt: skip
    source, prefill_source = (
        join_sources(resource_dir("cuda"), root, {"config.cuh": constants})
        for root in ("step.cu", "prefill.cu")
    )
    phases = 1 + PHASES_PER_LAYER * config.n_layers + 1
    return Program(
        source, prefill_source, weights, maps, tuning, args, workspace,
        phases, phases - 1, prefill_barriers(config, layouts), tokens,
        workspace["prefill"] + tokens * parts_before("residual", per_token),
    )  # fmt: skip


def join_sources(folder: Path, root: str, generated: Mapping[str, str]) -> str:
    """``root`` with every ``#include "..."`` of the folder pasted in once, ``#line`` around it."""
    seen: set[str] = set()

    def paste(name: str) -> str:
        seen.add(name)
        text = generated[name] if name in generated else (folder / name).read_text(encoding="utf-8")
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate(text.splitlines(), 1):
            include = re.fullmatch(r'#include "(\w+\.cuh)"', line)
            if include and include[1] not in seen:
                lines += [paste(include[1]), f'#line {number + 1} "{name}"']
            else:
                lines.append("" if include or line == "#pragma once" else line)
        return "\n".join(lines)

    return paste(root) + "\n"


def weight_map(config: ModelConfig, matrices: Mapping[str, Layout]) -> WeightMap:
    """Offsets of all tensors in the arena, in file order, each aligned to 256 bytes."""
    sizes = {
        name: _tensor_bytes(name, shape, matrices)
        for name, shape in expected_tensors(config).items()
    }
    offsets, end = {}, 0
    for name, nbytes in sizes.items():
        offsets[name] = end
        end += -(-nbytes // _ALIGN) * _ALIGN
    first = offsets["layers.0.attn_norm"]
    after = offsets["layers.1.attn_norm"] if config.n_layers > 1 else offsets["final_norm"]
    return WeightMap(offsets, first, after - first, end)


def _tensor_bytes(name: str, shape: tuple[int, ...], matrices: Mapping[str, Layout]) -> int:
    layout = matrices.get(name)
    return 4 * shape[0] if layout is None else layout.row_blocks * layout.row_block_bytes


def _check(config: ModelConfig, matrices: Mapping[str, Layout]) -> None:
    if config.head_dim not in (64, 96, 128):
        raise DeviceError(
            f"the kernel supports head_dim 64, 96 and 128, this model has {config.head_dim}; "
            "use device='cpu'"
        )
    for key in ("dim", "hidden_dim"):
        if getattr(config, key) % 32:
            raise DeviceError(
                f"the kernel needs {key} to be a multiple of 32, found {getattr(config, key)}; "
                "use device='cpu'"
            )
    for name, layout in matrices.items():
        if layout.type not in _KINDS:
            raise DeviceError(
                f"tensor {name} has type {layout.type}; the kernel supports {', '.join(_KINDS)}: "
                "convert with --quant"
            )
        kind = name.rpartition(".")[2]
        if name.startswith("layers.") and layout != matrices[f"layers.0.{kind}"]:
            raise DeviceError(
                f"tensor {name} is stored differently from layer 0's; the kernel needs all layers "
                "alike: convert with --quant"
            )


def _tuning_constants(tuning: Tuning, maps: Mapping[str, SharedMap]) -> str:
    return "\n".join([
        f"constexpr int kWarps = {tuning.warps}, kConsumers = {32 * tuning.warps};",
        f"constexpr int kThreads = {tuning.threads}, kStageBytes = {tuning.stage_bytes};",
        f"constexpr int kPrefetch = {tuning.prefetch}, kPrefetchNs = {tuning.prefetch_ns};",
        f"constexpr int kMaxSplits = {tuning.max_splits}, kSplitBlocks = {tuning.split_blocks};",
        f"constexpr int kGrid = {tuning.grid}, kSharedBytes = {tuning.shared_bytes};",
        f"constexpr u32 kInFlightBytes = {tuning.in_flight_bytes}, "
        f"kLaterInFlightBytes = {tuning.later_in_flight_bytes};",
        f"constexpr bool kBulkCopy = {_bool(tuning.bulk_copy)};",
        f"constexpr bool kProfile = {_bool(tuning.profile)};",
        f"constexpr int kSpan = {tuning.prefill_span}, kMostParts = {prefill_parts(tuning)};",
        f"constexpr int kDealtRowWarps = {DEALT_ROW_WARPS};",
        f"constexpr int kTailBytes = {TAIL_BYTES}, kMostLogprobs = {MAX_LOGPROBS};",
        f"constexpr u32 kAlarmGridBarrier = {ALARM_GRID_BARRIER}, kAlarmRing = {ALARM_RING};",
        f"constexpr u32 kAlarmWord = {ALARM_WORD};",
    ])  # fmt: skip


def _model_constants(config: ModelConfig, kv_type: str) -> str:
    scale = np.float32(np.log2(np.e) / np.sqrt(config.head_dim))
    windows = sorted(set(config.windows))
    table, window = "", f"return {windows[0]};"
    if len(windows) > 1:
        table = f"__device__ constexpr int kWindows[] = {{{', '.join(map(str, config.windows))}}};"
        window = "return kWindows[layer];"
    return f"""constexpr bool kKvBf16 = {_bool(kv_type == "bf16")};
namespace model {{
constexpr int kDim = {config.dim}, kHiddenDim = {config.hidden_dim}, kHeadDim = {config.head_dim};
constexpr int kLayers = {config.n_layers}, kHeads = {config.n_heads};
constexpr int kKvHeads = {config.n_kv_heads}, kVocab = {config.vocab_size};
constexpr float kNormEps = {np.float32(config.norm_eps)!s}f, kScoreScale = {scale!s}f;
constexpr bool kQkNorm = {_bool(config.qk_norm)};
{table}
__device__ constexpr int window([[maybe_unused]] int layer) {{ {window} }}
}}
constexpr int kMaxTeams = {max_teams(config)};
constexpr int kPhases = {PHASES_PER_LAYER * config.n_layers + 1};"""


def _tensor_constants(
    config: ModelConfig,
    layouts: Mapping[str, Layout],
    weights: WeightMap,
    tuning: Tuning,
    shared: Mapping[str, int],
) -> str:
    names = {"embed": "embed", "head": "embed" if config.tied else "lm_head"}
    lines = [
        f"constexpr u64 kAbsent = {_ABSENT}ull;",
        f"constexpr u64 kLayersOffset = {weights.layers}ull;",
        f"constexpr u64 kLayerBytes = {weights.layer_bytes}ull;",
    ]
    for kind, layout in layouts.items():
        base = (
            weights.offsets[names[kind]]
            if kind in names
            else weights.offsets[f"layers.0.{kind}"] - weights.layers
        )
        lines.append(
            f"constexpr Matrix {kind}{{{base}ull, {layout.rows}, {layout.cols}, "
            f"Type::{_KINDS[layout.type]}, {layout.group_size}, {chunk_tiles(layout, tuning)}, "
            f"{shared[kind]}}};"
        )
    for kind in _LAYER_VECTORS:
        name = f"layers.0.{kind}"
        offset = weights.offsets[name] - weights.layers if name in weights.offsets else _ABSENT
        lines.append(f"constexpr u64 {kind} = {offset}ull;")
    lines.append(f"constexpr u64 final_norm = {weights.offsets['final_norm']}ull;")
    return "namespace tensors {\n" + "\n".join(lines) + "\n}"


def _args_struct(args: np.dtype[np.void]) -> str:
    assert args.metadata is not None
    members = [
        f"  {c_type} {name}{f'[{count}]' if count else ''};"
        for c_type, name, count in args.metadata["c"]
    ]
    size = f"sizeof(StepArgs) == {args.itemsize}"
    check = f'static_assert({size}, "StepArgs differs from step_args_dtype");'
    return "\n".join(["struct StepArgs {", *members, "};", check])


def _map_struct(name: str, m: SharedMap) -> str:
    return f"""struct {name} {{
  static constexpr int kColumns = {m.columns}, kStages = {m.stages};
  static constexpr int kPanelCols = {m.panel_cols}, kReduce = {m.reduce};
  static constexpr int kTurns = {m.turns};
  static constexpr int kSlots = {m.slots}, kStageData = {m.stage_data}, kScratch = {m.scratch};
  static constexpr int kTotalBytes = {m.total_bytes};
}};"""


def _bool(value: bool) -> str:
    return "true" if value else "false"
