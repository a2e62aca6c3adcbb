"""NVRTC, without a GPU, compiles the real kernel for every architecture, without spills.

A register spill or a stack frame means local memory, which would cost more than it saves. By
default each architecture gets one shape and each shape two architectures; all combinations are
marked slow and run with the variable MINFLASH_COMPILE_ALL set.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import pytest

from minflash.codegen import KERNELS, PREFILLS, generate
from minflash.compiler import OPTIONS, architecture
from minflash.shapes import shape_config, shape_layouts
from minflash.tuning import DeviceFacts, choose

CARDS = {
    80: DeviceFacts(80, 108, 166912),  # A100
    86: DeviceFacts(86, 82, 101376),  # RTX 3090
    89: DeviceFacts(89, 128, 101376),  # RTX 4090
    90: DeviceFacts(90, 132, 232448),  # H100
    100: DeviceFacts(100, 148, 232448),  # B200
    120: DeviceFacts(120, 170, 101376),  # RTX 5090
}


class Build(NamedTuple):
    capability: int
    shape: str
    quant: str
    kernel: str


CHOSEN = [
    (80, "llama-3.1-8b", "int8"), (86, "llama-3.2-1b", "fp8"), (89, "smollm2-135m", "int4"),
    (90, "llama-3.1-8b", "int4"), (100, "llama-3.2-1b", "bf16"), (120, "smollm2-135m", "fp8"),
]  # fmt: skip
OTHERS = [
    (capability, shape, quant)
    for shape, quants in {
        "smollm2-135m": ("bf16", "int8"), "llama-3.2-1b": ("int4", "fp16"),
        "llama-3.1-8b": ("bf16", "fp8"),
    }.items()
    for index, capability in enumerate(CARDS)
    for quant in quants[index % 2 : index % 2 + 1]
]  # fmt: skip
SLOW = [
    pytest.mark.slow,
    pytest.mark.skipif("MINFLASH_COMPILE_ALL" not in os.environ, reason="set MINFLASH_COMPILE_ALL"),
]
BUILDS = [
    pytest.param(Build(*what, kernel), marks=marks, id="-".join(map(str, (*what, kernel))))
    for builds, marks in ((CHOSEN, []), (OTHERS, SLOW))
    for what in builds
    for kernel in (*KERNELS, *PREFILLS)
]


def compile_one(build: Build) -> str:
    """The log of a compilation, with the compiler's report of registers and memory."""
    from cupy_backends.cuda.libs import nvrtc

    config, facts = shape_config(build.shape), CARDS[build.capability]
    layouts = shape_layouts(config, build.quant, None)
    program = generate(config, layouts, choose(config, layouts, facts))
    options = (*OPTIONS, architecture(build.capability), f"-DONLY_{build.kernel.upper()}")
    unit = nvrtc.createProgram(program.source_of(build.kernel), "step.cu", (), ())
    try:
        nvrtc.compileProgram(unit, (*options, "--ptxas-options=-v"))
        assert nvrtc.getCUBIN(unit)
    except nvrtc.NVRTCError as error:
        return f"{error}\n{nvrtc.getProgramLog(unit)}"
    return str(nvrtc.getProgramLog(unit))


@pytest.fixture(scope="module")
def log_of(request: pytest.FixtureRequest) -> Iterator[Callable[[Build], str]]:
    """Compiles what the session selected, as many at a time as there are processors.

    In processes, as NVRTC takes the threads of one by turns.
    """
    selected = [
        item.callspec.params["build"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
        and hasattr(item, "callspec") and "build" in item.callspec.params
        and not ("slow" in item.keywords and "MINFLASH_COMPILE_ALL" not in os.environ)
    ]  # fmt: skip
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        logs: dict[Build, Future[str]] = {b: pool.submit(compile_one, b) for b in selected}
        yield lambda build: logs[build].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("build", BUILDS)
def test_no_spills(log_of: Callable[[Build], str], build: Build) -> None:
    log = log_of(build)
    entry = rf"Compiling entry function '{build.kernel}' for 'sm_{build.capability}"
    assert re.search(entry, log), log
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    assert frames, log
    assert set(frames) == {("0", "0", "0")}, log


def test_every_shape_meets_two_architectures() -> None:
    assert [card for card, _, _ in CHOSEN] == list(CARDS)
    shapes = [shape for _, shape, _ in CHOSEN]
    assert all(shapes.count(shape) >= 2 for shape in shapes)
