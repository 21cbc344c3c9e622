"""What waits to be sealed, and how it is grouped: 50 ms or 64 MiB, within one segment. No I/O.

Belongs to one event loop. Writes and deletions keep their order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvfabric.errors import KVFabricError
from kvfabric.tiers.base import Location, PartIdentity
from kvfabric.tiers.records import record_bytes
from kvfabric.tiers.segment_accounts import Segment
from kvfabric.tiers.segment_file import Appended
from kvfabric.tiers.segment_index import Put

GROUP_S = 0.05
GROUP_BYTES = 64 << 20
RUN_BYTES = 4 << 20
"""Neighbouring records written by one call to the kernel."""

_RUN_RECORDS = 256


@dataclass(slots=True, eq=False)
class Write:
    identity: PartIdentity
    payload: memoryview
    queued_at: float
    sealed: asyncio.Future[Location]

    @property
    def num_bytes(self) -> int:
        return record_bytes(self.identity.num_bytes)


@dataclass(slots=True, eq=False)
class Drop:
    location: Location
    queued_at: float


@dataclass(slots=True)
class Plan:
    """A group, placed: `records` go into `segment`, `puts` and then `forgets` into the index."""

    segment: Segment | None
    records: list[Appended] = field(default_factory=list)
    puts: list[Put] = field(default_factory=list)
    forgets: list[Location] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(record.identity.num_bytes for record in self.records)

    def add(self, sequence: int, identity: PartIdentity, payload: memoryview) -> Location:
        """Place a record behind those before it."""
        assert self.segment is not None, "a write is taken only into an active segment"
        last = self.records[-1] if self.records else None
        offset = last.offset + record_bytes(last.identity.num_bytes) if last else self.segment.tail
        location = Location(self.segment.file.header.number, offset)
        self.records.append(Appended(offset, sequence, identity, payload))
        self.puts.append(Put(location, sequence, identity))
        return location


def plan_runs(records: Iterable[Appended]) -> Iterator[list[Appended]]:
    """Cut neighbouring records into runs that are written by one call each. Pure."""
    run: list[Appended] = []
    run_bytes = 0
    for record in records:
        num_bytes = record_bytes(record.identity.num_bytes)
        if run and (run_bytes + num_bytes > RUN_BYTES or len(run) == _RUN_RECORDS):
            yield run
            run, run_bytes = [], 0
        run.append(record)
        run_bytes += num_bytes
    if run:
        yield run


class GroupQueue:
    """Bounded by its callers: each write is one of them waiting with a buffer of its own."""

    def __init__(self) -> None:
        self._items: deque[Write | Drop] = deque()
        self._num_bytes = 0
        self._is_open = True
        self._wake = asyncio.Event()  # something is queued, or we are closing
        self._full = asyncio.Event()  # a whole group is queued, or we are closing

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Write | Drop) -> None:
        self._items.append(item)
        if isinstance(item, Write):
            self._num_bytes += item.num_bytes
        if self._num_bytes >= GROUP_BYTES:
            self._full.set()
        self._wake.set()

    def wake(self) -> None:
        """Something else than an item is to be done."""
        self._wake.set()

    def is_past(self, moment: float) -> bool:
        """Whether everything that was queued up to then has been taken."""
        return not self._items or self._items[0].queued_at > moment

    def withdraw(self, write: Write) -> bool:
        """Whether it was still waiting, and now is not."""
        if write not in self._items:
            return False
        self._items.remove(write)
        self._num_bytes -= write.num_bytes
        return True

    def close(self) -> None:
        """What is in it is due at once."""
        self._is_open = False
        self._wake.set()
        self._full.set()

    async def is_due(self) -> bool:
        """Wait until a group is full or old enough. False: closing, and nothing is left."""
        if not self._items and self._is_open:
            self._wake.clear()
        await self._wake.wait()
        if not self._items:
            return self._is_open
        if self._is_open and self._num_bytes < GROUP_BYTES:
            self._full.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._items[0].queued_at + GROUP_S):
                    await self._full.wait()
        return True

    def take(self, room: int) -> list[Write | Drop]:
        """The head of the queue, as far as one group and `room` in the active segment hold it."""
        group: list[Write | Drop] = []
        num_bytes = 0
        while self._items and num_bytes < GROUP_BYTES:
            item = self._items[0]
            if isinstance(item, Write):
                if num_bytes + item.num_bytes > room:
                    break
                num_bytes += item.num_bytes
            group.append(self._items.popleft())
        self._num_bytes -= num_bytes
        return group

    def take_writes(self) -> list[Write]:
        writes = [item for item in self._items if isinstance(item, Write)]
        self._items = deque(item for item in self._items if isinstance(item, Drop))
        self._num_bytes = 0
        return writes

    def postpone(self, drops: Sequence[Drop]) -> None:
        """Back to the head of the queue, to wait a group's time again; given up when closing."""
        if self._is_open:
            now = asyncio.get_running_loop().time()
            for drop in drops:
                drop.queued_at = now
            self._items.extendleft(reversed(drops))


def fail(writes: Iterable[Write], error: KVFabricError) -> None:
    for write in writes:
        if not write.sealed.done():
            write.sealed.set_exception(type(error)(*error.args))
