"""``minflash list``: the models of both caches, each by a name that can be given back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import minflash
from minflash.cli import main
from minflash.errors import ArgumentError, CheckpointError
from minflash.hub_cache import hub_dir, hub_models
from minflash.loading import model_folder
from minflash.plan import describe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add_hub_model(name: str, source: Path) -> Path:
    """Puts the files of ``source`` into the hub's cache as huggingface_hub does: links to blobs."""
    folder = hub_dir() / f"models--{name.replace('/', '--')}"
    snapshot, blobs = folder / "snapshots" / COMMIT, folder / "blobs"
    for made in (snapshot, blobs, folder / "refs"):
        made.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for file in source.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return snapshot


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty ones, and no network."""
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MINFLASH_DEVICE", "cpu")
    return tmp_path


def test_models_of_both_caches(
    caches: Path, source: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list"]) == 0
    assert f"no models in {caches / 'own'} or {caches / 'hub'} yet" in capsys.readouterr().out
    own = shutil.copytree(converted, caches / "own" / "models" / "mine")
    snapshot = add_hub_model("some-body/small--one", source)
    assert main(["list"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("mine ") and " minflash " in first and first.endswith(str(own))
    assert second.startswith("some-body/small--one ") and second.endswith(str(snapshot))
    assert " huggingface " in second and " bf16 " in second and " MB " in second
    assert main(["list", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(one["cache"], one["supported"]) for one in facts] == [
        ("minflash", True),
        ("huggingface", True),
    ]
    assert facts[1]["bytes"] == sum(file.stat().st_size for file in source.iterdir())


def test_what_is_no_model_is_passed_over(
    caches: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_hub_model("a/whole", source)
    (add_hub_model("a/half", source) / "model.safetensors").unlink()
    (add_hub_model("a/bare", source) / "config.json").unlink()
    damaged = add_hub_model("a/damaged", source)
    (damaged / "model.safetensors").resolve().write_bytes(b"\xff" * 9)
    shutil.rmtree(add_hub_model("a/unnamed", source).parent.parent / "refs")
    (caches / "hub" / "datasets--a--b").mkdir()
    other = add_hub_model("b/other", source)
    config = json.loads((other / "config.json").read_text())
    config["architectures"], config["model_type"] = ["BertModel"], "bert"
    (other / "config.json").resolve().write_text(json.dumps(config))
    assert [(model.name, model.supported) for model in hub_models()] == [
        ("a/whole", True),
        ("b/other", False),
    ]
    assert main(["list"]) == 0
    assert capsys.readouterr().out.count("(not supported by minflash)") == 1


@pytest.fixture
def shared_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Like ``caches``, in a folder that every user may enter, as pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        monkeypatch.setenv("MINFLASH_CACHE_DIR", str(folder / "own"))
        monkeypatch.delenv("HF_HUB_CACHE", raising=False)
        monkeypatch.setenv("HF_HOME", str(folder / "home"))
        yield folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody may read ``folder``; root may read all, so that root goes on as another user."""
    before, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        if user == 0:
            os.seteuid(user)
        folder.chmod(before)


def listed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["list"]) == 0
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]


def test_what_may_not_be_read_is_passed_over(
    shared_caches: Path, source: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(converted, shared_caches / "own" / "models" / "mine")
    add_hub_model("a/open", source)
    snapshot = add_hub_model("a/shut", source)
    assert listed(capsys) == ["mine", "a/open", "a/shut"]
    for folder in (snapshot, snapshot.parent, snapshot.parent.parent / "refs"):
        with locked(folder):
            assert listed(capsys) == ["mine", "a/open"]
            with pytest.raises(CheckpointError, match="a/shut: there is no such file"):
                describe("a/shut")
    for folder in (shared_caches / "home", hub_dir()):
        with locked(folder):
            assert listed(capsys) == ["mine"]


def test_a_commit_that_is_no_file_name_is_passed_over(
    caches: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_hub_model("a/whole", source)
    refs = add_hub_model("b/damaged", source).parent.parent / "refs"
    for commit in ("x" * 5000, "\0"):
        (refs / "main").write_text(commit)
        assert listed(capsys) == ["a/whole"]
        with pytest.raises(CheckpointError, match="b/damaged: there is no such file"):
            describe("b/damaged")


def test_listed_names_can_be_given_back(
    caches: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(converted, caches / "own" / "models" / "mine")
    assert main(["run", "-m", "mine", "Hi", "--max-tokens", "2"]) == 0
    assert describe("mine").name == str(own)
    assert model_folder("mine") == own
    with pytest.raises(ArgumentError, match="mine is already converted"):
        minflash.load("mine", quantize="int4")
    for name in ("mine/", "../models/mine", "min", ".", "x" * 5000):
        with pytest.raises(CheckpointError):
            model_folder(name)
    monkeypatch.chdir(caches)
    shutil.copytree(converted, caches / "mine")
    assert model_folder("mine") == Path("mine")  # what is typed as a path is one


def test_a_listed_name_of_the_hub_needs_no_network(caches: Path, source: Path) -> None:
    pytest.importorskip("huggingface_hub")
    snapshot = add_hub_model("some/body", source)
    assert describe("some/body").name == str(snapshot)
    # A process of its own, as huggingface_hub reads the environment when it is imported.
    command = [sys.executable, "-m", "minflash", "run", "-m", "some/body", "x", "--max-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list((caches / "own" / "models").glob("some--body*/config.json"))) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"HF_HOME": "$XDG_CACHE_HOME/b", "XDG_CACHE_HOME": "/c"}, "/c/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, "/h/.cache/huggingface/hub"),
    ],
)
def test_where_the_hub_keeps_its_models(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/h", **variables}.items():
        monkeypatch.setenv(name, value)
    assert os.fspath(hub_dir()) == expected


@pytest.mark.usefixtures("no_home")
def test_the_list_needs_no_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path))
    assert main(["list"]) == 0
    assert "no models" in capsys.readouterr().out
