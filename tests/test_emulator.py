"""The emulated device: right results, planted bugs caught, broken rules reported."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import emulator
import numpy as np
import pytest
from emulator import EmulatedModule, EmulatorError, Order
from emulator.samples import (
    BUGS,
    PTX,
    arguments,
    bf16,
    broken_rule,
    converted,
    from_bf16,
    module,
    pipeline_error,
)

pytestmark = pytest.mark.skipif(
    shutil.which(emulator.compiler()) is None, reason="the emulated device needs g++"
)


def is_caught(launches: Iterator[float]) -> bool:
    """Whether one of the launches ends in a report or a wrong result."""
    try:
        return any(not error < 1e-2 for error in launches)
    except EmulatorError:
        return True


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("grid", [1, 2, 7])
def test_pipeline(grid: int, order: Order) -> None:
    """Hidden values are rounded to bf16 after sums in another order: a unit of 2^-8 may flip."""
    for seed in range(3):
        for bulk in (1, 0):
            assert pipeline_error(grid, order, seed=seed, bulk=bulk) < 2e-3


@pytest.mark.parametrize("bug", BUGS[1:])
@pytest.mark.parametrize("bulk", [1, 0])
def test_pipeline_bugs_are_caught(bug: str, bulk: int) -> None:
    launches = (
        pipeline_error(7, order, seed=seed, bulk=bulk, bug=bug)
        for order in emulator.ORDERS
        for seed in range(3)
    )
    assert is_caught(launches)


def test_a_parity_bit_that_may_be_two_phases_old_is_caught() -> None:
    """With 6 stages and 4 warps a warp waits for stages that others emptied before.

    Bulk copies only: a thread's cp_async_mbarrier_arrive waits for all its copies, hence in order.
    """
    launches = (
        pipeline_error(2, order, seed=seed, stages=6)
        for order in emulator.ORDERS
        for seed in range(3)
    )
    assert is_caught(launches)


@pytest.mark.parametrize("trailing_barrier", [1, 0])
def test_missing_trailing_barrier_is_caught(trailing_barrier: int) -> None:
    right = []
    for order in emulator.ORDERS:
        out = np.zeros((128, 2), np.float32)
        module().launch(
            "sums", 1, 128, 64, arguments(out=out, barrier=trailing_barrier), order=order
        )
        right.append(bool((out == [128, 256]).all()))
    assert all(right) == bool(trailing_barrier)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma(kind: str) -> None:
    """16 products and a sum in float32; fp16 and bf16 subnormals count fully."""
    rng, n = np.random.default_rng(1), 8
    a = (rng.normal(size=(n, 16, 16)) * 2.0 ** rng.integers(-24, 4, (n, 16, 16))).astype(np.float32)
    b, c = rng.normal(size=(n, 16, 8)), rng.normal(size=(n, 16, 8)).astype(np.float32)
    a[0] = rng.integers(0, 1024, (16, 16)) * 2.0**-24  # fp16 subnormals: integer codes
    c[0] = 0
    if kind == "bf16":
        a[0] = rng.integers(0, 128, (16, 16)) * 2.0**-133
        a_bits, b_bits = bf16(a), bf16(b)
        a64, b64 = from_bf16(a_bits).astype(float), from_bf16(b_bits).astype(float)
    else:
        a_bits, b_bits = a.astype(np.float16).view(np.uint16), b.astype(np.float16).view(np.uint16)
        a64, b64 = a_bits.view(np.float16).astype(float), b_bits.view(np.float16).astype(float)
    d = np.zeros_like(c)
    args = arguments(a=a_bits, b=b_bits, c=c, d=d, n=n, bf16=int(kind == "bf16"))
    module().launch("products", 1, 32, 0, args)
    # 17 roundings of at most half a unit of the sum of magnitudes, or of float32's least number.
    bound = 17 * 2.0**-24 * (np.abs(a64) @ np.abs(b64) + np.abs(c)) + 17 * 2.0**-149
    assert (np.abs(d - (a64 @ b64 + c)) <= bound).all()
    assert np.abs(d[0]).max() > 0


def test_f16_to_f32_exhaustively() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    ours = converted("f16_f32", bits.astype(np.uint32)).view(np.float32)
    nan = np.isnan(expected)
    assert (np.isnan(ours) == nan).all()
    assert (ours.view(np.uint32) == expected.view(np.uint32))[~nan].all()


def test_e4m3_to_f16_exhaustively() -> None:
    """Every byte in both halves; truth from the format's definition (OCP FP8, e4m3fn)."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    expected = np.copysign(magnitude, np.where(code & 128, -1.0, 1.0)).astype(np.float16)
    expected[code & 127 == 127] = np.nan
    ours = converted("e4m3_f16", code | (255 - code) << 8).view(np.float16).reshape(256, 2)
    np.testing.assert_array_equal(ours[:, 0], expected)
    np.testing.assert_array_equal(ours[:, 1], expected[::-1])
    assert (np.signbit(ours[:, 0]) == (code & 128 != 0))[code & 127 != 127].all()


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_f32_to_16_bits() -> None:
    """Every fp16 and bf16 number, its neighbours half a unit away, and random bits."""
    rng = np.random.default_rng(2)
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = ((half[:-1].astype(float) + half[1:]) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(v)) for v in (-np.inf, np.inf)]
    noise = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    brain = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([half, middle, *beside, noise, brain])
    values = values[~np.isnan(values)]
    pairs = converted("f32_f16", values.view(np.uint32)).view(np.uint16).reshape(-1, 2)
    np.testing.assert_array_equal(pairs[:, 0], values.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(pairs[:, 1], (-values).astype(np.float16).view(np.uint16))
    pairs = converted("f32_bf16", values.view(np.uint32)).view(np.uint16).reshape(-1, 2)
    np.testing.assert_array_equal(pairs[:, 0], bf16(values))
    np.testing.assert_array_equal(pairs[:, 1], bf16(-values))


def test_f32_functions() -> None:
    x = np.random.default_rng(3).uniform(-8, 8, 1000).astype(np.float32)
    for name, expected in (
        ("exp2", np.exp2(x.astype(float))),
        ("sinpi", np.sin(np.pi * x.astype(float))),
        ("rsqrt", 1 / np.sqrt(np.abs(x.astype(float)))),
    ):
        given = np.abs(x) if name == "rsqrt" else x
        ours = converted(name, given.view(np.uint32)).view(np.float32)
        np.testing.assert_allclose(ours, expected, rtol=2e-7, atol=2e-7)
    tiny = np.array([-127.0, -126.0, -200.0], np.float32)  # subnormal results become 0
    ours = converted("exp2", tiny.view(np.uint32)).view(np.float32)
    np.testing.assert_array_equal(ours, np.array([0, 2.0**-126, 0], np.float32))


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_lanes(order: Order) -> None:
    out, lane = np.zeros((13, 32), np.uint64), np.arange(32)
    module().launch("lanes", 1, 32, 16, arguments(out=out), order=order)
    expected = [
        np.full(32, 15),
        (lane ^ 9) << 40,
        np.where(lane < 28, lane + 4, lane),
        np.where(lane >= 4, lane - 4, lane),
        lane // 8 * 8 + 3,
        np.full(32, sum(1 << i for i in range(0, 32, 3))),
        np.full(32, 2),
        np.where(lane < 16, lane ^ 1, (lane ^ 2) + 100),
        # 8A40, lowest nibble first: byte 0 of a, byte 0 of b, signs of bytes 2 and 0
        (0x80 + lane) | 0x04 << 8 | 0xFF << 16 | 0xFF << 24,
    ]
    for i, row in enumerate(expected):
        np.testing.assert_array_equal(out[i], row.astype(np.uint64), err_msg=str(i))
    for i in lane.tolist():
        bits = i.bit_count() | 32 - i.bit_length() << 8 | (i & -i).bit_length() << 16
        assert out[9, i] == bits | (i << 27 & 0xFFFFFFFF) * 64 >> 32 << 24
    assert (out[10] == 496 << 33).all()
    assert (out[11] == 31 * 7).all()
    halves = out[12].astype(np.uint32).view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(halves, np.arange(64).reshape(8, 8).T)


@pytest.mark.parametrize(
    ("rule", "report"),
    [
        ("over_arrival", r"arrival too many at the mbarrier at offset 0.*16 bytes have not landed"),
        ("unaligned_copy", r"offset 24 is not a multiple of 16"),
        ("copy_outside", r"32 bytes at offset 1008 lie outside of the block's 1024 bytes"),
        ("no_init", r"offset 0: no mbarrier_init"),
        ("barrier_counts", r"barrier 3 for (64|96) threads, but others wait at it for (96|64)"),
        ("copy_over_copy", r"offset 64, where another copy has not landed"),
        ("end_in_flight", r"ended with 1 copies in flight"),
        ("overrun", r"wrote past the end of its shared memory"),
        ("mixed_warp", r"while others of the warp are at"),
    ],
)
def test_a_broken_rule_is_reported(rule: str, report: str) -> None:
    with pytest.raises(EmulatorError, match=report):
        broken_rule(rule)


@pytest.mark.parametrize(
    ("rule", "report"),
    [
        ("missing_warp", r"block 0 warp 0 lanes 0-31: barrier 4, 32 of 64 threads came"),
        (
            "missing_bytes",
            r"block 0 warp 1 lanes 0-31: mbarrier at offset 0 for parity 0 "
            r"\(0 of 1 arrivals missing, 16 bytes to land\)",
        ),
        ("missing_block", r"block 2 warp 0 lanes 0-0: spin on 0x\w+, which holds 2"),
        ("missing_lane", r"lanes 6-31: __syncwarp with mask ffffffff, lanes that came: ffffffdf"),
    ],
)
def test_a_deadlock_names_who_waits_for_what(rule: str, report: str) -> None:
    with pytest.raises(EmulatorError, match=r"deadlock: nothing changed for 0\.2") as error:
        broken_rule(rule, grid=3)
    assert re.search(report, str(error.value)), str(error.value)


def test_the_kernels_own_watchdog_runs() -> None:
    assert broken_rule("own_watchdog", timeout_s=20) == 77


def test_a_copy_reads_its_source_at_any_time() -> None:
    assert {broken_rule("changing_source", seed=seed) for seed in range(8)} == {0, 77}


def test_unlanded_copies_can_be_accepted() -> None:
    broken_rule("end_in_flight", allow_unlanded=True)


def sanitized(sanitizer: emulator.Sanitizer, what: str) -> subprocess.CompletedProcess[str]:
    return emulator.run_sanitized([__file__, what], sanitizer)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_pipeline_is_clean_under(sanitizer: emulator.Sanitizer) -> None:
    done = sanitized(sanitizer, "pipeline")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


def test_conversions_and_lanes_are_clean_under_address_sanitizer() -> None:
    done = sanitized("address", "conversions")
    assert done.returncode == 0, done.stderr


def test_a_race_can_be_suppressed() -> None:
    done = emulator.run_sanitized(
        [__file__, "bug no_grid_barrier"], "thread", suppressions=["race:pipeline"]
    )
    assert done.returncode == 0, done.stderr


def test_thread_sanitizer_finds_races() -> None:
    for what in ("rule race", "bug no_grid_barrier", "bug partials_not_published"):
        done = sanitized("thread", what)
        assert done.returncode == emulator.SANITIZER_EXIT_CODE, done.stderr
        assert "data race" in done.stderr
        assert "samples.cu" in done.stderr


def test_address_sanitizer_finds_overruns() -> None:
    done = sanitized("address", "rule overrun")
    assert done.returncode == emulator.SANITIZER_EXIT_CODE, done.stderr
    assert "heap-buffer-overflow" in done.stderr
    assert "samples.cu" in done.stderr
    done = sanitized("address", "rule read_past_end")
    assert "cp_async_bulk reads 128 bytes" in done.stderr


def test_a_sanitizer_must_be_there_from_the_start() -> None:
    with pytest.raises(EmulatorError, match="run_sanitized"):
        EmulatedModule("", sanitizer="thread")


def test_errors_of_the_caller() -> None:
    with pytest.raises(EmulatorError, match="no kernel of the form"):
        EmulatedModule("int x;")
    with pytest.raises(EmulatorError, match=r"broken\.cu:1"):
        EmulatedModule('#line 1 "broken.cu"\n__global__ void f(const __grid_constant__ T a) {}')
    with pytest.raises(EmulatorError, match="16 bytes of arguments, not 8"):
        module().launch("sums", 1, 32, 0, np.zeros((), np.uint64))
    with pytest.raises(EmulatorError, match="the source has pipeline, sums"):
        module().launch("other", 1, 32, 0, np.zeros((), np.uint64))
    with pytest.raises(EmulatorError, match="multiple of 32"):
        module().launch("sums", 1, 33, 0, np.zeros((), np.uint64))


def test_every_function_of_ptx_has_its_twin() -> None:
    """Same name, return type and parameters in both halves."""
    device = re.sub(r"__device__ __forceinline__", "inline", PTX.read_text())
    twins = (emulator.FOLDER / "emulated_ptx.h").read_text()
    signature = re.compile(r"^inline (.*?\)) \{", re.MULTILINE)
    missing = set(signature.findall(device)) - set(signature.findall(twins))
    assert not missing
    assert len(signature.findall(device)) > 20


def main(what: str) -> None:
    """What the sanitized process runs."""
    if what == "pipeline":
        for bulk in (0, 1):
            assert pipeline_error(2, "forward", bulk=bulk) < 2e-3
            assert pipeline_error(3, "random", bulk=bulk, seed=2) < 2e-3
    elif what == "conversions":
        test_f16_to_f32_exhaustively()
        test_e4m3_to_f16_exhaustively()
        test_f32_to_16_bits()
        test_mma("f16")
        test_lanes("random")
    elif what.startswith("bug"):
        pipeline_error(2, "forward", bug=what.split()[1])
    else:
        broken_rule(what.split()[1])
    print("fine")


if __name__ == "__main__":
    main(sys.argv[1])
