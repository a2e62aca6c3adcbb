"""Values as the messages of errors show them."""

from __future__ import annotations


def shown(value: object, length: int = 80) -> str:
    """The beginning of a value's repr, for a message: whatever was given, the message can be made.

    A value nested some thousand deep has no repr, nor has a number of more than 4,300 digits.
    """
    try:
        return repr(value)[:length]
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} that cannot be shown"
