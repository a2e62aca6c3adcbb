"""Requests of the OpenAI protocol: what a body may hold, and what it means here.

A field is obeyed, or known to be harmless, or an error; none is silently ignored. The protocol:
OpenAI's API reference, "Chat completions" and "Completions". The fields ``top_k``, ``min_p``,
``repetition_penalty``, ``min_tokens``, ``stop_token_ids``, ``ignore_eos``, ``regex`` and
``grammar`` are minflash's own, under the names that other servers use too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .arguments import parse
from .errors import ArgumentError, ContextError, MinflashError, TokenizerError

Body = dict[str, Any]

# Without effect on the answer.
_HARMLESS = frozenset(
    (
        *("user", "store", "metadata", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prediction"),
    )
)
# Values that ask for nothing beyond what happens anyway.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "top_logprobs": (0,),
}
_REFUSED = {
    "n": "one request makes one answer: send it several times",
    "best_of": "one request makes one answer: leave it out",
    "suffix": "the model writes what follows a prompt, not what lies between: leave it out",
    "modalities": "the model writes text only",
    "parallel_tool_calls": "tool calls are part of the model's text here: leave it out",
    "functions": "it is called tools now",
    "function_call": "it is called tool_choice now",
}
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens"),
    *("response_format", "regex", "grammar"),
)
_COMMON = frozenset((*_SAMPLING, "model", "max_tokens", "stream", "stream_options", "logprobs"))
_CHAT = _COMMON | {"messages", "max_completion_tokens", "tools", "tool_choice", "top_logprobs"}
_COMPLETION = _COMMON | {"prompt", "echo"}


class ApiError(Exception):
    """An answer other than success, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        self.type, self.param, self.code = type, param, code

    def body(self) -> Body:
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**fields, "code": self.code}}


