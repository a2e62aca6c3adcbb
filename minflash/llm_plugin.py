"""minflash as a plugin of the command line tool ``llm`` (llm.datasette.io).

    pip install "minflash[llm]"
    llm -m minflash "Why is the sky blue?"

``minflash`` is the default model; every model in minflash's cache is ``minflash/NAME``. A model is
loaded at the first prompt and stays for the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import llm

if TYPE_CHECKING:
    from minflash.llm import LLM

_OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """Called by ``llm``: names the models."""
    from minflash.cache import cached_models

    register(Minflash("minflash", None))
    for model in cached_models():
        register(Minflash(f"minflash/{model.name}", str(model.path)))


class Options(llm.Model.Options):
    """What ``llm -o NAME VALUE`` takes; as in minflash's own options."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None


class Minflash(llm.Model):
    """One model of minflash."""

    can_stream = True
    supports_schema = True
    Options = Options

    def __init__(self, model_id: str, source: str | None) -> None:
        """source: what ``minflash.load`` takes."""
        self.model_id = model_id
        self._source = source
        self._loaded: LLM | None = None
        self._lock = threading.Lock()

    def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> Iterator[str]:
        """Yields the answer's text; ``llm`` joins it when it was asked not to stream."""
        model = self._load()
        options = {name: getattr(prompt.options, name) for name in _OPTIONS}
        given: Any = {name: value for name, value in options.items() if value is not None}
        if prompt.schema:
            schema = {"name": "answer", "schema": prompt.schema}
            given["response_format"] = {"type": "json_schema", "json_schema": schema}
        messages = conversation_messages(prompt, conversation)
        spoken = messages if model.has_chat_template else messages[-1]["content"]
        for chunk in model.stream(spoken, **given):
            if chunk.text:
                yield chunk.text
        stats = model.last_stats
        if stats is not None:
            response.set_usage(input=stats.prompt_tokens, output=stats.generation_tokens)

    def _load(self) -> LLM:
        from minflash.loading import load

        with self._lock:
            if self._loaded is None:
                self._loaded = load(self._source)
            return self._loaded


def conversation_messages(prompt: Any, conversation: Any) -> list[dict[str, str]]:
    """The messages of a prompt of ``llm`` with what was said before it."""
    earlier = [] if conversation is None else list(conversation.responses)
    first = earlier[0].prompt if earlier else prompt
    system = prompt.system or first.system
    messages = [{"role": "system", "content": str(system)}] if system else []
    for response in earlier:
        messages.append({"role": "user", "content": str(response.prompt.prompt)})
        messages.append({"role": "assistant", "content": str(response.text())})
    return [*messages, {"role": "user", "content": str(prompt.prompt)}]
