"""The BlockKeys of one request, and how far it may use them. Sync, no I/O; keys are made by `hashing`.

A node's answer to `open_handle` decides namespace, segments and limits. Without a node the keys come from a
secret of this process, so they can name nothing outside it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from kvfabric.hashing import ROOT_PARENT, BlockHasher, namespace_key, namespace_tag, salt
from kvfabric.protocol.messages import HandleOpened
from kvfabric.types import BlockKey, ExtraInput, Incarnation, Namespace, Segment, TenantId
from kvfabric_engine.pool_events import CachedKey


class RequestKeys:
    """Keys of the full blocks of a growing token sequence, cut off where the request may cache no further.

    `no_read`: look nothing up. `no_store`: leave nothing behind, in no tier. `extra_inputs`: what the KV
    depends on besides the tokens (design 3); the salt does not take them in.
    """

    __slots__ = (
        "_hasher",
        "_keys",
        "_max_blocks",
        "_num_tokens",
        "_public_blocks",
        "_public_tag",
        "_segments",
        "_tag",
        "block_tokens",
        "is_limited",
        "no_read",
        "no_store",
        "salt",
    )

    def __init__(
        self,
        opened: HandleOpened,
        block_tokens: int,
        *,
        extra_inputs: Sequence[ExtraInput] = (),
    ) -> None:
        self.block_tokens = block_tokens
        self.no_read = opened.no_read
        self.no_store = opened.no_store
        segments = tuple(
            Segment(s.template, s.version, Incarnation(s.incarnation), s.first_token)
            for s in opened.segments
        )
        self.salt = salt(opened.namespace_key, segments)
        """What separates an engine's own cache as these keys do, unless `is_limited` (design 3)."""
        self._hasher = BlockHasher(
            opened.namespace_key,
            block_tokens,
            segments=segments,
            extra_inputs=extra_inputs,
            public_key=opened.public_key or None,
            public_tokens=opened.public_tokens,
        )
        limit = opened.cacheable_tokens
        self._max_blocks = limit // block_tokens if limit >= 0 else None
        self.is_limited = limit >= 0 or opened.no_read or opened.no_store
        """Whether some of the request may not be cached: what goes by salt alone must not share it."""
        if any(extra.first_token < opened.public_tokens for extra in extra_inputs):
            # Public blocks have no inputs but tokens, and the node takes the first ones for public.
            self._max_blocks = 0
        self._segments = [(s.first_token // block_tokens, s.incarnation) for s in segments]
        self._tag = namespace_tag(opened.namespace_key)
        self._public_tag = namespace_tag(opened.public_key) if opened.public_key else b""
        self._public_blocks = opened.public_tokens // block_tokens
        self._keys: list[BlockKey] = []
        self._num_tokens = 0

    def __repr__(self) -> str:
        return f"<RequestKeys {len(self._keys)} blocks of {self.block_tokens} tokens>"

    @property
    def num_blocks(self) -> int:
        return len(self._keys)

    def extend(self, tokens: Sequence[int]) -> None:
        """`tokens` is the whole sequence so far; what is new since the last call is hashed.

        A preempted sequence comes again with fewer tokens than it had: those have their keys.
        """
        if len(tokens) <= self._num_tokens:
            return
        self._keys += self._hasher.extend(tokens[self._num_tokens :])
        self._num_tokens = len(tokens)
        if self._max_blocks is not None:
            del self._keys[self._max_blocks :]

    def first(self, num_tokens: int) -> list[BlockKey]:
        """Keys of the blocks that lie wholly in the first `num_tokens` tokens."""
        return self._keys[: num_tokens // self.block_tokens]

    def identity(self, block: int) -> CachedKey:
        """Key, parent and namespace tag of block number `block`."""
        parent = self._keys[block - 1] if block else ROOT_PARENT
        tag = self._public_tag if block < self._public_blocks else self._tag
        incarnations = tuple(one for first, one in self._segments if first <= block)
        return CachedKey(self._keys[block], parent, tag, incarnations)


class LocalNamespaces:
    """Namespaces of this process alone, one for each salt. What they name ends with the process."""

    def __init__(self, model_revision: str, layout_fingerprint: bytes) -> None:
        self._secret = secrets.token_bytes(32)
        self._model_revision = model_revision
        self._layout_fingerprint = layout_fingerprint

    def open(self, salt: str) -> HandleOpened:
        """Requests with equal `salt` (the router mints it; empty without one) share, others do not."""
        namespace = Namespace(
            TenantId(f"salt:{salt}"), self._model_revision, self._layout_fingerprint
        )
        return HandleOpened(
            namespace_key=namespace_key(namespace, self._secret),
            public_key=b"",
            public_tokens=0,
            cacheable_tokens=-1,
            segments=(),
            no_store=False,
            no_read=False,
        )
