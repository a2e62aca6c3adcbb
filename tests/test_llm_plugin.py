"""The plugin for the ``llm`` package; skipped where that is not installed (it brings much)."""

from __future__ import annotations

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
