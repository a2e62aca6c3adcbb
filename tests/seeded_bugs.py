"""Bugs planted in the step kernel's source, and whether the emulated device's tests notice.

``python tests/seeded_bugs.py`` plants each one in turn and prints the table of docs/kernel.md.
"""

# ruff: noqa: E501 - patterns of whole lines of the source

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from emulator import ORDERS, SANITIZER_EXIT_CODE, EmulatorError, run_sanitized
from kernel_cache import fill_cache
from kernel_cases import growing_model
from kernel_models import (
    Machine,
    RandomModel,
    Run,
    both_references,
    bound,
    crowded_model,
    default_kv_type,
    feed,
    model_config,
    random_tokens,
    two_panels,
)

from minflash.codegen import generate
from minflash.errors import DeviceError
from minflash.sampling import Sampling, adjusted, log_probabilities, sample
from minflash.step_model import StepModel
from minflash.tail import PLAIN, Extras, noted_tokens
from minflash.tuning import DeviceFacts, choose


@dataclass(frozen=True)
class Bug:
    """One change of the source: the ``index``-th match of ``pattern`` becomes ``text``."""

    what: str
    pattern: str
    text: str = ""
    index: int = 0
    barriers_per_layer: int = 0  # fewer than in the right source
    barriers_of_step: int = 0  # likewise
    barriers_of_tail: int = 0
    odd_ring: bool = False  # stages are no multiple of the warps

    def edit(self, source: str) -> str:
        matches = list(re.finditer(self.pattern, source))
        if self.index >= len(matches):
            raise AssertionError(f"{self.what}: the source has no {self.pattern}")
        match = matches[self.index]
        source = source[: match.start()] + match.expand(self.text) + source[match.end() :]
        if self.odd_ring:
            source = re.sub(r"kStages = (\d+)", lambda m: f"kStages = {int(m[1]) - 4}", source)
        return source


