"""minflash doctor: what it finds, what it says to do, and that nothing makes it crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from minflash import doctor
from minflash.cli import main
from minflash.doctor import FAIL, OK, WARN, Finding, cupy_finding, examine, folder_finding


def status(findings: list[Finding], name: str) -> set[str]:
    return {finding.status for finding in findings if finding.name == name}


def test_a_whole_examination() -> None:
    findings = examine()
    names = {finding.name for finding in findings}
    assert {"minflash", "python", "driver", "cupy", "compiler", "cache", "environment"} <= names
    for finding in findings:
        assert finding.status in (OK, WARN, FAIL) and finding.detail
        assert bool(finding.advice) == (finding.status != OK), finding


def test_the_compiler_is_tried_without_a_gpu() -> None:
    pytest.importorskip("cupy")
    (finding,) = doctor._compiler()
    assert finding.status == OK and "NVRTC" in finding.detail


def test_a_check_that_breaks_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterable[Finding]:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "CHECKS", {"first": broken, "second": doctor._python})
    findings = examine()
    assert findings[0].status == WARN and "RuntimeError: two lines" in findings[0].detail
    assert findings[1].name == "minflash"


def test_cupy_installed_twice() -> None:
    found = cupy_finding({"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.0.0", "numpy": "2.0"})
    assert found.status == FAIL
    assert "pip uninstall cupy-cuda12x cupy-cuda13x" in found.advice
    assert cupy_finding({"cupy-cuda12x": "14.2.0", "cupy-schedules": "1"}).status == OK
    assert "pip install" in cupy_finding({}).advice


def test_folders(tmp_path: Path) -> None:
    assert folder_finding("cache", tmp_path / "not" / "made" / "yet", "X").status == OK
    assert not (tmp_path / "not").exists()
    found = folder_finding("cache", tmp_path, "X", spare_bytes=1 << 60)
    assert found.status == WARN and "set X" in found.advice
    file = tmp_path / "file"
    file.touch()
    found = folder_finding("cache", file / "below", "X")
    assert found.status == FAIL and "set X" in found.advice


@pytest.mark.usefixtures("no_home")
def test_without_a_home_folder_the_variables_are_named() -> None:
    """Both caches are asked for one; neither finding says that minflash is to blame."""
    for name, expected in (("cache", FAIL), ("cupy cache", WARN), ("default model", FAIL)):
        (found,) = doctor._isolated(name, doctor.CHECKS[name])
        assert found.status == expected and "home folder" in found.detail
        assert "_CACHE_DIR to the whole path" in found.advice


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert folder_finding("cache", tmp_path / "cache", "X").status == FAIL


def test_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINFLASH_MODEL", str(tmp_path))
    assert {finding.status for finding in doctor._environment()} == {OK}
    monkeypatch.setenv("MINFLASH_DEVICE", "gpu")
    monkeypatch.setenv("MINFLASH_LOG_LEVEL", "loud")
    monkeypatch.setenv("MINFLASH_MODEL", str(tmp_path / "missing"))
    assert [finding.status for finding in doctor._environment()] == [OK, FAIL, WARN, FAIL]


def test_exit_codes_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {"python": doctor._python})
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is True and facts["checks"][0]["name"] == "minflash"
    monkeypatch.setattr(doctor, "CHECKS", {"x": lambda: [Finding("x", FAIL, "broken", "mend it")]})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fail  x" in out and "-> mend it" in out


def test_no_secret_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert not any("hf_secret" in finding.detail for finding in doctor._environment())


@pytest.mark.gpu
def test_a_gpu_is_found_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    findings = examine()
    assert status(findings, "driver") == {OK} and status(findings, "card 0") == {OK}
    assert main(["plan", "--shape", "llama-3.2-1b", "--quant", "int4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] and facts["bandwidth_origin"] == "measured"
    assert 100 < facts["gb_per_s"] < 20000
