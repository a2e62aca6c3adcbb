"""``minflash plan``: bytes, the longest context and the best speed, before a model is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from .errors import ArgumentError
from .packing import GROUP_SIZES

if TYPE_CHECKING:
    from .plan import Described, Plan, Room

EPILOG = """examples:
  minflash plan ./my-model --gpu rtx-4090
  minflash plan model.gguf --quant int4 --memory 16 --bandwidth 500
  minflash plan --shape llama-3.1-8b --quant int4 --gpu h100-sxm --context 32768 --json

Only headers are read. The speed is an upper bound for one stream of text: the bandwidth divided by
the bytes that a step must read. Bandwidth and memory of --gpu are datasheet figures; without --gpu
and --memory they are those of this machine's GPU, the bandwidth measured. A gigabyte is 10^9 bytes.
A model that does not fit is an answer too, with the exit code 0; "fits" of --json is then false.
"""
_QUANTS = ("bf16", "fp16", "fp8", "int8", "int4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``minflash plan``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder or GGUF file (default: the default one)")
    add("--shape", metavar="NAME", help="a well-known shape instead, such as llama-3.1-8b")
    add("--context", type=int, metavar="N", help="positions (default: the most that fits)")
    add("--quant", choices=_QUANTS, help="as convert would store it (default: as stored)")
    add("--group-size", type=int, choices=GROUP_SIZES, help="values that share a scale")
    add("--gpu", metavar="NAME", help="a card by its datasheet, such as rtx-4090 or h100-sxm")
    add("--memory", type=float, metavar="GB", help="memory that is free on the GPU")
    add("--bandwidth", type=float, metavar="GB/S", help="what the GPU reads in a second")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises a MinflashError."""
    from .plan import plan

    _check(args)
    made = plan(_model(args), _room(args), args.context)
    if args.json:
        print(json.dumps(dataclasses.asdict(made), ensure_ascii=False))
    else:
        print("\n".join(_lines(made)))
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.model is not None and args.shape is not None:
        raise ArgumentError("MODEL and --shape are both given; give one of them")
    if args.gpu is not None and args.memory is not None:
        raise ArgumentError("--gpu and --memory are both given; give one of them")
    if args.context is not None and args.context < 1:
        raise ArgumentError(f"--context must be at least 1, found {args.context}")
    for name in ("memory", "bandwidth"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e9:
            raise ArgumentError(f"--{name} must be above 0, found {value:g}")


def _model(args: argparse.Namespace) -> Described:
    from .plan import describe, describe_shape

    if args.shape is not None:
        return describe_shape(args.shape, args.quant, args.group_size)
    return describe(args.model, args.quant, args.group_size)


def _room(args: argparse.Namespace) -> Room:
    from .plan import Room, room_of_card, room_of_this_machine

    if args.gpu is not None:
        room = room_of_card(args.gpu)
    elif args.memory is not None:
        room = Room(f"{args.memory:g} GB", int(args.memory * 1e9), None)
    else:
        room = room_of_this_machine() or Room("no GPU", None, None)
    if args.bandwidth is not None:
        room = dataclasses.replace(room, gb_per_s=args.bandwidth, origin="given")
    return room


def _lines(made: Plan) -> list[str]:
    types = ", ".join(f"{kind} {_size(nbytes)}" for kind, nbytes in made.types.items())
    rows = [
        ("model", made.model),
        ("weights", f"{_size(made.weight_bytes)} ({types})"),
        ("keys, values", f"{_size(made.cache_bytes)} for {made.context} positions"),
        ("workspace", _size(made.workspace_bytes)),
        ("together", _size(made.total_bytes)),
        ("GPU", _gpu(made)),
        ("fits", _fits(made)),
        ("speed", _speed(made)),
        *(("note", note) for note in made.notes),
    ]
    return [f"{name:13} {text}" for name, text in rows]


def _gpu(made: Plan) -> str:
    if made.free_bytes is None:
        return "none here; --gpu NAME or --memory GB says for which one to plan"
    return f"{made.gpu}, {_size(made.free_bytes)} of memory"


def _fits(made: Plan) -> str:
    if made.largest_context is None:
        return "unknown"
    own = f"the model's own limit is {made.model_context}"
    if made.largest_context == 0:
        return f"no: {_lacking(made)}; take a smaller type with --quant, or a larger GPU"
    if not made.fits:
        return f"no: the largest context that fits is {made.largest_context} ({own})"
    return f"yes; the largest context that fits is {made.largest_context} ({own})"


def _lacking(made: Plan) -> str:
    """What has no room where not even one position fits."""
    from .gpu_memory import MARGIN_BYTES

    if made.free_bytes is not None and made.weight_bytes > made.free_bytes:
        return "not even the weights fit"
    fixed = _size(made.weight_bytes + made.workspace_bytes)
    return (
        f"weights and workspace take {fixed} and {_size(MARGIN_BYTES)} stay free, which leaves no "
        "room for keys and values"
    )


def _speed(made: Plan) -> str:
    if made.gb_per_s is None or made.tokens_per_s_empty is None:
        return "unknown; give --bandwidth in GB/s"
    return (
        f"at most {made.tokens_per_s_empty:.1f} tokens/s at the start and "
        f"{made.tokens_per_s_full:.1f} at position {made.context}: "
        f"{made.gb_per_s:g} GB/s ({made.bandwidth_origin}) over "
        f"{_size(made.step_bytes_empty)} and {_size(made.step_bytes_full)} a step"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
