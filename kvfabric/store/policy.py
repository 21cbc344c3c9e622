"""Which block gives way: S3-FIFO per tenant over the leaves of the prefix tree. Pure and sync.

Each tenant has two FIFO queues. New blocks enter `small`; one that was matched while there moves to
`main`, one that was not goes when its turn comes and leaves a fingerprint in the ghost table. A block
that returns while its fingerprint is there enters `main` at once. In `main` each match buys one more
round, up to three. So a stream of blocks used once (93 % in production logs) passes through a tenth of
the room and pushes nothing out that is reused.

A queue holds exactly the blocks that could go now: with bytes in the arena, without a hold, and without
a child in the arena (leaf first: a child is worthless without its parent). An inner block is in no
queue; when its last child goes, it is offered at the front, because it is older than that child. So
finding a victim is O(1) however long the chains are.

Whose blocks go first is `quota`'s answer; this module answers which of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvfabric.store.index import MAIN, QUEUED, BlockIndex, Rows

MAX_FREQ = 3
MAX_CHANCES = 256
"""Second chances one call gives; after them blocks go although they were matched. Bounds the call."""
MAX_PATIENT_CHANCES = 32
"""Likewise of a patient call, which then rather takes none."""
SMALL_SHARE = 0.1
"""Of a tenant's blocks; while `small` holds more, victims come from it."""


class _Queue:
    __slots__ = ("first", "last")

    def __init__(self) -> None:
        self.first = 0
        self.last = 0


class _TenantQueues:
    """Counts are of all blocks with bytes in the arena, queued or not."""

    __slots__ = ("main", "num_main", "num_small", "small")

    def __init__(self) -> None:
        self.small = _Queue()
        self.main = _Queue()
        self.num_small = 0
        self.num_main = 0


