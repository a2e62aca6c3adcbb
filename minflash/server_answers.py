"""Answers in the OpenAI protocol: whole ones, and the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .chunk import NO_TOKEN, Chunk, Stats
from .server_errors import Body
from .tool_calls import Call, CallReader


@dataclass
class Answer:
    """One answer, as a whole or as the events of a stream."""

    model: str
    chat: bool
    prompt_tokens: int
    token: Callable[[int], tuple[str, bytes | None]]  # text and bytes, for log-probabilities
    before: str = ""  # the prompt's text, where a completion is to repeat it
    reader: CallReader | None = None  # where functions may be called
    logprobs: bool = False  # log-probabilities are asked for
    prompt: Sequence[Chunk] = ()  # of a repeated prompt, where they are
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    _offset: int = 0  # characters of the text before the next token with a log-probability

    def whole(self, chunks: list[Chunk], tokens: int) -> Body:
        """The answer in one piece; ``chunks`` are all of its chunks, with so many tokens."""
        said = [self._read(chunk) for chunk in chunks]
        text = self.before + "".join(text for text, _ in said)
        calls = [call for _, found in said for call in found]
        last = chunks[-1]
        choice = {
            **self._choice(self._message(text, calls), [*self.prompt, *chunks]),
            "finish_reason": self._finish_reason(last),
        }
        name = "chat.completion" if self.chat else "text_completion"
        usage = self.usage(tokens, last.stats)
        return {**self._head(name), "choices": [choice], **usage}

    def opening(self) -> Body | None:
        """The first event: the role in a chat, the repeated prompt in a completion."""
        if self.chat:
            return self._event({"delta": {"role": "assistant", "content": ""}})
        if not (self.before or self.prompt):
            return None
        return self._event({"text": self.before}, None, self.prompt)

    def event(self, chunk: Chunk) -> Body | None:
        """The event of a chunk; None when there is nothing to tell yet."""
        text, calls = self._read(chunk)
        if not (text or calls) and chunk.finish_reason is None and chunk.logprob is None:
            return None
        delta: Body = {"content": text} if text else {}
        if self.reader is not None and calls:
            first = self.reader.found - len(calls)
            delta["tool_calls"] = [
                {"index": number, **_tool_call(call)} for number, call in enumerate(calls, first)
            ]
        said = {"delta": delta} if self.chat else {"text": text}
        return self._event(said, self._finish_reason(chunk), [chunk])

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

    def _read(self, chunk: Chunk) -> tuple[str, list[Call]]:
        """What a chunk makes certain. For each chunk once, in their order."""
        return self.reader.read(chunk) if self.reader else (chunk.text, [])

    def _message(self, text: str, calls: list[Call]) -> Body:
        if not self.chat:
            return {"text": text}
        if not calls:
            return {"message": {"role": "assistant", "content": text}}
        found = {"content": text or None, "tool_calls": [_tool_call(call) for call in calls]}
        return {"message": {"role": "assistant", **found}}

    def _finish_reason(self, chunk: Chunk) -> str | None:
        called = self.reader is not None and self.reader.found
        return "tool_calls" if called and chunk.finish_reason == "stop" else chunk.finish_reason

    @property
    def _event_name(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _event(
        self, said: Body, finish_reason: str | None = None, chunks: Sequence[Chunk] = ()
    ) -> Body:
        choice = {**self._choice(said, chunks), "finish_reason": finish_reason}
        return {**self._head(self._event_name), "choices": [choice]}

    def _choice(self, said: Body, chunks: Sequence[Chunk]) -> Body:
        return {"index": 0, **said, "logprobs": self._logprobs(chunks)}

    def _logprobs(self, chunks: Sequence[Chunk]) -> Body | None:
        """Log-probabilities of the tokens, where they were asked for."""
        told = [chunk for chunk in chunks if self.logprobs and chunk.token != NO_TOKEN]
        if not told:
            return None
        if not self.chat:
            return self._of_completion(told)
        return {"content": [self._of_chat(chunk) for chunk in told], "refusal": None}

    def _of_chat(self, chunk: Chunk) -> Body:
        top = [self._token(*one) for one in chunk.top_logprobs or ()]
        return {**self._token(chunk.token, chunk.logprob), "top_logprobs": top}

    def _of_completion(self, chunks: Sequence[Chunk]) -> Body:
        offsets = []
        for chunk in chunks:
            offsets.append(self._offset)
            self._offset += len(chunk.text)
        return {
            "tokens": [self.token(chunk.token)[0] for chunk in chunks],
            "token_logprobs": [chunk.logprob for chunk in chunks],
            "top_logprobs": [self._alternatives(chunk) for chunk in chunks],
            "text_offset": offsets,
        }

    def _alternatives(self, chunk: Chunk) -> dict[str, float] | None:
        """By text; of tokens with the same text the likeliest counts."""
        if chunk.logprob is None:  # the first token of a prompt
            return None
        likeliest_last = reversed(chunk.top_logprobs or ())
        return {self.token(token)[0]: value for token, value in likeliest_last}

    def _token(self, token: int, logprob: float | None) -> Body:
        text, found = self.token(token)
        return {"token": text, "logprob": logprob, "bytes": None if found is None else list(found)}

    def _head(self, name: str) -> Body:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": name,
            "created": self.created,
            "model": self.model,
        }


def _tool_call(call: Call) -> Body:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def to_json(value: Any) -> bytes:
    """Compact UTF-8; a lone surrogate, which a client may have sent, is a question mark."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def sse(value: Any) -> bytes:
    """One server-sent event (JSON has no line ends of its own)."""
    return b"data: " + to_json(value) + b"\n\n"


SSE_END = b"data: [DONE]\n\n"
