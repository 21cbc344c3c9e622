"""Purge: blocks of struck-off lineages leave every tier, and their bytes are zeroed in the arena.

A slot is zeroed before it is free, in the pool; until then it stays charged as draining. One that somebody
still reads is zeroed when the last of them is done, so nobody's bytes change under a lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice

import numpy as np

from kvfabric.failpoints import failpoint
from kvfabric.store.copying import zero_slots
from kvfabric.store.index import Lineage, Rows
from kvfabric.store.residency import Residency
from kvfabric.tiers.pool import IoPool

_SLICE_ROWS = 16_384
"""Rows of the index looked at before others run."""
_DROPS = 64
"""Blocks dropped before others run."""
_WIPED_SLOTS = 512
_WIPED_BYTES = 32 * 1024 * 1024
"""Zeroed by one call to the pool."""


class Purger:
    """`drop` takes a block out of both tiers, to be wiped."""

    def __init__(self, residency: Residency, pool: IoPool, drop: Callable[[int], None]) -> None:
        self._residency = residency
        self._index = residency.index
        self._pool = pool
        self._drop = drop
        self._wiping = asyncio.Lock()

    async def purge(self, is_struck: Callable[[Lineage], bool]) -> tuple[int, int]:
        """(blocks that went, blocks that somebody still reads, writes or brings). On cancellation: what was
        reached is gone, and will be zeroed."""
        num_blocks, num_busy = 0, 0
        for rows in self._slices():
            lineages = self._index.lineage.array[rows]
            doomed = [
                number
                for number in set(lineages.tolist())
                if number and is_struck(self._index.lineage_of(number))
            ]
            for row in rows[np.isin(lineages, doomed)].tolist():
                if self._is_of(row, is_struck):
                    self._drop(row)
                    failpoint("store.purge.dropped")
                    num_blocks += 1
                    num_busy += self._index.holds.cell[row] > 0
                if num_blocks % _DROPS == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(0)
        await self.wipe()
        return num_blocks, num_busy

    @property
    def is_wiped(self) -> bool:
        """Nothing that was purged is left in the arena, not with a reader either."""
        return not any(slot.wipe for _, slot in self._residency.detached_slots())

    async def wipe(self) -> None:
        """Zero and free what waits for it. On cancellation: the rest waits on."""
        waiting = self._residency.unwiped
        async with self._wiping:
            while waiting:
                room = max(1, _WIPED_BYTES // waiting[0].num_bytes)
                slots = list(islice(waiting, min(room, _WIPED_SLOTS)))
                arena = self._residency.arena
                assert arena is not None
                places = [(slot.page, slot.num_bytes) for slot in slots]
                await self._pool.run(partial(zero_slots, arena.view, places))
                self._residency.wiped(len(slots))
                failpoint("store.purge.wiped")

    def _slices(self) -> Iterator[Rows]:
        start = 1
        while start <= self._index.highest_row:
            end = min(start + _SLICE_ROWS, self._index.highest_row + 1)
            yield np.arange(start, end, dtype=np.uint32)
            start = end

    def _is_of(self, row: int, is_struck: Callable[[Lineage], bool]) -> bool:
        """Asked for each row again: while a purge paused, the row may have become another's."""
        number = self._index.lineage.cell[row]
        return bool(number) and is_struck(self._index.lineage_of(number))


def is_made_of(names: Collection[bytes], lineage: Lineage) -> bool:
    """Whether it has one of these names: of an incarnation it is made of (16 B), of its namespace (the tag,
    8 B), or of its tenant (the id; `mint_tenant_id` makes none of 8 or 16 bytes)."""
    return any(name in names for name in lineage.names)
