"""Ending a generation early, from wherever: the model stays usable; and asyncio."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import minflash
from minflash import engine as engine_module
from minflash.errors import ArgumentError
from minflash.llm import LLM

LONG: Any = {"max_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(converted: Path) -> Iterator[LLM]:
    with minflash.load(converted, device="cpu") as model:
        yield model


@pytest.fixture
def slow(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """Every forward takes 20 ms more."""
    reference = llm._engine._open_reference()
    forward = reference.forward

    def slow_forward(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.02)
        return forward(*arguments, **options)

    monkeypatch.setattr(reference, "forward", slow_forward)
    return llm


def steps(llm: LLM) -> int:
    forwarded: int = llm._engine.forwarded
    return forwarded


def test_cancel_stops_within_two_steps(slow: LLM) -> None:
    text = slow.generate("Hi", **LONG)
    stream = slow.stream("Hi", **LONG)
    chunks = list(itertools.islice(stream, 5))
    before = steps(slow)
    canceller = threading.Thread(target=slow.cancel)
    canceller.start()
    canceller.join()
    chunks += stream
    assert steps(slow) - before <= 2 and len(chunks) <= 7
    assert chunks[-1].finish_reason == "cancelled" and chunks[-1].stats == slow.last_stats
    assert text.startswith(
        "".join(chunk.text for chunk in chunks).rstrip("\N{REPLACEMENT CHARACTER}")
    )
    assert slow.generate("Hi", **LONG) == text
    slow.cancel()  # nothing runs: nothing happens
    assert slow.generate("Hi", **LONG) == text


def test_cancel_while_generate_runs_and_while_a_prompt_is_read(
    slow: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = slow.generate("Hi", **LONG)
    timer = threading.Timer(0.3, slow.cancel)
    timer.start()
    assert len(slow.generate("Hi", **LONG)) < len(text)
    assert slow.last_stats is not None and 0 < slow.last_stats.generation_tokens < 100
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 2)
    stream = slow.stream("x" * 100)
    threading.Timer(0.2, slow.cancel).start()
    (chunk,) = stream
    assert (chunk.token, chunk.text, chunk.finish_reason) == (-1, "", "cancelled")
    assert chunk.stats is not None and chunk.stats.generation_tokens == 0


def test_ctrl_c_leaves_the_model_usable(slow: LLM) -> None:
    text = slow.generate("Hi", **LONG)
    main = threading.main_thread().ident
    assert main is not None
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            slow.generate("Hi", **LONG)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert slow.generate("Hi", **LONG) == text


def test_closing_a_stream_stops(slow: LLM) -> None:
    stream = slow.stream("Hi", **LONG)
    next(stream)
    before = steps(slow)
    stream.close()
    assert steps(slow) == before
    assert len(list(slow.stream("Hi", max_tokens=3, ignore_eos=True))) == 3


def test_eight_threads_get_what_one_gets(llm: LLM) -> None:
    prompts = [f"{n} times" for n in range(8)]
    expected = [llm.generate(prompt, max_tokens=6, ignore_eos=True) for prompt in prompts]
    answers: dict[int, list[str]] = {n: [] for n in range(8)}

    def ask(n: int) -> None:
        for _ in range(3):
            answers[n].append(llm.generate(prompts[n], max_tokens=6, ignore_eos=True))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert answers == {n: [expected[n]] * 3 for n in range(8)}


# asyncio


async def _count(ticks: list[float]) -> None:
    while True:
        ticks.append(time.perf_counter())
        await asyncio.sleep(0.005)


def test_the_event_loop_goes_on(slow: LLM) -> None:
    expected = slow.generate("Hi", max_tokens=20, ignore_eos=True)

    async def main() -> str:
        ticks: list[float] = []
        counter = asyncio.create_task(_count(ticks))
        chunks = [chunk async for chunk in slow.astream("Hi", max_tokens=20, ignore_eos=True)]
        counter.cancel()
        assert chunks[-1].finish_reason == "length" and chunks[-1].stats is not None
        assert len(ticks) > 20  # 20 steps of at least 20 ms; one tick takes 5 ms
        return "".join(chunk.text for chunk in chunks)

    assert asyncio.run(main()) == expected


def test_agenerate_and_achat(llm: LLM) -> None:
    async def main() -> list[str]:
        one = llm.agenerate("Hi", max_tokens=5, ignore_eos=True)
        two = llm.achat("Hi", max_tokens=5, ignore_eos=True)
        with pytest.raises(ArgumentError, match="unknown argument 'temp'"):
            await llm.agenerate("Hi", temp=1)
        return list(await asyncio.gather(one, two))

    assert asyncio.run(main()) == [
        llm.generate("Hi", max_tokens=5, ignore_eos=True),
        llm.chat("Hi", max_tokens=5, ignore_eos=True),
    ]


def test_a_cancelled_task_cancels_and_one_that_waits_never_starts(slow: LLM) -> None:
    async def main() -> None:
        running = asyncio.create_task(slow.agenerate("Hi", **LONG))
        await asyncio.sleep(0.2)
        waiting = asyncio.create_task(slow.agenerate("Ho", **LONG))
        await asyncio.sleep(0.1)
        waiting.cancel()
        running.cancel()
        for task in (running, waiting):
            with pytest.raises(asyncio.CancelledError):
                await task
        before = steps(slow)
        assert len(await slow.agenerate("Hi", max_tokens=2, ignore_eos=True)) <= 2
        assert steps(slow) - before <= 3 + 2

    asyncio.run(main())


def test_leaving_an_async_stream_stops(slow: LLM) -> None:
    async def first(chunks: AsyncIterator[Any]) -> Any:
        async for chunk in chunks:
            return chunk
        return None

    async def main() -> None:
        chunks = slow.astream("Hi", **LONG)
        await first(chunks)
        await chunks.aclose()
        before = steps(slow)
        await slow.agenerate("Hi", max_tokens=1)
        assert steps(slow) - before <= 3

    asyncio.run(main())
