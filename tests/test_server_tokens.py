"""How log-probabilities name tokens, of both kinds of tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_model import ScriptedEngine
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as RawTokenizer
from web_server import MESSAGES, connect, running

import minflash
from minflash.server_tokens import TokenTexts
from minflash.tokenizer import Tokenizer

WORDS = ["▁", "s", "k", "y", "▁s", "▁sk", "▁sky", "A", "é", "\ufffd"]
MERGES = [("▁", "s"), ("▁s", "k"), ("▁sk", "y")]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
VOCABULARY = {
    token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *WORDS])
}
UNUSED = len(VOCABULARY)  # a row of the embedding that no token has


class Speaker(ScriptedEngine):
    """Says the script; the likeliest tokens everywhere are those of ``likely``, in this order."""

    likely: Sequence[int] = ()

    def logit_parts(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        logits = np.zeros((len(tokens), self.config.vocab_size), np.float32)
        logits[:, list(self.likely)] = np.arange(len(self.likely), 0, -1) * 5.0
        yield logits


def write_llama2(folder: Path) -> Path:
    """As Llama 2's and Mistral's: SentencePiece's vocabulary with bytes, as BPE."""
    raw = RawTokenizer(
        models.BPE(VOCABULARY, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    joined = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), *joined])
    raw.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}'
    )
    return folder


@pytest.fixture(scope="module")
def llama2(llm: minflash.LLM, tmp_path_factory: pytest.TempPathFactory) -> minflash.LLM:
    config = replace(llm.config, vocab_size=UNUSED + 1, eos_token_ids=())
    tokenizer = Tokenizer.load(write_llama2(tmp_path_factory.mktemp("llama2")), UNUSED)
    script = ["▁sky", *(f"<0x{byte:02X}>" for byte in "漢".encode())]
    engine = Speaker(config, [VOCABULARY[token] for token in script])
    engine.likely = [VOCABULARY[token] for token in ("▁s", "s", "<0xE6>", "<0xBC>", "A", "<0x41>")]
    return minflash.LLM(engine, tokenizer)


@pytest.mark.parametrize(
    ("piece", "text", "found"),
    [
        ("▁sky", " sky", b" sky"),
        ("▁", " ", b" "),
        ("s", "s", b"s"),
        ("é", "é", "é".encode()),
        ("\ufffd", "\ufffd", b"\xef\xbf\xbd"),
        ("<0x41>", "A", b"A"),
        ("<0x0A>", "\n", b"\n"),
        ("<0xE6>", r"bytes:\xe6", b"\xe6"),
        ("</s>", "</s>", b"</s>"),
    ],
)
def test_sentencepiece(llama2: minflash.LLM, piece: str, text: str, found: bytes) -> None:
    assert TokenTexts(llama2).of(VOCABULARY[piece]) == (text, found)
    assert TokenTexts(llama2).of(UNUSED) == ("", b"")


def test_byte_level(llm: minflash.LLM) -> None:
    texts, words = TokenTexts(llm), llm.tokenize("sky sky\n")
    assert "".join(texts.of(token)[0] for token in words) == "sky sky\n"
    emoji = [texts.of(token) for token in llm.tokenize("🙂")]
    assert b"".join(found or b"" for _, found in emoji) == "🙂".encode()
    assert len(emoji) > 1 and all(text.startswith("bytes:") for text, _ in emoji)
    assert emoji[0][0].startswith(r"bytes:\xf0")
    assert texts.text(next(iter(llm.eos_token_ids))).startswith("<|")


@pytest.mark.parametrize("model", ["llama2", "llm"])
def test_different_tokens_have_different_names(model: str, request: pytest.FixtureRequest) -> None:
    """All but those that are the same text: a letter and the token of its byte."""
    llm = request.getfixturevalue(model)
    tokens = range(UNUSED if model == "llama2" else llm.config.vocab_size)
    names = [TokenTexts(llm).of(token)[0] for token in tokens]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == ({" ", "s", "k", "y", "A"} if model == "llama2" else set())


def test_a_chat(llama2: minflash.LLM) -> None:
    with running(llama2) as server, connect(server) as client:
        asked: Any = {"model": "default", "messages": MESSAGES, "max_tokens": 4, "logprobs": True}
        choice = client.chat.completions.create(**asked).choices[0]
    assert choice.message.content == "sky漢"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    told = [(one.token, bytes(one.bytes or [])) for one in choice.logprobs.content]
    assert told[0] == (" sky", b" sky") and told[1] == (r"bytes:\xe6", b"\xe6")
    assert b"".join(part for _, part in told) == " sky漢".encode()


def test_a_scored_text(llama2: minflash.LLM) -> None:
    """Nothing merges but what is the same text, and the offsets are the text's own."""
    with running(llama2) as server, connect(server) as client:
        create: Any = client.completions.create
        asked = {"prompt": "sky sky é漢", "echo": True, "logprobs": 6, "max_tokens": 0}
        (choice,) = create(model="default", **asked).choices
    assert choice.text == asked["prompt"]
    found = choice.logprobs
    parts = [r"bytes:\xe6", r"bytes:\xbc", r"bytes:\xa2"]
    assert found.tokens == [" sky", " sky", " ", "é", *parts]
    ends = [*found.text_offset, len(choice.text)]
    assert [choice.text[begin:end] for begin, end in pairwise(ends)] == [
        *("sky", " sky", " ", "é"),
        *("", "", "漢"),
    ]
    top = found.top_logprobs[1]
    assert list(top) == ["A", r"bytes:\xbc", r"bytes:\xe6", "s", " s"]
    assert top[r"bytes:\xbc"] - top["A"] == pytest.approx(5)  # of the two "A" the likelier
