"""The one maker of keys: namespace -> namespace key, tokens -> chain of BlockKeys, and salts.

Owns identity (design 3) and nothing else; engine, node and router call it. Pure.

Every hash here is BLAKE2b-256 (RFC 7693) with a `person` string of its own, so no two kinds of digest
can be confused. Structured input is encoded as TLV: tag u16, length u32, value, little-endian, after a
domain string. No bare concatenation: `("org_1", "2345")` and `("org_12345", "")` differ.

A block's message, keyed with the namespace key:

    u16 algorithm id | u16 0 | u32 markers | u32 tokens | u32 extra inputs | 32 B parent key
    then per marker   u32 offset in block, 32 B segment digest      (segments that start in this block)
    then per token    u32 token id
    then per extra    32 B digest of its TLV                        (inputs that overlap this block)

Counts come before what they count, so the encoding is prefix-free. The parent of the first block is
32 zero bytes. A segment that starts after a block does not touch that block's key, hence withdrawing a
segment kills the block it starts in and all that follow, and nothing before.
"""

from __future__ import annotations

import base64
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from kvfabric.errors import LocalProtocolError
from kvfabric.types import BlockKey, BlockLayout, ExtraInput, Namespace, Segment

ALGORITHM_BLAKE2B_V1 = 1
"""Algorithm id in each block's message: keyed BLAKE2b-256, the encoding above."""

ROOT_PARENT = BlockKey(bytes(32))
_HEADER = struct.Struct("<HHIII32s")
_MARKER = struct.Struct("<I32s")

TokenIds = Sequence[int] | npt.NDArray[np.integer]


def tlv(domain: str, fields: Iterable[tuple[int, bytes]]) -> bytes:
    """Encode `fields` (tag, value) after `domain`; injective in domain and the list of fields."""
    name = domain.encode()
    out = [struct.pack("<H", len(name)), name]
    for tag, value in fields:
        out.append(struct.pack("<HI", tag, len(value)))
        out.append(value)
    return b"".join(out)


def _digest(person: bytes, data: bytes, key: bytes = b"") -> bytes:
    return blake2b(data, digest_size=32, key=key, person=person).digest()


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def layout_fingerprint(layout: BlockLayout) -> bytes:
    """32 bytes: equal iff the bytes of the two layouts are interchangeable."""
    fields = [
        (1, _u32(layout.num_layers)),
        (2, _u32(layout.num_kv_heads)),
        (3, _u32(layout.head_dim)),
        (4, layout.dtype.encode()),
        (5, layout.kv_scales.encode()),
        (6, _u32(layout.block_tokens)),
        (7, _u32(layout.engine_block_tokens)),
        (8, layout.packing.encode()),
        (9, layout.parallel.encode()),
        (10, layout.rope.encode()),
        (11, layout.attention.encode()),
    ]
    fields += [
        (12, struct.pack("<IIQ", part.group, part.shard, part.num_bytes)) for part in layout.parts
    ]
    return _digest(b"kvf-layout-1", tlv("kvfabric/layout", fields))


def namespace_key(namespace: Namespace, secret: bytes) -> bytes:
    """32 bytes keyed with the tenant's 256-bit `secret`: the key of all its BlockKeys."""
    if len(secret) != 32:
        raise LocalProtocolError(f"a tenant secret has 32 bytes, not {len(secret)}")
    fields = [
        (1, namespace.tenant.encode()),
        (2, namespace.model_revision.encode()),
        (3, namespace.adapter.encode()),
        (4, namespace.adapter_revision.encode()),
        (5, namespace.layout_fingerprint),
        *((6, incarnation) for incarnation in namespace.incarnations),
    ]
    return _digest(b"kvf-namespace-1", tlv("kvfabric/namespace", fields), key=secret)


def namespace_tag(key: bytes) -> bytes:
    """8 bytes that name a namespace in events and records without giving its key away."""
    return _digest(b"kvf-ns-tag-1", key)[:8]


def segment_digest(segment: Segment) -> bytes:
    """32 bytes of (template, version, incarnation); where it starts enters with the block."""
    fields = [
        (1, segment.template.encode()),
        (2, segment.version.encode()),
        (3, segment.incarnation),
    ]
    return _digest(b"kvf-segment-1", tlv("kvfabric/segment", fields))


def _extra_digest(extra: ExtraInput, block_first_token: int) -> bytes:
    # The offset is relative to the block and signed: where in the input this block lies counts too.
    fields = [
        (1, extra.kind.encode()),
        (2, extra.digest),
        (3, extra.dtype.encode()),
        (4, struct.pack(f"<{len(extra.shape)}Q", *extra.shape)),
        (5, struct.pack("<q", extra.first_token - block_first_token)),
        (6, struct.pack("<Q", extra.num_tokens)),
    ]
    return _digest(b"kvf-extra-1", tlv("kvfabric/extra", fields))


