"""The documentation is true: its commands run, the messages it explains exist, and it builds."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from small_model import write_source

ROOT = Path(__file__).resolve().parent.parent
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDE]
# Commands that are not run here, with the reason.
NOT_RUN = {
    "pip ": "installs from the network; .ci/run does all of the README's",
    "pytest": "is this run",
    "minflash serve": "runs for ever; tests/test_server.py",
    "minflash verify": "needs a GPU; tests/test_verify.py",
    "minflash bench": "needs a GPU; tests/test_bench.py",
    "minflash chat": "waits for a person; tests of the command line",
    "llm ": "tests/test_llm_plugin.py",
    "python examples/": "tests/test_examples.py",
    "uvicorn ": "tests/test_examples.py",
}


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    return [text for language, text in found if language in languages]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Hugging Face model that the kernel could run, and its conversion."""
    import minflash

    folder = tmp_path_factory.mktemp("models")
    config = write_source(folder / "huggingface-model", "llama_head_dim_96") / "config.json"
    longer = json.loads(config.read_text()) | {"max_position_embeddings": 1024}
    config.write_text(json.dumps(longer))
    minflash.convert(folder / "huggingface-model", folder / "model", progress=False)
    return folder


@pytest.fixture
def folder(tmp_path: Path, models: Path) -> Path:
    """A working folder in which the paths of the documentation exist."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "to").symlink_to(shutil.copytree(models, tmp_path / "models"))
    (tmp_path / "book.txt").write_text("A book with a few words, not more. " * 5)
    return tmp_path


@pytest.fixture
def environment(folder: Path, models: Path) -> dict[str, str]:
    """The command minflash, the CPU, a small model in place of the default one."""
    programs = folder / "bin"
    programs.mkdir()
    script = programs / "minflash"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m minflash "$@"\n')
    script.chmod(0o755)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    imported = Path(__import__("minflash").__file__ or "").parent.parent
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MINFLASH_")}
    return {
        **kept,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths if imported == ROOT else paths[1:]),
        "MINFLASH_MODEL": str(models / "model"),
        "MINFLASH_DEVICE": "cpu",
        "MINFLASH_CACHE_DIR": str(folder / "cache"),
    }


def commands(page: Path) -> list[str]:
    """The shell commands of a page, pieces of && apart, without those of NOT_RUN."""
    text = "".join(blocks(page, "sh", "bash")).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    pieces = [piece.strip() for line in lines for piece in line.split(" && ")]
    return [piece for piece in pieces if not piece.startswith(tuple(NOT_RUN))]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_runs(page: Path, folder: Path, environment: dict[str, str]) -> None:
    for command in commands(page):
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True,
            timeout=120, errors="replace",
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout or "convert" in command, command


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_python_block_runs(page: Path, folder: Path, environment: dict[str, str]) -> None:
    """Blocks of a page follow each other in one program."""
    program = "\n".join(blocks(page, "python"))
    if not program:
        pytest.skip("the page has no Python")
    if "response_format" in program:
        pytest.importorskip("llguidance")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True,
        text=True, timeout=120, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_page_of_the_server_runs(folder: Path, environment: dict[str, str]) -> None:
    """Against a server at another port; ``minflash serve`` itself: tests/test_server_running.py."""
    from web_server import TINY, running

    import minflash

    page = ROOT / "docs" / "server.md"
    asked = [block for block in blocks(page, "sh") if "curl" in block]
    assert len(asked) == 1 and len(blocks(page, "python")) == 2
    with minflash.load(TINY, device="cpu") as llm, running(llm) as server:
        programs = [[sys.executable, "-c", block] for block in blocks(page, "python")]
        if shutil.which("curl"):
            programs.append(["bash", "-c", asked[0].replace("curl ", "curl --fail -sS ")])
        for program in programs:
            program[-1] = program[-1].replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
            done = subprocess.run(
                program, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout or "create_app" in program[-1], program[-1]


def test_the_readme_has_commands_and_python() -> None:
    assert len(commands(PAGES[0])) >= 4 and blocks(PAGES[0], "python")


@cache
def messages() -> str:
    """All strings of the package, with … where a value is put in."""
    found = []
    for file in sorted((ROOT / "minflash").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{[^{}]*\}", "…", node.value))
    return "\n".join(found)


def test_every_message_of_troubleshooting_exists() -> None:
    page = ROOT / "docs" / "guide" / "troubleshooting.md"
    headings = re.findall(r"^### `(.*)`$", page.read_text("utf-8"), re.M)
    assert len(headings) > 20
    for heading in headings:
        assert heading in messages(), heading


def test_every_option_is_in_the_guide() -> None:
    from minflash.arguments import Options

    text = "".join(page.read_text("utf-8") for page in GUIDE)
    missing = [name for name in Options.__annotations__ if f"`{name}" not in text]
    assert set(missing) <= {"max_new_tokens", "logprobs", "grammar", "regex", "response_format"}
    for name in ("logprobs=", "grammar=", "regex=", "response_format="):
        assert name in text


def test_every_public_name_is_in_the_reference() -> None:
    import minflash

    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    shown = set(re.findall(r"^::: (\S+)$", text, re.M))
    homes = {name: f"minflash.{home}" for name, home in minflash._HOME.items()}
    missing = [name for name, home in homes.items() if not {home, f"{home}.{name}"} & shown]
    assert not missing
    assert set(minflash.__all__) == {*homes, "__version__"} and "`minflash.__version__`" in text


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='mkdocs is not installed: pip install ".[docs]"')
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text())
    text = " ".join(entry["title"] for entry in index["docs"])
    for title in ("Troubleshooting", "Limits", "LLM", "generate", "ContextError"):
        assert title in text, title
