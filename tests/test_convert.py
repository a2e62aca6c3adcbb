"""Converting Hugging Face folders: every value, every type, and what must not be converted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, memory_checkpoint, tensors, write_checkpoint, write_safetensors
from conversions import ROOT, Tensors, assert_converted, expected, left_in, write_folder
from numpy.typing import NDArray

import minflash.conversion
from minflash.checkpoint import open_checkpoint
from minflash.convert import convert
from minflash.errors import (
    CheckpointError,
    ConvertError,
)


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_is_kept_as_stored(case: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", case)
    path = convert(source, tmp_path / "out")
    assert_converted(path, expected(case), "bf16")
    with open_checkpoint(path) as model:
        written = {k: v for k, v in model.hf_config.items() if k != "quantization_config"}
    assert written == CASES[case]


@pytest.mark.parametrize("type", ["fp32", "bf16", "fp16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("case", ["llama_biases", "qwen2"])
def test_every_type(case: str, type: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", case)
    path = convert(source, tmp_path / "out", quant=type, head_quant=type)
    assert_converted(path, expected(case), type)


@pytest.mark.parametrize(
    ("arguments", "layers", "head"),
    [
        ({"quant": "int4"}, ("int4", 64), ("int8", 64)),
        ({"quant": "int4", "group_size": 32}, ("int4", 32), ("int8", 32)),
        ({"quant": "int4", "head_quant": "bf16"}, ("int4", 64), ("bf16", 0)),
        ({"quant": "int8"}, ("int8", 32), ("int8", 32)),  # hidden_size 64, intermediate_size 96
        ({"quant": "fp8", "group_size": 128}, ("fp8", 128), ("fp8", 128)),
        ({"quant": "fp16"}, ("fp16", 0), ("fp16", 0)),
        ({"head_quant": "int8"}, ("bf16", 0), ("int8", 32)),
    ],
)
def test_types_of_layers_and_head(
    arguments: dict[str, Any], layers: tuple[str, int], head: tuple[str, int], tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    with open_checkpoint(convert(source, tmp_path / "out", **arguments)) as model:
        for name, layout in model.matrices.items():
            want = head if name in ("embed", "lm_head") else layers
            assert (layout.type, layout.group_size) == want, name


def test_int8_takes_the_largest_group_that_divides_all_columns(tmp_path: Path) -> None:
    config = {**CASES["llama2"], "hidden_size": 128, "intermediate_size": 128 * 3, "head_dim": 32}
    from checkpoints import hashed, tensor_shapes

    weights: Tensors = {name: hashed(name, shape) for name, shape in tensor_shapes(config).items()}
    source = write_folder(tmp_path / "hf", config, weights)
    with open_checkpoint(convert(source, tmp_path / "out", quant="int8")) as model:
        assert {layout.group_size for layout in model.matrices.values()} == {128}


def test_float32_that_fits_bf16_becomes_bf16(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "qwen3", "fp32")
    assert_converted(convert(source, tmp_path / "out"), expected("qwen3"), "bf16")


def as_type(case: str, dtype: Any) -> Tensors:
    return {name: values.astype(dtype) for name, values in tensors(case, "fp32").items()}


def ours(case: str, weights: Tensors) -> dict[str, NDArray[np.float32]]:
    floats = {name: values.astype(np.float32) for name, values in weights.items()}
    return memory_checkpoint(CASES[case], floats).arrays


def test_float32_that_fits_fp16_becomes_fp16(tmp_path: Path) -> None:
    # 1/3 of a bf16 value, rounded to float16, has 11 bits: too many for bf16
    weights = {name: (v / 3).astype(np.float16) for name, v in tensors("llama2", "fp32").items()}
    floats: Tensors = {name: values.astype(np.float32) for name, values in weights.items()}
    source = write_folder(tmp_path / "hf", CASES["llama2"], floats)
    assert_converted(convert(source, tmp_path / "out"), ours("llama2", weights), "fp16")


def test_other_float32_becomes_bf16_and_says_so(tmp_path: Path) -> None:
    weights: Tensors = {name: v / 3 for name, v in tensors("llama2", "fp32").items()}
    source = write_folder(tmp_path / "hf", CASES["llama2"], weights)
    lines: list[str] = []
    path = convert(source, tmp_path / "out", report=lines.append)
    assert_converted(path, ours("llama2", weights), "bf16")
    assert any("rounded to bf16" in line for line in lines)
    exact = convert(source, tmp_path / "exact", quant="fp32", report=lines.append)
    assert_converted(exact, ours("llama2", weights), "fp32")
    assert lines[-1] == "every value was kept exactly"


def test_fp16_is_kept(tmp_path: Path) -> None:
    weights = as_type("llama2", np.float16)
    source = write_folder(tmp_path / "hf", CASES["llama2"], weights)
    assert_converted(convert(source, tmp_path / "out"), ours("llama2", weights), "fp16")


def test_parts_of_different_types_that_fit_one(tmp_path: Path) -> None:
    weights, floats = tensors("llama2", "bf16"), tensors("llama2", "fp32")
    mixed = {name: floats[name] if ".k_proj" in name else weights[name] for name in weights}
    source = write_folder(tmp_path / "hf", CASES["llama2"], mixed)
    assert_converted(convert(source, tmp_path / "out"), expected("llama2"), "bf16")


@pytest.mark.parametrize("quant", [None, "int4"])
def test_small_slices_give_the_same(quant: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    """Slices that begin and end inside of q, k and v, on several threads."""
    source = write_checkpoint(tmp_path / "hf", "smollm2")
    whole = convert(source, tmp_path / "whole", quant=quant)
    monkeypatch.setattr(minflash.conversion, "SLICE_VALUES", 1)
    sliced = convert(source, tmp_path / "sliced", quant=quant)
    name = "model.safetensors"
    assert (whole / name).read_bytes() == (sliced / name).read_bytes()


def shard(source: Path, parts: int) -> None:
    """Splits model.safetensors, neighbours in different files."""
    case = json.loads((source / "case").read_text())
    weights, weight_map = tensors(case), {}
    (source / "model.safetensors").unlink()
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        names = list(weights)[part::parts]
        write_safetensors(source / file, {name: weights[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def sharded(folder: Path, case: str) -> Path:
    write_checkpoint(folder, case)
    (folder / "case").write_text(json.dumps(case))
    shard(folder, 3)
    return folder


def test_sharded_source(tmp_path: Path) -> None:
    source = sharded(tmp_path / "hf", "qwen3")
    assert_converted(convert(source, tmp_path / "out"), expected("qwen3"), "bf16")


@pytest.mark.parametrize("damage", ["missing file", "outside", "wrong file", "not a map", "twice"])
def test_damaged_index(damage: str, tmp_path: Path) -> None:
    source = sharded(tmp_path / "hf", "llama2")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = list(content["weight_map"])
    if damage == "missing file":
        (source / "model-00002-of-00003.safetensors").unlink()
    elif damage == "outside":
        content["weight_map"][names[0]] = "../model.safetensors"
    elif damage == "wrong file":
        content["weight_map"][names[0]] = content["weight_map"][names[-1]]
    elif damage == "not a map":
        content["weight_map"] = names
    else:
        shutil.copy(source / "model-00001-of-00003.safetensors", source / "model-9.safetensors")
        content["weight_map"]["model.extra"] = "model-9.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises((CheckpointError, ConvertError), match="safetensors"):
        convert(source, tmp_path / "out")
    assert left_in(tmp_path, "hf") == []


def test_companion_files_come_along_and_others_do_not(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    companions = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    companions += ["special_tokens_map.json", "chat_template.jinja"]
    for name in [*companions, "README.md", "pytorch_model.bin"]:
        (source / name).write_text(f"{{}} {name}")
    out = convert(source, tmp_path / "out")
    assert left_in(out) == sorted([*companions, "config.json", "model.safetensors"])
    for name in companions:
        assert (out / name).read_text() == f"{{}} {name}"


def test_a_second_head_of_a_tied_model_and_rotary_tables_are_ignored(tmp_path: Path) -> None:
    weights = tensors("qwen2")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, dtype=np.float32)
    source = write_folder(tmp_path / "hf", CASES["qwen2"], weights)
    assert_converted(convert(source, tmp_path / "out"), expected("qwen2"), "bf16")


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    (source / "model.safetensors").rename(source / "weights.safetensors")
    assert_converted(convert(source, tmp_path / "out"), expected("llama2"), "bf16")


def test_the_tiny_model_is_what_its_script_makes(tmp_path: Path) -> None:
    tiny, made = ROOT / "weights" / "tiny", tmp_path / "tiny"
    command = [sys.executable, str(ROOT / "tools" / "make_tiny.py"), "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    assert left_in(made) == left_in(tiny)
    assert sum(file.stat().st_size for file in tiny.iterdir()) < 300_000
    for name in left_in(tiny, "model.safetensors"):
        assert (made / name).read_bytes() == (tiny / name).read_bytes()
    with open_checkpoint(made) as ours, open_checkpoint(tiny) as theirs:
        assert ours.matrices == theirs.matrices
        assert {layout.type for layout in ours.matrices.values()} == {"int4", "int8"}
        for name in ours.names:
            assert np.array_equal(ours.raw(name), theirs.raw(name)), name


def test_error_table(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    lines: list[str] = []
    convert(source, tmp_path / "out", quant="int4", report=lines.append)
    assert "no tokenizer.json" in lines.pop(0)
    assert lines[0].split() == ["relative", "RMS", "error", "type", "minflash", "plain", "rounding"]
    table = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert set(table) == {"embed", "wqkv", "wo", "w_gate_up", "w_down", "lm_head"}
    for kind, (type, found, plain) in table.items():
        assert type == ("int8" if kind in ("embed", "lm_head") else "int4")
        assert 0 < float(found) <= float(plain) < 0.12
        assert type == "int8" or float(found) < 0.97 * float(plain)
