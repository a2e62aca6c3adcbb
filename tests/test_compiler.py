"""The compiler around NVRTC: what is kept, another process, and what is said when it fails."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from minflash import compiler, notice
from minflash.compiler import architecture, compile_all
from minflash.errors import DeviceError
from minflash.nvrtc import compile_with

SOURCE = 'extern "C" __global__ void nothing() {}'


def test_code_is_compiled_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path))
    jobs = {"a": (SOURCE, (architecture(90),)), "b": (SOURCE, (architecture(80),))}
    codes = {name: wait() for name, wait in compile_all(jobs).items()}
    assert all(code.startswith(b"\x7fELF") for code in codes.values())
    monkeypatch.setattr(compiler, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert {name: wait() for name, wait in compile_all(jobs).items()} == codes
    for file in (tmp_path / "kernels").iterdir():
        file.write_bytes(file.read_bytes()[:-1])  # damaged: as if it were not there
    assert compiler.load_cached(*jobs["a"]) is None


def test_other_options_are_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is chosen by a -D: without it in the key one would be launched for another."""
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path))
    source = "__device__ int table[SIZE] = {1};"
    options = [(architecture(90), f"-DSIZE={size}") for size in (1, 1000)]
    codes = [compiler.compiled(source, each) for each in options]
    assert codes[0] != codes[1]
    assert [compiler.load_cached(source, each) for each in options] == codes
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def test_another_process_compiles_without_cupy_and_with_it_where_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing CuPy would take that process longer than many kernels."""
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_source", lambda *_: pytest.fail("compiled here"))
    if (library := compiler.library_path()) is None:
        pytest.skip("the system does not tell which NVRTC is loaded")
    option = architecture(90)
    monkeypatch.setattr(compiler, "library_path", lambda: str(tmp_path / "libnvrtc.so"))
    with_cupy = compiler.compile_in_child(SOURCE, [option])
    (tmp_path / "cupy_backends.py").write_text("raise ImportError('not wanted')")
    monkeypatch.syspath_prepend(tmp_path)  # the other process finds this one
    monkeypatch.setattr(compiler, "library_path", lambda: library)
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path / "other"))
    without = compiler.compile_in_child(SOURCE, [option])
    assert without.startswith(with_cupy)  # CuPy leaves out the last byte, of value 0
    with pytest.raises(OSError, match=r"nvrtcCompileProgram .* ended with status 6"):
        compile_with(library, "nonsense", [option])


def test_without_a_compiler_or_with_a_bad_source_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path))
    with pytest.raises(DeviceError, match=r"cannot compile the kernel with -arch=sm_90a .*update"):
        compiler.compiled("nonsense", [architecture(90)])

    def missing() -> None:
        raise RuntimeError("libnvrtc.so.12 not found")

    monkeypatch.setattr(nvrtc, "getVersion", missing)
    with pytest.raises(DeviceError, match=r"not found; pip install -U nvidia-cuda-nvrtc"):
        compiler.compiled(SOURCE, [architecture(90)])


def test_a_cache_folder_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compiler, "compile_source", lambda *_: b"code")
    assert compiler.compiled(SOURCE, []) == b"code"
    assert "compiled kernels cannot be kept in" in caplog.text


def test_a_full_disk_leaves_no_half_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MINFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_source", lambda *_: b"code" * 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # bytes; more is "File too large"
    try:
        assert compiler.compiled(SOURCE, []) == b"code" * 1000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "kernels").iterdir()) == []
    assert "File too large" in caplog.text


@pytest.mark.usefixtures("no_home")
def test_without_a_home_folder_nothing_is_kept_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notice, "_said", set())
    monkeypatch.setattr(compiler, "compile_source", lambda *_: b"code")
    for _ in range(2):
        assert compiler.compiled(SOURCE, []) == b"code"
    assert caplog.text.count("compiled kernels cannot be kept") == 1
    assert "set MINFLASH_CACHE_DIR to the whole path" in caplog.text
