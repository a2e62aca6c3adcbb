"""``minflash bench --against``, as far as it goes without a GPU and without the other engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from minflash import against
from minflash.cli import main
from minflash.errors import MinflashError

TOOL = """
from minflash.shapes import shape_config
NAME, TYPE, opened = "other 1.0", "bf16", []
class Engine:
    def __init__(self, config):
        assert not opened, "two models at once"
        opened.append(config.dim)
    def generate_ms(self, context, steps, runs):
        return context + steps + runs
    def compiled_ms(self, context, steps, runs):
        return opened[-1] / 1000
    def close(self):
        opened.pop()
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(against, "_TOOLS", tmp_path)
    path = tmp_path / "against_transformers.py"
    path.write_text(TOOL)
    return path


def test_one_model_is_there_at_a_time(tool: Path) -> None:
    module = against.load_tool("transformers")
    found = against.measure(module, ["smollm2-135m", "llama-3.2-1b"], [128, 256], 50, 5)
    assert not module.opened
    assert [(f.shape, f.context, f.generate_ms, f.compiled_ms) for f in found] == [
        ("smollm2-135m", 128, 183, 0.576), ("smollm2-135m", 256, 311, 0.576),
        ("llama-3.2-1b", 128, 183, 2.048), ("llama-3.2-1b", 256, 311, 2.048),
    ]  # fmt: skip
    assert {(f.engine, f.type) for f in found} == {("other 1.0", "bf16")}


class Measured:
    """minflash.bench.Bench with a time of its own."""

    def measure(self, shape: str, quant: str, *, context: int, **options: Any) -> Any:
        from minflash.bench import BenchResult

        return BenchResult(
            shape, quant, 64 if quant == "int4" else 0, context, 1, 0.5, 2000.0, 1.0, 2.0,
            3000.0, 60.0, "a card", "1", "abc", 8, 8192, 40960, "greedy",
        )  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    pytest.importorskip("minflash.bench", exc_type=ImportError)
    monkeypatch.setattr("minflash.bench.Bench", Measured)
    monkeypatch.setattr("minflash.probe.cuda_problem", lambda: None)
    return ["bench", "--quant", "bf16,int4", "--steps", "20", "--against", "transformers"]


def test_ratios_are_printed(
    tool: Path, bench: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(bench) == 0
    *_, head, names, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("other 1.0, weights in bf16")
    assert names.split()[-5:] == ["minflash", "generate", "ratio", "compiled", "ratio"]
    # 128 + 20 + 5 and 2.048, by 0.5
    assert first.split()[1:] == ["bf16", "128", "0.5000", "153.000", "306.00", "2.048", "4.10"]
    assert second.split()[1] == "int4-g64"


def test_json_holds_both(tool: Path, bench: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*bench, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["quant"] for result in results] == ["bf16", "int4"]
    for result in results:
        assert result["ms_per_step"] == 0.5 and result["against"]["compiled_ms"] == 2.048


def test_what_is_missing_is_said_in_one_line(
    tool: Path, bench: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert main([*bench, "--columns", "8"]) == 2
    assert "--against compares single tokens" in capsys.readouterr().err
    tool.write_text("import torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(bench) == 1
    error = capsys.readouterr().err
    assert "needs the package torch here" in error and error.count("\n") == 1
    tool.unlink()
    assert main(bench) == 1
    error = capsys.readouterr().err
    assert "which only a checkout of minflash has" in error and error.count("\n") == 1


def test_the_checkout_has_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parent.parent
    for name in against.ENGINES:
        path = root / "tools" / f"against_{name}.py"
        assert path.is_file()
        compile(path.read_text("utf-8"), path.name, "exec")
    monkeypatch.setattr(against, "_TOOLS", root / "tools")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MinflashError, match="needs the package torch"):
        against.load_tool("transformers")
