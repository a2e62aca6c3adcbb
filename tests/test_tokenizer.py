"""Tokenizers: rebuilt from GGUF metadata, loaded, encoding, decoding, streaming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import numpy as np
import pytest
from small_model import ScriptedEngine

from minflash.config import ModelConfig
from minflash.errors import TokenizerError
from minflash.gguf_tokenizer import tokenizer_files
from minflash.llm import LLM
from minflash.tokenizer import Tokenizer

CONFIG = replace(ModelConfig.from_hf(checkpoints.CASES["llama2"]), vocab_size=1000)
TEXTS = {
    "english": "The quick brown fox jumps over the lazy dog. It's 9 o'clock, isn't it?",
    "german": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "chinese": "天地玄黃,宇宙洪荒。日月盈昃,辰宿列張。",
    "japanese": "いろはにほへと ちりぬるを カタカナ",
    "korean": "키스의 고유조건은 입술끼리 만나야 하고",
    "emoji": "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 skin, 🇩🇪, ❤️",
    "combining": "e\u0301 a\u0308 Z\u0351\u036b\u0343",
    "digits": "0 1 12 123 1234567890 3.14159 1,000,000 ١٢٣ ½ Ⅷ",
    "python": "def f(x):\n\treturn [i ** 2 for i in range(x)]  # squares\n\n\nprint(f(10))\n",
    "c": "int main(void) { return a->b[0] & ~0xFF ? -1 : 0; } /* … */\r\n",
    "whitespace": "  two  three   \t\ttabs \n\n\n lines \r\n\u00a0nbsp\u2003em ",
    "controls": "a\x00b\x07c\x1b[0m\x7f",
    "outside the BMP": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
    "empty": "",
    "one space": " ",
}


@pytest.fixture(scope="module")
def smollm(default_folder: Path) -> Tokenizer:
    """The default model's tokenizer."""
    return Tokenizer.load(default_folder, 49152)


# SmolLM2, rebuilt from the default model's GGUF


@pytest.mark.parametrize("name", TEXTS)
def test_round_trip(smollm: Tokenizer, name: str) -> None:
    ids = smollm.encode(TEXTS[name])
    assert smollm.decode(ids) == TEXTS[name]
    stream = smollm.stream()
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) + stream.flush() == TEXTS[name]
    assert not any("\ufffd" in part for part in parts)


def test_known_ids(smollm: Tokenizer) -> None:
    """The beginning of every default SmolLM2 chat, as published logs of other programs show it."""
    ids = smollm.apply_chat_template([{"role": "user", "content": "Hi"}])
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018]
    assert ids[:15] == system
    assert ids[15:] == [
        411,
        407,
        19712,
        8182,
        2,
        198,
        1,
        4093,
        198,
        26843,
        2,
        198,
        1,
        520,
        9531,
        198,
    ]
    assert (smollm.bos_token_id, smollm.eos_token_ids) == (1, (2,))
    assert smollm.special_ids == frozenset(range(17))


def test_digits_stand_alone(smollm: Tokenizer) -> None:
    words = [smollm.decode([token]) for token in smollm.encode("12345 in 2024")]
    assert words == ["1", "2", "3", "4", "5", " in", " ", "2", "0", "2", "4"]


def test_no_bos_for_a_family_without(smollm: Tokenizer) -> None:
    assert smollm.encode("Hello") == [19556]
    assert smollm.encode("") == []


def test_special_tokens_only_where_asked(smollm: Tokenizer) -> None:
    assert smollm.encode("a<|im_end|>b", special=True) == [81, 2, 82]
    plain = smollm.encode("a<|im_end|>b")
    assert smollm.special_ids.isdisjoint(plain)
    assert smollm.decode(plain) == "a<|im_end|>b"
    assert smollm.decode([81, 2, 82]) == "ab"
    assert smollm.decode([81, 2, 82], skip_special=False) == "a<|im_end|>b"


def test_lone_surrogates_become_replacement_characters(smollm: Tokenizer) -> None:
    assert smollm.decode(smollm.encode("a\udc80b")) == "a\ufffdb"


def test_a_stream_that_ends_inside_a_character(smollm: Tokenizer) -> None:
    ids = smollm.encode("𐍈")
    assert len(ids) > 1
    stream = smollm.stream()
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\ufffd"


