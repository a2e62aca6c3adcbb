"""Structured output: grammars that decide which tokens may come next, by ``llguidance``.

llguidance (https://github.com/guidance-ai/llguidance) reads JSON schemas, regular expressions and
Lark grammars, and says for each step which tokens of the vocabulary keep the text within them. What
it cannot honour is an error, never free text. It is an extra: pip install "minflash[grammar]".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, MinflashError
from .showing import shown

# Between two parts of a JSON text. Bounded, as a model may otherwise go on with spaces for ever.
WHITESPACE = r"[ \t\n]{0,24}"
_INSTALL = 'pip install "minflash[grammar]"'
# The types of a response_format, each with the keys it may have beside "type".
_FORMATS = {"text": (), "json_object": ("schema",), "json_schema": ("json_schema", "schema")}
_WRAPPER = {"name", "description", "strict", "schema"}  # OpenAI's, around a schema
_TOO_DEEP = 'is nested too deep; name its parts under "$defs" and refer to them with "$ref"'


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like. kind: "json_schema", "regex" or "lark"; text: its source."""

    kind: str
    text: str


def parse_grammar(response_format: Any, regex: Any, grammar: Any) -> Grammar | None:
    """The three options as one; None when none is given. Raises ArgumentError.

    response_format: {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema",
    "json_schema": {"schema": {...}}} as in OpenAI's interface; the schema may also stand under
    "schema" (of a json_object too) or be the value of "json_schema" itself. None is: not given.
    """
    given = [value for value in (response_format, regex, grammar) if value is not None]
    if len(given) > 1:
        raise ArgumentError("response_format, regex and grammar exclude each other; give one")
    for name, kind, text in (("regex", "regex", regex), ("grammar", "lark", grammar)):
        if text is not None:
            if not isinstance(text, str) or not text:
                raise ArgumentError(f"{name} must be a string, not empty, found {shown(text, 60)}")
            return Grammar(kind, text)
    return None if response_format is None else _of_format(response_format)


def _of_format(response_format: Any) -> Grammar | None:
    given = _given(response_format) if isinstance(response_format, Mapping) else {}
    kind = given.pop("type", None)
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise ArgumentError(
            'response_format must be {"type": "json_schema", "json_schema": {"schema": ...}}, '
            f'{{"type": "json_object"}} or {{"type": "text"}}, found {shown(response_format)}'
        )
    _check_keys(f'response_format of type "{kind}"', given, _FORMATS[kind])
    if kind == "text":
        return None
    if kind == "json_object":
        return _of_schema(_object_schema(_mapping(given.get("schema", {}))))
    if len(given) != 1:
        raise ArgumentError(
            f"response_format has {'two schemas' if given else 'no schema'}, found "
            f'{shown(response_format)}; put it under "json_schema": {{"schema": ...}}'
        )
    if "schema" in given:
        return _of_schema(_mapping(given["schema"]))
    return _of_schema(_unwrapped(_mapping(given["json_schema"])))


def _object_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A json_object's schema: what it leaves open is still an object."""
    if schema.get("type", "object") not in ("object", ["object"]):
        raise ArgumentError(
            'the schema of response_format of type "json_object" must have the type "object", or '
            f"none, found {shown(schema['type'])}; "
            'give another as {"type": "json_schema", "json_schema": {"schema": ...}}'
        )
    return {"type": "object", **schema}


