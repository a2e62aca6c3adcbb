"""Requests of the OpenAI protocol: what a body may hold, and what it means here.

A field is obeyed, or known to be harmless, or an error; none is silently ignored. The protocol:
OpenAI's API reference, "Chat completions" and "Completions". The fields ``top_k``, ``min_p``,
``repetition_penalty``, ``min_tokens``, ``stop_token_ids``, ``ignore_eos``, ``regex`` and
``grammar`` are minflash's own, under the names that other servers use too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .arguments import parse
from .errors import MinflashError
from .server_errors import ApiError, Body, invalid, unsupported, wrong
from .server_messages import parse_messages
from .server_tools import Tools, makes_one_call_at_most, parse_tools

# Without effect on the answer.
_HARMLESS = frozenset(
    (
        *("user", "store", "metadata", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prediction"),
    )
)
# Values that ask for nothing beyond what happens anyway, whatever the model's defaults are: of a
# sampling field none is left out, for a model may have another default.
_NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "best_of": 1,
    "suffix": "",
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
}
_REFUSED = {
    "n": "one request makes one answer: send it several times",
    "best_of": "one request makes one answer: leave it out",
    "suffix": "the model writes what follows a prompt, not what lies between: leave it out",
    "modalities": "the model writes text only",
    "parallel_tool_calls": "the model decides how many calls it makes: leave it out",
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


@dataclass(frozen=True)
class Generation:
    """A checked request for text."""

    prompt: Any  # str, token ids, or messages
    model: str | None
    options: Body = field(default_factory=dict)  # of LLM.stream
    tools: Tools = field(default_factory=Tools)
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    generates: bool = True  # False: an answer of no tokens, for the prompt's log-probabilities

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and isinstance(self.prompt[0], Mapping)


def parse_chat(body: Body) -> Generation:
    """The body of POST /v1/chat/completions. Raises ApiError."""
    if body.get("parallel_tool_calls") is False and makes_one_call_at_most(body):
        body = {**body, "parallel_tool_calls": None}
    fields = _known(body, _CHAT)
    if "max_completion_tokens" in fields:
        if "max_tokens" in fields:
            raise invalid(
                "max_completion_tokens",
                "max_tokens and max_completion_tokens are the same; give one of them",
            )
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    return Generation(
        prompt=parse_messages(fields.pop("messages", None)),
        tools=parse_tools(fields),
        options=_options(fields, _chat_logprobs(fields)),
        **_shape(fields),
    )


def parse_completion(body: Body) -> Generation:
    """The body of POST /v1/completions. Raises ApiError."""
    fields = _known(body, _COMPLETION)
    logprobs = fields.pop("logprobs", None)
    echo = _flag(fields, "echo")
    nothing = echo and fields.get("max_tokens") == 0 and type(fields["max_tokens"]) is int
    if nothing:  # the library knows no answer without a token
        del fields["max_tokens"]
    return Generation(
        prompt=_prompt(fields.pop("prompt", None)),
        echo=echo,
        generates=not nothing,
        options=_options(fields, logprobs),
        **_shape(fields),
    )


def parse_tokenize(body: Body) -> tuple[str | list[Body], bool]:
    """The body of POST /tokenize: a text or messages, and whether special tokens are put before
    the text. Raises ApiError.
    """
    check_fields(body, ("model", "prompt", "messages", "add_special_tokens"))
    fields = {name: value for name, value in body.items() if value is not None}
    if "messages" not in fields:
        special = "add_special_tokens" not in fields or _flag(fields, "add_special_tokens")
        return text_field(fields, "prompt"), special
    if "prompt" in fields:
        raise invalid("prompt", "prompt and messages exclude each other; give one of them")
    if "add_special_tokens" in fields:
        raise invalid(
            "add_special_tokens",
            "add_special_tokens goes with a prompt; for messages the chat template decides: "
            "leave it out",
        )
    return parse_messages(fields["messages"]), False


def text_field(body: Body, name: str) -> str:
    """A field that must be there and be text. Raises ApiError."""
    value = body.get(name)
    if not isinstance(value, str):
        raise wrong(name, "a string", value)
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
        if name in _HARMLESS or _is_neutral(name, fields[name]):
            del fields[name]
        elif name in _REFUSED:
            raise unsupported(name, _REFUSED[name])
    check_fields(fields, sorted(known))
    return fields


def _is_neutral(name: str, value: Any) -> bool:
    """Of the same type too: true is not 1."""
    return type(value) is type(_NEUTRAL.get(name)) and value == _NEUTRAL[name]


def _shape(fields: Body) -> Body:
    """Model and form of the answer."""
    model, stream = fields.get("model"), _flag(fields, "stream")
    if not isinstance(model, (str, type(None))):
        raise wrong("model", "a string", model)
    wanted = fields.get("stream_options", {})
    if not isinstance(wanted, dict):
        raise wrong("stream_options", "an object", wanted)
    if wanted and not stream:
        raise invalid("stream_options", "stream_options needs stream: true")
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
            raise invalid(name, message) from error
    try:
        parse(options)
    except MinflashError as error:  # two that exclude each other
        raise invalid(None, str(error)) from error
    return options


def _chat_logprobs(fields: Body) -> int | None:
    wanted, top = _flag(fields, "logprobs"), fields.pop("top_logprobs", None)
    if top is not None and not wanted:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
    if top is not None and (not isinstance(top, int) or isinstance(top, bool)):
        raise wrong("top_logprobs", "a whole number", top)
    return (top or 0) if wanted else None


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and any(isinstance(item, (str, list)) for item in prompt):
        raise unsupported("prompt", "one request completes one prompt: send them one by one")
    whole = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not prompt or not (isinstance(prompt, str) or whole):
        raise wrong("prompt", "a string or a list of token ids that is not empty", prompt)
    return prompt  # type: ignore[no-any-return]


def _flag(fields: Body, name: str) -> bool:
    value = fields.pop(name, None)
    if not isinstance(value, (bool, type(None))):
        raise wrong(name, "true or false", value)
    return bool(value)
