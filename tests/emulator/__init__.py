"""The emulated device: the kernel source in ``cuda/``, compiled by g++ and run on the CPU.

One OS thread is a block and one fiber is a CUDA thread; see ``emulated_runtime.cpp`` for what is
kept strict on purpose. Device pointers in launch arguments are addresses of NumPy buffers.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minflash.cache import file_lock

Sanitizer = Literal["thread", "address"]
Order = Literal["forward", "reverse", "random"]

FOLDER = Path(__file__).parent
ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")
SANITIZER_EXIT_CODE = 66
MOST_SMEM_BYTES = 232448  # 227 KiB, of compute capability 9.0
_SANITIZER_VARIABLE = "MINFLASH_EMULATOR_SANITIZER"
_CACHE_DAYS = 14
_REPORT_BYTES = 1 << 16
_KERNEL = re.compile(r"__global__[^;{}]*?\b(\w+)\s*\(\s*const\s+__grid_constant__\b")
_COMMON_FLAGS = (
    *("-std=c++20", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-gnu-unique"),
    # Thread-local variables as quick to read as the initial-exec model's, for which a process has
    # room in some hundred libraries only. Other processors do so by default.
    *(("-mtls-dialect=gnu2",) if platform.machine() == "x86_64" else ()),
    # Reinterpreted shared memory is normal in device code; sums must not depend on the CPU.
    *("-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno"),
)
# Of blocks, by their number of threads: addresses that all modules share. See fiber.h.
_idle_stacks: defaultdict[int, list[int]] = defaultdict(list)
_SANITIZER_FLAGS: Mapping[str | None, tuple[str, ...]] = {
    None: (),
    "thread": ("-fsanitize=thread", "-g1"),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"),
}


class EmulatorError(Exception):
    """The source did not compile, or a launch ended in a deadlock or a broken rule."""


def compiler() -> str:
    """The C++ compiler: the variable CXX, else g++."""
    return os.environ.get("CXX", "g++")


def active_sanitizer() -> Sanitizer | None:
    """The sanitizer this process was started under by ``run_sanitized``."""
    name = os.environ.get(_SANITIZER_VARIABLE)
    return name if name in ("thread", "address") else None  # type: ignore[return-value]


class EmulatedModule:
    """A kernel source, compiled and loaded.

    ``source`` is the one string that is given to NVRTC on a GPU: it begins with the text of
    ``cuda/ptx.cuh``. ``sanitizer`` None means the one this process runs under, if any; naming one
    in a process that was not started by ``run_sanitized`` is an error, as it cannot be loaded
    later. ``defines`` are macros, "NAME" or "NAME=VALUE". ``optimize`` is the -O level.
    """

    def __init__(
        self,
        source: str,
        *,
        sanitizer: Sanitizer | None = None,
        defines: Sequence[str] = (),
        optimize: int = 2,
    ) -> None:
        sanitizer = sanitizer or active_sanitizer()
        if sanitizer != active_sanitizer():
            raise EmulatorError(
                f"a module with the {sanitizer} sanitizer runs only in a process started by "
                "emulator.run_sanitized"
            )
        self.kernels: tuple[str, ...] = tuple(_KERNEL.findall(source))
        if not self.kernels:
            raise EmulatorError(
                "the source has no kernel of the form "
                "`__global__ void name(const __grid_constant__ Args args)`"
            )
        flags = (f"-O{optimize}", *_SANITIZER_FLAGS[sanitizer], *(f"-D{name}" for name in defines))
        self.path = _compile(source + _trampolines(self.kernels), flags, sanitizer)
        self._library = ctypes.CDLL(str(self.path))
        self._library.emulated_new_stacks.restype = ctypes.c_void_p

    def launch(
        self,
        kernel: str,
        grid: int,
        threads: int,
        smem_bytes: int,
        args: np.ndarray[Any, Any] | np.void,
        *,
        order: Order = "forward",
        seed: int = 0,
        timeout_s: float = 20,
        allow_unlanded: bool = False,
    ) -> None:
        """Run ``kernel`` to its end with ``args`` (0-d or one element, structured) by value.

        ``order`` is the order in which the warps of a block, and the lanes of a warp, are visited;
        a warp runs ahead until it blocks, but in the random order others may come in between.
        ``seed`` sets the order in which copies land; ``seed % 3`` how eagerly: only when nobody can
        run (0), sometimes earlier (1), often earlier (2). ``timeout_s`` is how long every block may
        be stuck before the launch ends with a report. ``allow_unlanded`` accepts copies that are
        still in flight when a block ends. Raises EmulatorError with the report.
        """
        if kernel not in self.kernels:
            raise EmulatorError(f"no kernel {kernel!r}; the source has {', '.join(self.kernels)}")
        if threads % 32 != 0 or not 32 <= threads <= 1024:
            raise EmulatorError(f"{threads} threads: a multiple of 32 from 32 to 1024 is needed")
        if grid < 1 or not 0 <= smem_bytes <= MOST_SMEM_BYTES:
            raise EmulatorError(
                f"grid {grid}, {smem_bytes} bytes of shared memory: at least 1 block is needed, "
                f"and no device gives a block more than {MOST_SMEM_BYTES} bytes"
            )
        image = args.tobytes()
        self._check_size(kernel, len(image))
        report = ctypes.create_string_buffer(_REPORT_BYTES)
        idle = _idle_stacks[threads]
        stacks = [
            idle.pop() if idle else self._library.emulated_new_stacks(threads) for _ in range(grid)
        ]
        status = self._library.emulated_launch(
            getattr(self._library, f"emulated_kernel_{kernel}"),
            image,
            ctypes.c_uint64(len(image)),
            ctypes.c_uint32(grid),
            ctypes.c_uint32(threads),
            ctypes.c_uint64(smem_bytes),
            ctypes.c_int(ORDERS.index(order)),
            ctypes.c_uint64(seed),
            ctypes.c_double(timeout_s),
            ctypes.c_int(allow_unlanded),
            report,
            ctypes.c_uint64(_REPORT_BYTES),
            (ctypes.c_void_p * grid)(*stacks),
        )
        idle += filter(None, stacks)
        if status != 0:
            raise EmulatorError(f"kernel {kernel}: {report.value.decode(errors='replace')}")

    def _check_size(self, kernel: str, nbytes: int) -> None:
        size = getattr(self._library, f"emulated_args_bytes_{kernel}")
        size.restype = ctypes.c_uint64
        if size() != nbytes:
            raise EmulatorError(f"kernel {kernel} takes {size()} bytes of arguments, not {nbytes}")


def run_sanitized(
    arguments: Sequence[str],
    sanitizer: Sanitizer,
    *,
    suppressions: Sequence[str] = (),
    timeout_s: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` with a sanitizer loaded; exit code 66 means that it found something.

    In that process every EmulatedModule is compiled with the sanitizer. ThreadSanitizer and
    AddressSanitizer must be in a process from its start, hence a process of its own.
    ``suppressions`` are ThreadSanitizer's, such as "race:name_of_a_function_in_either_stack".
    """
    with tempfile.NamedTemporaryFile("w", suffix=".supp") as file:
        file.write("\n".join(suppressions))
        file.flush()
        command = [*_without_address_randomization(), sys.executable, *arguments]
        return subprocess.run(
            command,
            env=_sanitizer_environment(sanitizer, file.name),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def _sanitizer_environment(sanitizer: Sanitizer, suppressions: str) -> dict[str, str]:
    return os.environ | {
        _SANITIZER_VARIABLE: sanitizer,
        "LD_PRELOAD": " ".join(_sanitizer_libraries(sanitizer)),
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
        # Python itself is not instrumented; only the device code is looked at.
        "TSAN_OPTIONS": f"halt_on_error=1 exitcode={SANITIZER_EXIT_CODE} "
        f"ignore_noninstrumented_modules=1 report_signal_unsafe=0 suppressions={suppressions}",
        "ASAN_OPTIONS": f"exitcode={SANITIZER_EXIT_CODE} detect_leaks=0",
        "UBSAN_OPTIONS": f"exitcode={SANITIZER_EXIT_CODE} print_stacktrace=1",
    }


@cache
def _without_address_randomization() -> tuple[str, ...]:
    """``setarch -R`` where it may be used: older ThreadSanitizers refuse very random addresses."""
    command = ("setarch", os.uname().machine, "-R")
    try:
        done = subprocess.run([*command, "true"], capture_output=True, check=False)
    except OSError:
        return ()
    return command if done.returncode == 0 else ()


@cache
def _sanitizer_libraries(sanitizer: Sanitizer) -> tuple[str, ...]:
    names = {"thread": ("libtsan.so",), "address": ("libasan.so", "libubsan.so")}[sanitizer]
    paths = []
    for name in names:
        done = subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        path = done.stdout.strip()
        if not os.path.isabs(path):
            raise EmulatorError(f"{compiler()} has no {name}: install the compiler's sanitizers")
        paths.append(path)
    return tuple(paths)


def _trampolines(kernels: Sequence[str]) -> str:
    """C functions that call each kernel with the bytes of its arguments and tell their size."""
    exported = 'extern "C" __attribute__((visibility("default")))'
    lines = ['\n#line 1 "trampolines"']
    for name in kernels:
        lines += [
            f"{exported} void emulated_kernel_{name}(const void* args)"
            f" {{ emulated_call({name}, args); }}",
            f"{exported} unsigned long long emulated_args_bytes_{name}()"
            f" {{ return emulated_args_bytes({name}); }}",
        ]
    return "\n".join(lines) + "\n"


@cache
def _version() -> str:
    """The compiler's version and the emulator's own files, which every key of the cache holds."""
    done = subprocess.run([compiler(), "--version"], capture_output=True, check=True)
    digest = hashlib.sha256(done.stdout)
    for path in sorted(FOLDER.glob("*.[hc]*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Compiled modules: MINFLASH_EMULATOR_CACHE, else a folder of this user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MINFLASH_EMULATOR_CACHE") or Path(home) / "minflash-emulator")


def _cached(key_parts: Sequence[str], suffix: str) -> tuple[Path, bool]:
    """The place of a compiled file and whether it is there already."""
    text = "\0".join((_version(), *_COMMON_FLAGS, *key_parts))
    path = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}{suffix}"
    if path.exists():
        os.utime(path)
        return path, True
    cache_folder().mkdir(parents=True, exist_ok=True)
    for old in cache_folder().iterdir():
        with contextlib.suppress(OSError):  # another process has removed it, or compiles in it
            if old.stat().st_mtime < time.time() - _CACHE_DAYS * 86400:
                old.unlink()
    return path, False


