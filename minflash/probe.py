"""Can CUDA be used here? If not: what is missing, and what to do about it."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

LEAST_CAPABILITY = (8, 0)  # compute capability: cp.async and bf16 products


def cuda_problem() -> str | None:
    """Why CUDA cannot be used here, with the way out; None when it can."""
    return _driver_problem() or _cupy_problem() or _card_problem()


def _driver_problem() -> str | None:
    # Asked before CuPy, whose import takes most of a second that a machine without a GPU can save.
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return (
            "no NVIDIA driver was found (libcuda.so.1); a GPU needs one from nvidia.com/drivers, "
            "and a container must be started with the GPU, as in docker run --gpus all"
        )
    return None


def _cupy_problem() -> str | None:
    _prepare_cupy_cache()
    try:
        import cupy
    except ModuleNotFoundError:
        return "CuPy is not installed; pip install cupy-cuda12x"
    except Exception as error:  # CuPy raises many kinds when its libraries do not fit together
        return f"CuPy cannot be imported ({_one_line(error)}); install cupy-cuda12x again"
    runtime = cupy.cuda.runtime
    if runtime.driverGetVersion() == 0:
        return "the NVIDIA driver does not answer (version 0); check that nvidia-smi works"
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if "nsufficient" in str(error):
            return _too_old(runtime.driverGetVersion(), runtime.runtimeGetVersion())
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "check that nvidia-smi shows a GPU"
        if visible is not None:
            hint = f"CUDA_VISIBLE_DEVICES is {visible!r}; unset it or name a GPU that exists"
        return f"the NVIDIA driver offers no GPU ({_one_line(error)}); {hint}"
    return None


def _too_old(driver: int, needed: int) -> str:
    """driver, needed: versions of CUDA, such as 12040 for 12.4."""
    return (
        f"the NVIDIA driver is too old: it offers CUDA {driver // 1000}.{driver % 1000 // 10}, and "
        f"CuPy needs {needed // 1000}.{needed % 1000 // 10}; update the driver (nvidia.com/drivers)"
    )


def _card_problem() -> str | None:
    import cupy

    runtime = cupy.cuda.runtime
    card = runtime.getDeviceProperties(runtime.getDevice())
    if (card["major"], card["minor"]) >= LEAST_CAPABILITY:
        return None
    return (
        f"{card['name'].decode()} has compute capability {card['major']}.{card['minor']}, and the "
        "kernel needs {}.{} (Ampere) or newer".format(*LEAST_CAPABILITY)
    )


def _prepare_cupy_cache() -> None:
    """CuPy's import fails when its cache folder cannot be made: point it elsewhere then."""
    if "CUPY_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path("~/.cupy/kernel_cache").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        pass
    os.environ["CUPY_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"cupy-cache-{os.getuid()}"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