# Bugs with names. The patterns are loose, for the source goes on changing.
BUGS = (
    Bug("a matrix is streamed before its turn", r"(route<Map, tensors::wo>\(\)), (route<Map, tensors::w_gate_up>\(\))", r"\2, \1"),
    Bug("the ring: stages are not released", r"mbarrier_arrive\(&Shared<Map>::ring\(\)\.empty\[stage\]\);", ";"),
    Bug("the ring: the producer does not wait for a release", r"(\} else \{\s*)wait_parity<Map>\(Map::kStages \+ stage[^;]*;", r"\1;"),
    Bug("the ring: consumers do not wait for copies", r"wait_parity<Map>\(stage, parity, args\);"),
    Bug("the ring: the parity never flips", r"stage -= Map::kStages; parity \^= 1;", "stage -= Map::kStages;"),
    Bug("the ring: released before it is read", r"; release\(\)\) use\(int\(next - begin\), data\);", ";) release(), use(int(next - kWarps - begin), data);"),
    Bug("the ring: a warp may be two phases ahead", r"static_assert\(Map::kStages % kWarps[\s\S]*?;", odd_ring=True),
    Bug("attention: the fresh positions are attended to by every split", r"u\.split == plan\.splits - 1 && (thread_index\(\) / 32 == \(consumer\.begin)", r"\1"),
    Bug("attention: a position too many", r"plan\.position - 1, window\)", "plan.position, window)"),
    Bug("attention: the window is one too wide", r"own - window : -1", "own - window - 1 : -1"),
    Bug("attention: columns see later columns", r"smaller\(own, last\)", "last"),
    Bug("attention: arrivals are not reset", r"atom_inc_acq_rel_gpu\((work\.arrivals\(\) \+ team), plan\.splits - 1\)", r"atom_add_acq_rel_gpu(\1, 1)"),
    Bug("sampling: arrivals are not reset", r"if \(last\) \*arrivals = 0;"),
    Bug("sampling: noise of the position before, without filters", r"token, args\.position \+ args\.n_columns\)", "token, args.position + args.n_columns - 1)"),
    Bug("sampling: noise of the position before, with filters", r"quad\.token, args\.position \+ args\.n_columns\)", "quad.token, args.position + args.n_columns - 1)"),
    Bug("sampling: four neighbours have the same noise", r"gumbel\(words\.of\[j\]\)", "gumbel(words.of[0])"),
    Bug("sampling: a block takes its own largest for everyone's", r"all = largest<Map>\(all, 1\);", "all = largest<Map>(mine, 1);"),
    Bug("sampling: the largest are awaited of the phase before", r"words \+ 2 \* block \+ 1\}, 0, keys", "words + 2 * block + 1}, 1, keys"),
    Bug("sampling: the tail is not emptied", r"if \(filters \|\| ranks\) leave_empty\(\);"),
    Bug("sampling: the number of entries is not emptied", r"i < sizeof\(Tail\) / 8;", "i < sizeof(Bins) / 8;"),
    Bug("sampling: a carry is lost", r" \+ \(old \+ low < old\)"),
    Bug("sampling: the chosen token is not counted", r"if \(args\.adjust && chosen\) [^;]*;"),
    Bug("sampling: scores of a bin too many are kept", r"quad\.bin\[j\] < bounds\.first", "quad.bin[j] <= bounds.first"),
    Bug("sampling: the last bin is not listed", r"bin <= bounds\.last", "bin < bounds.last"),
    Bug("sampling: ranks count from the top of the vocabulary", r"bounds\.rank -= scores", "bounds.rank -= 0"),
    Bug("sampling: top_p is of all scores", r"if \(!bounds\.rank\) return bounds\.total;", "return bounds.total;"),
    Bug("sampling: min_p is not asked at the edge", r"u32 least = least_key;", "u32 least = 0;"),
    Bug("sampling: of a short list equal keys come before each other", r"if \(other\.key > key\) before", "if (other.key >= key) before"),
    Bug("log-probabilities: too few logits are listed", r"bin <= bounds\.ranked", "bin < bounds.ranked"),
    Bug("log-probabilities: of equal logits the last comes first", r"\| ~entry\.token", "| entry.token"),
    Bug("int4: the high nibbles count 16-fold", r"high_row \? kSubnormal / 16 : kSubnormal", "kSubnormal"),
    Bug("the bias of int8's zero is forgotten", r"t0 = -128\.0f \* s0, t1 = -128\.0f \* s1", "t0 = 0, t1 = 0"),
    Bug("the residual is stored, not added: several columns", r"low \+= fetched\.low, high \+= fetched\.high;"),
    Bug("the residual is stored, not added: one column", r"__uint_as_float\(old\[0\]\) \+ low\)", "low)"),
    Bug("words: pairs are taken whatever their number", r"late \|= u32\(v\[i\]\.x >> 32\) \^ tag \| u32\(v\[i\]\.y >> 32\) \^ tag;", ";"),
    Bug("words: the second of a pair is taken whatever its number", r" \| u32\(v\[i\]\.y >> 32\) \^ tag;", ";"),
    Bug("words: single ones are taken whatever their number", r"late \|= u32\(words\[i\] >> 32\) \^ tag;", "late |= 0;"),
    Bug("words: pairs of a phase too early are awaited", r"const u32 tag = phase - 1;", "const u32 tag = phase - 2;"),
    Bug("words: the embedding is looked for two phases late", r"(lanes, old), kSinceDown, ffn_reader\)", r"\1, 1, ffn_reader)"),
    Bug("words: the residual is looked for a phase early", r"(lanes, old), kSinceOut, reader_of", r"\1, 3, reader_of"),
    Bug("words: the number comes before the value", r"st_relaxed_gpu\(word, \(u64\)phase << 32 \| value\);", "st_relaxed_gpu(word, (u64)phase << 32); st_relaxed_gpu(word, (u64)phase << 32 | value);"),
    Bug("words: all steps have the same numbers", r"phase\(args\.first_phase\)", "phase(1)"),
    Bug("words: a block without rows waits for a product's input", r" && share\.count > 0;", ";"),
    Bug("columns: nobody waits for the copies", r"wait_long<Map>\(2 \* Map::kStages[^;]*;"),
    Bug("columns: the parity never flips", r"consumer\.columns_parity \^= 1;"),
    Bug("columns: padding keeps what was there", r"= make_uint4\(0, 0, 0, 0\);(?=\n\}\n\n// Sums)", "= make_uint4(0x7fff7fff, 0, 0, 0);"),
    Bug("columns: sums of fewer groups", r"group < groups; group \+= kWarps", "group < groups - 1; group += kWarps"),
    Bug("norms: the scale is not made good", r"return v \* Norms::here<Map>\(\)\.factor\[column\];", "return v;"),
    Bug("norms: the same scale for all norms", r"norms\.next\[column\] = scale \* kNextNorm;", "norms.next[column] = kNextNorm;"),
    Bug("norms: noted once for each panel", r"if \(first\) measure_norms", "measure_norms"),
    Bug("partial sums: the first of a slot is added to what was there", r"first_panel && chunk < W::kSlots", "false"),
    Bug("partial sums: chunks share a slot", r"chunk % W::kSlots", "chunk / 2 % W::kSlots"),
    Bug("partial sums: those of the last part's missing chunks are added", r"of_warps<W::kSlots>\(partials, W::slots\(part\), i\)", "of_warps<W::kSlots>(partials, W::kSlots, i)"),
    Bug("teams: arrivals are not reset", r"atom_inc_acq_rel_gpu\((work\.team_arrivals\(\) \+ first), W::kParts - 1\)", r"atom_add_acq_rel_gpu(\1, 1)"),
    Bug("teams: the first to arrive goes on", r"== W::kParts - 1;(?=\n  sync_consumers)", "== 0;"),
    Bug("teams: every block has the first part", r"int panel = share\.part; panel < share\.part \+ r\.panels;", "int panel = 0; panel < r.panels;"),
)  # fmt: skip

