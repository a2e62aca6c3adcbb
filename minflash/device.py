"""A GPU as the step needs it: memory, copies, one kernel launch.

CuPy is imported here and in probe.py only.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .codegen import PREFILLS, Program
from .compiler import OPTIONS, architecture, compile_all
from .errors import DeviceError
from .probe import cuda_problem
from .tuning import DeviceFacts

if TYPE_CHECKING:
    Launch = Callable[[NDArray[np.void]], None]

_LOCAL_BYTES, _MAX_DYNAMIC_SHARED_BYTES = 3, 8  # CUfunction_attribute


class Device(Protocol):
    """What runs a step. Addresses are plain integers."""

    facts: DeviceFacts

    def allocate(self, nbytes: int) -> int: ...
    def release(self) -> None:
        """Gives back everything allocated. May be called twice."""
        ...

    def upload(self, address: int, data: NDArray[np.generic]) -> None: ...
    def download(self, address: int, data: NDArray[np.generic]) -> None:
        """Waits for all launches, then fills ``data``."""
        ...

    def clear(self, address: int, nbytes: int) -> None: ...
    def pinned(self, nbytes: int) -> tuple[NDArray[np.uint8], int]:
        """Zeroed host memory that kernels write to: as an array, and as the device sees it."""
        ...

    def build(self, program: Program) -> Mapping[str, Launch]:
        """Launch functions by kernel name, each taking the argument record.

        May return before the kernels are compiled; asking for one waits for it.
        """
        ...

    def synchronize(self) -> None: ...
    def free_bytes(self) -> int: ...


class Kernels(Mapping[str, "Launch"]):
    """Launch functions by kernel name; asking for one waits for its compilation."""

    def __init__(self, device: CudaDevice, program: Program) -> None:
        arch = architecture(device.facts.compute_capability)
        self._device, self._program = device, program
        self._code = compile_all({
            name: (program.source_of(name), (*OPTIONS, arch, f"-DONLY_{name.upper()}"))
            for name in (*program.maps, *PREFILLS)
        })  # fmt: skip

    def __getitem__(self, name: str) -> Launch:
        return self._device.launcher(self._code[name](), self._program, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._code)

    def __len__(self) -> int:
        return len(self._code)


class CudaDevice:
    """The current CUDA device, through CuPy. Everything happens on a stream of its own.

    May be used by any thread, one at a time; the thread's current device stays as it was.
    """

    def __init__(self) -> None:
        """Raises DeviceError when CUDA cannot be used here, with the way out."""
        if problem := cuda_problem():
            raise DeviceError(f"{problem}; device='cpu' always works")
        import cupy

        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        device = cupy.cuda.Device()
        self.id = int(device.id)
        capability = int(device.compute_capability)
        self.name = self._runtime.getDeviceProperties(self.id)["name"].decode()
        self.facts = DeviceFacts(
            compute_capability=capability,
            multiprocessors=device.attributes["MultiProcessorCount"],
            shared_bytes=device.attributes["MaxSharedMemoryPerBlockOptin"],
        )
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._memory: list[Any] = []
        self.local_bytes: dict[str, int] = {}  # of each loaded kernel: 0 unless registers spill

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """This device is the thread's current one within, and what CUDA raises is a DeviceError."""
        before = self._runtime.getDevice()
        self._runtime.setDevice(self.id)  # also where it is current: a new thread has no context
        try:
            yield
        except (self._runtime.CUDARuntimeError, self._driver_error) as error:
            raise DeviceError(_cuda_failed(error)) from error
        finally:
            if before != self.id:
                self._runtime.setDevice(before)

    @property
    def _driver_error(self) -> type[Exception]:
        from cupy_backends.cuda.api import driver

        error: type[Exception] = driver.CUDADriverError
        return error

    def allocate(self, nbytes: int) -> int:
        with self._current():
            try:
                memory = self._cupy.cuda.Memory(nbytes)  # outside CuPy's pool: freed on release
            except self._cupy.cuda.memory.OutOfMemoryError as error:
                raise DeviceError(
                    f"the GPU has no {nbytes / 1e9:.2f} GB in one piece, "
                    f"{self.free_bytes() / 1e9:.2f} GB are free; close other programs on it, or "
                    "take a smaller model or max_context"
                ) from error
        self._memory.append(memory)
        return int(memory.ptr)

    def release(self) -> None:
        self._memory.clear()

    def upload(self, address: int, data: NDArray[np.generic]) -> None:
        runtime = self._runtime
        with self._current():  # on the stream, so that launches come after it
            runtime.memcpyAsync(
                address, data.ctypes.data, data.nbytes, runtime.memcpyHostToDevice, self.stream.ptr
            )

    def download(self, address: int, data: NDArray[np.generic]) -> None:
        runtime = self._runtime
        self.synchronize()
        with self._current():
            runtime.memcpy(data.ctypes.data, address, data.nbytes, runtime.memcpyDeviceToHost)

    def clear(self, address: int, nbytes: int) -> None:
        with self._current():
            self._runtime.memsetAsync(address, 0, nbytes, self.stream.ptr)

    def pinned(self, nbytes: int) -> tuple[NDArray[np.uint8], int]:
        with self._current():
            memory = self._cupy.cuda.PinnedMemory(nbytes)
        self._memory.append(memory)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(memory.ptr))
        array[:] = 0
        return array, int(memory.ptr)

    def build(self, program: Program) -> Mapping[str, Launch]:
        return Kernels(self, program)

    @property
    def bus_gb_per_s(self) -> float | None:
        """What clock and width of the memory allow, both edges of the clock; None: not told."""
        found = self._cupy.cuda.Device(self.id).attributes
        kilohertz, bits = (found.get(k, 0) for k in ("MemoryClockRate", "GlobalMemoryBusWidth"))
        return 2 * kilohertz * 1e3 * bits / 8 / 1e9 or None

    def launcher(self, code: bytes, program: Program, name: str) -> Launch:
        """Loads a kernel; its module stays loaded as long as the function lives."""
        from cupy_backends.cuda.api import driver

        threads, shared_bytes = program.launch_shape(name)
        with self._current():
            module = self._cupy.cuda.function.Module()
            module.load(code)
            kernel = module.get_function(name)
            driver.funcSetAttribute(kernel.ptr, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
            self.local_bytes[name] = driver.funcGetAttribute(_LOCAL_BYTES, kernel.ptr)
        grid = program.tuning.grid
        function, current, stream = kernel.ptr, self._current, self.stream.ptr

        def launch(args: NDArray[np.void], module: object = module) -> None:
            pointers = np.array([args.ctypes.data], np.uint64)
            with current():  # cooperative: all blocks are resident, or the launch fails
                driver.launchCooperativeKernel(
                    function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, pointers.ctypes.data
                )

        return launch

    def synchronize(self) -> None:
        with self._current():
            self.stream.synchronize()

    def milliseconds(self, run: Callable[[], None]) -> float:
        """Device time of what ``run`` launches."""
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        begin.record(self.stream)
        run()
        end.record(self.stream)
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(begin, end))

    def array(self, address: int, nbytes: int) -> Any:
        """Device memory as a CuPy array of uint8."""
        memory = self._cupy.cuda.UnownedMemory(address, nbytes, self)
        return self._cupy.ndarray(
            (nbytes,), self._cupy.uint8, self._cupy.cuda.MemoryPointer(memory, 0)
        )

    def free_bytes(self) -> int:
        with self._current():
            return int(self._runtime.memGetInfo()[0])


def _cuda_failed(error: Exception) -> str:
    return (
        f"CUDA failed: {' '.join(str(error).split())}; if the next call fails too, only a new "
        "process helps, as the GPU's state in this one is lost"
    )
