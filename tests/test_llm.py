"""Loading and generation as callers see them, on a scripted engine and on small real models."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_model import END, ScriptedEngine, load_tokenizer, write_source

import minflash
from minflash import engine as engine_module
from minflash import loading, memory, probe
from minflash.config import ModelConfig
from minflash.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    ContextError,
    DeviceError,
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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    out = tmp_path_factory.mktemp("converted") / "small"
    return minflash.convert(source, out, progress=False)


@pytest.fixture(scope="module")
def llm(converted: Path) -> Iterator[LLM]:
    with minflash.load(converted, device="cpu") as model:
        yield model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


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
        ("repeat_penalty", "called repetition_penalty here and is not supported"),
        ("repetition_penalty", "not supported in this version"),
        ("logprobs", "not supported in this version"),
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
        {"stop_token_ids": ["a"]},
        {"temperature": -1},
        {"seed": 2**64},
    ],
)
def test_bad_values_are_errors_at_the_call(scripted: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        scripted(b"a").stream("x", **options)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"n_ctx": 5}, "max_context"),
        ({"devise": "cpu"}, "did you mean device"),
        ({"temperature": 1}, "argument of generate"),
        ({"zzz": 1}, "load knows device"),
        ({"quantize": "int3"}, "int4"),
        ({"group_size": 48}, "32, 64, 128"),
        ({"max_context": 0}, "at least 1"),
        ({"device": "tpu"}, "cuda, cpu"),
    ],
)
def test_bad_load_arguments(converted: Path, arguments: dict[str, Any], hint: str) -> None:
    with pytest.raises(ArgumentError, match=hint):
        minflash.load(converted, **arguments)


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


# Real small models


def test_logits_follow_transformers_and_greedy_follows_them(llm: LLM) -> None:
    golden = np.load(Path(__file__).parent / "golden" / "llama2.npz")
    prompt = checkpoints.tokens("llama2")
    logits = llm.logits(prompt)
    assert logits.shape == (len(prompt), 257) and logits.dtype == np.float32
    kept = logits[np.ix_(golden["positions"], golden["columns"])]
    np.testing.assert_allclose(kept, golden["logits"], atol=1e-4)
    tokens = [chunk.token for chunk in llm.stream(prompt, max_tokens=8, ignore_eos=True)]
    again = llm.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
    assert tokens == again.argmax(axis=1).tolist()


def test_long_prompts_in_parts_give_the_same(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(30, 100))
    whole, text = llm.logits(prompt), llm.generate(prompt, max_tokens=5)
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 16)
    np.testing.assert_allclose(llm.logits(prompt), whole, atol=1e-4)
    assert llm.generate(prompt, max_tokens=5) == text


def test_same_seed_same_text(llm: LLM) -> None:
    options: Any = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
    first = llm.generate("Hello", seed=5, **options)
    assert llm.generate("Hello", seed=5, **options) == first
    assert llm.generate("Hello", seed=6, **options) != first
    assert llm.generate("Hello", **options) != llm.generate("Hello", **options)


def test_public_shortcuts_keep_their_model(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINFLASH_MODEL", str(converted))
    monkeypatch.setenv("MINFLASH_DEVICE", "cpu")
    text = minflash.generate("Hi", max_tokens=4)
    assert text == minflash.generate("Hi", max_tokens=4, model=str(converted))
    assert "".join(chunk.text for chunk in minflash.stream("Hi", max_tokens=4)) == text
    assert isinstance(minflash.chat("Hi", max_tokens=4), str)
    with minflash.load(converted) as other:
        assert minflash.generate("Hi", max_tokens=4, model=other) == text


def test_hugging_face_folder_is_converted_into_the_cache_once(source: Path, cache: Path) -> None:
    folder = shutil.copytree(source, cache.parent / "model")
    with minflash.load(folder, device="cpu", progress=False) as model:
        first = model.path
        assert first is not None and first.parent == cache and model.generate("a", max_tokens=2)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert loading.model_folder(folder) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    int8 = loading.model_folder(folder, quantize="int8", group_size=32, progress=False)
    assert int8 != first and int8.parent == cache
    (folder / "model.safetensors").touch()
    assert loading.model_folder(folder, progress=False) not in (first, int8)


def test_gguf_file_gives_the_same_tokens(llm: LLM, cache: Path, tmp_path: Path) -> None:
    from test_convert_gguf import write_gguf

    path = tmp_path / "small model.gguf"
    write_gguf(path, "llama2", lambda name: "BF16")
    prompt = checkpoints.tokens("llama2")
    expected = [chunk.token for chunk in llm.stream(prompt, max_tokens=6, ignore_eos=True)]
    with minflash.load(str(path), device="cpu", progress=False) as model:
        assert model.path is not None and model.path.parent == cache
        tokens = [chunk.token for chunk in model.stream(prompt, max_tokens=6, ignore_eos=True)]
    assert tokens == expected


def test_converted_folder_cannot_be_quantized_again(converted: Path) -> None:
    with pytest.raises(ArgumentError, match="already converted"):
        minflash.load(converted, quantize="int4")


def test_paths_that_are_no_model(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "model.safetensors").write_text("{}")
    for path, hint in [
        (tmp_path / "nothing here", "no such file or folder"),
        (tmp_path / "empty", r"no config\.json"),
        (tmp_path / "text.gguf", "not a GGUF file"),
        (tmp_path / "model.safetensors", "name the folder"),
    ]:
        with pytest.raises(CheckpointError, match=hint):
            minflash.load(path, device="cpu")
    assert not cache.exists() or not list(cache.iterdir())


def test_folder_without_tokenizer_loads(converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    with minflash.load(folder, device="cpu") as model:
        assert len(list(model.stream([1, 2, 3], max_tokens=4, ignore_eos=True))) == 4
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            model.generate("x")


@pytest.mark.parametrize(
    ("content", "sampling", "eos"),
    [
        ({}, Sampling(), set()),
        ({"temperature": 0.6, "eos_token_id": 5}, Sampling(), {5}),
        ({"do_sample": True, "eos_token_id": [5, 6]}, Sampling(temperature=1.0), {5, 6}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": None},
            Sampling(temperature=0.6, top_k=20, top_p=0.9),
            set(),
        ),
    ],
)
def test_generation_config(
    tmp_path: Path, content: dict[str, Any], sampling: Sampling, eos: set[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert loading.generation_defaults(tmp_path) == (sampling, eos)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"eos_token_id": "x"}', '{"do_sample": true, "temperature": -1}', "[" * 99999],
)
def test_damaged_generation_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        loading.generation_defaults(tmp_path)


# Devices and memory


def test_device_choice(
    converted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MINFLASH_DEVICE", raising=False)
    monkeypatch.setattr(engine_module, "cuda_problem", lambda: "no driver here; install one")
    monkeypatch.setattr("minflash.notice._said", set())
    with pytest.raises(DeviceError, match="no driver here; install one"):
        minflash.load(converted, device="cuda")
    for _ in range(2):
        with minflash.load(converted) as model:
            assert model.device == "cpu"
    notices = [record for record in caplog.records if "no driver here" in record.getMessage()]
    assert len(notices) == 1 and notices[0].name == "minflash"
    monkeypatch.setenv("MINFLASH_DEVICE", "cuda")
    with pytest.raises(DeviceError):
        minflash.load(converted)


class FakeRuntime:
    """cupy.cuda.runtime with a driver of some version and no device."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, version: int, error: str | None) -> None:
        self.version, self.error = version, error

    def driverGetVersion(self) -> int:
        return self.version

    def getDeviceCount(self) -> int:
        if self.error:
            raise self.CUDARuntimeError(self.error)
        return 1


