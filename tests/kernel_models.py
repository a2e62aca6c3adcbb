"""Small random models for the kernel's tests, devices to run them, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from emulator import EmulatedModule, Order
from numpy.typing import NDArray

from minflash.codegen import PREFILLS, Program
from minflash.config import ModelConfig, RopeConfig
from minflash.device import CudaDevice, Device
from minflash.numeric import bf16_to_fp32, fp32_to_bf16
from minflash.packing import Layout, Matrix, pack
from minflash.quantize import quantize
from minflash.reference import Reference
from minflash.step_model import StepModel
from minflash.tensors import expected_tensors
from minflash.tuning import DeviceFacts, choose

Array = NDArray[Any]
Launch = Callable[[NDArray[np.void]], None]

TINY = ModelConfig(
    architecture="llama", dim=96, hidden_dim=160, head_dim=64, n_layers=2, n_heads=3, n_kv_heads=1,
    vocab_size=331, max_context=512, norm_eps=1e-5, rope=RopeConfig(), tied=True, qkv_bias=False,
    out_bias=False, mlp_bias=False, qk_norm=False, windows=(0, 0),
)  # fmt: skip


def model_config(**changes: Any) -> ModelConfig:
    """TINY with changes; one window stands for all layers."""
    config = replace(TINY, **changes)
    if len(config.windows) != config.n_layers:
        config = replace(config, windows=(config.windows[0],) * config.n_layers)
    return config


class RandomModel:
    """A checkpoint in memory: as much of ``Checkpoint`` as the reference and StepModel use."""

    def __init__(
        self,
        config: ModelConfig,
        type: str,
        group: int = 0,
        head: tuple[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        """head: type and group size of the embedding and the output head; None: like the layers."""
        self.config = config
        rng = np.random.default_rng(seed)
        self._matrices: dict[str, Matrix] = {}
        self._vectors: dict[str, NDArray[np.float32]] = {}
        for name, shape in expected_tensors(config).items():
            if len(shape) == 2:
                outer = name in ("embed", "lm_head") and head is not None
                t, g = head if outer and head else (type, group)
                # logits of order 1 to 3, residual of order 1
                scale = 1.0 if name == "embed" and not config.tied else 2.0 / np.sqrt(shape[1])
                values = rng.standard_normal(shape).astype(np.float32) * np.float32(scale)
                self._matrices[name] = quantize(values, t, g, search=False)
            else:
                mean = 1.0 if name.endswith("norm") else 0.0
                random = mean + 0.3 * rng.standard_normal(shape)
                self._vectors[name] = random.astype(np.float32)

    @property
    def matrices(self) -> Mapping[str, Layout]:
        return {name: matrix.layout for name, matrix in self._matrices.items()}

    def put(self, name: str, values: Matrix | NDArray[np.float32]) -> None:
        """Replaces a matrix or a vector."""
        if isinstance(values, Matrix):
            self._matrices[name] = values
        else:
            self._vectors[name] = values.astype(np.float32)

    def matrix(self, name: str) -> Matrix:
        return self._matrices[name]

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._vectors[name]

    def raw(self, name: str) -> NDArray[np.uint8]:
        if name in self._vectors:
            return self._vectors[name].view(np.uint8)
        return pack(self._matrices[name])

    def copy_to(self, device: Device, name: str, address: int) -> None:
        device.upload(address, self.raw(name))


def crowded_model(vocab_size: int = 331) -> RandomModel:
    """Logits that are nearly equal, but for a few of the tokens 3 to 8 above and below them."""
    config = model_config(dim=64, hidden_dim=32, n_layers=1, tied=False, vocab_size=vocab_size)
    model, rng = RandomModel(config, "bf16"), np.random.default_rng(2)
    head = 0.5 * rng.standard_normal(64) * (1 + 0.002 * rng.standard_normal((vocab_size, 64)))
    head[3:5] *= [[1.2], [0.8]]
    head[5:7], head[7:9] = 1.1 * head[0], 0.9 * head[0]  # pairs of equals
    model.put("lm_head", quantize(head.astype(np.float32), "bf16"))
    return model


# Devices


@cache
def compiled(source: str, optimize: int = 0) -> EmulatedModule:
    """Compiling takes longer than running, hence without optimization."""
    return EmulatedModule(source, optimize=optimize)


class EmulatedDevice:
    """minflash.device.Device over the emulator: device memory is NumPy's."""

    def __init__(
        self,
        grid: int = 2,
        *,
        capability: int = 90,
        shared_bytes: int = 101376,
        order: Order = "forward",
        seed: int = 0,
        timeout_s: float = 60,
        edit: Callable[[str], str] | None = None,
    ) -> None:
        """edit: a change of the source, to plant a bug."""
        self.facts = DeviceFacts(capability, grid, shared_bytes)
        self.order, self.seed, self.timeout_s = order, seed, timeout_s
        self.edit = edit or (lambda source: source)
        self._arrays: dict[int, NDArray[np.uint8]] = {}
        self.launches: list[str] = []
        self.before_launch: Callable[[NDArray[np.void]], None] = lambda args: None

    def _new(self, nbytes: int, fill: int) -> tuple[NDArray[np.uint8], int]:
        whole = np.full(nbytes + 256, fill, np.uint8)
        start = -whole.ctypes.data % 256
        array = whole[start : start + nbytes]
        self._arrays[array.ctypes.data] = array
        return array, array.ctypes.data

    def allocate(self, nbytes: int) -> int:
        return self._new(nbytes, 0xFF)[1]

    def release(self) -> None:
        self._arrays.clear()

    def _view(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        for base, array in self._arrays.items():
            if base <= address and address + nbytes <= base + array.nbytes:
                return array[address - base : address - base + nbytes]
        raise AssertionError("a copy outside device memory")

    def upload(self, address: int, data: NDArray[np.generic]) -> None:
        plain = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._view(address, data.nbytes)[:] = plain

    def download(self, address: int, data: NDArray[np.generic]) -> None:
        data.reshape(-1).view(np.uint8)[:] = self._view(address, data.nbytes)

    def clear(self, address: int, nbytes: int) -> None:
        self._view(address, nbytes)[:] = 0

    def pinned(self, nbytes: int) -> tuple[NDArray[np.uint8], int]:
        return self._new(nbytes, 0)

    def build(self, program: Program) -> Mapping[str, Launch]:
        compiled(self.edit(program.source))

        def launcher(name: str) -> Launch:
            def launch(args: NDArray[np.void]) -> None:
                self.before_launch(args)
                self.launches.append(name)
                threads, shared = program.launch_shape(name)
                assert shared <= self.facts.shared_bytes
                compiled(self.edit(program.source_of(name))).launch(
                    name, program.tuning.grid, threads, shared, args,
                    order=self.order, seed=self.seed, timeout_s=self.timeout_s,
                )  # fmt: skip

            return launch

        return {name: launcher(name) for name in (*program.maps, *PREFILLS)}

    def synchronize(self) -> None: ...

    def free_bytes(self) -> int:
        return 1 << 34


class CountingCudaDevice(CudaDevice):
    """A GPU that notes every launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []

    def build(self, program: Program) -> Mapping[str, Launch]:
        def counted(name: str, launch: Launch) -> Launch:
            def run(args: NDArray[np.void]) -> None:
                self.launches.append(name)
                launch(args)

            return run

        return {name: counted(name, launch) for name, launch in super().build(program).items()}


@dataclass(frozen=True)
class Run:
    """How a model is run. A GPU runs its blocks and warps in whatever order it likes."""

    grid: int | None = 2  # blocks; None: all multiprocessors (13 of the emulated device)
    order: Order = "forward"
    seed: int = 0
    capability: int = 90  # 80: cp.async in place of bulk copies
    shared_bytes: int = 101376  # of a block
    small: bool = True  # a small ring and short splits, so that tiny models go round them often
    prefetch: int = 0  # chunks
    kv_type: str | None = None
    max_context: int | None = None
    edit: Callable[[str], str] | None = None  # emulated only: plants a bug
    timeout_s: float = 60  # emulated only


def two_panels(type: str, group: int = 0) -> tuple[RandomModel, Run]:
    """So little shared memory that W_down's input of one column is two panels, both as wide."""
    hidden_dim = {"bf16": 17920, "int4": 17408}[type]
    config = model_config(dim=64, hidden_dim=hidden_dim, n_heads=2, n_layers=1, vocab_size=130)
    return RandomModel(config, type, group), Run(shared_bytes=52736)


class Machine:
    """Opens models on one kind of device, ``emulated`` or ``cuda``, and closes them all."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._open: list[StepModel] = []

    def open(self, model: RandomModel, run: Run | None = None, **changes: Any) -> StepModel:
        """The kernel over a model. A wait's limit is long where a step may take a second."""
        run = replace(run or Run(), **changes)
        step = StepModel(
            model, self._device(run), run.max_context or model.config.max_context,
            kv_type=run.kv_type, tuning=tuning(model, run, self._facts(run)),
            watchdog_ns=120 * 10**9 if self.kind == "emulated" else 10**9,
        )  # fmt: skip
        self._open.append(step)
        return step

    @property
    def last(self) -> StepModel:
        return self._open[-1]

    def close(self) -> None:
        for step in self._open:
            step.close()
        self._open.clear()

    def _device(self, run: Run) -> Any:
        if self.kind == "cuda":
            return CountingCudaDevice()
        return EmulatedDevice(
            run.grid or 13, capability=run.capability, shared_bytes=run.shared_bytes,
            order=run.order, seed=run.seed, edit=run.edit, timeout_s=run.timeout_s,
        )  # fmt: skip

    def _facts(self, run: Run) -> DeviceFacts:
        facts = DeviceFacts(run.capability, run.grid or 13, run.shared_bytes)
        if self.kind == "cuda":
            real = CudaDevice().facts
            facts = DeviceFacts(
                min(run.capability, real.compute_capability),
                run.grid or real.multiprocessors,
                min(run.shared_bytes, real.shared_bytes),
            )
        return facts


def tuning(model: RandomModel, run: Run, facts: DeviceFacts) -> Any:
    """The tuning of a run: by the rules, or small."""
    if not run.small:
        return choose(model.config, model.matrices, facts)
    small = {"stages": 8, "stage_bytes": 64 * model.config.head_dim, "in_flight_bytes": 12288}
    return choose(
        model.config, model.matrices, facts, **small, split_blocks=2, prefetch=run.prefetch,
        prefill_span=64,
    )  # fmt: skip


def without_last_block(step: StepModel) -> dict[str, Launch]:
    """The kernels of an open model, launched with one block fewer than they count on."""
    tuning = step.program.tuning
    short = replace(step.program, tuning=replace(tuning, grid=tuning.grid - 1))
    return dict(step.device.build(short))


def emulated(
    model: RandomModel,
    grid: int = 2,
    *,
    tuning: Mapping[str, int | bool] | None = None,
    kv_type: str | None = None,
    max_context: int | None = None,
    **device: Any,
) -> StepModel:
    """The kernel over a random model on an emulated device, with single fields of tuning."""
    emulator = EmulatedDevice(grid, **device)
    small = {"stages": 8, "stage_bytes": 64 * model.config.head_dim, "in_flight_bytes": 12288}
    chosen = choose(model.config, model.matrices, emulator.facts, **(small | dict(tuning or {})))
    context = max_context or model.config.max_context
    return StepModel(
        model, emulator, context, kv_type=kv_type, tuning=chosen, watchdog_ns=120 * 10**9
    )


# What must come out


def feed(
    step: StepModel, tokens: Sequence[int], widths: Sequence[int], position: int = 0
) -> NDArray[np.float32]:
    """Logits [n, vocab] of ``tokens`` in steps of ``widths`` columns, over and over.

    Checks on the way that each step is one launch and that its token is the largest logit's.
    """
    logits: list[NDArray[np.float32]] = []
    done = 0
    while done < len(tokens):
        width = min(widths[len(logits) % len(widths)], len(tokens) - done)
        before = len(step.device.launches)  # type: ignore[attr-defined]
        ticket = step.step(tokens[done : done + width], position + done, logits=True)
        assert len(step.device.launches) == before + 1  # type: ignore[attr-defined]
        logits.append(step.read_logits(width))
        assert step.token(ticket) == int(logits[-1][-1].argmax())
        done += width
    return np.concatenate(logits)


def random_tokens(config: ModelConfig, n: int, seed: int = 1) -> list[int]:
    """Token ids [n]; the first and the last of the vocabulary are among them."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, n).tolist()
    tokens[: min(2, n)] = [config.vocab_size - 1, 0][: min(2, n)]
    return [int(token) for token in tokens]


def round_to(type: str, values: Array) -> Array:
    """Values rounded to bf16 or fp16, in their own dtype."""
    if type == "bf16":
        return bf16_to_fp32(fp32_to_bf16(values.astype(np.float32))).astype(values.dtype)
    return values.astype(np.float16).astype(values.dtype)


def default_kv_type(model: RandomModel) -> str:
    return "bf16" if model.matrices["layers.0.wqkv"].type == "bf16" else "fp16"


def kernel_rounding(
    model: RandomModel, kv_type: str | None = None
) -> Callable[[str, Array], Array]:
    """The reference's hook that rounds where the kernel rounds."""
    activations = default_kv_type(model)

    def rounding(name: str, values: Array) -> Array:
        return round_to(activations if name == "activation" else kv_type or activations, values)

    return rounding


def both_references(model: RandomModel, kv_type: str | None = None) -> tuple[Reference, Reference]:
    """The reference in float64, and the same rounding where the kernel rounds."""
    rounding = kernel_rounding(model, kv_type)
    exact = Reference(model, dtype=np.float64)
    return exact, Reference(model, dtype=np.float64, rounding=rounding)


def references(
    model: RandomModel, tokens: Sequence[int], kv_type: str | None = None
) -> tuple[Array, Array]:
    """Logits [n, vocab] of both references."""
    exact, rounded = both_references(model, kv_type)
    return exact.forward(tokens, 0, all_logits=True), rounded.forward(tokens, 0, all_logits=True)


def bound(exact: Array, rounded: Array) -> float:
    """The tolerance of docs/design.md: twice the error of the same precision, and float32 noise."""
    return float(2 * np.abs(rounded - exact).max() + 1e-6 * np.abs(exact).max())


def assert_within_bound(logits: Array, exact: Array, rounded: Array) -> None:
    error, limit = float(np.abs(logits - exact).max()), bound(exact, rounded)
    assert error <= limit, f"largest error {error:g}, bound {limit:g}"
