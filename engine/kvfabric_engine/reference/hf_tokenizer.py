"""The tokenizer and chat template of a local Hugging Face folder.

From tokenizer.json, tokenizer_config.json (special tokens, chat template), chat_template.jinja (comes
before the other), generation_config.json and config.json (tokens that end an answer). The template runs in
jinja2's sandbox, with what `transformers` gives it; no code of the folder runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from kvfabric.errors import ConfigError
from kvfabric_engine.reference.hf_config import read_json
from kvfabric_engine.reference.tokens import ChatRefused, Decoder, Message, Tokenizer

CONTEXT_TOKENS = 6
"""Tokens of the prompt that are decoded with the answer's first: some tokens' text depends on what is
before them (leading spaces)."""
MAX_HELD = 16
"""Tokens without a whole character after which no more is waited for: it is not going to be one."""
BROKEN = "\N{REPLACEMENT CHARACTER}"


class HfTokenizer(Tokenizer):
    """Raises ConfigError if the folder has no tokenizer.json, or one with ids beyond `vocab_size`."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        file = folder / "tokenizer.json"
        data = _read(file)
        if data is None:
            raise ConfigError(
                f"{folder} holds no tokenizer.json; other tokenizers are not supported"
            )
        self._tokenizer = _parse(data, file)
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= largest < vocab_size:
            raise ConfigError(f"{file} has token ids up to {largest}; the model knows {vocab_size}")
        settings = _optional_json(folder / "tokenizer_config.json")
        self._special = _special_tokens(settings, folder)
        source = _template_source(settings, folder)
        self._template = _compile(source, folder) if source else None
        self.end_ids = self._end_ids(folder)
        self.name = f"hf:{_digest(data, source, json.dumps(self._special, sort_keys=True))}"

    def encode(self, text: str) -> list[int]:
        """With the special tokens that tokenizer.json adds around a text."""
        return self._ids(text, is_whole=False)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Without such: the template writes its own."""
        if self._template is None:
            raise ChatRefused("the model has no chat template")
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as exc:
            raise ChatRefused(f"the model's chat template refuses this: {exc}") from exc
        return self._ids(text, is_whole=True)

    def _ids(self, text: str, *, is_whole: bool) -> list[int]:
        text.encode()  # lone surrogates: the library only says that this is no string
        return list(self._tokenizer.encode(text, add_special_tokens=not is_whole).ids)

    def decoder(self, prompt: Sequence[int]) -> Decoder:
        return _HfDecoder(self._tokenizer, prompt[-CONTEXT_TOKENS:])

    def _end_ids(self, folder: Path) -> frozenset[int]:
        """What generation_config.json names (else config.json), and the tokenizer's own end of text."""
        found: list[Any] = []
        for name in ("generation_config.json", "config.json"):
            given = _optional_json(folder / name).get("eos_token_id")
            if given is not None:
                found += given if isinstance(given, list) else [given]
                break
        own = self._tokenizer.token_to_id(self._special.get("eos_token", ""))
        if own is not None:
            found.append(own)
        if not all(type(token_id) is int for token_id in found):
            raise ConfigError(f"{folder}: eos_token_id must be token ids, not {found}")
        return frozenset(found)


class _HfDecoder(Decoder):
    """Decodes a window of the last tokens, so that each token costs the same however long the answer.

    `_ids[:_read]` was given out. The window begins before what is new, because a tokenizer may join.
    """

    def __init__(self, tokenizer: FastTokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._read = len(self._ids)

    def push(self, token_id: int | None, *, is_last: bool) -> str:
        if token_id is not None:
            self._ids.append(token_id)
        before, text = self._text(self._ids[: self._read]), self._text(self._ids)
        is_full = len(self._ids) - self._read >= MAX_HELD
        if text.endswith(BROKEN) and not is_last and not is_full:
            return ""  # the rest of a character may follow
        if len(text) > len(before) or is_full:
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
        return text[len(before) :]

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _parse(data: bytes, file: Path) -> FastTokenizer:
    try:
        tokenizer = FastTokenizer.from_str(data.decode())
    except Exception as exc:  # the library raises no narrower class
        raise ConfigError(f"{file} is no tokenizer: {exc}") from exc
    # Settings of its training; a prompt is never cut or filled up unasked.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """`bos_token` and the like: the names under which chat templates know them -> text."""
    given = _optional_json(folder / "special_tokens_map.json") | settings
    found = {}
    for key, value in given.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _template_source(settings: dict[str, Any], folder: Path) -> str:
    """Empty if there is none."""
    file = folder / "chat_template.jinja"
    data = _read(file)
    if data is not None:
        return data.decode(errors="replace")
    given = settings.get("chat_template") or ""
    if isinstance(given, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in given if isinstance(item, dict)}
        given = named.get("default") or ""
    if not isinstance(given, str):
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: chat_template must be text")
    return given


class _Generation(Extension):
    """`{% generation %}` marks for trainers what the assistant says; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, folder: Path) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as exc:
        raise ConfigError(f"{folder}: the chat template cannot be read: {exc}") from exc


def _to_json(value: object, indent: int | None = None) -> str:
    # jinja2's own escapes what HTML would misread; a prompt is no HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _digest(data: bytes, *texts: str) -> str:
    digest = blake2b(digest_size=16, person=b"kvf-tokenizer-1")
    for item in (data, *(text.encode() for text in texts)):
        digest.update(len(item).to_bytes(8, "little") + item)
    return digest.hexdigest()
