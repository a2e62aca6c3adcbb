"""Checked access to the keys of a JSON object. An error names file, key, rule and value found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

REQUIRED: Any = object()  # as a default: the key cannot be left out


class JsonKeys:
    """A JSON object whose values are untrusted. A null counts as a missing key.

    source: the file's name, for messages. prefix: the way to this object inside the file.
    """

    def __init__(self, values: Any, source: str, prefix: str = "") -> None:
        if not isinstance(values, Mapping):
            where = f"{source}: {prefix.rstrip('.')}" if prefix else source
            raise ConfigError(f"{where} must be a JSON object, found {type(values).__name__}")
        self.values: Mapping[str, Any] = values
        self.source, self.prefix = source, prefix

    def error(self, key: str, rule: str) -> ConfigError:
        """The exception for a key that breaks a rule; the caller raises it."""
        found = f"{self.values[key]!r:.100}" if key in self.values else "nothing"
        return ConfigError(f"{self.source}: {self.prefix}{key} must be {rule}, found {found}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, low: int, high: int, default: Any = REQUIRED) -> int:
        rule = f"an integer from {low} to {high}"
        value = self.get(key, default)
        if value is REQUIRED:
            raise self.error(key, f"given: {rule}")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, rule)
        return value

    def number(self, key: str, low: float, high: float, default: Any = REQUIRED) -> float:
        rule = f"a finite number from {low:g} to {high:g}"
        value = self.get(key, default)
        if value is REQUIRED:
            raise self.error(key, f"given: {rule}")
        if not is_number(value, low, high):
            raise self.error(key, rule)
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        return None if self.get(key) is None else self.number(key, low, high)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def names(self, key: str, rule: str) -> list[str]:
        """A list of strings; a missing key is an empty one."""
        value = self.get(key, [])
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
            raise self.error(key, rule)
        return list(value)

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        rule = f"a list of {count} finite numbers from {low:g} to {high:g}"
        values = self.get(key)
        if not isinstance(values, (list, tuple)) or len(values) != count:
            raise self.error(key, rule)
        if not all(is_number(value, low, high) for value in values):
            raise self.error(key, rule)
        return tuple(float(value) for value in values)

    def token_ids(self, key: str, vocab_size: int, default: int | None) -> tuple[int, ...]:
        """An id, a list of ids or null; a missing key is ``default`` if the vocabulary has it."""
        if key not in self.values:
            return () if default is None or default >= vocab_size else (default,)
        value = self.values[key]
        ids = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                rule = f"token ids below vocab_size ({vocab_size}): one, a list of them, or null"
                raise self.error(key, rule)
        return tuple(ids)


def is_number(value: Any, low: float, high: float) -> bool:
    """Whether a JSON value is a number (not a bool) in the range. NaN never is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
