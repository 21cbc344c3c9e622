"""BlockStore: the node's verbs over host arena and SSD tier. Plan (sync) -> I/O -> apply (sync).

The one entry for the daemon, on its event loop's thread. Everything is decided in sync code, so it is
atomic; what awaits in between marks its parts RESERVED or LOADING and looks again afterwards: epochs,
rights, and whether the parts are still what they were. A miss is an answer, never an exception.

    index      rows, keys, lineages            policy   which block goes
    residency  every transition, slots         quota    whose
    lease      sessions, leases, reservations  access   what a request may do
    reading    match, load, confirm            writing  reserve, commit, abort
    arrivals   what other nodes are sending
    copying    window -> slot with checksum    ssd      promotion, spilling, breaker
    breaker    when SSD is left alone
    contents   all of it as data, for a successor
    scrub      the arena's bytes, checked anew     purging  for good, and zeroed
    sampling   what lies here, for probes  meter    how fast SSD gives it back
    pins       what is not evicted          turns    how all of it shares the event loop
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from kvfabric.errors import LocalProtocolError, NoSpace, RemoteProtocolError
from kvfabric.hashing import layout_fingerprint
from kvfabric.protocol.messages import Committed, Confirmed, Located, Matched, Reserved
from kvfabric.registry.state import PURGED, RegistryState
from kvfabric.registry.withdrawn import offboarded_tenants
from kvfabric.store import contents
from kvfabric.store.access import Access
from kvfabric.store.arrivals import Fill
from kvfabric.store.breaker import Breaker
from kvfabric.store.contents import Contents
from kvfabric.store.index import MAX_PARTS, BlockIndex, Lineage
from kvfabric.store.lease import LeaseBook, RequestGrant
from kvfabric.store.meter import Meter
from kvfabric.store.pins import PinDeadlines
from kvfabric.store.purging import Purger, is_made_of
from kvfabric.store.quota import TierAccounts
from kvfabric.store.reading import Reader
from kvfabric.store.residency import Residency
from kvfabric.store.runs import EventSink, Run, host_runs
from kvfabric.store.sampling import Sampler
from kvfabric.store.scrub import Scrubber, ScrubReport, scrub_ssd
from kvfabric.store.ssd import SsdTraffic
from kvfabric.store.statistics import StoreStatistics, tenant_usage
from kvfabric.store.turns import Turns
from kvfabric.store.writing import Writer
from kvfabric.tiers.arena import Arena
from kvfabric.tiers.base import Tier
from kvfabric.tiers.pool import IoPool
from kvfabric.types import (
    UNKNOWN_COST,
    BlockLayout,
    RecomputeCost,
    SessionId,
    TenantId,
    TierName,
)

__all__ = [
    "BlockStore",
    "EventSink",
    "RequestGrant",
    "StoreLimits",
]

_HOUSE_S = 0.5
_TOUCH_BYTES = 64 * 1024 * 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Sizes in bytes, times in seconds. `lease_share`: of the host tier, see `quota`.

    `copy_threads` also scrub. `spill_bytes`: handed to SSD at once (a group that is written, and the next);
    `ssd_deadline_s`: how long one read or write of it may take before it counts as failed.
    `scrub_bytes_per_s`: how fast the arena is re-checked in the background; 0 for not at all.
    `strict_partition`: see `quota`.
    """

    host_bytes: int
    ssd_bytes: int = 0
    max_blocks: int = 1_048_576
    lease_s: float = 30.0
    reservation_s: float = 30.0
    lease_share: float = 0.1
    copy_threads: int = 2
    spill_bytes: int = 128 * 1024 * 1024
    ssd_deadline_s: float = 5.0
    scrub_bytes_per_s: int = 64 * 1024 * 1024
    ssd_scrub_bytes_per_s: int = 16 * 1024 * 1024
    strict_partition: bool = False


def _made_of(names: Collection[bytes]) -> Callable[[Lineage], bool]:
    return partial(is_made_of, frozenset(names))


def _uses(grant: RequestGrant, names: Collection[bytes]) -> bool:
    return (
        grant.namespace_tag in names
        or grant.tenant.encode() in names
        or (grant.public_blocks > 0 and grant.public_tag in names)
        or any(segment.incarnation in names for segment in grant.segments)
    )


