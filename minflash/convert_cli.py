"""The arguments of ``minflash convert`` and tools/convert.py, which are one program."""

from __future__ import annotations

import argparse
import sys

from .packing import GROUP_SIZES

QUANT_CHOICES = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")
DESCRIPTION = (
    "Convert a Hugging Face model (folder or hub id) or a GGUF file to the weight file of minflash."
)
EPILOG = """examples:
  minflash convert HuggingFaceTB/SmolLM2-360M-Instruct -o smollm2 --quant int4
  minflash convert ./Llama-3.2-1B -o llama-1b --quant int4 --group-size 32 --head-quant int8
  minflash convert model-Q4_0.gguf -o model          (without loss)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the conversion to ``parser``."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source", metavar="SRC", help="Hugging Face folder, hub id (owner/name) or GGUF file"
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--quant", choices=QUANT_CHOICES, help="type of the layers' matrices (default: as stored)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        help="values that share a scale (default: 64 with int4, else the largest that fits)",
    )
    parser.add_argument(
        "--head-quant",
        choices=QUANT_CHOICES,
        help="type of the embedding and output head (default: int8 with int4, else like --quant)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is a converted model"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no error table")


def run(args: argparse.Namespace) -> int:
    """Converts; returns the exit code. Errors are minflash.errors, for the caller to print."""
    from .convert import convert

    def report(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr)

    path = convert(
        args.source,
        args.out,
        quant=args.quant,
        group_size=args.group_size,
        head_quant=args.head_quant,
        overwrite=args.overwrite,
        progress=not args.quiet,
        report=report,
    )
    print(path)
    return 0
