"""Options that the commands which generate text share."""

from __future__ import annotations

import argparse
from typing import Any

_OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is loaded."""
    add = parser.add_argument
    add("-m", "--model", metavar="MODEL", help="folder, GGUF file or hub id (default: a small one)")
    add("--max-context", type=int, metavar="N", help="positions (default: the model's own)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if usable, else cpu")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and when the answer ends."""
    add = parser.add_argument
    add("--max-tokens", type=int, metavar="N", help="tokens to make at most (default: 256)")
    add("--temperature", type=float, metavar="X", help="0: always the most likely token")
    add("--top-k", type=int, metavar="N", help="choose among the N most likely tokens; 0: off")
    add("--top-p", type=float, metavar="X", help="choose among tokens of this total probability")
    add("--min-p", type=float, metavar="X", help="drop tokens below this part of the likeliest")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--stop", action="append", metavar="TEXT", help="end before this text (may be repeated)")


def generation_options(args: argparse.Namespace) -> Any:
    """The keyword arguments of LLM.stream. Raises ArgumentError before a model is loaded."""
    from .arguments import parse

    options = {name: getattr(args, name) for name in _OPTIONS}
    parse(options)
    return options
