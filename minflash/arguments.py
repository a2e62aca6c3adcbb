"""The keyword arguments of generate, stream and chat: their meaning, defaults and checks."""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import numpy as np

from .errors import ArgumentError
from .packing import GROUP_SIZES, TYPES
from .sampling import MAX_LOGPROBS, Sampling
from .showing import shown
from .structured import Grammar, parse_grammar

DEFAULT_MAX_TOKENS = 256

Message: TypeAlias = Mapping[str, Any]  # {"role": "user", "content": "..."}
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message]"


class Options(TypedDict, total=False):
    """Keyword arguments of generate, stream and chat. None means: not given."""

    max_tokens: int | None  # tokens to make at most; default 256, or what the context leaves
    max_new_tokens: int | None  # another name of max_tokens
    temperature: float | None  # 0: greedy; default: the model's generation_config.json, else 0
    top_k: int | None  # 0 or -1: off
    top_p: float | None  # 1: off
    min_p: float | None  # 0: off
    seed: int | None  # the same seed gives the same text; default: a fresh one
    stop: str | Sequence[str] | None  # the text ends before the first of these
    stop_token_ids: Sequence[int] | None  # end at these tokens too
    ignore_eos: bool | None  # go on after the model's end of text
    min_tokens: int | None  # before so many tokens no token ends the text; 0: off
    repetition_penalty: float | None  # above 1: fewer repetitions of prompt and answer; 1: off
    presence_penalty: float | None  # above 0: fewer repetitions of the answer; 0: off
    frequency_penalty: float | None  # the same by how often a token came; 0: off
    logit_bias: Mapping[int, float] | None  # token id -> what is added to its logit
    logprobs: int | None  # Chunk.logprob, and so many of the likeliest in top_logprobs; 0 to 100
    # The form of the answer. One that max_tokens cuts is incomplete: finish_reason "length".
    response_format: Mapping[str, Any] | None  # {"type": "json_schema", ...} or "json_object"
    regex: str | None  # the whole text matches it
    grammar: str | None  # the whole text follows this Lark grammar


_SAMPLING_NAMES = (
    *("temperature", "top_k", "top_p", "min_p", "seed", "min_tokens", "logit_bias"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)

# Words of other libraries, for "did you mean".
_OTHER_WORDS = {
    "temp": "temperature",
    "n_ctx": "max_context (an argument of load)",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "topk": "top_k",
    "topp": "top_p",
    "top-k": "top_k",
    "top-p": "top_p",
    "random_seed": "seed",
    "do_sample": "temperature (0 is greedy)",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "eos_token_id": "stop_token_ids",
    "repeat_penalty": "repetition_penalty",
    "top_logprobs": "logprobs",
    "json_schema": "response_format",
    "guided_json": "response_format",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "quantization": "quantize (an argument of load)",
}


@dataclass(frozen=True)
class Request:
    """Checked options of one generation."""

    sampling: Sampling
    max_tokens: int | None = None  # None: the default, bounded by the context
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None


def parse(options: Mapping[str, Any], defaults: Sampling | None = None) -> Request:
    """Options as the caller gave them -> Request; ``defaults`` fill in for what was not given.

    Raises ArgumentError for an unknown option and for a value outside its range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() - Options.__annotations__.keys():
        raise ArgumentError(_unknown(name))
    if "max_tokens" in given and "max_new_tokens" in given:
        raise ArgumentError("max_tokens and max_new_tokens are the same option; give one of them")
    max_tokens = given.get("max_tokens", given.get("max_new_tokens"))
    return Request(
        sampling=_sampling(given, defaults or Sampling()),
        max_tokens=None if max_tokens is None else _max_tokens(max_tokens),
        stop=_stop_strings(given.get("stop", ())),
        stop_token_ids=frozenset(token_ids("stop_token_ids", given.get("stop_token_ids", ()))),
        ignore_eos=check_flag("ignore_eos", given.get("ignore_eos", False)),
        logprobs=_logprobs(given.get("logprobs")),
        grammar=_grammar(given),
    )


def token_ids(name: str, values: Any) -> list[int]:
    """Whole numbers of any integer type (NumPy arrays too) -> list of int."""
    try:
        if isinstance(values, (str, bytes, bytearray, Mapping)):
            raise TypeError  # an empty one would pass, and so would text that was not decoded
        return [operator.index(value) for value in values]
    except TypeError:
        raise ArgumentError(
            f"{name} must be a sequence of token ids (whole numbers), found {_short(values)}; "
            "LLM.tokenize makes them from text"
        ) from None


def check_vocabulary(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises ArgumentError for a token id that no token of the model has."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ArgumentError(
                f"{name} must be from 0 to {vocab_size - 1}, found {token}; this model has no "
                "others, and LLM.tokenize makes them from text"
            )


def check_text(name: str, value: Any) -> str:
    """``value``, a string. Raises ArgumentError."""
    if not isinstance(value, str):
        raise ArgumentError(
            f"{name} must be a string, found {_short(value)}; decode bytes, join lists, and give "
            "token ids as they are to stream, score or embed"
        )
    return value


def as_path(name: str, value: Any) -> Path:
    """The path of a file or folder, ~ for the home folder. Raises ArgumentError for none."""
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        raise ArgumentError(
            f"{name} must be the path of a file or folder, as a string or pathlib.Path, found "
            f"{_short(value)}"
        )
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ArgumentError(
            f"{name} is {_short(value)}, and the home folder it begins with is not known; write "
            "the path without ~"
        ) from None


def check_flag(name: str, value: Any) -> bool:
    """``value`` as a bool. Raises ArgumentError for anything else: "no" would count as true."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(
            f"{name} must be True or False, found {_short(value)}; leave it out for the default"
        )
    return bool(value)