# Other families, built from made-up metadata


def byte_letters() -> dict[int, str]:
    """GPT-2's table: every byte as a printable letter."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


def gpt2_metadata(pre: str | None, **changed: Any) -> dict[str, Any]:
    letters = list(byte_letters().values())
    merged = ["he", "ll", "hell", "hello", "Ġhello", "12", "123", "ab"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "a b"]
    special = ["<|begin|>", "<|end|>", "<tool>"]
    tokens = letters + merged + special
    metadata: dict[str, Any] = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges,
        "token_type": np.array([1] * (len(tokens) - 3) + [3, 3, 4], np.int32),
        "bos_token_id": len(tokens) - 3, "eos_token_id": len(tokens) - 2,
    }  # fmt: skip
    metadata.update(changed)
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def llama_metadata(**changed: Any) -> dict[str, Any]:
    words = ["▁", "h", "e", "l", "o", "w", "▁h", "ll", "▁he", "▁hell", "▁hello", "lo", "▁w"]
    control, single = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = control + single + words
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(words)
    metadata: dict[str, Any] = {
        "model": "llama", "tokens": tokens, "token_type": np.array(kinds, np.int32),
        "scores": -np.arange(len(tokens), dtype=np.float32),
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    metadata.update(changed)
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def built(folder: Path, metadata: dict[str, Any], vocab_size: int = 1000) -> Tokenizer:
    source: Any = SimpleNamespace(metadata=metadata, path=folder / "model.gguf")
    for name, content in tokenizer_files(source).items():
        (folder / name).write_bytes(content)
    return Tokenizer.load(folder, vocab_size)


PRE = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", None]


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_families(tmp_path: Path, pre: str | None) -> None:
    tokenizer = built(tmp_path, gpt2_metadata(pre))
    for name, text in TEXTS.items():
        if pre == "qwen2" and name == "combining":  # this family composes characters
            continue
        assert tokenizer.decode(tokenizer.encode(text)) == text, name
    has_bos = pre in ("llama-bpe", "tekken")
    assert (tokenizer.encode("hello")[0] == tokenizer.bos_token_id) is has_bos


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["1234"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("tekken", ["1", "2", "3", "4"]),
    ],
)
def test_how_digits_are_cut(tmp_path: Path, pre: str, words: list[str]) -> None:
    tokenizer = built(tmp_path, gpt2_metadata(pre))
    pairs = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str("1234")
    assert [word for word, _ in pairs] == words


def test_bos_is_never_doubled(tmp_path: Path) -> None:
    tokenizer = built(tmp_path, gpt2_metadata("llama-bpe"))
    bos = tokenizer.bos_token_id
    assert bos is not None
    plain = tokenizer.encode("hello", add_bos=False)
    assert tokenizer.encode("hello") == [bos, *plain]
    assert tokenizer.encode("<|begin|>hello", special=True) == [bos, *plain]
    assert tokenizer.encode("<|begin|>hello").count(bos) == 1  # the text is text
    off = built(tmp_path, gpt2_metadata("llama-bpe", add_bos_token=False))
    assert off.encode("hello") == plain


def test_user_defined_tokens_are_not_special(tmp_path: Path) -> None:
    tokenizer = built(tmp_path, gpt2_metadata("gpt-2"))
    ids = tokenizer.encode("<tool>")
    assert len(ids) == 1 and not tokenizer.special_ids.intersection(ids)
    assert tokenizer.decode(ids) == "<tool>"


def test_end_of_turn_tokens_end_an_answer(tmp_path: Path) -> None:
    metadata = gpt2_metadata("llama-bpe")
    end = metadata["tokenizer.ggml.eos_token_id"]
    metadata["tokenizer.ggml.eot_token_id"] = end - 1
    assert built(tmp_path, metadata).eos_token_ids == (end, end - 1)


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = built(tmp_path, llama_metadata())
    ids = tokenizer.encode("hello wo")
    assert [tokenizer._tokenizer.id_to_token(token) for token in ids] == [
        "<s>",
        "▁hello",
        "▁w",
        "o",
    ]
    for name, text in TEXTS.items():
        assert tokenizer.decode(tokenizer.encode(text)) == text, name
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("</s>", add_bos=False))
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in tokenizer.encode("hello 😀 w")]
    assert "".join(parts) == "hello 😀 w" and not any("\ufffd" in part for part in parts)


def test_a_stream_after_a_context_keeps_its_space(tmp_path: Path) -> None:
    tokenizer = built(tmp_path, llama_metadata())
    prompt, answer = tokenizer.encode("hello"), tokenizer.encode("hello hello", add_bos=False)[1:]
    assert tokenizer.stream(prompt).push(answer[0]) == " hello"
    assert tokenizer.stream().push(answer[0]) == "hello"


def test_an_answer_starts_without_the_space_that_a_completion_keeps(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}"
    tokenizer = built(tmp_path, {**llama_metadata(), "tokenizer.chat_template": template})
    words = tokenizer.encode("hello wo", add_bos=False)
    model, count = LLM(ScriptedEngine(CONFIG, words), tokenizer), {"max_tokens": len(words)}
    assert model.chat("hello", **count) == "hello wo"
    assert model.generate([{"role": "user", "content": "hello"}], **count) == "hello wo"
    assert model.generate("hello", **count) == " hello wo"


def test_sentencepiece_without_a_prefix(tmp_path: Path) -> None:
    tokenizer = built(tmp_path, llama_metadata(add_space_prefix=False, add_bos_token=False))
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (gpt2_metadata("falcon"), "pre is 'falcon'; supported are default, gpt-2, smollm"),
        (gpt2_metadata("gpt-2", model="bert"), "model is 'bert'; supported are gpt2 and llama"),
        (gpt2_metadata("gpt-2", tokens=["a", "a"]), "lists a token twice"),
        (
            gpt2_metadata("gpt-2", tokens=None, bos_token_id=None),
            "tokens, a list of strings, is missing",
        ),
        (gpt2_metadata("gpt-2", token_type=np.zeros(3)), "token_type must list 267 numbers"),
        (
            gpt2_metadata("gpt-2", merges=["h zz"]),
            "merge 0, 'h zz', names a token that is not listed",
        ),
        (gpt2_metadata("gpt-2", bos_token_id=999), "bos_token_id is 999; the vocabulary has 267"),
        (llama_metadata(scores=None), "scores must list 272 numbers"),
    ],
)
def test_damaged_metadata(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as raised:
        built(tmp_path, metadata)
    assert "model.gguf" in str(raised.value)


def test_a_file_without_a_tokenizer() -> None:
    assert tokenizer_files(SimpleNamespace(metadata={}, path=Path("x"))) == {}  # type: ignore[arg-type]


# Folders


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"up to 266 \(267 tokens\).*vocab_size is 266"):
        built(tmp_path, gpt2_metadata("gpt-2"), vocab_size=266)
    built(tmp_path, gpt2_metadata("gpt-2"), vocab_size=267)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "not a usable tokenizer.json"),
        ("tokenizer.json", b"[1, 2", "not a usable tokenizer.json"),
        ("tokenizer.json", b'{"version": "1.0"}', "not a usable tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "not valid UTF-8"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[]", "a JSON object is needed, not list"),
        ("tokenizer_config.json", b"[" * 100000, "not valid JSON"),
        ("generation_config.json", b"\xff", "not valid UTF-8"),
        ("chat_template.jinja", b"\xff", "not valid UTF-8"),
    ],
)
def test_damaged_folders(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    built(tmp_path, gpt2_metadata("gpt-2"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as raised:
        Tokenizer.load(tmp_path, 1000)
    assert name in str(raised.value)


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read: No such file"):
        Tokenizer.load(tmp_path, 1000)


def test_settings_of_hugging_face_folders(tmp_path: Path) -> None:
    built(tmp_path, gpt2_metadata("llama-bpe"))
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 9]}')
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": None,
              "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False,
              "chat_template": [{"name": "tool_use", "template": "t"},
                                {"name": "default", "template": "d"}]}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path, 1000)
    assert tokenizer.bos_token == "<|begin|>" and tokenizer.eos_token_ids == (7, 9)
    assert tokenizer.chat_template == "d"
    assert tokenizer.bos_token_id not in tokenizer.encode("hello")


def test_truncation_and_padding_of_the_training_are_off(tmp_path: Path) -> None:
    built(tmp_path, gpt2_metadata("gpt-2"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                             "stride": 0}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.load(tmp_path, 1000).encode("xyzxyz")) == 6
