"""Log-probabilities of a prompt's tokens, for completions that repeat their prompt."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .chunk import Chunk
from .sampling import log_probabilities

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .llm import LLM


def score_prompt(
    llm: LLM, tokens: Sequence[int], texts: Sequence[str], top: int, cancelled: threading.Event
) -> list[Chunk]:
    """The prompt's tokens as chunks with ``texts``: ``top`` alternatives each, the first has none.

    As ``LLM.score``, but ``cancelled`` ends it early, also while it waits for its turn.
    """
    chunks = [Chunk(texts[0], tokens[0])]
    with llm._turn(cancelled) as came:
        for logits in llm._engine.logit_parts(tokens) if came else ():
            begin = len(chunks)
            following = zip(logits, tokens[begin:], texts[begin:], strict=False)  # the last: none
            for row, token, text in following:
                logprobs = log_probabilities(row)
                likeliest = _likeliest(logprobs, top)
                chunks.append(Chunk(text, token, float(logprobs[token]), likeliest))
            if cancelled.is_set():
                break
    return chunks


def token_texts(
    llm: LLM, prompt: str | Sequence[int], tokens: Sequence[int], text: str
) -> list[str]:
    """What each token adds to the prompt's ``text``: nothing if the text does not show it."""
    added, is_text = 0, isinstance(prompt, str)
    if isinstance(prompt, str):  # special tokens that it names are text; one put before it is not
        added = len(tokens) - len(llm.tokenize(prompt, add_bos=False))
    stream = llm._need_tokenizer("its text is asked for").stream(skip_special=not is_text)
    texts = [""] * added + [stream.push(token) for token in tokens[added:-1]]
    return [*texts, text[sum(map(len, texts)) :]]


def _likeliest(logprobs: NDArray[np.float32], count: int) -> tuple[tuple[int, float], ...]:
    """Token ids and log-probabilities, the likeliest first, of equal ones the lowest id."""
    count = min(count, logprobs.size)
    if not count:
        return ()
    found = np.argpartition(-logprobs, count - 1)[:count]
    found = found[np.lexsort((found, -logprobs[found]))]
    return tuple((int(token), float(logprobs[token])) for token in found)
