"""A random model of 257 tokens with a byte-level tokenizer, for tests of loading and generation.

Its tokens are the 256 bytes (id = byte) and one special token, 256: <|end|>.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import write_checkpoint
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from minflash.config import ModelConfig
from minflash.engine import Cancelled, Choose
from minflash.sampling import Sampling
from minflash.tokenizer import Tokenizer

END = 256
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_characters() -> list[str]:
    """The character by which byte-level BPE shows each byte (GPT-2, encoder.py)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte if byte in shown else next(rest)) for byte in range(256)]


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> None:
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<|end|>", special=True)])
    raw.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": "<|end|>"}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_source(folder: Path, case: str = "llama2") -> Path:
    """A Hugging Face folder of 2 layers, context 128, with the tokenizer."""
    write_checkpoint(folder, case)
    write_tokenizer(folder)
    return folder


def load_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> Tokenizer:
    write_tokenizer(folder, template=template)
    return Tokenizer.load(folder, 257)


class ScriptedEngine:
    """An engine that says what it is told: for tests of what happens to tokens afterwards."""

    device = "cpu"

    def __init__(self, config: ModelConfig, script: bytes | Sequence[int]) -> None:
        self.config = config
        self.max_context = config.max_context
        self.script = list(script)
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.produced = self.reused = 0
        self.running = 0
        self.most_running = 0
        self.closed = 0

    def tokens(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        count: int,
        *,
        choose: Choose | None = None,
        cancelled: Cancelled | None = None,
    ) -> Generator[int, None, None]:
        self.prompts.append(list(prompt))
        self.samplings.append(sampling)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for index in range(count):
                if cancelled is not None and cancelled():
                    return
                self.produced += 1
                token = self.script[index % len(self.script)]
                logits = np.zeros(self.config.vocab_size, np.float32)
                logits[token] = 10.0
                yield token if choose is None else choose(logits, len(prompt) + index)
        finally:
            self.running -= 1

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.zeros((len(tokens), self.config.vocab_size), np.float32)

    def close(self) -> None:
        self.closed += 1
