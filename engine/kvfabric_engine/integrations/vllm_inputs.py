"""What the KV of a vLLM request depends on besides its tokens: adapter, images, audio, prompt embeddings.

    scheduler thread   RequestInputs(request)                     nothing is read yet
    control thread     inputs() -> ExtraInputs for the keys       digests, as part of `Connector.open`
    scheduler thread   inputs.is_known, inputs.identify()        before vLLM looks into its own cache

Digests are of content, never of a name: an item's `identifier` may be the caller's own id for it. vLLM shares
HBM blocks and encoder outputs by that identifier and HBM blocks by an adapter's name, and what it finds there
is stored in the fabric too: so a request whose content is known gets identifiers and a salt made of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvfabric.hashing import tlv
from kvfabric.types import ExtraInput
from kvfabric_engine.integrations.vllm_adapters import (
    Adapter,
    AdapterFiles,
    Adapters,
    Unknown,
)

MIN_SAMPLES = 4096
"""A flat tensor of so many numbers is a sound, of fewer perhaps the times of a video's frames."""
Piece = bytes | memoryview
_PROCESS_KEY = secrets.token_bytes(32)
"""Of this process's identifiers: no caller can name an item so that it is taken for another's content."""


class RequestInputs:
    """One request's. `is_known` False: its tokens and these do not say what its KV is.

    `has_encoder_connector`: encoder outputs come from elsewhere, by identifiers that we cannot vouch for.
    """

    def __init__(
        self,
        request: Any,
        *,
        adapters: Adapters,
        block_tokens: int,
        has_encoder_connector: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._request = request
        self._adapters = adapters
        self._block_tokens = block_tokens
        self._has_encoder_connector = has_encoder_connector
        self._tell = tell
        self._features: list[Any] | None = None
        self._identifiers: tuple[str, ...] = ()
        self._content: tuple[ExtraInput, ...] | None = None
        self.adapter: Adapter | None = None
        self.is_known = False

    def __repr__(self) -> str:
        return f"<RequestInputs {'known' if self.is_known else 'not known'}>"

    def __call__(self) -> tuple[ExtraInput, ...]:
        """May take long. What is not known is told and leaves `is_known` False."""
        self.is_known, self.adapter = False, None
        try:
            found = self._find()
        except Unknown as exc:
            if str(exc):
                self._tell(f"{exc}: such requests are computed without the fabric")
            return ()
        self.is_known = True
        return found

    @property
    def is_trusted(self) -> bool:
        return self._adapters.is_trusted(self.adapter)

    @property
    def adapter_files(self) -> AdapterFiles | None:
        return self.adapter.files if self.adapter is not None else None

    def identify(self) -> bool:
        """Name the request's items by their content, before vLLM schedules it; True if that changed them."""
        if self._features is None or self._request.mm_features is self._features:
            return False
        self._request.mm_features = self._features
        return True

    @property
    def are_identified(self) -> bool:
        return not self._identifiers or self._request.mm_features is self._features

    def _find(self) -> tuple[ExtraInput, ...]:
        request = self._request
        if getattr(request, "resumable", False):
            raise Unknown("streaming input is not cached")
        found: list[ExtraInput] = []
        if (lora := request.lora_request) is not None:
            self.adapter = self._find_adapter(lora)
            # In the first block: the chain carries it on.
            found.append(ExtraInput("adapter", self.adapter.digest, "", (), 0, 1))
        if self._content is None:
            self._content = (*self._items(), *self._embeddings())
        if self._identifiers and self._features is None:
            self._features = [
                dataclasses.replace(feature, identifier=self._identifier(content))
                for feature, content in zip(request.mm_features, self._identifiers, strict=True)
            ]
        return (*found, *self._content)

    def _find_adapter(self, lora: Any) -> Adapter:
        try:
            return self._adapters.find(lora)
        except Unknown as exc:
            raise Unknown(f'adapter "{lora.lora_name}" {exc}' if str(exc) else "") from exc

    def _identifier(self, content: str) -> str:
        fields = [(1, content.encode()), (2, salt_with("", self.adapter).encode())]
        digest = hashlib.blake2b(
            tlv("kvfabric/mm-identifier", fields),
            digest_size=32,
            key=_PROCESS_KEY,
            person=b"kvf-mm-id-1",
        )
        return digest.hexdigest()

    def _items(self) -> Iterator[ExtraInput]:
        features = self._request.mm_features
        if features and self._has_encoder_connector:
            raise Unknown("multimodal input of an encoder cache connector is not cached")
        names: list[str] = []
        for feature in features:
            digest = item_digest(feature)
            names.append(digest.hex())
            place = feature.mm_position
            yield ExtraInput(
                f"mm:{feature.modality}", digest, "", (), place.offset, max(1, place.length)
            )
        self._identifiers = tuple(names)

    def _embeddings(self) -> Iterator[ExtraInput]:
        """One for each block, so that prompts that begin alike share."""
        rows = self._request.prompt_embeds
        if rows is None:
            return
        if self._request.prompt_is_token_ids is not None:
            raise Unknown("a prompt of embeddings and tokens is not cached")
        for first in range(0, len(rows), self._block_tokens):
            some = rows[first : first + self._block_tokens]
            digest = _digest(b"kvf-embeds-1", _canonical(some))
            kind = str(some.dtype).removeprefix("torch.")
            yield ExtraInput("prompt-embeds", digest, kind, tuple(some.shape), first, len(some))


def salt_with(salt: str, adapter: Adapter | None) -> str:
    """`salt`, for this adapter's content: vLLM itself knows adapters by name."""
    return salt if adapter is None else f"{salt}.{adapter.digest.hex()}.{adapter.number}"


def item_digest(feature: Any) -> bytes:
    """32 bytes of one item: all that the model gets of it, and where in its span it goes. Raises Unknown."""
    data = feature.data
    # A KV consumer, which "kv_both" is, lets callers leave an item's embeddings out and send its size alone;
    # an address says where in shared memory the item is, not what is there.
    if not data or "address" in data or not any(_is_content(data[name].data) for name in data):
        raise Unknown("multimodal input that comes without its data is not cached")
    place = feature.mm_position

    def pieces() -> Iterator[Piece]:
        yield _head("item", feature.modality, str(place.length))
        yield from _canonical(place.is_embed)
        for name in sorted(data):
            yield _head("field", name, type(data[name].field).__name__)
            yield from _canonical(data[name].data)

    return _digest(b"kvf-mm-item-1", pieces())


def _is_content(value: object) -> bool:
    """Whether there are pixels, features, embeddings or samples in it: more than sizes and times."""
    if isinstance(value, list | tuple):
        return any(_is_content(part) for part in value)
    if not isinstance(value, torch.Tensor):
        return False
    is_signal = value.is_floating_point() or value.dtype is torch.uint8
    return is_signal and (value.ndim >= 2 or value.numel() >= MIN_SAMPLES)


def _digest(person: bytes, pieces: Iterator[Piece]) -> bytes:
    state = hashlib.blake2b(digest_size=32, person=person)
    for piece in pieces:
        state.update(piece)
    return state.digest()


def _head(kind: str, *values: str) -> bytes:
    """Prefix-free: says how long it is."""
    encoded = tlv(f"kvfabric/input-{kind}", [(1, value.encode()) for value in values])
    return struct.pack("<I", len(encoded)) + encoded


def _canonical(value: object) -> Iterator[Piece]:
    """Bytes of nested tensors and plain values; equal only for equal ones. Raises Unknown for others."""
    if isinstance(value, torch.Tensor):
        yield from _tensor(value)
    elif isinstance(value, list | tuple):
        yield _head("list", str(len(value)))
        for part in value:
            yield from _canonical(part)
    elif value is None or isinstance(value, bool | int | float | str):
        yield _head("value", type(value).__name__, repr(value))
    else:
        raise Unknown(f"multimodal input with a {type(value).__name__} is not cached")


def _tensor(tensor: torch.Tensor) -> Iterator[Piece]:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise Unknown(f"multimodal input in a tensor of {tensor.layout} is not cached")
    yield _head("tensor", str(tensor.dtype), str(tuple(tensor.shape)))
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    yield flat.numpy().data
