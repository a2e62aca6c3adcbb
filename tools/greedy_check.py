"""Compare the greedy answers of the default model on a device with those of the CPU reference.

    python tools/greedy_check.py            # on the GPU: compares; exit code 1 on a difference
    python tools/greedy_check.py --make     # computes the reference's answers, once

tests/golden/greedy.json holds, for each prompt, the reference's tokens, the margin between its two
largest logits at each of them, and the bound on a device's error in the logits of that answer:
twice the error of a reference that rounds where the kernel rounds, plus float32 noise, as in
docs/design.md. Another token is accepted only where the margin is at most the bound. After such a
place the comparison goes on behind the reference's token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from minflash.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from minflash.engine import open_engine  # noqa: E402
from minflash.loading import model_folder  # noqa: E402
from minflash.numeric import bf16_to_fp32, fp32_to_bf16  # noqa: E402
from minflash.reference import Reference  # noqa: E402
from minflash.sampling import Sampling  # noqa: E402
from minflash.tokenizer import Tokenizer  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "greedy.json"
COUNT = 128
PROMPTS = [
    "Why is the sky blue?",
    "Name three rivers of Europe and the seas they reach.",
    "Write a haiku about rain.",
    "Explain recursion to a child.",
    "What is the capital of Australia?",
    "Translate to French: The library is closed on Mondays.",
    "List five uses of a paper clip.",
    "How do vaccines work?",
    "Write a Python function that reverses a list.",
    "Summarize the story of Romeo and Juliet in two sentences.",
    "What is 17 times 23? Show the steps.",
    "Who wrote Don Quixote, and when?",
    "Give me a recipe for pancakes.",
    "What is the difference between weather and climate?",
    "Continue: Once upon a time, in a village by the sea,",
    "Why do cats purr?",
    "Write an email that asks for a day off.",
    "What is a prime number? Give ten of them.",
    "Describe the water cycle.",
    "How does a bicycle stay upright?",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--make", action="store_true", help="compute the reference's answers")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="only the first ones")
    args = parser.parse_args()
    folder = model_folder(None)  # MINFLASH_MODEL, else the default model
    with open_checkpoint(folder) as checkpoint:
        if args.make:
            return make(checkpoint, folder, args.prompts)
        engine = open_engine(checkpoint, args.device, 1024)
    return compare(engine, json.loads(GOLDEN.read_text())["answers"][: args.prompts])


def make(checkpoint: Checkpoint, folder: Path, count: int) -> int:
    tokenizer = Tokenizer.load(folder, checkpoint.config.vocab_size)
    reference = Reference(checkpoint, max_context=1024)
    answers = []
    for prompt in PROMPTS[:count]:
        begin = time.time()
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        tokens, margins = answer(reference, ids)
        answers.append({"prompt": ids, "tokens": tokens, "margins": margins})
        begun = tokenizer.decode(tokens[:12])
        print(f"{time.time() - begin:6.1f} s  {prompt}  {begun!r}", flush=True)
    del reference
    for entry, bound in zip(answers, bounds(checkpoint, answers), strict=True):
        entry["bound"] = bound
    lines = ",\n".join(json.dumps(entry) for entry in answers)
    GOLDEN.write_text(f'{{"model": "{folder.name}", "answers": [\n{lines}\n]}}\n')
    return 0


def answer(reference: Reference, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
    """The greedy tokens, and the margin of each over the second largest logit."""
    logits = reference.forward(prompt, 0)
    tokens: list[int] = []
    margins: list[float] = []
    for position in range(len(prompt), len(prompt) + COUNT):
        low, high = np.partition(logits, len(logits) - 2)[-2:]
        tokens.append(int(np.argmax(logits)))
        margins.append(round(float(high - low), 5))
        logits = reference.forward(tokens[-1:], position)
    return tokens, margins


def bounds(checkpoint: Checkpoint, answers: list[dict[str, Any]]) -> list[float]:
    """For each answer, the bound on one logit's error (docs/design.md, tolerance)."""
    sequences = [entry["prompt"] + entry["tokens"][:-1] for entry in answers]

    def logits(rounding: Callable[[str, Any], Any] | None) -> list[np.ndarray[Any, Any]]:
        reference = Reference(checkpoint, dtype=np.float64, max_context=1024, rounding=rounding)
        return [
            reference.forward(sequence, 0, all_logits=True)[-COUNT:].astype(np.float32)
            for sequence in sequences
        ]

    exact = logits(None)
    rounded = logits(kernel_rounding(checkpoint))
    return [
        round(float(2 * np.abs(r - e).max() + 1e-6 * np.abs(e).max()), 5)
        for e, r in zip(exact, rounded, strict=True)
    ]


def kernel_rounding(checkpoint: Checkpoint) -> Callable[[str, Any], Any]:
    """Rounds what the kernel keeps in 16 bits: bf16 for bf16 weights, else fp16."""

    def rounding(name: str, values: Any) -> Any:
        if checkpoint.matrices["layers.0.wqkv"].type == "bf16":
            return bf16_to_fp32(fp32_to_bf16(values.astype(np.float32))).astype(values.dtype)
        return values.astype(np.float16).astype(values.dtype)

    return rounding


def compare(engine: Any, answers: list[dict[str, Any]]) -> int:
    """Prints each place where the device differs; 1 when one of them is not a near tie."""
    wrong, same = 0, 0
    for number, entry in enumerate(answers):
        done = 0
        while done < COUNT:
            expected = entry["tokens"][done:]
            forced = entry["prompt"] + entry["tokens"][:done]
            found = list(engine.tokens(forced, Sampling(), COUNT - done))
            place = next((i for i in range(len(expected)) if found[i] != expected[i]), None)
            same += len(expected) if place is None else place
            if place is None:
                break
            margin, allowed = entry["margins"][done + place], entry["bound"]
            verdict = "near tie" if margin <= allowed else "WRONG"
            wrong += margin > allowed
            print(
                f"prompt {number}, token {done + place}: {found[place]} in place of "
                f"{expected[place]}; margin {margin}, allowed {allowed:.5f}: {verdict}"
            )
            done += place + 1
    print(f"{same} of {COUNT * len(answers)} tokens alike, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
