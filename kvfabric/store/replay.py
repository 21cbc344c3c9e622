"""What if: a log of requests against the store's own admission and eviction, without bytes. Sync.

Index, queues, quotas, ghosts and slots are those of a node, and so is every decision; left out are copies,
leases that outlast a request, time, and the room a node keeps ahead of its next reserve (1/64). The arena
is a real one whose pages are never touched, so it takes no memory whatever size it claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from kvfabric.hashing import layout_fingerprint
from kvfabric.registry.state import Tenant
from kvfabric.store.index import HIT, HOST, NO_ROW, RESERVED, BlockIndex, Lineage, Rows
from kvfabric.store.quota import TierAccounts
from kvfabric.store.reading import leading
from kvfabric.store.residency import Residency
from kvfabric.store.runs import EventSink
from kvfabric.tiers.arena import PAGE_BYTES, Arena
from kvfabric.types import DEFAULT_TENANT, BlockLayout, PartSpec, RecomputeCost, TenantId, TierName

Words = npt.NDArray[np.uint64]


class Replay:
    """A context manager; on leaving, the arena is closed.

    `capacity_blocks`: of the host tier; `max_blocks`: of the index, as `StoreLimits` has it; `growth`: as
    in `RecomputeCost`.
    `events`: hears of what is stored and removed.
    `admitted`: first key words of the blocks that would have been written to SSD, each once.
    """

    def __init__(
        self,
        *,
        capacity_blocks: int,
        block_tokens: int,
        max_blocks: int = 1 << 20,
        growth: float = 0.0,
        tenants: Mapping[TenantId, Tenant] | None = None,
        events: EventSink | None = None,
    ) -> None:
        self.admitted: set[int] = set()
        self._index = BlockIndex(max_blocks)
        size = capacity_blocks * PAGE_BYTES
        self.residency = Residency(
            index=self._index,
            host=TierAccounts(size, lambda tenant: tenant.host),
            ssd=TierAccounts(0, lambda tenant: tenant.ssd),
            events=events or _NoEvents(),
            now=lambda: 1,
        )
        self.residency.host.configure(tenants or {})
        self.residency.save = self._save
        self.residency.arena = Arena.create(size)
        self._layout = _layout(block_tokens)
        self._fingerprint = layout_fingerprint(self._layout)
        self._index.declare(self._fingerprint, self._layout, RecomputeCost(growth=growth))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self.residency.arena is not None
        self.residency.arena.close()

    def request(self, words: Words, tenant: TenantId = DEFAULT_TENANT) -> int:
        """A prompt of these keys, (n, 4) words, is served and all of it stored; how many of its leading
        blocks the host tier had. The distinct keys of a tenant are no other's."""
        if not len(words):
            return 0
        residency, index = self.residency, self._index
        rows = index.lookup(words)
        num_hit = leading((rows != NO_ROW) & (index.host_parts.array[rows] > 0))
        leased = rows[:num_hit]
        if num_hit:
            residency.hold(leased)
            residency.policy.hit(leased)
            for row in leased.tolist():
                self._save(row)
        self._store(words, num_hit, int(leased[-1]) if num_hit else NO_ROW, tenant)
        if num_hit:
            residency.unhold(leased)
        return num_hit

    def _store(self, words: Words, first: int, parent: int, tenant: TenantId) -> None:
        """As `writing` does: rows for what is granted, begun, and published at once."""
        residency, index = self.residency, self._index
        slot = residency.tenant_slot(tenant)
        count = residency.make_room(slot, PAGE_BYTES, len(words) - first)
        residency.free_rows(slot, count)
        rows = index.lookup(words[first : first + count])
        absent = np.flatnonzero(rows == NO_ROW)[: index.free_rows]
        rows[absent] = index.insert(words[first + absent])
        rows = rows[: leading(rows != NO_ROW)]
        placeless = np.flatnonzero(index.lineage.array[rows] == 0)
        if len(placeless):
            lineage = Lineage(tenant, tenant.encode()[:8].ljust(8), self._fingerprint, ())
            number = np.full(len(placeless), index.intern_lineage(lineage, slot), dtype=np.uint32)
            above = np.append(np.uint32(parent), rows[:-1])[placeless]
            index.adopt(rows[placeless], above, number, (placeless + first).astype(np.uint32))
        index.ensure_parts(rows, 1)
        rows = rows[index.part_state.array[index.parts(rows, 0)] & HOST == 0]
        if len(rows):
            self._publish(rows, slot)

    def _publish(self, rows: Rows, tenant: int) -> None:
        residency, parts = self.residency, self._index.parts(rows, 0)
        residency.begin(rows, parts, PAGE_BYTES, RESERVED)
        slots = residency.allocate(tenant, len(rows), PAGE_BYTES)
        assert slots is not None, "slots of one size do not splinter"
        residency.publish(rows, parts, PAGE_BYTES, slots, bytes(16 * len(rows)))

    def _save(self, row: int) -> bool:
        """As `SsdTraffic`: what was used twice is written, once; it need not stay for it here."""
        self._index.flags.cell[row] &= ~HIT
        self.admitted.add(self._index.keys.cell[4 * row])
        return False


def _layout(block_tokens: int) -> BlockLayout:
    """Of Qwen3-8B in bfloat16, but for its bytes: a block is one page here."""
    return BlockLayout(
        num_layers=36,
        num_kv_heads=8,
        head_dim=128,
        dtype="bfloat16",
        block_tokens=block_tokens,
        engine_block_tokens=block_tokens,
        parts=(PartSpec(0, 0, PAGE_BYTES),),
    )


class _NoEvents:
    def stored(
        self,
        tier: TierName,
        namespace_tag: bytes,
        parent: bytes,
        keys: bytes,
        *,
        engine: bytes = b"",
    ) -> None:
        pass

    def removed(
        self, tier: TierName, namespace_tag: bytes, keys: bytes, *, engine: bytes = b""
    ) -> None:
        pass

    def cleared(self, tier: TierName, *, engine: bytes = b"") -> None:
        pass
