"""Blocks between arena and SSD tier: promotion on load, spilling in the background, warm start.

Owns what is on its way, and the breakers. A block is admitted to SSD on its second use, or when it was
used and is about to be evicted; blocks used once never cost a write. An error of the tier, or an operation
that is not done within its deadline, is a miss and opens the breaker of reads or of writes: a disk that is
full still reads. The slot that a late read fills drains until the read has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

import numpy as np

from kvfabric.errors import (
    CorruptBlock,
    KVFabricError,
    NoSpace,
    QuotaExceeded,
    UnknownTenant,
)
from kvfabric.failpoints import failpoint
from kvfabric.store.arrivals import Late
from kvfabric.store.breaker import Breaker
from kvfabric.store.index import (
    HIT,
    HOST,
    LOADING,
    NO_ROW,
    RESERVED,
    SPILLING,
    SSD,
    USED,
    Rows,
    packed_keys,
)
from kvfabric.store.meter import Meter
from kvfabric.store.quota import TierAccounts
from kvfabric.store.residency import Residency, record_bytes
from kvfabric.store.seeding import Seeder, key_words
from kvfabric.tiers.arena import PAGE_BYTES, Slots, slot_bytes
from kvfabric.tiers.base import (
    Flags,
    Lineage,
    Location,
    Move,
    PartIdentity,
    RecordBatch,
    Scrubbed,
    Tier,
)
from kvfabric.types import Part, TenantId

MAX_QUEUED_BLOCKS = 65_536
SSD_ROWS_SHARE = 0.75
"""Of the index: blocks on SSD may not keep new ones from being stored."""

T = TypeVar("T", Move, tuple[Part, Location])


class SsdTraffic:
    """`group` owns the tasks; `spill_bytes` bounds what is being written at once. `deadline_s`: how long
    a read or write may take before it counts as failed."""

    def __init__(
        self,
        tier: Tier,
        residency: Residency,
        *,
        clock: Callable[[], float],
        group: asyncio.TaskGroup,
        spill_bytes: int,
        deadline_s: float,
    ) -> None:
        self.meter = Meter()  # of what is promoted
        self.read_breaker = Breaker("SSD reading", clock)
        self.write_breaker = Breaker("SSD writing", clock)
        self.scrubbing = asyncio.Lock()
        self.counts: Counter[str] = Counter()
        self._tier = tier
        self._residency = residency
        self._index = residency.index
        self._group = group
        self._spill_bytes = spill_bytes
        self._deadline_s = deadline_s
        # Of parts being read: done with the read or at its deadline, whichever comes first.
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._probing = False
        self._num_reads = 0
        # A queued block is not held: it may be evicted first, and its row reused. The first word of
        # its key tells.
        self._queue: deque[tuple[int, int]] = deque()
        self._writing_bytes = 0
        self._changed = asyncio.Event()
        self._max_rows = int(SSD_ROWS_SHARE * self._index.max_blocks)

    async def seed(self, purged: Collection[bytes], offboarded: Collection[TenantId] = ()) -> None:
        """Index what the tier holds; see `Seeder`."""
        await Seeder(self._residency, self._max_rows).seed(self._tier, purged, offboarded)

    # -- promotion -----------------------------------------------------------------------------------

    async def promote(self, rows: Rows, ordinal: int) -> None:
        """Bring this part of each block into the arena, verified, if there is room and no error.

        The caller looks afterwards which are there. One read per part, however many ask. On
        cancellation the reads go on and are published.
        """
        index = self._index
        parts = index.parts(rows, ordinal)
        state = index.part_state.array[parts]
        wanted = (state & SSD != 0) & (state & (HOST | LOADING | RESERVED) == 0)
        if wanted.any() and self.read_breaker.begin():
            self._start_reads(rows[wanted], parts[wanted], ordinal)
        ends = [self._loading[part] for part in parts.tolist() if part in self._loading]
        if ends:
            await asyncio.wait(ends)

    def _start_reads(self, rows: Rows, parts: Rows, ordinal: int) -> None:
        """Of one layout; the chain is cut where room ends, since what follows would be of no use."""
        before = len(self._loading)
        self._start_by_tenant(rows, parts, ordinal)
        if len(self._loading) == before:
            self.read_breaker.abandon()

    def _start_by_tenant(self, rows: Rows, parts: Rows, ordinal: int) -> None:
        residency, index = self._residency, self._index
        spec = index.layout_at(int(rows[0])).specs[ordinal]
        size = slot_bytes(spec.num_bytes)
        tenants = index.tenants_of(rows)
        for tenant in dict.fromkeys(tenants.tolist()):
            mine = np.flatnonzero(tenants == tenant)
            count = residency.make_room(tenant, size, len(mine), leased=True)
            slots = residency.allocate(tenant, count, size) if count else None
            if slots is None:
                return
            begun = mine[:count]
            residency.begin(rows[begun], parts[begun], size, LOADING)
            for position, at in enumerate(begun.tolist()):
                one = Slots(*(vector[position : position + 1] for vector in slots))
                part = int(parts[at])
                self._loading[part] = asyncio.get_running_loop().create_future()
                self.meter.begin()
                self._group.create_task(
                    self._read(int(rows[at]), part, ordinal, one), name="kvfabric-promote"
                )
            if count < len(mine):
                return

    async def _read(self, row: int, part: int, ordinal: int, slots: Slots) -> None:
        residency, index = self._residency, self._index
        identity = self.identity(row, part, ordinal)
        size = slot_bytes(identity.num_bytes)
        location = self._place_of(part)
        assert residency.arena is not None
        buffer = residency.arena.part(int(slots.first_pages[0]), size)
        self._num_reads += 1
        late = Late(residency, _rows(row), size)
        timer = asyncio.get_running_loop().call_later(
            self._deadline_s, self._read_is_late, part, late
        )
        good, checksum = False, identity.checksum
        try:
            checksum = await self._tier.read_into(location, identity, buffer)
            failpoint("store.promote.read")
            # Purged or reclaimed meanwhile: what was read must not bring it back.
            good = bool(index.part_state.cell[part] & SSD)
            self.read_breaker.succeed()
        except CorruptBlock:
            self.counts["corrupt"] += 1
            if residency.is_sealed_at(part, location):
                residency.forget_sealed(row, part, identity.num_bytes)
            self.read_breaker.succeed()  # the medium answered
        except (KVFabricError, OSError) as exc:
            self._fail(self.read_breaker, str(exc))
        finally:
            self._num_reads -= 1
            self.meter.end(identity.num_bytes if good else 0)
            timer.cancel()
            late.settle()
            buffer.release()
            if good:
                self.counts["promotions"] += 1
                residency.publish(_rows(row), _rows(part), size, slots, checksum)
                failpoint("store.promote.published")
            else:
                residency.give_back(slots, size)
                residency.cancel(_rows(row), _rows(part), size)
            self._end_wait(part)

    def _read_is_late(self, part: int, late: Late) -> None:
        """Who waits gets a miss; the slot drains, since the device may still write into it."""
        late.drain()
        self._fail(self.read_breaker, f"a read is not done after {self._deadline_s:g} s")
        self._end_wait(part)

    def _end_wait(self, part: int) -> None:
        waiting = self._loading.pop(part, None)
        if waiting is not None:
            waiting.set_result(None)

    def probe(self) -> None:
        """With reads half open and nobody who loads: read some part, so that the tier comes back."""
        index, breaker = self._index, self.read_breaker
        if not breaker.is_half_open or self._probing:
            return
        rows = np.flatnonzero(index.ssd_parts.array[: index.highest_row + 1])
        breaker.begin()
        if not len(rows):
            breaker.succeed()  # nothing that could be read badly
            return
        row = int(rows[0])
        ordinal, part = next(
            (ordinal, part)
            for ordinal, part in enumerate(index.parts_of(row))
            if index.part_state.cell[part] & SSD
        )
        self._probing = True
        self._group.create_task(
            self._probe(self.identity(row, part, ordinal), self._place_of(part))
        )

    async def _probe(self, identity: PartIdentity, location: Location) -> None:
        late = f"a read is not done after {self._deadline_s:g} s"
        timer = asyncio.get_running_loop().call_later(
            self._deadline_s, self.read_breaker.fail, late
        )
        try:
            scratch = memoryview(bytearray(slot_bytes(identity.num_bytes)))
            await self._tier.read_into(location, identity, scratch)
        except (KVFabricError, OSError) as exc:
            self.read_breaker.fail(str(exc))
        else:
            self.read_breaker.succeed()
        finally:
            timer.cancel()
            self.read_breaker.abandon()
            self._probing = False

    def _place_of(self, part: int) -> Location:
        index = self._index
        return Location(index.part_ssd_file.cell[part], index.part_ssd_page.cell[part] * PAGE_BYTES)

    def identity(self, row: int, part: int, ordinal: int) -> PartIdentity:
        """What the record of a part says, as the index has it."""
        index = self._index
        lineage = index.lineage_at(row)
        spec = index.layouts[lineage.layout_fingerprint].specs[ordinal]
        return PartIdentity(
            part=Part(index.key(row), spec.group, spec.shard),
            namespace_tag=lineage.namespace_tag,
            tenant=lineage.tenant,
            layout_fingerprint=lineage.layout_fingerprint,
            parent=index.key(index.parent.cell[row]),
            block_index=index.block_index.cell[row],
            incarnations=lineage.incarnations,
            num_bytes=spec.num_bytes,
            checksum=index.part_checksum[part].tobytes(),
        )

    def _fail(self, breaker: Breaker, reason: str) -> None:
        self.counts["errors"] += 1
        breaker.fail(reason)

    # -- spilling ------------------------------------------------------------------------------------

    def offer(self, rows: Rows) -> None:
        """Queue blocks of the host tier that had their second use, as far as the queue has room."""
        index = self._index
        for row in rows.tolist():
            if len(self._queue) >= MAX_QUEUED_BLOCKS or self.write_breaker.is_open:
                return
            if self._wants(row):
                index.flags.cell[row] |= SPILLING
                self._queue.append((row, index.keys.cell[4 * row]))
                self._changed.set()

    def save(self, row: int) -> bool:
        """Start writing a block that is about to be evicted; True if it is, and so can not go yet."""
        if self.write_breaker.is_open or self._writing_bytes >= self._spill_bytes:
            return False
        if not self._wants(row):
            return False
        # One try per use: a tier that refuses must not keep the block here for ever.
        self._index.flags.cell[row] &= ~HIT
        return self._write(row)

    def _wants(self, row: int) -> bool:
        index = self._index
        if index.flags.cell[row] & SPILLING or self._residency.num_ssd_blocks >= self._max_rows:
            return False
        complete = index.lineage_parts.cell[index.lineage.cell[row]]
        return index.host_parts.cell[row] == complete and index.ssd_parts.cell[row] < complete

    async def run(self) -> None:
        """Write what is queued, `spill_bytes` at a time, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._queue and self._writing_bytes < self._spill_bytes:
                row, word = self._queue.popleft()
                index = self._index
                if index.keys.cell[4 * row] != word or not index.flags.cell[row] & SPILLING:
                    continue
                index.flags.cell[row] &= ~SPILLING
                if not self.write_breaker.is_open and self._wants(row):
                    self._write(row)
                if len(self._queue) % 64 == 0:
                    await asyncio.sleep(0)

    def _write(self, row: int) -> bool:
        """Start writing the parts of a block that are not on SSD yet, under a hold; False if refused."""
        index, residency = self._index, self._residency
        specs = index.layout_at(row).specs
        tenant = index.lineage_tenant.cell[index.lineage.cell[row]]
        missing = [
            (ordinal, part)
            for ordinal, part in enumerate(index.parts_of(row))
            if not index.part_state.cell[part] & SSD
        ]
        charge = sum(record_bytes(specs[ordinal].num_bytes) for ordinal, _ in missing)
        if not _ssd_admits(residency.ssd, tenant, charge):
            self.counts["refused"] += 1
            return False
        if not self.write_breaker.begin():
            return False
        if not residency.write_budgets.take(index.lineage_at(row).tenant, charge):
            self.write_breaker.abandon()
            self.counts["refused"] += 1
            return False
        index.flags.cell[row] |= SPILLING
        self._writing_bytes += charge
        residency.ssd.accounts[tenant].reserved += charge
        residency.hold(_rows(row))
        self._group.create_task(self._write_parts(row, tenant, missing), name="kvfabric-spill")
        return True

    async def _write_parts(self, row: int, tenant: int, missing: list[tuple[int, int]]) -> None:
        """Part after part; a hold on the row keeps their slots."""
        residency, index = self._residency, self._index
        charge = sum(
            record_bytes(index.layout_at(row).specs[ordinal].num_bytes) for ordinal, _ in missing
        )
        late = f"a write is not done after {self._deadline_s:g} s"
        timer = asyncio.get_running_loop().call_later(
            self._deadline_s, self._fail, self.write_breaker, late
        )
        owner, unwritten = index.lineage_at(row).tenant, charge
        try:
            for ordinal, part in missing:
                if not index.part_state.cell[part] & HOST:
                    break  # discarded meanwhile
                await self._write_part(row, part, ordinal)
                unwritten -= record_bytes(index.layout_at(row).specs[ordinal].num_bytes)
                self.write_breaker.succeed()
        except (QuotaExceeded, UnknownTenant):
            # No fault of the medium: its write budget is spent, or the tenant has no key to be written under.
            self.counts["refused"] += 1
            index.flags.cell[row] &= ~HIT
        except NoSpace as exc:
            self.counts["refused"] += 1
            self.write_breaker.fail(str(exc))
            index.flags.cell[row] &= ~HIT  # not tried again before its next use
        except (KVFabricError, OSError) as exc:
            self._fail(self.write_breaker, str(exc))
        finally:
            timer.cancel()
            self.write_breaker.abandon()
            residency.write_budgets.give_back(owner, unwritten)
            self._writing_bytes -= charge
            residency.ssd.accounts[tenant].reserved -= charge
            index.flags.cell[row] &= ~SPILLING
            residency.unhold(_rows(row))
            self._changed.set()

    async def _write_part(self, row: int, part: int, ordinal: int) -> None:
        index, arena = self._index, self._residency.arena
        assert arena is not None
        identity = self.identity(row, part, ordinal)
        generation = index.part_generation.cell[part]
        payload = arena.part(index.part_page.cell[part], identity.num_bytes)
        try:
            location = await self._tier.write(identity, payload)
        finally:
            payload.release()
        self.counts["writes"] += 1
        state = index.part_state.cell[part]
        if state & HOST and not state & SSD and index.part_generation.cell[part] == generation:
            sizes, offsets = np.array([identity.num_bytes]), np.array([location.offset])
            self._residency.sealed(_rows(row), _rows(part), sizes, location.file, offsets)
            index.flags.cell[row] &= ~USED
            failpoint("store.sealed")
        else:
            self._tier.delete([location])

    async def drain(self) -> None:
        """Wait until nothing is queued or being written; a failing tier's queue is given up."""
        while self._queue or self._writing_bytes:
            if self.write_breaker.is_open:
                self._give_queue_up()
            self._changed.set()
            await asyncio.sleep(0.005)

    async def settle(self) -> None:
        """As `drain`, and wait until no read is under way, late ones included. On cancellation: likewise."""
        await self.drain()
        while self._num_reads or self._probing:
            # A device that does not answer is not waited for here: who asks for this has a deadline.
            await asyncio.sleep(0.005)
            await self.drain()

    def _give_queue_up(self) -> None:
        while self._queue:
            row, word = self._queue.popleft()
            if self._index.keys.cell[4 * row] == word:
                self._index.flags.cell[row] &= ~SPILLING

    # -- what the tier says --------------------------------------------------------------------------

    def hot(self, batch: RecordBatch) -> Flags:
        """Used since they were written, and still the copy that counts."""
        index = self._index
        rows = index.lookup(key_words(batch.rows["key"]))
        used: Flags = (index.flags.array[rows] & USED) != 0
        used &= (rows != NO_ROW) & (index.ssd_parts.array[rows] > 0)
        return used

    def moved(self, moves: Sequence[Move]) -> None:
        """The next rescue of these blocks takes another use."""
        unwanted = []
        for move, row, part in self._known(moves):
            if part and self._residency.is_sealed_at(part, move.old):
                self._residency.moved(part, move.new)
                self._residency.write_budgets.spend(
                    self._index.lineage_at(row).tenant, record_bytes(self._part_bytes(row, part))
                )
                self._index.flags.cell[row] &= ~USED
            else:
                unwanted.append(move.new)
        if unwanted:
            self._tier.delete(unwanted)

    def dropped(self, records: Sequence[tuple[Part, Location]]) -> None:
        """Their segment was reclaimed, or they are corrupt."""
        rows = []
        for (_, location), row, part in self._known(records):
            if part and self._residency.is_sealed_at(part, location):
                self._residency.forget_sealed(row, part, self._part_bytes(row, part))
                rows.append(row)
        self._index.drop_empty(rows)

    def _known(self, records: Sequence[T]) -> Iterator[tuple[T, int, int]]:
        """(record, row, part row) of tuples that begin with a part; 0 for what the index does not have."""
        index = self._index
        rows = index.lookup(packed_keys(b"".join(record[0].key for record in records))).tolist()
        for record, row in zip(records, rows, strict=True):
            part = 0
            if row and index.lineage.cell[row]:
                ordinal = index.layout_at(row).ordinal(record[0].group, record[0].shard)
                numbers = index.parts_of(row)
                if ordinal is not None and ordinal < len(numbers):
                    part = numbers[ordinal]
            yield record, row, part

    def _part_bytes(self, row: int, part: int) -> int:
        return self._index.layout_at(row).specs[self._index.parts_of(row).index(part)].num_bytes

    async def scrub(self, num_bytes: int, *, anew: bool = False) -> Scrubbed:
        """Verify about so much of the tier at rest, under the lock `scrubbing`; what is corrupt is out of
        it. Raises KVFabricError or OSError: then the tier failed."""
        try:
            scrubbed = await self._tier.scrub(num_bytes, anew=anew)
        except (KVFabricError, OSError) as exc:
            self._fail(self.read_breaker, str(exc))
            raise
        if scrubbed.corrupt:
            self.counts["corrupt"] += len(scrubbed.corrupt)
            self.dropped(scrubbed.corrupt)
        return scrubbed

    async def scrub_on(self, num_bytes: int) -> None:
        """As `scrub`, in the background: not while somebody else scrubs, or reads fail."""
        if self.scrubbing.locked() or self.read_breaker.is_open:
            return
        async with self.scrubbing:
            with contextlib.suppress(KVFabricError, OSError):
                await self.scrub(num_bytes)

    def forget(self, row: int) -> None:
        """Take a block off SSD: corrupt or withdrawn."""
        index = self._index
        specs = index.layout_at(row).specs
        gone = []
        for ordinal, part in enumerate(index.parts_of(row)):
            if index.part_state.cell[part] & SSD:
                gone.append(self._place_of(part))
                self._residency.forget_sealed(row, part, specs[ordinal].num_bytes)
        index.drop_empty([row])
        if gone:
            self._tier.delete(gone)

    async def destroy(self, is_struck: Callable[[Lineage], bool]) -> int:
        """See `Tier.destroy`; what is of such a lineage is out of the index already."""
        return await self._tier.destroy(is_struck)

    def refresh_charges(self) -> None:
        """Charge dead bytes that the tier has not reclaimed to those who wrote them."""
        dead = self._tier.statistics().tenant_dead_bytes
        accounts = self._residency.ssd
        for tenant, num_bytes in dead.items():
            accounts.accounts[self._residency.tenant_slot(tenant)].detached = num_bytes


def _ssd_admits(accounts: TierAccounts, tenant: int, num_bytes: int) -> bool:
    """The tier reclaims whole segments by itself; only the tenant's hard maximum refuses."""
    return accounts.over_maximum(tenant, num_bytes) <= 0


def _rows(number: int) -> Rows:
    return np.array([number], dtype=np.uint32)
