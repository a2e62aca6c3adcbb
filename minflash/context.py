"""How many tokens a context leaves for an answer."""

from __future__ import annotations

from .arguments import DEFAULT_MAX_TOKENS
from .errors import ContextError


def room(prompt_tokens: int, asked: int | None, max_context: int) -> int:
    """Tokens to make at most. Raises ContextError when the context does not hold them.

    asked: max_tokens, or None for the default, bounded by what there is.
    """
    left = max_context - prompt_tokens
    if left < 1:
        raise ContextError(too_long(prompt_tokens, max_context))
    if asked is not None and asked > left:
        raise ContextError(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {asked}, together "
            f"{prompt_tokens + asked}, but the context holds {max_context}; ask for at "
            f"most {left}, shorten the prompt, or load with a larger max_context"
        )
    return asked or min(DEFAULT_MAX_TOKENS, left)


def too_long(tokens: int, max_context: int) -> str:
    """The message of a prompt that leaves no room."""
    return (
        f"the prompt has {tokens} tokens, but the context holds {max_context} with room for the "
        "answer; shorten it, or load with a larger max_context if the model allows"
    )
