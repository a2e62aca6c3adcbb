"""The plugin for the ``llm`` package; skipped where that is not installed (it brings much)."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

llm = pytest.importorskip("llm", reason="the package llm is not installed (minflash[llm])")

from minflash import llm_plugin  # noqa: E402


@pytest.fixture
def model(converted: Path) -> Any:
    model = llm_plugin.Minflash("minflash/small", str(converted))
    yield model
    if model._loaded is not None:
        model._loaded.close()


def test_the_entry_point_is_declared() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points.llm]\nminflash = "minflash.llm_plugin"' in text


def test_models_are_registered() -> None:
    found: list[Any] = []
    llm_plugin.register_models(found.append)
    assert found[0].model_id == "minflash"


def test_an_answer_and_a_conversation(model: Any) -> None:
    response = model.prompt("Hi", max_tokens=5, temperature=1.0, seed=3)
    text = response.text()
    again = model.prompt("Hi", max_tokens=5, temperature=1.0, seed=3)
    assert again.text() == text
    assert response.usage().output == again.usage().output <= 5
    conversation = model.conversation()
    first = conversation.prompt("One", max_tokens=4, system="Be brief")
    answer = first.text()
    prompts: list[Any] = []
    real = model._load()

    class Spy:
        has_chat_template, last_stats = True, None

        def stream(self, messages: Any, **options: Any) -> Any:
            prompts.append(messages)
            return iter([SimpleNamespace(text="x")])

    model._loaded = Spy()
    assert conversation.prompt("Two", max_tokens=4).text() == "x"
    model._loaded = real
    assert prompts == [
        [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Two"},
        ]
    ]


def test_a_wrong_option_is_refused(model: Any) -> None:
    with pytest.raises(Exception, match="loudness"):
        model.prompt("Hi", loudness=3).text()


@pytest.mark.skipif(
    not [e for e in importlib.metadata.entry_points(group="llm") if e.name == "minflash"],
    reason="minflash is not installed as a distribution, so that llm cannot find it",
)
def test_the_program_llm_finds_the_models_and_answers(converted: Path, tmp_path: Path) -> None:
    """The commands of docs/guide/embedding.md, with a small model in place of the default one."""
    (tmp_path / "cache" / "models").mkdir(parents=True)
    shutil.copytree(converted, tmp_path / "cache" / "models" / "small")
    environment = {
        **os.environ,
        "MINFLASH_CACHE_DIR": str(tmp_path / "cache"),
        "MINFLASH_MODEL": str(converted),
        "MINFLASH_DEVICE": "cpu",
        "LLM_USER_PATH": str(tmp_path / "llm"),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llm", *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, errors="replace"
        )

    listed = run("models").stdout
    assert "minflash" in listed.split() and "minflash/small" in listed.split()
    asked = ("Why is the sky blue?", "-o", "max_tokens", "12", "-o", "seed", "3")
    answers = [run("-m", name, *asked) for name in ("minflash", "minflash/small")]
    assert all(done.returncode == 0 and done.stdout.strip() for done in answers), answers
    assert answers[0].stdout == answers[1].stdout
    gone_on = run("-c", "And then?", "-o", "max_tokens", "5")
    assert gone_on.returncode == 0, gone_on.stderr
    refused = run("-m", "minflash", "Hi", "-o", "loudness", "3")
    assert refused.returncode != 0 and "loudness" in refused.stderr
