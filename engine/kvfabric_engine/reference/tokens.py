"""Between text and token ids: what the server needs of a tokenizer, and the byte tokenizer as one.

`hf_tokenizer.py` is the other. Pure: no I/O after the constructor.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvfabric import tokenizer
from kvfabric.config import EngineConfig

Message = Mapping[str, str]
"""One turn of a chat: its `role` and its `content`."""


class Decoder(ABC):
    """The text of one growing answer."""

    @abstractmethod
    def push(self, token_id: int | None, *, is_last: bool) -> str:
        """Text that became certain with this token; all the rest if it is the last."""


class Tokenizer(ABC):
    """`name`: how the engine names it to routers, equal for equal tokenization and chat template.

    `end_ids`: tokens that end an answer. Methods may be called from any thread.
    """

    name: str
    end_ids: frozenset[int]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt. Raises UnicodeEncodeError for lone surrogates."""

    @abstractmethod
    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant begins. Raises ChatRefused and UnicodeEncodeError."""

    @abstractmethod
    def decoder(self, prompt: Sequence[int]) -> Decoder:
        """For the answer that follows `prompt`."""


class ByteTokenizer(Tokenizer):
    """`kvfabric.tokenizer`: a token a byte."""

    name = "byte"
    end_ids = frozenset((tokenizer.END_ID,))

    def encode(self, text: str) -> list[int]:
        return tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return tokenizer.encode(tokenizer.render_chat(messages))

    def decoder(self, prompt: Sequence[int]) -> Decoder:
        return _ByteDecoder()


class _ByteDecoder(Decoder):
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int | None, *, is_last: bool) -> str:
        data = b""
        if token_id is not None and tokenizer.FIRST_BYTE_ID <= token_id < tokenizer.NUM_IDS:
            data = bytes([token_id - tokenizer.FIRST_BYTE_ID])
        return self._utf8.decode(data, final=is_last)


def tokenizer_of(config: EngineConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer of the configured model. Raises ConfigError if its folder holds none that fits."""
    if not config.model_path:
        return ByteTokenizer()
    from kvfabric_engine.reference.hf_tokenizer import HfTokenizer  # needs tokenizers and jinja2

    return HfTokenizer(Path(config.model_path).expanduser(), vocab_size)
