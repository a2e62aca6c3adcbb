"""A program's own CuPy work on another stream, while minflash generates in a thread.

minflash launches on a stream of its own and holds every multiprocessor for the length of a step; a
step is one cooperative launch, so that other kernels run between steps or wait, and never deadlock.

python examples/own_stream.py [MODEL]      (needs a GPU)
"""

from __future__ import annotations

import sys
import threading

import cupy

import minflash

SIZE, ROUNDS = 1024, 200


def own_work(rounds: int = ROUNDS) -> float:
    """The largest error of products with an orthogonal matrix and its inverse, on our stream."""
    with cupy.cuda.Stream(non_blocking=True) as stream:
        matrix, _ = cupy.linalg.qr(cupy.random.default_rng(1).standard_normal((SIZE, SIZE)))
        vector = start = cupy.ones(SIZE)
        for _ in range(rounds):
            vector = matrix.T @ (matrix @ vector)
        error = cupy.abs(vector - start).max()
        stream.synchronize()
    return float(error)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    prompt = "Once upon a time"
    with minflash.load(model, device="cuda") as llm:
        alone = llm.generate(prompt, max_tokens=200, temperature=0)
        own_work(1)  # compiles CuPy's kernels
        texts: list[str] = []
        worker = threading.Thread(
            target=lambda: texts.append(llm.generate(prompt, max_tokens=200, temperature=0))
        )
        worker.start()
        errors = []
        while worker.is_alive():
            errors.append(own_work())
        worker.join()
    assert texts == [alone], "the text changed beside other work"
    assert errors and max(errors) < 1e-9, f"the own work went wrong: {max(errors)}"
    print(f"same text, and {len(errors)} rounds of own work, error at most {max(errors):.1e}")


if __name__ == "__main__":
    main()
