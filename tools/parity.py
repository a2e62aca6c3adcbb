"""Compare the logits of the step kernel with those of transformers, at real sizes.

    python tools/parity.py [MODEL ...]      # on a machine with a GPU, torch and transformers
    python tools/parity.py tiny-llama tiny-mistral --torch cpu --engine emulated

Random weights, the same for every run: nothing is fetched. The truth is transformers in float32 on
the bf16 weights. Two others are measured against it by the Kullback-Leibler divergence of their
next-token distributions, KL(truth || other) in nats, mean over all positions: transformers in bf16,
and minflash on the same weights, converted as stored. Exit code 1 when minflash is further from the
truth than transformers in bf16 on any model.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402

from minflash.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from minflash.convert import convert  # noqa: E402
from minflash.engine import Engine, open_engine  # noqa: E402

LOGIT_SPREAD = 2.5  # standard deviation of the logits: about that of trained models
CHUNK = 64  # positions whose distributions are compared in one go
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_TINY = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 331, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model: keys of its config, and how many positions to compare."""

    kind: str  # of the config class
    keys: dict[str, Any]
    positions: int = 512


CASES = {
    "llama-3.2-1b": Case("Llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
    }),
    "llama-3.1-8b-4-layers": Case("Llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
    }),
    "qwen2.5-0.5b": Case("Qwen2", {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }),
    "qwen3-0.6b": Case("Qwen3", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }),
    "mistral-7b-4-layers": Case("Mistral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "sliding_window": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }, positions=4608),
    "tiny-llama": Case("Llama", {**_TINY, "tie_word_embeddings": True}, positions=32),
    "tiny-mistral": Case("Mistral", {**_TINY, "sliding_window": 19}, positions=40),
    "tiny-qwen3": Case("Qwen3", {**_TINY, "tie_word_embeddings": True}, positions=24),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", choices=[*CASES, []], metavar="MODEL",
                        help=f"of {', '.join(CASES)} (default: all but the tiny ones)")  # fmt: skip
    parser.add_argument("--torch", default="cuda", help="device of transformers")
    parser.add_argument("--engine", default="cuda", choices=("cuda", "cpu", "emulated"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    names = args.models or [name for name in CASES if not name.startswith("tiny")]
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(
        f"{'model':22} {'positions':>9} {'KL minflash':>12} {'KL bf16':>12} {'ratio':>7} {'s':>6}"
    )
    worse = []
    for name in names:
        begin = time.time()
        ours, theirs = measure(CASES[name], args.torch, args.engine)
        seconds = time.time() - begin
        print(
            f"{name:22} {CASES[name].positions:9} {ours:12.3e} {theirs:12.3e} {ours / theirs:7.3f} "
            f"{seconds:6.1f}",
            flush=True,
        )
        if not ours <= theirs:  # NaN is worse, too
            worse.append(name)
    print(f"further from the truth than transformers in bf16: {', '.join(worse) or 'none'}")
    return 1 if worse else 0


@torch.inference_mode()
def measure(case: Case, device: str, engine: str) -> tuple[float, float]:
    """KL(truth || minflash) and KL(truth || transformers in bf16), means over the positions."""
    torch.manual_seed(0)
    model = random_model(case, device)
    tokens = torch.randint(0, model.config.vocab_size, (1, case.positions), device=device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/source")
        rounded = model(tokens).logits[0]
        model = model.float()
        truth = model(tokens).logits[0]
        del model
        free(device)
        converted = convert(f"{folder}/source", f"{folder}/converted", progress=False)
        ours = engine_logits(converted, tokens[0].tolist(), engine)
    return divergence(truth, torch.from_numpy(ours)), divergence(truth, rounded)


def random_model(case: Case, device: str) -> Any:
    """The model in bf16 with random weights, norms around 1, and logits that spread."""
    config = getattr(transformers, f"{case.kind}Config")(**case.keys)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, values in model.named_parameters():
        if name.endswith("norm.weight"):
            values.normal_(1.0, 0.1)
        elif name.endswith("bias"):
            values.normal_(0.0, 0.1)
        elif values.dim() == 2:
            values.normal_(0.0, 1 / math.sqrt(values.shape[1]))
    model.get_output_embeddings().weight.mul_(LOGIT_SPREAD)
    return model


def engine_logits(folder: Path, tokens: Sequence[int], kind: str) -> Any:
    """Logits of minflash, float32 [n, vocab_size]."""
    with open_checkpoint(folder) as checkpoint:
        opened = open_kind(checkpoint, kind, len(tokens))
    try:
        return opened.logits(tokens)
    finally:
        opened.close()


def open_kind(checkpoint: Checkpoint, kind: str, max_context: int) -> Engine:
    if kind != "emulated":
        return open_engine(checkpoint, kind, max_context)
    from kernel_models import EmulatedDevice

    from minflash.cuda_engine import CudaEngine

    return CudaEngine(checkpoint, max_context, device=EmulatedDevice(shared_bytes=232448))


def divergence(truth: torch.Tensor, other: torch.Tensor) -> float:
    """KL(truth || other) of softmax, in nats, mean over positions. Both [n, vocab_size]."""
    total = 0.0
    for begin in range(0, len(truth), CHUNK):
        p = torch.log_softmax(truth[begin : begin + CHUNK].double(), -1)
        q = torch.log_softmax(other[begin : begin + CHUNK].to(truth.device).double(), -1)
        total += float((p.exp() * (p - q)).sum())
    return total / len(truth)


def free(device: str) -> None:
    """Gives torch's unused memory back to the GPU."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
