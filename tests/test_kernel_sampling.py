"""The token that the step kernel chooses is the specification's, on its own logits."""

from __future__ import annotations

import shutil
from dataclasses import replace

import emulator
import numpy as np
import pytest
from kernel_models import Machine, RandomModel, Run, model_config

from minflash.quantize import quantize
from minflash.sampling import Sampling, gumbel, random_bits, sample, threshold
from minflash.step_model import CHAINED

pytestmark = pytest.mark.skipif(
    shutil.which(emulator.compiler()) is None, reason="the emulated device needs g++"
)

SAMPLINGS = {
    "temperature": Sampling(temperature=0.8),
    "top_k": Sampling(temperature=1.0, top_k=5),
    "top_k 1": Sampling(temperature=1.0, top_k=1),
    "top_k beyond the vocabulary": Sampling(temperature=1.3, top_k=5000),
    "top_p": Sampling(temperature=1.0, top_p=0.7),
    "top_p of one token": Sampling(temperature=0.5, top_p=1e-6),
    "min_p": Sampling(temperature=1.5, min_p=0.1),
    "min_p 1": Sampling(temperature=1.5, min_p=1.0),
    "top_k and top_p": Sampling(temperature=2.0, top_k=20, top_p=0.9),
    "all": Sampling(temperature=1.2, top_k=50, top_p=0.95, min_p=0.02),
}


def assert_sampled(token: int, logits: np.ndarray, sampling: Sampling, position: int) -> None:
    """The token is the specification's, or their difference is within the last bits of log and exp.

    One unit in the last place of a log or exp moves a score, or a threshold, by less than 1e-5.
    """
    if token == sample(logits, sampling, position):
        return
    scaled = logits / np.float32(sampling.temperature)
    assert sampling.seed is not None
    bits = random_bits(np.arange(-(-logits.size // 4), dtype=np.uint32), position, sampling.seed)
    scores = scaled + gumbel(bits.reshape(-1)[: logits.size])
    limit = threshold(scaled, sampling)
    surely_kept = scaled >= limit + 1e-5
    assert scaled[token] >= limit - 1e-5
    assert scores[token] >= scores[surely_kept].max(initial=-np.inf) - 1e-5


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
