"""How long a context may be, and how many tokens it leaves for an answer."""

from __future__ import annotations

from .errors import ContextError


def check_own(asked: int | None, own: int, name: str = "max_context") -> None:
    """Raises ContextError when ``asked`` is more than the model's own positions."""
    if asked is not None and asked > own:
        raise ContextError(
            f"{name} is {asked}, but the model's own is {own} positions; ask for at most {own}"
        )


def room(prompt_tokens: int, asked: int | None, max_context: int) -> int:
    """Tokens to make at most. Raises ContextError when the context does not hold them.

    asked: max_tokens, or None for the default, bounded by what there is.
    """
    from .arguments import DEFAULT_MAX_TOKENS  # brings NumPy, before which BLAS must be told

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
