"""Tokenizers of the router: a prompt's tokens exactly as its engine makes them, or an approximation.

An engine that names its tokenizer gets the one of that name. One that does not (vLLM, SGLang) gets the one
that the configuration names for its model. Without either, prompts are told apart by their text: that finds
the engine where one was computed, and is no key (`is_exact`).

Recognising a template is a search in what tokens spell, not in the prompt's text: the same token sequence is
then the same use, however a client wrote it, and the first token that holds any of it is known.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvfabric import tokenizer
from kvfabric.errors import ConfigError
from kvfabric_router.api import ApiError, ModelRequest

if TYPE_CHECKING:
    from kvfabric_router.hf_tokenizer import HfTokenizer

UNKNOWN = ""
"""Name of the tokenizer of an engine that the router has none for."""
BYTES_PER_TOKEN = 4
"""Of a prompt whose tokens nobody told us."""

_ENOUGH_PROMPTS = 3
_CODEC = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"

Tokens = Sequence[int]


class Tokenizer(ABC):
    """`is_exact`: its tokens are the engine's. `is_slow`: worth a thread for a long prompt."""

    name: str
    is_exact = True
    is_slow = False

    @abstractmethod
    def tokens(self, request: ModelRequest, tenant: str) -> Tokens | None:
        """Packed: each is looked at several times. None if only the engine can know them.

        `tenant`: whose request it is; what it finds tokenized already is its own. Raises ApiError 400.
        """

    async def tokens_in_thread(self, request: ModelRequest, tenant: str) -> Tokens | None:
        """The same, without keeping the event loop from others."""
        return self.tokens(request, tenant)

    @abstractmethod
    def spell(self, tokens: Tokens) -> str:
        """What is searched. Raises ApiError 400 for what are no tokens."""

    @abstractmethod
    def spell_text(self, text: bytes) -> str:
        """What is searched for: a template's text, spelt as its tokens are."""

    def token_at(self, tokens: Tokens) -> Callable[[int], int]:
        """From a place in their spelling to the first of `tokens` that holds anything from there on."""
        return lambda place: place


class ByteTokenizer(Tokenizer):
    """`kvfabric.tokenizer`: a token a byte."""

    name = "byte"

    def tokens(self, request: ModelRequest, tenant: str) -> Tokens | None:
        if request.token_ids is not None:
            return packed(request.token_ids)
        text = request.text
        if request.messages is not None:
            text = tokenizer.render_chat(request.messages)
        return None if text is None else tokenizer.encode_array(as_text(text))

    def spell(self, tokens: Tokens) -> str:
        return spell_ids(tokens)

    def spell_text(self, text: bytes) -> str:
        return spell_ids(tokenizer.encode_array(text))


class Approximation(Tokenizer):
    """For prompts whose tokens are unknown: the bytes of a text, or of a chat as it was sent. Given as token
    ids they are known, and only what they spell is not.
    """

    name = UNKNOWN
    is_exact = False

    def tokens(self, request: ModelRequest, tenant: str) -> Tokens | None:
        if request.token_ids is not None:
            return packed(request.token_ids)
        if request.text is not None:
            return tokenizer.encode_array(as_text(request.text))
        if request.is_chat:
            return tokenizer.encode_array(bytes(request.fields["messages"]))
        return None

    def spell(self, tokens: Tokens) -> str:
        return spell_ids(tokens)

    def spell_text(self, text: bytes) -> str:
        return spell_ids(tokenizer.encode_array(text))


@dataclass(slots=True)
class TokenCounts:
    """Prompts of which an engine counted as many tokens as the router, and of which it did not."""

    num_equal: int = 0
    num_different: int = 0

    @property
    def differ(self) -> bool:
        """Whether the router's tokenizer, or its chat template, is not the engine's."""
        return self.num_different >= _ENOUGH_PROMPTS and self.num_different > self.num_equal


class Tokenizers(Mapping[str, Tokenizer]):
    """By name. `of_models`: folders of Hugging Face tokenizers by the name of their model.

    Raises ConfigError for a folder that holds none.
    """

    def __init__(self, of_models: Iterable[str] = ()) -> None:
        self._by_name: dict[str, Tokenizer] = {
            one.name: one for one in (ByteTokenizer(), Approximation())
        }
        self._by_model: dict[str, str] = {}
        for item in of_models:
            model, folder = _parts(item)
            found = _load(Path(folder).expanduser())
            self._by_name[found.name] = found
            self._by_model[model] = found.name

    def __getitem__(self, name: str) -> Tokenizer:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def are_slow(self) -> bool:
        """Whether any is."""
        return any(one.is_slow for one in self._by_name.values())

    def name_for(self, model: str, said: str) -> str:
        """Of the tokenizer for an engine of `model` that calls its own `said`; UNKNOWN if there is none."""
        if said:
            return said if said in self._by_name else UNKNOWN
        return self._by_model.get(model, UNKNOWN)

    def of_model(self, model: str) -> str:
        """What the configuration names for a model; UNKNOWN if nothing."""
        return self._by_model.get(model, UNKNOWN)


def _parts(item: str) -> tuple[str, str]:
    model, equals, folder = item.partition("=")
    if not model or not equals or not folder:
        raise ConfigError(f"router.tokenizers: {item!r} must be MODEL=FOLDER")
    return model, folder


def _load(folder: Path) -> HfTokenizer:
    try:
        from kvfabric_router.hf_tokenizer import HfTokenizer  # only where it is used
    except ImportError as exc:
        raise ConfigError(f"router.tokenizers needs the package {exc.name}") from exc
    return HfTokenizer(folder)


def packed(token_ids: Sequence[int]) -> array[int]:
    """Unsigned 32-bit integers. Raises ApiError 400 for what is no token id."""
    try:
        return array("I", token_ids)  # of an array a plain copy
    except (TypeError, OverflowError) as exc:
        raise ApiError(400, "the prompt holds what is no token id", param="prompt") from exc


def as_text(text: str) -> bytes:
    """UTF-8. Raises ApiError 400 for what is no text."""
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise ApiError(400, f"the prompt is not valid text: {exc.reason}", param="prompt") from exc


def spell_ids(tokens: Tokens) -> str:
    """One character a token: `str.find` is then a search for token sequences, at C speed and linear."""
    try:
        return packed(tokens).tobytes().decode(_CODEC, "surrogatepass")
    except UnicodeDecodeError as exc:
        raise ApiError(400, "the prompt holds what is no token id", param="prompt") from exc
