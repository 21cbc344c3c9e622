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
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvfabric.hashing import tlv
from kvfabric.types import ExtraInput
from kvfabric_engine.integrations.vllm_adapters import Adapter, Adapters
from kvfabric_engine.integrations.vllm_digest import Piece, Unknown, canonical, digest, head

MIN_SAMPLES = 4096
"""A flat tensor of so many numbers is a sound, of fewer perhaps the times of a video's frames."""
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
        name = hashlib.blake2b(
            tlv("kvfabric/mm-identifier", fields),
            digest_size=32,
            key=_PROCESS_KEY,
            person=b"kvf-mm-id-1",
        )
        return name.hexdigest()

    def _items(self) -> Iterator[ExtraInput]:
        features = self._request.mm_features
        if features and self._has_encoder_connector:
            raise Unknown("multimodal input of an encoder cache connector is not cached")
        names: list[str] = []
        for feature in features:
            content = item_digest(feature)
            names.append(content.hex())
            place = feature.mm_position
            yield ExtraInput(
                f"mm:{feature.modality}", content, "", (), place.offset, max(1, place.length)
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
            found = digest(b"kvf-embeds-1", canonical(some))
            kind = str(some.dtype).removeprefix("torch.")
            yield ExtraInput("prompt-embeds", found, kind, tuple(some.shape), first, len(some))


def salt_with(salt: str, adapter: Adapter | None) -> str:
    """`salt`, for this adapter's content as it was loaded this time: vLLM itself knows adapters by name, and
    blocks of a request whose adapter was exchanged meanwhile stay in its cache."""
    if adapter is None:
        return salt
    return f"{salt}.{adapter.digest.hex()}.{adapter.number}.{adapter.serials[0]}"


def item_digest(feature: Any) -> bytes:
    """32 bytes of one item: all that the model gets of it, and where in its span it goes. Raises Unknown."""
    data = feature.data
    # A KV consumer, which "kv_both" is, lets callers leave an item's embeddings out and send its size alone;
    # an address says where in shared memory the item is, not what is there.
    if not data or "address" in data or not any(_is_content(data[name].data) for name in data):
        raise Unknown("multimodal input that comes without its data is not cached")
    place = feature.mm_position

    def pieces() -> Iterator[Piece]:
        yield head("item", feature.modality, str(place.length))
        yield from canonical(place.is_embed)
        for name in sorted(data):
            yield head("field", name, type(data[name].field).__name__)
            yield from canonical(data[name].data)

    return digest(b"kvf-mm-item-1", pieces())


def _is_content(value: object) -> bool:
    """Whether there are pixels, features, embeddings or samples in it: more than sizes and times."""
    if isinstance(value, list | tuple):
        return any(_is_content(part) for part in value)
    if not isinstance(value, torch.Tensor):
        return False
    is_signal = value.is_floating_point() or value.dtype is torch.uint8
    return is_signal and (value.ndim >= 2 or value.numel() >= MIN_SAMPLES)
