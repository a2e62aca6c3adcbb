"""Text to token ids and back, with the package ``tokenizers`` (imported when one is loaded)."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import check_flag, check_text
from .chat import Message, Neutralizer, check_messages, render
from .errors import TokenizerError

MAX_FILE_BYTES = 256 << 20  # of tokenizer.json; the largest in use have about 40 MB
_REPLACEMENT = "\ufffd"
_MAX_PENDING = (
    16  # tokens; a character has at most 4 bytes, so more than a few are not one character
)


class Tokenizer:
    """The tokenizer of one model.

    ``bos_token_id``: int or None. ``eos_token_ids``: tokens that end an answer. ``special_ids``:
    ids of all special tokens. ``chat_template``: Jinja source or None. Threads may share it.
    """

    def __init__(self, source: str, settings: _Settings, vocab_size: int, name: str) -> None:
        self._name = name
        self._source = source
        self._tokenizer = _parse(source, name)
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocab_size:
            raise TokenizerError(
                f"{name}: the tokenizer has token ids up to {largest} ({largest + 1} tokens), the "
                f"model's vocab_size is {vocab_size}: they do not belong together"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token.content: bool(token.special) for token in added.values()}
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.chat_template = settings.chat_template
        self.bos_token, self.eos_token = settings.bos_token, settings.eos_token
        self.bos_token_id: int | None = self._tokenizer.token_to_id(self.bos_token)
        self.eos_token_ids = self._eos_token_ids(settings.eos_token_ids, vocab_size)
        self._adds_bos = self._find_adds_bos(settings.adds_bos)
        self._guarded: tuple[Any, dict[str, str]] | None = None

    @classmethod
    def load(cls, folder: Path, vocab_size: int) -> Tokenizer:
        """The tokenizer of a model's folder, which must hold tokenizer.json.

        vocab_size: rows of the model's embedding. Raises TokenizerError when a file is damaged or
        the tokenizer knows ids that the model does not have.
        """
        path = Path(folder) / "tokenizer.json"
        return cls(_read(path), _Settings(Path(folder)), vocab_size, str(path))

    @property
    def source(self) -> str:
        """The text of tokenizer.json."""
        return self._source

    def encode(self, text: str, *, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of ``text``.

        add_bos: begin with the BOS token if this tokenizer does so; never twice.
        special: take the text of a special token for the token; else it is ordinary text.
        """
        check_flag("add_bos", add_bos)
        check_flag("special", special)
        ids = self._encode(check_text("text", text))
        if not special and not self.special_ids.isdisjoint(ids):
            ids = self._encode_guarded(text)
        if (
            add_bos
            and self._adds_bos
            and self.bos_token_id is not None
            and ids[:1] != [self.bos_token_id]
        ):
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        check_flag("skip_special", skip_special)
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def piece(self, token: int) -> str:
        """A token as the vocabulary writes it, with marks for spaces and bytes; "" if unknown."""
        return str(self._tokenizer.id_to_token(token) or "")

    def stream(self, context: Sequence[int] = (), *, skip_special: bool = True) -> TextStream:
        """A decoder for one token after the other.

        context: the tokens before, which decide whether the first word keeps its space; their
        text is not given out.
        """
        return TextStream(self, context, skip_special)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> list[int]:
        """Token ids of a chat. Special tokens in messages and tools are ordinary text.

        Raises TokenizerError without a chat template, ArgumentError when it refuses the messages.
        """
        check_messages(messages)
        check_flag("add_generation_prompt", add_generation_prompt)
        neutralizer = Neutralizer([text for text, special in self._added.items() if special])
        text = self._render(
            neutralizer.hide(messages),
            tools=neutralizer.hide(tools),
            add_generation_prompt=add_generation_prompt,
            **extra,
        )
        if not neutralizer.used:
            return self._encode(text)
        _, stand_ins = self._guard()
        pattern = "|".join(map(re.escape, sorted(self._added, key=len, reverse=True)))
        own = re.sub(pattern, lambda found: stand_ins.get(found[0], found[0]), text)
        return self._encode_guarded(neutralizer.reveal(own))

    def render_chat(self, messages: Sequence[Message], **options: Any) -> str:
        """The text of a chat as the template writes it; for reading, not for encoding."""
        return self._render(messages, **options)

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        if self.chat_template is None:
            raise TokenizerError(
                f"{self._name}: the model has no chat template; give a text prompt, not messages"
            )
        return render(
            self.chat_template,
            messages,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            **options,
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(_without_surrogates(text), add_special_tokens=False).ids)

    def _encode_guarded(self, text: str) -> list[int]:
        guarded, _ = self._guard()
        return list(guarded.encode(_without_surrogates(text), add_special_tokens=False).ids)

    def _guard(self) -> tuple[Any, dict[str, str]]:
        """A second tokenizer whose special tokens have names that nobody can guess, and the names.

        Words are cut and merged as in the first one, but no text of a user is a special token. Made
        when it is first needed.
        """
        if self._guarded is None:
            names = self._stand_ins()
            renamed = _renamed(json.loads(self._source), names)
            self._guarded = _parse(json.dumps(renamed, ensure_ascii=False), self._name), names
        return self._guarded

    def _stand_ins(self) -> dict[str, str]:
        nonce = str(secrets.randbits(64))
        special = [text for text, is_special in self._added.items() if is_special]
        return {text: f"\U000f0000{nonce}.{n}\U000f0001" for n, text in enumerate(special)}

    def _eos_token_ids(self, ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
        token = self._tokenizer.token_to_id(self.eos_token)
        both = [*ids, *([] if token is None else [token])]
        return tuple(dict.fromkeys(number for number in both if 0 <= number < vocab_size))

    def _find_adds_bos(self, setting: bool | None) -> bool:
        """tokenizer_config.json where its class heeds add_bos_token, else tokenizer.json."""
        if setting is not None:
            return setting
        return bool(self._tokenizer.encode("").ids[:1] == [self.bos_token_id])


class TextStream:
    """Text of tokens as they come; a character is given out when all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # Tokens that were given out stay in front of the new ones, because how a token reads may
        # depend on the ones before; a few are enough.
        self._known = list(context)[-_MAX_PENDING:]
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """The text that ``token`` completes; "" while a character is incomplete."""
        self._new.append(token)
        text = self._text()
        if (not text or text.endswith(_REPLACEMENT)) and len(self._new) < _MAX_PENDING:
            return ""
        self._known, self._new = self._new, []
        return text

    def flush(self) -> str:
        """What is left at the end; a character that never became complete is U+FFFD."""
        text, self._known, self._new = self._text(), self._new, []
        return text

    def _text(self) -> str:
        before = self._decode(self._known)
        return self._decode(self._known + self._new)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


class _Settings:
    """What the small files beside tokenizer.json say. Those that are missing count as empty."""

    def __init__(self, folder: Path) -> None:
        config = _read_json(folder / "tokenizer_config.json")
        special = _read_json(folder / "special_tokens_map.json")
        self.bos_token = _content(config.get("bos_token", special.get("bos_token")))
        self.eos_token = _content(config.get("eos_token", special.get("eos_token")))
        self.adds_bos = self._adds_bos(config)
        self.chat_template = self._chat_template(folder, config)
        generation = _read_json(folder / "generation_config.json")
        model = _read_json(folder / "config.json")
        self.eos_token_ids = _ids(generation.get("eos_token_id")) or _ids(model.get("eos_token_id"))

    @staticmethod
    def _adds_bos(config: Mapping[str, Any]) -> bool | None:
        heeds = str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer")
        setting = config.get("add_bos_token")
        return setting if heeds and isinstance(setting, bool) else None

    @staticmethod
    def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
        path = folder / "chat_template.jinja"
        if path.is_file():
            return _read(path)
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {
                item.get("name"): item.get("template")
                for item in template
                if isinstance(item, dict)
            }
            template = named.get("default")
        return template if isinstance(template, str) else None


def _content(token: Any) -> str:
    """A token is given as its text or as a mapping that holds it."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int]


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TokenizerError(f"{path}: larger than {MAX_FILE_BYTES} bytes; it is no tokenizer")
        return path.read_bytes().decode()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not valid UTF-8: {error.reason}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: a JSON object is needed, not {type(content).__name__}")
    return content


def _parse(source: str, name: str) -> Any:
    from tokenizers import Tokenizer as FastTokenizer

    try:
        tokenizer = FastTokenizer.from_str(source)
        tokenizer.no_truncation()  # files may hold settings of their training
        tokenizer.no_padding()
        return tokenizer
    except BaseException as error:  # a panic of the Rust code is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise TokenizerError(f"{name}: not a usable tokenizer.json: {error}") from error


def _renamed(tokenizer: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The content of tokenizer.json with tokens renamed; ids stay."""
    for token in tokenizer.get("added_tokens") or []:
        token["content"] = names.get(token["content"], token["content"])
    model = tokenizer["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): number for text, number in model["vocab"].items()}
    else:  # Unigram: pairs of text and score
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    unknown = model.get("unk_token")
    if isinstance(unknown, str):
        model["unk_token"] = names.get(unknown, unknown)
    return tokenizer


def _without_surrogates(text: str) -> str:
    """Lone surrogates (undecodable input) as U+FFFD; the tokenizer takes valid Unicode only."""
    return _SURROGATE.sub(_REPLACEMENT, text)


_SURROGATE = re.compile("[\ud800-\udfff]")
