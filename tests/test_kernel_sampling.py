"""The token that the step kernel chooses is the specification's, on its own logits."""

from __future__ import annotations

import shutil
from dataclasses import replace

import emulator
import numpy as np
import pytest
from kernel_models import Machine, RandomModel, Run, model_config
from sampled import SAMPLINGS, assert_sampled

from minflash.quantize import quantize
from minflash.sampling import Sampling
from minflash.step_model import CHAINED

pytestmark = pytest.mark.skipif(
    shutil.which(emulator.compiler()) is None, reason="the emulated device needs g++"
)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampling_is_the_specification(machine: Machine, name: str) -> None:
    """With the same seed and position, on the kernel's own logits."""
    model = RandomModel(model_config(), "bf16")
    step = machine.open(model, Run(2, "random"))
    seen = set()
    for seed in (0, 1, 2**32 - 1, 2**32, 2**64 - 1, 12345678901234567890, 7, 8):
        for position, tokens in ((0, [3]), (1, [9]), (2, [1, 2, 3]), (5, [8] * 8)):
            sampling = replace(SAMPLINGS[name], seed=seed)
            ticket = step.step(tokens, position, logits=True, sampling=sampling)
            logits = step.read_logits(len(tokens))[-1]
            token = step.token(ticket)
            assert_sampled(token, logits, sampling, position + len(tokens))
            without = step.token(step.step(tokens, position, sampling=sampling))
            assert without == token  # the logits need not be kept
            seen.add(token)
    if name in ("temperature", "min_p", "all"):
        assert len(seen) > 4


def test_sampling_at_a_tie(machine: Machine) -> None:
    """Of equal logits the lowest token wins; top_k keeps tokens that tie with the last one kept."""
    model = RandomModel(model_config(tied=False), "bf16")
    head = np.zeros((331, 96), np.float32)
    model.put("lm_head", quantize(head, "bf16"))
    step = machine.open(model, Run(7))
    assert step.token(step.step([4], 0)) == 0
    sampling = Sampling(temperature=1.0, top_k=3, seed=5)
    ticket = step.step([4], 0, logits=True, sampling=sampling)
    assert_sampled(step.token(ticket), step.read_logits(1)[0], sampling, 1)


def test_sampled_tokens_are_chained(machine: Machine) -> None:
    model = RandomModel(model_config(), "bf16")
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=99)
    chained, plain = machine.open(model), machine.open(model)
    tickets = [chained.step([4], 0, sampling=sampling)]
    tickets += [chained.step([CHAINED], p, sampling=sampling) for p in range(1, 12)]
    chained.wait()
    token = 4
    for position, ticket in enumerate(tickets):
        token = plain.token(plain.step([token], position, sampling=sampling))
        assert token == chained.token(ticket)
