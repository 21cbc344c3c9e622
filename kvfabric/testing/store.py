"""A real BlockStore with a real arena, a window and a clock that jumps; one writer, one careful reader.

For tests of the store and of what sits on it. The bytes of a part follow from its key, so a test knows
what is right without asking the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
import xxhash

from kvfabric.hashing import ROOT_PARENT
from kvfabric.protocol.messages import Committed, Located, Reserved
from kvfabric.registry.state import RegistryState
from kvfabric.store.store import BlockStore, RequestGrant, StoreLimits
from kvfabric.tiers.arena import Arena
from kvfabric.tiers.base import Tier
from kvfabric.types import (
    DEFAULT_TENANT,
    BlockKey,
    BlockLayout,
    PartSpec,
    SessionId,
    TenantId,
    TierName,
)

PART_BYTES = 4096
TAG = b"default\0"
GRANT = RequestGrant(
    tenant=DEFAULT_TENANT,
    namespace_tag=TAG,
    public_tag=b"",
    public_blocks=0,
    cacheable_blocks=-1,
    block_tokens=64,
    segments=(),
    epochs=(),
    no_store=False,
    no_read=False,
)
"""A request of the default tenant without template, limits or public prefix."""

SESSION = SessionId(b"session-of-tests")


def grant_of(tenant: str) -> RequestGrant:
    """As GRANT, for another tenant."""
    return replace(GRANT, tenant=TenantId(tenant), namespace_tag=tenant.encode()[:8].ljust(8))


def make_layout(num_parts: int = 1, part_bytes: int = PART_BYTES) -> BlockLayout:
    """A layout whose parts are `num_parts` shards of one group."""
    return BlockLayout(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        dtype="float32",
        block_tokens=64,
        engine_block_tokens=16,
        parts=tuple(PartSpec(0, shard, part_bytes) for shard in range(num_parts)),
    )


def make_keys(count: int, seed: int = 0) -> list[BlockKey]:
    """A chain's keys; equal for equal arguments and disjoint for different seeds."""
    raw = np.random.default_rng([7, seed]).bytes(32 * count)
    return [BlockKey(raw[start : start + 32]) for start in range(0, len(raw), 32)]


