"""reserve, commit, abort: how bytes get from a writer's window into the store.

reserve  (sync)   charged and held, no slot yet, invisible
commit   (async)  slots, copy and checksum in the pool; then READY if every right still holds
receive  (async)  likewise, but somebody else fills the slots, and readers may be promised what comes
abort    (sync)   what is neither committed nor being copied is given up
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvfabric.errors import RemoteProtocolError
from kvfabric.failpoints import failpoint
from kvfabric.hashing import ROOT_PARENT
from kvfabric.protocol.messages import MAX_RESERVED, Committed, Reserved
from kvfabric.store.access import Access, cacheable
from kvfabric.store.arrivals import Arrivals, Fill, Late
from kvfabric.store.copying import batch_bounds, copy_parts
from kvfabric.store.index import (
    HOST,
    LOADING,
    NO_ROW,
    RESERVED,
    SSD,
    Lineage,
    Rows,
    packed_keys,
)
from kvfabric.store.lease import LeaseBook, RequestGrant, Reservation, Session
from kvfabric.store.reading import ordinal_of
from kvfabric.store.residency import MAX_EVICTIONS, Residency
from kvfabric.store.turns import Turns
from kvfabric.tiers.arena import Slots, slot_bytes
from kvfabric.tiers.pool import IoPool
from kvfabric.types import KEY_BYTES, GrantState, MissReason, SessionId

NO_PARENT = "no_parent"
OVER_QUOTA = "over_quota"
NO_SPACE = "no_space"

_GRANTED, _EXISTS = int(GrantState.GRANTED), int(GrantState.EXISTS)
_PENDING, _REFUSED = int(GrantState.PENDING), int(GrantState.REFUSED)


class _Chain(NamedTuple):
    """Part `ordinal` of consecutive blocks after row `parent`, the first being block `first`."""

    ordinal: int
    parent: int
    first: int
    words: npt.NDArray[np.uint64]
    rows: Rows
    states: npt.NDArray[np.uint8]


class Writer:
    """`refusals` counts parts by reason; `drop` takes a block out of both tiers."""

    def __init__(
        self,
        residency: Residency,
        leases: LeaseBook,
        access: Access,
        *,
        pool: IoPool,
        turns: Turns,
        copy_threads: int,
    ) -> None:
        self.drop: Callable[[int], None] = residency.discard
        self.refusals: Counter[str] = Counter()
        self.stored_blocks = 0
        self.stored_bytes = 0
        self._residency = residency
        self._index = residency.index
        self._leases = leases
        self._access = access
        self.arrivals = Arrivals(residency.index)
        self._pool = pool
        self._turns = turns
        self._copy_threads = copy_threads

    # -- reserve -------------------------------------------------------------------------------------

    def reserve(
        self, session: SessionId, request_id: str, parent: bytes, keys: bytes, part: tuple[int, int]
    ) -> Reserved:
        words = packed_keys(keys)
        if len(words) > MAX_RESERVED:
            return self._reserve_first(session, request_id, parent, keys, part)
        if len(packed_keys(parent)) != 1 or len(set(words[:, 0].tolist())) != len(words):
            raise RemoteProtocolError("one parent and distinct keys are reserved")
        found = self._leases.find(session, request_id)
        if found is None:
            return self._refuse(len(words), MissReason.NO_HANDLE.value)
        holder, request = found
        ordinal = ordinal_of(holder, *part)
        reason = self._access.to_store(request.grant)
        if reason:
            return self._refuse(len(words), reason)
        self._leases.sweep()
        place = self._place(parent, holder, request.grant)
        if place is None:
            return self._refuse(len(words), NO_PARENT)
        above = np.array([row for row in place[:1] if row != NO_ROW], dtype=np.uint32)
        expired = self._expired(words, holder, request.grant, place[1])
        if len(expired):
            # What nobody may read any more gives way to what is computed now, and leaves its parent here.
            self._residency.hold(above)
            for row in expired.tolist():
                self.drop(row)
        states = np.full(len(words), _REFUSED, dtype=np.uint8)
        chain = _Chain(ordinal, *place, words, self._index.lookup(words), states)
        reserved = self._reserve(holder, request.grant, chain)
        if len(expired):
            self._residency.unhold(above)
        return reserved

    def _expired(
        self, words: npt.NDArray[np.uint64], session: Session, grant: RequestGrant, first: int
    ) -> Rows:
        """Those of the request's own blocks that are too old for it, a bounded number."""
        rows = self._index.lookup(words)
        expired = self._access.expired(rows, grant, first) & (rows != NO_ROW)
        if expired.any():
            own = self._access.lineages(session, grant, first, len(rows))
            expired &= self._index.lineage.array[rows] == own
        found: Rows = rows[expired][:MAX_EVICTIONS]
        return found

    def _reserve_first(
        self, session: SessionId, request_id: str, parent: bytes, keys: bytes, part: tuple[int, int]
    ) -> Reserved:
        """Reserve as many as one message may; the rest is refused."""
        first = self.reserve(session, request_id, parent, keys[: MAX_RESERVED * KEY_BYTES], part)
        rest = self._refuse(len(keys) // KEY_BYTES - MAX_RESERVED, MissReason.TOO_MANY.value)
        cut = first.reason in ("", MissReason.NONE.value)
        return Reserved(
            reservation=first.reservation,
            states=first.states + rest.states,
            ttl_s=first.ttl_s,
            reason=rest.reason if cut else first.reason,
        )

    def _refuse(self, num_keys: int, reason: str) -> Reserved:
        self.refusals[reason] += num_keys
        return Reserved(
            reservation=0, states=bytes([_REFUSED]) * num_keys, ttl_s=0.0, reason=reason
        )

    def _place(
        self, parent: bytes, session: Session, grant: RequestGrant
    ) -> tuple[int, int] | None:
        """(row of the parent, block index of its child); None if the parent is not the request's own
        or not known: then nobody could read the child."""
        if parent == ROOT_PARENT:
            return NO_ROW, 0
        row = int(self._index.lookup(packed_keys(parent))[0])
        if row == NO_ROW:
            return None
        position = self._index.block_index.cell[row]
        lineage = self._index.lineage.cell[row]
        if lineage and lineage != self._access.lineages(session, grant, position, 1)[0]:
            return None
        return row, position + 1

    def _reserve(self, session: Session, grant: RequestGrant, chain: _Chain) -> Reserved:
        residency, states, num_keys = self._residency, chain.states, len(chain.words)
        part_bytes = session.layout.specs[chain.ordinal].num_bytes
        reservation = self._leases.add_reservation(
            session, grant, part_bytes, slot_bytes(part_bytes)
        )
        reservation.rows = np.zeros(num_keys, dtype=np.uint32)
        reservation.parts = np.zeros(num_keys, dtype=np.uint32)
        # Making room must not evict what this chain hangs on.
        kept = np.unique(np.append(chain.rows, np.uint32(chain.parent)))
        kept = kept[kept != NO_ROW]
        residency.hold(kept)
        reason = self._reserve_spans(session, chain, reservation)
        residency.unhold(kept)
        failpoint("store.reserved")
        reservation.open = states == _GRANTED
        granted = bool(reservation.open.any())
        if not granted:
            self._leases.end_reservation(reservation)
        refused = np.flatnonzero(states == _REFUSED)
        self.refusals[reason] += len(refused)
        if reason == OVER_QUOTA:
            self._residency.misses.refused(int(chain.words[refused[0], 0]), MissReason.OVER_QUOTA)
        return Reserved(
            reservation=reservation.number if granted else 0,
            states=states.tobytes(),
            ttl_s=self._leases.reservation_s if granted else 0.0,
            reason=reason,
        )

    def _reserve_spans(self, session: Session, chain: _Chain, reservation: Reservation) -> str:
        """Blocks of one lineage at a time, until one is refused: after it the rest is of no use."""
        grant, states, start = reservation.grant, chain.states, 0
        allowed = cacheable(grant, chain.first + len(states)) - chain.first
        if allowed <= 0:
            return MissReason.WITHDRAWN.value
        for length, lineage in grant.lineages(session.layout.fingerprint, chain.first, allowed):
            span = slice(start, start + length)
            states[span] = self._states(lineage, chain.ordinal, chain.rows[span])
            reason = self._take(session, chain, span, lineage, reservation)
            if reason:
                return reason
            start += length
        return MissReason.WITHDRAWN.value if allowed < len(states) else MissReason.NONE.value

    def _states(self, lineage: Lineage, ordinal: int, rows: Rows) -> npt.NDArray[np.uint8]:
        """What reserving each would find; from the first foreign block on, REFUSED."""
        index = self._index
        part_states = index.part_state.array[index.parts(rows, ordinal)]
        states = np.full(len(rows), _GRANTED, dtype=np.uint8)
        states[part_states & (RESERVED | LOADING) != 0] = _PENDING
        states[part_states & (HOST | SSD) != 0] = _EXISTS
        lineages = index.lineage.array[rows]
        foreign = np.flatnonzero((lineages != 0) & (lineages != index.find_lineage(lineage)))
        if len(foreign):
            states[foreign[0] :] = _REFUSED
        return states

    def _take(
        self,
        session: Session,
        chain: _Chain,
        span: slice,
        lineage: Lineage,
        reservation: Reservation,
    ) -> str:
        """Make rows for the GRANTED of a span and begin their parts; what does not fit is REFUSED.

        Returns why it stopped before the end of the span, if it did.
        """
        own = chain.states[span]
        reason = NO_PARENT if (own == _REFUSED).any() else ""
        wanted = np.flatnonzero(own == _GRANTED)
        tenant = self._residency.tenant_slot(lineage.tenant)
        count = self._room(session, tenant, chain.rows[span][wanted], reservation.slot_bytes)
        if count < len(wanted):
            own[wanted[count] :][own[wanted[count] :] != _EXISTS] = _REFUSED
            reason, wanted = OVER_QUOTA, wanted[:count]
        if len(wanted):
            positions = wanted + span.start
            rows = self._rows_for(chain, positions, lineage, tenant)
            self._index.texts.array[rows] |= reservation.grant.texts(positions + chain.first)
            self._index.ensure_parts(rows, session.layout.num_parts)
            parts = self._index.parts(rows, chain.ordinal)
            self._residency.begin(rows, parts, reservation.slot_bytes, RESERVED)
            reservation.rows[positions] = rows
            reservation.parts[positions] = parts
        return reason

    def _room(self, session: Session, tenant: int, rows: Rows, num_bytes: int) -> int:
        """How many of the parts wanted at `rows` fit bytes and index."""
        index, num_parts = self._index, session.layout.num_parts
        count = self._residency.make_room(tenant, num_bytes, len(rows)) if len(rows) else 0
        needed = int(np.count_nonzero(index.first_part.array[rows[:count]] == 0)) * num_parts
        if needed <= min(index.free_rows, index.free_parts):
            return count
        self._residency.free_rows(tenant, needed)
        return min(count, min(index.free_rows, index.free_parts) // num_parts)

    def _rows_for(
        self, chain: _Chain, positions: npt.NDArray[np.intp], lineage: Lineage, tenant: int
    ) -> Rows:
        """The rows of the blocks at `positions`; absent ones are made, stubs get their place."""
        index, rows = self._index, chain.rows
        absent = positions[rows[positions] == NO_ROW]
        rows[absent] = index.insert(chain.words[absent])
        placeless = positions[index.lineage.array[rows[positions]] == 0]
        if len(placeless):
            number = index.intern_lineage(lineage, tenant)
            above = np.where(placeless > 0, rows[placeless - 1], np.uint32(chain.parent))
            index.adopt(
                rows[placeless],
                above,
                np.full(len(placeless), number, dtype=np.uint32),
                (placeless + chain.first).astype(np.uint32),
            )
        return rows[positions]

    def abort(self, session: SessionId, reservation: int) -> None:
        found = self._leases.find_reservation(session, reservation)
        if found is not None:
            self._leases.end_reservation(found)

    # -- commit --------------------------------------------------------------------------------------

    async def commit(
        self,
        session: SessionId,
        reservation: int,
        indexes: bytes,
        window: memoryview,
        offsets: bytes,
    ) -> Committed:
        if len(indexes) % 4 or len(offsets) != 2 * len(indexes):
            raise RemoteProtocolError("a commit has an offset for each index")
        positions = np.frombuffer(indexes, dtype="<u4").astype(np.int64)
        starts = np.frombuffer(offsets, dtype="<u8")
        states = np.zeros(len(positions), dtype=np.uint8)
        found = self._leases.find_reservation(session, reservation)
        if found is None:
            return Committed(states=states.tobytes(), reason=MissReason.DEADLINE.value)
        _check_commit(found, positions, starts, window)
        reason = self._access.to_store(found.grant)
        if reason:
            self._leases.end_reservation(found)
            return Committed(states=states.tobytes(), reason=reason)
        takes = np.flatnonzero(found.open[positions])
        if len(takes):
            copied = partial(self._copy, window, starts[takes].tolist(), found.part_bytes)
            stored, reason = await self._store(found, positions[takes], copied)
            states[takes] = stored
        return Committed(states=states.tobytes(), reason=reason or MissReason.NONE.value)

    async def receive(
        self, session: SessionId, reservation: int, fill: Fill, *, deadline_s: float
    ) -> tuple[bool, str]:
        """All that is open of a reservation, or none; see `BlockStore.receive`."""
        found = self._leases.find_reservation(session, reservation)
        if found is None or not found.open.any():
            return False, MissReason.DEADLINE.value
        positions = np.flatnonzero(found.open)
        parts = found.parts[positions]
        late = Late(self._residency, found.rows[positions], found.slot_bytes)

        def is_late() -> None:
            late.drain()
            self.arrivals.end(parts)

        async def filled(slots: Slots) -> bytes:
            timer = asyncio.get_running_loop().call_later(deadline_s, is_late)
            try:
                return await fill(slots)
            finally:
                timer.cancel()
                late.settle()

        self.arrivals.expect(parts)
        try:
            return await self._store(found, positions, filled)
        finally:
            self.arrivals.end(parts)

    async def _store(
        self, reservation: Reservation, positions: npt.NDArray[np.int64], fill: Fill
    ) -> tuple[bool, str]:
        """All of `positions` or none; they are open, and settled when this ends, however it ends."""
        residency, size = self._residency, reservation.slot_bytes
        rows, parts = reservation.rows[positions], reservation.parts[positions]
        reservation.open[positions] = False
        tenant = int(self._index.tenants_of(rows[:1])[0])
        slots = residency.allocate(tenant, len(rows), size)
        if slots is None:
            residency.cancel(rows, parts, size)
            self.refusals[NO_SPACE] += len(rows)
            return False, NO_SPACE
        reservation.copying += 1
        try:
            sums = await fill(slots)
            failpoint("store.commit.copied")
            await self._turns.wait()
        except BaseException:
            residency.give_back(slots, size)
            residency.cancel(rows, parts, size)
            raise
        finally:
            reservation.copying -= 1
        reason = MissReason.DEADLINE.value if reservation.ended else ""
        reason = reason or self._access.to_store(reservation.grant)
        if reason:
            residency.give_back(slots, size)
            residency.cancel(rows, parts, size)
            self.refusals[reason] += len(rows)
        else:
            self.stored_blocks += residency.publish(rows, parts, size, slots, sums)
            self.stored_bytes += len(rows) * reservation.part_bytes
            failpoint("store.commit.published")
        if not reservation.copying and not reservation.open.any():
            self._leases.end_reservation(reservation)
        return not reason, reason

    async def _copy(
        self, window: memoryview, starts: list[int], num_bytes: int, slots: Slots
    ) -> bytes:
        assert self._residency.arena is not None
        arena, pages = self._residency.arena.view, slots.first_pages.tolist()
        bounds = batch_bounds(len(starts), num_bytes, self._copy_threads)
        works = [
            partial(copy_parts, window, arena, starts[begin:end], pages[begin:end], num_bytes)
            for begin, end in pairwise(bounds)
        ]
        return b"".join(await self._pool.run_all(works))


def _check_commit(
    reservation: Reservation,
    positions: npt.NDArray[np.int64],
    starts: npt.NDArray[np.uint64],
    window: memoryview,
) -> None:
    if len(np.unique(positions)) != len(positions):
        raise RemoteProtocolError("a commit names an index twice")
    if len(positions) and int(positions.max()) >= len(reservation.rows):
        raise RemoteProtocolError("a commit names an index that was not reserved")
    room = len(window) - reservation.part_bytes
    if len(starts) and (room < 0 or int(starts.max()) > room):
        raise RemoteProtocolError("a committed part lies outside the window")
