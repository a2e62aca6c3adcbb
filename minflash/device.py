"""A GPU as the step needs it: memory, copies, one kernel launch.

CuPy is imported here and in probe.py only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .codegen import Program
from .errors import DeviceError
from .tuning import DeviceFacts

if TYPE_CHECKING:
    Launch = Callable[[NDArray[np.void]], None]

LEAST_CAPABILITY = 80


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
        """Compiles; launch functions by kernel name, each taking the argument record."""
        ...

    def synchronize(self) -> None: ...
    def free_bytes(self) -> int: ...


class CudaDevice:
    """The current CUDA device, through CuPy. Kernels run on a stream of their own."""

    def __init__(self) -> None:
        """Raises DeviceError when the card is older than sm_80."""
        import cupy

        self._cupy = cupy
        self._device = cupy.cuda.Device()
        attributes = self._device.attributes
        capability = int(self._device.compute_capability)
        self.name = cupy.cuda.runtime.getDeviceProperties(self._device.id)["name"].decode()
        if capability < LEAST_CAPABILITY:
            raise DeviceError(
                f"{self.name} has compute capability {capability / 10:.1f}; the kernel needs "
                f"{LEAST_CAPABILITY / 10:.1f} or newer (Ampere); use device='cpu'"
            )
        self.facts = DeviceFacts(
            compute_capability=capability,
            multiprocessors=attributes["MultiProcessorCount"],
            shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
        )
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._memory: list[Any] = []

    def allocate(self, nbytes: int) -> int:
        memory = self._cupy.cuda.Memory(nbytes)  # outside CuPy's pool: freed for good on release
        self._memory.append(memory)
        return int(memory.ptr)

    def release(self) -> None:
        self._memory.clear()

    def upload(self, address: int, data: NDArray[np.generic]) -> None:
        runtime = self._cupy.cuda.runtime
        runtime.memcpy(address, data.ctypes.data, data.nbytes, runtime.memcpyHostToDevice)

    def download(self, address: int, data: NDArray[np.generic]) -> None:
        runtime = self._cupy.cuda.runtime
        self.synchronize()
        runtime.memcpy(data.ctypes.data, address, data.nbytes, runtime.memcpyDeviceToHost)

    def clear(self, address: int, nbytes: int) -> None:
        self._cupy.cuda.runtime.memset(address, 0, nbytes)

    def pinned(self, nbytes: int) -> tuple[NDArray[np.uint8], int]:
        memory = self._cupy.cuda.alloc_pinned_memory(nbytes)
        array = np.frombuffer(memory, np.uint8, nbytes)
        array[:] = 0
        return array, int(memory.ptr)

    def build(self, program: Program) -> Mapping[str, Launch]:
        arch = f"sm_{self.facts.compute_capability}" + (
            "a" if self.facts.compute_capability >= 90 else ""
        )
        module = self._cupy.RawModule(code=program.source, options=("-std=c++20", f"-arch={arch}"))
        return {
            name: self._launcher(module.get_function(name), program, name) for name in program.maps
        }

    def _launcher(self, kernel: Any, program: Program, name: str) -> Launch:
        from cupy_backends.cuda.api import driver

        shared_bytes = program.maps[name].total_bytes
        kernel.max_dynamic_shared_size_bytes = shared_bytes
        if spilled := kernel.attributes["local_size_bytes"]:
            raise AssertionError(f"{name} uses {spilled} bytes of local memory")
        grid, threads = program.tuning.grid, 32 * (program.tuning.warps + 1)
        function, stream = kernel.kernel.ptr, self.stream.ptr

        def launch(args: NDArray[np.void]) -> None:
            pointers = np.array([args.ctypes.data], np.uint64)
            # Cooperative: all blocks are resident, or the launch fails.
            driver.launchCooperativeKernel(
                function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, pointers.ctypes.data
            )

        return launch

    def synchronize(self) -> None:
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
        return int(self._cupy.cuda.runtime.memGetInfo()[0])