@contextlib.contextmanager
def _made_once(path: Path) -> Iterator[Path | None]:
    """A folder to compile in, or None if another process has made ``path`` in the meantime."""
    with file_lock(path.with_suffix(".lock")):
        if path.exists():
            yield None
        else:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                yield Path(folder)


def _compile(source: str, flags: Sequence[str], sanitizer: Sanitizer | None) -> Path:
    path, ready = _cached((source, *flags, "runtime", *_runtime_flags(sanitizer)), ".so")
    if not ready:
        runtime = _compile_runtime(sanitizer)
        with _made_once(path) as folder:
            if folder:
                text = folder / "kernel.cpp"
                text.write_text(source)
                _run_compiler([*flags, "-shared", str(text), str(runtime)], folder / "out", path)
    return path


def _runtime_flags(sanitizer: Sanitizer | None) -> tuple[str, ...]:
    """Loops that move bytes must not become memcpy, which sanitizers intercept."""
    defines = [f"-DEMULATED_{sanitizer.upper()}_SANITIZER"] if sanitizer else []
    return ("-O3", "-fno-tree-loop-distribute-patterns", *defines)


def _compile_runtime(sanitizer: Sanitizer | None) -> Path:
    """The emulator itself, never instrumented: it tells the sanitizer what its fibers do."""
    flags = _runtime_flags(sanitizer)
    path, ready = _cached(flags, ".o")
    if not ready:
        with _made_once(path) as folder:
            if folder:
                source = FOLDER / "emulated_runtime.cpp"
                _run_compiler([*flags, "-c", str(source)], folder / "out", path)
    return path


def _run_compiler(arguments: Sequence[str], out: Path, path: Path) -> None:
    """Compile to ``out``, then rename to ``path``: another process never sees half a file."""
    command = [compiler(), *_COMMON_FLAGS, f"-I{FOLDER}", *arguments, "-o", str(out)]
    # The compiler is no part of what a sanitizer watches.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EmulatorError(f"{compiler()} failed:\n{done.stderr}")
    os.replace(out, path)
