"""The command line, as a program of its own: output, errors in one line, exit codes."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_model import write_source

import minflash
from minflash import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    return minflash.convert(write_source(folder / "source"), folder / "model", progress=False)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, str]:
    """No GPU, the small model, an empty cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MINFLASH_")}
    return {
        **kept,
        "MINFLASH_MODEL": str(model),
        "MINFLASH_DEVICE": "cpu",
        "MINFLASH_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_CACHE": str(tmp_path_factory.mktemp("hub")),
    }


@pytest.fixture
def run(environment: dict[str, str]) -> Any:
    def run(*arguments: str, stdin: bytes = b"", **variables: str) -> Any:
        command = [sys.executable, "-m", "minflash", *arguments]
        variables = {**environment, **variables}
        done = subprocess.run(command, input=stdin, capture_output=True, env=variables, timeout=60)
        done.text, done.err = done.stdout.decode(), done.stderr.decode()
        return done

    return run


def assert_error(done: Any, code: int, *words: str) -> None:
    assert done.returncode == code
    assert done.text == ""
    assert done.err.startswith("minflash: error: ") and done.err.count("\n") == 1
    for word in words:
        assert word in done.err


def test_version_and_help(run: Any) -> None:
    assert run("--version").text == f"minflash {minflash.__version__}\n"
    text = run("--help").text
    for word in ("run", "convert", "list", "examples:", "MINFLASH_CACHE_DIR"):
        assert word in text
    assert "--temperature" in run("run", "--help").text
    assert "--quant" in run("convert", "--help").text


def test_importing_costs_nothing() -> None:
    """Neither NumPy nor CuPy nor the tokenizers, and the public names still there."""
    code = (
        "import sys, time; begin = time.process_time(); import minflash\n"
        "took = time.process_time() - begin\n"
        "heavy = {'numpy', 'cupy', 'tokenizers', 'torch', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert took < 0.1, took\n"
        "assert all(getattr(minflash, name) for name in minflash.__all__)\n"
        "assert not {'cupy', 'tokenizers', 'torch'} & set(sys.modules)\n"
        "import minflash.chat, minflash.convert\n"
        "assert type(minflash.chat) is type(minflash.convert) is type(minflash.generate)\n"
        "assert set(minflash.__all__) <= set(dir(minflash))\n"
        "try: minflash.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_run_prints_the_text(run: Any, model: Path) -> None:
    done = run("run", "Hello", "--max-tokens", "8")
    assert done.returncode == 0 and done.err == ""
    with minflash.load(model, device="cpu") as llm:
        expected = llm.chat("Hello", max_tokens=8)
        raw = llm.generate("Hello", max_tokens=8)
    assert done.text == expected + "\n" * (not expected.endswith("\n"))
    assert run("run", "-p", "Hello", "--max-tokens", "8").text == done.text
    assert run("run", "-", "--max-tokens", "8", stdin=b"Hello\n").text == done.text
    assert run("run", "--raw", "Hello", "--max-tokens", "8").text.startswith(raw)


def test_json(run: Any, model: Path) -> None:
    options = ("--max-tokens", "6", "--temperature", "1", "--top-k", "50", "--top-p", "0.95")
    done = run("run", "-m", str(model), "--json", *options, "--min-p", "0.01", "--seed", "4", "Hi")
    answer = json.loads(done.text)
    assert done.text.count("\n") == 1 and done.err == ""
    assert answer["prompt_tokens"] == len("user: Hi\nassistant: ")
    assert 1 <= answer["generation_tokens"] <= 6
    assert answer["finish_reason"] in ("stop", "length") and answer["device"] == "cpu"
    assert answer["stats"]["time_to_first_token"] > 0
    with minflash.load(model, device="cpu") as llm:
        sampling: Any = {"temperature": 1, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 4}
        assert llm.chat("Hi", max_tokens=6, **sampling) == answer["text"]


def test_system_message_counts(run: Any) -> None:
    done = run("run", "--json", "--max-tokens", "1", "--system", "Be brief.", "Hi")
    expected = len("system: Be brief.\nuser: Hi\nassistant: ")
    assert json.loads(done.text)["prompt_tokens"] == expected


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "a command is needed"),
        (("dance",), "dance"),
        (("run",), "a prompt is needed"),
        (("run", "a", "-p", "b"), "twice"),
        (("run", ""), "empty"),
        (("run", "-"), "empty"),
        (("run", "a", "--system", "b", "--raw"), "--raw"),
        (("run", "a", "--max-tokens", "x"), "invalid int"),
        (("run", "a", "--max-tokens", "0"), "at least 1"),
        (("run", "a", "--temperature", "-1"), "temperature"),
        (("run", "a", "--top-p", "2"), "top_p"),
        (("run", "a", "--device", "tpu"), "invalid choice"),
        (("run", "a", "--logprobs", "3"), "add --json"),
        (("chat", "--logprobs", "3"), "unrecognized"),
        (("run", "a", "--temp-erature", "1"), "unrecognized"),
        (("convert", "x"), "-o"),
    ],
)
def test_wrong_usage(capfd: Any, monkeypatch: Any, arguments: tuple[str, ...], word: str) -> None:
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    try:
        code = cli.main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capfd.readouterr()
    assert (code, out) == (2, "") and word in err
    assert err.startswith("minflash: error: ") and err.count("\n") == 1


