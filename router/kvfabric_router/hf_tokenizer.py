"""A model's own tokenizer in the router: prompts are keyed by the tokens that the engine will make of them.

A prompt is cut where the tokenizer begins anew whatever stands before: at special tokens (the turns of a
chat) and, for pre-tokenizers that are known to, at the ends of lines of long texts. What each piece became
is remembered, by tenant, so a conversation costs its last turn.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from kvfabric.errors import ConfigError
from kvfabric.hf_tokenizer import FolderTokenizer
from kvfabric.tokenizer import ChatRefused
from kvfabric_router.api import ModelRequest
from kvfabric_router.tokenizers import Tokenizer, Tokens, as_text, packed, spell_ids

INLINE_CHARS = 4096
"""New text that costs less than the way to a thread and back."""
LINE_PIECE_CHARS = 2048
CACHED_TOKENS = 1 << 22
"""16 MiB."""
_LEAST_CACHED = 64  # characters: shorter ones are tokenized as fast as they are looked up
_UNKNOWN = b"\xff"  # stands in no text
_SAMPLE = "Hello, world! It's 1234.\n\n  naïve — 日本 🦊\n\tx = y  \n"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUT_LINES = {_WORDS + _REST, _WORDS + "{1,3}" + _REST}
"""Patterns (Qwen, Llama 3) of which no match goes on beyond a line end between visible characters; none of
GPT-2's does either."""
_LINE_END = re.compile(r"(?<=\S\n)(?=\S)")


