"""What single tokens say, for log-probabilities: their text in the middle of a text, and bytes."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .llm import LLM
    from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # of SentencePiece: a byte of a rare character


class TokenTexts:
    """Texts of one model's tokens."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def of(self, token: int) -> tuple[str, bytes | None]:
        """The text of a token and its bytes.

        A part of a character is no text: it is named by its bytes, as OpenAI does, so that no two
        of them look the same. The bytes are None where the tokenizer does not tell them.
        """
        text, piece = self.text(token), self._tokenizer.piece(token)
        if _REPLACEMENT not in text or _REPLACEMENT in piece:  # the second: U+FFFD itself
            return text, text.encode()
        found = _bytes(piece)
        if found is None or found.decode("utf-8", "replace") != text:
            return text, None
        return (text if text.encode() == found else _named(found)), found

    def text(self, token: int) -> str:
        """With its space in front, which a text's first token may lose; special tokens too."""
        before, anchor = self._anchor
        text = self._decode([*before, token])
        return text[len(anchor) :] if text.startswith(anchor) else self._decode([token])

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._llm._need_tokenizer("log-probabilities name tokens")

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special=False)

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A token that others can follow in a text, and its own text: a plain word or letter.

        Not one of a byte, which would make one character with the next.
        """
        special = self._tokenizer.special_ids
        for token in range(self._llm.config.vocab_size):
            text = self._decode([token])
            plain = text.isascii() and text.isalnum() and token not in special
            if plain and not _BYTE_TOKEN.fullmatch(self._tokenizer.piece(token)):
                return [token], text
        return [], ""


def _bytes(piece: str) -> bytes | None:
    """The bytes of a token, from its name in the vocabulary; None when it names none."""
    if found := _BYTE_TOKEN.fullmatch(piece):
        return bytes.fromhex(found[1])
    if all(character in _LETTERS for character in piece):
        return bytes(_LETTERS[character] for character in piece)
    return None


def _named(part: bytes) -> str:
    r"""As ``bytes:\xe6``: what is no plain ASCII as hexadecimal numbers."""
    plain = set(range(32, 127)) - {ord("\\")}
    return "bytes:" + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in part)


def _byte_letters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a letter that can be seen (GPT-2, encoder.py)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + number): byte for number, byte in enumerate(rest)}


_LETTERS = _byte_letters()
