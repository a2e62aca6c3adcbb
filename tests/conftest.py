"""Tests marked ``gpu`` need a usable NVIDIA GPU; they are skipped without one, and counted."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from minflash.blas import prepare_blas

if TYPE_CHECKING:
    import openai
    from kernel_models import Machine
    from web_server import Server

    import minflash

prepare_blas()  # before a test imports NumPy
pytest.register_assert_rewrite("sampled")  # its assertions say what they compared


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_model import write_source

    return write_source(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    import minflash

    out = tmp_path_factory.mktemp("converted") / "small"
    return minflash.convert(source, out, progress=False)


@pytest.fixture(scope="session")
def default_folder() -> Path:
    """The default model, fetched at the first test run; skips without a network, never in CI."""
    from minflash.default_model import default_model
    from minflash.errors import DownloadError

    try:
        return default_model(progress=False)
    except DownloadError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the default model cannot be fetched: {error}")


@pytest.fixture(scope="module")
def llm() -> Iterator[minflash.LLM]:
    """The tiny model of weights/, which has a tokenizer and a chat template."""
    import minflash
    from minflash.resources import resource_dir

    with minflash.load(resource_dir("weights") / "tiny", device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: minflash.LLM) -> Iterator[Server]:
    from web_server import running

    with running(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    from web_server import connect

    with connect(server) as client:
        yield client


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """The command line keeps the logger for its own process; the next test must not find that."""
    logger = logging.getLogger("minflash")
    handlers, propagate = logger.handlers[:], logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number without an account, with nothing set."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "MINFLASH_CACHE_DIR", "CUPY_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


@cache
def gpu_problem() -> str | None:
    """Why no GPU can be used, or None when there is one. Imports cupy: ask only for a gpu test."""
    try:
        import cupy

        usable = cupy.cuda.is_available()
    except Exception as error:  # a broken CuPy or driver fails in many ways
        return f"CuPy does not work: {error}"
    return None if usable else "no usable NVIDIA GPU"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that measures where others run beside it, and a gpu test without a GPU."""
    if item.get_closest_marker("measures") and "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("measures the whole machine: run it without -n")
    if item.get_closest_marker("gpu") is None:
        return
    problem = gpu_problem()
    if problem is not None:
        pytest.skip(problem)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the gpu tests in one line, so that a run without a GPU cannot pass for one with."""
    skipped = _count_gpu(terminalreporter, "skipped")
    ran = _count_gpu(terminalreporter, "passed") + _count_gpu(terminalreporter, "failed")
    if skipped or ran:
        terminalreporter.write_line(f"gpu tests: {ran} ran, {skipped} skipped")


def _count_gpu(reporter: pytest.TerminalReporter, outcome: str) -> int:
    return sum(
        "gpu" in getattr(report, "keywords", ()) for report in reporter.stats.get(outcome, [])
    )


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Opens models on the emulated device, and on a GPU where there is one."""
    from kernel_models import Machine

    machine = Machine(request.param)
    yield machine
    machine.close()
