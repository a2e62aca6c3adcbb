"""tools/plot_performance.py: tables in the pages and a picture, from the JSON of the bench."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def tool() -> Any:
    path = ROOT / "tools" / "plot_performance.py"
    spec = importlib.util.spec_from_file_location("plot_performance", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def result(shape: str, quant: str, context: int, ms: float, columns: int = 1) -> dict[str, Any]:
    """As of minflash bench --json, with round numbers that nobody measured."""
    return {
        "shape": shape, "quant": quant, "group_size": 64 if quant == "int4" else 0,
        "context": context, "columns": columns, "ms_per_step": ms,
        "tokens_per_s": columns * 1e3 / ms, "gb_per_s": 1500.0, "ceiling_gb_per_s": 3000.0,
        "percent_of_ceiling": 50.0, "card": H100, "driver": "1.2", "commit": "abc1234",
    }  # fmt: skip


RESULTS = [
    result("llama-3.1-8b", "bf16", 128, 6.0),
    result("llama-3.1-8b", "bf16", 4096, 6.25),
    result("llama-3.1-8b", "bf16", 128, 8.0, columns=8),
    result("llama-3.1-8b", "int4", 128, 2.5),
    result("smollm2-135m", "int4", 128, 0.5),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The real pages and peers, with a JSON of the test's."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md", "docs/peers.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs" / "performance.json").write_text(json.dumps(RESULTS))
    return tmp_path


def table(page: Path) -> list[list[str]]:
    """The cells of the lines between the comments."""
    block = page.read_text().partition("<!-- performance: written")[2].partition("<!-- perf")[0]
    lines = [line for line in block.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def outside(text: str) -> tuple[str, str]:
    return text.partition("<!-- perf")[0], text.rpartition("<!-- perf")[2]


def test_tables_are_written_and_nothing_else(tool: Any, root: Path) -> None:
    pytest.importorskip("matplotlib")
    before = (root / "README.md").read_text()
    assert tool.main(["--root", str(root), "--check"]) == 1
    assert (root / "README.md").read_text() == before
    assert tool.main(["--root", str(root)]) == 0
    _, *rows = table(root / "README.md")
    assert rows == [
        ["Llama 3.1 8B", "bf16", "6.00", "167", "1500", "50.0 %", "gpt-fast 6.01 (16-bit)"],
        ["Llama 3.1 8B", "int4, group 64", "2.50", "400", "1500", "50.0 %",
         "llama.cpp 3.12 (q4_0)"],
        ["SmolLM2 135M", "int4, group 64", "0.500", "2000", "1500", "50.0 %", "calm 0.621 (fp8)"],
    ]  # fmt: skip
    _, *rows = table(root / "docs" / "performance.md")
    assert [row[2:5] for row in rows[:3]] == [
        ["128", "1", "6.00"], ["4096", "1", "6.25"], ["128", "8", "8.00"]
    ]  # fmt: skip
    assert rows[2][-1] == "" and rows[1][-1] == "gpt-fast 6.16 (16-bit)"
    for name, begin in (("README.md", "# minflash"), ("docs/performance.md", "# Performance")):
        text = (root / name).read_text()
        assert text.startswith(begin) and H100 in text and "commit abc1234" in text
    after = (root / "README.md").read_text()
    assert outside(after) == outside(before)
    assert "\nLonger contexts: Llama 3.1 8B bf16 at 4096 6.25 ms.\n" in after
    assert tool.main(["--root", str(root), "--check"]) == 0


def test_another_card_gets_a_table_without_other_engines(tool: Any, root: Path) -> None:
    other = [row | {"card": "NVIDIA H200", "ms_per_step": 3.5} for row in RESULTS[:1]]
    page = root / "docs" / "performance.md"
    tool.replace_block(page, tool.page_block([RESULTS, other], tool.load_peers(peers_file(root))))
    assert "One NVIDIA H200," in page.read_text()
    last = table(page)[-1]
    assert last[4] == "3.50" and last[-1] == ""


def test_a_page_without_the_comments_is_left_alone(tool: Any, root: Path) -> None:
    page = root / "README.md"
    page.write_text("# minflash\n")
    with pytest.raises(SystemExit, match="lacks the lines"):
        tool.replace_block(page, "x")
    assert page.read_text() == "# minflash\n"


def test_the_picture_has_every_row_and_engine(tool: Any, root: Path) -> None:
    pytest.importorskip("matplotlib")
    file, again = root / "a.svg", root / "b.svg"
    for path in (file, again):
        tool.draw(RESULTS, tool.load_peers(peers_file(root)), path)
    assert file.read_bytes() == again.read_bytes()
    texts = [node.text for node in ElementTree.parse(file).iter() if node.tag.endswith("}text")]
    for label in ("Llama 3.1 8B, bf16, @128", "SmolLM2 135M, int4, @128", "minflash", "calm"):
        assert label in texts, label
    assert "Hazy megakernel" not in texts  # it ran none of these shapes
    assert any("measured once on the same kind of card" in (text or "") for text in texts)


def test_peers_are_complete(tool: Any) -> None:
    peers = tool.load_peers(ROOT / "docs" / "peers.json")
    assert {shape for shape, _, _ in peers} < set(tool.SHAPES)
    assert {bits for _, bits, _ in peers} == {4, 8, 16}
    assert {peer.engine for row in peers.values() for peer in row} == set(tool.MARKERS)
    targets = json.loads((ROOT / "tools" / "targets.json").read_text())
    rows = [{"columns": 1, **row} for target in targets for row in target["measure"]]
    beside = {(r["shape"], r["context"]) for r in rows if tool.peers_of(r, peers)}
    assert beside == {
        ("llama-3.1-8b", 128), ("llama-3.1-8b", 4096), ("llama-3.2-1b", 128),
        ("llama-3.2-1b", 4096), ("smollm2-135m", 128),
    }  # fmt: skip


@pytest.mark.skipif(
    not (ROOT / "docs" / "performance.json").is_file(), reason="docs/performance.json is to come"
)
def test_the_pages_show_the_json(tool: Any) -> None:
    assert tool.main(["--check"]) == 0
    assert (ROOT / "docs" / "performance.svg").is_file()


def peers_file(root: Path) -> Path:
    return root / "docs" / "peers.json"
