"""The messages of a conversation: from the OpenAI protocol to what chat templates expect."""

from __future__ import annotations

import json
from typing import Any

from .server_errors import Body, wrong


def parse_messages(messages: Any) -> list[Body]:
    """Text contents, arguments of tool calls as objects. Raises ApiError."""
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "a list of messages that is not empty", messages)
    return [_message(f"messages[{number}]", message) for number, message in enumerate(messages)]


def _message(name: str, message: Any) -> Body:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong(name, "an object with a role and a content", message)
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
        raise wrong(name, "a string or a list of text parts", content)
    return "".join(_part(f"{name}[{number}]", part) for number, part in enumerate(content))


def _part(name: str, part: Any) -> str:
    if not (isinstance(part, dict) and part.get("type") == "text"):
        raise wrong(name, "text: this model reads nothing else", part)
    text = part.get("text")
    if not isinstance(text, str):
        raise wrong(f"{name}.text", "a string", text)
    return text


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
