"""The engine over the kernel's own choice: histories, grammars, launches ahead, hidden states."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace

import emulator
import numpy as np
import pytest
from kernel_models import Machine, RandomModel, Run, both_references, bound, model_config
from sampled import (
    BIAS,
    DRAWS,
    ENDS,
    PENALTIES,
    PROMPT,
    assert_report,
    assert_sampled,
    bits_of,
)

from minflash.choosing import Chooser
from minflash.cuda_engine import AHEAD, CudaEngine
from minflash.errors import MinflashError
from minflash.gpu_memory import step_bytes
from minflash.llm import LLM
from minflash.sampling import Sampling, adjusted, sample

pytestmark = pytest.mark.skipif(
    shutil.which(emulator.compiler()) is None, reason="the emulated device needs g++"
)


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel(model_config(), "bf16")


class Alternating:
    """A grammar: after an even token an odd one, and the other way round; token 0 ends it."""

    def __init__(self, parity: int = 0, end_after: int = 100) -> None:
        self.parity, self.left, self.accepted = parity, end_after, list[int]()

    @property
    def finished(self) -> bool:
        return self.left <= 0

    def bits(self) -> np.ndarray:
        return bits_of(np.arange(331) % 2 == self.parity)

    def accept(self, token: int) -> None:
        self.accepted.append(token)
        self.parity, self.left = 1 - token % 2, self.left - 1


def open_engine(machine: Machine, model: RandomModel) -> CudaEngine:
    return CudaEngine.over(machine.open(model, Run(2, "random"), max_context=64))


def replayed(
    machine: Machine, model: RandomModel, chosen: Sequence[int], widths: Sequence[int]
) -> np.ndarray:
    """The logits from which an engine chose: the same steps once more, bit for bit."""
    step, tokens, rows, done = machine.open(model, Run(2, "random")), [*PROMPT, *chosen], [], 0
    for width in widths:
        step.step(tokens[done : done + width], done, logits=True, length=max(len(PROMPT), done + 1))
        rows.append(step.read_logits(width)[-1])
        done += width
    return np.stack(rows[-len(chosen) :])


@pytest.mark.parametrize("grammar", [False, True])
@pytest.mark.parametrize("draw", ["greedy", "filters"])
def test_an_engines_answer_is_the_specifications(
    machine: Machine, model: RandomModel, draw: str, grammar: bool
) -> None:
    """Every token from the kernel's own logits and the history so far, with its report."""
    options = {**PENALTIES, "logit_bias": BIAS, "min_tokens": 4}
    sampling = replace(DRAWS[draw], **options)
    constraint = Alternating() if grammar else None
    engine = open_engine(machine, model)
    chooser = Chooser(sampling, PROMPT, ends=ENDS, constraint=constraint, logprobs=4)
    chosen, reports = [], []
    for token in engine.tokens(PROMPT, sampling, 8, choose=chooser):
        chosen.append(token)
        reports.append((chooser.logprob, chooser.top_logprobs))
    assert chooser.answer == chosen and len(chosen) == 8
    parity = 0
    for index, logits in enumerate(replayed(machine, model, chosen, (8, 2, *(1,) * 7))):
        allowed = np.arange(331) % 2 == parity if grammar else None
        scores = adjusted(logits, sampling, PROMPT, chosen[:index], ENDS, allowed)
        token, position = chosen[index], len(PROMPT) + index
        if sampling.greedy:
            assert token == sample(scores, sampling, position)
        else:
            assert_sampled(token, scores, sampling, position)
        assert_report(reports[index], logits, token, 4)
        if token not in ENDS:
            parity = 1 - token % 2
    if constraint is not None:
        assert constraint.accepted == [token for token in chosen if token not in ENDS]
    # The cache is in order: what was read is what a fresh engine reads.
    again = list(engine.tokens([*PROMPT, *chosen[:3]], Sampling(), 4))
    assert again == list(open_engine(machine, model).tokens([*PROMPT, *chosen[:3]], Sampling(), 4))


