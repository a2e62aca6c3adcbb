"""From tokens to text that is certain: whole characters, and no beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What Tokenizer.stream() returns: text of whole characters only."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """Tokens in, certain text out. Without a decoder (a model without a tokenizer): none."""

    def __init__(self, decoder: Decoder | None, stop: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """A stop string has come."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        return self._stops.push(self._decoder.push(token)) if self._decoder else ""

    def flush(self) -> str:
        """What was held back, at the end of the tokens. Nothing after a stop string."""
        if self._decoder is None or self.stopped:
            return ""
        return self._stops.push(self._decoder.flush()) + self._stops.flush()


class StopStrings:
    """Cuts a stream of text before the first stop string, wherever the pieces break.

    >>> stops = StopStrings(["END"])
    >>> [stops.push("the E"), stops.push("N"), stops.push("d EN"), stops.push("Dless")]
    ['the ', '', 'ENd ', '']
    >>> stops.stopped
    True
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.stopped = False
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, text: str) -> str:
        """Adds text; returns what is certain to be output. Nothing after a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        places = [place for place in map(text.find, self.strings) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, string) for string in self.strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when the stream has ended without a stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``string``."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
