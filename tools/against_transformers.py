"""transformers on the shapes of ``minflash bench``: what ``--against transformers`` runs.

    minflash bench --shape llama-3.2-1b --quant bf16 --against transformers   # from a checkout
    python tools/against_transformers.py llama-3.2-1b --context 128           # this side alone

Random weights in bf16, made on the GPU; batch 1, greedy. Two ways are timed as a caller sees them:
``generate`` as it is, and the decoding step with a static cache under
``torch.compile(mode="reduce-overhead")``, which captures a CUDA graph, as the documentation of
transformers describes it (Optimizing inference: static kv-cache and torch.compile).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
import transformers

from minflash.config import ModelConfig
from minflash.errors import DeviceError
from minflash.shapes import shape_config

NAME = f"transformers {transformers.__version__}, torch {torch.__version__}"
TYPE = "bf16"  # of the weights


class Engine:
    """One model with random weights on one device of torch; ``close`` gives its memory back."""

    def __init__(self, config: ModelConfig, device: str = "cuda") -> None:
        transformers.utils.logging.set_verbosity_error()
        torch.manual_seed(0)
        self.device = device
        try:
            with torch.device(device):
                self._model: Any = transformers.AutoModelForCausalLM.from_config(
                    _their_config(config), dtype=torch.bfloat16
                ).eval()
        except torch.OutOfMemoryError as error:
            raise DeviceError(f"the GPU has too little memory for this shape in {TYPE}") from error
        self._model.generation_config.eos_token_id = None  # random answers must not end

    @torch.no_grad()
    def generate_ms(self, context: int, steps: int, runs: int) -> float:
        """Milliseconds a token of ``generate`` after a prompt of ``context`` tokens: the median.

        What one token takes, which is the prompt's time, is subtracted.
        """
        prompt = self._prompt(context)

        def generate(count: int) -> float:
            return self._milliseconds(
                lambda: self._model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                    min_new_tokens=count, max_new_tokens=count,
                )
            )  # fmt: skip

        generate(2)
        return statistics.median(generate(steps + 1) - generate(1) for _ in range(runs)) / steps

    @torch.no_grad()
    def compiled_ms(self, context: int, steps: int, runs: int) -> float:
        """Milliseconds a token of the compiled step, from position ``context`` on: the median."""
        torch.compiler.reset()  # another context is another graph, not a dynamic one
        cache = transformers.StaticCache(
            config=self._model.config, max_cache_len=context + max(steps, 3)
        )
        logits = self._model(self._prompt(context), past_key_values=cache, use_cache=True).logits
        first = logits[:, -1:].argmax(-1)

        @torch.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
        def decode(token: torch.Tensor) -> torch.Tensor:
            result = self._model(token, past_key_values=cache, use_cache=True).logits
            return result[:, -1:].argmax(-1)

        def batch(count: int) -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(context)
            token = first.clone()
            for _ in range(count):
                token = decode(token).clone()  # the graph writes its result to the same place

        batch(3)  # compiles, warms up, captures
        return statistics.median(
            self._milliseconds(lambda: batch(steps)) / steps for _ in range(runs)
        )

    def close(self) -> None:
        del self._model
        torch.compiler.reset()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _prompt(self, length: int) -> torch.Tensor:
        return torch.randint(0, self._model.config.vocab_size, (1, length), device=self.device)

    def _milliseconds(self, work: Callable[[], Any]) -> float:
        self._wait()
        begin = time.perf_counter()
        work()
        self._wait()
        return 1e3 * (time.perf_counter() - begin)

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def _their_config(config: ModelConfig) -> Any:
    """A named shape as transformers names it."""
    assert config.architecture == "llama"
    return transformers.LlamaConfig(
        hidden_size=config.dim, intermediate_size=config.hidden_dim, head_dim=config.head_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, vocab_size=config.vocab_size,
        max_position_embeddings=config.max_context, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    engine = Engine(shape_config(args.shape), args.device)
    times = (args.context, args.steps, args.runs)
    print(f"{NAME}, {TYPE}, {args.shape}, context {args.context}, ms a token: ", end="")
    print(f"generate {engine.generate_ms(*times):.3f}, compiled {engine.compiled_ms(*times):.3f}")
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
