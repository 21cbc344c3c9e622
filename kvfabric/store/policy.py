"""Which block gives way: leaves of the prefix tree in queues by uses, cost and age. Pure and sync.

As in S3-FIFO, blocks used once and blocks used again wait in queues of their own, and a block that was
evicted leaves a ghost, by which it is known when it returns. Unlike there, no fixed share of the room is set
aside for either: each victim is the oldest block of one of the queues, and `reuse` says of which, from what
blocks of that class and age have been worth to this tenant (a tenth for new blocks, as S3-FIFO has it, loses
to LRU wherever users come back after more than a tenth of the turnover). Times what a block costs to
compute again (`cost`). Unless the least recently used block of all is worth more than that one even with its
statistical error taken off, it goes itself: without evidence this is leaf LRU.

A queue holds exactly the blocks that could go now: with bytes in the arena, without a hold or a pin, and
without a child in the arena (leaf first: a child is worthless without its parent). An inner block is in no
queue; when its last child goes, it takes the place that its own last use gives it.

A queue is a list for each stretch of time, oldest first, linked through columns of the index. Stretches
grow with what the queue spans, so there are at most `MAX_STRETCHES`: finding a victim and putting a block
in its place take the same time however many blocks there are.

Everything learned is the tenant's own. Whose blocks go first is `quota`'s answer; this module answers which
of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvfabric.store.cost import MAX_LEVEL
from kvfabric.store.index import HIT, PINNED, QUEUED, BlockIndex, Rows
from kvfabric.store.quota import distinct_values
from kvfabric.store.reuse import NUM_CLASSES, ReuseModel, Worth

MAX_STRETCHES = 128

_CLASS_BITS = 2
_GHOST_TICK_BITS = 20
_TICKS = 1 << 32
_TICK_SHARE = 1 / 524_288
"""Of the index: blocks stored by one tenant to a tick of its clock. A ghost's age is right up to twice the
index. After 2**32 ticks, which is months, the clock begins anew and one turnover goes out of order."""


class _Stretch:
    """Blocks whose last uses fall into one stretch of time. Rows; 0 for none."""

    __slots__ = ("first", "last")

    def __init__(self) -> None:
        self.first = 0
        self.last = 0


class _Queue:
    """Stretches of `1 << shift` ticks by number; `order`: the numbers, ascending."""

    __slots__ = ("order", "shift", "stretches")

    def __init__(self) -> None:
        self.shift = 0
        self.order: list[int] = []
        self.stretches: dict[int, _Stretch] = {}


class _TenantQueues:
    """`queues` by class and cost level. `clock`: blocks this tenant has stored."""

    __slots__ = ("clock", "model", "queues")

    def __init__(self) -> None:
        self.clock = 0
        self.model = ReuseModel()
        self.queues: dict[int, _Queue] = {}


class EvictionPolicy:
    """Queues through two columns of the index, the time of each block's last use, and the ghost table."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index
        self._next = index.column(np.uint32)
        self._previous = index.column(np.uint32)
        self._used_at = index.column(np.uint32)
        # In which queue a block is: what its layout costs may be told anew meanwhile.
        self._kind = index.column(np.uint8)
        # Indexed by row number of the table's size, not by row: a direct map of key fingerprints, in
        # which a newer ghost overwrites an older one. From the top: fingerprint, tick, class.
        self._ghosts = index.column(np.uint32)
        self._tenants: list[_TenantQueues] = []
        self._tick_blocks = max(1, int(index.max_blocks * _TICK_SHARE))

    # -- uses ----------------------------------------------------------------------------------------

    def arrive(self, rows: Rows) -> None:
        """The first bytes of these blocks came into the arena. Queues nothing yet: `offer` does."""
        index = self._index
        # What comes back from SSD was matched there, which has been counted.
        stored = rows[index.ssd_parts.array[rows] == 0]
        owners = index.tenants_of(stored)
        for tenant in distinct_values(owners):
            self._arrive(stored[owners == tenant], self._queues(tenant))

    def _arrive(self, rows: Rows, queues: _TenantQueues) -> None:
        index = self._index
        places, fingerprints = self._ghost_places(index.keys.array[rows, 0])
        ghosts = self._ghosts.array[places]
        known = ghosts >> (_GHOST_TICK_BITS + _CLASS_BITS) == fingerprints
        tick = self._tick(queues)
        index.freq.array[rows] = 0
        index.flags.array[rows] &= 0xFF & ~HIT
        back = rows[known]
        if len(back):
            left = ghosts[known]
            classes = (left & (NUM_CLASSES - 1)).astype(np.uint8)
            ages = (np.uint32(tick) - (left >> _CLASS_BITS)) & ((1 << _GHOST_TICK_BITS) - 1)
            queues.model.reused(classes, ages)
            index.freq.array[back] = np.minimum(classes + 1, NUM_CLASSES - 1)
            index.flags.array[back] |= HIT
        queues.model.stored(len(rows) - len(back))
        queues.clock += len(rows)
        self._used_at.array[rows] = self._tick(queues)

    def restored(self, rows: Rows) -> None:
        """These came from an earlier life with how often they were used, oldest first. Queues nothing."""
        owners = self._index.tenants_of(rows)
        for tenant in distinct_values(owners):
            own, queues = rows[owners == tenant], self._queues(tenant)
            ticks = np.arange(queues.clock + 1, queues.clock + 1 + len(own)) // self._tick_blocks
            self._used_at.array[own] = ticks.astype(np.uint32)
            queues.clock += len(own)

    def hit(self, rows: Rows) -> None:
        """These blocks were matched: their second use, if it is not a later one."""
        index = self._index
        queued = rows[(index.flags.array[rows] & QUEUED) != 0]
        if len(queued):
            self.withdraw(queued.tolist())
        index.flags.array[rows] |= HIT
        owners = index.tenants_of(rows)
        tenants = distinct_values(owners)
        for tenant in tenants:
            own = rows if len(tenants) == 1 else rows[owners == tenant]
            queues = self._queues(tenant)
            tick = np.uint32(self._tick(queues))
            classes = index.freq.array[own]
            queues.model.reused(classes, tick - self._used_at.array[own])
            index.freq.array[own] = np.minimum(classes + 1, NUM_CLASSES - 1)
            self._used_at.array[own] = tick
            if len(queued):
                self.offer(own)

    def leave(self, rows: Rows, *, ghosts: bool) -> None:
        """The last bytes of these blocks left the arena; `ghosts`: by eviction."""
        index = self._index
        self.withdraw(rows[(index.flags.array[rows] & QUEUED) != 0].tolist())
        if ghosts:
            places, fingerprints = self._ghost_places(index.keys.array[rows, 0])
            ticks = self._used_at.array[rows] & ((1 << _GHOST_TICK_BITS) - 1)
            self._ghosts.array[places] = (
                fingerprints << (_GHOST_TICK_BITS + _CLASS_BITS)
                | ticks << _CLASS_BITS
                | index.freq.array[rows]
            )

    def was_evicted(self, row_key_word: int) -> bool:
        """Whether a block whose key starts with this word went not long ago. May be wrong."""
        places, fingerprints = self._ghost_places(np.array([row_key_word], dtype=np.uint64))
        ghosts = self._ghosts.array[places] >> (_GHOST_TICK_BITS + _CLASS_BITS)
        return bool(ghosts[0] == fingerprints[0])

    def _ghost_places(
        self, words: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint32]]:
        """(where the ghost of a key lies, its fingerprint, which is not 0) by first words."""
        places = ((words >> np.uint64(32)) % np.uint64(len(self._ghosts.array))).astype(np.intp)
        bits = 32 - _GHOST_TICK_BITS - _CLASS_BITS
        prints = (words & np.uint64((1 << bits) - 1)).astype(np.uint32)
        return places, np.maximum(prints, np.uint32(1))

    def _tick(self, queues: _TenantQueues) -> int:
        return queues.clock // self._tick_blocks % _TICKS

    # -- queues --------------------------------------------------------------------------------------

    def offer(self, rows: Rows) -> None:
        """Queue those of `rows` that could go now, each in its place by last use."""
        index = self._index
        could_go = (
            (index.host_parts.array[rows] > 0)
            & (index.holds.array[rows] == 0)
            & (index.host_children.array[rows] == 0)
            & (index.flags.array[rows] & (QUEUED | PINNED) == 0)
        )
        for row in rows[could_go].tolist():
            if not index.flags.cell[row] & QUEUED:
                self._enqueue(row, first=False)

    def withdraw(self, rows: Iterable[int]) -> None:
        """These queued blocks can not go for now: they got a hold, a pin or a child."""
        index = self._index
        for row in rows:
            if index.flags.cell[row] & QUEUED:
                queue = self._queue(row, self._kind.cell[row])
                self._unlink(row, queue, self._used_at.cell[row] >> queue.shift)

    def take_victims(self, tenant: int, num_bytes: int, limit: int) -> list[int]:
        """The next blocks of this tenant to go: at least one if there is any, then until `num_bytes`
        or `limit` blocks are reached. They are out of the queues, leaf before parent, and their parents'
        counts of children in the arena are lowered.
        """
        index, queues = self._index, self._queues(tenant)
        lineages, sizes = index.lineage.cell, index.lineage_bytes.cell
        victims: list[int] = []
        while num_bytes > 0 and len(victims) < limit:
            queue = self._next_queue(queues)
            if queue is None:
                break
            number = queue.order[0]
            stretch = queue.stretches[number]
            while (row := stretch.first) and num_bytes > 0 and len(victims) < limit:
                self._unlink(row, queue, number)
                while row:
                    victims.append(row)
                    num_bytes -= sizes[lineages[row]]
                    more = num_bytes > 0 and len(victims) < limit
                    row = self._free_parent(row, number if more else -1, queue.shift)
        return victims

    def put_back(self, row: int) -> None:
        """A victim that stays for now: its parent is covered again."""
        parent = self._index.parent.cell[row]
        self._index.host_children.cell[parent] += 1
        self.withdraw([parent])

    def _next_queue(self, queues: _TenantQueues) -> _Queue | None:
        """Whose oldest block goes: the least recently used one of all, unless it is surely worth more than
        others; of those the one that is worth least."""
        tick, model = self._tick(queues), queues.model
        found, lru = None, Worth(0.0, 0.0, 0)
        oldest_age = -1
        others: list[tuple[Worth, _Queue]] = []
        for kind, queue in queues.queues.items():
            if not queue.order:
                continue
            age = (tick - (queue.order[0] << queue.shift)) % _TICKS
            worth = model.worth(kind & (NUM_CLASSES - 1), age, _COSTS[kind >> _CLASS_BITS])
            others.append((worth, queue))
            if age > oldest_age or (age == oldest_age and worth.value < lru.value):
                found, lru, oldest_age = queue, worth, age
        least = lru.value
        for worth, queue in others:
            if worth.value < least and lru.surely_exceeds(worth):
                found, least = queue, worth.value
        return found

    def _free_parent(self, row: int, number: int, shift: int) -> int:
        """`row`, of stretch `number`, goes: its parent is queued if it can go now; or returned unqueued if
        it would be the very next victim. So a chain goes without passing the queue."""
        index = self._index
        parent = index.parent.cell[row]
        left = index.host_children.cell[parent] - 1
        index.host_children.cell[parent] = left
        if (
            left
            or not parent
            or not index.host_parts.cell[parent]
            or index.holds.cell[parent]
            or index.flags.cell[parent] & (QUEUED | PINNED)
        ):
            return 0
        if (
            self._used_at.cell[parent] >> shift == number
            and self._kind_of(parent) == (self._kind.cell[row])
        ):
            same_tenant = (
                index.lineage_tenant.cell[index.lineage.cell[parent]]
                == index.lineage_tenant.cell[index.lineage.cell[row]]
            )
            if same_tenant:
                return parent
        self._enqueue(parent, first=True)
        return 0

    def _kind_of(self, row: int) -> int:
        """Class and cost level of a block, in a byte: the number of its queue."""
        index = self._index
        level = index.lineage_levels[index.lineage.cell[row]].at(index.block_index.cell[row])
        return index.freq.cell[row] | (level + MAX_LEVEL) << _CLASS_BITS

    # -- links ---------------------------------------------------------------------------------------

    def _queues(self, tenant: int) -> _TenantQueues:
        while tenant >= len(self._tenants):
            self._tenants.append(_TenantQueues())
        return self._tenants[tenant]

    def _queue(self, row: int, kind: int) -> _Queue:
        index = self._index
        queues = self._queues(index.lineage_tenant.cell[index.lineage.cell[row]]).queues
        queue = queues.get(kind)
        if queue is None:
            queue = queues[kind] = _Queue()
        return queue

    def _enqueue(self, row: int, *, first: bool) -> None:
        kind = self._kind.cell[row] = self._kind_of(row)
        queue = self._queue(row, kind)
        number = self._used_at.cell[row] >> queue.shift
        stretch = queue.stretches.get(number)
        if stretch is None:
            stretch = queue.stretches[number] = _Stretch()
            if queue.order and number < queue.order[-1]:
                queue.order.insert(bisect_left(queue.order, number), number)
            else:
                queue.order.append(number)
        if first:
            self._link(row, stretch, previous=0, following=stretch.first)
        else:
            self._link(row, stretch, previous=stretch.last, following=0)
        if len(queue.order) > MAX_STRETCHES:
            self._coarsen(queue)

    def _link(self, row: int, stretch: _Stretch, *, previous: int, following: int) -> None:
        self._index.flags.cell[row] |= QUEUED
        self._previous.cell[row] = previous
        self._next.cell[row] = following
        if previous:
            self._next.cell[previous] = row
        else:
            stretch.first = row
        if following:
            self._previous.cell[following] = row
        else:
            stretch.last = row

    def _unlink(self, row: int, queue: _Queue, number: int) -> None:
        stretch = queue.stretches[number]
        previous, following = self._previous.cell[row], self._next.cell[row]
        if previous:
            self._next.cell[previous] = following
        else:
            stretch.first = following
        if following:
            self._previous.cell[following] = previous
        else:
            stretch.last = previous
        self._index.flags.cell[row] &= ~QUEUED
        if not stretch.first:
            del queue.stretches[number]
            del queue.order[bisect_left(queue.order, number)]
            if not queue.order:
                queue.shift = 0

    def _coarsen(self, queue: _Queue) -> None:
        """Stretches twice as long, two joined to one."""
        joined: dict[int, _Stretch] = {}
        for number in queue.order:
            stretch = queue.stretches[number]
            before = joined.setdefault(number >> 1, stretch)
            if before is not stretch:
                self._next.cell[before.last] = stretch.first
                self._previous.cell[stretch.first] = before.last
                before.last = stretch.last
        queue.shift += 1
        queue.stretches = joined
        queue.order = list(joined)


_COSTS = [2.0 ** (level / 2) for level in range(-MAX_LEVEL, 2 * MAX_LEVEL)]
"""By cost level, from -MAX_LEVEL on."""
