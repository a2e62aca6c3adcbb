"""Compiling CUDA source with NVRTC, and a cache of what it made.

A kernel takes NVRTC three seconds. What it made is kept in the cache folder under a hash of the
source and the options, so that a second start compiles nothing and does not even load NVRTC.

CuPy's RawModule is not used: it adds options of its own (a second -arch), compiles an empty program
at each start to learn the compiler's version, and never unloads a module.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .cache import cache_dir
from .errors import DeviceError, MinflashError
from .notice import say_once
from .nvrtc import compile_with, library_path

OPTIONS = ("-std=c++20", "-ftz=true")  # numbers below 2^-126 count as zero
_DIGEST_BYTES = 32
_CHILD = "from minflash.compiler import serve; serve()"


def architecture(compute_capability: int) -> str:
    """The option for a device: 90 -> "-arch=sm_90a", with what only that architecture has."""
    suffix = "a" if compute_capability >= 90 else ""
    return f"-arch=sm_{compute_capability}{suffix}"


def compile_all(
    jobs: Mapping[str, tuple[str, Sequence[str]]],
) -> Mapping[str, Callable[[], bytes]]:
    """Machine code of several jobs {name: (source, options)}.

    Returns at once with a function for each name that waits for the code. What the cache lacks is
    compiled at the same time in processes of its own: NVRTC takes the threads of one by turns. The
    first job, the longest, is done here.
    The functions raise DeviceError when NVRTC is missing.
    """
    missing = [name for name, job in jobs.items() if load_cached(*job) is None]
    pool = ThreadPoolExecutor(max(1, len(missing)), "minflash-compile")
    results: dict[str, Callable[[], bytes]] = {}
    for name, (source, options) in jobs.items():
        run = compile_in_child if name in missing[1:] else compiled
        future: Future[bytes] = pool.submit(run, source, tuple(options))
        results[name] = future.result
    pool.shutdown(wait=False)
    return results


def compiled(source: str, options: Sequence[str], library: str | None = None) -> bytes:
    """The machine code of ``source`` (a cubin), from the cache when it holds it.

    library: the file of an NVRTC, to be used without importing CuPy if that works.
    """
    code = load_cached(source, options)
    if code is None:
        code = _without_cupy(library, source, options) or compile_source(source, options)
        _save(source, options, code)
    return code


def _without_cupy(library: str | None, source: str, options: Sequence[str]) -> bytes | None:
    try:
        return compile_with(library, source, options) if library else None
    except OSError:  # compile_source() tells what is wrong, if anything is
        return None


def compile_in_child(source: str, options: Sequence[str]) -> bytes:
    """As ``compiled``, in another Python process; in this one where that does not work."""
    parent = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([parent, *sys.path])}
    environment["OPENBLAS_NUM_THREADS"] = "1"  # importing CuPy loads it: threads nobody needs
    library = _library()
    if library:  # finds its other half there
        folders = (str(Path(library).parent), environment.get("LD_LIBRARY_PATH"))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    request = "\0".join((library or "", source, *options)).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=request, env=environment, capture_output=True, check=False,
        )  # fmt: skip
        worked = done.returncode == 0
    except OSError:  # an embedded Python has no executable of its own
        worked = False
    return done.stdout if worked else compiled(source, options)


def _library() -> str | None:
    try:
        return library_path()
    except Exception:  # CuPy raises many kinds; compile_source() tells them
        return None


def serve() -> None:
    """The other process of ``compile_in_child``: its request on stdin, code on stdout."""
    library, source, *options = sys.stdin.buffer.read().decode().split("\0")
    sys.stdout.buffer.write(compiled(source, options, library or None))


def compile_source(source: str, options: Sequence[str]) -> bytes:
    """What NVRTC makes of ``source``. Raises DeviceError without NVRTC or when it refuses."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        version = nvrtc.getVersion()
    except Exception as error:  # CuPy raises many kinds when a library cannot be loaded
        raise DeviceError(f"no CUDA compiler (NVRTC) can be loaded: {_way_out(error)}") from error
    program = nvrtc.createProgram(source, "step.cu", (), ())
    try:
        nvrtc.compileProgram(program, tuple(options))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise DeviceError(
            f"NVRTC {version[0]}.{version[1]} cannot compile the kernel with "
            f"{' '.join(options)} ({error}); update it: {_install()}\n"
            f"{nvrtc.getProgramLog(program)[:2000]}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def load_cached(source: str, options: Sequence[str]) -> bytes | None:
    """The code that the cache holds, None when it holds none or a damaged one."""
    try:
        data = _cache_path(source, options).read_bytes()
    except (OSError, MinflashError):  # MinflashError: there is no cache folder
        return None
    digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _cache_path(source: str, options: Sequence[str]) -> Path:
    key = hashlib.sha256("\0".join((source, *options)).encode()).hexdigest()
    return cache_dir() / "kernels" / f"{key[:32]}.cubin"


def _save(source: str, options: Sequence[str], code: bytes) -> None:
    """Into the cache; one warning where that cannot be done, for the code serves without it."""
    try:
        path = _cache_path(source, options)
    except MinflashError as error:
        say_once(f"compiled kernels cannot be kept, each start compiles them anew: {error}")
        return
    try:
        _write(path, hashlib.sha256(code).digest() + code)
    except OSError as error:
        say_once(
            f"compiled kernels cannot be kept in {path.parent} ({error.strerror}), so that each "
            "start compiles them anew; set MINFLASH_CACHE_DIR to a folder that can be written"
        )


def _write(path: Path, data: bytes) -> None:
    """Written beside the goal, then renamed: another process never sees half a file.

    What a full disk has cut short is removed: nothing else would ever do so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        beside = Path(file.name)
        try:
            file.write(data)
            file.flush()  # a full disk shows here, not when the file is closed
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def _way_out(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:200]}; {_install()}"


def _install() -> str:
    try:
        import cupy

        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    except Exception:
        major = 12
    return f"pip install -U nvidia-cuda-nvrtc{'-cu12' if major == 12 else ''}"
