"""Importing GGUF files: equal to what the ``gguf`` package reads, bit for bit in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, memory_checkpoint, tensors
from gguf_files import Types, write_gguf

import minflash.conversion
from minflash.checkpoint import open_checkpoint
from minflash.config import ModelConfig
from minflash.convert import convert
from minflash.errors import ConvertError
from minflash.packing import dequantize
from minflash.quantize import quantize


def assert_exact(out: Path, case: str, read: dict[str, Any]) -> dict[str, str]:
    """Every tensor equals what the gguf package read; returns the types of the matrices."""
    wanted = memory_checkpoint(CASES[case], read).arrays
    with open_checkpoint(out) as model:
        assert set(model.names) == set(wanted)
        for name, values in wanted.items():
            matrix = values.ndim == 2
            got = dequantize(model.matrix(name)) if matrix else model.vector(name)
            # + 0.0: Q4_0 has a -0.0 where a scale is negative; affine int4 has only one zero
            same = (got + np.float32(0)).view(np.uint32) == (values + np.float32(0)).view(np.uint32)
            assert same.all(), name
        return {name: layout.type for name, layout in model.matrices.items()}


def uniform(kind: str) -> Types:
    return lambda name: kind


@pytest.mark.parametrize(
    ("kind", "type"),
    [
        ("F32", "bf16"),
        ("F16", "fp16"),
        ("BF16", "bf16"),
        ("Q8_0", "int8"),
        ("Q4_0", "int4"),
        ("Q4_1", "int4"),
    ],
)
@pytest.mark.parametrize("case", ["llama_biases", "smollm2", "mistral_window", "qwen2", "qwen3"])
def test_without_loss(case: str, kind: str, type: str, tmp_path: Path) -> None:
    read = write_gguf(tmp_path / "m.gguf", case, uniform(kind))
    lines: list[str] = []
    out = convert(tmp_path / "m.gguf", tmp_path / "out", report=lines.append)
    assert set(assert_exact(out, case, read).values()) == {type}
    assert lines[1:] == ["every value was kept exactly"]
    facts, original = open_checkpoint(out).config, ModelConfig.from_hf(CASES[case])
    assert facts.windows == original.windows and facts.rope == original.rope
    assert (facts.qkv_bias, facts.out_bias, facts.tied) == (
        original.qkv_bias,
        original.out_bias,
        original.tied,
    )


@pytest.mark.parametrize(
    ("types", "joined"),
    [
        ({"attn_q": "Q4_0", "attn_k": "Q8_0", "attn_v": "Q4_0"}, "int8"),
        ({"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q4_0"}, "int4"),
        ({"attn_q": "F16", "attn_k": "BF16", "attn_v": "F32"}, "fp32"),
        ({"attn_q": "F16", "attn_k": "F16", "attn_v": "Q8_0"}, "fp32"),
        ({"attn_q": "Q4_1", "attn_k": "Q4_1", "attn_v": "F32"}, "fp32"),
    ],
)
def test_fused_parts_of_different_types(types: dict[str, str], joined: str, tmp_path: Path) -> None:
    def kind(name: str) -> str:
        return next((kind for part, kind in types.items() if f".{part}." in name), "Q8_0")

    thirds = {  # neither bf16 nor fp16 holds them all
        name: values / np.float32(3) * np.float32(1 if "q_proj" in name else 2.0**-20)
        for name, values in tensors("smollm2", "fp32").items()
        if "_proj" in name and joined == "fp32"
    }
    read = write_gguf(tmp_path / "m.gguf", "smollm2", kind, thirds)
    found = assert_exact(convert(tmp_path / "m.gguf", tmp_path / "out"), "smollm2", read)
    assert found["layers.1.wqkv"] == joined


def test_fused_parts_without_a_common_type_are_quantized_again(tmp_path: Path) -> None:
    def kind(name: str) -> str:
        return "Q4_1" if "ffn_up" in name else "Q8_0"

    read = write_gguf(tmp_path / "m.gguf", "smollm2", kind)
    lines: list[str] = []
    out = convert(tmp_path / "m.gguf", tmp_path / "out", report=lines.append)
    assert "layers.0.w_gate_up and 1 more: Q4_1, Q8_0 cannot be kept exactly" in lines[1]
    wanted = memory_checkpoint(CASES["smollm2"], read).arrays["layers.0.w_gate_up"]
    with open_checkpoint(out) as model:
        got = dequantize(model.matrix("layers.0.w_gate_up"))
        assert np.array_equal(got, dequantize(quantize(wanted, "int8", 32)))


def test_other_types_are_quantized_again(tmp_path: Path) -> None:
    """Q5_0 stands for all types that the gguf package dequantizes."""
    read = write_gguf(tmp_path / "m.gguf", "qwen3", lambda n: "Q5_0" if "ffn_down" in n else "Q8_0")
    lines: list[str] = []
    out = convert(tmp_path / "m.gguf", tmp_path / "out", report=lines.append)
    assert "layers.0.w_down and 1 more: Q5_0" in lines[1]
    wanted = memory_checkpoint(CASES["qwen3"], read).arrays["layers.0.w_down"]
    with open_checkpoint(out) as model:
        got = dequantize(model.matrix("layers.0.w_down"))
        assert np.array_equal(got, dequantize(quantize(wanted, "int8", 32)))


def test_float32_without_a_shorter_type_stays(tmp_path: Path) -> None:
    thirds = {n: v / np.float32(3) for n, v in tensors("qwen3", "fp32").items() if v.ndim == 2}
    read = write_gguf(tmp_path / "m.gguf", "qwen3", uniform("F32"), thirds)
    found = assert_exact(convert(tmp_path / "m.gguf", tmp_path / "out"), "qwen3", read)
    assert set(found.values()) == {"fp32"}


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
def test_small_slices_give_the_same(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Slices of 16 rows cut through heads of 32 whose rows are permuted."""
    read = write_gguf(tmp_path / "m.gguf", "llama_biases", uniform(kind))
    monkeypatch.setattr(minflash.conversion, "SLICE_VALUES", 1)
    assert_exact(convert(tmp_path / "m.gguf", tmp_path / "out"), "llama_biases", read)


def test_a_type_that_is_asked_for(tmp_path: Path) -> None:
    read = write_gguf(tmp_path / "m.gguf", "smollm2", uniform("Q4_0"))
    kept = convert(tmp_path / "m.gguf", tmp_path / "kept", quant="int4", head_quant="int4")
    assert set(assert_exact(kept, "smollm2", read).values()) == {"int4"}
    out = convert(tmp_path / "m.gguf", tmp_path / "out", quant="int4", group_size=64)
    wanted = memory_checkpoint(CASES["smollm2"], read).arrays
    with open_checkpoint(out) as model:
        assert model.matrices["layers.0.wo"].group_size == 64
        got = dequantize(model.matrix("layers.0.wo"))
        assert np.array_equal(got, dequantize(quantize(wanted["layers.0.wo"], "int4", 64)))


def test_leftovers_and_gaps_are_named(tmp_path: Path) -> None:
    extra = {"model.layers.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    write_gguf(tmp_path / "m.gguf", "qwen3", uniform("F16"), extra)
    with pytest.raises(ConvertError, match=r"left over.*blk\.0\.attn_sinks\.weight"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    short = {"model.norm.weight": np.ones(95, dtype=np.float32)}
    write_gguf(tmp_path / "s.gguf", "qwen3", uniform("F16"), short)
    with pytest.raises(ConvertError, match=r"output_norm\.weight has shape"):
        convert(tmp_path / "s.gguf", tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.gguf", "s.gguf"]
