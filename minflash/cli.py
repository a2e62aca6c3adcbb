"""The command ``minflash``: errors are one line on stderr.

Exit codes: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .blas import prepare_blas
from .errors import ArgumentError, MinflashError

if TYPE_CHECKING:
    from .chunk import Chunk, Stats
    from .llm import LLM

DESCRIPTION = "Decode a large language model with one kernel launch per step."
EPILOG = """examples:
  minflash run "Why is the sky blue?"
  minflash run -m ./my-model --temperature 0.7 --seed 1 "Write a haiku about rain."
  git diff | minflash run --system "You write commit messages." -
  minflash run --raw --json "The capital of France is"
  minflash chat
  minflash serve --port 8000
  minflash convert HuggingFaceTB/SmolLM2-360M-Instruct -o smollm2 --quant int4
  minflash list
  minflash bench --shape llama-3.1-8b --quant int4
  minflash plan model.gguf --quant int4 --gpu rtx-4090
  minflash doctor

environment:
  MINFLASH_MODEL      the model that run takes without -m
  MINFLASH_DEVICE     cpu or cuda
  MINFLASH_CACHE_DIR  where converted models are kept (~/.cache/minflash)
  MINFLASH_LOG_LEVEL  debug, info, warning or error
"""
RUN_EPILOG = """examples:
  minflash run "Why is the sky blue?"
  minflash run -m model.gguf --max-tokens 50 -p "Name three rivers."
  minflash run --raw "Once upon a time"
  minflash run - < question.txt

The model's chat template is applied when it has one; --raw completes the prompt as it is.
Without sampling options the model's generation_config.json decides, else the most likely token.
"""
_ADDED_COMMANDS = {  # in NAME_cli.py each
    "chat": "talk with the model",
    "list": "list the models in the caches",
    "serve": "serve the model to OpenAI clients and browsers",
    "plan": "tell memory, context and speed of a model before it is loaded",
    "doctor": "check this machine and say what to do",
    "verify": "compare the GPU with the reference on a model",
    "eval": "measure the perplexity of a text",
    "completion": "print the script that makes bash complete commands and options",
}
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: this process's). Returns the exit code."""
    prepare_blas()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        args = _parser().parse_args(arguments)
        _log_to_stderr()
        code: int = args.function(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left, as in "| head": nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        if debug:
            traceback.print_exc()
        _print_error(_message(error))
        return EXIT_USAGE if isinstance(error, ArgumentError) else EXIT_ERROR


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        _print_error(f"{message} (see {self.prog} --help)")
        raise SystemExit(EXIT_USAGE)


def _parser() -> _Parser:
    parser = _Parser("minflash", description=DESCRIPTION, epilog=EPILOG, formatter_class=_Raw)
    parser.add_argument("--version", action="version", version=f"minflash {__version__}")
    _add_debug(parser)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", parser_class=_Parser
    )
    parser.set_defaults(function=_no_command)
    run = commands.add_parser(
        "run", help="answer a prompt", epilog=RUN_EPILOG, formatter_class=_Raw
    )
    _add_run_arguments(run)
    run.set_defaults(function=_run)
    _add_convert(commands.add_parser("convert", help="convert a model to minflash's format"))
    _add_bench(commands.add_parser("bench", help="measure the kernel's speed on the GPU"))
    for name, purpose in _ADDED_COMMANDS.items():
        _add_command(commands.add_parser(name, help=purpose, description=purpose), name)
    for command in commands.choices.values():
        _add_debug(command)
    return parser


def _no_command(args: argparse.Namespace) -> int:
    raise ArgumentError("a command is needed, such as run or doctor (see minflash --help)")


_Raw = argparse.RawDescriptionHelpFormatter


def _add_debug(parser: argparse.ArgumentParser) -> None:
    # SUPPRESS: the flag may stand before or after the command without one undoing the other.
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of errors",
    )


def _add_convert(parser: argparse.ArgumentParser) -> None:
    from . import convert_cli

    convert_cli.add_arguments(parser)
    parser.set_defaults(function=convert_cli.run)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from . import bench_cli

    bench_cli.add_arguments(parser)
    parser.set_defaults(function=bench_cli.run)


def _add_command(parser: argparse.ArgumentParser, name: str) -> None:
    module = importlib.import_module(f".{name}_cli", __package__)
    module.add_arguments(parser)
    parser.set_defaults(function=module.run)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    from .generation_cli import add_model_arguments, add_sampling_arguments

    add = parser.add_argument
    add("text", nargs="?", metavar="PROMPT", help="the prompt; - reads it from stdin")
    add("-p", "--prompt", metavar="PROMPT", help="the prompt, as an option")
    add("--raw", action="store_true", help="complete the prompt as it is, without chat template")
    add("--system", metavar="TEXT", help="system message of the chat template")
    add("--json", action="store_true", help="print one JSON object when done")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    add("--logprobs", type=int, metavar="N", help="with --json: log-probabilities, N alternatives")


