"""What a model holds, the system gets back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Prints the MB of main memory that the process holds: before, in use, and after close().
PROCESS = """
import json, os, sys
import minflash

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

import numpy, tokenizers
found = [resident()]
llm = minflash.load(sys.argv[1], device="cpu")
llm.generate("x", max_tokens=3, **json.loads(sys.argv[2]))
found.append(resident())
llm.close()
found.append(resident())
print(json.dumps(found))
"""


@pytest.mark.parametrize("options", [{}, {"regex": "[0-9]{3}"}], ids=["text", "grammar"])
def test_close_gives_the_memory_back(default_folder: Path, options: dict[str, str]) -> None:
    if options:
        pytest.importorskip("llguidance", reason='needs pip install "minflash[grammar]"')
    command = [sys.executable, "-c", PROCESS, str(default_folder), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    before, used, closed = json.loads(done.stdout)
    assert used - before > 500  # 135 million weights in float32
    # What stays: the tokenizer, and the code of what was imported meanwhile.
    assert closed - before < 0.15 * (used - before), done.stdout
