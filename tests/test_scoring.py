"""Scores and embeddings against the logits and the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engines import cuda_engine
from kernel_models import RandomModel, model_config

import minflash
from minflash import engine as engine_module
from minflash.errors import ArgumentError, ContextError
from minflash.llm import LLM
from minflash.reference import linear
from minflash.scoring import pool


@pytest.fixture(scope="module")
def llm(converted: Path) -> Iterator[LLM]:
    with minflash.load(converted, device="cpu") as model:
        yield model


def test_a_score_is_the_sum_of_its_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The sky is blue."
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 5)
    score = llm.score(text)
    assert score.tokens == tuple(text.encode()) and score.logprobs[0] is None
    wide = llm.logits(text).astype(np.float64)
    exact = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    expected = [exact[place, token] for place, token in enumerate(score.tokens[1:])]
    assert score.logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert score.total == pytest.approx(sum(expected), abs=1e-3)
    assert score.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-4)
    assert llm.score(list(text.encode())).total == pytest.approx(score.total)
    assert math.isnan(llm.score("a").perplexity)
    with pytest.raises(ContextError, match="129"):
        llm.score("x" * 129)
    assert llm.score("x" * 128).total < 0


def test_what_was_generated_scores_as_its_logprobs(llm: LLM) -> None:
    chunks = list(llm.stream("Hi", max_tokens=8, logprobs=0, ignore_eos=True))
    score = llm.score([*b"Hi", *(chunk.token for chunk in chunks)])
    assert score.logprobs[2:] == pytest.approx([chunk.logprob for chunk in chunks], abs=1e-4)


def test_embeddings(llm: LLM) -> None:
    one, other = llm.embed("The sky"), llm.embed("A dog")
    both = llm.embed(["The sky", "A dog"])
    np.testing.assert_allclose(both, [one, other], atol=1e-6)
    np.testing.assert_array_equal(llm.embed(list(b"The sky")), one)
    np.testing.assert_array_equal(llm.embed(np.array(llm.tokenize("The sky"))), one)
    np.testing.assert_array_equal(llm.embed(text for text in ("The sky", "A dog")), both)
    assert one.shape == (llm.config.dim,) and one.dtype == np.float32
    assert np.linalg.norm(one) == pytest.approx(1.0, abs=1e-5)
    hidden = llm._engine.hidden(list(b"The sky"))
    assert one == pytest.approx(hidden.mean(axis=0) / np.linalg.norm(hidden.mean(axis=0)))
    last = llm.embed("The sky", pooling="last")
    assert last == pytest.approx(hidden[-1] / np.linalg.norm(hidden[-1]), abs=1e-5)
    # What enters the head: times the head it gives the logits.
    head = llm._engine._open_reference().lm_head
    np.testing.assert_allclose(linear(hidden, head), llm.logits("The sky"), atol=1e-4)
    with pytest.raises(ArgumentError, match="pooling must be one of mean, last, found 'max'"):
        llm.embed("x", pooling="max")


def test_scores_and_embeddings_on_the_kernel(llm: LLM) -> None:
    engine = cuda_engine(RandomModel(model_config(), "bf16", seed=3))
    other = LLM(engine, llm._need_tokenizer("embed takes text"))
    score = other.score([5, 77, 300, 12, 9, 250, 31, 8, 119, 64])
    assert len(score.logprobs) == 10 and score.total < 0
    vector = other.embed("The sky is blue.")
    np.testing.assert_array_equal(vector, pool(engine.hidden(list(b"The sky is blue.")), "mean"))
    assert vector.shape == (96,) and np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    other.close()
