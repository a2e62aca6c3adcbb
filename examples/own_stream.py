"""A program's own CuPy work on another stream, while minflash generates in a thread.

minflash launches on a stream of its own. A step takes every multiprocessor for its length, in one
cooperative launch: other kernels run between steps or beside them, or wait; nothing can deadlock.

python examples/own_stream.py [MODEL]      (needs a GPU)
"""

from __future__ import annotations

import sys
import threading

import cupy
import numpy as np

import minflash

SIZE, ROUNDS, TEXTS = 1 << 22, 100, 3
FACTOR, SUMMAND = 1664525, 1013904223  # of a linear congruential generator, modulo 2^32


def own_work() -> bool:
    """Whether ROUNDS steps of a random generator, on our stream, give what they must."""
    with cupy.cuda.Stream(non_blocking=True) as stream:
        state = cupy.arange(SIZE, dtype=cupy.uint32)
        for _ in range(ROUNDS):
            state = state * cupy.uint32(FACTOR) + cupy.uint32(SUMMAND)
        found = state.get()
        stream.synchronize()
    factor, summand = 1, 0
    for _ in range(ROUNDS):
        factor, summand = factor * FACTOR % 2**32, (summand * FACTOR + SUMMAND) % 2**32
    expected = np.arange(SIZE, dtype=np.uint32) * np.uint32(factor) + np.uint32(summand)
    return bool(np.array_equal(found, expected))


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None

    def write(llm: minflash.LLM, texts: list[str]) -> None:
        for _ in range(TEXTS):
            llm.reset()
            texts.append(llm.generate("Once upon a time", max_tokens=200, temperature=0))

    with minflash.load(model, device="cuda") as llm:
        alone: list[str] = []
        write(llm, alone)
        own_work()  # compiles CuPy's kernels
        beside: list[str] = []
        worker = threading.Thread(target=write, args=(llm, beside))
        worker.start()
        results = [own_work()]
        while worker.is_alive():
            results.append(own_work())
        worker.join()
    assert beside == alone, "the text changed beside other work"
    assert all(results), "the own work went wrong"
    print(f"same text, and {len(results)} rounds of own work with right results")


if __name__ == "__main__":
    main()
