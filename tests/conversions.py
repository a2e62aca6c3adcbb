"""Conversions of small checkpoints, held against what they should hold: helpers of tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import CASES, memory_checkpoint, tensors, write_safetensors
from numpy.typing import NDArray

from minflash.checkpoint import open_checkpoint
from minflash.packing import dequantize
from minflash.quantize import quantize

ROOT = Path(__file__).resolve().parent.parent
Tensors = dict[str, NDArray[Any]]


def write_folder(folder: Path, config: dict[str, Any], weights: Tensors) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", weights)
    return folder


def expected(case: str) -> dict[str, NDArray[np.float32]]:
    """Our tensors in float32, joined by tests/checkpoints.py and not by the converter."""
    return memory_checkpoint(CASES[case], tensors(case, "fp32")).arrays


def assert_converted(
    path: Path, arrays: dict[str, NDArray[np.float32]], type: str, **how: Any
) -> None:
    """Every matrix of the model is quantize(source), every vector the source's."""
    with open_checkpoint(path) as model:
        assert set(model.names) == set(arrays)
        for name, values in arrays.items():
            if values.ndim == 1:
                assert np.array_equal(model.vector(name), values), name
                continue
            assert model.matrices[name].type == type, name
            group = model.matrices[name].group_size
            want = quantize(np.ascontiguousarray(values), type, group)
            assert np.array_equal(dequantize(model.matrix(name)), dequantize(want)), name
            assert how.get("group", group) == group


def left_in(folder: Path, *known: str) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in known)
