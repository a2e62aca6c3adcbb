"""The GGUF reader: lossless import against the gguf package, and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import DIM, EMBEDDING, HEADS, HIDDEN, KV_HEADS, VOCAB, facts, gguf, quantized, write

from minflash.config import ModelConfig
from minflash.errors import CheckpointError, ConfigError
from minflash.gguf import LOSSLESS_TYPES, GGUFFile, hf_config
from minflash.packing import dequantize, pack, unpack
from minflash.rope import frequencies


def config_of(
    path: Path, metadata: dict[str, Any], tensors: dict[str, Any] | None = None
) -> dict[str, Any]:
    return hf_config(
        GGUFFile(write(path / "model.gguf", metadata, {**EMBEDDING, **(tensors or {})}))
    )


# Lossless tensors


@pytest.mark.parametrize("kind", LOSSLESS_TYPES)
def test_a_matrix_is_lossless(tmp_path: Path, kind: str) -> None:
    data, ggml = quantized(kind)
    expected = gguf.quants.dequantize(data, ggml)
    file = GGUFFile(write(tmp_path / "m.gguf", {}, {"w": (data, ggml)}))
    matrix = file.matrix("w")
    restored = dequantize(unpack(pack(matrix), matrix.layout))
    assert restored.dtype == np.float32 and restored.shape == (48, 96)
    for values in (dequantize(matrix), restored, file.values("w")):
        # "+ 0" makes the zeros of d * (8 - 8) with a negative d, which the package gives as -0, +0.
        assert ((values + 0).view(np.uint32) == (expected + 0).view(np.uint32)).all()


def test_every_code_and_sign_of_scale(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scales = np.array([1, -1, 0.37, -65504 / 8, 6e-8, 0], np.float16)
    for kind, head in (("Q4_0", 1), ("Q4_1", 2), ("Q8_0", 1)):
        ggml = gguf.GGMLQuantizationType[kind]
        block = gguf.GGML_QUANT_SIZES[ggml][1]
        data = rng.integers(0, 256, (len(scales), 8, block), dtype=np.uint8)
        for part in range(head):
            data[:, :, 2 * part : 2 * part + 2] = (
                scales[:, None, None].view(np.uint8).reshape(-1, 1, 2)
            )
        data = data.reshape(len(scales), -1)
        file = GGUFFile(write(tmp_path / f"{kind}.gguf", {}, {"w": (data, ggml)}))
        expected = gguf.quants.dequantize(data, ggml)
        assert (file.values("w") == expected).all()


def test_other_types_come_from_the_gguf_package(tmp_path: Path) -> None:
    data, ggml = quantized("Q5_0")
    file = GGUFFile(write(tmp_path / "m.gguf", {}, {"w": (data, ggml)}))
    assert (file.values("w") == gguf.quants.dequantize(data, ggml)).all()
    with pytest.raises(CheckpointError, match="w has type Q5_0; without loss are read only F32"):
        file.matrix("w")


def test_other_types_without_the_gguf_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, ggml = quantized("Q5_0")
    file = GGUFFile(write(tmp_path / "m.gguf", {}, {"w": (data, ggml)}))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(
        CheckpointError, match="Q5_0, which needs the package gguf: pip install gguf"
    ):
        file.values("w")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_scales_must_be_finite(tmp_path: Path, kind: str) -> None:
    data, ggml = quantized(kind)
    data = data.copy()
    block = gguf.GGML_QUANT_SIZES[ggml][1]
    data[7, block : block + 2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    file = GGUFFile(write(tmp_path / "m.gguf", {}, {"w": (data, ggml)}))
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor w: the scale of row 7, group 1"):
        file.matrix("w")


def test_metadata_values(tmp_path: Path) -> None:
    metadata = {"a.int": 7, "a.real": 0.5, "a.text": "naïve 😀", "a.yes": True,
                "a.words": ["x", ""], "a.numbers": [1, -2, 3]}  # fmt: skip
    file = GGUFFile(write(tmp_path / "m.gguf", metadata, {"v": np.arange(5, dtype=np.float32)}))
    for key, value in metadata.items():
        assert np.array_equal(file.metadata[key], value), key
    assert file.tensors["v"].shape == (5,)
    assert file.values("v").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(CheckpointError, match="tensor nope is missing"):
        file.data("nope")


# Configurations


def test_llama(tmp_path: Path) -> None:
    config = config_of(tmp_path, facts())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5  # not 9.999999747378752e-06
    assert config["vocab_size"] == VOCAB and config["head_dim"] == DIM // HEADS
    assert config["tie_word_embeddings"] is True and config["rope_scaling"] is None
    made = ModelConfig.from_hf(config)
    assert (made.dim, made.hidden_dim, made.n_kv_heads, made.tied) == (DIM, HIDDEN, KV_HEADS, True)


def test_an_output_matrix_unties(tmp_path: Path) -> None:
    config = config_of(tmp_path, facts(), {"output.weight": np.zeros((VOCAB, DIM), np.float32)})
    assert config["tie_word_embeddings"] is False


def test_a_window_makes_a_mistral(tmp_path: Path) -> None:
    config = config_of(tmp_path, facts(**{"attention.sliding_window": 16}))
    assert ModelConfig.from_hf(config).windows == (16,)
    assert config["architectures"] == ["MistralForCausalLM"]


def test_qwen(tmp_path: Path) -> None:
    biases = {f"blk.0.attn_{name}.bias": np.zeros(DIM, np.float32) for name in "qkv"}
    second = ModelConfig.from_hf(config_of(tmp_path, facts("qwen2"), biases))
    assert second.architecture == "qwen2" and second.qkv_bias and not second.out_bias
    third = config_of(tmp_path, facts("qwen3", **{"attention.key_length": 32,
                                                  "attention.value_length": 32}))  # fmt: skip
    made = ModelConfig.from_hf(third)
    assert made.qk_norm and made.head_dim == 32 and not made.qkv_bias


def llama3_divisors(factor: float, theta: float, head_dim: int) -> Any:
    """rope_freqs.weight as written for Llama 3.1 and later: float32, computed step by step."""
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (index / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recovered(tmp_path: Path, factor: float) -> None:
    divisors = llama3_divisors(factor, 500000.0, 64)
    metadata = facts(**{"attention.key_length": 64, "attention.value_length": 64})
    config = config_of(tmp_path, metadata, {"rope_freqs.weight": divisors})
    assert config["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    found, scaling = frequencies(ModelConfig.from_hf(config).rope, 64, 100, 128)
    np.testing.assert_allclose(found, plain / divisors, rtol=1e-6)
    assert scaling == 1


def test_other_rope_divisors_are_an_error(tmp_path: Path) -> None:
    divisors = llama3_divisors(8, 500000.0, DIM // HEADS)
    divisors[3] *= 1.1
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not the llama3.*element 3"):
        config_of(tmp_path, facts(), {"rope_freqs.weight": divisors})
    assert config_of(tmp_path, facts(), {"rope_freqs.weight": np.ones(8, np.float32)})[
        "rope_scaling"
    ] is None  # fmt: skip


def test_linear_yarn_longrope(tmp_path: Path) -> None:
    linear = facts(**{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert config_of(tmp_path, linear)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config_of(tmp_path, facts(**{"rope.scale_linear": 2.0}))["rope_scaling"]["factor"] == 2
    yarn = facts(**{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                    "rope.scaling.original_context_length": 32})  # fmt: skip
    made = ModelConfig.from_hf(config_of(tmp_path, yarn)).rope
    assert (made.kind, made.factor, made.original_context) == ("yarn", 4.0, 32)
    longrope = facts(**{"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.5,
                        "rope.scaling.original_context_length": 32})  # fmt: skip
    factors = {
        f"rope_factors_{n}.weight": np.arange(1, 9, dtype=np.float32) for n in ("long", "short")
    }
    made = ModelConfig.from_hf(config_of(tmp_path, longrope, factors)).rope
    assert made.kind == "longrope" and made.long_factor == tuple(range(1, 9))
    assert made.attention_factor == 1.5


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba'; supported are llama, qwen2, qwen3"),
        (facts(expert_count=8), "mixture of experts"),
        (facts(block_count=None), "llama.block_count is missing; a positive integer"),
        (facts(block_count=0), "llama.block_count is 0"),
        (facts(block_count="many"), "llama.block_count is 'many'"),
        (facts(**{"attention.layer_norm_rms_epsilon": float("nan")}), "rms_epsilon is nan"),
        (facts(**{"rope.dimension_count": 8}), "rope.dimension_count is 8; another number"),
        (facts(**{"rope.scaling.type": "su"}), "rope scaling 'su' is not supported; linear, yarn"),
        (facts(**{"rope.scaling.type": "longrope"}), "needs the tensor rope_factors_short.weight"),
        (facts("qwen2"), "biases of qwen2"),
        (facts("qwen3", **{"attention.sliding_window": 16}), "only supported for Mistral"),
        ({**facts(), "tokenizer.ggml.tokens": ["t"] * 41}, "41 tokens, the embedding 40 rows"),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, metadata)
