"""Draw docs/performance.svg and write the tables of README.md and docs/performance.md.

    python tools/plot_performance.py            # needs matplotlib, which minflash does not
    python tools/plot_performance.py --check    # only: are the tables those of the JSON?

docs/performance.json is what tools/targets.py measure, or minflash bench --json, wrote. Files such
as docs/performance-h200.json become further tables of docs/performance.md. docs/peers.json has the
figures of other engines. Tables stand between two comments, and what is written there is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Result: TypeAlias = dict[str, Any]  # one of minflash bench --json

BEGIN = "<!-- performance: written by tools/plot_performance.py -->"
END = "<!-- performance: end -->"
SHAPES = {
    "smollm2-135m": "SmolLM2 135M", "llama-3.2-1b": "Llama 3.2 1B", "llama-3.1-8b": "Llama 3.1 8B",
    "llama-3.1-70b": "Llama 3.1 70B",
}  # fmt: skip
BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}
MARKERS = {
    "transformers generate": "v", "transformers compiled, graph": "^", "gpt-fast": "s",
    "llama.cpp": "D", "calm": "P", "Hazy megakernel": "X",
}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """Another engine at some shape and context."""

    engine: str
    type: str
    ms: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if tables differ")
    args = parser.parse_args(arguments)
    root: Path = args.root
    first = root / "docs" / "performance.json"
    if not first.is_file():
        print(f"{first} is not there: tools/targets.py measure {first} makes it on a GPU")
        return 1
    files = [first, *sorted(first.parent.glob("performance-*.json"))]
    cards = [json.loads(file.read_text("utf-8")) for file in files]
    peers = load_peers(root / "docs" / "peers.json")
    texts = {
        root / "README.md": readme_block(cards[0], peers),
        root / "docs" / "performance.md": page_block(cards, peers),
    }
    changed = [page for page, block in texts.items() if replace_block(page, block, args.check)]
    if args.check:
        print(f"not as the JSON has it: {', '.join(map(str, changed)) or 'none'}")
        return int(bool(changed))
    draw(cards[0], peers, root / "docs" / "performance.svg")
    return 0


Peers: TypeAlias = dict[tuple[str, int, int], list[Peer]]  # by shape, bits, context


def load_peers(file: Path) -> Peers:
    """The figures of other engines, the fastest first."""
    rows = json.loads(file.read_text("utf-8"))["rows"]
    return {
        (row["shape"], row["bits"], row["context"]): sorted(
            (Peer(*engine) for engine in row["engines"]), key=lambda peer: peer.ms
        )
        for row in rows
    }


def peers_of(result: Result, peers: Peers) -> list[Peer]:
    """What stands beside a result: single tokens of the same shape, context and bits."""
    key = (result["shape"], BITS[result["quant"]], result["context"])
    return peers.get(key, []) if result["columns"] == 1 else []


# Tables


def readme_block(results: Sequence[Result], peers: Peers) -> str:
    """Context 128, one column; longer contexts in a sentence."""
    shown = [r for r in results if r["context"] == 128 and r["columns"] == 1]
    lines = [
        f"{_origin(shown[0])}; context 128. The last column is the fastest other engine that was "
        "measured on such a card ([docs/performance.md](docs/performance.md)).",
        "",
        "| shape | type | ms a token | tokens/s | GB/s | of the ceiling | the best other |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in shown:
        lines.append(
            f"| {SHAPES[r['shape']]} | {type_of(r)} | {_ms(r['ms_per_step'])} | "
            f"{r['tokens_per_s']:.0f} | {r['gb_per_s']:.0f} | {r['percent_of_ceiling']:.1f} % | "
            f"{_best(r, peers)} |"
        )
    longer = [r for r in results if r["context"] > 128 and r["columns"] == 1]
    if longer:
        lines += ["", f"Longer contexts: {', '.join(map(_at_context, longer))}."]
    return "\n".join(lines)


def _at_context(result: Result) -> str:
    return (
        f"{SHAPES[result['shape']]} {result['quant']} at {result['context']} "
        f"{_ms(result['ms_per_step'])} ms"
    )


def page_block(cards: Sequence[Sequence[Result]], peers: Peers) -> str:
    """Everything that was measured, a table a card; other engines beside the first."""
    parts = ["![tokens a second and share of the ceiling, by shape](performance.svg)"]
    for number, results in enumerate(cards):
        lines = [
            f"{_origin(results[0])}.",
            "",
            "| shape | type | context | tokens a step | ms a step | tokens/s | GB/s "
            "| of the ceiling | the best other |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for r in results:
            lines.append(
                f"| {SHAPES[r['shape']]} | {type_of(r)} | {r['context']} | {r['columns']} | "
                f"{_ms(r['ms_per_step'])} | {r['tokens_per_s']:.0f} | {r['gb_per_s']:.0f} | "
                f"{r['percent_of_ceiling']:.1f} % | {_best(r, peers) if number == 0 else ''} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def replace_block(page: Path, block: str, check: bool = False) -> bool:
    """Puts a text between the comments of a page. Returns whether another stood there."""
    text = page.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} lacks the lines {BEGIN} and {END}")
    new = f"{before}{begin}\n{block}\n{end}{after}"
    if not check:
        page.write_text(new, encoding="utf-8")
    return new != text


def type_of(result: Result) -> str:
    group = result["group_size"]
    return f"{result['quant']}, group {group}" if group else str(result["quant"])


def _origin(result: Result) -> str:
    return (
        f"One {result['card']}, driver {result['driver']}, commit {result['commit']}, batch 1, "
        "greedy sampling included, random weights: `minflash bench`. The ceiling is what plain "
        f"loads read in the same run, {result['ceiling_gb_per_s']:.0f} GB/s"
    )


def _best(result: Result, peers: Peers) -> str:
    found = peers_of(result, peers)
    return f"{found[0].engine} {_ms(found[0].ms)} ({found[0].type})" if found else ""


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


# The picture


def draw(results: Sequence[Result], peers: Peers, file: Path) -> None:
    """Tokens a second beside other engines, and the share of the ceiling; a row a measurement."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "minflash", "font.size": 9})
    import matplotlib.pyplot as plt

    shown = [r for r in results if r["columns"] == 1]
    figure, (speed, share) = plt.subplots(
        1, 2, sharey=True, width_ratios=(3, 2), figsize=(9, 1.8 + 0.34 * len(shown)),
        layout="constrained",
    )  # fmt: skip
    _draw_speed(speed, shown, peers)
    _draw_share(share, shown)
    labels = [f"{SHAPES[r['shape']]}, {r['quant']}, @{r['context']}" for r in shown]
    speed.set_yticks(range(len(shown)), labels)
    speed.invert_yaxis()
    card, commit = shown[0]["card"], shown[0]["commit"]
    figure.suptitle(
        f"minflash on one {card}, commit {commit}; other engines measured once on the same kind "
        "of card",
        fontsize=9,
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _draw_speed(axes: Any, shown: Sequence[Result], peers: Peers) -> None:
    at = range(len(shown))
    rates = [r["tokens_per_s"] for r in shown]
    axes.scatter(rates, at, s=45, color="#c03020", label="minflash", zorder=3)
    for engine, marker in MARKERS.items():
        points = [
            (1e3 / peer.ms, row)
            for row, result in enumerate(shown)
            for peer in peers_of(result, peers)
            if peer.engine == engine
        ]
        if points:
            axes.scatter(
                *zip(*points, strict=True), s=22, marker=marker, facecolors="none",
                edgecolors="#303030", linewidths=0.8, label=engine,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([50, 100, 200, 500, 1000, 2000], ["50", "100", "200", "500", "1000", "2000"])
    axes.minorticks_off()
    axes.set_xlabel("tokens a second, one stream")
    axes.grid(color="#dddddd", linewidth=0.6)


def _draw_share(axes: Any, shown: Sequence[Result]) -> None:
    values = [r["percent_of_ceiling"] for r in shown]
    bars = axes.barh(range(len(shown)), values, 0.6, color="#d08070")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlim(0, 109)
    axes.set_xlabel("% of the memory's read ceiling")
    axes.tick_params(axis="y", length=0)


if __name__ == "__main__":
    sys.exit(main())