class HfTokenizer(Tokenizer):
    """See the module. Raises ConfigError if `folder` holds no tokenizer."""

    is_slow = True

    def __init__(self, folder: Path) -> None:
        self._folder = FolderTokenizer(folder)
        self._fast = self._folder.fast
        self.name = self._folder.name
        self._cache = _PieceCache(CACHED_TOKENS)
        settings: dict[str, Any] = json.loads(self._fast.to_str())
        added = list(self._fast.get_added_tokens_decoder().values())
        self._bytes = self._spelt(settings)
        self._before, self._after = self._around()
        self._special = _any_of(_plain_specials(added))
        self._cuts_lines = _cuts_lines(settings, added)
        self._is_cut = self._adds_up(_plain_specials(added)[:2])

    # ------------------------------------------------------------------ tokens

    def tokens(self, request: ModelRequest, tenant: str) -> Tokens | None:
        if request.token_ids is not None:
            return packed(request.token_ids)
        text = self._text(request)
        if text is None:
            return None
        known = self._known(tenant, text)
        new = [piece for piece, tokens in known.items() if tokens is None]
        return self._whole(request, tenant, text, known, self._encode(new))

    async def tokens_in_thread(self, request: ModelRequest, tenant: str) -> Tokens | None:
        if request.token_ids is not None:
            return packed(request.token_ids)
        text = self._text(request)
        if text is None:
            return None
        known = self._known(tenant, text)
        new = [piece for piece, tokens in known.items() if tokens is None]
        if sum(map(len, new)) > INLINE_CHARS:
            made = await asyncio.to_thread(self._encode, new)
        else:
            made = self._encode(new)
        return self._whole(request, tenant, text, known, made)

    def _text(self, request: ModelRequest) -> str | None:
        text = request.text
        if request.messages is not None:
            try:
                text = self._folder.render(request.messages)
            except ChatRefused:
                return None  # the engine will say so
        if text is not None:
            as_text(text)
        return text

    def _known(self, tenant: str, text: str) -> dict[str, array[int] | None]:
        return {piece: self._cache.get(tenant, piece) for piece in self._pieces(text)}

    def _whole(
        self,
        request: ModelRequest,
        tenant: str,
        text: str,
        known: dict[str, array[int] | None],
        made: Sequence[array[int]],
    ) -> array[int]:
        new = [piece for piece, tokens in known.items() if tokens is None]
        self._cache.put(tenant, new, made)
        known.update(zip(new, made, strict=True))
        is_chat = request.messages is not None  # its template wrote what goes around it
        found = array("I", () if is_chat else self._before)
        for piece in self._pieces(text):
            found.extend(known[piece] or ())
        found.extend(() if is_chat else self._after)
        return found

    def _encode(self, texts: Sequence[str]) -> list[array[int]]:
        if not texts:
            return []
        # A batch lets other threads run meanwhile.
        made = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [array("I", one.ids) for one in made]

    # ------------------------------------------------------------------ pieces

    def _pieces(self, text: str) -> list[str]:
        if not self._is_cut:
            return [text]
        pieces = self._special.split(text)
        if self._cuts_lines and len(text) > LINE_PIECE_CHARS:
            pieces = [part for piece in pieces for part in _lines(piece)]
        return [piece for piece in pieces if piece]

    def _around(self) -> tuple[list[int], list[int]]:
        """What a text gets around it: tokens before and after."""
        bare = list(self._fast.encode("a", add_special_tokens=False).ids)
        whole = list(self._fast.encode("a").ids)
        for at in range(len(whole) - len(bare) + 1):
            if bare and whole[at : at + len(bare)] == bare:
                return whole[:at], whole[at + len(bare) :]
        raise ConfigError("this tokenizer puts more than constant tokens around a text")

    def _adds_up(self, marks: Sequence[str]) -> bool:
        """Whether a text in pieces is the text. That it is follows from the settings; this checks it."""
        sample = "".join(_SAMPLE + mark for mark in (*marks, "")) + _SAMPLE
        cut = [i for ids in self._encode(self._special.split(sample)) for i in ids]
        return [*self._before, *cut, *self._after] == list(self._fast.encode(sample).ids)

    # ------------------------------------------------------------------ spelling

    def spell(self, tokens: Tokens) -> str:
        if self._bytes is None:
            return spell_ids(tokens)
        own = self._without_before(tokens)
        # One character a byte: so that it can be searched as what `spell_ids` makes.
        return b"".join([self._bytes.get(one, _UNKNOWN) for one in own]).decode("latin-1")

    def spell_text(self, text: bytes) -> str:
        spelt = self.spell(self._encode([text.decode(errors="replace")])[0])
        plain = text.decode("latin-1")
        # In a prompt it need not follow the space that some tokenizers put before every text.
        return plain if self._bytes is not None and spelt == " " + plain else spelt

    def token_at(self, tokens: Tokens) -> Callable[[int], int]:
        if self._bytes is None:
            return super().token_at(tokens)
        own = self._without_before(tokens)
        ends = np.cumsum([len(self._bytes.get(one, _UNKNOWN)) for one in own])
        first = len(tokens) - len(own)
        return lambda place: first + int(np.searchsorted(ends, place, side="right"))

    def _without_before(self, tokens: Tokens) -> Tokens:
        """A token that every text begins with spells nothing, so that a prompt begins with its text."""
        size = len(self._before)
        return tokens[size:] if size and list(tokens[:size]) == self._before else tokens

    def _spelt(self, settings: dict[str, Any]) -> dict[int, bytes] | None:
        """What each token spells; None if tokens do not add up to their text (then they are compared)."""
        spell = _byte_level if "ByteLevel" in _types(settings) else _sentence_piece
        found = {i: spell(text) for text, i in self._fast.get_vocab(with_added_tokens=True).items()}
        for i, added in self._fast.get_added_tokens_decoder().items():
            found[i] = added.content.encode()
        sample = self._fast.encode(_SAMPLE, add_special_tokens=False).ids
        text = b"".join(found[i] for i in sample)
        return found if text.endswith(_SAMPLE.encode()) else None


