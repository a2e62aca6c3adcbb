"""One step of the kernel against the specification of sampling, for the tests of its tail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from kernel_models import RandomModel, model_config
from sampled import ANSWER, ENDS, PROMPT, assert_report, assert_sampled, bits_of

from minflash.quantize import quantize
from minflash.sampling import Sampling, adjusted, sample
from minflash.step_model import StepModel
from minflash.tail import Extras, noted_tokens


def check(
    step: StepModel,
    sampling: Sampling,
    *,
    allowed: np.ndarray | None = None,
    logprobs: int | None = None,
    tokens: Sequence[int] = (3,),
    position: int = 2,
) -> int:
    """One step with a history: its token and its report. Returns the token."""
    ban = len(ANSWER) < sampling.min_tokens
    if sampling.adjusts:
        noted = noted_tokens(step.config.vocab_size, sampling, PROMPT, ANSWER, ENDS)
        step.note_tokens(noted)
    mask = None if allowed is None else bits_of(allowed)
    extras = Extras(sampling.adjusts, ban, mask, logprobs)
    ticket = step.step(tokens, position, logits=True, sampling=sampling, extras=extras)
    logits = step.read_logits(len(tokens))[-1]
    token = step.token(ticket)
    scores = adjusted(logits, sampling, PROMPT, ANSWER, ENDS, allowed)
    if sampling.greedy:
        assert token == sample(scores, sampling, 0)
    else:
        assert_sampled(token, scores, sampling, position + len(tokens))
    if logprobs is not None:
        assert_report(step.logprobs(ticket, logprobs), logits, token, logprobs)
    if sampling.adjusts:
        step.note_tokens(noted)
    again = step.step(tokens, position, sampling=sampling, extras=extras)
    assert step.token(again) == token  # the logits need not be kept
    return token


def tied_model(vocab_size: int, values: Sequence[float]) -> RandomModel:
    """Logits that take few values: equal rows of the head."""
    model = RandomModel(model_config(tied=False, vocab_size=vocab_size), "bf16")
    row = np.random.default_rng(2).standard_normal(96)
    factors = np.resize(np.asarray(values), vocab_size)
    model.put("lm_head", quantize((factors[:, None] * row).astype(np.float32), "bf16"))
    return model