@pytest.mark.parametrize(
    ("version", "error", "visible", "hint"),
    [
        (0, None, None, "driver does not answer"),
        (12080, "cudaErrorNoDevice", None, "nvidia-smi"),
        (12080, "cudaErrorNoDevice", "7", "CUDA_VISIBLE_DEVICES is '7'"),
        (12080, None, None, None),
    ],
)
def test_cuda_problems_name_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    error: str | None,
    visible: str | None,
    hint: str | None,
) -> None:
    fake = type("cupy", (), {"cuda": type("cuda", (), {"runtime": FakeRuntime(version, error)})})
    monkeypatch.setitem(__import__("sys").modules, "cupy", fake)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    problem = probe._cupy_problem()
    assert (problem is None) if hint is None else (problem is not None and hint in problem)


def test_cupy_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    assert "pip install cupy-cuda12x" in (probe._cupy_problem() or "")


def test_cupy_cache_goes_elsewhere_when_home_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    probe._prepare_cupy_cache()
    chosen = __import__("os").environ.pop("CUPY_CACHE_DIR")
    assert not chosen.startswith(str(tmp_path))


def test_context_is_bounded_by_memory_and_said(
    converted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from minflash.checkpoint import open_checkpoint

    monkeypatch.setattr("minflash.notice._said", set())
    with open_checkpoint(converted) as checkpoint:
        weights = sum(4 * layout.rows * layout.cols for layout in checkpoint.matrices.values())
        position = 4 * 2 * CONFIG.n_layers * CONFIG.n_kv_heads * CONFIG.head_dim
        assert memory.cpu_context(checkpoint, None) == 128
        assert memory.cpu_context(checkpoint, 50) == 50
        with pytest.raises(ContextError, match=r"max_context is 129.* 128"):
            memory.cpu_context(checkpoint, 129)
        monkeypatch.setattr(memory, "free_memory_bytes", lambda: weights + 100 * position)
        assert memory.cpu_context(checkpoint, None) == 80
        assert "the context is 80 positions" in caplog.text
        with pytest.raises(ContextError, match=r"max_context is 90 .* allows 80"):
            memory.cpu_context(checkpoint, 90)
        monkeypatch.setattr(memory, "free_memory_bytes", lambda: weights // 2)
        with pytest.raises(DeviceError, match="weights take"):
            memory.cpu_context(checkpoint, None)


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e6 < memory.free_memory_bytes() < 1e14
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    outside = memory.free_memory_bytes()
    (tmp_path / "memory.max").write_text("50000\n")
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 20000\n")
    assert memory.free_memory_bytes() == 40000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory_bytes() > outside / 2
