"""Chat templates: from messages to text, with the user's words kept apart from the template's.

Templates are Jinja programs that come with a model, so they run in jinja2's immutable sandbox, with
the functions that transformers gives them. Without jinja2 a plain ChatML template still works.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from .errors import ArgumentError, TokenizerError
from .showing import shown

Message = Mapping[str, Any]


def render(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """The text of a chat.

    messages: mappings with ``role`` and ``content``. ``extra`` is handed to the template.
    Raises ArgumentError when the messages do not suit the template, TokenizerError when the
    template itself is damaged, or needs jinja2 and it is not installed.
    """
    check_messages(messages)
    check_tools(template, tools)
    try:
        compiled = _compiled(template)
    except ImportError:
        return _render_plain(template, messages, add_generation_prompt)
    from jinja2 import TemplateError

    try:
        return compiled.render(  # type: ignore[no-any-return]
            messages=messages,
            tools=tools or None,
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
            **extra,
        )
    except (
        TemplateError,
        TypeError,
        LookupError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ArgumentError(f"the chat template refuses these messages: {error}") from error


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ArgumentError unless messages is a list of mappings with a role."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ArgumentError(
            "messages must be a list that is not empty, like "
            f"[{{'role': 'user', 'content': 'Hello'}}]; found {shown(messages, 60)}"
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ArgumentError(
                f"message {number} must be a mapping with a 'role' and a 'content'; "
                f"found {shown(message, 60)}"
            )


def check_tools(template: str, tools: Sequence[Any] | None) -> None:
    """Raises ArgumentError when there are tools and the template does not name them."""
    if tools is None:
        return
    listed = isinstance(tools, Sequence) and not isinstance(tools, str)
    if not listed or not all(isinstance(tool, Mapping) for tool in tools):
        raise ArgumentError(
            'tools must be a list of definitions like {"type": "function", "function": {...}}; '
            f"found {shown(tools, 60)}"
        )
    if tools and not re.search(r"\btools\b", template):
        raise ArgumentError(
            "this model's chat template knows no tools, so that they would be ignored; describe "
            "them in the system message, or take a model that was trained with tools"
        )


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The compiled template. Raises ImportError without jinja2."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for training; here it does nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template is damaged: {error}") from error


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """jinja2's own tojson escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


# Plain ChatML, with or without a system message for chats that bring none. A line end inside a
# string is either itself or the escape \n.
_END = r"(?:\n|\\n)"
_PLAIN_CHATML = re.compile(
    r"\{% for message in messages %\}"
    r"(?:\{% if loop\.first and messages\[0\]\['role'\] != 'system' %\}"
    rf"\{{\{{ ?'<\|im_start\|>system{_END}(?P<system>[^'\\]*)<\|im_end\|>{_END}' ?\}}\}}"
    r"\{% endif %\})?"
    rf"\{{\{{ ?'<\|im_start\|>' \+ message\['role'\] \+ '{_END}' \+ message\['content'\]"
    rf" \+ '<\|im_end\|>' \+ '{_END}' ?\}}\}}\{{% endfor %\}}"
    rf"\{{% if add_generation_prompt %\}}\{{\{{ ?'<\|im_start\|>assistant{_END}' ?\}}\}}"
    r"\{% endif %\}"
)


def _render_plain(template: str, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    found = _PLAIN_CHATML.fullmatch(template.strip())
    if not found:
        raise TokenizerError(
            'this model\'s chat template needs jinja2: pip install "minflash[chat]"'
        )
    turns = [(str(message["role"]), _text_content(message)) for message in messages]
    system = found["system"]
    if system is not None and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n" if add_generation_prompt else text


def _text_content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ArgumentError(
            "the chat template refuses these messages: "
            f"the content of {message['role']!r} is not text"
        )
    return content


class Neutralizer:
    """Keeps the special tokens that a user writes from being taken for the template's own.

    ``hide`` puts stand-ins, which no text can guess, where a message's strings hold a special token
    or end with the beginning of one (templates may join strings). After the template has run,
    whatever special token its text holds is the template's; ``reveal`` puts the user's words back.
    """

    def __init__(self, special: Sequence[str]) -> None:
        self._special = frozenset(special)
        ordered = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._beginnings = {text[:end] for text in ordered for end in range(1, len(text))}
        self._longest = max(map(len, ordered), default=0)
        self._nonce = str(secrets.randbits(64))
        self._hidden: list[str] = []

    @property
    def used(self) -> bool:
        """Whether anything had to be hidden."""
        return bool(self._hidden)

    def hide(self, value: Any) -> Any:
        """``value`` (a string, or mappings and lists of them) with stand-ins.

        Raises ArgumentError for what is nested without end.
        """
        try:
            return self._hide_in(value)
        except RecursionError:
            raise ArgumentError(
                "messages and tools must be data that JSON could hold, found a part that is nested "
                "too deep or holds itself; leave it out"
            ) from None

    def reveal(self, text: str) -> str:
        """The inverse of ``hide`` on the template's output."""
        pattern = f"\U000f0002{self._nonce}\\.([0-9]+)\U000f0003"
        return re.sub(pattern, lambda found: self._hidden[int(found[1])], text)

    def _hide_in(self, value: Any, key: Any = None) -> Any:
        """``hide`` of a part. key: the key it was found under; templates compare roles and types,
        so their ends stay.
        """
        if isinstance(value, str):
            hidden = self._pattern.sub(lambda found: self._hide(found[0]), value)
            return hidden if key in ("role", "type") else self._hide_end(hidden)
        if isinstance(value, Mapping):
            return {
                self._hide_in(key, "role"): self._hide_in(item, key) for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._hide_in(item) for item in value]
        return value

    def _hide(self, text: str) -> str:
        self._hidden.append(text)
        return f"\U000f0002{self._nonce}.{len(self._hidden) - 1}\U000f0003"

    def _hide_end(self, text: str) -> str:
        """Breaks the beginning of a special token at the end of ``text``."""
        kept = text.rstrip()  # a template may trim, too
        for length in range(min(self._longest - 1, len(kept)), 0, -1):
            start = len(kept) - length
            if kept[start:] in self._beginnings:
                return text[:start] + self._hide(text[start]) + text[start + 1 :]
        return text
