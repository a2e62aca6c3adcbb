"""Steps and a long prompt of small models on the GPU: for compute-sanitizer and ncu.

compute-sanitizer --tool racecheck python3 tools/gpu_step.py int4
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from kernel_models import (  # noqa: E402
    Machine,
    RandomModel,
    Run,
    assert_within_bound,
    feed,
    model_config,
    random_tokens,
    references,
)

from minflash.sampling import Sampling  # noqa: E402
from minflash.tail import Extras, noted_tokens  # noqa: E402


def main(type: str, capability: int) -> None:
    """Two columns, one column, splits of the past, long prompts, sampling with all there is."""
    group = 0 if type in ("bf16", "fp16") else 64
    config = model_config(dim=128, hidden_dim=192, qk_norm=True, qkv_bias=True, windows=(0, 40))
    model = RandomModel(config, type, group)
    machine = Machine("cuda")
    step = machine.open(model, Run(8, capability=capability))
    tokens = random_tokens(config, 72)
    logits = feed(step, tokens, (8, 8, 8, 8, 8, 8, 8, 8, 1, 1, 2))
    assert_within_bound(logits, *references(model, tokens))
    long = random_tokens(config, 308)
    step.prefill(long[:290], 0)
    step.prefill(long[290:299], 290)  # attention's spans are dealt to blocks
    step.step(long[298:299], 298, logits=True, resumes=True)
    ended = step.read_logits(1)
    logits = feed(step, long[299:], (8, 1), 299)
    exact, rounded = references(model, long)
    assert_within_bound(ended, exact[298:299], rounded[298:299])
    assert_within_bound(logits, exact[299:], rounded[299:])
    sampling = Sampling(0.8, 40, 0.9, 0.01, 7, repetition_penalty=1.1)
    step.token(step.step([5], 72, sampling=sampling))
    step.note_tokens(noted_tokens(config.vocab_size, sampling, [5]))
    mask = np.full(-(-config.vocab_size // 32), 0xFFFFFFFF, np.uint32)
    step.token(step.step([5], 73, sampling=sampling, extras=Extras(True, True, mask, 20)))
    machine.close()
    print(f"{type}, sm_{capability} path: {len(step.device.launches)} launches, within the bound")


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "int4", int(sys.argv[2]) if sys.argv[2:] else 90)
