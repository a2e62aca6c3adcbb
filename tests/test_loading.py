"""Loading and generation with small real models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest

import minflash
from minflash import engine as engine_module
from minflash import loading
from minflash.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    TokenizerError,
)
from minflash.llm import LLM
from minflash.sampling import Sampling


@pytest.fixture(scope="module")
def llm(converted: Path) -> Iterator[LLM]:
    with minflash.load(converted, device="cpu") as model:
        yield model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


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
    from gguf_files import write_gguf

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
