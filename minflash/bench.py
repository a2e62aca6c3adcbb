"""Speed of the step kernel on named shapes with random weights: ``minflash bench``.

A step's bytes are the weights it must read (the embedding counts one row) and the keys and values
of the context. The ceiling is what plain 16-byte loads read on the same card in the same run.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .against import Against
from .config import ModelConfig
from .cuda_engine import CudaEngine
from .device import CudaDevice, Device
from .gpu_memory import step_bytes
from .packing import Layout
from .profiling import PhaseTime, phase_times
from .sampling import Sampling
from .shapes import shape_config, shape_layouts
from .step_model import CHAINED, StepModel
from .tail import PLAIN, Extras, noted_tokens
from .tensors import expected_tensors
from .tuning import choose

CEILING_BYTES = 4 << 30  # that reading is measured on
_END_TO_END_TOKENS = 256
_FILTERS = Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02, seed=1)
_ALL = replace(
    _FILTERS, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1,
    logit_bias=((1, 1.0),), min_tokens=1,
)  # fmt: skip
SAMPLINGS = {
    "greedy": (Sampling(), PLAIN),
    "temperature": (Sampling(temperature=0.8, seed=1), PLAIN),
    "top_p": (Sampling(temperature=0.8, top_p=0.95, seed=1), PLAIN),
    "filters": (_FILTERS, PLAIN),
    "all": (_ALL, Extras(adjust=True, ban_ends=True, logprobs=20)),
}
_READ_KERNEL = r"""
extern "C" __global__ void __launch_bounds__(1024, 1)
read_all(const uint4* data, unsigned long long n, unsigned* sink) {
  unsigned sum = 0;
  const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
  for (unsigned long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += 4 * stride) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (i + j * stride < n) {
        const uint4 v = __ldcs(data + i + j * stride);
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
      }
  }
  if (sum == 0x12345678u) *sink = sum;
}
"""


@dataclass(frozen=True)
class BenchResult:
    """One measurement; times are medians of device time."""

    shape: str
    quant: str
    group_size: int
    context: int
    columns: int
    ms_per_step: float
    tokens_per_s: float
    step_gb: float
    gb_per_s: float
    ceiling_gb_per_s: float
    percent_of_ceiling: float
    card: str
    driver: str
    commit: str
    stages: int
    stage_bytes: int
    in_flight_bytes: int
    sampling: str  # of SAMPLINGS
    end_to_end_tokens_per_s: float | None = None  # generation through the engine; None: not asked
    phases: list[PhaseTime] | None = None  # of the in-kernel timer; None: not asked
    against: Against | None = None  # another engine at this shape and context; None: not asked


class RandomWeights:
    """Weights drawn on the GPU: codes of any value, scales that keep activations of order one."""

    def __init__(self, config: ModelConfig, matrices: dict[str, Layout]) -> None:
        self.config, self.matrices = config, matrices
        self._shapes = expected_tensors(config)

    def copy_to(self, device: Device, name: str, address: int) -> None:
        assert isinstance(device, CudaDevice)
        with device.stream:  # as the launches that read them
            self._draw(device, name, address)

    def _draw(self, device: CudaDevice, name: str, address: int) -> None:
        import cupy

        layout = self.matrices.get(name)
        if layout is None:
            device.array(address, 4 * self._shapes[name][0]).view(cupy.float32)[:] = (
                1 if name.endswith("norm") else 0
            )
            return
        nbytes = layout.row_blocks * layout.row_block_bytes
        data = device.array(address, nbytes)
        for begin in range(0, nbytes // 4, 1 << 26):  # 256 MB at a time
            part = data.view(cupy.uint32)[begin : begin + (1 << 26)]
            part[:] = cupy.random.randint(0, 1 << 32, part.size, dtype=cupy.uint32)
        self._tame(data, layout)

    def _tame(self, data: Any, layout: Layout) -> None:
        """Random bits made finite numbers: magnitudes about 1 / sqrt(cols)."""
        import cupy

        exponent = 127 - (layout.cols.bit_length() // 2)  # of float32
        if layout.type == "bf16":
            words = data.view(cupy.uint16)
            words &= 0x807F
            words |= exponent << 7
        elif layout.type == "fp16":
            words = data.view(cupy.uint16)
            words &= 0x83FF
            words |= (exponent - 112) << 10
        else:
            tiles = data.reshape(-1, layout.tile_bytes)
            if layout.type == "fp8":
                tiles[:, : layout.tile_code_bytes] &= 0xBF  # magnitudes under 2, no NaN
            typical = {"fp8": 0.5, "int8": 74.0, "int4": 4.6}[layout.type]
            scale = 1 / (typical * layout.cols**0.5)
            halves = tiles[:, layout.tile_code_bytes :].copy().view(cupy.float16)
            halves[:] = scale
            if layout.type == "int4":
                halves[:, 1::2] = -7.5 * scale
            tiles[:, layout.tile_code_bytes :] = halves.view(cupy.uint8)


def read_ceiling(device: CudaDevice) -> float:
    """GB/s of plain 16-byte loads over 4 GiB, the best of several runs."""
    import cupy

    data = cupy.zeros(CEILING_BYTES, cupy.uint8)
    sink = cupy.zeros(1, cupy.uint32)
    kernel = cupy.RawKernel(_READ_KERNEL, "read_all")
    grid = device.facts.multiprocessors

    def run() -> None:
        with device.stream:
            kernel((grid,), (1024,), (data, cupy.uint64(CEILING_BYTES // 16), sink))  # noqa: F821

    device.milliseconds(run)
    best = min(device.milliseconds(run) for _ in range(7))
    del data
    cupy.get_default_memory_pool().free_all_blocks()
    return CEILING_BYTES / best / 1e6


class Bench:
    """Measurements on one device; the ceiling is measured once."""

    def __init__(self) -> None:
        self.device = CudaDevice()
        self.ceiling = read_ceiling(self.device)

    def measure(
        self, shape: str, quant: str, *, group_size: int | None = None, context: int = 128,
        columns: int = 1, steps: int = 50, runs: int = 5, sampling: str = "greedy",
        end_to_end: bool = False, **tuning: int | bool,
    ) -> BenchResult:  # fmt: skip
        """Times ``runs`` batches of ``steps`` steps of ``columns`` tokens at ``context``.

        sampling: of SAMPLINGS, how each step chooses its token.
        end_to_end: also generates after a prompt, through the engine, around that position.
        profile=True, a field of Tuning, compiles the in-kernel timer in, which costs a little.
        """
        config = shape_config(shape)
        matrices = shape_layouts(config, quant, group_size)
        chosen = choose(config, matrices, self.device.facts, **tuning)
        weights, room = RandomWeights(config, matrices), max(64, _END_TO_END_TOKENS)
        model = StepModel(weights, self.device, context + room, tuning=chosen)
        try:
            ms = self._kernel_ms(model, context, columns, steps, runs, sampling)
            phases = phase_times(model, ms * 1e3) if chosen.profile else None
            rate = _end_to_end_rate(model, context) if end_to_end else None
        finally:
            model.close()
        gigabytes = step_bytes(config, matrices, context) / 1e9
        per_second = gigabytes / ms * 1e3
        group = matrices["layers.0.wqkv"].group_size
        stages = model.program.maps["step_one" if columns == 1 else "step_many"].stages
        return BenchResult(
            shape, quant, group, context, columns, ms, columns * 1e3 / ms, gigabytes, per_second,
            self.ceiling, 100 * per_second / self.ceiling, self.device.name, driver_version(),
            commit(), stages, chosen.stage_bytes, chosen.in_flight_bytes, sampling, rate, phases,
        )  # fmt: skip

    def _kernel_ms(
        self, model: StepModel, context: int, columns: int, steps: int, runs: int, sampling: str
    ) -> float:
        """Milliseconds of device time of one step, the median of the runs."""
        tokens = [CHAINED] if columns == 1 else list(range(columns))
        drawn, extras = SAMPLINGS[sampling]
        if extras.adjust:
            model.note_tokens(noted_tokens(model.config.vocab_size, drawn, range(context)))

        def batch() -> None:
            for _ in range(steps):
                model.step(tokens, context, sampling=drawn, extras=extras)

        model.token(model.step(list(range(1, columns + 1)), context))
        batch()
        ms = statistics.median(self.device.milliseconds(batch) / steps for _ in range(runs))
        model.wait()
        return ms


def _end_to_end_rate(model: StepModel, context: int) -> float:
    """Tokens per second that a caller of the engine sees after the first, around ``context``."""
    first = max(1, context - _END_TO_END_TOKENS // 2)
    tokens = CudaEngine.over(model).tokens([1] * first, Sampling(), _END_TO_END_TOKENS)
    next(tokens)
    begin = time.perf_counter()
    count = sum(1 for _ in tokens)
    return count / (time.perf_counter() - begin)


def driver_version() -> str:
    """The NVIDIA driver's version, or "unknown"."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"


def commit() -> str:
    """The checkout's commit, with a + when files differ from it; "" outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
