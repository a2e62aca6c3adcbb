"""Small random models for the kernel's tests, in every type, and the kernel on the emulated device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator import EmulatedModule, Order
from minflash.codegen import Program
from minflash.config import ModelConfig, RopeConfig
from minflash.numeric import bf16_to_fp32, fp32_to_bf16
from minflash.packing import Layout, Matrix, pack
from minflash.quantize import quantize
from minflash.reference import Reference
from minflash.step_model import StepModel
from minflash.tensors import expected_tensors
from minflash.tuning import DeviceFacts, Tuning, choose

TINY = ModelConfig(
    architecture="llama", dim=96, hidden_dim=160, head_dim=64, n_layers=2, n_heads=3, n_kv_heads=1,
    vocab_size=331, max_context=512, norm_eps=1e-5, rope=RopeConfig(), tied=True, qkv_bias=False,
    out_bias=False, mlp_bias=False, qk_norm=False, windows=(0, 0),
)  # fmt: skip


def model_config(**changes: Any) -> ModelConfig:
    """TINY with changes."""
    return replace(TINY, **changes)


class RandomModel:
    """A checkpoint in memory: as much of ``Checkpoint`` as the reference and StepModel use."""

    def __init__(self, config: ModelConfig, type: str, group: int = 0, head: tuple[str, int] | None = None, seed: int = 0) -> None:
        self.config = config
        rng = np.random.default_rng(seed)
        self.matrices: dict[str, Layout] = {}
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
                self.matrices[name] = self._matrices[name].layout
            else:
                mean = 1.0 if name.endswith("norm") else 0.0
                self._vectors[name] = (mean + 0.3 * rng.standard_normal(shape)).astype(np.float32)

    def matrix(self, name: str) -> Matrix:
        return self._matrices[name]

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._vectors[name]

    def raw(self, name: str) -> NDArray[np.uint8]:
        if name in self._vectors:
            return self._vectors[name].view(np.uint8)
        return pack(self._matrices[name])


@cache
def compiled(source: str) -> EmulatedModule:
    return EmulatedModule(source, optimize=1)


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
    ) -> None:
        self.facts = DeviceFacts(capability, grid, shared_bytes)
        self.order, self.seed, self.timeout_s = order, seed, timeout_s
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
        self._view(address, data.nbytes)[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)

    def download(self, address: int, data: NDArray[np.generic]) -> None:
        data.reshape(-1).view(np.uint8)[:] = self._view(address, data.nbytes)

    def clear(self, address: int, nbytes: int) -> None:
        self._view(address, nbytes)[:] = 0

    def pinned(self, nbytes: int) -> tuple[NDArray[np.uint8], int]:
        return self._new(nbytes, 0)

    def build(self, program: Program) -> Mapping[str, Callable[[NDArray[np.void]], None]]:
        module = compiled(program.source)

        def launcher(name: str) -> Callable[[NDArray[np.void]], None]:
            def launch(args: NDArray[np.void]) -> None:
                self.before_launch(args)
                self.launches.append(name)
                module.launch(
                    name, program.tuning.grid, 32 * (program.tuning.warps + 1), program.maps[name].total_bytes, args,
                    order=self.order, seed=self.seed, timeout_s=self.timeout_s,
                )  # fmt: skip

            return launch

        return {name: launcher(name) for name in module.kernels}

    def synchronize(self) -> None: ...

    def free_bytes(self) -> int:
        return 1 << 34


def emulated(model: RandomModel, grid: int = 2, *, kv_type: str | None = None, max_context: int | None = None,
             tuning: Mapping[str, int | bool] | None = None, **device: Any) -> StepModel:
    """The kernel over a random model on an emulated device. Patience is long: a step takes a second."""
    emulator = EmulatedDevice(grid, **device)
    # Small stages and a small ring, so that a tiny model goes round it several times.
    small: dict[str, int | bool] = {"stages": 8, "stage_bytes": 64 * model.config.head_dim, "in_flight_bytes": 12288}
    chosen = choose(model.config, emulator.facts, **(small | dict(tuning or {})))
    return StepModel(model, emulator, max_context or model.config.max_context, kv_type=kv_type, tuning=chosen,  # type: ignore[arg-type]
                     watchdog_ns=120 * 10**9)


def kernel_rounding(model: RandomModel, kv_type: str | None = None) -> Callable[[str, NDArray[Any]], NDArray[Any]]:
    """The reference's hook that rounds where the kernel rounds."""
    bf16 = model.matrices["layers.0.wqkv"].type == "bf16"
    kv_bf16 = bf16 if kv_type is None else kv_type == "bf16"

    def rounding(name: str, values: NDArray[Any]) -> NDArray[Any]:
        to_bf16 = bf16 if name == "activation" else kv_bf16
        if to_bf16:
            return bf16_to_fp32(fp32_to_bf16(values.astype(np.float32))).astype(values.dtype)
        return values.astype(np.float16).astype(values.dtype)

    return rounding


def references(model: RandomModel, tokens: list[int], kv_type: str | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits [n, vocab] of the float64 reference, and of the same rounding where the kernel rounds."""
    exact = Reference(model, dtype=np.float64).forward(tokens, 0, all_logits=True)
    rounded = Reference(model, dtype=np.float64, rounding=kernel_rounding(model, kv_type)).forward(tokens, 0, all_logits=True)
    return exact, rounded


def bound(exact: NDArray[Any], rounded: NDArray[Any]) -> float:
    """The tolerance of docs/design.md: twice the error of the same precision, plus float32 noise."""
    return float(2 * np.abs(rounded - exact).max() + 1e-6 * np.abs(exact).max())