class BlockHasher:
    """The chain of BlockKeys of one growing prompt.

    `extend` takes further token ids and returns the keys of the blocks they completed; tokens of an
    unfinished block are kept. `public_tokens` is the length of the operator-approved public prefix:
    blocks that lie wholly in it are keyed with `public_key`, the rest with the tenant's `key`, their
    first parent being the last public BlockKey.
    """

    __slots__ = (
        "_blocks",
        "_extras",
        "_markers",
        "_parent",
        "_public_base",
        "_public_blocks",
        "_tail",
        "_tenant_base",
        "block_tokens",
    )

    def __init__(
        self,
        key: bytes,
        block_tokens: int,
        *,
        segments: Sequence[Segment] = (),
        extra_inputs: Sequence[ExtraInput] = (),
        public_key: bytes | None = None,
        public_tokens: int = 0,
    ) -> None:
        if block_tokens <= 0:
            raise LocalProtocolError(f"block_tokens must be positive, not {block_tokens}")
        if public_tokens and public_key is None:
            raise LocalProtocolError("a public prefix needs the public namespace key")
        self.block_tokens = block_tokens
        # A keyed state is made once and copied for each block: keying costs a whole compression.
        self._tenant_base = blake2b(digest_size=32, key=key, person=b"kvf-block-1")
        self._public_base = (
            blake2b(digest_size=32, key=public_key, person=b"kvf-block-1") if public_key else None
        )
        self._public_blocks = public_tokens // block_tokens
        self._parent = ROOT_PARENT
        self._blocks = 0
        self._tail = b""
        self._markers: dict[int, list[tuple[int, bytes]]] = {}
        for segment in sorted(segments, key=lambda s: s.first_token):
            block, offset = divmod(segment.first_token, block_tokens)
            self._markers.setdefault(block, []).append((offset, segment_digest(segment)))
        self._extras = tuple(sorted(extra_inputs, key=lambda e: e.first_token))

    @property
    def num_blocks(self) -> int:
        return self._blocks

    def extend(self, token_ids: TokenIds) -> list[BlockKey]:
        """Keys of the blocks that `token_ids` (any integers in [0, 2**32)) complete."""
        data = self._tail + _token_bytes(token_ids)
        size = 4 * self.block_tokens
        full = len(data) // size
        keys: list[BlockKey] = []
        parent = self._parent
        plain = _HEADER.pack(ALGORITHM_BLAKE2B_V1, 0, 0, self.block_tokens, 0, b"")[:16]
        base = self._tenant_base
        for index in range(full):
            block = self._blocks + index
            if self._public_base is not None:
                public = block < self._public_blocks
                base = self._public_base if public else self._tenant_base
            state = base.copy()
            tokens = data[index * size : index * size + size]
            if block in self._markers or self._extras:
                state.update(self._message(block, parent, tokens))
            else:
                state.update(plain + parent + tokens)
            parent = BlockKey(state.digest())
            keys.append(parent)
        self._tail = data[full * size :]
        self._blocks += full
        self._parent = parent
        return keys

    def _message(self, block: int, parent: bytes, tokens: bytes) -> bytes:
        markers = self._markers.get(block, ())
        first = block * self.block_tokens
        extras = [
            _extra_digest(extra, first)
            for extra in self._extras
            if extra.first_token < first + self.block_tokens
            and first < extra.first_token + extra.num_tokens
        ]
        header = _HEADER.pack(
            ALGORITHM_BLAKE2B_V1, 0, len(markers), self.block_tokens, len(extras), parent
        )
        return b"".join([header, *(_MARKER.pack(*marker) for marker in markers), tokens, *extras])


def _token_bytes(token_ids: TokenIds) -> bytes:
    if not isinstance(token_ids, np.ndarray):
        if isinstance(token_ids, bytes | bytearray):
            token_ids = list(token_ids)  # `array` would take four of them for one token
        try:
            packed = array("I", token_ids)  # checks type and range, 2x faster than numpy on a list
        except (TypeError, OverflowError) as exc:
            raise LocalProtocolError(f"token ids are 32-bit unsigned integers: {exc}") from exc
        if sys.byteorder == "big":
            packed.byteswap()
        return packed.tobytes()
    if token_ids.size == 0:
        return b""
    if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
        raise LocalProtocolError(f"token ids are a flat run of integers, not {token_ids.dtype}")
    if int(token_ids.min()) < 0 or int(token_ids.max()) > 0xFFFFFFFF:
        raise LocalProtocolError("a token id does not fit 32 bits")
    return token_ids.astype("<u4", copy=False).tobytes()


def block_keys(
    token_ids: TokenIds,
    block_tokens: int,
    key: bytes,
    *,
    segments: Sequence[Segment] = (),
    extra_inputs: Sequence[ExtraInput] = (),
) -> list[BlockKey]:
    """Keys of all full blocks of a prompt. `key` is the 32-byte namespace key."""
    hasher = BlockHasher(key, block_tokens, segments=segments, extra_inputs=extra_inputs)
    return hasher.extend(token_ids)


def engine_page_keys(engine: str, page_hashes: Sequence[bytes], key: bytes) -> list[BlockKey]:
    """Keys of pages that an engine names by 32-byte hashes of its own, where it tells us no token ids.

    Keyed with the namespace key, in a domain of their own: no such key is a token block's, and none is
    made of another engine's hash. What a hash stands for (tokens, all before them, salt, adapter) is the
    engine's word; an engine whose hashes are shorter, unchained or unsalted must not be trusted with it.
    """
    base = blake2b(digest_size=32, key=key, person=b"kvf-page-1")
    keys = []
    for page_hash in page_hashes:
        if len(page_hash) != 32:
            raise LocalProtocolError(f"an engine's page hash has 32 bytes, not {len(page_hash)}")
        state = base.copy()
        state.update(tlv("kvfabric/engine-page", [(1, engine.encode()), (2, page_hash)]))
        keys.append(BlockKey(state.digest()))
    return keys


def salt(key: bytes, segments: Sequence[Segment]) -> str:
    """43 characters for an engine's `cache_salt`: namespace and all incarnations, nothing per request."""
    fields = [(1, segment.incarnation) for segment in segments]
    digest = _digest(b"kvf-salt-1", tlv("kvfabric/salt", fields), key=key)
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