def _unwrapped(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of OpenAI's wrapper around one; ``value`` itself when it is the schema."""
    if value.keys() - _WRAPPER and not is_wrapper(value):
        return value
    wrapper = _given(value)
    if "schema" not in wrapper:
        raise ArgumentError(
            f"json_schema of response_format has no schema, found {shown(value)}; put it under "
            '"json_schema": {"schema": ...}'
        )
    _check_keys("json_schema of response_format", wrapper, _WRAPPER)
    return _mapping(wrapper["schema"])


def is_wrapper(value: Mapping[str, Any]) -> bool:
    """Whether ``value`` is meant as OpenAI's wrapper around a schema, by its keys."""
    return bool(value.keys() & (_WRAPPER - {"description"}))  # which is a word of schemas, too


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check_keys(what: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    for name in given.keys() - known:
        knows = f"knows {', '.join(sorted(known))}" if known else "has no other"
        found = shown(name, 60)
        raise ArgumentError(f"{what} has the unknown key {found}; it {knows}: leave it out")


def _mapping(schema: Any) -> Mapping[str, Any]:
    if not isinstance(schema, Mapping):
        raise ArgumentError(
            f"the schema of response_format must be a mapping, found {shown(schema)}; "
            'give the JSON schema itself, as {"type": "object", "properties": {...}}'
        )
    return schema


def _of_schema(schema: Mapping[str, Any]) -> Grammar:
    try:
        # Without escapes, which would hide half a surrogate pair; and JSON has no NaN.
        return Grammar("json_schema", json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"the schema of response_format is not JSON: {error}") from error
    except RecursionError:
        raise ArgumentError(f"the schema of response_format {_TOO_DEEP}") from None


class Grammars:
    """Makes constraints for one tokenizer and its model."""

    def __init__(self, tokenizer_json: str, vocab_size: int, ends: Collection[int]) -> None:
        """ends: tokens that end an answer. Raises MinflashError without llguidance."""
        try:
            import llguidance
        except ImportError as error:
            raise MinflashError(
                f"response_format, regex and grammar need llguidance: {_INSTALL}"
            ) from error
        self._llguidance, self._vocab_size = llguidance, vocab_size
        self.ends = frozenset(ends)
        if not ends:
            raise ArgumentError(
                "response_format, regex and grammar need a token that ends the answer, and this "
                "model names none; give stop_token_ids"
            )
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer_json, n_vocab=vocab_size, eos_token=sorted(ends)
            )
        except Exception as error:  # whatever its Rust code finds
            raise MinflashError(f"llguidance cannot use this model's tokenizer: {error}") from error

    def constraint(self, grammar: Grammar) -> GrammarConstraint:
        """A fresh constraint. Raises ArgumentError when the grammar is not usable."""
        try:
            grammar.text.encode()  # llguidance words half a surrogate pair in three ways
            matcher = self._matcher(grammar)
        except ValueError as error:
            raise _dishonoured(grammar, _reason(error)) from error
        if matcher.is_error():
            raise _dishonoured(grammar, matcher.get_error())
        return GrammarConstraint(matcher, self._vocab_size)

    def _matcher(self, grammar: Grammar) -> Any:
        """Some faults of a grammar are the matcher's state, others are raised as ValueError."""
        matcher_type = self._llguidance.LLMatcher
        if grammar.kind == "json_schema":
            defaults: Any = {"whitespace_pattern": WHITESPACE}
            source = matcher_type.grammar_from_json_schema(grammar.text, defaults=defaults)
        elif grammar.kind == "regex":
            source = matcher_type.grammar_from_regex(grammar.text)
        else:
            source = matcher_type.grammar_from_lark(grammar.text)
        return matcher_type(self._tokenizer, source, log_level=0)


def _dishonoured(grammar: Grammar, reason: str) -> ArgumentError:
    name = {"json_schema": "JSON schema", "lark": "grammar"}.get(grammar.kind, grammar.kind)
    return ArgumentError(f"the {name} cannot be honoured: {' '.join(reason.split()):.300}")


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeEncodeError):
        found = ascii(error.object[error.start])
        return f"it holds {found}, half of a surrogate pair, which UTF-8 cannot hold; leave it out"
    return f"it {_TOO_DEEP}" if "recursion limit" in str(error) else str(error)


class GrammarConstraint:
    """One answer's way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def finished(self) -> bool:
        """Nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def bits(self) -> NDArray[np.uint32]:
        """uint32 [vocab_size / 32, rounded up]: the tokens that may come next, the end among them.

        The lowest bit is the first token's.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return bits[: -(-self._vocab_size // 32)]

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise MinflashError(f"the grammar became too much for llguidance: {reason:.300}")
