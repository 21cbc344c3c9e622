"""The tokenizer and chat template of a local Hugging Face folder: the same for engines and routers.

From tokenizer.json, tokenizer_config.json (special tokens, chat template) and chat_template.jinja (comes
before the other). The template runs in the sandbox of jinja2, with what `transformers` gives it; no code of
the folder runs. Needs tokenizers and jinja2, so it is imported only where a folder is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from kvfabric.tokenizer import ChatRefused


class FolderTokenizer:
    """`fast`: the library's tokenizer. `name`: equal for equal tokenization and chat template, anywhere.

    `special`: texts of special tokens by the names under which chat templates know them. Raises ConfigError
    if the folder has no tokenizer.json, or holds what cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        data = _read(file)
        if data is None:
            raise ConfigError(
                f"{folder} holds no tokenizer.json; other tokenizers are not supported"
            )
        self.fast = _parse(data, file)
        settings = optional_json(folder / "tokenizer_config.json")
        self.special = _special_tokens(settings, folder)
        source = _template_source(settings, folder)
        self._template = _compile(source, folder) if source else None
        self.name = f"hf:{_digest(data, source, json.dumps(self.special, sort_keys=True))}"

    def encode(self, text: str) -> list[int]:
        """With the special tokens that tokenizer.json adds around a text."""
        return self._ids(text, is_whole=False)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Without such: the template writes its own. Raises ChatRefused."""
        return self._ids(self.render(messages), is_whole=True)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a chat up to where the assistant begins. Raises ChatRefused."""
        if self._template is None:
            raise ChatRefused("the model has no chat template")
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self.special
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as exc:
            raise ChatRefused(f"the model's chat template refuses this: {exc}") from exc

    def _ids(self, text: str, *, is_whole: bool) -> list[int]:
        text.encode()  # lone surrogates: the library only says that this is no string
        return list(self.fast.encode(text, add_special_tokens=not is_whole).ids)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError that names the file."""
    try:
        document = json.loads(file.read_bytes())
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{file} is not JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise ConfigError(f"{file} holds no JSON object")
    return document


def optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc


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
    given = optional_json(folder / "special_tokens_map.json") | settings
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
