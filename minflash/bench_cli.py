"""``minflash bench``: the speed of the step kernel on named shapes with random weights."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from typing import TYPE_CHECKING

from .against import ENGINES, load_tool, measure
from .errors import ArgumentError, DeviceError

if TYPE_CHECKING:
    from .against import Against
    from .bench import BenchResult
    from .bench_prefill import PrefillResult

EPILOG = """examples:
  minflash bench
  minflash bench --shape llama-3.1-8b --quant int4 --context 128
  minflash bench --shape llama-3.2-1b,smollm2-135m --quant bf16,int4 --context 128,4096 --json
  minflash bench --shape smollm2-135m --end-to-end
  minflash bench --shape llama-3.1-8b --profile
  minflash bench --shape llama-3.2-1b --quant bf16 --against transformers
  minflash bench --shape llama-3.2-1b --quant bf16 --sampling greedy,filters,all
  minflash bench --shape llama-3.1-8b --quant bf16,int4 --prefill 512,2048
  minflash bench --set stages=16 --set in_flight_bytes=32768

The weights are random and made on the GPU: no file is needed. Several values, separated by commas,
are measured in every combination. The ceiling is what plain loads read on this card in this run.
"""
SAMPLINGS = ("greedy", "temperature", "top_p", "filters", "all")  # as in bench.py
QUANTS = ("bf16", "fp16", "fp8", "int8", "int4")
_AGAINST_COLUMNS = (
    *("shape", "quant", "context", "minflash"),
    *("generate", "ratio", "compiled", "ratio"),
)
_COLUMNS = (
    "shape", "quant", "context", "cols", "sampling", "ms/step", "tok/s", "GB/s", "% of ceiling",
)  # fmt: skip
_PREFILL_COLUMNS = ("shape", "quant", "context", "tokens", "ms", "tok/s", "TFLOP/s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``minflash bench``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--shape", default="llama-3.2-1b", metavar="NAMES", help="such as llama-3.1-8b")
    add("--quant", default="int4", metavar="TYPES", help=f"of {', '.join(QUANTS)}")
    add("--group-size", type=int, metavar="N", help="32, 64 or 128 (default: as convert takes)")
    add("--context", metavar="NS", help="positions before the step (128) or the prompt (0)")
    add("--columns", default="1", metavar="NS", help="tokens of one step, 1 to 8 (1)")
    add(
        "--sampling", default="greedy", metavar="NAMES",
        help=f"how a token is chosen, of {', '.join(SAMPLINGS)} (greedy)",
    )  # fmt: skip
    add("--steps", type=int, default=50, metavar="N", help="steps of one timing (50)")
    add("--runs", type=int, default=5, metavar="N", help="timings, of which the median counts (5)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a tuning field")
    add("--end-to-end", action="store_true", help="also generate through the engine, and compare")
    add("--profile", action="store_true", help="also show where a step's time goes, by phase")
    add("--against", choices=ENGINES, help="also run this engine, which a checkout can")
    add("--prefill", metavar="NS", help="time the reading of prompts of N tokens, not steps")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Raises ArgumentError, and DeviceError without a GPU."""
    shapes, quants = args.shape.split(","), _members("quant", args.quant, QUANTS)
    contexts, columns = _contexts(args), _counts("columns", args.columns)
    samplings = _members("sampling", args.sampling, SAMPLINGS)
    overrides = tuning_overrides(args.set) | ({"profile": True} if args.profile else {})
    prompts = None if args.prefill is None else _counts("prefill", args.prefill)
    _check(args, columns, samplings)
    from .shapes import shape_config, shape_layouts

    for shape in shapes:  # wrong names are said before anything is measured
        for quant in quants:
            shape_layouts(shape_config(shape), quant, args.group_size)
    other = load_tool(args.against) if args.against else None
    from .probe import cuda_problem

    if problem := cuda_problem():
        raise DeviceError(f"minflash bench measures a GPU, and none can be used: {problem}")
    if prompts is not None:
        return _run_prefill(args, shapes, quants, contexts, prompts, overrides)
    from .bench import Bench

    bench = Bench()
    results = []
    for shape, quant, context, count, sampling in itertools.product(
        shapes, quants, contexts, columns, samplings
    ):
        result = bench.measure(
            shape, quant, group_size=args.group_size, context=context, columns=count,
            steps=args.steps, runs=args.runs, sampling=sampling, end_to_end=args.end_to_end,
            **overrides,
        )  # fmt: skip
        results.append(result)
        if not args.json:
            print_row(result, header=len(results) == 1)
    if other is not None:
        found = measure(other, shapes, contexts, args.steps, args.runs)
        results = _beside(results, found)
        if not args.json:
            print(against_table(results))
    if args.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    return 0


def _beside(results: list[BenchResult], found: list[Against]) -> list[BenchResult]:
    others = {(one.shape, one.context): one for one in found}
    return [dataclasses.replace(r, against=others[r.shape, r.context]) for r in results]


def against_table(results: list[BenchResult]) -> str:
    """Our times beside the other engine's, and theirs divided by ours, one result a line."""
    others = [result.against for result in results if result.against]
    lines = [
        f"\n{others[0].engine}, weights in {others[0].type}; ms a token, and times minflash's",
        "{:14} {:9} {:>8} {:>9} {:>9} {:>7} {:>9} {:>7}".format(*_AGAINST_COLUMNS),
    ]
    for result, other in zip(results, others, strict=True):
        ms = result.ms_per_step
        lines.append(
            f"{result.shape:14} {_type(result):9} {result.context:8} {ms:9.4f} "
            f"{other.generate_ms:9.3f} {other.generate_ms / ms:7.2f} "
            f"{other.compiled_ms:9.3f} {other.compiled_ms / ms:7.2f}"
        )
    return "\n".join(lines)


