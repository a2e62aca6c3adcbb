"""ModelConfig.from_hf: what each key of a config.json means, and which are refused."""

from __future__ import annotations

import json
import math
from typing import Any

import checkpoints
import pytest
from configs import LEFT_OUT, LLAMA, MISTRAL, QWEN2, QWEN3, parse, refused

from minflash.config import ModelConfig, RopeConfig
from minflash.errors import ConfigError

# What keys mean


def test_all_fields_of_a_llama() -> None:
    assert parse(rope_scaling=None, torch_dtype="bfloat16", pad_token_id=-1) == ModelConfig(
        architecture="llama",
        dim=64,
        hidden_dim=96,
        head_dim=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        vocab_size=257,
        max_context=128,
        norm_eps=1e-5,
        rope=RopeConfig(),
        tied=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(0, 0),
        bos_token_ids=(1,),
        eos_token_ids=(2,),
    )


@pytest.mark.parametrize(
    ("base", "facts"),
    [
        (LLAMA, {"max_context": 2048, "norm_eps": 1e-6, "n_kv_heads": 4}),
        (MISTRAL, {"max_context": 131072, "norm_eps": 1e-6, "windows": (4096, 4096)}),
        (QWEN2, {"max_context": 32768, "qkv_bias": True, "out_bias": False, "bos_token_ids": ()}),
        (QWEN3, {"max_context": 32768, "qk_norm": True, "head_dim": 128, "eos_token_ids": ()}),
    ],
)
def test_defaults_of_missing_keys(base: dict[str, Any], facts: dict[str, Any]) -> None:
    optional = [
        "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "head_dim",
        "rope_theta", "sliding_window", "bos_token_id", "eos_token_id",
    ]  # fmt: skip
    if base is LLAMA:
        optional.append("num_key_value_heads")
    config = parse(base, **dict.fromkeys(optional, LEFT_OUT))
    assert {key: getattr(config, key) for key in facts} == facts
    assert (config.tied, config.rope.theta) == (False, 10000.0)


def test_missing_kv_heads_of_mistral_and_qwen_follow_transformers() -> None:
    wide = {"hidden_size": 512, "num_attention_heads": 64, "num_key_value_heads": LEFT_OUT}
    assert parse(MISTRAL, **wide).n_kv_heads == 8
    assert parse(QWEN2, **wide).n_kv_heads == 32
    assert parse(QWEN3, **wide).n_kv_heads == 32
    assert parse(QWEN2, **{**wide, "num_key_value_heads": None}).n_kv_heads == 64


def test_architecture_from_model_type_alone() -> None:
    assert parse(architectures=LEFT_OUT).architecture == "llama"
    assert parse(QWEN3, architectures=None).architecture == "qwen3"
    assert parse(model_type=LEFT_OUT).architecture == "llama"


def test_head_dim_apart_from_hidden_size() -> None:
    config = parse(head_dim=48, hidden_size=100)
    assert (config.head_dim, config.q_dim, config.kv_dim) == (48, 192, 192)
    assert parse(QWEN2, head_dim=64).head_dim == 64
    assert parse(QWEN3).q_dim == 160


def test_biases() -> None:
    both = parse(attention_bias=True, mlp_bias=True)
    assert (both.qkv_bias, both.out_bias, both.mlp_bias) == (True, True, True)
    qwen3 = parse(QWEN3, attention_bias=True)
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.mlp_bias) == (True, True, False)
    qwen2 = parse(QWEN2, attention_bias=False)  # transformers does not read it: always biases
    assert (qwen2.qkv_bias, qwen2.out_bias) == (True, False)


@pytest.mark.parametrize(
    ("value", "ids"), [(2, (2,)), ([2, 3], (2, 3)), (None, ()), ([], ()), (0, (0,)), (256, (256,))]
)
def test_eos_ids(value: Any, ids: tuple[int, ...]) -> None:
    assert parse(eos_token_id=value).eos_token_ids == ids
    assert parse(bos_token_id=value).bos_token_ids == ids


def test_default_eos_outside_a_tiny_vocabulary_is_dropped() -> None:
    assert parse(vocab_size=2, bos_token_id=LEFT_OUT, eos_token_id=LEFT_OUT).eos_token_ids == ()


