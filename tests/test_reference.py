"""The reference against transformers (golden files), against itself and against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from numpy.typing import NDArray

from minflash.config import RopeConfig
from minflash.errors import ArgumentError, ContextError
from minflash.numeric import bf16_to_fp32, fp32_to_bf16
from minflash.packing import Layout, Matrix
from minflash.reference import (
    FIRST_CAPACITY,
    QUERY_BLOCK,
    Reference,
    attention,
    rms_norm,
    rotate,
    softmax,
    swiglu,
    visibility,
)
from minflash.rope import frequencies, rotation

GOLDEN = Path(__file__).parent / "golden"
CASES = list(checkpoints.CASES)
DTYPES = [np.float32, np.float64]


def golden_error(checkpoint: checkpoints.MemoryCheckpoint, case: str, dtype: Any) -> float:
    """Largest difference from the logits of transformers."""
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as golden:
        reference = Reference(checkpoint, dtype=dtype)
        logits = reference.forward(golden["tokens"].tolist(), 0, all_logits=True)
        assert logits.dtype == dtype
        assert logits.shape == (checkpoints.TOKENS, checkpoint.config.vocab_size)
        kept = logits[np.ix_(golden["positions"], golden["columns"])]
        return float(np.abs(kept - golden["logits"]).max())


# Truth from outside


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, dtype: Any) -> None:
    assert golden_error(checkpoints.checkpoint(case), case, dtype) < 1e-4


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("mistral_window", {"windows": (8, 8)}),
        ("qwen2_window", {"windows": (0, 5, 0)}),
        ("qwen3_window", {"windows": (0, 0)}),
        ("qwen2", {"qkv_bias": False}),
        ("llama_biases", {"out_bias": False}),
        ("llama_biases", {"mlp_bias": False}),
        ("qwen3", {"qk_norm": False}),
        ("llama2", {"norm_eps": 1e-4}),
        *(
            (case, {"rope": RopeConfig(theta=float(checkpoints.CASES[case]["rope_theta"]))})
            for case in ("llama3", "llama_linear", "llama_dynamic", "llama_yarn", "llama_longrope")
        ),
    ],
)
def test_golden_files_notice_a_wrong_model(case: str, change: dict[str, Any]) -> None:
    checkpoint = checkpoints.checkpoint(case)
    wrong = replace(checkpoint, config=replace(checkpoint.config, **change))
    assert golden_error(wrong, case, np.float64) > 1e-2


def test_golden_files_cover_all_cases_and_are_small() -> None:
    files = {path.stem: path.stat().st_size for path in GOLDEN.glob("*.npz")}
    assert set(files) == set(CASES)
    assert max(files.values()) < 6000


def test_hashed_values_never_change() -> None:
    found = [float(value).hex() for value in checkpoints.hashed("minflash", (4,))]
    assert found == ["-0x1.baaa700000000p-1", "0x1.191c200000000p-3", "0x1.b379bc0000000p-1",
                     "-0x1.db50380000000p-1"]  # fmt: skip
    assert checkpoints.tokens("llama2")[:6] == [59, 229, 212, 99, 186, 242]


# One meaning, however the tokens are fed


@pytest.mark.parametrize("case", CASES)
def test_steps_and_chunks_equal_prefill(case: str) -> None:
    checkpoint, tokens = checkpoints.checkpoint(case), checkpoints.tokens(case)
    n = len(tokens)
    reference = Reference(checkpoint, dtype=np.float64)
    whole = reference.forward(tokens, 0, all_logits=True)
    steps = [reference.forward([token], i, length=n) for i, token in enumerate(tokens)]
    np.testing.assert_allclose(steps, whole, rtol=0, atol=1e-11)
    chunked = Reference(checkpoint, dtype=np.float64)
    for begin, end in ((0, 1), (1, 8), (8, 31), (31, 48)):
        last = chunked.forward(tokens[begin:end], begin, length=n)
        np.testing.assert_allclose(last, whole[end - 1], rtol=0, atol=1e-11)
        assert chunked.length == end


def test_last_logits_are_the_last_row() -> None:
    reference = Reference(checkpoints.checkpoint("smollm2"), dtype=np.float64)
    tokens = checkpoints.tokens("smollm2")
    rows = reference.forward(tokens, 0, all_logits=True)
    np.testing.assert_allclose(reference.forward(tokens, 0), rows[-1], rtol=0, atol=1e-12)


def test_earlier_position_replaces_what_follows() -> None:
    reference = Reference(checkpoints.checkpoint("qwen3_window"), dtype=np.float64)
    tokens = checkpoints.tokens("qwen3_window")
    reference.forward([3] * 40, 0)
    reference.forward(tokens[:10], 0)
    assert reference.length == 10
    again = reference.forward(tokens[10:20], 10)
    fresh = Reference(checkpoints.checkpoint("qwen3_window"), dtype=np.float64)
    np.testing.assert_allclose(again, fresh.forward(tokens[:20], 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [0, 7])
def test_cache_grows_and_long_prompts_are_cut_into_query_blocks(window: int) -> None:
    checkpoint = checkpoints.checkpoint("mistral_window")
    config = replace(checkpoint.config, max_context=4096, windows=(window, 0))
    count = max(FIRST_CAPACITY, QUERY_BLOCK) + 50
    tokens = (checkpoints.tokens("mistral_window") * 10)[:count]
    whole = Reference(replace(checkpoint, config=config), dtype=np.float64)
    parts = Reference(replace(checkpoint, config=config), dtype=np.float64)
    parts.forward(tokens[:200], 0)
    parts.forward(tokens[200:-1], 200)
    last = parts.forward(tokens[-1:], count - 1)
    np.testing.assert_allclose(last, whole.forward(tokens, 0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", ["llama_dynamic", "llama_longrope"])
def test_frequencies_of_one_forward_follow_the_length_then(case: str) -> None:
    """As in transformers: tokens past the original context turn otherwise, earlier keys stay."""
    checkpoint, tokens = checkpoints.checkpoint(case), checkpoints.tokens(case)
    original = checkpoint.config.rope.original_context
    reference = Reference(checkpoint, dtype=np.float64)
    short = reference.forward(tokens[:original], 0)
    reference.forward(tokens[original:], original)
    stretched = Reference(checkpoint, dtype=np.float64)
    assert not np.allclose(stretched.forward(tokens[:original], 0, length=48), short, atol=1e-3)
    split = reference.forward(tokens[-1:], 47)
    assert not np.allclose(stretched.forward(tokens, 0), split, atol=1e-3)


def test_window_hides_what_lies_before_it() -> None:
    checkpoint = checkpoints.checkpoint("mistral_window")  # 2 layers, 7 positions each
    tokens = checkpoints.tokens("mistral_window")
    other = [(tokens[0] + 1) % checkpoint.config.vocab_size, *tokens[1:]]
    one = Reference(checkpoint, dtype=np.float64).forward(tokens, 0, all_logits=True)
    two = Reference(checkpoint, dtype=np.float64).forward(other, 0, all_logits=True)
    reach = 2 * (7 - 1)  # the last position that token 0 can still reach through two layers
    assert np.array_equal(one[reach + 1 :], two[reach + 1 :])
    assert all(np.abs(one[i] - two[i]).max() > 1e-9 for i in range(reach + 1))


# Types and rounding


def test_stored_types_are_dequantized() -> None:
    class Bf16(checkpoints.MemoryCheckpoint):
        def matrix(self, name: str) -> Matrix:
            values = self.arrays[name]
            return Matrix(Layout(*values.shape, "bf16"), fp32_to_bf16(values))

    checkpoint, tokens = checkpoints.checkpoint("llama_biases"), checkpoints.tokens("llama_biases")
    stored = Bf16(checkpoint.config, checkpoint.arrays)
    one, two = (Reference(each).forward(tokens, 0) for each in (checkpoint, stored))
    assert np.array_equal(one, two)  # the weights of the cases are exact in bf16


def test_rounding_is_applied_where_the_kernel_rounds() -> None:
    seen: dict[str, set[tuple[int, ...]]] = {}

    def to_bf16(name: str, values: NDArray[Any]) -> NDArray[Any]:
        seen.setdefault(name, set()).add(values.shape)
        return bf16_to_fp32(fp32_to_bf16(values.astype(np.float32))).astype(values.dtype)

    checkpoint, tokens = checkpoints.checkpoint("qwen3"), checkpoints.tokens("qwen3")
    exact = Reference(checkpoint, dtype=np.float64).forward(tokens, 0)
    rounded = Reference(checkpoint, dtype=np.float64, rounding=to_bf16).forward(tokens, 0)
    assert seen["q"] == {(48, 5, 32)}
    assert seen["k"] == seen["v"] == {(48, 1, 32)}
    assert seen["probability"] == {(1, 5, 48, 48)}
    # into wqkv and w_gate_up [96], wo [160], w_down [96], and the last row into lm_head
    assert seen["activation"] == {(48, 96), (48, 160), (1, 96)}
    assert 1e-5 < np.abs(rounded - exact).max() < 0.5


# Operators


def test_rms_norm_against_a_loop() -> None:
    x, weight = checkpoints.hashed("x", (3, 5)).astype(np.float64), np.arange(5.0)
    expected = [[v * w / math.sqrt(sum(u * u for u in row) / 5 + 0.1) for v, w in
                 zip(row, weight, strict=True)] for row in x]  # fmt: skip
    np.testing.assert_allclose(rms_norm(x, weight, 0.1), expected, rtol=1e-14)
    assert not rms_norm(np.zeros((1, 5)), weight, 1e-5).any()


def test_softmax_of_large_and_hidden_scores() -> None:
    found = softmax(np.array([[1e4, 1e4, -np.inf], [-1e4, -np.inf, -np.inf]], np.float32))
    assert found.tolist() == [[0.5, 0.5, 0], [1, 0, 0]]


@pytest.mark.filterwarnings("error")
def test_swiglu_of_extremes() -> None:
    gate = np.array([[-1e5, -100, -1, 0, 1, 1e5]], np.float32)
    found = swiglu(gate, np.full_like(gate, 2))
    sigmoid = 1 / (1 + math.e)
    np.testing.assert_allclose(found, [[0, 0, -2 * sigmoid, 0, 2 - 2 * sigmoid, 2e5]], atol=1e-6)


def test_attention_against_loops() -> None:
    q = checkpoints.hashed("q", (3, 6, 4)).astype(np.float64) * 3
    k, v = (checkpoints.hashed(name, (2, 5, 4)).astype(np.float64) for name in "kv")
    visible = visibility(np.array([2, 3, 4]), np.arange(5), 3)
    assert visible.astype(int).tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    found = attention(q, k, v, visible, lambda name, values: values)
    for i in range(3):
        for h in range(6):
            seen = [j for j in range(5) if visible[i, j]]
            weights = [math.exp(float(q[i, h] @ k[h // 3, j]) / 2) for j in seen]
            mixed = sum(w * v[h // 3, j] for w, j in zip(weights, seen, strict=True)) / sum(weights)
            np.testing.assert_allclose(found[i, h], mixed, rtol=1e-12)


def test_rotation_keeps_lengths_and_depends_on_distance() -> None:
    x = checkpoints.hashed("x", (1, 1, 8)).astype(np.float64)
    y = checkpoints.hashed("y", (1, 1, 8)).astype(np.float64)
    rope = RopeConfig()

    def at(vector: NDArray[np.float64], position: int) -> NDArray[np.float64]:
        return rotate(vector, *rotation(rope, 8, np.array([position]), position + 1))[0, 0]

    assert np.linalg.norm(at(x, 9)) == pytest.approx(np.linalg.norm(x), rel=1e-14)
    assert at(x, 3) @ at(y, 1) == pytest.approx(at(x, 1003) @ at(y, 1001), rel=1e-9)
    assert at(x, 0).tolist() == x[0, 0].tolist()


# Frequencies


def test_default_and_linear_frequencies() -> None:
    inverse, scaling = frequencies(RopeConfig(theta=100.0), 4, 1)
    assert (inverse.tolist(), scaling) == ([1.0, 0.1], 1.0)
    assert frequencies(RopeConfig("linear", 100.0, 4.0), 4, 1)[0].tolist() == [0.25, 0.025]


def test_dynamic_frequencies_grow_past_the_original_context() -> None:
    rope, plain = RopeConfig("dynamic", 10000.0, 2.0, 32), RopeConfig()
    assert np.array_equal(frequencies(rope, 16, 32)[0], frequencies(plain, 16, 32)[0])
    at_64 = frequencies(rope, 16, 64)[0]
    np.testing.assert_allclose(at_64, (10000 * 3 ** (16 / 14)) ** (-np.arange(8) / 8), rtol=1e-14)
    fallback = RopeConfig("dynamic", 10000.0, 2.0)
    assert np.array_equal(frequencies(fallback, 16, 64, max_context=32)[0], at_64)


def test_llama3_frequencies() -> None:
    rope = RopeConfig("llama3", 500000.0, 8.0, 8192, 1.0, 4.0)
    plain, scaled = frequencies(RopeConfig(theta=500000.0), 64, 1)[0], frequencies(rope, 64, 1)[0]
    turns = 8192 * plain / (2 * math.pi)
    assert np.array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-15)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert np.all((scaled < plain)[between] & (scaled > plain / 8)[between])


def test_longrope_switches_after_the_original_context() -> None:
    rope = RopeConfig("longrope", 100.0, 4.0, 16, short_factor=(1, 2), long_factor=(4, 5))
    short, scaling = frequencies(rope, 4, 16)
    assert short.tolist() == [1, 0.05]
    assert frequencies(rope, 4, 17)[0].tolist() == [0.25, 0.02]
    assert scaling == pytest.approx(math.sqrt(1.5))


def test_yarn_scaling() -> None:
    rope = RopeConfig("yarn", 10000.0, 4.0, 2048)
    assert frequencies(rope, 64, 1)[1] == pytest.approx(0.1 * math.log(4) + 1)
    assert frequencies(replace(rope, attention_factor=0.7), 64, 1)[1] == 0.7
    both = replace(rope, mscale=2.0, mscale_all_dim=1.0)
    ratio = (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    assert frequencies(both, 64, 1)[1] == pytest.approx(ratio)
    assert frequencies(replace(rope, factor=1.0), 64, 1)[1] == 1.0


# Errors


@pytest.fixture
def small() -> Reference:
    return Reference(checkpoints.checkpoint("llama2"), max_context=16)


@pytest.mark.parametrize(
    ("tokens", "position", "error", "message"),
    [
        ([1], 5, ArgumentError, "position must be from 0 to 4.*found 5"),
        ([1], -1, ArgumentError, "position must be"),
        ([1] * 13, 4, ContextError, "4 \\+ 13 positions exceed the context of 16"),
        ([], 4, ArgumentError, "at least one token id"),
        ([257], 4, ArgumentError, "from 0 to 256, found 257"),
        ([-1], 4, ArgumentError, "from 0 to 256, found -1"),
        ([1.5], 4, ArgumentError, "token id"),
        ([True], 4, ArgumentError, "token id"),
        ("abc", 4, ArgumentError, "token id"),
        ([[1]], 4, ArgumentError, "token id"),
    ],
)
def test_bad_calls(
    small: Reference, tokens: Any, position: int, error: type[Exception], message: str
) -> None:
    small.forward([1, 2, 3, 4], 0)
    with pytest.raises(error, match=message):
        small.forward(tokens, position)
    assert small.length == 4  # nothing is lost


def test_bad_length(small: Reference) -> None:
    with pytest.raises(ArgumentError, match="at least position \\+ tokens = 2, found 1"):
        small.forward([1, 2], 0, length=1)


@pytest.mark.parametrize("max_context", [0, -1, 129])
def test_bad_max_context(max_context: int) -> None:
    with pytest.raises(ContextError, match=f"from 1 to the model's own 128, found {max_context}"):
        Reference(checkpoints.checkpoint("llama2"), max_context=max_context)


def test_context_can_be_filled_to_the_last_position(small: Reference) -> None:
    small.forward([1] * 15, 0)
    assert small.forward([1], 15).shape == (257,)
    with pytest.raises(ContextError):
        small.forward([1], 16)
