"""A Hugging Face folder's tokenizer as the engine needs it: what ends an answer, and its text as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from kvfabric.errors import ConfigError
from kvfabric.hf_tokenizer import FolderTokenizer, optional_json
from kvfabric_engine.reference.tokens import Decoder, Message, Tokenizer

CONTEXT_TOKENS = 6
"""Tokens of the prompt that are decoded with the answer's first: some tokens' text depends on what is
before them (leading spaces)."""
MAX_HELD = 16
"""Tokens without a whole character after which no more is waited for: it is not going to be one."""
BROKEN = "\N{REPLACEMENT CHARACTER}"


class HfTokenizer(Tokenizer):
    """Raises ConfigError if the folder has no tokenizer.json, or one with ids beyond `vocab_size`."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = FolderTokenizer(folder)
        vocabulary = self._folder.fast.get_vocab(with_added_tokens=True)
        largest = max(vocabulary.values(), default=-1)
        if not 0 <= largest < vocab_size:
            file = folder / "tokenizer.json"
            raise ConfigError(f"{file} has token ids up to {largest}; the model knows {vocab_size}")
        self.end_ids = self._end_ids(folder)
        self.name = self._folder.name

    def encode(self, text: str) -> list[int]:
        return self._folder.encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self._folder.encode_chat(messages)

    def decoder(self, prompt: Sequence[int]) -> Decoder:
        return _HfDecoder(self._folder.fast, prompt[-CONTEXT_TOKENS:])

    def _end_ids(self, folder: Path) -> frozenset[int]:
        """What generation_config.json names (else config.json), and the tokenizer's own end of text."""
        found: list[Any] = []
        for name in ("generation_config.json", "config.json"):
            given = optional_json(folder / name).get("eos_token_id")
            if given is not None:
                found += given if isinstance(given, list) else [given]
                break
        own = self._folder.fast.token_to_id(self._folder.special.get("eos_token", ""))
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
