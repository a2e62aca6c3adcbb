"""Structured output: whatever a random model wants to say, the answer has the asked form."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minflash
from minflash.cli import main
from minflash.errors import ArgumentError, MinflashError
from minflash.llm import LLM
from minflash.structured import Grammar, parse_grammar

pytest.importorskip("llguidance", reason='needs pip install "minflash[grammar]"')

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def small(converted: Path) -> Iterator[LLM]:
    with minflash.load(converted, device="cpu") as model:
        yield model


def of_schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": value}}


def of_object(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_object", "schema": schema}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return {"response_format": {"type": "json_schema", "schema": schema}}


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose values are bounded, so that an answer fits the context."""
    kinds = ["string", "integer", "boolean", "null", "enum", "const"]
    kind = rng.choice(kinds + ["object", "array"] * depth)
    if kind == "string":
        return {"type": "string", "maxLength": rng.randrange(1, 6)}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randrange(-99, 0), "maximum": rng.randrange(999)}
    if kind == "enum":
        return {"enum": rng.sample(["a", "ß", "日本", 'quo"te', 7, None, True], 3)}
    if kind == "const":
        return {"const": rng.choice(["x y", -1, False, "\n"])}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": 1,
                "maxItems": rng.randrange(1, 3)}  # fmt: skip
    if kind == "object":
        names = rng.sample(["a", "b c", "ü", "long_name"], rng.randrange(1, 3))
        properties = {name: random_schema(rng, depth - 1) for name in names}
        required = names[: rng.randrange(len(names) + 1)]
        return {"type": "object", "properties": properties, "required": required,
                "additionalProperties": False}  # fmt: skip
    return {"type": kind}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """A validator of what random_schema makes."""
    if "enum" in schema or "const" in schema:
        known = schema.get("enum", [schema.get("const")])
        return any(value == one and type(value) is type(one) for one in known)
    if schema["type"] == "array":
        inside = all(fits(item, schema["items"]) for item in value)
        return isinstance(value, list) and inside and 1 <= len(value) <= schema["maxItems"]
    if schema["type"] == "object":
        properties = schema["properties"]
        return set(schema["required"]) <= set(value) <= set(properties) and all(
            fits(item, properties[name]) for name, item in value.items()
        )
    if schema["type"] == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    return isinstance(value, bool if schema["type"] == "boolean" else type(None))


def test_random_schemas_always_parse(llm: LLM) -> None:
    seen = set()
    for seed in range(1000):
        schema = random_schema(random.Random(seed))
        asked: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        sampling: Any = {"temperature": seed % 3 / 2, "seed": seed, "top_k": 20 * (seed % 2)}
        stream = llm.stream("Say:", max_tokens=400, response_format=asked, **sampling)
        chunks = list(stream)
        text = "".join(chunk.text for chunk in chunks)
        assert chunks[-1].finish_reason == "stop", (schema, text)
        assert fits(json.loads(text), schema), (schema, text)
        seen.add(text)
    assert len(seen) > 100


@pytest.mark.parametrize("pattern", [r"[a-f]{3}-\d{2}", "yes|no", "(天空|é){2}", r"\d+ \w"])
def test_regular_expressions(llm: LLM, pattern: str) -> None:
    for seed in range(5):
        text = llm.generate("x", regex=pattern, temperature=1.5, seed=seed, max_tokens=300)
        assert re.fullmatch(pattern, text), text


def test_grammars_and_json_objects(llm: LLM) -> None:
    lark = 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/'
    text = llm.generate("x", grammar=lark, temperature=1.0, seed=3, max_tokens=200)
    assert re.fullmatch(r"(\(*)\d{1,3}(\)*)", text) and text.count("(") == text.count(")")
    text = llm.chat("x", response_format={"type": "json_object"}, max_tokens=60, logit_bias={})
    assert text.lstrip().startswith("{")
    free = llm.generate("x", max_tokens=5, response_format={"type": "text"})
    assert free == llm.generate("x", max_tokens=5)


