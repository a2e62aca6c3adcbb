"""NVRTC by its C interface (nvrtc.h), for a process that compiles and does nothing else.

CuPy's binding imports all of CuPy and the driver with it, which takes such a process 0.6 s.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path


def library_path() -> str | None:
    """The file of the NVRTC that CuPy uses in this process; None where the system does not tell."""
    from cupy_backends.cuda.libs import nvrtc

    nvrtc.getVersion()  # loads it
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    files = (line.partition("/")[2] for line in lines)
    return next(("/" + file for file in files if "/libnvrtc.so" in "/" + file), None)


def compile_with(library: str, source: str, options: Sequence[str]) -> bytes:
    """The cubin of ``source``. Raises OSError when the library is not there, or refuses.

    The program is not destroyed: the process ends with it.
    """
    nvrtc = ctypes.CDLL(library)

    def call(name: str, *args: object) -> None:
        if status := nvrtc[name](*args):
            raise OSError(f"{name} of {library} ended with status {status}")

    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    wanted = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"step.cu", 0, None, None)
    call("nvrtcCompileProgram", program, len(options), wanted)
    call("nvrtcGetCUBINSize", program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    call("nvrtcGetCUBIN", program, code)
    return code.raw