def api_error(error: Exception, param: str | None = None) -> ApiError:
    """What a failure of the model's side is to a client; a bug of ours is told without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, (ArgumentError, TokenizerError)):
        return ApiError(400, str(error), param=param, code="invalid_value")
    known = isinstance(error, MinflashError)
    message = str(error) if known else f"unexpected {type(error).__name__}; the log tells more"
    return ApiError(500, message, type="server_error", code="internal_error")


@dataclass(frozen=True)
class Generation:
    """A checked request for text."""

    prompt: Any  # str, token ids, or messages
    model: str | None
    options: Body = field(default_factory=dict)  # of LLM.stream
    tools: Sequence[Any] | None = None
    stream: bool = False
    include_usage: bool = False
    echo: bool = False

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and isinstance(self.prompt[0], Mapping)


def parse_chat(body: Body) -> Generation:
    """The body of POST /v1/chat/completions. Raises ApiError."""
    fields = _known(body, _CHAT)
    if "max_completion_tokens" in fields:
        if "max_tokens" in fields:
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens are the same; give one of them",
                param="max_completion_tokens",
                code="invalid_value",
            )
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    return Generation(
        prompt=parse_messages(fields.pop("messages", None)),
        tools=_tools(fields),
        options=_options(fields, _chat_logprobs(fields)),
        **_shape(fields),
    )


def parse_completion(body: Body) -> Generation:
    """The body of POST /v1/completions. Raises ApiError."""
    fields = _known(body, _COMPLETION)
    logprobs = fields.pop("logprobs", None)
    echo = _flag(fields, "echo")
    if echo and logprobs is not None:
        raise _unsupported("echo", "log-probabilities of the prompt are not given: leave out one")
    return Generation(
        prompt=_prompt(fields.pop("prompt", None)),
        echo=echo,
        options=_options(fields, logprobs),
        **_shape(fields),
    )


def parse_messages(messages: Any) -> list[Body]:
    """Messages as templates expect them: text contents, arguments of tool calls as objects.

    Raises ApiError.
    """
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list of messages that is not empty", messages)
    return [_message(number, message) for number, message in enumerate(messages)]


def text_field(body: Body, name: str) -> str:
    """A field that must be there and be text. Raises ApiError."""
    value = body.get(name)
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    return value


def check_fields(body: Body, known: Sequence[str]) -> None:
    """Raises ApiError when a body holds another field."""
    for name in body:
        if name not in known:
            raise ApiError(
                400,
                f"unknown parameter {name!r}; known are {', '.join(sorted(known))}",
                param=name,
                code="unknown_parameter",
            )


def _known(body: Body, known: frozenset[str]) -> Body:
    """The fields that mean something."""
    fields = {name: value for name, value in body.items() if value is not None}
    for name in list(fields):
        if name in _HARMLESS or fields[name] in _NEUTRAL.get(name, ()):
            del fields[name]
        elif name in _REFUSED:
            raise _unsupported(name, _REFUSED[name])
    check_fields(fields, sorted(known))
    return fields


def _shape(fields: Body) -> Body:
    """Model and form of the answer."""
    model, stream = fields.get("model"), _flag(fields, "stream")
    if not isinstance(model, (str, type(None))):
        raise _wrong("model", "a string", model)
    wanted = fields.get("stream_options", {})
    if not isinstance(wanted, dict):
        raise _wrong("stream_options", "an object", wanted)
    if wanted and not stream:
        raise ApiError(
            400, "stream_options needs stream: true", param="stream_options", code="invalid_value"
        )
    check_fields(wanted, ("include_usage", "include_obfuscation"))
    return {
        "model": model,
        "stream": stream,
        "include_usage": _flag(dict(wanted), "include_usage"),
    }


def _options(fields: Body, logprobs: Any = None) -> Body:
    """The keyword arguments of LLM.stream, each one checked."""
    options = {name: fields[name] for name in (*_SAMPLING, "max_tokens") if name in fields}
    _flag(dict(options), "ignore_eos")
    if logprobs is not None:
        options["logprobs"] = logprobs
    for name, value in options.items():
        try:
            parse({name: value})
        except (MinflashError, TypeError, ValueError) as error:
            message = str(error) if isinstance(error, MinflashError) else f"{name} is {value!r:.60}"
            raise ApiError(400, message, param=name, code="invalid_value") from error
    try:
        parse(options)
    except MinflashError as error:  # two that exclude each other
        raise ApiError(400, str(error), code="invalid_value") from error
    return options


def _chat_logprobs(fields: Body) -> int | None:
    wanted, top = _flag(fields, "logprobs"), fields.pop("top_logprobs", None)
    if top is not None and not wanted:
        raise ApiError(
            400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value"
        )
    if top is not None and (not isinstance(top, int) or isinstance(top, bool)):
        raise _wrong("top_logprobs", "a whole number", top)
    return (top or 0) if wanted else None


def _tools(fields: Body) -> list[Any] | None:
    tools, choice = fields.pop("tools", None), fields.pop("tool_choice", "auto")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise _wrong("tools", "a list of objects", tools)
    if choice == "none":
        return None
    if choice != "auto":
        raise _unsupported("tool_choice", 'the model decides: "auto" or "none"')
    return tools or None


def _message(number: int, message: Any) -> Body:
    name = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _wrong(name, "an object with a role and a content", message)
    plain = {key: value for key, value in message.items() if value is not None}
    plain["content"] = _content(f"{name}.content", message.get("content"))
    if plain["role"] == "developer":  # OpenAI's newer word, which templates do not know
        plain["role"] = "system"
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_tool_call(call) for call in plain["tool_calls"]]
    return plain


def _content(name: str, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise _wrong(name, "a string or a list of text parts", content)
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text"):
            raise _wrong(name, "text: this model reads nothing else", part)
    return "".join(text_field(part, "text") for part in content)


def _tool_call(call: Any) -> Any:
    """Templates write arguments as JSON themselves; the protocol has them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and any(isinstance(item, (str, list)) for item in prompt):
        raise _unsupported("prompt", "one request completes one prompt: send them one by one")
    whole = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not prompt or not (isinstance(prompt, str) or whole):
        raise _wrong("prompt", "a string or a list of token ids that is not empty", prompt)
    return prompt  # type: ignore[no-any-return]


def _flag(fields: Body, name: str) -> bool:
    value = fields.pop(name, None)
    if not isinstance(value, (bool, type(None))):
        raise _wrong(name, "true or false", value)
    return bool(value)


def _wrong(name: str, rule: str, value: Any) -> ApiError:
    found = json.dumps(value, ensure_ascii=False, default=repr)
    found = found if len(found) <= 60 else found[:57] + "..."
    return ApiError(400, f"{name} must be {rule}; found {found}", param=name, code="invalid_value")


def _unsupported(name: str, reason: str) -> ApiError:
    return ApiError(
        400, f"{name} is not supported here; {reason}", param=name, code="unsupported_parameter"
    )
