"""From the weight file to the device: each byte is copied once, straight from the mapped file.

Threads check the numbers of the tensors ahead of the copies, which also brings the file's pages in.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .packing import Layout

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .device import Device

_THREADS = 4
_TENSORS_AHEAD = 8
_PAGE_BYTES = 4096
_BAR_BYTES = 1_000_000_000  # uploads from this size on show a progress bar


class Upload:
    """A checkpoint as the weights of a StepModel. A context manager: it owns threads.

    Tensors are uploaded in any order; file order is fast.
    """

    def __init__(self, checkpoint: Checkpoint, *, progress: bool | None = None) -> None:
        """``progress``: a bar on stderr; None: when it is a terminal and the model is large."""
        self.config: ModelConfig = checkpoint.config
        self.matrices: Mapping[str, Layout] = checkpoint.matrices
        self._checkpoint = checkpoint
        self._pool = ThreadPoolExecutor(_THREADS, "minflash-upload")
        self._waiting: Iterator[str] = iter(checkpoint.names)
        self._ahead: deque[tuple[str, Future[NDArray[np.uint8]]]] = deque()
        if progress is None:
            progress = sys.stderr.isatty() and checkpoint.nbytes >= _BAR_BYTES
        self._bar = _bar(checkpoint.nbytes) if progress else None

    def copy_to(self, device: Device, name: str, address: int) -> None:
        """Copies a tensor's bytes to the device. Raises CheckpointError for bad numbers."""
        data = self._checked(name)
        device.upload(address, data)
        if self._bar is not None:
            self._bar.update(data.nbytes)

    def _checked(self, name: str) -> NDArray[np.uint8]:
        for _ in range(_TENSORS_AHEAD - len(self._ahead)):
            following = next(self._waiting, None)
            if following is not None:
                self._ahead.append((following, self._pool.submit(self._read, following)))
        if self._ahead and self._ahead[0][0] == name:
            return self._ahead.popleft()[1].result()
        return self._read(name)

    def _read(self, name: str) -> NDArray[np.uint8]:
        data = self._checkpoint.raw(name)
        data.reshape(-1)[::_PAGE_BYTES].max()  # the pages are in memory before the copy asks
        return data

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._bar is not None:
            self._bar.close()


def _bar(nbytes: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=nbytes, desc="loading", unit="B", unit_scale=True, leave=False)