def _type(result: BenchResult | PrefillResult) -> str:
    return f"{result.quant}-g{result.group_size}" if result.group_size else result.quant


def _check(args: argparse.Namespace, columns: list[int], samplings: list[str]) -> None:
    """Raises ArgumentError for options that do not go together."""
    if max(columns) > 8 or args.steps < 1 or args.runs < 1:
        raise ArgumentError("--columns takes 1 to 8, --steps and --runs at least 1")
    steps_only = args.profile or args.end_to_end or args.against or samplings != ["greedy"]
    if args.prefill is not None and (steps_only or columns != [1]):
        raise ArgumentError(
            "--prefill goes without --columns, --profile, --end-to-end, --sampling and --against"
        )
    if args.against and columns != [1]:
        raise ArgumentError(f"--against compares single tokens; leave out --columns {args.columns}")


def _contexts(args: argparse.Namespace) -> list[int]:
    if args.context is None:
        return [128 if args.prefill is None else 0]
    return _counts("context", args.context)


def _run_prefill(
    args: argparse.Namespace, shapes: list[str], quants: list[str], contexts: list[int],
    prompts: list[int], overrides: dict[str, int | bool],
) -> int:  # fmt: skip
    """Measures prompts of all lengths, and prints."""
    from .bench_prefill import measure_prefill
    from .device import CudaDevice

    device, results = CudaDevice(), []
    for shape, quant, context, tokens in (
        (s, q, n, t) for s in shapes for q in quants for n in contexts for t in prompts
    ):
        result = measure_prefill(
            device, shape, quant, group_size=args.group_size, context=context, tokens=tokens,
            runs=args.runs, **overrides,
        )  # fmt: skip
        results.append(result)
        if not args.json:
            _print_prefill(result, header=len(results) == 1)
    if args.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    return 0


def _print_prefill(result: PrefillResult, *, header: bool) -> None:
    if header:
        print(f"{result.card}, driver {result.driver}, commit {result.commit or 'unknown'}")
        print("{:14} {:9} {:>8} {:>7} {:>9} {:>9} {:>8}".format(*_PREFILL_COLUMNS))
    print(
        f"{result.shape:14} {_type(result):9} {result.context:8} {result.tokens:7} "
        f"{result.ms:9.3f} {result.tokens_per_s:9.0f} {result.tflop_per_s:8.1f}",
        flush=True,
    )


def tuning_overrides(settings: list[str]) -> dict[str, int | bool]:
    """["stages=16", ...] -> {field of Tuning: value}. Raises ArgumentError."""
    from .tuning import Tuning

    kinds = {field.name: type(field.default) for field in dataclasses.fields(Tuning)}
    overrides: dict[str, int | bool] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in kinds:
            raise ArgumentError(
                f"--set takes KEY=VALUE with a key of {', '.join(kinds)}, found {setting!r}"
            )
        if kinds[name] is bool:
            if text not in ("true", "false"):
                raise ArgumentError(f"--set {name} must be true or false, found {text!r}")
            overrides[name] = text == "true"
        elif text.isascii() and text.isdigit() and int(text) > 0:
            overrides[name] = int(text)
        else:
            raise ArgumentError(f"--set {name} must be a whole number above 0, found {text!r}")
    return overrides


def _members(name: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    values = text.split(",")
    for value in values:
        if value not in allowed:
            raise ArgumentError(f"--{name} must be of {', '.join(allowed)}, found {value!r}")
    return values


def _counts(name: str, text: str) -> list[int]:
    values = text.split(",")
    if not all(value.isascii() and value.isdigit() and int(value) > 0 for value in values):
        raise ArgumentError(f"--{name} must be whole numbers above 0, found {text!r}")
    return [int(value) for value in values]


def print_row(result: BenchResult, *, header: bool) -> None:
    """One result as a line, after a heading if it is the first."""
    if header:
        print(
            f"{result.card}, driver {result.driver}, commit {result.commit or 'unknown'}; ", end=""
        )
        print(f"read ceiling {result.ceiling_gb_per_s:.0f} GB/s")
        end = "  end to end" if result.end_to_end_tokens_per_s else ""
        print("{:14} {:9} {:>8} {:>5} {:11} {:>9} {:>9} {:>7} {:>13}".format(*_COLUMNS) + end)
    row = (
        f"{result.shape:14} {_type(result):9} {result.context:8} {result.columns:5} "
        f"{result.sampling:11} {result.ms_per_step:9.4f} {result.tokens_per_s:9.1f} "
        f"{result.gb_per_s:7.0f} {result.percent_of_ceiling:13.1f}"
    )
    if result.end_to_end_tokens_per_s:
        share = 100 * result.end_to_end_tokens_per_s / result.tokens_per_s
        row += f"  {result.end_to_end_tokens_per_s:.1f} tok/s ({share:.1f} %)"
    print(row)
    if result.phases:
        from .profiling import as_table

        print(as_table(result.phases))
    sys.stdout.flush()
