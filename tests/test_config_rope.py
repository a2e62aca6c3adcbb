"""RoPE in a config.json: what its keys mean, and which are refused."""

from __future__ import annotations

import math
from typing import Any

import checkpoints
import pytest
from configs import parse, refused

from minflash.config import RopeConfig


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_rope_under_either_name(name: str, kind: str) -> None:
    rope = {kind: "linear", "factor": 2}
    config = parse(**{name: rope}, rope_theta=500.0)
    assert config.rope == RopeConfig("linear", 500.0, 2.0, 128)
    assert parse(**{name: {**rope, "rope_theta": 7.0}}, rope_theta=500.0).rope.theta == 7.0


def test_rope_type_wins_over_type_and_equal_twins_are_fine() -> None:
    rope = {"rope_type": "linear", "type": "dynamic", "factor": 2.0}
    assert parse(rope_scaling=rope, rope_parameters=dict(rope)).rope.kind == "linear"


def test_empty_rope_is_default() -> None:
    assert parse(rope_scaling={}, rope_parameters=None).rope == RopeConfig()
    assert parse(rope_scaling={"rope_type": "default", "mrope_section": [1]}).rope == RopeConfig()


def test_llama3_rope() -> None:
    rope = parse(checkpoints.CASES["llama3"]).rope
    assert rope == RopeConfig("llama3", 500000.0, 8.0, 32, 1.0, 4.0)
    assert parse(checkpoints.CASES["llama3_parameters"]).rope == rope


def test_yarn_rope() -> None:
    rope = parse(checkpoints.CASES["qwen2_yarn"]).rope
    assert (rope.kind, rope.factor, rope.original_context) == ("yarn", 4.0, 32)
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (16.0, 2.0, False)
    assert (rope.mscale, rope.mscale_all_dim, rope.attention_factor) == (1.5, 0.5, None)
    null = {"type": "yarn", "factor": None, "original_max_position_embeddings": 32, "beta_fast": 0}
    assert parse(rope_scaling=null).rope.factor == 4.0  # 128 / 32
    assert parse(rope_scaling=null).rope.beta_fast == 32.0


def test_longrope_factor_and_original_context() -> None:
    short = parse(checkpoints.CASES["llama_longrope_short"]).rope
    assert (short.original_context, short.factor) == (64, 4.0)
    inside = {**checkpoints.CASES["llama_longrope"]["rope_scaling"], "factor": 3.0}
    assert parse(rope_scaling=inside).rope.factor == 3.0
    both = parse(rope_scaling=inside, original_max_position_embeddings=64).rope
    assert both.original_context == 64  # beside wins over inside
    assert len(both.long_factor) == len(both.short_factor) == 8


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"type": "default"}, 128),
        ({"type": "linear", "factor": 4.0}, 512),
        ({"type": "dynamic", "factor": 2.5}, 320),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 128),
        (checkpoints.CASES["llama3"]["rope_scaling"], 128),
        (checkpoints.CASES["llama_longrope"]["rope_scaling"], 128),
    ],
)
def test_max_context(rope: dict[str, Any], context: int) -> None:
    assert parse(rope_scaling=rope).max_context == context


LLAMA3 = checkpoints.CASES["llama3"]["rope_scaling"]
LONGROPE = checkpoints.CASES["llama_longrope"]["rope_scaling"]
YARN = checkpoints.CASES["llama_yarn"]["rope_scaling"]


@pytest.mark.parametrize(
    ("rope", "rule"),
    [
        ({"type": "ntk", "factor": 2}, "type must be one of default, linear, dynamic, llama3"),
        ({"rope_type": "mrope"}, "rope_scaling.rope_type must be one of default, linear"),
        ({"rope_type": 3}, "rope_type must be one of"),
        ({"rope_type": "linear"}, "rope_scaling.factor must be given"),
        ({"rope_type": "dynamic", "factor": 0}, "rope_scaling.factor must be a finite number"),
        ({"rope_type": "linear", "factor": math.nan}, "rope_scaling.factor must be a finite"),
        ({"rope_type": "linear", "factor": True}, "rope_scaling.factor must be a finite number"),
        ({"rope_type": "yarn"}, "rope_scaling.factor must be given"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial rotation is not"),
        ({"full_attention": {"rope_type": "default"}}, "one set of values for all layers"),
        ({**LLAMA3, "low_freq_factor": None}, "low_freq_factor must be given"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor must be greater than low_freq"),
        ({**LLAMA3, "original_max_position_embeddings": 0.5}, "must be an integer from 2"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "must be an integer from 2"),
        ({**LONGROPE, "short_factor": [1.0] * 7}, "short_factor must be a list of 8 finite"),
        ({**LONGROPE, "long_factor": [1.0] * 7 + [0]}, "long_factor must be a list of 8 finite"),
        ({**LONGROPE, "long_factor": [1.0] * 7 + ["x"]}, "long_factor must be a list of 8"),
        ({**LONGROPE, "long_factor": None}, "long_factor must be a list of 8"),
        ({**YARN, "attention_factor": -1}, "attention_factor must be a finite number from 0"),
        ({**YARN, "beta_fast": "32"}, "beta_fast must be a finite number"),
        ({**YARN, "truncate": 0}, "truncate must be true or false"),
        ({**YARN, "rope_theta": 1.0}, "rope_scaling.rope_theta must be a finite number"),
        ([1], "rope_scaling must be a JSON object, found list"),
        ("linear", "rope_scaling must be a JSON object, found str"),
    ],
)
def test_bad_rope(rope: Any, rule: str) -> None:
    assert rule in refused(rope_scaling=rope)


def test_two_different_ropes() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    message = refused(rope_scaling=linear, rope_parameters={**linear, "factor": 4.0})
    assert "rope_scaling must be equal to rope_parameters when both are given" in message


def test_dynamic_rope_needs_four_dims() -> None:
    assert "head_dim must be at least 4" in refused(
        head_dim=2, rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    )
