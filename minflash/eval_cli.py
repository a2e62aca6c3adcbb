"""``minflash eval perplexity FILE``: how well a model predicts a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ArgumentError, MinflashError
from .progress import bar

if TYPE_CHECKING:
    from .llm import LLM

EPILOG = """examples:
  minflash eval perplexity book.txt
  minflash eval perplexity book.txt -m model.gguf --context 1024 --stride 512 --json

The text is cut into windows of --context tokens that begin --stride tokens apart. Each token is
predicted from those before it in its window, and counted once, in the first window that holds it.
"""
DEFAULT_WINDOW = 512


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean of -log p over the predicted tokens."""

    perplexity: float
    tokens: int  # predicted
    nats_per_token: float
    bits_per_byte: float  # of the text's UTF-8
    context: int
    stride: int
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``minflash eval``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("what", choices=("perplexity",), help="what to measure")
    add("file", metavar="FILE", help="UTF-8 text; - reads stdin")
    add("-m", "--model", metavar="MODEL", help="folder, GGUF file or hub id (default: as run's)")
    add("--context", type=int, metavar="N", help=f"tokens of a window (default: {DEFAULT_WINDOW})")
    add("--stride", type=int, metavar="N", help="tokens from window to window (default: --context)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if usable, else cpu")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Raises a MinflashError."""
    from .loading import load

    text = _text(args.file)
    with load(args.model, device=args.device) as llm:
        found = perplexity(llm, text, args.context, args.stride)
    if args.json:
        print(json.dumps(dataclasses.asdict(found)))
        return 0
    print(
        f"perplexity {found.perplexity:.4f} over {found.tokens} tokens "
        f"({found.bits_per_byte:.4f} bits per byte; context {found.context}, stride "
        f"{found.stride}; {found.seconds:.1f} s)"
    )
    return 0


def perplexity(
    llm: LLM, text: str, context: int | None = None, stride: int | None = None
) -> Perplexity:
    """The perplexity of ``text``. context, stride: in tokens; None: 512 or what fits, and context.

    Raises ArgumentError for a text of fewer than two tokens or numbers out of range.
    """
    context = min(DEFAULT_WINDOW, llm.max_context) if context is None else context
    stride = context if stride is None else stride
    if not 2 <= context <= llm.max_context:
        raise ArgumentError(
            f"--context must be from 2 to {llm.max_context}, found {context}; leave it out for "
            f"{DEFAULT_WINDOW} or what the model holds"
        )
    if not 1 <= stride <= context:
        raise ArgumentError(
            f"--stride must be from 1 to --context ({context}), found {stride}; leave it out for "
            "windows that follow one another"
        )
    tokens = llm.tokenize(text, special=False)
    if len(tokens) < 2:
        raise ArgumentError(
            f"the text has {len(tokens)} tokens; at least 2 are needed to predict one"
        )
    began, total, count = time.perf_counter(), 0.0, 0
    with bar(len(tokens) - 1, "reading", " tokens") as shown:
        for begin, first, end in windows(len(tokens), context, stride):
            scores = llm.score(tokens[begin:end]).logprobs[first - begin :]
            total -= math.fsum(score for score in scores if score is not None)
            count += len(scores)
            shown.update(len(scores))
    bits = total / math.log(2) / len(text.encode())
    seconds = time.perf_counter() - began
    mean = total / count
    return Perplexity(math.exp(mean), count, mean, bits, context, stride, seconds)


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of each window: tokens first..end-1 are predicted from begin on.

    Every token but the first of the text, and the first of a window that starts where the last one
    ended, is predicted once.
    """
    done, begin = 1, 0
    while done < count:
        end = min(begin + context, count)
        first = max(done, begin + 1)
        if first < end:
            yield begin, first, end
        done, begin = end, begin + stride


def _text(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{file}: must be UTF-8 text: {error}") from error
    except OSError as error:
        raise MinflashError(f"{file}: cannot be read: {error.strerror}") from error