def test_errors_are_one_line(run: Any, tmp_path: Path) -> None:
    assert_error(run("run", "-m", "/no/such/model", "Hi"), 1, "/no/such/model", "GGUF")
    assert_error(run("run", "-m", str(tmp_path), "Hi"), 1, "config.json")
    assert_error(run("run", "x" * 500), 1, "518 tokens", "128")
    assert_error(run("run", "-", stdin=b"\xff\xfe"), 2, "UTF-8")
    assert_error(run("convert", "/no/such/model", "-o", str(tmp_path / "out")), 1, "/no/such/model")
    debug = run("run", "--debug", "-m", "/no/such/model", "Hi")
    assert debug.returncode == 1 and "Traceback" in debug.err


def test_a_bug_of_ours_is_one_line_too(capsys: Any, monkeypatch: Any) -> None:
    def broken(args: Any) -> int:
        raise KeyError("inside")

    monkeypatch.setattr("minflash.list_cli.run", broken)
    assert cli.main(["list"]) == 1
    error = capsys.readouterr().err
    assert "unexpected KeyError" in error and "--debug" in error and error.count("\n") == 1


def test_a_missing_dependency_is_named(tmp_path: Path) -> None:
    """As after an installation without dependencies, the README's way to CUDA 13."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('none', name='numpy')")
    command = [sys.executable, "-m", "minflash", "run", "hi"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(minflash.__file__).parents[1]}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    message = "minflash: error: minflash needs numpy, which is not installed; pip install numpy\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_device_cuda_without_a_gpu_is_an_error(capsys: Any, monkeypatch: Any, model: Path) -> None:
    monkeypatch.setattr("minflash.engine.cuda_problem", lambda: "no driver; install one")
    assert cli.main(["run", "-m", str(model), "--device", "cuda", "Hi"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no driver; install one" in err


def test_cpu_without_a_gpu_says_one_line(capsys: Any, monkeypatch: Any, model: Path) -> None:
    monkeypatch.setattr("minflash.engine.cuda_problem", lambda: "no driver; install one")
    monkeypatch.setattr("minflash.notice._said", set())
    monkeypatch.delenv("MINFLASH_DEVICE", raising=False)
    assert cli.main(["run", "-m", str(model), "--max-tokens", "2", "Hi"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("minflash: ") and err.count("\n") == 1 and "install one" in err


def test_convert_and_list(run: Any, model: Path, environment: dict[str, str]) -> None:
    assert "no models" in run("list").text
    out = Path(environment["MINFLASH_CACHE_DIR"]) / "models" / "mine"
    source = model.parent / "source"
    done = run("convert", str(source), "-o", str(out), "--quant", "int8", "--group-size", "32")
    assert done.returncode == 0, done.err
    line = run("list").text
    assert line.count("\n") == 1 and "mine" in line and "int8" in line and "MB" in line
    (facts,) = json.loads(run("list", "--json").text)
    assert facts["name"] == "mine" and facts["bytes"] > 1000
    assert run("run", "-m", str(out), "Hi", "--max-tokens", "2").returncode == 0


def test_broken_pipe_is_quiet(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "minflash", "run", "--raw", "x", "--max-tokens", "100"]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            command, stdout=write, stderr=subprocess.PIPE, env=environment, timeout=60
        )
    finally:
        os.close(write)
    assert done.returncode == 1 and done.stderr == b""


def test_interrupt_ends_with_130(environment: dict[str, str]) -> None:
    code = (
        "import signal, sys, time, minflash.llm as m\n"
        # A shell starts what it puts into the background with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real = m.LLM._run\n"
        "def slow(*a):\n"
        "    for chunk in real(*a):\n"
        "        yield chunk; time.sleep(0.2)\n"
        "m.LLM._run = slow\n"
        "from minflash.cli import main\n"
        "sys.exit(main(['run', 'x', '--max-tokens', '100']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, b"")


def test_terminal_gets_a_line_of_statistics(environment: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "minflash", "run", "x", "--max-tokens", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    process.communicate(timeout=60)
    os.close(theirs)
    ready, _, _ = select.select([ours], [], [], 5)
    shown = os.read(ours, 4096).decode() if ready else ""
    os.close(ours)
    assert "tokens/s" in shown and "\x1b" not in shown


def test_a_wrong_log_level_is_one_line(run: Any) -> None:
    for command in (("list",), ("run", "x", "--max-tokens", "2")):
        done = run(*command, MINFLASH_LOG_LEVEL="bogus")
        assert done.returncode == 0 and done.err.count("\n") == 1
        assert "must be one of debug, info, warning, error, found 'bogus'" in done.err
        for right in ("", "warning", "ERROR"):
            assert run(*command, MINFLASH_LOG_LEVEL=right).err == ""


def test_start_is_quick(run: Any) -> None:
    begin = time.perf_counter()
    assert run("--version").returncode == 0
    assert time.perf_counter() - begin < 5  # generous: a loaded machine
