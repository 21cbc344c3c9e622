"""Parts that are on their way from another node into slots: who waits for them, and until when.

Such a part is RESERVED and LOADING at once: somebody owns its first store, and readers may be promised it.
It becomes READY like any other store, or is not there after all, which costs a recompute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from kvfabric.store.index import LOADING, RESERVED, BlockIndex, Rows
from kvfabric.store.residency import Residency
from kvfabric.tiers.arena import Slots
from kvfabric.tiers.base import Flags

ARRIVING = RESERVED | LOADING

Fill = Callable[[Slots], Awaitable[bytes]]
"""Fills slots and returns the XXH3-128 digests of what lies in them, 16 B a part, packed. Once it has
returned or raised, nothing but the store touches the slots."""


class Arrivals:
    """`waiting`: parts that are awaited, until they are there or late."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index
        self._waiting: dict[int, asyncio.Future[None]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def expect(self, parts: Rows) -> None:
        self._index.part_state.array[parts] |= LOADING
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting |= dict.fromkeys(parts.tolist(), future)

    def end(self, parts: Rows) -> None:
        """There, or not to be waited for any more. Idempotent."""
        ended = {self._waiting.pop(part, None) for part in parts.tolist()}
        for future in ended - {None}:
            assert future is not None
            if not future.done():
                future.set_result(None)

    async def wait(self, parts: Rows) -> None:
        """Until none of these is on its way. The caller looks afterwards which are there."""
        ends = {self._waiting[part] for part in parts.tolist() if part in self._waiting}
        if ends:
            await asyncio.wait(ends)

    def promised(self, rows: Rows, num_parts: int) -> Flags:
        """Which blocks are, with all parts, READY somewhere here or on their way and not late."""
        index = self._index
        promised: Flags = np.ones(len(rows), dtype=np.bool_)
        for ordinal in range(num_parts):
            parts = index.parts(rows, ordinal)
            states = index.part_state.array[parts]
            coming = states & ARRIVING == ARRIVING
            coming &= np.isin(parts, list(self._waiting))
            promised &= (states & ~np.uint8(ARRIVING) != 0) | coming
        return promised


class Late:
    """The charge of slots, one of `num_bytes` a row, that somebody else fills: reserved, and draining once
    that is late. A prompt's rows may be several tenants': those of a public prefix are nobody's else."""

    def __init__(self, residency: Residency, rows: Rows, num_bytes: int) -> None:
        self._residency, self._rows, self._num_bytes = residency, rows, num_bytes
        self._drains = False

    def drain(self) -> None:
        self._drains = True
        self._residency.begin_overdue(self._rows, self._num_bytes)

    def settle(self) -> None:
        """It has ended: as if it had not been late."""
        if self._drains:
            self._drains = False
            self._residency.end_overdue(self._rows, self._num_bytes)
