"""Speed of reading a long prompt on named shapes with random weights: ``minflash bench --prefill``.

A launch's arithmetic is that of its matrix products, two operations a weight and token: four
matrices in every layer but the last, of which only the keys and values are needed, and no head.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from .bench import RandomWeights, commit, driver_version
from .config import ModelConfig
from .device import CudaDevice
from .errors import ArgumentError
from .packing import Layout
from .shapes import shape_config, shape_layouts
from .step_model import StepModel
from .tuning import choose


@dataclass(frozen=True)
class PrefillResult:
    """One measurement; the time is the median of device time."""

    shape: str
    quant: str
    group_size: int
    context: int  # positions before the prompt
    tokens: int
    launches: int
    ms: float
    tokens_per_s: float
    tflop_per_s: float  # of matrix products, attention not counted
    card: str
    driver: str
    commit: str


def prefill_flop(config: ModelConfig, matrices: dict[str, Layout], tokens: int) -> int:
    """Operations of the matrix products for ``tokens`` tokens."""
    sizes = {
        kind: matrices[f"layers.0.{kind}"].rows * matrices[f"layers.0.{kind}"].cols
        for kind in ("wqkv", "wo", "w_gate_up", "w_down")
    }
    return 2 * tokens * (sum(sizes.values()) * (config.n_layers - 1) + sizes["wqkv"])


def measure_prefill(
    device: CudaDevice, shape: str, quant: str, *, group_size: int | None = None,
    context: int = 0, tokens: int = 512, runs: int = 5, **tuning: int | bool,
) -> PrefillResult:  # fmt: skip
    """Times ``runs`` reads of ``tokens`` random tokens at position ``context``."""
    config = shape_config(shape)
    matrices = shape_layouts(config, quant, group_size)
    chosen = choose(config, matrices, device.facts, **tuning)
    model = StepModel(RandomWeights(config, matrices), device, context + tokens, tuning=chosen)
    try:
        if not model.prefill_tokens:
            raise ArgumentError("--set prefill_tokens must be at least 128 to time prompts")
        ids = np.random.default_rng(0).integers(0, config.vocab_size, tokens).tolist()
        begins = range(0, tokens, model.prefill_tokens)

        def read() -> None:
            for begin in begins:
                part = ids[begin : begin + model.prefill_tokens]
                model.prefill(part, context + begin, length=context + tokens)

        read()
        model.wait()
        ms = statistics.median(device.milliseconds(read) for _ in range(runs))
        model.wait()
    finally:
        model.close()
    teraflop = prefill_flop(config, matrices, tokens) / 1e12
    return PrefillResult(
        shape, quant, matrices["layers.0.wqkv"].group_size, context, tokens, len(begins), ms,
        tokens / ms * 1e3, teraflop / ms * 1e3, device.name, driver_version(), commit(),
    )  # fmt: skip