SAMPLINGS = (
    Sampling(1.0, seed=4),
    Sampling(1.0, 20, 0.9, 0.01, 3),
    Sampling(1.0, top_k=1, seed=5),
    Sampling(1.0, top_p=1e-6, seed=6),
    Sampling(4.0, top_k=3, seed=7),
    Sampling(1.5, min_p=0.1, seed=8),
)

# Bugs of synchronisation: each barrier of the source is dropped in turn.
DROPPED = {
    "grid barrier": r"\b(?:(?:exchange\.)?grid\.sync|exchange\.next)\(\);(?=  //)[^\n]*",
    "barrier of a block": r"(?<!void )\bsync_consumers\(\);[^\n]*",
    "barrier of a warp": r"__syncwarp\(\);[^\n]*",
    "barrier before the roles part": r"__syncthreads\(\);[^\n]*",
}

RIGHT = -1  # the index of no bug


def models() -> list[RandomModel]:
    """Small, and between them: splits, windows, biases, few slots, padding, a growing residual, wide
    matrices.

    Those have a second panel as wide as the first: what comes late into a narrower one is hidden by
    the order of the ring.
    """
    first = model_config(
        dim=160, hidden_dim=224, n_heads=6, n_kv_heads=2, windows=(30, 0), qk_norm=True
    )
    second = model_config(head_dim=128, n_layers=1, mlp_bias=True, out_bias=True, qkv_bias=True)
    third = model_config(dim=64, hidden_dim=8192, n_heads=2, n_layers=1, vocab_size=130)
    fourth = model_config(dim=7168, hidden_dim=32, n_heads=1, n_layers=1, vocab_size=130)
    return [
        RandomModel(first, "int4", 64, ("int8", 64)),
        RandomModel(second, "int8", 32, ("bf16", 0)),
        RandomModel(third, "bf16"),
        RandomModel(fourth, "int8", 32),
        crowded_model(),
        growing_model("int4", 64, 1000.0),
    ]


@cache
def source() -> str:
    """The source of the first of the models."""
    model = models()[0]
    return generate(
        model.config,
        model.matrices,
        choose(model.config, model.matrices, DeviceFacts(90, 7, 232448)),
    ).source


