"""What the machine offers: devices, memory, processors."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest

import minflash
from minflash import blas, memory, probe
from minflash import engine as engine_module
from minflash.config import ModelConfig
from minflash.errors import (
    ContextError,
    DeviceError,
)

CONFIG = replace(ModelConfig.from_hf(checkpoints.CASES["llama2"]), eos_token_ids=(2, 3))


def test_device_choice(
    converted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MINFLASH_DEVICE", raising=False)
    monkeypatch.setattr(engine_module, "cuda_problem", lambda: "no driver here; install one")
    monkeypatch.setattr("minflash.notice._said", set())
    with pytest.raises(DeviceError, match="no driver here; install one"):
        minflash.load(converted, device="cuda")
    for _ in range(2):
        with minflash.load(converted) as model:
            assert model.device == "cpu"
    notices = [record for record in caplog.records if "no driver here" in record.getMessage()]
    assert len(notices) == 1 and notices[0].name == "minflash"
    monkeypatch.setenv("MINFLASH_DEVICE", "cuda")
    with pytest.raises(DeviceError):
        minflash.load(converted)


class FakeRuntime:
    """cupy.cuda.runtime with a driver of some version and no device."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, version: int, error: str | None) -> None:
        self.version, self.error = version, error

    def driverGetVersion(self) -> int:
        return self.version

    def getDeviceCount(self) -> int:
        if self.error:
            raise self.CUDARuntimeError(self.error)
        return 1


@pytest.mark.parametrize(
    ("version", "error", "visible", "hint"),
    [
        (0, None, None, "driver does not answer"),
        (12080, "cudaErrorNoDevice", None, "nvidia-smi"),
        (12080, "cudaErrorNoDevice", "7", "CUDA_VISIBLE_DEVICES is '7'"),
        (12080, None, None, None),
    ],
)
def test_cuda_problems_name_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    error: str | None,
    visible: str | None,
    hint: str | None,
) -> None:
    fake = type("cupy", (), {"cuda": type("cuda", (), {"runtime": FakeRuntime(version, error)})})
    monkeypatch.setitem(sys.modules, "cupy", fake)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    problem = probe._cupy_problem()
    assert (problem is None) if hint is None else (problem is not None and hint in problem)


def test_cupy_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "pip install cupy-cuda12x" in (probe._cupy_problem() or "")


def test_cupy_cache_goes_elsewhere_when_home_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    probe._prepare_cupy_cache()
    chosen = os.environ.pop("CUPY_CACHE_DIR")
    assert not chosen.startswith(str(tmp_path))


def test_context_is_bounded_by_memory_and_said(
    converted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from minflash.checkpoint import open_checkpoint

    monkeypatch.setattr("minflash.notice._said", set())
    with open_checkpoint(converted) as checkpoint:
        weights = sum(4 * layout.rows * layout.cols for layout in checkpoint.matrices.values())
        position = 4 * 2 * CONFIG.n_layers * CONFIG.n_kv_heads * CONFIG.head_dim
        assert memory.cpu_context(checkpoint, None) == 128
        assert memory.cpu_context(checkpoint, 50) == 50
        with pytest.raises(ContextError, match=r"max_context is 129.* 128"):
            memory.cpu_context(checkpoint, 129)
        monkeypatch.setattr(memory, "free_memory_bytes", lambda: weights + 100 * position)
        assert memory.cpu_context(checkpoint, None) == 80
        assert "the context is 80 positions" in caplog.text
        with pytest.raises(ContextError, match=r"max_context is 90 .* allows 80"):
            memory.cpu_context(checkpoint, 90)
        monkeypatch.setattr(memory, "free_memory_bytes", lambda: weights // 2)
        with pytest.raises(DeviceError, match="weights take"):
            memory.cpu_context(checkpoint, None)


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)  # whatever else runs in our own group
    outside = memory.free_memory_bytes()
    assert 1e6 < outside < 1e14
    (tmp_path / "memory.max").write_text("50000\n")
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 20000\n")
    assert memory.free_memory_bytes() == 40000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory_bytes() > outside / 2


@pytest.mark.parametrize(
    ("load", "quota", "threads"),
    [
        (0.3, None, 4),
        (1.9, None, 3),
        (9.0, None, 1),
        (0.0, "max 100000", 4),
        (0.0, "150000 100000", 2),
    ],
)
def test_blas_leaves_busy_processors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, quota: str | None, threads: int
) -> None:
    monkeypatch.setattr(blas, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "20")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    blas.prepare_blas()
    assert os.environ["OPENBLAS_NUM_THREADS"] == str(threads)
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == "20"


def test_the_command_line_sets_blas_before_numpy_is_there() -> None:
    code = "import sys, minflash.cli; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