class EvictionPolicy:
    """Doubly linked queues through two columns of the index, and the ghost table."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index
        self._next = index.column(np.uint32)
        self._previous = index.column(np.uint32)
        # Indexed by row number of the table's size, not by row: a direct map of key fingerprints, in
        # which a newer ghost overwrites an older one.
        self._ghosts = index.column(np.uint32)
        self._tenants: list[_TenantQueues] = []
        self.chances_given = 0

    def arrive(self, rows: Rows) -> None:
        """The first bytes of these blocks came into the arena. Queues nothing yet: `offer` does."""
        index = self._index
        words = index.keys.array[rows, 0]
        places = (words >> np.uint64(32)) % np.uint64(len(self._ghosts.array))
        known = self._ghosts.array[places] == (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        index.flags.array[rows[known]] |= MAIN
        owners = index.tenants_of(rows)
        for tenant in set(owners.tolist()):
            queues = self._queues(tenant)
            num_main = int(np.count_nonzero(known & (owners == tenant)))
            queues.num_main += num_main
            queues.num_small += int(np.count_nonzero(owners == tenant)) - num_main

    def leave(self, rows: Rows, tenant: int, *, ghosts: bool) -> None:
        """The last bytes of these blocks of one tenant left the arena; `ghosts`: by eviction."""
        index, queues = self._index, self._queues(tenant)
        flags = index.flags.array
        self.withdraw(rows[(flags[rows] & QUEUED) != 0].tolist())
        num_main = int(np.count_nonzero(flags[rows] & MAIN))
        queues.num_main -= num_main
        queues.num_small -= len(rows) - num_main
        flags[rows] &= 0xFF & ~MAIN
        if ghosts:
            words = index.keys.array[rows, 0]
            places = (words >> np.uint64(32)) % np.uint64(len(self._ghosts.array))
            self._ghosts.array[places] = (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    def was_evicted(self, row_key_word: int) -> bool:
        """Whether a block whose key starts with this word went not long ago. May be wrong."""
        place = (row_key_word >> 32) % len(self._ghosts.array)
        return self._ghosts.cell[place] == row_key_word & 0xFFFFFFFF

    def offer(self, rows: Rows) -> None:
        """Queue those of `rows` that could go now, at the end of their queues."""
        index = self._index
        could_go = (
            (index.host_parts.array[rows] > 0)
            & (index.holds.array[rows] == 0)
            & (index.host_children.array[rows] == 0)
            & (index.flags.array[rows] & QUEUED == 0)
        )
        for row in rows[could_go].tolist():
            if not index.flags.cell[row] & QUEUED:
                self._append(row)

    def offer_first(self, row: int) -> None:
        """Queue one block at the front, if it could go now."""
        index = self._index
        if (
            index.host_parts.cell[row]
            and not index.holds.cell[row]
            and not index.host_children.cell[row]
            and not index.flags.cell[row] & QUEUED
        ):
            self._prepend(row)

    def withdraw(self, rows: Iterable[int]) -> None:
        """These queued blocks can not go for now: they got a hold or a child."""
        for row in rows:
            if self._index.flags.cell[row] & QUEUED:
                self._unlink(row, self._queue_of(row))

    def hit(self, rows: Rows) -> None:
        """These blocks were matched."""
        freq = self._index.freq.array
        freq[rows] = np.minimum(freq[rows] + 1, MAX_FREQ)

    def take_victims(
        self, tenant: int, num_bytes: int, limit: int, *, patient: bool = False
    ) -> list[int]:
        """The next blocks of this tenant to go: at least one if there is any, then until `num_bytes`
        or `limit` blocks are reached. They are out of the queues, leaf before parent, and their parents'
        counts of children in the arena are lowered.

        `patient`: what was matched is not taken; `chances_given` rises if there may be some next time.
        """
        index, queues = self._index, self._queues(tenant)
        freq, flags, lineages = index.freq.cell, index.flags.cell, index.lineage.cell
        sizes = index.lineage_bytes.cell
        victims: list[int] = []
        chances = MAX_PATIENT_CHANCES if patient else MAX_CHANCES
        while num_bytes > 0 and len(victims) < limit:
            from_small = self._turn_of_small(queues)
            queue = queues.small if from_small else queues.main
            row = queue.first
            if not row or (patient and freq[row] and not chances):
                break
            self._unlink(row, queue)
            if not freq[row] or not chances:
                while row:
                    victims.append(row)
                    num_bytes -= sizes[lineages[row]]
                    more = num_bytes > 0 and len(victims) < limit
                    row = self._free_parent(row, follow=more)
                continue
            chances -= 1
            self.chances_given += 1
            if from_small:
                freq[row] = 0
                flags[row] |= MAIN
                queues.num_small -= 1
                queues.num_main += 1
            else:
                freq[row] -= 1
            self._link(row, queues.main, previous=queues.main.last, following=0)
        return victims

    def _turn_of_small(self, queues: _TenantQueues) -> bool:
        if not queues.small.first or not queues.main.first:
            return bool(queues.small.first)
        return queues.num_small > SMALL_SHARE * (queues.num_small + queues.num_main)

    def put_back(self, row: int) -> None:
        """A victim that stays for now: its parent is covered again."""
        parent = self._index.parent.cell[row]
        self._index.host_children.cell[parent] += 1
        self.withdraw([parent])

    def _free_parent(self, row: int, *, follow: bool) -> int:
        """`row` goes: its parent is offered at the front if it can go now; or, with `follow`, returned
        unqueued if it would be the very next victim. So a chain goes without passing the queue."""
        index = self._index
        parent, flags = index.parent.cell[row], index.flags.cell
        left = index.host_children.cell[parent] - 1
        index.host_children.cell[parent] = left
        if left or not parent:
            return 0
        if (
            follow
            and index.lineage.cell[parent] == index.lineage.cell[row]  # so of the same tenant
            and not index.freq.cell[parent]
            and not (flags[parent] ^ flags[row]) & MAIN
            and index.host_parts.cell[parent]
            and not index.holds.cell[parent]
        ):
            return parent
        self.offer_first(parent)
        return 0

    # -- links ---------------------------------------------------------------------------------------

    def _queues(self, tenant: int) -> _TenantQueues:
        while tenant >= len(self._tenants):
            self._tenants.append(_TenantQueues())
        return self._tenants[tenant]

    def _queue_of(self, row: int) -> _Queue:
        index = self._index
        queues = self._queues(index.lineage_tenant.cell[index.lineage.cell[row]])
        return queues.main if self._index.flags.cell[row] & MAIN else queues.small

    def _append(self, row: int) -> None:
        queue = self._queue_of(row)
        self._link(row, queue, previous=queue.last, following=0)

    def _prepend(self, row: int) -> None:
        queue = self._queue_of(row)
        self._link(row, queue, previous=0, following=queue.first)

    def _link(self, row: int, queue: _Queue, *, previous: int, following: int) -> None:
        self._index.flags.cell[row] |= QUEUED
        self._previous.cell[row] = previous
        self._next.cell[row] = following
        if previous:
            self._next.cell[previous] = row
        else:
            queue.first = row
        if following:
            self._previous.cell[following] = row
        else:
            queue.last = row

    def _unlink(self, row: int, queue: _Queue) -> None:
        previous, following = self._previous.cell[row], self._next.cell[row]
        if previous:
            self._next.cell[previous] = following
        else:
            queue.first = following
        if following:
            self._previous.cell[following] = previous
        else:
            queue.last = previous
        self._index.flags.cell[row] &= ~QUEUED
