"""Converting Hugging Face folders: every value, every type, and what must not be converted."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, memory_checkpoint, tensors, write_checkpoint, write_safetensors
from numpy.typing import NDArray

import minflash.conversion
from minflash.checkpoint import open_checkpoint
from minflash.convert import convert, open_source
from minflash.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    ConvertError,
    DownloadError,
)
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


# What is written


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


# What is refused, and that nothing is left

EXTRA = np.ones((3, 4), dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight is missing"),
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda w: w.update({"model.layers.0.extra": EXTRA}), "left over.*layers.0.extra"),
        (lambda w: w.update({"model.layers.7.mlp.up_proj.weight": EXTRA}), "left over"),
        (
            lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:-1]}),
            r"lm_head.weight has shape \(256, 64\).*\(257, 64\)",
        ),
        (
            lambda w: w.update({"model.norm.weight": w["model.norm.weight"][None]}),
            "model.norm.weight has shape",
        ),
    ],
)  # fmt: skip
def test_gaps_leftovers_and_shapes(change: Any, message: str, tmp_path: Path) -> None:
    weights = tensors("llama2")
    change(weights)
    source = write_folder(tmp_path / "hf", CASES["llama2"], weights)
    with pytest.raises(ConvertError, match=message):
        convert(source, tmp_path / "out")
    assert left_in(tmp_path, "hf") == []


@pytest.mark.parametrize("quant", [None, "bf16", "int4", "int8", "fp8"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("bits", [0x7FC0, 0xFF80])  # NaN, -infinity
def test_values_that_are_not_finite(
    quant: str | None, name: str, bits: int, tmp_path: Path
) -> None:
    weights = tensors("llama2")
    weights[name] = weights[name].copy()
    weights[name].reshape(-1)[-1] = bits
    source = write_folder(tmp_path / "hf", CASES["llama2"], weights)
    with pytest.raises(ConvertError) as caught:
        convert(source, tmp_path / "out", quant=quant)
    others = [other for other in weights if other != name and other in str(caught.value)]
    assert f"tensor {name} (" in str(caught.value) and not others
    assert left_in(tmp_path, "hf") == []


def test_values_too_large_for_the_type_name_the_tensor(tmp_path: Path) -> None:
    weights = tensors("llama2", "fp32")
    weights["model.layers.1.self_attn.o_proj.weight"][3, 4] = 1e6
    source = write_folder(tmp_path / "hf", CASES["llama2"], weights)
    with pytest.raises(ConvertError, match=r"o_proj.weight.*1e.06 does not fit int4"):
        convert(source, tmp_path / "out", quant="int4")
    assert left_in(tmp_path, "hf") == []


def test_dtypes_of_other_quantizers(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    file = source / "model.safetensors"
    # F8_E4M3 has the size of half of a BF16: say twice the columns
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header["model.layers.0.self_attn.q_proj.weight"]
    entry["dtype"], entry["shape"] = "I16", [64, 64]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ConvertError, match=r"q_proj\.weight has dtype I16"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant": "int3"}, "quant is 'int3'"),
        ({"head_quant": "q4"}, "head_quant is 'q4'"),
        ({"quant": "int4", "group_size": 48}, "group_size is 48"),
        ({"quant": "bf16", "group_size": 32}, "group_size needs"),
        ({"group_size": 32}, "group_size needs"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    with pytest.raises(ArgumentError, match=message):
        convert(source, tmp_path / "out", **arguments)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no such file or folder"):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ConvertError, match="no such file or folder"):
        open_source("x" * 5000)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConvertError, match=r"no config\.json"):
        convert(empty, tmp_path / "out")
    (empty / "config.json").write_text(json.dumps(CASES["llama2"]))
    with pytest.raises(ConvertError, match=r"no model\.safetensors"):
        convert(empty, tmp_path / "out")
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ConvertError, match="only safetensors"):
        convert(empty, tmp_path / "out")
    with pytest.raises(ConvertError, match="only safetensors"):
        convert(empty / "pytorch_model.bin", tmp_path / "out")
    with pytest.raises(ConvertError, match="give the folder"):
        convert(empty / "config.json", tmp_path / "out")
    (empty / "noise").write_bytes(b"noise" * 100)
    with pytest.raises(CheckpointError, match="GGUF"):
        convert(empty / "noise", tmp_path / "out")
    assert left_in(tmp_path, "empty") == []


def test_two_files_without_an_index(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    shutil.copy(source / "model.safetensors", source / "b.safetensors")
    (source / "model.safetensors").rename(source / "a.safetensors")
    with pytest.raises(ConvertError, match="2 safetensors files"):
        convert(source, tmp_path / "out")


def test_unsupported_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    config = {**CASES["llama2"], "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*LlamaForCausalLM"):
        convert(source, tmp_path / "out")


def test_a_converted_model_is_not_converted_again(tmp_path: Path) -> None:
    out = convert(write_checkpoint(tmp_path / "hf", "llama2"), tmp_path / "out")
    with pytest.raises(ConvertError, match="converted model already"):
        convert(out, tmp_path / "again")


def test_other_quantizations_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    config = {**CASES["llama2"], "quantization_config": {"quant_method": "gptq"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="gptq"):
        convert(source, tmp_path / "out")


def test_truncated_source(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    os.truncate(source / "model.safetensors", 20000)
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "out")
    assert left_in(tmp_path, "hf") == []


def test_goal_that_exists(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    out = convert(source, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ConvertError, match="exists"):
        convert(source, out, quant="int4")
    assert (out / "model.safetensors").read_bytes() == before
    convert(source, out, quant="int4", overwrite=True)
    assert len((out / "model.safetensors").read_bytes()) < len(before) / 2
    with pytest.raises(ConvertError, match="not a converted model"):
        convert(source, source, overwrite=True)
    assert left_in(tmp_path) == ["hf", "out"]


@pytest.mark.parametrize("where", ["first matrix", "late"])
def test_interrupt_leaves_nothing(where: str, tmp_path: Path, monkeypatch: Any) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    calls = iter(range(1000))

    def interrupted(*args: Any) -> Any:
        if next(calls) == (0 if where == "first matrix" else 9):
            raise KeyboardInterrupt
        return original(*args)

    original = minflash.conversion.quantize_measured
    monkeypatch.setattr(minflash.conversion, "quantize_measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", quant="int8")
    assert left_in(tmp_path, "hf") == []


def run_tool(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run_tool(str(source), "-o", str(tmp_path / "out"), preexec_fn=limit)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert left_in(tmp_path, "hf") == []


def test_the_program(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama2")
    out = tmp_path / "out"
    done = run_tool(str(source), "-o", str(out), "--quant", "int4", "--head-quant", "fp16")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert (
        "plain rounding" in done.stderr and "converting" not in done.stderr
    )  # no terminal, no bar
    with open_checkpoint(out) as model:
        assert model.matrices["embed"].type == "fp16"
    again = run_tool(str(source), "-o", str(out))
    assert again.returncode == 1 and again.stderr.startswith("error: ")


# The hub


def test_a_hub_id_that_cannot_be_fetched(tmp_path: Path, monkeypatch: Any) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(DownloadError, match=r"someone/model.*no network\).*path of its folder"):
        convert("someone/model", tmp_path / "out")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        convert("someone/model", tmp_path / "out")
    assert left_in(tmp_path) == []


def test_a_hub_id_is_fetched_without_pickles(tmp_path: Path, monkeypatch: Any) -> None:
    hub = pytest.importorskip("huggingface_hub")
    source = write_checkpoint(tmp_path / "hf", "llama2")
    asked: dict[str, Any] = {}

    def fetch(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(source)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert_converted(convert("someone/model", tmp_path / "out"), expected("llama2"), "bf16")
    assert asked["repo_id"] == "someone/model"
    assert "config.json" in asked["patterns"]
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["patterns"])
