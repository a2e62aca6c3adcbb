"""The shapes that count: measure them all, and compare with what must be reached.

    python tools/targets.py measure OUT.json      # on a GPU; a row is saved as soon as it is there
    python tools/targets.py check OUT.json        # anywhere: pass or miss; exit code 1 for a miss

tools/targets.json has the targets in milliseconds a token of ``minflash bench``, by card, and of
eight columns as a multiple of one (``over``). Of several types the best one counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent

# The shape with the shortest steps: whatever the host adds shows in its rate end to end.
SHORTEST = "smollm2-135m"

Target: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[str, Any]  # of options of Bench.measure, or of a result in JSON


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("measure", "check"))
    parser.add_argument("file", type=Path, help="JSON as of minflash bench --json")
    args = parser.parse_args(arguments)
    targets = json.loads((ROOT / "tools" / "targets.json").read_text("utf-8"))
    if args.what == "measure":
        return measure(targets, args.file)
    if not args.file.is_file():
        print(f"{args.file} is not there: nothing was measured")
        return 1
    text, passed = check(targets, json.loads(args.file.read_text("utf-8")))
    print(text)
    return 0 if passed else 1


def rows(targets: Sequence[Target]) -> list[Row]:
    """What to measure, each once: options of Bench.measure."""
    found: list[Row] = []
    for target in targets:
        for row in (*target["measure"], *([target["over"]] if "over" in target else [])):
            if row not in found:
                found.append(row)
    return found


def measure(targets: Sequence[Target], file: Path) -> int:
    """Measures all rows. Exit code 1 when one of them could not be."""
    from minflash.bench import Bench
    from minflash.bench_cli import print_row
    from minflash.errors import MinflashError

    file.unlink(missing_ok=True)  # an older one must not be taken for this one
    bench, results, failed = Bench(), [], False
    for row in rows(targets):
        try:
            results.append(bench.measure(**row, end_to_end=row["shape"] == SHORTEST))
        except (MinflashError, MemoryError) as error:
            failed = True
            print(f"{row}: {error}", flush=True)
            continue
        print_row(results[-1], header=len(results) == 1)
        content = [dataclasses.asdict(result) for result in results]
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(failed)


def check(targets: Sequence[Target], results: Sequence[Row]) -> tuple[str, bool]:
    """A table, one target of this card a line, and whether all are reached."""
    card = results[-1]["card"] if results else "no card"
    origin = f"{card}, commit {results[-1]['commit'] or 'unknown'}" if results else card
    lines = [f"{'target':34}{'must':>8}{'aim':>8}{'found':>9}  {origin}"]
    passed = True
    for target, must, aim in _of_card(targets, card):
        found = _found(target, results)
        verdict = _verdict(found, must, aim)
        passed = passed and verdict.startswith("pass")
        shown = "-" if found is None else f"{found:.3f}"
        wanted = "-" if aim is None else f"{aim:.2f}"
        lines.append(f"{name(target):34}{must:8.2f}{wanted:>8}{shown:>9}  {verdict}")
    if len(lines) == 1:
        return f"there are no targets for {card}", False
    return "\n".join(lines), passed


def name(target: Target) -> str:
    """Shape, types, context, columns."""
    row = target["measure"][0]
    types = "/".join(one["quant"] for one in target["measure"])
    columns = f", T={row['columns']} : 1" if "over" in target else ""
    return f"{row['shape']} {types} @{row['context']}{columns}"


def _of_card(targets: Sequence[Target], card: str) -> Iterator[tuple[Target, float, float | None]]:
    for target in targets:
        for kind, must in target["must"].items():
            if kind in card:
                yield target, must, target.get("aim", {}).get(kind)


def _found(target: Target, results: Sequence[Row]) -> float | None:
    """Milliseconds, or the ratio for ``over``; None when it was not measured."""
    times = [ms for row in target["measure"] if (ms := _time(row, results)) is not None]
    if not times or "over" not in target:
        return min(times, default=None)
    other = _time(target["over"], results)
    return None if other is None else min(times) / other


def _time(row: Row, results: Sequence[Row]) -> float | None:
    """Of the last result with the options ``row``, of one column where it does not say."""
    wanted = {"columns": 1, **row}
    times = [r["ms_per_step"] for r in results if all(r.get(k) == v for k, v in wanted.items())]
    return times[-1] if times else None


def _verdict(found: float | None, must: float, aim: float | None) -> str:
    if found is None:
        return "not measured"
    if found > must:
        return f"MISS by {100 * (found / must - 1):.1f} %"
    return "pass, and the aim" if aim is not None and found <= aim else "pass"


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    sys.exit(main())