class _PieceCache:
    """Tokens of pieces of text, by tenant: nobody's time tells what another has asked."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._pieces: OrderedDict[bytes, array[int]] = OrderedDict()
        self._key = secrets.token_bytes(32)

    def __len__(self) -> int:
        return len(self._pieces)

    def get(self, tenant: str, piece: str) -> array[int] | None:
        if len(piece) < _LEAST_CACHED:
            return None
        name = self._name(tenant, piece)
        found = self._pieces.get(name)
        if found is not None:
            self._pieces.move_to_end(name)
        return found

    def put(self, tenant: str, pieces: Sequence[str], made: Sequence[array[int]]) -> None:
        for piece, tokens in zip(pieces, made, strict=True):
            if len(piece) >= _LEAST_CACHED and len(tokens) <= self._max_tokens // 16:
                name = self._name(tenant, piece)
                self._num_tokens += len(tokens) - len(self._pieces.get(name, ()))
                self._pieces[name] = tokens
        while self._num_tokens > self._max_tokens:
            self._num_tokens -= len(self._pieces.popitem(last=False)[1])

    def _name(self, tenant: str, piece: str) -> bytes:
        data = piece.encode()
        own = tenant.encode()
        return blake2b(b"%d:%b%b" % (len(own), own, data), digest_size=16, key=self._key).digest()


def _plain_specials(added: Sequence[Any]) -> list[str]:
    """Of a tokenizer's added tokens the special ones that are found first, wherever they stand."""
    # One that begins as another ends, or stands inside another, might be a part of that one.
    ends = {one.content[at:] for one in added for at in range(1, len(one.content))}
    everything = "\0".join(one.content for one in added)
    return [
        one.content
        for one in added
        if one.special
        and not (one.normalized or one.lstrip or one.rstrip or one.single_word)
        and not (one.content[0].isalnum() or one.content[-1].isalnum())
        and one.content.strip() == one.content
        and not any(one.content[:size] in ends for size in range(1, len(one.content) + 1))
        and everything.count(one.content) == 1
    ]


def _any_of(specials: Sequence[str]) -> re.Pattern[str]:
    """Where one of these begins."""
    return re.compile("(?=" + "|".join(map(re.escape, specials)) + ")" if specials else "(?!)")


def _lines(piece: str) -> Iterator[str]:
    """`piece` cut at every first end of a line after `LINE_PIECE_CHARS`: the same cuts however it goes on."""
    start = 0
    while len(piece) - start > LINE_PIECE_CHARS:
        found = _LINE_END.search(piece, start + LINE_PIECE_CHARS)
        if found is None:
            break
        yield piece[start : found.start()]
        start = found.start()
    yield piece[start:]


def _cuts_lines(settings: dict[str, Any], added: Sequence[Any]) -> bool:
    """Whether nothing in these settings of a tokenizer looks beyond the end of a line."""
    if any(one.lstrip or "\n" in one.content for one in added):
        return False
    normalizer = settings.get("normalizer") or {"type": "NFC"}
    given = settings.get("pre_tokenizer") or {}
    *before, last = given.get("pretokenizers") or [given]
    if normalizer.get("type") != "NFC" or last.get("type") != "ByteLevel":
        return False
    if last.get("add_prefix_space"):
        return False
    if not before:
        return bool(last.get("use_regex", True))
    return (
        len(before) == 1
        and before[0].get("type") == "Split"
        and before[0].get("behavior") == "Isolated"
        and not before[0].get("invert")
        and before[0].get("pattern", {}).get("Regex") in _CUT_LINES
        and not last.get("use_regex", True)
    )


def _types(value: object) -> set[str]:
    """`type` of every step in the settings of a tokenizer."""
    if isinstance(value, list):
        return {found for one in value for found in _types(one)}
    if not isinstance(value, dict):
        return set()
    own = {value["type"]} if isinstance(value.get("type"), str) else set()
    parts = ("normalizer", "pre_tokenizer", "decoder", "pretokenizers", "decoders", "normalizers")
    return own | {found for name in parts for found in _types(value.get(name))}


def _alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_ALPHABET = _alphabet()


def _byte_level(token: str) -> bytes:
    return bytes(_ALPHABET[char] for char in token if char in _ALPHABET)


def _sentence_piece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