def test_only_a_grammar_keeps_steps_from_being_launched_ahead(
    machine: Machine, model: RandomModel
) -> None:
    sampling = Sampling(0.8, 20, seed=4, min_tokens=3, **PENALTIES)  # type: ignore[arg-type]
    for constraint, ahead in ((None, AHEAD), (Alternating(), 0)):
        engine = open_engine(machine, model)
        chooser = Chooser(sampling, PROMPT, ends=ENDS, constraint=constraint, logprobs=2)
        tokens = engine.tokens(PROMPT, sampling, 12, choose=chooser)
        next(tokens)
        launches = engine._open_model().device.launches  # type: ignore[attr-defined]
        assert launches == ["step_many", "step_many", *["step_one"] * ahead]
        assert len(list(tokens)) == 11
        assert len(launches) == 2 + 11


def test_chunks_of_an_llm_have_their_own_report(machine: Machine, model: RandomModel) -> None:
    """Although steps after theirs have run already."""
    llm = LLM(open_engine(machine, model), eos_token_ids=ENDS)
    options = {"max_tokens": 8, "logprobs": 2, "repetition_penalty": 1.2, "min_tokens": 8}
    chunks = list(llm.stream(PROMPT, temperature=0.0, **options))  # type: ignore[arg-type]
    chosen = [chunk.token for chunk in chunks]
    assert len(chosen) == 8 and not ENDS & set(chosen)
    for chunk, logits in zip(
        chunks, replayed(machine, model, chosen, (8, 2, *(1,) * 7)), strict=True
    ):
        assert chunk.logprob is not None and chunk.top_logprobs is not None
        assert_report((chunk.logprob, chunk.top_logprobs), logits, chunk.token, 2)
    llm.close()


def test_stats_tell_what_was_read(machine: Machine, model: RandomModel) -> None:
    engine = open_engine(machine, model)
    llm = LLM(engine)
    list(llm.stream(PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True))
    stats = llm.last_stats
    assert stats is not None and stats.gb_per_s is not None
    step = step_bytes(model.config, model.matrices, len(PROMPT) + 6)
    assert stats.gb_per_s == pytest.approx(stats.generation_tps * step / 1e9)
    if machine.kind == "emulated":
        assert stats.percent_of_bus is None
    else:
        assert stats.percent_of_bus is not None and 0 < stats.percent_of_bus < 100
    llm.close()
    assert engine.bandwidth(10.0, 0)[0] > 0  # a stream that is ended by close has stats, too


def test_cancel_stops_within_two_steps(machine: Machine, model: RandomModel) -> None:
    """No step is launched any more but those that a token already asked for gives room for."""
    llm = LLM(open_engine(machine, model))
    expected = [c.token for c in llm.stream(PROMPT, max_tokens=5, temperature=0.0)]
    stream = llm.stream(PROMPT, max_tokens=40, temperature=0.0, ignore_eos=True)
    for _ in range(3):
        next(stream)
    launches = llm._engine._open_model().device.launches  # type: ignore[attr-defined]
    launched = len(launches)
    llm.cancel()
    rest = list(stream)
    assert len(rest) <= 2 and rest[-1].finish_reason == "cancelled"
    assert len(launches) - launched <= 2
    again = [c.token for c in llm.stream(PROMPT, max_tokens=5, temperature=0.0)]
    assert again == expected


def test_an_answer_that_nothing_may_begin(machine: Machine, model: RandomModel) -> None:
    engine = open_engine(machine, model)
    chooser = Chooser(Sampling(min_tokens=1), PROMPT, ends=range(331))
    with pytest.raises(MinflashError, match="no token is allowed at position 10: the grammar"):
        list(engine.tokens(PROMPT, Sampling(min_tokens=1), 3, choose=chooser))
    assert len(list(engine.tokens(PROMPT, Sampling(), 3))) == 3


def test_hidden_states_are_the_references_within_the_bound(
    machine: Machine, model: RandomModel
) -> None:
    exact, rounded = (r.forward(PROMPT, 0, hidden=True) for r in both_references(model))
    engine = open_engine(machine, model)
    hidden = engine.hidden(PROMPT)
    assert hidden.dtype == np.float32 and hidden.shape == (10, 96)
    assert np.abs(hidden - exact).max() <= bound(exact, rounded)
    assert (engine.hidden(PROMPT) == hidden).all()
    expected = list(open_engine(machine, model).tokens(PROMPT, Sampling(), 3))
    assert list(engine.tokens(PROMPT, Sampling(), 3)) == expected
