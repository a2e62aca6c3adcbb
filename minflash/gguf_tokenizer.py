"""Rebuilds the files of a Hugging Face tokenizer from the metadata of a GGUF file.

Keys and token types: github.com/ggml-org/ggml, docs/gguf.md, "Tokenizer". GGUF names the rule that
cuts text into words (``tokenizer.ggml.pre``) but does not hold it: the rules below are those of the
tokenizer.json files that the models were published with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from .errors import TokenizerError
from .gguf import GGUFFile
from .gguf_config import token_ids

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    """ByteLevel's own regex is GPT-2's."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(regex: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


_GPT2: list[dict[str, Any]] = [_byte_level(use_regex=True)]
_DIGITS: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}, *_GPT2]

# tokenizer.ggml.pre -> the steps that cut text into words
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "llama-v3": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
    "deepseek-r1-qwen": _split(_QWEN2),
    "tekken": _split(_TEKKEN),
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word in the vocabulary is not cut
_COMPOSED = ("qwen2", "deepseek-r1-qwen")  # Unicode NFC before anything else


def tokenizer_files(gguf: GGUFFile) -> dict[str, bytes]:
    """File name -> content of the tokenizer's files; {} when the file holds no tokenizer.

    Raises TokenizerError when the tokenizer is damaged or of a kind that is not supported.
    """
    if "tokenizer.ggml.model" not in gguf.metadata:
        return {}
    vocabulary = _Vocabulary(gguf)
    files = {
        "tokenizer.json": _json(vocabulary.tokenizer()),
        "tokenizer_config.json": _json(vocabulary.tokenizer_config()),
        "generation_config.json": _json(token_ids(gguf)),
    }
    template = gguf.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return files


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


class _Vocabulary:
    """The tokenizer's metadata, checked."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.path = gguf.path
        self.metadata = gguf.metadata
        self.kind = self.get("model")
        if self.kind not in ("gpt2", "llama"):
            raise self.error(f"tokenizer.ggml.model is {self.kind!r}; supported are gpt2 and llama")
        self.tokens = self._strings("tokens")
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if not self.tokens or len(self.ids) != len(self.tokens):
            raise self.error("tokenizer.ggml.tokens is empty or lists a token twice")
        self.types = self._numbers("token_type")
        self.pre = self.get("pre") or "default"
        if self.kind == "gpt2" and self.pre not in _PRE_TOKENIZERS:
            raise self.error(
                f"tokenizer.ggml.pre is {self.pre!r}; supported are {', '.join(_PRE_TOKENIZERS)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        parts = self._byte_level() if self.kind == "gpt2" else self._sentencepiece()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            "post_processor": self._post_processor(),
            **parts,
        }

    def tokenizer_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.adds_bos(),
            "clean_up_tokenization_spaces": False,
        }
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            number = self._token_id(key)
            if number is not None:
                config[f"{name}_token"] = self.tokens[number]
        return config

    def adds_bos(self) -> bool:
        """add_bos_token; where the file does not say it, what the family does."""
        family = self.kind == "llama" or self.pre in _WHOLE_WORDS
        adds = self.get("add_bos_token", family)
        return bool(adds) and self._token_id("bos") is not None

    def _byte_level(self) -> dict[str, Any]:
        steps = _PRE_TOKENIZERS[self.pre]
        return {
            "normalizer": {"type": "NFC"} if self.pre in _COMPOSED else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": _byte_level(use_regex=True),
            "model": self._bpe(list(self._stored_merges()), self.pre in _WHOLE_WORDS),
        }

    def _sentencepiece(self) -> dict[str, Any]:
        """A space is the letter U+2581; what the vocabulary lacks is spelled in bytes."""
        prefix = bool(self.get("add_space_prefix", True))
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        restore = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        normalizers = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
        decoders = [restore, {"type": "ByteFallback"}, {"type": "Fuse"}]
        model = self._bpe(list(self._scored_merges()), False)
        unknown = self._token_id("unknown")
        model["unk_token"] = None if unknown is None else self.tokens[unknown]
        model["fuse_unk"] = model["byte_fallback"] = True
        return {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": [*decoders, strip] if prefix else decoders},
            "model": model,
        }

    def _bpe(self, merges: list[tuple[str, str]], ignore_merges: bool) -> dict[str, Any]:
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": self.ids,
            "merges": merges,
        }

    def _stored_merges(self) -> Iterator[tuple[str, str]]:
        for number, merge in enumerate(self._strings("merges")):
            left, _, right = merge.partition(" ")
            if left not in self.ids or right not in self.ids or left + right not in self.ids:
                raise self.error(f"merge {number}, {merge!r}, names a token that is not listed")
            yield left, right

    def _scored_merges(self) -> list[tuple[str, str]]:
        """The order of merges that the scores imply: the pair with the best scored result first."""
        scores = self._numbers("scores")
        normal = [n for n in range(len(self.tokens)) if self.types[n] in (NORMAL, UNUSED)]
        pairs: list[tuple[float, int, int, str, str]] = []
        for number in normal:
            piece = self.tokens[number]
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in self.ids and right in self.ids:
                    ids = self.ids[left], self.ids[right]
                    pairs.append((-float(scores[number]), *ids, left, right))
        return [(left, right) for _, _, _, left, right in sorted(pairs)]

    def _added_tokens(self) -> list[dict[str, Any]]:
        """Control tokens are special; user-defined ones are only never cut."""
        kinds = (UNKNOWN, CONTROL, USER_DEFINED)
        return [
            {
                "id": number,
                "content": self.tokens[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": int(kind) != USER_DEFINED,
            }
            for number, kind in enumerate(self.types)
            if kind in kinds and self.tokens[number]
        ]

    def _post_processor(self) -> dict[str, Any] | None:
        number = self._token_id("bos")
        if number is None or not self.adds_bos():
            return None
        bos = self.tokens[number]
        text = {"Sequence": {"id": "A", "type_id": 0}}
        mark = {"SpecialToken": {"id": bos, "type_id": 0}}
        return {
            "type": "TemplateProcessing",
            "single": [mark, text],
            "pair": [mark, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
        }

    def _token_id(self, key: str) -> int | None:
        number = self.get(f"{key}_token_id")
        if number is None or number == 2**32 - 1:  # the latter is -1: there is none
            return None
        if type(number) is not int or not 0 <= number < len(self.tokens):
            raise self.error(
                f"tokenizer.ggml.{key}_token_id is {number!r}; "
                f"the vocabulary has {len(self.tokens)} tokens"
            )
        return number

    def _strings(self, key: str) -> list[str]:
        strings = self.get(key)
        if not isinstance(strings, list):
            raise self.error(f"tokenizer.ggml.{key}, a list of strings, is missing")
        return strings

    def _numbers(self, key: str) -> Any:
        numbers = self.get(key)
        if not isinstance(numbers, np.ndarray) or len(numbers) != len(self.tokens):
            raise self.error(
                f"tokenizer.ggml.{key} must list {len(self.tokens)} numbers, one for each token"
            )
        if not np.isfinite(numbers).all():
            raise self.error(f"tokenizer.ggml.{key} holds a number that is not finite")
        return numbers

    def error(self, message: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: {message}")
