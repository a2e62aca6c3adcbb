"""``tools`` and ``tool_choice`` of a request: what may be called, and what must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .server_errors import ApiError, Body, invalid, wrong

# For llguidance: one way to write a call, as models are used to. More spaces only cost tokens.
_COMPACT = {"whitespace_pattern": "", "key_separator": ": ", "item_separator": ", "}
# Options of a generation that do not go with an answer that must be a call.
_FORMS = ("response_format", "regex", "grammar")
_ENDS = ("stop", "stop_token_ids", "ignore_eos", "min_tokens")  # would cut a call, or add to it
# Words of JSON schema: those with values that are no schemas, and those with named schemas.
_DATA = ("const", "enum", "default", "examples")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
# What a tool and its function may say.
# The template sees all of it; what OpenAI's own format does not have is what clients add to it.
_TOOL = ("type", "function", "id", "cache_control")
_FUNCTION = ("name", "description", "parameters", "strict", "type", "returns", "response")


@dataclass(frozen=True)
class Tools:
    """The functions of a request."""

    definitions: Sequence[Body] | None = None  # for the chat template
    names: frozenset[str] = frozenset()  # calls of these are told from the text
    form: Body | None = None  # the response_format of an answer that must be a call


def parse_tools(fields: Body) -> Tools:
    """Takes ``tools`` and ``tool_choice`` out of a request's fields. Raises ApiError."""
    tools, choice = fields.pop("tools", None), fields.pop("tool_choice", "auto")
    functions = _functions([] if tools is None else tools)
    if choice == "none":
        return Tools()
    names = frozenset(functions)
    if choice == "auto":
        return Tools(tools or None, names)
    chosen = _chosen(choice, functions)
    for name in (*_FORMS, *_ENDS):
        if fields.get(name):
            raise invalid(
                "tool_choice",
                f"{name} and a tool_choice that asks for a call exclude each other; leave one out",
            )
    return Tools(tools, frozenset(chosen), _form(chosen))


def makes_one_call_at_most(body: Body) -> bool:
    """Whether ``parallel_tool_calls: false`` asks for nothing beyond what happens anyway."""
    return not body.get("tools") or body.get("tool_choice") not in (None, "auto")


def _functions(tools: Any) -> dict[str, Body]:
    """The definitions by name, each one checked."""
    if not isinstance(tools, list):
        raise wrong("tools", "a list", tools)
    named: dict[str, Body] = {}
    for number, tool in enumerate(tools):
        function = _function(tool, f"tools[{number}]")
        name = function["name"]
        if name in named:
            raise wrong(f"tools[{number}].function.name", "one that no other tool has", name)
        named[name] = function
    return named


def _function(tool: Any, place: str) -> Body:
    function = tool.get("function") if isinstance(tool, dict) else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    if not isinstance(function, dict) or not named or tool.get("type") != "function":
        rule = 'an object {"type": "function", "function": {"name": ...}}'
        raise wrong(place, rule, tool)
    _check_keys(tool, _TOOL, place)
    _check_keys(function, _FUNCTION, f"{place}.function")
    parameters, strict = function.get("parameters"), function.get("strict")
    if not isinstance(parameters, (dict, type(None))):
        raise wrong(f"{place}.function.parameters", "a JSON schema, an object", parameters)
    _check_type(parameters or {}, f"{place}.function.parameters")
    if not isinstance(strict, (bool, type(None))):
        raise wrong(f"{place}.function.strict", "true or false", strict)
    return function


def _check_keys(value: Body, known: Sequence[str], place: str) -> None:
    for name in value.keys() - known:
        raise ApiError(
            400,
            f"{place} has the unknown key {name!r:.60}; it may have {', '.join(known)}: leave it "
            "out",
            param=place,
            code="unknown_parameter",
        )


def _check_type(schema: Body, place: str) -> None:
    """Arguments have names: what describes them is an object, also where it does not say so."""
    kind = schema.get("type", "object")
    if kind != "object":
        raise invalid(
            "tools",
            f'{place} must have the type "object", whose properties are the arguments; found '
            f"{kind!r:.60}: put the value under a name among its properties",
        )


def _chosen(choice: Any, functions: dict[str, Body]) -> dict[str, Body]:
    """The functions of which one must be called."""
    if not functions:
        raise invalid(
            "tool_choice", "tool_choice asks for a call and there are no tools; give some"
        )
    if choice == "required":
        return functions
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in functions:
        rule = '"auto", "none", "required" or {"type": "function", "function": {"name": one of '
        raise wrong("tool_choice", f"{rule}{', '.join(functions)}}}}}", choice)
    return {name: functions[name]}


def _form(functions: dict[str, Body]) -> Body:
    """The JSON of one call, as a response_format."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": _arguments(function, number)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, (name, function) in enumerate(functions.items())
    ]
    schema = {"anyOf": calls, "x-guidance": _COMPACT}
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _arguments(function: Body, number: int) -> Body:
    schema = function.get("parameters")
    if schema is None:  # a function without parameters
        return {"type": "object", "properties": {}, "additionalProperties": False}
    moved: Body = _moved(schema, f"#/anyOf/{number}/properties/arguments")
    return {"type": "object", **moved}


def _moved(schema: Any, place: str) -> Any:
    """A schema with its references to itself, for its place in a larger one."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved_member(key, value, place) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


def _moved_member(key: str, value: Any, place: str) -> Any:
    if key in _DATA:
        return value
    if key in _NAMED and isinstance(value, Mapping):
        return {name: _moved(schema, place) for name, schema in value.items()}
    return _moved(value, place)
