"""Steps a to e before a token is chosen, log-probabilities, and choosers on both devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import cpu_engine, cuda_engine, gpu_engine
from kernel_models import RandomModel, model_config
from sampled import draws

import minflash
from minflash.choosing import Chooser
from minflash.errors import ArgumentError, MinflashError
from minflash.llm import LLM
from minflash.sampling import Sampling, adjusted, log_probabilities, sample, threshold

LOGITS = np.array([1.0, -2.0, 3.0, 0.5, -0.25], np.float32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, -2, 3, 0.5, -0.25]),
        ({"logit_bias": ((1, 5.0), (2, -100.0))}, [1, 3, -97, 0.5, -0.25]),
        ({"repetition_penalty": 2.0}, [0.5, -4, 3, 0.5, -0.5]),
        ({"presence_penalty": 1.5}, [-0.5, -2, 3, 0.5, -1.75]),
        ({"frequency_penalty": 0.5}, [0.5, -2, 3, 0.5, -1.25]),
        ({"presence_penalty": 1.0, "frequency_penalty": -0.5}, [0.5, -2, 3, 0.5, -0.25]),
        ({"min_tokens": 4}, [1, -2, -np.inf, 0.5, -0.25]),
        ({"min_tokens": 3}, [1, -2, 3, 0.5, -0.25]),
        # The bias counts before the penalty that divides; the mask counts last.
        ({"logit_bias": ((0, 1.0),), "repetition_penalty": 2.0}, [1, -4, 3, 0.5, -0.5]),
        (
            {"logit_bias": ((1, 4.0),), "repetition_penalty": 4.0, "presence_penalty": 1.0},
            [-0.75, 0.5, 3, 0.5, -2],
        ),
    ],
)
def test_adjustments_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    """Prompt: token 1, twice. Answer: 4, 0, 4. Token 2 ends the answer."""
    sampling = Sampling(**options)
    assert sampling.adjusts == bool(options)
    scores = adjusted(LOGITS, sampling, [1, 1], [4, 0, 4], {2})
    assert scores.dtype == np.float32 and scores.tolist() == expected
    allowed = np.array([True, False, True, True, False])
    masked = adjusted(LOGITS, sampling, [1, 1], [4, 0, 4], {2}, allowed)
    assert masked.tolist() == np.where(allowed, expected, -np.inf).tolist()
    assert LOGITS[0] == 1.0  # a copy


def test_log_probabilities() -> None:
    logits = np.random.default_rng(1).normal(size=(3, 50_000)).astype(np.float32) * 10
    wide = logits.astype(np.float64)
    exact = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_probabilities(logits), exact, atol=1e-5)
    assert log_probabilities(np.array([1000.0, -np.inf], np.float32)).tolist() == [0.0, -np.inf]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 0},
        {"repetition_penalty": "x"},
        {"presence_penalty": 101},
        {"frequency_penalty": float("nan")},
        {"min_tokens": -1},
        {"min_tokens": 1.5},
        {"logit_bias": {1: 101}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {"a": 1}},
        {"logit_bias": [1, 2]},
        {"logprobs": 101},
        {"logprobs": True},
    ],
)
def test_bad_values_name_the_rule(llm: LLM, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        llm.stream("x", **options)


def test_a_bias_for_a_token_that_the_model_does_not_have(llm: LLM) -> None:
    with pytest.raises(ArgumentError, match="from 0 to 256, found 257"):
        llm.stream("x", logit_bias={257: 1.0})


FILTERED = {"top_k": 4, "top_p": 0.99, "min_p": 0.001}


@pytest.mark.parametrize("filters", [{}, FILTERED], ids=["no filters", "filters"])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.4},
        {"frequency_penalty": 0.2},
        {"logit_bias": ((3, 0.7), (1, 2.0))},
        {"min_tokens": 5, "logit_bias": ((2, 3.0),)},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2,
         "logit_bias": ((3, 0.7),)},
    ],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_adjustments_change_the_distribution_as_they_say(
    options: dict[str, Any], filters: dict[str, float], masked: bool
) -> None:
    """Chi-square of 1e5 draws, up to 5 cells; the limits are the 0.9999 quantiles."""
    sampling = Sampling(temperature=1.0, seed=5, **options, **filters)  # type: ignore[arg-type]
    allowed = np.array([True, True, False, True, True]) if masked else None
    scores = adjusted(LOGITS, sampling, [1], [4, 0, 4], {2}, allowed)
    kept = np.flatnonzero(np.isfinite(scores) & (scores >= threshold(scores, sampling)))
    assert (len(kept) < 5) == bool(filters or masked or "min_tokens" in options)
    goal = np.exp(scores[kept]) / np.exp(scores[kept]).sum()
    n = 100_000
    counts = np.bincount(draws(scores, sampling, n), minlength=5)[kept]
    assert counts.sum() == n
    limit = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51}[len(kept) - 1]
    assert np.sum((counts - n * goal) ** 2 / (n * goal)) < limit


# Through an LLM, and on both engines


@pytest.fixture(scope="module")
def llm(converted: Path) -> Iterator[LLM]:
    with minflash.load(converted, device="cpu") as model:
        yield model


def test_options_reach_the_choice(llm: LLM) -> None:
    banned = [chunk.token for chunk in llm.stream("Hi", max_tokens=5, ignore_eos=True)]
    bias = {str(token): -100 for token in banned}
    chunks = list(llm.stream("Hi", max_tokens=5, ignore_eos=True, logit_bias=bias))
    assert not {chunk.token for chunk in chunks} & set(banned)
    tokens = [
        chunk.token
        for chunk in llm.stream("Hi", max_tokens=40, frequency_penalty=100, ignore_eos=True)
    ]
    assert len(set(tokens)) == 40
    ended = [c.token for c in llm.stream("Hi", max_tokens=9, logit_bias={256: 100}, min_tokens=3)]
    assert len(ended) == 4 and ended.index(256) == 3


def test_logprobs(llm: LLM) -> None:
    plain = [c.token for c in llm.stream("Hi", max_tokens=6, ignore_eos=True)]
    chunks = list(llm.stream("Hi", max_tokens=6, ignore_eos=True, logprobs=3))
    assert [chunk.token for chunk in chunks] == plain
    raw = log_probabilities(llm.logits([*b"Hi", *plain[:-1]]))[1:]
    for chunk, row in zip(chunks, raw, strict=True):
        assert chunk.logprob == pytest.approx(row[chunk.token], abs=1e-4)
        top = chunk.top_logprobs
        assert top is not None and [t for t, _ in top] == np.argsort(-row)[:3].tolist()
        assert top[0] == (chunk.token, chunk.logprob)
    # Those of the model: neither temperature nor a penalty changes them.
    (drawn,) = llm.stream("Hi", max_tokens=1, temperature=3.0, seed=1, logprobs=0, top_k=5)
    assert drawn.top_logprobs == ()
    assert drawn.logprob == pytest.approx(raw[0][drawn.token], abs=1e-4)
    assert next(llm.stream("Hi", max_tokens=1)).logprob is None


@pytest.mark.parametrize(
    "make", [cpu_engine, cuda_engine, pytest.param(gpu_engine, marks=pytest.mark.gpu)]
)
def test_a_chooser_chooses_the_same_on_both_engines(make: Any) -> None:
    model = RandomModel(model_config(), "bf16", seed=3)
    prompt = [5, 77, 300, 12, 9, 250, 31, 8, 119, 64]
    sampling = Sampling(temperature=0.8, top_k=40, seed=7, repetition_penalty=1.2)
    expected = []
    reference = cpu_engine(model)
    for position in range(len(prompt), len(prompt) + 6):
        logits = reference.logits([*prompt, *expected])[-1]
        expected.append(sample(adjusted(logits, sampling, prompt, expected), sampling, position))
    engine = make(model)
    assert list(engine.tokens(prompt, sampling, 6, choose=Chooser(sampling, prompt))) == expected
    before = engine.forwarded
    again = Chooser(sampling, prompt, logprobs=1)
    assert list(engine.tokens(prompt, sampling, 6, choose=again)) == expected
    assert engine.forwarded - before == (1 if engine.device == "cpu" else 2) + 5
    plain = Sampling(temperature=0.8, top_k=40, seed=7)
    drawn = list(engine.tokens(prompt, plain, 6))
    assert list(engine.tokens(prompt, plain, 6, choose=Chooser(plain, prompt))) == drawn
    engine.close()


def test_a_mask_that_leaves_nothing_is_an_error() -> None:
    chooser = Chooser(Sampling(min_tokens=2), [1], ends=range(5))
    with pytest.raises(MinflashError, match="no token is allowed at position 1"):
        chooser(LOGITS, 1)
