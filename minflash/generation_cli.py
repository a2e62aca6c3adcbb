"""Options that the commands which generate text share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import ArgumentError

_OPTIONS = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "min_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs", "regex"),
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is loaded."""
    add = parser.add_argument
    add("-m", "--model", metavar="MODEL", help="folder, GGUF file or hub id (default: a small one)")
    add("--max-context", type=int, metavar="N", help="positions (default: the model's own)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if usable, else cpu")


def add_sampling_arguments(parser: argparse.ArgumentParser, max_tokens: str = "256") -> None:
    """How tokens are chosen, and when the answer ends; ``max_tokens``: its default, in words."""
    add = parser.add_argument
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"tokens to make at most (default: {max_tokens})",
    )
    add("--temperature", type=float, metavar="X", help="0: always the most likely token")
    add("--top-k", type=int, metavar="N", help="choose among the N most likely tokens; 0: off")
    add("--top-p", type=float, metavar="X", help="choose among tokens of this total probability")
    add("--min-p", type=float, metavar="X", help="drop tokens below this part of the likeliest")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--stop", action="append", metavar="TEXT", help="end before this text (may be repeated)")
    add("--min-tokens", type=int, metavar="N", help="no end of text before so many tokens")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less; 1: off")
    add("--presence-penalty", type=float, metavar="X", help="what an answer holds is less likely")
    add("--frequency-penalty", type=float, metavar="X", help="the same, by how often it came")
    add("--logit-bias", action="append", metavar="ID=X", help="add X to a token's logit")
    add("--json-schema", metavar="FILE", help="the answer is JSON of this schema; - is any object")
    add("--regex", metavar="REGEX", help="the answer matches it")
    add("--grammar", metavar="FILE", help="the answer follows this Lark grammar")


def generation_options(args: argparse.Namespace) -> Any:
    """The keyword arguments of LLM.stream. Raises ArgumentError before a model is loaded."""
    from .arguments import parse

    # getattr: a chat has no --logprobs, as it could show none.
    options = {name: getattr(args, name, None) for name in _OPTIONS}
    options["logit_bias"] = dict(map(_bias, args.logit_bias)) if args.logit_bias else None
    options["response_format"] = _response_format(args.json_schema)
    options["grammar"] = None if args.grammar is None else _read(args.grammar)
    parse(options)
    return options


def _bias(text: str) -> tuple[str, float]:
    token, _, number = text.partition("=")
    try:
        return token, float(number)
    except ValueError:
        raise ArgumentError(
            f"--logit-bias must be a token id, = and a number, found {text!r}; like 42=-100"
        ) from None


def _response_format(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    if path == "-":
        return {"type": "json_object"}
    from .structured import is_wrapper

    schema = _json(path)
    # A schema is taken at its word, even {}, which leaves all open; a wrapper brings its own.
    wrapper = schema if isinstance(schema, dict) and is_wrapper(schema) else {"schema": schema}
    return {"type": "json_schema", "json_schema": wrapper}


def _json(path: str) -> Any:
    text = _read(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ArgumentError(f"{path}: is not JSON: {error}") from error
    except RecursionError:
        raise ArgumentError(f"{path}: is JSON nested too deep; make it flatter") from None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path}: cannot be read: {error}") from error