class BlockStore:
    """An async context manager: entering indexes what the SSD tier holds, leaving ends its tasks.

    `registry` returns None while the node holds no epoch lease: then everything misses. `ssd`, if it is
    there from the start, is entered before and left after the store, which becomes its owner. `clock` is
    monotonic; `wall_clock` says, in Unix seconds, when a pin that the store hears of is to end. `pool`: where
    copies run, the store's to close.
    """

    def __init__(  # noqa: PLR0913 - all that it stands on
        self,
        *,
        limits: StoreLimits,
        registry: Callable[[], RegistryState | None],
        clock: Callable[[], float],
        events: EventSink,
        ssd: Tier | None,
        wall_clock: Callable[[], float] = time.time,
        pool: IoPool | None = None,
    ) -> None:
        self.limits = limits
        self._registry = registry
        self._clock = clock
        self._wall_clock = wall_clock
        self._pin_deadlines = PinDeadlines()
        self._started = clock()
        self._tier = ssd
        self._index = BlockIndex(limits.max_blocks)
        self._host = TierAccounts(
            limits.host_bytes, lambda tenant: tenant.host, strict=limits.strict_partition
        )
        self._ssd_accounts = TierAccounts(
            limits.ssd_bytes, lambda tenant: tenant.ssd, strict=limits.strict_partition
        )
        self._residency = Residency(
            index=self._index,
            host=self._host,
            ssd=self._ssd_accounts,
            events=events,
            now=self._now,
        )
        self._leases = LeaseBook(
            self._residency,
            clock=clock,
            lease_s=limits.lease_s,
            reservation_s=limits.reservation_s,
            lease_share=limits.lease_share,
        )
        self._access = access = Access(
            self._residency,
            self._leases,
            registry=registry,
            now=self._now,
            on_state=self._configure,
        )
        self._pool = pool or IoPool(limits.copy_threads, "kvfabric-copy")
        self.turns = Turns()
        self._writer = Writer(
            self._residency,
            self._leases,
            access,
            pool=self._pool,
            turns=self.turns,
            copy_threads=limits.copy_threads,
        )
        self._writer.drop = self._drop
        self._reader = Reader(
            self._residency, self._leases, access, self._writer.arrivals, lease_s=limits.lease_s
        )
        self._ssd: SsdTraffic | None = None
        self.ssd_meter = Meter()
        self._memory_breaker = Breaker("a part of the host tier", clock)
        self._scrubbing_ssd: asyncio.Task[None] | None = None
        self._group = asyncio.TaskGroup()
        self._room_is_low = asyncio.Event()
        self._background: list[asyncio.Task[None]] = []
        self._works: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.sampler = Sampler(self._index)
        self._scrubber = Scrubber(self._residency, self._pool, self.turns, self._drop)
        self._purger = Purger(self._residency, self._pool, partial(self._drop, wipe=True))

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._residency.room_is_low = self._room_is_low.set
        self._start(self._keep_house)
        self._start(self._keep_room)
        self._start(self._touch_index)
        if self._tier is not None:
            await self.attach_ssd(self._tier)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._background:
            task.cancel()
        try:
            # Not told of the body's error: that one is the caller's, and stays as it is.
            await self._group.__aexit__(None, None, None)
        finally:
            await self._pool.close()

    def _purged(self) -> list[bytes]:
        """Incarnations that were struck off for good."""
        state = self._registry()
        templates = state.templates.values() if state is not None else ()
        return [template.incarnation for template in templates if template.state == PURGED]

    def _offboarded(self) -> frozenset[TenantId]:
        state = self._registry()
        return offboarded_tenants(state) if state is not None else frozenset()

    def _configure(self, state: RegistryState) -> None:
        now = self._clock()
        self._residency.configure(state.tenants)
        self._pin_deadlines.hear(state.templates.values(), now=now, wall=self._wall_clock())
        self._residency.pins.configure(self._pin_deadlines.live(now))

    def _start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `work` in the background, anew after each `thaw`."""
        self._works.append(work)
        self._background.append(self._group.create_task(work()))

    def attach_arena(self, arena: Arena) -> None:
        """The host tier's memory, once; before it everything misses. Stays the caller's to close."""
        if self._residency.arena is not None:
            raise LocalProtocolError("the store has an arena already")
        self._residency.arena = arena
        self._residency.resize(arena.size_bytes)
        self._start(partial(self._touch, arena))

    async def attach_ssd(self, tier: Tier) -> None:
        """The SSD tier, once; it may come while the store serves, and is left after the store. Its blocks
        are indexed when this returns. On cancellation the store is to be left."""
        if self._ssd is not None:
            raise LocalProtocolError("the store has an SSD tier already")
        self._ssd = SsdTraffic(
            tier,
            self._residency,
            clock=self._clock,
            group=self._group,
            spill_bytes=self.limits.spill_bytes,
            deadline_s=self.limits.ssd_deadline_s,
        )
        self._ssd.meter = self.ssd_meter
        tier.owner = self._ssd
        await self._ssd.seed(self._purged(), self._offboarded())
        self._residency.save = self._ssd.save
        self._start(self._ssd.run)
        self._reader.ssd = self._ssd

    # -- sessions and requests -----------------------------------------------------------------------

    def open_session(
        self,
        session: SessionId,
        layout: BlockLayout,
        recompute: RecomputeCost = UNKNOWN_COST,
        *,
        counts: bool = True,
    ) -> None:
        """Idempotent for further connections. Raises RemoteProtocolError for a layout that differs
        from the session's, or is none. `counts` false: its matches are no use of a block, and in no
        statistics."""
        numbers = [(part.group, part.shard) for part in layout.parts]
        if not 0 < len(numbers) <= MAX_PARTS or len(set(numbers)) != len(numbers):
            raise RemoteProtocolError(f"a layout of {len(numbers)} parts, or one declared twice")
        if min(part.num_bytes for part in layout.parts) <= 0 or layout.block_tokens <= 0:
            raise RemoteProtocolError("a layout with a part or a block of no size")
        stored = self._index.declare(layout_fingerprint(layout), layout, recompute)
        self._leases.open_session(session, stored, layout.block_tokens, counts=counts)

    def end_rights(self, session: SessionId) -> None:
        """The session's connections are gone: leases and reservations end, leased bytes drain."""
        self._leases.end_rights(session)

    def quiet(self, session: SessionId) -> None:
        """Proof that no process of the session touches its bytes: all exited, said Bye, or resumed."""
        self._leases.quiet(session)

    def open_request(self, session: SessionId, request_id: str, grant: RequestGrant) -> None:
        """Must come before the request's other calls. Idempotent; the last grant counts."""
        self._leases.open_request(session, request_id, grant)

    def release(self, session: SessionId, request_ids: Sequence[str]) -> None:
        """Nothing of these requests is read any more; they are forgotten. Idempotent."""
        self._leases.release(session, request_ids)

    # -- reading and writing -------------------------------------------------------------------------

    def match(
        self, session: SessionId, request_id: str, keys: bytes, *, counts: bool = True
    ) -> Matched:
        """The longest prefix of `keys`, a prompt's blocks from the first on, that may be read: leased.

        Asking again renews. A lapsed request gets nothing more until it is released. `counts` False: the
        request asks again, and what it found and missed is to be counted then.
        """
        return self._reader.match(session, request_id, keys, counts=counts)

    def when_stored(self, call: Callable[[], None]) -> None:
        """`call` it whenever blocks became READY."""
        self._residency.stored = call

    def peek(
        self, session: SessionId, request_id: str, keys: bytes, *, arriving: bool = True
    ) -> int:
        """How many blocks `match` would find, without leasing or counting anything. `arriving`: among them
        those that are still on their way from a peer."""
        return self._reader.peek(session, request_id, keys, arriving=arriving)

    async def load(
        self, session: SessionId, request_id: str, keys: bytes, group: int, shard: int
    ) -> Located:
        """Where the parts of leased blocks lie in the arena; those on SSD are brought there first,
        verified before anybody sees them. On cancellation: reads go on, nothing leaks."""
        return await self._reader.load(session, request_id, keys, group, shard)

    def confirm(
        self,
        session: SessionId,
        request_id: str,
        keys: bytes,
        generations: bytes,
        group: int,
        shard: int,
    ) -> Confirmed:
        """After the reader's copies ended: how many leading blocks it may use."""
        return self._reader.confirm(session, request_id, keys, generations, (group, shard))

    async def recheck(
        self, session: SessionId, request_id: str, keys: bytes, group: int, shard: int
    ) -> int:
        """A reader found these leased blocks corrupt: look for ourselves, and take out what is; how many
        parts were. What it read was only wrong on its way otherwise. On cancellation: as `scrub`."""
        rows = self._reader.leased(session, request_id, keys, (group, shard))
        return await self._scrubber.recheck(rows)

    def reserve(
        self,
        session: SessionId,
        request_id: str,
        parent: bytes,
        keys: bytes,
        group: int,
        shard: int,
    ) -> Reserved:
        """The right to store parts of consecutive blocks; charged now, invisible until committed.

        Once a block is refused, so are those after it: without their parent they are worthless.
        """
        return self._writer.reserve(session, request_id, parent, keys, (group, shard))

    async def commit(
        self,
        session: SessionId,
        reservation: int,
        indexes: bytes,
        window: memoryview,
        offsets: bytes,
    ) -> Committed:
        """Copy parts from the window into fresh slots and make them READY; the window is free then.

        Raises RemoteProtocolError for indexes or offsets out of bounds. On cancellation: CancelledError
        leaves when the window is no longer read, and nothing of this commit was stored.
        """
        return await self._writer.commit(session, reservation, indexes, window, offsets)

    async def receive(
        self, session: SessionId, reservation: int, fill: Fill, *, deadline_s: float
    ) -> tuple[bool, str]:
        """What is open of a reservation, all or none, filled by `fill` instead of copied from a window:
        (whether it is READY, why not). Until then, or until `deadline_s`, readers are promised it; after
        that the slots drain until `fill` has ended. On cancellation: as `fill` does, and nothing was stored.
        """
        return await self._writer.receive(session, reservation, fill, deadline_s=deadline_s)

    def arena_memory(self) -> memoryview:
        """The whole arena. Only what is leased may be read there, only its slots be written by a `fill`."""
        assert self._residency.arena is not None
        return self._residency.arena.view

    async def in_pool(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """In the threads that copy and checksum, side by side. On cancellation: all have ended."""
        return await self._pool.run_all(works)

    def abort(self, session: SessionId, reservation: int) -> None:
        """Give a reservation up, as far as it is not committed. Idempotent."""
        self._writer.abort(session, reservation)

    # -- administration ------------------------------------------------------------------------------

    def bytes_of(self, names: Collection[bytes]) -> int:
        """What is READY, in both tiers as charged, under these incarnations (16 B) or namespace tags (8 B).

        Read from accounts, whatever the number of blocks."""
        index = self._index
        return sum(
            int(index.host_bytes[number] + index.ssd_bytes[number]) for number in index.named(names)
        )

    def lineages(self) -> list[Lineage]:
        """Under what anything is stored here."""
        return list(self._index.known_lineages())

    def running(self, names: Collection[bytes]) -> dict[SessionId, int]:
        """How many requests of each session were opened with one of these and are not released yet."""
        found = {}
        for number, session in self._leases.sessions.items():
            count = sum(_uses(request.grant, names) for request in session.requests.values())
            if count:
                found[number] = count
        return found

    async def purge(self, names: Collection[bytes]) -> int:
        """Take every block that is made of these names (`is_made_of`) out of both
        tiers, for good, and zero its bytes in the arena; how many there were. Held ones drain, and are
        zeroed when nobody reads them any more.

        On cancellation: what was reached is gone.
        """
        return (await self._purger.purge(_made_of(names)))[0]

    async def purge_more(self, names: Collection[bytes]) -> bool:
        """As `purge`; whether somebody still reads, writes or brings something of it, or some slot that was
        purged is not zeroed yet. Then call it again."""
        _, num_busy = await self._purger.purge(_made_of(names))
        return num_busy > 0 or not self._purger.is_wiped

    async def destroy_sealed(self, names: Collection[bytes]) -> int:
        """After `purge_more` has nothing left: unlink the SSD files that ever held any of it, deleted or not;
        durable when this returns. Bytes of those files. Raises KVFabricError. On cancellation it goes on."""
        if self._ssd is None:
            return 0
        return await self._ssd.destroy(_made_of(names))

    def _drop(self, row: int, *, wipe: bool = False) -> None:
        """Out of both tiers. The row stays while somebody holds it or a child hangs on it."""
        if self._ssd is not None and self._index.ssd_parts.cell[row]:
            self._ssd.forget(row)
        self._residency.discard(row, wipe=wipe)

    def resident_runs(self, tier: TierName, limit: int) -> Iterator[list[Run]]:
        """The READY blocks of the host tier, for a snapshot, `limit` rows a step. Other tiers are not
        streamed: none."""
        return host_runs(self._index, limit) if tier is TierName.HOST else iter(())

    async def seal(self) -> None:
        """Wait until everything accepted for SSD is sealed; gives up what a failing tier would not
        take. On cancellation: writing goes on."""
        if self._ssd is not None:
            await self._ssd.drain()

    async def scrub(self, num_bytes: int) -> int:
        """Re-check about the next `num_bytes` of the arena, from where the last call ended; corrupt
        blocks are taken out. Returns how many parts were corrupt."""
        return await self._scrubber.scrub(num_bytes)

    async def scrub_all(self) -> ScrubReport:
        """Verify all of both tiers now, beside the rounds in the background; what is corrupt is out. On
        cancellation: what was found so far is out."""
        report = await self._scrubber.scrub_arena()
        if self._ssd is not None:
            async with self._ssd.scrubbing:
                report += await scrub_ssd(self._ssd, self.turns)
        return report

    # -- background ----------------------------------------------------------------------------------

    def _now(self) -> int:
        """Whole seconds since the start, from 1: what the index keeps as a block's time."""
        return int(self._clock() - self._started) + 1

    async def _touch_index(self) -> None:
        """While an SSD tier opens, which fills it: the kernel clears a page in the time of six rows."""
        await self._pool.run(self._index.touch)

    async def _touch(self, arena: Arena) -> None:
        """What the machine refuses is no part of the tier until it gives it."""
        breaker, offset = self._memory_breaker, 0
        while offset < arena.size_bytes:
            if not breaker.begin():
                await asyncio.sleep(_HOUSE_S)
                continue
            end = min(offset + _TOUCH_BYTES, arena.size_bytes)
            try:
                await self._pool.run(partial(arena.touch, offset, end - offset))
            except NoSpace as exc:
                arena.withhold(offset)
                breaker.fail(f"{exc}; it gave {offset} of {arena.size_bytes} bytes")
            else:
                arena.provide(end)
                breaker.succeed()
                offset = end
            finally:
                breaker.abandon()
            if self._host.capacity_bytes != (given := arena.size_bytes - arena.withheld_bytes):
                self._residency.resize(given)
                self._room_is_low.set()

    async def _keep_room(self) -> None:
        """Evict ahead of what is reserved next, a few blocks at a time; until cancelled."""
        while True:
            await self._room_is_low.wait()
            self._room_is_low.clear()
            more = True
            while more:
                await self.turns.wait()
                more = self._residency.evict_ahead()
                await asyncio.sleep(0)  # before it asks for another

    async def _keep_house(self) -> None:
        """End rights and pins on time, charge dead SSD bytes, wipe, scrub; until cancelled."""
        while True:
            await asyncio.sleep(_HOUSE_S)
            await self.settle_pins()
            more = True
            while more:
                await self.turns.wait()
                more = self._leases.sweep()
                await asyncio.sleep(0)
            if self._ssd is not None:
                self._ssd.refresh_charges()
                self._ssd.probe()
            await self._purger.wipe()
            if self._residency.arena is not None and self.limits.scrub_bytes_per_s:
                await self.scrub(int(self.limits.scrub_bytes_per_s * _HOUSE_S))
            if self._ssd is not None and self.limits.ssd_scrub_bytes_per_s:
                self._start_scrubbing_ssd(self._ssd)

    async def settle_pins(self) -> None:
        """Pin and unpin what is to be by now. On cancellation: the rest is done next time."""
        self._access.refresh()
        self._residency.pins.configure(self._pin_deadlines.live(self._clock()))
        if self._residency.pins.is_stale:
            for _ in self._residency.pins.settle():
                await self.turns.wait()

    def _start_scrubbing_ssd(self, ssd: SsdTraffic) -> None:
        """A task of its own: a slow disk must not keep house from being kept. One at a time."""
        if self._scrubbing_ssd is None or self._scrubbing_ssd.done():
            work = ssd.scrub_on(int(self.limits.ssd_scrub_bytes_per_s * _HOUSE_S))
            self._scrubbing_ssd = self._group.create_task(work, name="kvfabric-scrub-ssd")

    # -- handing over --------------------------------------------------------------------------------

    async def freeze(self) -> None:
        """Come to rest: reservations end, and nothing is read, written, evicted or zeroed any more when this
        returns. The caller sees to it that no verb is called until `thaw`. On cancellation: `thaw`."""
        self._leases.end_reservations()
        if self._ssd is not None:
            await self._ssd.settle()
        tasks = [*self._background, *([self._scrubbing_ssd] if self._scrubbing_ssd else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._background.clear()

    def thaw(self) -> None:
        """Go on after a `freeze`, finished or not."""
        for task in self._background:
            task.cancel()
        self._background = [self._group.create_task(work()) for work in self._works]

    def contents(self) -> Contents:
        """What a frozen store holds in the host tier, for a successor with the same arena."""
        return contents.describe(self._residency, self._leases, started=self._started)

    def restore(self, held: Contents) -> None:
        """Into an empty store with that arena, before anything else; the clock must be the same. Raises
        CapacityError and RemoteProtocolError, and is of no use then."""
        contents.restore(held, self._residency, self._leases)
        self._started = held.started
        if self._access.refresh() is not None:
            deque(self._residency.pins.settle(), maxlen=0)

    # -- statistics ----------------------------------------------------------------------------------

    def statistics(self) -> StoreStatistics:
        """What metrics and status show. Ends overdue rights first, a bounded number."""
        self._leases.sweep()
        residency, leases = self._residency, self._leases
        host, ssd = self._host, self._ssd_accounts
        counts = self._ssd.counts if self._ssd is not None else {}
        return StoreStatistics(
            capacity_bytes={TierName.HOST: host.capacity_bytes, TierName.SSD: ssd.capacity_bytes},
            used_bytes={TierName.HOST: host.used, TierName.SSD: ssd.used},
            num_blocks={
                TierName.HOST: residency.num_host_blocks,
                TierName.SSD: residency.num_ssd_blocks,
            },
            leased_bytes=sum(account.leased for account in host.accounts),
            draining_bytes=sum(account.draining for account in host.accounts),
            reserved_bytes=sum(account.reserved for account in host.accounts),
            num_sessions=len(leases.sessions),
            num_requests=sum(len(session.requests) for session in leases.sessions.values()),
            tenants=tuple(tenant_usage(residency)),
            hits=dict(self._reader.hits),
            misses=dict(self._residency.misses.counts),
            stored_blocks=self._writer.stored_blocks,
            stored_bytes=self._writer.stored_bytes,
            refusals=dict(+self._writer.refusals),
            evictions=residency.evictions,
            corrupt=self._scrubber.corrupt + counts.get("corrupt", 0),
            promotions=counts.get("promotions", 0),
            ssd_writes=counts.get("writes", 0),
            ssd_errors=counts.get("errors", 0),
            ssd_refused=counts.get("refused", 0),
            index_bytes_per_block=self._index.bytes_per_block,
        )

    def degraded(self, tier: TierName) -> dict[str, str]:
        """What of a tier is out of service or not yet known to be well again: why."""
        breakers: tuple[Breaker, ...] = ()
        if tier is TierName.HOST:
            breakers = (self._memory_breaker,)
        elif tier is TierName.SSD and self._ssd is not None:
            breakers = (self._ssd.read_breaker, self._ssd.write_breaker)
        return {breaker.name: breaker.reason for breaker in breakers if breaker.reason}

    def __repr__(self) -> str:
        return (
            f"<BlockStore {self._residency.num_host_blocks} blocks, {self._host.used} of "
            f"{self._host.capacity_bytes} bytes, {len(self._leases.sessions)} sessions>"
        )
