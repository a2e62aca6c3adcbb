"""What the converter refuses, and that nothing is left of a conversion that failed."""

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
from checkpoints import CASES, tensors, write_checkpoint
from conversions import ROOT, assert_converted, expected, left_in, write_folder

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