def is_messages(prompt: Any) -> bool:
    """Whether a prompt is a conversation: a non-empty sequence of mappings."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and isinstance(prompt[0], Mapping)
    )


def as_messages(messages: str | Sequence[Message]) -> Sequence[Message]:
    """A conversation; a string is the user's one message."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def _sampling(given: Mapping[str, Any], defaults: Sampling) -> Sampling:
    chosen = {name: getattr(defaults, name) for name in _SAMPLING_NAMES}
    chosen.update((name, given[name]) for name in _SAMPLING_NAMES if name in given)
    return Sampling(**chosen)


def _logprobs(value: Any) -> int | None:
    try:
        number = -1 if isinstance(value, bool) else 0 if value is None else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= MAX_LOGPROBS:
        raise ArgumentError(
            f"logprobs must be a whole number from 0 to {MAX_LOGPROBS}, found {value!r}; leave it "
            "out for none"
        )
    return None if value is None else number


def _grammar(given: Mapping[str, Any]) -> Grammar | None:
    names = [name for name in ("response_format", "regex", "grammar") if name in given]
    if not names:
        return None
    grammar = parse_grammar(*(given.get(n) for n in ("response_format", "regex", "grammar")))
    for other in ("ignore_eos", "min_tokens"):
        if grammar is not None and given.get(other):
            raise ArgumentError(f"{other} and {names[0]} exclude each other; leave one out")
    return grammar


def _max_tokens(value: Any) -> int:
    return _positive("max_tokens", value, f"{DEFAULT_MAX_TOKENS}, or what the context leaves")


def _positive(name: str, value: Any, default: str) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ArgumentError(
            f"{name} must be a whole number of at least 1, found {value!r}; "
            f"leave it out for {default}"
        )
    return number


def _stop_strings(value: Any) -> tuple[str, ...]:
    listed = isinstance(value, Iterable) and not isinstance(value, (str, Mapping))
    strings = tuple(value) if listed else (value,)
    if not all(isinstance(string, str) and string for string in strings):
        raise ArgumentError(
            "stop must be a string or a list of strings, none of them empty, found "
            f"{_short(value)}; token ids go into stop_token_ids"
        )
    return strings


def _unknown(name: str) -> str:
    if name == "max_context":
        return "max_context is an argument of load, not of a generation"
    known = sorted(Options.__annotations__)
    close = difflib.get_close_matches(name, known, n=1)
    meant = _OTHER_WORDS.get(name) or (close[0] if close else None)
    message = f"unknown argument {name!r}"
    if meant:
        return f"{message}; did you mean {meant}?"
    return f"{message}; known are {', '.join(known)}"


def unknown_load_argument(name: str, known: Sequence[str]) -> str:
    """The message for an argument that load() does not have."""
    if name in Options.__annotations__:
        return f"{name} is an argument of generate, stream and chat, not of load"
    words = {"n_ctx": "max_context", "max_seq_len": "max_context", "max_model_len": "max_context"}
    words |= {"quantization": "quantize", "quant": "quantize", "load_in_4bit": 'quantize="int4"'}
    close = difflib.get_close_matches(name, known, n=1)
    meant = words.get(name) or (close[0] if close else None)
    if meant:
        return f"unknown argument {name!r}; did you mean {meant}?"
    return f"unknown argument {name!r}; load knows {', '.join(known)}"


def check_load(quantize: Any, group_size: Any, max_context: Any, progress: Any) -> None:
    """Raises ArgumentError when an argument of load is outside its range."""
    check_flag("progress", progress)
    if quantize is not None and quantize not in TYPES:
        raise ArgumentError(
            f"quantize must be one of {', '.join(TYPES)}, found {quantize!r}; leave it out to keep "
            "the weights as stored"
        )
    if group_size is not None and group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ArgumentError(
            f"group_size must be one of {sizes}, found {group_size!r}; leave it out"
        )
    if max_context is not None:
        _positive("max_context", max_context, "the model's own")


def _short(value: Any) -> str:
    text = shown(value, 61)
    return text if len(text) <= 60 else text[:57] + "..."
