"""Make tests/golden/*.npz: the logits of transformers for the checkpoints of tests/checkpoints.py.

Run by hand where torch and transformers are installed; neither the package nor its tests need them:

    python tools/make_golden.py [CASE ...]

Each file holds, in float32, the logits of a few positions and of part of the vocabulary
(``POSITIONS``, ``COLUMN_STEP``), and the versions that made them. Eager attention in float32, one
forward over the whole prompt.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402

# Before, at and after the windows (5, 6, 7) and original contexts (16, 32) of the cases.
POSITIONS = [0, 1, 4, 5, 6, 7, 8, 15, 16, 17, 31, 32, 33, 40, 46, 47]
COLUMN_STEP = 9


def logits(case: str) -> np.ndarray:
    """float32 [tokens, vocab_size]; stops if transformers does not consume every weight."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_checkpoint(Path(folder), case, "fp32")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    leftovers = {name: names for name, names in info.items() if names}
    if leftovers:
        raise SystemExit(f"{case}: {leftovers}")
    with torch.no_grad():
        return model(torch.tensor([checkpoints.tokens(case)])).logits[0].numpy()


def main(cases: list[str]) -> None:
    folder = ROOT / "tests" / "golden"
    folder.mkdir(exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for case in cases or checkpoints.CASES:
        values = logits(case)
        columns = np.arange(0, values.shape[1], COLUMN_STEP)
        path = folder / f"{case}.npz"
        np.savez(
            path,
            tokens=np.array(checkpoints.tokens(case), np.int32),
            positions=np.array(POSITIONS, np.int32),
            columns=columns.astype(np.int32),
            logits=values[np.ix_(POSITIONS, columns)],
            made_with=np.array(json.dumps(versions)),
        )
        print(f"{case}: {path.stat().st_size} bytes, logits std {values.std():.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
