"""Generation as callers see it, on a scripted engine that says what it is told."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_model import END, ScriptedEngine, load_tokenizer

import minflash
from minflash import states
from minflash.config import ModelConfig
from minflash.errors import (
    ArgumentError,
    ContextError,
    MinflashError,
    TokenizerError,
)
from minflash.llm import LLM
from minflash.sampling import Sampling
from minflash.stopping import StopStrings
from minflash.tokenizer import Tokenizer

CONFIG = replace(ModelConfig.from_hf(checkpoints.CASES["llama2"]), eos_token_ids=(2, 3))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> Any:
    def make(script: bytes | list[int], **arguments: Any) -> LLM:
        return LLM(ScriptedEngine(CONFIG, script), tokenizer, **arguments)

    return make


# Text: stop strings, characters, ends


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.text("ab", min_size=1, max_size=4))
def test_stop_string_is_found_however_the_text_is_split(pieces: list[str], stop: str) -> None:
    stops, text = StopStrings([stop]), "".join(pieces)
    shown = ""
    for piece in pieces:
        shown += stops.push(piece)
        assert stop not in shown and text.startswith(shown)
    shown += stops.flush()
    assert shown == text.split(stop)[0]
    assert stops.stopped == (stop in text)


def test_stop_strings_are_held_back_and_not_part_of_the_output(scripted: Any) -> None:
    chunks = list(scripted(b"one EN two END three").stream("x", stop=["END", "###"]))
    assert "".join(chunk.text for chunk in chunks) == "one EN two "
    assert chunks[-1].finish_reason == "stop"
    assert all(chunk.finish_reason is None and chunk.stats is None for chunk in chunks[:-1])
    assert scripted(b"abcdef").generate("x", stop="d", max_tokens=6) == "abc"
    assert scripted(b"one END").generate("x", stop="ENDING", max_tokens=7) == "one END"


def test_characters_are_never_broken(scripted: Any) -> None:
    text = "sky: 天空 😀é"
    raw = text.encode()
    chunks = list(scripted(raw).stream("x", max_tokens=len(raw)))
    assert "".join(chunk.text for chunk in chunks) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(chunk.text for chunk in chunks)
    assert [chunk.token for chunk in chunks] == list(raw)
    assert any(chunk.text == "天" for chunk in chunks)


def test_a_character_that_never_completes_comes_at_the_end(scripted: Any) -> None:
    assert scripted("é".encode()).generate("x", max_tokens=1) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("end", [2, 3, END, 7])
def test_every_end_token_ends_the_text_without_being_part_of_it(scripted: Any, end: int) -> None:
    model = scripted([65, 66, end, 67], eos_token_ids=[7])
    chunks = list(model.stream("x", max_tokens=10))
    assert "".join(chunk.text for chunk in chunks) == "AB"
    assert (chunks[-1].token, chunks[-1].finish_reason) == (end, "stop")
    assert model.last_stats is chunks[-1].stats
    assert model.generate("x", max_tokens=4, ignore_eos=True).endswith("C")


def test_stop_token_ids_and_length(scripted: Any) -> None:
    model = scripted(b"abcdef")
    assert model.generate("x", stop_token_ids=np.array([ord("d")])) == "abc"
    chunks = list(model.stream("x", max_tokens=2))
    assert [chunk.text for chunk in chunks] == ["a", "b"]
    assert chunks[-1].finish_reason == "length"
    assert model.generate("x", max_new_tokens=3) == "abc"


def test_stats(scripted: Any) -> None:
    model = scripted(b"abcdef")
    assert model.last_stats is None
    model.generate("four", max_tokens=5)
    stats = model.last_stats
    assert (stats.prompt_tokens, stats.generation_tokens) == (4, 5)
    assert stats.time_to_first_token > 0 and stats.prompt_tps > 0 and stats.generation_tps > 0
    assert stats.peak_memory_bytes > 1e6
    assert stats.gb_per_s is stats.percent_of_bus is None  # a GPU's


# Prompts and the context


def test_prompts_of_three_kinds(scripted: Any) -> None:
    model = scripted(b"ok")
    model.generate("Hi<|end|>", max_tokens=1)
    model.generate(np.array([72, 105]), max_tokens=1)
    model.generate([{"role": "user", "content": "Hi<|end|>"}], max_tokens=1)
    model.chat("Hi", max_tokens=1)
    text = [bytes(token for token in prompt if token < 256) for prompt in model._engine.prompts]
    assert text == [b"Hi", b"Hi", b"user: Hi<|end|>\nassistant: ", b"user: Hi\nassistant: "]
    assert model._engine.prompts[0][-1] == END
    assert model.tokenize("Hi<|end|>", special=False) == list(b"Hi<|end|>")
    assert model.detokenize([72, 105, END]) == "Hi"


def test_tools_reach_the_template(tmp_path: Path) -> None:
    template = "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}{{ messages[0].content }}"
    model = LLM(ScriptedEngine(CONFIG, b"ok"), load_tokenizer(tmp_path, template=template))
    model.chat("Hi", tools=[{"name": "f"}, {"name": "g"}], max_tokens=1)
    model.chat("Hi", max_tokens=1)
    assert [bytes(prompt) for prompt in model._engine.prompts] == [b"f;g;Hi", b"Hi"]
    with pytest.raises(ArgumentError, match="tools go with a list of messages"):
        model.generate("Hi", tools=[{"name": "f"}])


@pytest.mark.parametrize("empty", ["", [], np.array([], np.int64)])
def test_empty_prompt(scripted: Any, empty: Any) -> None:
    with pytest.raises(ArgumentError, match="prompt is empty"):
        scripted(b"a").stream(empty)


@pytest.mark.parametrize("bad", [[257], [-1], [1.5], ["a"], 7, None, b"text", [[1]]])
def test_prompts_that_are_none(scripted: Any, bad: Any) -> None:
    with pytest.raises(ArgumentError, match="token ids"):
        scripted(b"a").stream(bad)


def test_context_is_never_cut_silently(scripted: Any) -> None:
    model = scripted(b"abc")
    assert len(model.generate("x" * 120)) == 8  # the default takes what there is
    assert len(model.generate("x" * 120, max_tokens=8)) == 8
    with pytest.raises(ContextError, match=r"120 tokens and max_tokens is 9, together 129.* 128"):
        model.generate("x" * 120, max_tokens=9)
    with pytest.raises(ContextError, match=r"128 tokens, but the context holds 128"):
        model.generate("x" * 128)
    with pytest.raises(ContextError, match="129"):
        model.logits([1] * 129)
    assert model.logits([1] * 128).shape == (128, 257)


def test_without_a_tokenizer_tokens_go_in_and_out() -> None:
    model = LLM(ScriptedEngine(CONFIG, [5, 6, 2]), path=Path("model"))
    assert [chunk.token for chunk in model.stream([1, 2])] == [5, 6, 2]
    assert model.logits([1]).shape == (1, 257)
    calls = [
        lambda: model.generate([1]),
        lambda: model.stream("text"),
        lambda: model.stream([1], stop="x"),
        lambda: model.chat("hello"),
        lambda: model.tokenize("text"),
        lambda: model.detokenize([1]),
    ]
    for call in calls:
        with pytest.raises(TokenizerError, match=r"model has no tokenizer\.json.*Chunk\.token"):
            call()


def test_without_a_chat_template(tmp_path: Path) -> None:
    model = LLM(ScriptedEngine(CONFIG, b"a"), load_tokenizer(tmp_path, template=None))
    assert not model.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template"):
        model.chat("hello")


# Arguments


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temp", "did you mean temperature"),
        ("temprature", "did you mean temperature"),
        ("top_kk", "did you mean top_k"),
        ("n_ctx", "did you mean max_context"),
        ("repeat_penalty", "did you mean repetition_penalty"),
        ("guided_json", "did you mean response_format"),
        ("max_context", "argument of load"),
        ("zzz", "known are .*max_tokens"),
    ],
)
def test_unknown_arguments_are_errors(scripted: Any, name: str, hint: str) -> None:
    with pytest.raises(ArgumentError, match=hint):
        scripted(b"a").stream("x", **{name: 1})


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"max_tokens": True},
        {"max_tokens": 5, "max_new_tokens": 5},
        {"stop": ""},
        {"stop": [""]},
        {"stop": [3]},
        {"stop": 5},
        {"stop": {"a": 1}},
        {"stop": b"a"},
        {"stop_token_ids": ["a"]},
        {"stop_token_ids": ""},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [257]},
        {"stop_token_ids": {"a": 1}},
        {"ignore_eos": "no"},
        {"ignore_eos": 1},
        {"temperature": -1},
        {"seed": 2**64},
    ],
)
def test_bad_values_are_errors_at_the_call(scripted: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        scripted(b"a").stream("x", **options)


def test_mistakes_of_every_kind_are_errors_of_minflash(scripted: Any, tmp_path: Path) -> None:
    model = scripted(b"a")
    deep: Any = reduce(lambda inner, _: [inner], range(5000), [])
    calls = [
        (lambda: model.chat("hi", tools=5), "tools must be a list"),
        (lambda: model.apply_chat_template("x", tools=5), "tools must be a list"),
        (lambda: model.chat("hi", tools=""), "tools must be a list"),
        (lambda: model.generate("hi", tools=0), "tools go with a list of messages"),
        (lambda: model.generate(deep), "tokens must be .* found a list that cannot be shown"),
        (lambda: model.embed([]), r"embed takes .*, none of them empty, found \[\]"),
        (lambda: model.embed(None), "embed takes .* found None"),
        (lambda: model.embed({"a": 1}), "embed takes"),
        (lambda: model.embed(["a", 1]), "not both"),
        (lambda: model.embed([1.5]), "token ids"),
        (lambda: model.embed([999]), "token ids must be from 0 to 256, found 999"),
        (lambda: model.tokenize(None), "text must be a string, found None"),
        (lambda: model.tokenize(5), "text must be a string, found 5"),
        (lambda: model.tokenize(b"a"), "text must be a string"),
        (lambda: states.save(None, model._engine, ""), "path of a state must be .*, found None"),
        (lambda: states.save("a\0b", model._engine, ""), "path of a state must be"),
        (lambda: states.save(tmp_path, model._engine, ""), "is a folder; name a file in it"),
        (lambda: states.save("/", model._engine, ""), "is a folder"),
        (lambda: states.load(5, model._engine, ""), "path of a state must be"),
        (lambda: minflash.load(5), "a model must be the path"),
        (lambda: minflash.load(""), "a model must be the path"),
        (lambda: minflash.convert(tmp_path, None), "out must be the path"),
        (lambda: minflash.convert(None, tmp_path), "source must be the path"),
    ]
    for call, message in calls:
        with pytest.raises(ArgumentError, match=message):
            call()
    assert model.generate("hi", tools=[], stop={"b"}, max_tokens=1) == "a"


def test_only_true_and_false_are_flags(scripted: Any, tmp_path: Path) -> None:
    model = scripted(b"a", eos_token_ids=[10**9])  # the model's own may be any: they never come
    assert model.generate("x", max_tokens=1, ignore_eos=np.False_) == "a"
    messages = [{"role": "user", "content": "x"}]
    calls = [
        lambda: model.tokenize("x", special="no"),
        lambda: model.tokenize("x", add_bos=0),
        lambda: model.detokenize([65], skip_special="no"),
        lambda: model.apply_chat_template(messages, add_generation_prompt="no"),
        lambda: minflash.load(tmp_path, progress="no"),
        lambda: minflash.convert(tmp_path, tmp_path, overwrite="no"),
        lambda: minflash.convert(tmp_path, tmp_path, progress=0),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="must be True or False, found"):
            call()


def test_sampling_defaults_of_the_model_and_of_the_call(scripted: Any) -> None:
    model = scripted(b"a", defaults=Sampling(temperature=0.6, top_p=0.9))
    model.generate("x", max_tokens=1)
    model.generate("x", max_tokens=1, temperature=0)
    model.generate("x", max_tokens=1, top_k=5, seed=3, top_p=None)
    first, second, third = model._engine.samplings
    assert (first.temperature, first.top_p) == (0.6, 0.9) and first.seed is not None
    assert second.greedy
    assert third == Sampling(temperature=0.6, top_k=5, top_p=0.9, seed=3)


# Turns, threads, closing


def test_closing_a_stream_stops_the_engine(scripted: Any) -> None:
    model = scripted(b"abc")
    for chunk in model.stream("x"):
        if chunk.text == "b":
            break
    assert model._engine.produced == 2 and model._engine.running == 0
    assert model.last_stats.generation_tokens == 2
    assert model.generate("x", max_tokens=1) == "a"


def test_a_second_call_during_a_stream_of_the_same_thread_is_an_error(scripted: Any) -> None:
    model = scripted(b"abc")
    stream = model.stream("x")
    next(stream)
    with pytest.raises(MinflashError, match="not finished"):
        model.generate("y")
    stream.close()
    assert model.generate("y", max_tokens=2) == "ab"


def test_eight_threads_take_turns(scripted: Any) -> None:
    model = scripted(b"abcdefgh")
    answers: list[str] = []

    def ask() -> None:
        answers.extend(model.generate("x", max_tokens=8) for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert answers == ["abcdefgh"] * 40
    assert model._engine.most_running == 1


def test_use_after_close(scripted: Any) -> None:
    with scripted(b"abc") as model:
        stream = model.stream("x")
        next(stream)
    assert "closed" in repr(model)
    with pytest.raises(MinflashError, match="closed; load it again"):
        next(stream)
    for call in (model.generate, model.stream, model.tokenize, model.chat, model.logits):
        with pytest.raises(MinflashError, match="closed; load it again"):
            call("x")
    model.close()
    assert model._engine.closed >= 1
