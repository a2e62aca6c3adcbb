"""Engines over small models: the reference, the emulated device, a GPU."""

from __future__ import annotations

from typing import Any, cast

from kernel_models import EmulatedDevice, RandomModel

from minflash.checkpoint import Checkpoint
from minflash.cuda_engine import CudaEngine
from minflash.device import CudaDevice
from minflash.engine import CpuEngine
from minflash.step_model import StepModel, Weights
from minflash.tuning import Tuning, choose

# A model that the kernel can run.
HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96,
    "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 331, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def small_tuning(model: Weights, device: EmulatedDevice) -> Tuning:
    small = {"stages": 8, "stage_bytes": 4096, "in_flight_bytes": 12288}
    return choose(model.config, model.matrices, device.facts, **small)


def cpu_engine(model: RandomModel, max_context: int = 64) -> CpuEngine:
    return CpuEngine(cast(Checkpoint, model), max_context)


def cuda_engine(model: RandomModel, max_context: int = 64) -> CudaEngine:
    device = EmulatedDevice()
    tuning = small_tuning(model, device)
    step = StepModel(model, device, max_context, tuning=tuning, watchdog_ns=120 * 10**9)
    return CudaEngine.over(step)


def gpu_engine(model: RandomModel, max_context: int = 64) -> CudaEngine:
    return CudaEngine.over(StepModel(model, CudaDevice(), max_context))
