"""minflash verify on the emulated kernel, and minflash eval on the reference."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import HF_CONFIG, small_tuning
from kernel_models import EmulatedDevice, RandomModel
from numpy.typing import NDArray

from minflash.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from minflash.cli import main
from minflash.config import ModelConfig
from minflash.cuda_engine import CudaEngine
from minflash.engine import CpuEngine, Engine
from minflash.errors import ArgumentError
from minflash.eval_cli import perplexity, windows
from minflash.loading import load
from minflash.tensors import expected_tensors
from minflash.verify import ANSWER_TOKENS, PASSES, compare, sequences, verify
from minflash.verify_cli import run_with


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model that the kernel can run, without a tokenizer."""
    model = RandomModel(ModelConfig.from_hf(HF_CONFIG), "fp16", seed=5)
    names = expected_tensors(model.config)
    vectors = {name: shape[0] for name, shape in names.items() if len(shape) == 1}
    folder = tmp_path_factory.mktemp("verify") / "model"
    with CheckpointWriter(folder, HF_CONFIG, model.matrices, vectors) as writer:
        for name in names:
            if name in vectors:
                writer.write_vector(name, model.vector(name))
            else:
                writer.write_matrix(name, model.matrix(name))
        writer.commit()
    return folder


def emulated(checkpoint: Checkpoint, max_context: int) -> Engine:
    device = EmulatedDevice()
    tuning = small_tuning(checkpoint, device)
    engine = CudaEngine(checkpoint, max_context, device=device, tuning=tuning)
    engine._open_model()._args["watchdog_ns"] = 120 * 10**9  # the machine may be busy
    return engine


class WrongEngine(CpuEngine):
    """An engine whose logits are off by one part in a hundred."""

    def logits(self, tokens: Any) -> NDArray[np.float32]:
        logits = super().logits(tokens)
        logits[-1, 3] += 0.01 * np.abs(logits).max()
        return logits


def arguments(folder: Path, *, as_json: bool = False) -> argparse.Namespace:
    return argparse.Namespace(model=str(folder), json=as_json)


@pytest.mark.slow
def test_the_emulated_kernel_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(arguments(folder, as_json=True), emulated) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] and 0 < facts["worst"] <= 1
    assert [case["name"] for case in facts["sequences"]] == ["one token", "random"]
    assert facts["sequences"][0]["tokens"] == 1 + ANSWER_TOKENS
    assert all(case["error"] > 0 for case in facts["sequences"])


def test_a_wrong_engine_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(arguments(folder), WrongEngine) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "worst:" in out


def test_the_reference_itself_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(arguments(folder), CpuEngine) == 0
    assert "wrong tokens 0" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [False, True])
def test_long_work_shows_a_bar_on_a_terminal_only(
    folder: Path,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert run_with(arguments(folder), CpuEngine) == 0
    assert ("verifying" in capsys.readouterr().err) == terminal
    (tmp_path / "text").write_text("A few words.")
    command = ["eval", "perplexity", str(tmp_path / "text"), "-m", str(converted)]
    assert main([*command, "--device", "cpu"]) == 0
    shown = capsys.readouterr().err
    assert ("reading" in shown) == terminal and bool(shown) == terminal


def test_every_pass_is_told(folder: Path) -> None:
    told: list[None] = []
    with open_checkpoint(folder) as checkpoint:
        cases = sequences(checkpoint.config, None, 64)
        engine = CpuEngine(checkpoint, 64)
        verdicts = list(verify(checkpoint, engine, cases, lambda: told.append(None)))
    assert len(told) == PASSES * len(verdicts) == PASSES * len(cases)


def test_a_token_that_the_bound_does_not_excuse() -> None:
    exact = np.zeros((3, 4))
    exact[:, 1] = [5, 5, 5]
    rounded = exact + 0.1
    right = compare("", [0, 1, 1], 1, exact, exact, rounded)
    assert right.ok and right.bound == pytest.approx(0.2 + 5e-6)
    wrong = compare("", [0, 1, 2], 1, exact, exact, rounded)
    assert wrong.wrong_tokens == 1 and not wrong.ok
    exact_but_nan = np.where(np.arange(4) == 2, np.nan, exact)
    assert not compare("", [0, 1, 1], 1, exact_but_nan, exact, rounded).ok


def test_sequences_fit_the_context() -> None:
    config = ModelConfig.from_hf(HF_CONFIG)
    for room in (16, 256):
        cases = sequences(config, lambda text: list(text.encode()), room)
        assert len(cases) == 5
        assert all(1 <= len(tokens) <= room - ANSWER_TOKENS for tokens in cases.values())


def test_without_a_gpu_verify_says_so(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minflash.probe.cuda_problem", lambda: "no driver")
    assert main(["verify", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none can be used: no driver" in error


@pytest.mark.gpu
def test_a_gpu_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    assert "worst:" in capsys.readouterr().out


# minflash eval


@pytest.mark.parametrize(
    ("count", "context", "stride"), [(10, 4, 4), (10, 4, 2), (11, 4, 3), (4, 9, 9), (9, 4, 1)]
)
def test_every_token_is_predicted_once(count: int, context: int, stride: int) -> None:
    seen: list[int] = []
    for begin, first, end in windows(count, context, stride):
        assert begin < first < end <= min(count, begin + context)
        seen += range(first, end)
    # Windows that touch without overlap cannot predict the first token of the later one.
    missing = set(range(stride, count, stride)) if stride == context else set()
    assert seen == [token for token in range(1, count) if token not in missing]


def test_perplexity_is_that_of_the_probabilities(converted: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog."
    with load(converted, device="cpu") as llm:
        found = perplexity(llm, text, context=64)
        tokens = llm.tokenize(text)
        logits = llm.logits(tokens).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    nats = -np.mean([math.log(shares[i, token]) for i, token in enumerate(tokens[1:])])
    assert found.perplexity == pytest.approx(math.exp(nats), rel=1e-5)  # float32
    assert found.tokens == len(tokens) - 1
    assert found.bits_per_byte * len(text) == pytest.approx(
        nats * found.tokens / math.log(2), rel=1e-5
    )


def test_eval_prints_text_and_json(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text"
    file.write_text("A text of some tokens, long enough for three windows." * 2)
    command = ["eval", "perplexity", str(file), "-m", str(converted), "--device", "cpu"]
    assert main([*command, "--context", "40", "--stride", "20"]) == 0
    assert capsys.readouterr().out.startswith("perplexity ")
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_eval_refuses_what_it_cannot_do(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with load(converted, device="cpu") as llm:
        for text, context, stride in (
            *(("a", 8, 8), ("abc", 1, 1), ("abc", 8, 9), ("abc", 999, 1)),
            *(("abc", 0, None), ("abc", 8, 0), ("abc", None, 0)),
        ):
            with pytest.raises(ArgumentError):
                perplexity(llm, text, context, stride)
    assert main(["eval", "perplexity", str(tmp_path / "missing"), "-m", str(converted)]) == 1
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert main(["eval", "perplexity", str(tmp_path / "bytes"), "-m", str(converted)]) == 2
    assert "UTF-8" in capsys.readouterr().err
