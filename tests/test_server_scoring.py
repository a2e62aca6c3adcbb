"""Log-probabilities of a prompt: completions with ``echo`` and ``logprobs``, as scoring asks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from web_server import COMPLETIONS, TINY, Server, connect, error_of, running, until

import minflash
from minflash import engine as engine_module
from minflash.sampling import log_probabilities

TEXT = "Once upon a time, süß 🙂"


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    create: Any = client.completions.create
    return create(model="default", **{"prompt": TEXT, "echo": True, "logprobs": 2, **fields})


def parts(choice: Any) -> list[str]:
    """The text cut at the offsets of its tokens."""
    ends = [*choice.logprobs.text_offset, len(choice.text)]
    return [choice.text[begin:end] for begin, end in pairwise(ends)]


def test_a_text_is_scored(
    client: openai.OpenAI, llm: minflash.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 5)  # in several parts
    answer = ask(client, max_tokens=0)
    (choice,) = answer.choices
    assert choice.text == TEXT and choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len(llm.tokenize(TEXT)),
        0,
    )
    found, score = choice.logprobs, llm.score(TEXT)
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(score.logprobs[1:], abs=1e-5)
    texts = [llm.detokenize([token]) for token in score.tokens]
    known = [(a, b) for a, b in zip(found.tokens, texts, strict=True) if "\ufffd" not in b]
    assert 10 < len(known) < len(texts) and all(token == text for token, text in known)
    assert "".join(parts(choice)) == TEXT and found.text_offset[0] == 0
    whole = [(a, b) for a, b in zip(found.tokens, parts(choice), strict=True) if "bytes:" not in a]
    assert len(whole) > 10 and all(token == part for token, part in whole)
    best = log_probabilities(llm.logits(TEXT)).max(axis=1)
    for top, expected in zip(found.top_logprobs[1:], best, strict=False):
        assert len(top) == 2 and max(top.values()) == pytest.approx(expected, abs=1e-5)


def test_prompt_and_answer_together(client: openai.OpenAI, llm: minflash.LLM) -> None:
    """The idiom of lm-evaluation-harness: token ids, one token more, and is it the likeliest?"""
    tokens = llm.tokenize(TEXT)
    expected = list(llm.stream(tokens, max_tokens=4, logprobs=1))
    (choice,) = ask(client, prompt=[tokens], max_tokens=4, logprobs=1, temperature=0).choices
    found, place = choice.logprobs, len(tokens)
    assert choice.text == TEXT + "".join(chunk.text for chunk in expected)
    assert found.token_logprobs[1:place] == pytest.approx(llm.score(tokens).logprobs[1:], abs=1e-4)
    made = [chunk.logprob for chunk in expected]
    assert found.token_logprobs[place:] == pytest.approx(made, abs=1e-4)
    assert [max(top.values()) for top in found.top_logprobs[place:]] == found.token_logprobs[place:]
    assert "".join(parts(choice)) == choice.text and found.text_offset[place] == len(TEXT)


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_streams_tell_the_same(client: openai.OpenAI, max_tokens: int) -> None:
    (whole,) = ask(client, max_tokens=max_tokens).choices
    events = [event.choices[0] for event in ask(client, max_tokens=max_tokens, stream=True)]
    assert "".join(event.text for event in events) == whole.text
    told = [event.logprobs for event in events if event.logprobs is not None]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        values = [value for one in told for value in getattr(one, name)]
        assert len(values) == len(getattr(whole.logprobs, name))
        if name in ("tokens", "text_offset"):
            assert values == getattr(whole.logprobs, name)
    assert events[-1].finish_reason == "length"


def test_without_echo_offsets_begin_with_the_answer(client: openai.OpenAI) -> None:
    (choice,) = ask(client, echo=False, max_tokens=6).choices
    assert choice.logprobs.text_offset[0] == 0 and "".join(parts(choice)) == choice.text
    events = [event.choices[0] for event in ask(client, echo=False, max_tokens=6, stream=True)]
    told = [place for one in events if one.logprobs for place in one.logprobs.text_offset]
    assert told == choice.logprobs.text_offset


def test_nothing_but_the_prompt(client: openai.OpenAI, llm: minflash.LLM) -> None:
    (choice,) = ask(client, max_tokens=0, logprobs=None).choices
    assert choice.text == TEXT and choice.logprobs is None
    (single,) = ask(client, prompt="a", max_tokens=0, logprobs=0).choices
    assert single.logprobs.tokens == ["a"] and single.logprobs.token_logprobs == [None]
    full = [5] * llm.max_context  # no room for an answer is needed
    assert len(ask(client, prompt=full, max_tokens=0).choices[0].logprobs.tokens) == len(full)


def test_too_long_a_text(server: Server, llm: minflash.LLM) -> None:
    body = {"echo": True, "logprobs": 1, "max_tokens": 0, "prompt": [5] * (llm.max_context + 1)}
    assert error_of(server.post(COMPLETIONS, body)) == (400, "prompt", "context_length_exceeded")
    body |= {"prompt": [5] * llm.max_context, "max_tokens": 1}
    assert error_of(server.post(COMPLETIONS, body)) == (400, "prompt", "context_length_exceeded")


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[minflash.LLM]:
    """The tiny model with a begin-of-text token before each text."""
    folder = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("models") / "bos"))
    config = folder / "tokenizer_config.json"
    text = config.read_text().replace("PreTrainedTokenizerFast", "LlamaTokenizerFast")
    config.write_text(text.replace('"add_bos_token": false', '"add_bos_token": true'))
    with minflash.load(folder, device="cpu") as llm:
        yield llm


def test_a_begin_of_text_is_a_token_without_text(with_bos: minflash.LLM) -> None:
    with running(with_bos) as server, connect(server) as client:
        for prompt, hidden in (("Hello", 1), ("<|im_start|>Hello", 0), ([1, *b"Hello"], 1)):
            (choice,) = ask(client, prompt=prompt, max_tokens=0).choices
            assert choice.logprobs.tokens[0] == "<|im_start|>"
            assert ("" in parts(choice)[:1]) == bool(hidden)
            assert "".join(parts(choice)) == choice.text


def test_leaving_ends_the_wait_of_a_scoring(llm: minflash.LLM) -> None:
    """Another generation of the program goes on, and the server is free for the next."""
    with running(llm) as server:
        own = llm.stream("Once", max_tokens=5, ignore_eos=True)
        next(own)
        with connect(server) as client, pytest.raises(openai.APITimeoutError):
            ask(client, max_tokens=0, timeout=0.3)
        until(lambda: not server.service.queue.running)
        assert list(own)[-1].finish_reason == "length"


def test_likeliest_tokens_in_order() -> None:
    from minflash.server_scoring import _likeliest

    logprobs = np.array([-3, -1, -2, -1, -5], np.float32)
    assert _likeliest(logprobs, 3) == ((1, -1.0), (3, -1.0), (2, -2.0))
    assert len(_likeliest(logprobs, 100)) == 5 and _likeliest(logprobs, 0) == ()