def part_bytes(key: BlockKey, shard: int = 0, num_bytes: int = PART_BYTES) -> bytes:
    """What the part of this key must hold."""
    pattern = key + bytes([shard])
    return (pattern * (num_bytes // len(pattern) + 1))[:num_bytes]


class FakeClock:
    """Seconds; jumps when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class RecordedEvents:
    """Applies the events it gets to a set of (tag, prefix), as a router would."""

    def __init__(self) -> None:
        self.present: set[tuple[bytes, bytes]] = set()

    def stored(
        self,
        tier: TierName,
        namespace_tag: bytes,
        parent: bytes,
        keys: bytes,
        *,
        engine: bytes = b"",
    ) -> None:
        assert tier is TierName.HOST
        assert len(parent) == 8
        assert not engine
        found = self._entries(namespace_tag, keys)
        assert self.present.isdisjoint(found), "stored twice"
        self.present.update(found)

    def removed(
        self, tier: TierName, namespace_tag: bytes, keys: bytes, *, engine: bytes = b""
    ) -> None:
        assert tier is TierName.HOST
        assert not engine
        found = self._entries(namespace_tag, keys)
        assert self.present.issuperset(found), "removed and not there"
        self.present.difference_update(found)

    def cleared(self, tier: TierName, *, engine: bytes = b"") -> None:
        raise AssertionError("the store never clears")

    def _entries(self, tag: bytes, keys: bytes) -> set[tuple[bytes, bytes]]:
        return {(tag, keys[start : start + 8]) for start in range(0, len(keys), 8)}


class StoreRig:
    """`async with StoreRig(...) as rig`: `rig.store` with one open session of `layout`."""

    def __init__(
        self,
        *,
        num_slots: int = 64,
        layout: BlockLayout | None = None,
        limits: StoreLimits | None = None,
        ssd: Tier | None = None,
        store_class: type[BlockStore] = BlockStore,
    ) -> None:
        self.layout = layout or make_layout()
        self.clock = FakeClock()
        self.wall = FakeClock()
        self.events = RecordedEvents()
        self.state: RegistryState | None = RegistryState()
        size = num_slots * PART_BYTES
        self.limits = limits or StoreLimits(host_bytes=size, max_blocks=1024, lease_share=1.0)
        self.arena = Arena.create(self.limits.host_bytes)
        self.window = memoryview(bytearray(256 * self.layout.parts[0].num_bytes))
        self.store = store_class(
            limits=self.limits,
            registry=lambda: self.state,
            clock=self.clock,
            events=self.events,
            ssd=ssd,
            wall_clock=self.wall,
        )

    async def __aenter__(self) -> Self:
        await self.store.__aenter__()
        self.store.attach_arena(self.arena)
        self.store.open_session(SESSION, self.layout)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.store.__aexit__(exc_type, exc, traceback)
        finally:
            self.arena.close()

    def open(self, request_id: str, grant: RequestGrant = GRANT) -> None:
        self.store.open_request(SESSION, request_id, grant)

    def reserve(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        *,
        parent: BlockKey = ROOT_PARENT,
        shard: int = 0,
    ) -> Reserved:
        return self.store.reserve(SESSION, request_id, parent, b"".join(keys), 0, shard)

    async def commit(
        self, reserved: Reserved, keys: Sequence[BlockKey], *, shard: int = 0
    ) -> Committed:
        """Write what was granted into the window and commit it."""
        granted = [at for at, state in enumerate(reserved.states) if state == 0]
        size = self.layout.parts[shard].num_bytes
        for place, at in enumerate(granted):
            self.window[place * size : (place + 1) * size] = part_bytes(keys[at], shard, size)
        return await self.store.commit(
            SESSION,
            reserved.reservation,
            np.array(granted, dtype="<u4").tobytes(),
            self.window,
            (np.arange(len(granted), dtype="<u8") * size).tobytes(),
        )

    async def put(
        self,
        keys: Sequence[BlockKey],
        *,
        parent: BlockKey = ROOT_PARENT,
        grant: RequestGrant = GRANT,
        shards: Iterable[int] = (0,),
    ) -> int:
        """Store a chain under a request of its own; how many blocks were stored now."""
        self.open("put", grant)
        stored = 0
        for shard in shards:
            reserved = self.reserve("put", keys, parent=parent, shard=shard)
            if reserved.reservation:
                stored = sum((await self.commit(reserved, keys, shard=shard)).states)
        self.store.release(SESSION, ["put"])
        return stored

    def match(
        self, request_id: str, keys: Sequence[BlockKey], grant: RequestGrant = GRANT
    ) -> tuple[int, str]:
        """(blocks matched and leased, reason for the next)."""
        self.open(request_id, grant)
        matched = self.store.match(SESSION, request_id, b"".join(keys))
        assert len(matched.tiers) == matched.num_blocks
        return matched.num_blocks, matched.reason

    async def load(self, request_id: str, keys: Sequence[BlockKey], *, shard: int = 0) -> Located:
        return await self.store.load(SESSION, request_id, b"".join(keys), 0, shard)

    def copy(self, located: Located, *, verify: bool = True) -> list[bytes]:
        """What an engine does: copy from the arena, verify the copies; the leading good ones."""
        copies: list[bytes] = []
        for at, offset in enumerate(np.frombuffer(located.offsets, dtype="<u8").tolist()):
            data = bytes(self.arena.view[offset : offset + located.part_bytes])
            if verify and xxhash.xxh3_128_digest(data) != located.checksums[16 * at : 16 * at + 16]:
                break
            copies.append(data)
        return copies

    def confirm(
        self, request_id: str, keys: Sequence[BlockKey], located: Located, *, shard: int = 0
    ) -> int:
        keys = keys[: located.num_blocks]
        return self.store.confirm(
            SESSION, request_id, b"".join(keys), located.generations, 0, shard
        ).num_blocks

    async def get(
        self, keys: Sequence[BlockKey], *, grant: RequestGrant = GRANT, shard: int = 0
    ) -> list[bytes]:
        """Match, load, copy, confirm and release: the bytes an engine would use."""
        num_blocks, _ = self.match("get", keys, grant)
        located = await self.load("get", keys[:num_blocks], shard=shard)
        copies = self.copy(located)
        good = self.confirm("get", keys, located, shard=shard)
        self.store.release(SESSION, ["get"])
        return copies[:good]
