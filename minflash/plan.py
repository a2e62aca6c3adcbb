"""What a model will take on a GPU, before it is loaded: bytes, the longest context, the best speed.

Only headers are read. The numbers are those of the code that loads: the weight arena and workspace
of ``codegen``, the KV cache of ``gpu_memory``, the bytes of a step of ``bench``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import as_path
from .cache import cached_model
from .cards import Card, find_card
from .codegen import Program, generate
from .config import ModelConfig
from .context import check_own
from .convert_types import Wanted, choose
from .cuda_engine import LARGEST_CARD
from .errors import ArgumentError, CheckpointError, ConfigError
from .gpu_memory import cache_bytes, fixed_bytes, positions_that_fit, step_bytes
from .hub_cache import hub_snapshot
from .packing import Layout
from .safetensors_file import read_json
from .shapes import SHAPES, shape_config, shape_layouts
from .source import GGUFSource
from .tensors import QUANT_METHOD, expected_tensors
from .tuning import DeviceFacts
from .tuning import choose as choose_tuning

_STORED = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # torch_dtype in config.json


@dataclass(frozen=True)
class Described:
    """A model as far as its headers tell it."""

    name: str
    config: ModelConfig
    matrices: Mapping[str, Layout]
    notes: tuple[str, ...] = ()  # what was assumed


@dataclass(frozen=True)
class Room:
    """A GPU: what it has free and how fast it reads. None: not known."""

    name: str
    free_bytes: int | None
    gb_per_s: float | None
    facts: DeviceFacts = LARGEST_CARD
    origin: str = ""  # of the numbers: "datasheet", "given", "measured"


@dataclass(frozen=True)
class Plan:
    """The answer. Bytes; positions; tokens per second of one stream of text."""

    model: str
    types: dict[str, int]  # bytes of the matrices of each type
    weight_bytes: int
    workspace_bytes: int
    context: int  # positions that the following numbers are for
    cache_bytes: int
    total_bytes: int
    model_context: int  # the model's own limit
    gpu: str
    free_bytes: int | None
    fits: bool | None  # None: nothing is known of the memory
    largest_context: int | None  # 0: no room beside weights and workspace
    gb_per_s: float | None
    bandwidth_origin: str
    step_bytes_empty: int  # that one step reads at the first position
    step_bytes_full: int  # and at the last one of the context
    tokens_per_s_empty: float | None  # upper bounds: the bandwidth divided by these bytes
    tokens_per_s_full: float | None
    notes: tuple[str, ...]


def plan(model: Described, room: Room, context: int | None = None) -> Plan:
    """The plan for a model on a GPU. context: positions; None: the most that fits.

    Raises ContextError when ``context`` is more than the model's own, and DeviceError when the
    kernel cannot run the model.
    """
    config, own = model.config, model.config.max_context
    check_own(context, own, "the context")
    program = _program(model, room.facts)
    fixed = fixed_bytes(program)
    largest = None
    if room.free_bytes is not None:
        largest = min(own, positions_that_fit(config, fixed, room.free_bytes))
    positions = context or largest or own
    cache = cache_bytes(config, positions)
    matrices = dict(model.matrices)
    empty, full = step_bytes(config, matrices, 0), step_bytes(config, matrices, positions)
    speed = None if room.gb_per_s is None else room.gb_per_s * 1e9
    return Plan(
        model.name, _types(model.matrices), program.weights.nbytes, program.workspace["total"],
        positions, cache, fixed + cache, own, room.name, room.free_bytes,
        None if largest is None else largest > 0 and positions <= largest, largest,
        room.gb_per_s, room.origin, empty, full,
        speed and speed / empty, speed and speed / full, model.notes,
    )  # fmt: skip


def _program(model: Described, facts: DeviceFacts) -> Program:
    tuning = choose_tuning(model.config, model.matrices, facts)
    return generate(model.config, model.matrices, tuning)


def _types(matrices: Mapping[str, Layout]) -> dict[str, int]:
    found: dict[str, int] = {}
    for layout in matrices.values():
        kind = f"{layout.type}-g{layout.group_size}" if layout.group_size else layout.type
        found[kind] = found.get(kind, 0) + layout.row_blocks * layout.row_block_bytes
    return found


# Models


def describe_shape(name: str, quant: str | None, group_size: int | None) -> Described:
    """A named shape; without ``quant`` in bf16. Raises ArgumentError."""
    config = shape_config(name)
    kind = quant or "bf16"
    label = name if quant else f"{name} (in bf16)"
    return Described(label, config, shape_layouts(config, kind, group_size))


def describe(
    source: str | os.PathLike[str] | None, quant: str | None = None, group_size: int | None = None
) -> Described:
    """What the headers at ``source`` tell: a converted folder, a Hugging Face folder (of which only
    config.json is read), a GGUF file, a name that ``minflash list`` prints, or None for
    MINFLASH_MODEL or the default model.

    quant, group_size: as in ``convert``. Raises a MinflashError.
    """
    wanted = Wanted(quant, group_size, None)
    path = _path(_named(source))
    if os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long
        return _describe_gguf(path, wanted)
    if not os.path.isdir(path):
        raise CheckpointError(
            f"{path}: there is no such file or folder; plan takes a folder, a GGUF file or a name "
            f"of minflash list that is here already, or --shape of {', '.join(SHAPES)}"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: holds no config.json, so that it is not a model's folder")
    config = read_json(path / "config.json", ConfigError)
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        return _describe_converted(path, wanted)
    return _describe_hf(path, config, wanted)


def _path(source: str | os.PathLike[str]) -> Path:
    path = as_path("a model", source)
    if isinstance(source, str) and not os.path.exists(path):
        return cached_model(source) or hub_snapshot(source) or path
    return path


def _named(source: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    if source is not None:
        return source
    if chosen := os.environ.get("MINFLASH_MODEL"):
        return chosen
    from .default_model import Manifest

    folder = Manifest.load().folder
    if (folder / "config.json").is_file():
        return folder
    raise ArgumentError(
        "the default model is not here yet; minflash run fetches it, or name a model, or take "
        f"--shape of {', '.join(SHAPES)}"
    )


def _describe_converted(path: Path, wanted: Wanted) -> Described:
    from .checkpoint import open_checkpoint

    if wanted.quant is not None or wanted.group_size is not None:
        raise ArgumentError(
            f"{path} is already converted, so that --quant and --group-size cannot apply; leave "
            "them out, or name the original model"
        )
    with open_checkpoint(path) as checkpoint:
        return Described(str(path), checkpoint.config, checkpoint.matrices)


def _describe_hf(path: Path, config_json: Mapping[str, Any], wanted: Wanted) -> Described:
    config = ModelConfig.from_hf(config_json, source=str(path / "config.json"))
    dtype = str(config_json.get("torch_dtype") or config_json.get("dtype") or "bfloat16")
    stored = _STORED.get(dtype.removeprefix("torch."), "bf16")
    kinds = {name: [stored] for name, shape in expected_tensors(config).items() if len(shape) == 2}
    notes: tuple[str, ...] = ()
    if wanted.quant is None:
        notes = (f"weights as config.json says they are stored ({dtype}); float32 becomes bf16",)
    return Described(str(path), config, _layouts(config, kinds, wanted), notes)


def _describe_gguf(path: Path, wanted: Wanted) -> Described:
    from .convert import plan_tensors

    source = GGUFSource(path)
    try:
        config = ModelConfig.from_hf(source.config, source=str(path))
        kinds = {
            target.name: [source.kinds[part.name] for part in target.parts]
            for target in plan_tensors(source, config)
            if len(target.shape) == 2
        }
    finally:
        source.close()
    notes: tuple[str, ...] = ()
    if wanted.quant is None and any("fp32" in stored for stored in kinds.values()):
        notes = ("float32 matrices are taken to fit bf16 exactly; convert finds out",)
    return Described(str(path), config, _layouts(config, kinds, wanted), notes)


def _layouts(
    config: ModelConfig, kinds: Mapping[str, list[str]], wanted: Wanted
) -> dict[str, Layout]:
    """The layouts that ``convert`` would choose for matrices stored as ``kinds``."""
    shapes = {name: shape for name, shape in expected_tensors(config).items() if name in kinds}
    group = wanted.default_group(shape[1] for shape in shapes.values())
    layouts = {}
    for name, (rows, cols) in shapes.items():
        # Values are not read: float32 is taken to fit bf16, as it mostly does.
        choice = choose(name, kinds[name], wanted, group, lambda type: type == "bf16", False)
        layouts[name] = Layout(rows, cols, choice.type, choice.group_size)
    return layouts


# GPUs


def room_of_card(card: str | Card) -> Room:
    """A card by its datasheet; its whole memory counts as free."""
    card = find_card(card) if isinstance(card, str) else card
    memory = int(card.memory_gb * 1e9)
    return Room(card.name, memory, card.gb_per_s, card.facts, "datasheet")


def room_of_this_machine() -> Room | None:
    """The current GPU with its free memory and measured read bandwidth; None without one."""
    from .probe import cuda_problem

    if cuda_problem():
        return None
    from .bench import CEILING_BYTES, read_ceiling
    from .device import CudaDevice

    device = CudaDevice()
    free = device.free_bytes()
    speed = read_ceiling(device) if free > 2 * CEILING_BYTES else None
    return Room(device.name, free, speed, device.facts, "measured")
