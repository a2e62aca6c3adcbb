"""Answers in the OpenAI protocol: whole ones, and the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from .chunk import Chunk, Stats
from .server_protocol import Body


@dataclass(frozen=True)
class Answer:
    """What the answers to one request share."""

    model: str
    chat: bool
    prompt_tokens: int
    before: str = ""  # the prompt's text, where a completion is to repeat it
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, chunks: list[Chunk]) -> Body:
        """The answer in one piece; ``chunks`` are all of its chunks."""
        text = self.before + "".join(chunk.text for chunk in chunks)
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        last = chunks[-1]
        choice = {**self._choice(said), "finish_reason": last.finish_reason}
        name = "chat.completion" if self.chat else "text_completion"
        usage = self.usage(len(chunks), last.stats)
        return {**self._head(name), "choices": [choice], **usage}

    def opening(self) -> Body | None:
        """The first event: the role in a chat, the repeated prompt in a completion."""
        if self.chat:
            return self._event({"delta": {"role": "assistant", "content": ""}})
        return self._event({"text": self.before}) if self.before else None

    def event(self, chunk: Chunk) -> Body | None:
        """The event of a chunk; None when there is nothing to tell yet."""
        if not chunk.text and chunk.finish_reason is None:
            return None
        if not self.chat:
            return self._event({"text": chunk.text}, chunk.finish_reason)
        delta = {"content": chunk.text} if chunk.text else {}
        return self._event({"delta": delta}, chunk.finish_reason)

    def closing(self, tokens: int, stats: Stats | None) -> Body:
        """The event with the usage, which comes last."""
        return {**self._head(self._event_name), "choices": [], **self.usage(tokens, stats)}

    def usage(self, tokens: int, stats: Stats | None) -> Body:
        """Numbers of tokens, and how fast they came (a field of minflash's own)."""
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }
        if stats is None:
            return {"usage": usage}
        speed = {
            "prompt_tps": round(stats.prompt_tps, 3),
            "generation_tps": round(stats.generation_tps, 3),
            "time_to_first_token": round(stats.time_to_first_token, 6),
        }
        return {"usage": usage, "stats": speed}

    @property
    def _event_name(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _event(self, said: Body, finish_reason: str | None = None) -> Body:
        choice = {**self._choice(said), "finish_reason": finish_reason}
        return {**self._head(self._event_name), "choices": [choice]}

    def _choice(self, said: Body) -> Body:
        return {"index": 0, **said, "logprobs": None}

    def _head(self, name: str) -> Body:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": name,
            "created": self.created,
            "model": self.model,
        }


def to_json(value: Any) -> bytes:
    """Compact UTF-8; a lone surrogate, which a client may have sent, is a question mark."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def sse(value: Any) -> bytes:
    """One server-sent event (JSON has no line ends of its own)."""
    return b"data: " + to_json(value) + b"\n\n"


SSE_END = b"data: [DONE]\n\n"
