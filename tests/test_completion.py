"""minflash completion, in a real bash."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from minflash.cli import main

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
ASK = """
source /dev/stdin <<'SCRIPT'
{script}SCRIPT
COMP_WORDS=(minflash {words}) COMP_CWORD={place}
_minflash
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script() -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main(["completion"]) == 0
    return shown.getvalue()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pl"], {"plan"}),
        (["--ver"], {"--version"}),
        (["run", "--device", ""], {"cpu", "cuda"}),
        (["run", "--device", "cu"], {"cuda"}),
        (["run", "--top"], {"--top-k", "--top-p"}),
        (["plan", "--shape", "x", "--quant", "int"], {"int8", "int4"}),
        (["eval", ""], {"perplexity"}),
        (["run", "--model", ""], set()),  # bash goes on with names of files
        (["verify", "my-mo"], set()),
    ],
)
def test_what_bash_offers(script: str, words: list[str], expected: set[str]) -> None:
    quoted = " ".join(f"'{word}'" for word in words)
    program = ASK.format(script=script, words=quoted, place=len(words))
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == expected


def test_all_commands_are_offered(script: str) -> None:
    program = ASK.format(script=script, words="''", place=1)
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=30)
    assert {"run", "chat", "convert", "bench", "serve", "list"} <= set(done.stdout.split())
