"""``minflash verify``: the GPU beside the reference on one model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DeviceError
from .progress import bar

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .engine import Engine
    from .verify import Verdict

EPILOG = """examples:
  minflash verify
  minflash verify ./my-model --json

Every logit of a few short sequences is compared with the reference in float64 on the same weights.
The bound is twice the error that the kernel's number formats cause by themselves, plus 1e-6 of the
largest logit. Exit code 1 when it is exceeded. The reference runs on the CPU: a model of 8 billion
weights takes 64 GB of memory and minutes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``minflash verify``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, GGUF file or hub id (default: as run's)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Verifies and prints. Raises DeviceError without a GPU."""
    from .probe import cuda_problem

    if problem := cuda_problem():
        raise DeviceError(
            f"minflash verify compares a GPU with the reference, and none can be used: {problem}"
        )
    return run_with(args, _cuda_engine)


def run_with(args: argparse.Namespace, make_engine: Callable[[Checkpoint, int], Engine]) -> int:
    """``run`` on an engine of the caller's making: make_engine(checkpoint, max_context)."""
    from .checkpoint import open_checkpoint
    from .loading import model_folder
    from .verify import PASSES, sequences, verify

    folder = model_folder(args.model)
    with open_checkpoint(folder) as checkpoint:
        room = min(checkpoint.config.max_context, 256)
        cases = sequences(checkpoint.config, _tokenize(folder, checkpoint), room)
        engine = make_engine(checkpoint, room)
        try:
            with bar(PASSES * len(cases), "verifying", " passes") as shown:
                verdicts = list(verify(checkpoint, engine, cases, shown.update))
        finally:
            engine.close()
    _print(verdicts, as_json=args.json)
    return int(not all(verdict.ok for verdict in verdicts))


def _cuda_engine(checkpoint: Checkpoint, max_context: int) -> Engine:
    from .cuda_engine import CudaEngine

    return CudaEngine(checkpoint, max_context)


def _tokenize(folder: Path, checkpoint: Checkpoint) -> Callable[[str], list[int]] | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    from .tokenizer import Tokenizer

    return Tokenizer.load(folder, checkpoint.config.vocab_size).encode


def _print(verdicts: list[Verdict], *, as_json: bool) -> None:
    worst = max(verdicts, key=lambda verdict: verdict.error / verdict.bound)
    if as_json:
        facts = [{**dataclasses.asdict(verdict), "ok": verdict.ok} for verdict in verdicts]
        ok = all(verdict.ok for verdict in verdicts)
        print(json.dumps({"ok": ok, "worst": worst.error / worst.bound, "sequences": facts}))
        return
    for verdict in verdicts:
        print(
            f"{'ok' if verdict.ok else 'FAIL':4}  {verdict.name:10} {verdict.tokens:4} tokens  "
            f"error {verdict.error:.3e}  bound {verdict.bound:.3e}  "
            f"logits up to {verdict.logit_range:.1f}  wrong tokens {verdict.wrong_tokens}"
        )
    print(f"worst: {100 * worst.error / worst.bound:.0f} % of the bound, at {worst.name!r}")
