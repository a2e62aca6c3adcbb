"""The marks of the tests themselves, which conftest.py turns into skips."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_what_measures_is_skipped_beside_other_processes() -> None:
    """With or without a GPU: others would take time and memory from what is measured."""
    environment = os.environ | {"PYTEST_XDIST_WORKER": "gw0", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "measures", "-p", "no:xdist",
         "-p", "no:cacheprovider", TESTS / "test_bench.py", TESTS / "test_gpu_engine.py"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    skips = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert done.returncode == 0 and skips, done.stdout + done.stderr
    assert all("measures the whole machine: run it without -n" in line for line in skips)
    assert " passed" not in done.stdout and " failed" not in done.stdout