def test_an_answer_that_is_complete_ends_at_once(
    small: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    chunks = list(small.stream("x", regex="abc", max_tokens=3, logprobs=1))
    assert "".join(chunk.text for chunk in chunks) == "abc"
    assert chunks[-1].finish_reason == "stop" and len(chunks) == 3
    assert all(chunk.logprob is not None for chunk in chunks)
    cut = list(small.stream("x", regex="abc", max_tokens=2))
    assert cut[-1].finish_reason == "length"
    assert "the answer was cut after 2 tokens, before its grammar was complete" in caplog.text
    # Optional rest: the model may end, and then with its end token only.
    for seed in range(6):
        text = small.generate("x", regex="a(bc)?", temperature=2.0, seed=seed, max_tokens=4)
        assert text in ("a", "abc")


def test_one_grammar_serves_many_answers(small: LLM) -> None:
    options: Any = {"response_format": {"type": "json_schema", "schema": PERSON}, "seed": 1}
    first = small.generate("x", max_tokens=110, temperature=0.5, **options)
    assert small.generate("x", max_tokens=110, temperature=0.5, **options) == first
    assert small._grammars is not None
    grammars = small._grammars
    small.generate("x", regex="a", max_tokens=2)
    assert small._grammars is grammars


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": "json"}, "response_format must be"),
        ({"response_format": {"type": "xml"}}, "response_format must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format has no schema"),
        (of_schema({"name": "p", "strict": True}), "json_schema of response_format has no schema"),
        (of_schema({"name": "p", "type": "object"}), "json_schema of response_format has no sch"),
        (of_schema({"description": "p"}), "json_schema of response_format has no schema"),
        (of_schema({"name": "p", "schema": "{}"}), "must be a mapping, found '{}'"),
        (of_schema({"schema": True}), "must be a mapping, found True"),
        (of_schema("{}"), "must be a mapping, found '{}'"),
        (of_schema({"schema": {}, "type": "object"}), "unknown key 'type'; it knows desc.* out"),
        ({"response_format": {"type": "json_object", "schema": "{}"}}, "must be a mapping"),
        (
            of_object({"type": "array"}),
            "must have the type \"object\", or none, found 'array'; give",
        ),
        (of_object({"type": ["object", "null"]}), "found .*object.*null"),
        (of_object({"type": None}), "found None"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "unknown key 'json_sch"),
        ({"response_format": {"type": "text", "schema": PERSON}}, "unknown key 'schema'; it has"),
        ({"response_format": {"type": "json_schema", "schema": {}, "json_schema": {}}}, "two sch"),
        ({"response_format": {"type": "json_schema", "schema": {"a": {1}}}}, "not JSON"),
        ({"response_format": {"type": "json_schema", "schema": {"type": "foo"}}}, "Invalid type"),
        (
            {"response_format": {"type": "json_schema", "schema": {"uniqueItems": True}}},
            "JSON schema cannot be honoured: .*uniqueItems",
        ),
        ({"regex": "(a"}, "regex cannot be honoured"),
        ({"regex": ""}, "regex must be a string"),
        ({"grammar": "start: nope"}, "grammar cannot be honoured: .*nope"),
        ({"regex": "a", "grammar": "b"}, "exclude each other"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos and regex exclude each other"),
        ({"regex": "a", "min_tokens": 3}, "min_tokens and regex exclude each other"),
        (
            of_schema({"schema": {"const": math.nan}}),
            "is not JSON: Out of range float",
        ),
        (of_schema({"schema": {"const": -math.inf}}), "is not JSON: Out of range float"),
        (nested(200), r'JSON schema cannot be honoured: it is nested too deep; .* "\$ref"'),
        (nested(3000), r'schema of response_format is nested too deep; .* "\$ref"'),
        (
            {"regex": "a\ud800"},
            r"regex cannot be honoured: it holds '\\ud800', half of .* leave it",
        ),
        (
            {"grammar": 'start: "\udcff"'},
            r"grammar cannot be honoured: it holds '\\udcff', half of",
        ),
        (
            of_schema({"properties": {"\ud800": {}}}),
            r"JSON schema cannot .* '\\ud800', half of .* it",
        ),
        # The value found has no repr.
        (
            {"response_format": {"type": "xml", "a": nested(3000)}},
            "found a dict that cannot be shown",
        ),
        ({"response_format": {"type": 10**5000}}, "found a dict that cannot be shown"),
        (of_schema([nested(3000)]), "found a list that cannot be shown"),
        ({"regex": [nested(3000)]}, "regex must be a string, not empty, found a list that cannot"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(
    small: LLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        small.stream("x", **options)


def test_a_schema_is_honoured_in_every_spelling() -> None:
    wrapper = {"name": "a", "strict": True, "description": None, "schema": PERSON}
    described = {"description": "somebody", **PERSON}  # a word of schemas and of the wrapper
    for schema, asked in (
        (PERSON, {"type": "json_schema", "json_schema": wrapper}),
        (PERSON, {"type": "json_schema", "json_schema": PERSON, "schema": None}),
        (described, {"type": "json_schema", "json_schema": described}),
        (PERSON, {"type": "json_schema", "schema": PERSON}),
        (PERSON, {"type": "json_object", "schema": PERSON}),
        ({"type": "object"}, {"type": "json_object"}),
        ({"type": ["object"]}, {"type": "json_object", "schema": {"type": ["object"]}}),
        (
            {"type": "object", "required": ["a"]},
            {"type": "json_object", "schema": {"required": ["a"]}},
        ),
        ({}, {"type": "json_schema", "schema": {}}),
    ):
        assert parse_grammar(asked, None, None) == Grammar("json_schema", json.dumps(schema))


def test_the_schema_of_a_json_object_binds_the_answer(small: LLM) -> None:
    asked: Any = {"type": "json_object", "schema": {"$ref": "#/$defs/p", "$defs": {"p": PERSON}}}
    text = small.generate("x", response_format=asked, max_tokens=110, seed=1, temperature=0.5)
    assert set(json.loads(text)) == {"name", "age"}


def test_without_the_extra(small: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(small, "_grammars", None)
    with pytest.raises(MinflashError, match=r'need llguidance: pip install "minflash\[grammar\]"'):
        small.generate("x", regex="a")


def test_the_command_line_knows_the_options(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(PERSON))
    (tmp_path / "grammar.lark").write_text('start: "abc"')
    run = ["run", "-m", str(converted), "--device", "cpu", "--raw", "x", "--max-tokens", "120"]
    assert main([*run, "--json-schema", str(tmp_path / "schema.json"), "--seed", "1"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"name", "age"}
    assert main([*run, "--grammar", str(tmp_path / "grammar.lark")]) == 0
    assert capsys.readouterr().out == "abc\n"
    assert main([*run, "--regex", "ab", "--json", "--logprobs", "2", "--logit-bias", "5=1"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert [token["id"] for token in tokens] == [97, 98]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    for wrong in (["--json-schema", "no file"], ["--logit-bias", "5"], ["--logprobs", "-1"]):
        assert main([*run, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("[" * 5000, "is JSON nested too deep; make it flatter"),
        ("{", "schema.json: is not JSON"),
        ("[]", "the schema of response_format must be a mapping, found []"),
        ('{"name": "person", "type": "object"}', "json_schema of response_format has no schema"),
        ('{"const": -Infinity}', "the schema of response_format is not JSON"),
        ('{"properties": {"\\ud800": {}}}', "the JSON schema cannot be honoured: it holds"),
    ],
)
def test_a_schema_file_that_cannot_be_honoured_is_said(
    schema: str,
    message: str,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "schema.json"
    file.write_text(schema)
    assert main(["run", "-m", str(converted), "--raw", "x", "--json-schema", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_a_schema_file_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "x", "--json-schema", "no file"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("minflash: error: no file: cannot be read: ")


@pytest.mark.parametrize(
    "schema", [{}, {"description": "any"}, {"const": 7}, {"name": "seven", "schema": {"const": 7}}]
)
def test_a_schema_file_is_a_schema_or_a_wrapper(
    schema: Any, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    run = ["run", "-m", str(converted), "--device", "cpu", "--raw", "x", "--max-tokens", "9"]
    assert main([*run, "--json-schema", str(file)]) == 0
    assert capsys.readouterr().out == "7\n" or "const" not in json.dumps(schema)