SLIDING, FULL = "sliding_attention", "full_attention"
USED = {"use_sliding_window": True, "sliding_window": 5}


@pytest.mark.parametrize(
    ("base", "keys", "windows"),
    [
        (LLAMA, {"sliding_window": 5, "use_sliding_window": True}, (0, 0)),
        (LLAMA, {"layer_types": [FULL, FULL]}, (0, 0)),
        (MISTRAL, {"sliding_window": 5}, (5, 5)),
        (MISTRAL, {"sliding_window": 5, "use_sliding_window": False}, (5, 5)),
        (MISTRAL, {"sliding_window": 5, "layer_types": [SLIDING, SLIDING]}, (5, 5)),
        (MISTRAL, {"sliding_window": None}, (0, 0)),
        (QWEN2, {"sliding_window": 5}, (0, 0)),
        (QWEN2, {"sliding_window": 5, "max_window_layers": 0, "use_sliding_window": False}, (0, 0)),
        (QWEN2, {**USED, "max_window_layers": 0}, (5, 5)),
        (QWEN2, {**USED, "max_window_layers": 1}, (0, 5)),
        (QWEN2, {**USED, "max_window_layers": 2}, (0, 0)),
        (QWEN2, USED, (0, 0)),
        (QWEN2, {**USED, "layer_types": [SLIDING, FULL], "max_window_layers": 0}, (5, 0)),
        (QWEN2, {**USED, "layer_types": [SLIDING, "attention"]}, (5, 0)),
        (QWEN3, {**USED, "sliding_window": LEFT_OUT, "max_window_layers": 0}, (4096, 4096)),
        (QWEN3, {**USED, "sliding_window": None, "max_window_layers": 0}, (0, 0)),
        (QWEN3, {"layer_types": [FULL, FULL]}, (0, 0)),
        (QWEN3, {"layer_types": None, **USED, "max_window_layers": 1}, (0, 5)),
    ],
)
def test_windows(base: dict[str, Any], keys: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert parse(base, **keys).windows == windows


# What is refused

ABSURD = [0, -1, 1 << 40, 1.5, 64.0, "64", True, math.nan, math.inf, [64], {}, 10**400]
COUNTS = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "head_dim",
]  # fmt: skip


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: f"{value!r:.10}")
@pytest.mark.parametrize("key", COUNTS)
def test_absurd_counts(key: str, value: Any) -> None:
    message = refused(**{key: value})
    assert message.startswith(f"config.json: {key} must be an integer from ")
    assert f"found {value!r:.100}" in message
    assert len(message) < 250


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"],
)
@pytest.mark.parametrize("value", [LEFT_OUT, None], ids=["left_out", "null"])
def test_missing_shapes(key: str, value: Any) -> None:
    assert f"{key} must be given: an integer from" in refused(**{key: value})


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "x", True, [1], 10**400, 1e300])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_absurd_numbers(key: str, value: Any) -> None:
    message = refused(**{key: value})
    assert message.startswith(f"config.json: {key} must be a finite number from ")
    assert f"{value!r:.100}" in message


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of num_attention_he"),
        ({"num_key_value_heads": 8}, "num_key_value_heads must be a divisor of num_attention_he"),
        ({"hidden_size": 66}, "hidden_size must be a multiple of 2 x num_attention_heads (4)"),
        ({"hidden_size": 4}, "hidden_size must be a multiple of 2 x num_attention_heads (4)"),
        ({"head_dim": 17}, "head_dim must be even"),
        ({"intermediate_size": 100}, "intermediate_size must be a multiple of 8, found 100"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, found 1"),
        ({"attention_bias": "no"}, "attention_bias must be true or false"),
        ({"eos_token_id": 257}, "eos_token_id must be token ids below vocab_size (257)"),
        ({"eos_token_id": [2, -1]}, "eos_token_id must be token ids"),
        ({"eos_token_id": 2.0}, "eos_token_id must be token ids"),
        ({"eos_token_id": True}, "eos_token_id must be token ids"),
        ({"bos_token_id": "<s>"}, "bos_token_id must be token ids"),
        ({"layer_types": [FULL]}, "layer_types must be num_hidden_layers (2) times"),
        ({"layer_types": [FULL, "chunked_attention"]}, "layer_types must be num_hidden_layers (2)"),
        ({"layer_types": [FULL, SLIDING]}, "layer_types must be full_attention throughout"),
        ({"layer_types": "full"}, "layer_types must be a list of names"),
        ({"layer_types": [1, 2]}, "layer_types must be a list of names"),
    ],
)
def test_rules_between_keys(keys: dict[str, Any], rule: str) -> None:
    assert rule in refused(**keys)


