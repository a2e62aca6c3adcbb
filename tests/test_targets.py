"""tools/targets.py: what is measured, and the table of what is reached."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from minflash.errors import DeviceError
from minflash.shapes import shape_config, shape_layouts

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TARGETS = json.loads((TOOLS / "targets.json").read_text("utf-8"))
EIGHT = {"shape": "a", "quant": "bf16", "context": 128, "columns": 8}
ONE = {"shape": "a", "quant": "bf16", "context": 128}


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("targets", TOOLS / "targets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(ms: float, card: str = "NVIDIA H100 80GB HBM3", **options: Any) -> dict[str, Any]:
    return {"columns": 1, **options, "ms_per_step": ms, "card": card, "commit": "abc"}


def test_every_row_can_be_measured(tool: Any) -> None:
    bench = pytest.importorskip("minflash.bench", exc_type=ImportError)
    options = inspect.signature(bench.Bench.measure).parameters
    rows = tool.rows(TARGETS)
    assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows)
    for row in rows:
        assert set(row) <= set(options)
        config = shape_config(row["shape"])
        shape_layouts(config, row["quant"], row.get("group_size"))
        assert row["context"] < config.max_context and row.get("columns", 1) <= 8
    for target in TARGETS:
        assert all(target["aim"][card] < target["must"][card] for card in target.get("aim", {}))


class Bench:
    """minflash.bench.Bench for a card on which 70B does not fit."""

    def measure(self, shape: str, quant: str, **options: Any) -> Any:
        from minflash.bench import BenchResult

        if shape == "llama-3.1-70b":
            raise DeviceError("too little memory")
        group, columns = options.get("group_size", 0), options.get("columns", 1)
        return BenchResult(
            shape, quant, group, options["context"], columns, 0.5, 2000.0, 1.0, 2.0, 3000.0, 60.0,
            "NVIDIA H100", "1", "abc", 8, 8192, 40960, "greedy",
        )  # fmt: skip


def test_all_is_measured_but_for_what_does_not_fit(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("minflash.bench", exc_type=ImportError)
    monkeypatch.setattr("minflash.bench.Bench", Bench)
    file = tmp_path / "bench.json"
    assert tool.main(["measure", str(file)]) == 1
    assert "too little memory" in capsys.readouterr().out
    assert len(json.loads(file.read_text())) == len(tool.rows(TARGETS)) - 1
    assert tool.main(["check", str(file)]) == 1
    missed = [line for line in capsys.readouterr().out.splitlines() if "not measured" in line]
    assert len(missed) == 1 and missed[0].startswith("llama-3.1-70b")


def test_the_table_says_pass_miss_and_what_is_not_there(tool: Any) -> None:
    targets = [
        {"measure": [ONE, ONE | {"quant": "int8"}], "must": {"H100": 2.0}, "aim": {"H100": 1.5}},
        {"measure": [ONE | {"context": 4096}], "must": {"H100": 2.0, "H200": 1.0}},
        {"measure": [EIGHT], "over": ONE, "must": {"H100": 1.1}},
    ]
    results = [result(4.0, **ONE), result(1.6, **ONE | {"quant": "int8"}), result(4.2, **EIGHT)]
    text, passed = tool.check(targets, results)
    head, best, missing, ratio = text.splitlines()
    assert head.endswith("NVIDIA H100 80GB HBM3, commit abc") and not passed
    assert best.split() == ["a", "bf16/int8", "@128", "2.00", "1.50", "1.600", "pass"]
    assert missing.split()[-3:] == ["-", "not", "measured"]
    assert ratio.split()[-3:] == ["-", "1.050", "pass"]
    measured = [*results, result(2.1, **ONE | {"context": 4096})]
    assert "MISS by 5.0 %" in tool.check(targets, measured)[0]
    again = [*measured, result(2.0, **ONE | {"context": 4096})]  # the last one counts
    assert tool.check(targets, again)[1]


def test_targets_are_those_of_the_card(tool: Any) -> None:
    rows = [result(0.5, "NVIDIA H200", **row) for row in tool.rows(TARGETS)]
    text, passed = tool.check(TARGETS, rows)
    assert passed and len(text.splitlines()) == 4 and text.count("pass, and the aim") == 3
    assert tool.check(TARGETS, [result(0.5, "NVIDIA L4", **ONE)]) == (
        "there are no targets for NVIDIA L4",
        False,
    )


def test_the_exit_code_tells(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    assert tool.main(["check", str(file)]) == 1
    assert "nothing was measured" in capsys.readouterr().out
    for ms, code in ((9.0, 1), (0.1, 0)):
        rows = [result(ms, **row) for row in tool.rows(TARGETS)]
        file.write_text(json.dumps(rows))
        assert tool.main(["check", str(file)]) == code
        assert ("MISS" in capsys.readouterr().out) == bool(code)