def dropped() -> Iterator[Bug]:
    """One bug for every barrier of the source, named by its comment or what stands before it.

    The end of a phase is dropped for several columns, where it is a barrier, and for one column,
    where it counts phases.
    """
    text = source()
    for kind, pattern in DROPPED.items():
        for index, match in enumerate(re.finditer(pattern, text)):
            file = re.findall(r'#line \d+ "(\S+)"', text[: match.start()])[-1]
            comment = match[0].partition("//")[2].strip()
            before = re.split(r"[;{}]\s*", text[: match.start()].rstrip(" {;}\n"))[-1].strip()
            where = comment or "after " + " ".join(before.split())[:50]
            what = f"{file}: {where}"
            if kind != "grid barrier":
                yield Bug(f"no {kind}: {what}", pattern, ";", index)
            elif file == "decide.cuh":
                yield Bug(f"no {kind}: {what}", pattern, ";", index, barriers_of_tail=1)
            else:
                layer, step = (0, 1) if "embedding" in comment else (1, 0)
                text_of = "if constexpr ({}kTagged<Map>) exchange.next();"
                yield Bug(f"no {kind}: {what}", pattern, text_of.format(""), index, layer, step)
                yield Bug(f"no next phase: {what}", pattern, text_of.format("!"), index)


def symptom(bug: Bug | None, *, timeout_s: float = 2) -> str | None:
    """How the bug shows, or None. Wrong values are sought in all orders of warps and copies."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(300)
    try:
        # With 26 blocks some have no rows of W_qkv.
        for grid, (seed, order) in (*product((7, 1), enumerate(ORDERS)), (26, (2, ORDERS[2]))):
            for model in models():
                run = Run(grid, order, seed, timeout_s=timeout_s)
                if bug:
                    run = replace(run, edit=bug.edit)
                if bug and bug.odd_ring:
                    run = replace(run, small=False, shared_bytes=232448)
                if found := wrong_value(model, run, bug):
                    return f"{found} ({grid} blocks, {order})"
            if wrong_panels(Run(grid, order, seed, edit=bug.edit if bug else None)):
                return f"logits of two panels ({grid} blocks, {order})"
    except EmulatorError as error:
        text = str(error)
        compiled = "static assertion" in text or "error:" in text
        return (
            "does not compile" if compiled else "report: " + text.partition(": ")[2].splitlines()[0]
        )
    except DeviceError:
        return "watchdog"
    except TimeoutError:
        return "no token comes"
    finally:
        signal.alarm(0)
    return None


def _give_up(*_: object) -> None:
    raise TimeoutError


def wrong_value(model: RandomModel, run: Run, bug: Bug | None) -> str | None:
    """What is wrong in a series of steps: from the start, after a long past, sampling."""
    machine = Machine("emulated")
    step = machine.open(model, run)
    if bug is not None:
        program = step.program
        fewer = bug.barriers_per_layer * model.config.n_layers + bug.barriers_of_step
        step.program = replace(
            program,
            barriers=program.barriers - fewer,
            tail_barriers=program.tail_barriers - bug.barriers_of_tail,
        )
    pair = both_references(model)
    for length in (0, 150):
        fill_cache(step, pair, length, default_kv_type(model))
        tokens = random_tokens(model.config, 27, 5)
        try:
            logits = feed(step, tokens, (8, 1, 1, 7), length)
        except AssertionError:
            return "token is not the largest logit's"
        exact, rounded = (r.forward(tokens, length, all_logits=True) for r in pair)
        if not np.abs(logits - exact).max() <= bound(exact, rounded):
            return "logits"
    for position, sampling in enumerate(SAMPLINGS, 177):
        ticket = step.step([6], position, logits=True, sampling=sampling)
        if step.token(ticket) != sample(step.read_logits(1)[0], sampling, position + 1):
            return "sampled token"
    found = wrong_tail(step)
    machine.close()
    return found


def wrong_panels(run: Run) -> bool:
    """Whether steps of one column whose activations come in two panels are wrong."""
    (model, small), machine = two_panels("bf16"), Machine("emulated")
    tokens = random_tokens(model.config, 3)
    logits = feed(
        machine.open(model, replace(run, shared_bytes=small.shared_bytes)), tokens, (1, 1, 1)
    )
    exact, rounded = (r.forward(tokens, 0, all_logits=True) for r in both_references(model))
    machine.close()
    return not np.abs(logits - exact).max() <= bound(exact, rounded)


def wrong_tail(step: StepModel) -> str | None:
    """What is wrong in a series of steps with penalties and log-probabilities."""
    vocab_size, answer = step.config.vocab_size, list[int]()
    for position, drawn in enumerate(SAMPLINGS, 183):
        sampling = replace(drawn, frequency_penalty=3.0)
        if not answer:
            step.note_tokens(noted_tokens(vocab_size, sampling, [6]))
        extras = Extras(adjust=True, logprobs=20)
        ticket = step.step([6], position, logits=True, sampling=sampling, extras=extras)
        logits, token = step.read_logits(1)[0], step.token(ticket)
        if token != sample(adjusted(logits, sampling, [6], answer), sampling, position + 1):
            return "penalised token"
        answer.append(token)
        logprob, likeliest = step.logprobs(ticket, 20)
        if [t for t, _ in likeliest] != np.argsort(-logits, kind="stable")[:20].tolist():
            return "likeliest tokens"
        if not abs(logprob - log_probabilities(logits)[token]) < 1e-5:
            return "log-probability"
    middle = float(np.exp(np.median(logits) - logits.max()))
    for seed in range(4):
        for edge in ({"top_k": 5}, {"top_k": vocab_size * 3 // 4, "min_p": middle}, {"top_p": 0.4}):
            sampling = Sampling(1.0, seed=seed, **edge)  # type: ignore[arg-type]
            if step.token(step.step([6], position, sampling=sampling)) != sample(
                logits, sampling, position + 1
            ):
                return "sampled token"
    return None


def caught_by_thread_sanitizer(index: int) -> bool:
    arguments = [__file__, "sanitized", str(index)]
    done = run_sanitized(arguments, "thread", timeout_s=300)
    return done.returncode == SANITIZER_EXIT_CODE


def sanitized(index: int) -> None:
    """What the sanitized process runs: steps whose past ends with a block, as in test_kernel.py.

    index: of the bug; RIGHT: none.
    """
    edit = None if index == RIGHT else [*BUGS, *dropped()][index].edit
    model, _, wide, *_ = models()
    for order in ORDERS:
        machine = Machine("emulated")
        feed(machine.open(wide, Run(7, order, edit=edit)), random_tokens(wide.config, 8), (8,))
        panels, few = two_panels("bf16")
        feed(machine.open(panels, replace(few, grid=7, order=order, edit=edit)), [3], (1,))
        step = machine.open(model, Run(7, order, edit=edit))
        step.note_tokens(noted_tokens(model.config.vocab_size, Sampling(), [6]))
        for length in (0, 160):
            fill_cache(step, (), length, default_kv_type(model))
            feed(step, random_tokens(model.config, 8), (8,), length)
            feed(step, [3], (1,), length)
            for sampling in SAMPLINGS:
                for extras in (PLAIN, Extras(adjust=True, logprobs=20)):
                    step.token(step.step([6], length, sampling=sampling, extras=extras))


def main() -> None:
    if found := symptom(None):
        sys.exit(f"the right source shows: {found}")
    if caught_by_thread_sanitizer(RIGHT):
        sys.exit("ThreadSanitizer reports the right source")
    for index, bug in enumerate([*BUGS, *dropped()]):
        # In a process of its own: one cannot hold the libraries of all bugs.
        one = [sys.executable, __file__, "symptom", str(index)]
        done = subprocess.run(one, stdout=subprocess.PIPE, text=True)
        if done.returncode > 0:
            sys.exit(f"{bug.what}: the search for a symptom failed")
        found = done.stdout.strip() or ("the process dies" if done.returncode < 0 else "")
        if not found:
            found = "ThreadSanitizer" if caught_by_thread_sanitizer(index) else "NOT CAUGHT"
        print(f"| {bug.what} | {found} |", flush=True)


def print_symptom(index: int) -> None:
    try:
        print(symptom([*BUGS, *dropped()][index]) or "")
    except AssertionError as error:
        print(f"NOT PLANTED: {error}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["sanitized"]:
        sanitized(int(sys.argv[2]))
    elif sys.argv[1:2] == ["symptom"]:
        print_symptom(int(sys.argv[2]))
    else:
        main()