@pytest.mark.parametrize(
    ("base", "keys", "rule"),
    [
        (MISTRAL, {"sliding_window": 0}, "sliding_window must be an integer from 1"),
        (MISTRAL, {"sliding_window": 5, "layer_types": [FULL, SLIDING]}, "all layers alike"),
        (MISTRAL, {"attention_bias": True}, "attention_bias must be false: mistral"),
        (MISTRAL, {"mlp_bias": True}, "mlp_bias must be false: mistral"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias must be false: qwen3"),
        (QWEN2, {"use_sliding_window": 1}, "use_sliding_window must be true or false"),
        (QWEN2, {**USED, "max_window_layers": -1}, "max_window_layers must be an integer from 0"),
        (QWEN2, {"layer_types": [FULL, SLIDING]}, "no sliding window is set for this qwen2 model"),
    ],
)
def test_rules_of_one_architecture(base: dict[str, Any], keys: dict[str, Any], rule: str) -> None:
    assert rule in refused(base, **keys)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("query_pre_attn_scalar", 256),
        ("embedding_multiplier", 12.0),
        ("attention_chunk_size", 8192),
        ("no_rope_layers", [1, 1, 1, 0]),
        ("num_local_experts", 8),
        ("qk_layernorm", True),
        ("is_causal", False),
        ("use_qk_norm", 1),
        ("embedding_multiplier", True),
    ],
)
def test_keys_that_change_the_result(key: str, value: Any) -> None:
    message = refused(**{key: value})
    assert message.startswith(f"config.json: {key} must be ")
    assert "changes the result and is not supported" in message
    assert parse(**{key: None}) == parse()


def test_neutral_values_are_accepted() -> None:
    neutral = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "num_experts": 0,
               "no_rope_layers": [], "is_causal": True, "pretraining_tp": 1}  # fmt: skip
    assert parse(**neutral) == parse(hidden_act=LEFT_OUT) == parse(hidden_act="swish")


def test_quantization_config() -> None:
    ours = {"quant_method": "minflash", "layout_version": 1}
    assert parse(quantization_config=ours) == parse()
    for theirs in ({"quant_method": "awq", "bits": 4}, {}, {"quant_method": ["minflash"]}):
        message = refused(quantization_config=theirs)
        assert "quantization_config.quant_method must be minflash" in message
    assert "quantization_config must be a JSON object" in refused(quantization_config="awq")


@pytest.mark.parametrize("names", [["GPT2LMHeadModel"], ["LlamaModel"], ["Qwen2VLForCausalLM"]])
def test_unsupported_architecture_lists_the_supported_ones(names: list[str]) -> None:
    message = refused(architectures=names)
    assert f"architecture {names[0]} is not supported" in message
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert name in message


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
        ({"architectures": [1]}, "architectures must be a list of names"),
        ({"architectures": [], "model_type": "gpt2"}, "model_type must be one of llama, mistral"),
        ({"architectures": [], "model_type": []}, "model_type must be one of llama, mistral"),
        ({"model_type": "qwen2"}, "model_type must be 'llama'"),
    ],
)
def test_contradicting_architecture(keys: dict[str, Any], rule: str) -> None:
    assert rule in refused(**keys)


@pytest.mark.parametrize("value", [None, [], "config", 3])
def test_not_an_object(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^x/config.json must be a JSON object, found"):
        ModelConfig.from_hf(value, source="x/config.json")


def test_values_as_json_reads_them() -> None:
    text = json.dumps(LLAMA).replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": NaN')
    with pytest.raises(ConfigError, match=r"rms_norm_eps must be a finite number.*found nan"):
        ModelConfig.from_hf(json.loads(text))


def test_from_hf_leaves_its_argument_alone() -> None:
    config = json.loads(json.dumps(checkpoints.CASES["llama_longrope"]))
    ModelConfig.from_hf(config)
    assert config == checkpoints.CASES["llama_longrope"]