def _run(args: argparse.Namespace) -> int:
    from .generation_cli import generation_options
    from .loading import load

    prompt = _prompt(args)
    options = generation_options(args)  # a wrong one is said before a model is loaded
    if args.logprobs is not None and not args.json:
        raise ArgumentError("--logprobs is shown in the JSON object alone; add --json")
    with load(args.model, device=args.device, max_context=args.max_context) as llm:
        llm.tokenize("")  # without a tokenizer there is no text to print: say so now
        chunks = llm.stream(_conversation(llm, prompt, args), **options)
        if args.json:
            _print_json(llm, list(chunks))
        else:
            _print_text(chunks)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.text is not None and args.prompt is not None:
        raise ArgumentError("the prompt is given twice, as PROMPT and as -p; give one of them")
    prompt: str | None = args.text if args.text is not None else args.prompt
    if prompt is None:
        raise ArgumentError(
            'a prompt is needed: minflash run "Why is the sky blue?", or - for stdin'
        )
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArgumentError(f"stdin must be UTF-8 text: {error}") from error
        prompt = prompt.removesuffix("\n")
    if not prompt:
        raise ArgumentError("the prompt is empty; give at least one character")
    if args.raw and args.system is not None:
        raise ArgumentError("--system is part of the chat template, which --raw turns off")
    return prompt


def _conversation(llm: LLM, prompt: str, args: argparse.Namespace) -> str | list[dict[str, str]]:
    if args.raw or not (llm.has_chat_template or args.system is not None):
        return prompt
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": prompt}]


def _print_text(chunks: Any) -> None:
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that cannot show a character gets a "?"
    text = ""
    chunk: Chunk | None = None
    try:
        for chunk in chunks:
            if chunk.text:
                text = chunk.text
                sys.stdout.write(text)
                sys.stdout.flush()
    finally:
        if not text.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    if chunk is not None and chunk.stats is not None and sys.stderr.isatty():
        print(_stats_line(chunk.stats, chunk.finish_reason), file=sys.stderr)


def _print_json(llm: LLM, chunks: list[Chunk]) -> None:
    last = chunks[-1]
    stats = dataclasses.asdict(last.stats) if last.stats else {}
    answer = {
        "text": "".join(chunk.text for chunk in chunks),
        "finish_reason": last.finish_reason,
        "prompt_tokens": stats.pop("prompt_tokens", None),
        "generation_tokens": stats.pop("generation_tokens", None),
        "model": str(llm.path),
        "device": llm.device,
        "stats": stats,
    }
    if last.top_logprobs is not None:
        answer["tokens"] = [
            {"id": c.token, "logprob": c.logprob, "top_logprobs": c.top_logprobs} for c in chunks
        ]
    print(json.dumps(answer, ensure_ascii=False))


def _stats_line(stats: Stats, reason: str | None) -> str:
    ended = "; stopped at --max-tokens or the end of the context" if reason == "length" else ""
    read = "" if stats.gb_per_s is None else f", {stats.gb_per_s:.0f} GB/s"
    if stats.percent_of_bus is not None:
        read += f" ({stats.percent_of_bus:.0f} % of the card's bus)"
    return (
        f"[{stats.prompt_tokens} + {stats.generation_tokens} tokens, first after "
        f"{stats.time_to_first_token:.2f} s, then {stats.generation_tps:.1f} tokens/s{read}{ended}]"
    )


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"minflash: {record.getMessage()}", file=sys.stderr)


def _log_to_stderr() -> None:
    logger = logging.getLogger("minflash")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
        logger.propagate = False
    from . import notice  # noqa: F401 (reads MINFLASH_LOG_LEVEL, and may have a word to say)


def _message(error: Exception) -> str:
    if isinstance(error, MinflashError):
        return str(error)
    if isinstance(error, MemoryError):
        return "the memory is full; free some, or take a smaller model or a shorter --max-context"
    if isinstance(error, OSError):
        return str(error)
    needed = ("numpy", "safetensors", "tokenizers")
    if isinstance(error, ModuleNotFoundError) and error.name in needed:
        # What is optional says itself how to install it.
        return f"minflash needs {error.name}, which is not installed; pip install {error.name}"
    kind = type(error).__name__
    return f"unexpected {kind}: {error} (a bug of minflash; --debug shows where it happened)"


def _print_error(message: str) -> None:
    print(f"minflash: error: {' '.join(message.split())}", file=sys.stderr)
