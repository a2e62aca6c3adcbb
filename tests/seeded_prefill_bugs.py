"""Bugs planted in the kernel that reads long prompts, and whether the emulated device notices.

``python tests/seeded_prefill_bugs.py`` plants each one in turn and prints the table of
docs/kernel.md.
"""

# ruff: noqa: E501 - patterns of whole lines of the source

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from emulator import ORDERS, SANITIZER_EXIT_CODE, EmulatorError, run_sanitized
from kernel_cache import fill_cache, read_cache
from kernel_models import (
    Machine,
    RandomModel,
    Run,
    both_references,
    bound,
    default_kv_type,
    model_config,
    random_tokens,
)
from seeded_bugs import DROPPED, Bug

from minflash.codegen import generate
from minflash.errors import DeviceError
from minflash.tuning import DeviceFacts, choose

MARK = "namespace prompt"  # in the source of this kernel alone
KINDS = ("grid barrier", "barrier of a block", "barrier of a warp")

BUGS = (
    Bug("stages: nobody waits for copies", r"while \(!mbarrier_try_wait_parity\(landed \+ reading, parities >> reading & 1\)\) \{\s*\}"),
    Bug("stages: the second copy is not waited for", r"parities \^= 1u << reading;"),
    Bug("stages: the one that is read is filled", r"filling = kStages - 1;", "filling = 0;"),
    Bug("products: sums go on into the next tile", r"low\[c\] = low\[c \+ 1\] = high\[c\] = high\[c \+ 1\] = 0;"),
    Bug("products: sums of columns are those of the first half", r" \+ c / 2 \* 8\];", "];"),
    Bug("products: the high nibbles count 16-fold", r"i / 2 \? kSubnormal / 16 : kSubnormal", "kSubnormal"),
    Bug("attention: a position too many", r"smaller\(own, last\)", "smaller(own + 1, last)"),
    Bug("attention: the window is one too wide", r"own - window : -1", "own - window - 1 : -1"),
    Bug("attention: masks are left out where one row sees all", r"__all_sync\(0xffffffffu, ", "__any_sync(0xffffffffu, "),
    Bug("attention: a span begins with what is known of the one before", r"run = \{\};", ""),
    Bug("attention: spans are put together by the block that arrives first", r"== \(u32\)spans - 1;", "== 0;"),
    Bug("attention: late warps, and no barrier before a block arrives with its part", r"  (if \(rows_of\(warp\)\.count > 0\) part\(span, warp\)\.put\(run\);\n)  sync_consumers\(\);", r"  for (int i = 0; i < warp * 20; i++) __syncwarp();\n  \1"),
    Bug("queries are not rounded in their place", r"reinterpret_cast<u8\*>\(row\(head\)\) \+ d \* 2", "reinterpret_cast<u8*>(row(head)) + d * 4"),
    Bug("attention: the last block is left out", r"\(last - from\) / 16 \+ 1", "(last - from) / 16"),
    Bug("the residual is stored, not added", r"red_add\(at, low\.x\)", "*at = low.x"),
)  # fmt: skip


def model() -> RandomModel:
    """Integer weights, windows, several KV heads, padded columns, tiles of rows that are not full."""
    config = model_config(
        dim=160, hidden_dim=288, n_heads=6, n_kv_heads=2, n_layers=3, windows=(70, 0, 0), qk_norm=True
    )  # fmt: skip
    return RandomModel(config, "int4", 32, ("int8", 32))


def source() -> str:
    """Of the model with the bugs."""
    planted = model()
    return generate(
        planted.config,
        planted.matrices,
        choose(planted.config, planted.matrices, DeviceFacts(90, 7, 232448)),
    ).prefill_source


def dropped() -> Iterator[Bug]:
    """One bug for every barrier of the kernel's own files."""
    text = source()
    for kind in KINDS:
        for index, match in enumerate(re.finditer(DROPPED[kind], text)):
            file = re.findall(r'#line \d+ "(\S+)"', text[: match.start()])[-1]
            if not file.startswith(("gemm", "tiles", "prefill")):
                continue
            comment = match[0].partition("//")[2].strip()
            yield Bug(
                f"no {kind}: {file}: {comment}", DROPPED[kind], "", index, int(kind[0] == "g")
            )


def symptom(bug: Bug | None) -> str | None:
    """How the bug shows, or None, in all orders of warps and copies."""
    edit = None if bug is None else lambda text: bug.edit(text) if MARK in text else text
    try:
        for grid in (7, 1):
            for seed, order in enumerate(ORDERS):
                run = Run(grid, order, seed, edit=edit, timeout_s=2)
                if found := wrong_value(run, bug):
                    return f"{found} ({grid} blocks, {order})"
    except EmulatorError as error:
        return "report: " + str(error).partition(": ")[2].splitlines()[0]
    except DeviceError:
        return "watchdog"
    return None


def wrong_value(run: Run, bug: Bug | None) -> str | None:
    """Which values of the cache are wrong after two launches that follow a past."""
    planted, machine, past, end = model(), Machine("emulated"), 260, 410
    step, pair = machine.open(planted, run), both_references(planted)
    if bug is not None and bug.barriers_per_layer:
        early = bug.index < 2  # those before the last layer ends
        fewer = planted.config.n_layers - (not early)
        barriers = step.program.prefill_barriers - fewer
        step.program = replace(step.program, prefill_barriers=barriers)
    fill_cache(step, pair, past, default_kv_type(planted))
    tokens = random_tokens(planted.config, 150)
    step.prefill(tokens[:133], past)
    step.prefill(tokens[133:], past + 133)  # with seven blocks its spans are dealt to them
    step.wait()
    for reference in pair:
        reference.forward(tokens, past)
    for name, bits in zip(("_keys", "_values"), read_cache(step), strict=True):
        exact, rounded = (getattr(r, name)[:, :, :end].astype(np.float64) for r in pair)
        found = bits[:, :, :end].view(np.float16)
        for layer in range(planted.config.n_layers):
            limit = bound(exact[layer], rounded[layer])
            if not np.abs(found[layer] - exact[layer]).max() <= limit:
                return f"{name[1:]} of layer {layer}"
        if bits[:, :, end:].any():
            return "values past the chunk"
    machine.close()
    return None


def caught_by_thread_sanitizer(index: int) -> bool:
    done = run_sanitized([__file__, "sanitized", str(index)], "thread", timeout_s=300)
    return done.returncode == SANITIZER_EXIT_CODE


def main() -> None:
    if found := symptom(None):
        sys.exit(f"the right source shows: {found}")
    for index, bug in enumerate([*BUGS, *dropped()]):
        found = symptom(bug)
        if found is None:
            found = "ThreadSanitizer" if caught_by_thread_sanitizer(index) else "NOT CAUGHT"
        print(f"| {bug.what} | {found} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["sanitized"]:
        symptom([*BUGS, *dropped()][int(sys.argv[2])])
    else:
        main()
