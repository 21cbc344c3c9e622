"""Sessions and their rights: requests with leased blocks, reservations, deadlines. Pure and sync.

Time never frees memory. A lease is a right with a deadline over blocks that are held without one:

    LIVE --deadline, end of the session's rights--> LAPSED --release, proof of quiet--> gone
      +------------------------release, proof of quiet----------------------------------> gone

A lapsed lease can neither be renewed nor confirmed, and its blocks stay where they are, unevictable,
counted as draining, until the client says that it reads nothing any more or cannot read any more (all
its processes exited, or a resumed session states it). Other readers may use such a block meanwhile: its
bytes do not change.

A reservation is the writer's half. Its slots are written by the daemon alone, so its end needs no proof;
parts whose copy is under way are settled by the commit that runs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvfabric.errors import Overloaded, RemoteProtocolError
from kvfabric.store.index import MAX_TEXTS, Lineage, Rows, StoredLayout
from kvfabric.store.quota import distinct_values
from kvfabric.store.residency import Residency
from kvfabric.types import PUBLIC_TENANT, Segment, SessionId, TenantId

MAX_REQUESTS = 65_536
"""Of one session that were neither released nor ended."""

SWEEP_RIGHTS = 64
"""Looked at by one sweep; ending the right to 256 blocks takes about 30 us."""

_NO_ROWS: Rows = np.empty(0, dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class RequestGrant:
    """What an opened handle allows its request.

    `cacheable_blocks` -1: no limit, else only so many leading blocks may be read or stored;
    `public_blocks`: so many leading blocks are the public namespace's, named by `public_tag`.
    """

    tenant: TenantId
    namespace_tag: bytes
    public_tag: bytes
    public_blocks: int
    cacheable_blocks: int
    block_tokens: int
    segments: tuple[Segment, ...]
    epochs: tuple[tuple[str, int], ...]
    no_store: bool
    no_read: bool

    @property
    def text_blocks(self) -> int:
        """From this block on none lies in a template's text."""
        ends = (segment.first_token + segment.num_tokens for segment in self.segments)
        return max(ends, default=0) // self.block_tokens

    def texts(self, blocks: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        """Of each of these blocks of the prompt, by number, in whose text it is: it begins with the text or
        later and ends within. Bit i stands for incarnation i of the block's lineage."""
        bits = np.zeros(len(blocks), dtype=np.uint8)
        for place, segment in enumerate(self._in_order()[:MAX_TEXTS]):
            end = (segment.first_token + segment.num_tokens) // self.block_tokens
            within = (blocks >= segment.first_token // self.block_tokens) & (blocks < end)
            bits[within] |= 1 << place
        return bits

    def _in_order(self) -> list[Segment]:
        return sorted(self.segments, key=lambda segment: segment.first_token)

    def lineages(
        self, layout_fingerprint: bytes, first: int, count: int
    ) -> Iterator[tuple[int, Lineage]]:
        """(number of blocks, lineage) in order for the `count` blocks from block `first` on."""
        ordered = self._in_order()
        starts = [segment.first_token // self.block_tokens for segment in ordered]
        end = first + count
        bounds = sorted(
            {first, end, *(b for b in (self.public_blocks, *starts) if first < b < end)}
        )
        for block, following in pairwise(bounds):
            public = block < self.public_blocks
            yield (
                following - block,
                Lineage(
                    PUBLIC_TENANT if public else self.tenant,
                    self.public_tag if public else self.namespace_tag,
                    layout_fingerprint,
                    tuple(
                        segment.incarnation
                        for segment, start in zip(ordered, starts, strict=True)
                        if start <= block
                    ),
                ),
            )


@dataclass(slots=True)
class Request:
    """`rows`: blocks held for it, ascending and distinct; `lost`: those of them that could not be had.
    `deadline`: of the right, in clock seconds. `due`: whether the sweep will come by."""

    grant: RequestGrant
    rows: Rows = field(default_factory=lambda: _NO_ROWS)
    lost: Rows = field(default_factory=lambda: _NO_ROWS)
    deadline: float = 0.0
    lapsed: bool = False
    due: bool = False


@dataclass(slots=True)
class Reservation:
    """Parts of one ordinal that a writer may commit. `open`: granted and neither committed nor given up.

    Vectors are as long as Reserve.keys; `rows` and `parts` are 0 where nothing was granted. `copying`
    counts commits under way; once `ended`, they store nothing.
    """

    number: int
    session: SessionId
    grant: RequestGrant
    part_bytes: int
    slot_bytes: int
    rows: Rows
    parts: Rows
    open: npt.NDArray[np.bool_]
    deadline: float
    copying: int = 0
    ended: bool = False


@dataclass(slots=True)
class Session:
    """`active` false: its rights ended; only holds remain until proof of quiet. `counts` false: what it
    finds or misses is no use of a block, and in no statistics."""

    number: SessionId
    layout: StoredLayout
    block_tokens: int
    active: bool = True
    counts: bool = True
    requests: dict[str, Request] = field(default_factory=dict)
    reservations: dict[int, Reservation] = field(default_factory=dict)


class LeaseBook:
    """All sessions of the node. `lease_share`: of the host tier a tenant may hold above its floor."""

    def __init__(
        self,
        residency: Residency,
        *,
        clock: Callable[[], float],
        lease_s: float,
        reservation_s: float,
        lease_share: float,
    ) -> None:
        self.sessions: dict[SessionId, Session] = {}
        self.num_reservations = 0
        self._residency = residency
        self._index = residency.index
        self._clock = clock
        self._lease_s = lease_s
        self.reservation_s = reservation_s
        self._lease_share = lease_share
        self._rights = residency.index.column(np.uint32)
        self._lapsed = residency.index.column(np.uint32)
        residency.pins.is_held = lambda rows: (
            (self._rights.array[rows] > 0) | (self._lapsed.array[rows] > 0)
        )
        # (deadline as it was when queued, number, whose). A lease that was renewed is queued anew when
        # its turn comes, so renewing costs nothing; one that ended meanwhile is passed over.
        self._due: list[tuple[float, int, Request | Reservation]] = []
        self._num_due = 0

    # -- sessions ------------------------------------------------------------------------------------

    def open_session(
        self, number: SessionId, layout: StoredLayout, block_tokens: int, *, counts: bool = True
    ) -> None:
        """Idempotent; raises RemoteProtocolError if the session declared another layout before."""
        session = self.sessions.setdefault(
            number, Session(number, layout, block_tokens, counts=counts)
        )
        if session.layout is not layout:
            raise RemoteProtocolError("a session has one layout in all its processes")
        session.active = True

    def end_rights(self, number: SessionId) -> None:
        """The session's connections are gone: what it may do ends, what it may touch stays."""
        session = self.sessions.get(number)
        if session is None:
            return
        session.active = False
        for request in session.requests.values():
            self._lapse(request)
        for reservation in list(session.reservations.values()):
            self.end_reservation(reservation)
        self._forget_if_gone(session)

    def quiet(self, number: SessionId) -> None:
        """Proof that no process of the session touches anything of its requests any more."""
        session = self.sessions.get(number)
        if session is None:
            return
        self.release(number, list(session.requests))
        for reservation in list(session.reservations.values()):
            self.end_reservation(reservation)
        self._forget_if_gone(session)

    def _forget_if_gone(self, session: Session) -> None:
        if not session.active and not session.requests and not session.reservations:
            self.sessions.pop(session.number, None)

    # -- requests and leases -------------------------------------------------------------------------

    def open_request(self, number: SessionId, request_id: str, grant: RequestGrant) -> None:
        """Opened again, a request has the new grant and keeps its leases, lapsed ones as lapsed.

        Ignored once the session's rights ended: what it asks then misses. Raises Overloaded if the
        session has released none of very many.
        """
        session = self.sessions.get(number)
        if session is None or not session.active:
            return
        known = session.requests.get(request_id)
        if known is not None:
            known.grant = grant
            return
        if len(session.requests) >= MAX_REQUESTS:
            raise Overloaded(f"the session holds {MAX_REQUESTS} requests that it did not release")
        session.requests[request_id] = Request(grant)

    def restore_request(
        self, session: Session, request_id: str, grant: RequestGrant, rows: Rows
    ) -> None:
        """A request of an earlier daemon: its right to `rows` (ascending) has ended, its hold has not."""
        request = session.requests[request_id] = Request(grant)
        if len(rows):
            self._residency.hold(rows)
            first = rows[(self._rights.array[rows] == 0) & (self._lapsed.array[rows] == 0)]
            self._lapsed.array[rows] += 1
            self._count("lapsed", first, +1)
            self._residency.pins.held(first)
            request.rows, request.lapsed = rows, True

    def end_reservations(self) -> None:
        """Of all sessions, as far as they are not being copied."""
        for session in list(self.sessions.values()):
            for reservation in list(session.reservations.values()):
                self.end_reservation(reservation)

    def find(self, number: SessionId, request_id: str) -> tuple[Session, Request] | None:
        """None if the session's rights ended or the request was never opened."""
        session = self.sessions.get(number)
        if session is None or not session.active:
            return None
        request = session.requests.get(request_id)
        return None if request is None else (session, request)

    def is_lapsed(self, request: Request) -> bool:
        """Whether it once had a right that has ended; from then on only a release helps."""
        if not request.lapsed and len(request.rows) and request.deadline <= self._clock():
            self._lapse(request)
        return request.lapsed

    def affordable(self, rows: Rows) -> int:
        """How many leading blocks the budgets of leased bytes allow."""
        host, share = self._residency.host, self._lease_share
        most: dict[int, int] = {}
        for tenant, num_bytes in self._totals(rows):
            most[tenant] = most.get(tenant, 0) + num_bytes
        rooms = {tenant: host.room_to_lease(tenant, share) for tenant in most}
        if all(most[tenant] <= room for tenant, room in rooms.items()):
            return len(rows)  # even if none of them is under a lease already
        fresh = (self._rights.array[rows] == 0) & (self._lapsed.array[rows] == 0)
        costs = self._index.block_bytes_of(rows) * fresh
        tenants = self._index.tenants_of(rows)
        allowed = len(rows)
        for tenant, room in rooms.items():
            spent = np.cumsum(costs * (tenants == tenant))
            allowed = min(allowed, int(np.searchsorted(spent, room, side="right")))
        return allowed

    def _totals(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """(tenant slot, bytes of its whole blocks) for each lineage among `rows`: mostly one."""
        lineages = self._index.lineage.array[rows]
        numbers = distinct_values(lineages)
        for number in numbers:
            count = len(rows) if len(numbers) == 1 else int(np.count_nonzero(lineages == number))
            yield (
                self._index.lineage_tenant.cell[number],
                count * self._index.lineage_bytes.cell[number],
            )

    def lease(self, request: Request, rows: Rows) -> Rows:
        """Hold `rows` for the request, renew all it has; returns those it did not have before."""
        fresh = _sorted_distinct(rows)
        if len(request.rows):
            at = np.minimum(np.searchsorted(request.rows, fresh), len(request.rows) - 1)
            fresh = fresh[request.rows[at] != fresh]
        if len(fresh):
            self._residency.hold(fresh)
            self._gain(fresh)
            request.rows = np.sort(np.concatenate([request.rows, fresh]))
        request.deadline = self._clock() + self._lease_s
        if not request.due:
            request.due = True
            self._queue(request)
        return fresh

    def _queue(self, right: Request | Reservation) -> None:
        self._num_due += 1  # rights themselves have no order
        heapq.heappush(self._due, (right.deadline, self._num_due, right))

    def release(self, number: SessionId, request_ids: Iterable[str]) -> None:
        """The session reads nothing of these requests any more. Unknown ones are ignored."""
        session = self.sessions.get(number)
        if session is None:
            return
        for request_id in request_ids:
            request = session.requests.pop(request_id, None)
            if request is not None and len(request.rows):
                (self._drop_lapsed if request.lapsed else self._drop_right)(request.rows)
                self._residency.unhold(request.rows)
                request.rows = _NO_ROWS
        self._forget_if_gone(session)

    def sweep(self) -> bool:
        """End rights whose deadline has passed, a bounded number; True if there may be more. A right
        that is late to be swept is no right: whoever asks for it looks at the clock."""
        now = self._clock()
        for _ in range(SWEEP_RIGHTS):
            if not self._due or self._due[0][0] > now:
                return False
            right = heapq.heappop(self._due)[2]
            if isinstance(right, Reservation):
                if not right.ended:
                    self.end_reservation(right)
            elif len(right.rows) and not right.lapsed and right.deadline > now:
                self._queue(right)
            else:
                right.due = False
                self._lapse(right)
        return True

    # -- bytes under rights: each physical byte once -------------------------------------------------

    def _gain(self, rows: Rows) -> None:
        first = rows[self._rights.array[rows] == 0]
        self._rights.array[rows] += 1
        self._count("leased", first, +1)
        had_lapsed = self._lapsed.array[first] > 0
        self._count("lapsed", first[had_lapsed], -1)
        self._residency.pins.held(first[~had_lapsed])

    def _lapse(self, request: Request) -> None:
        if request.lapsed or not len(request.rows):
            return
        request.lapsed = True
        rows = request.rows
        self._rights.array[rows] -= 1
        self._lapsed.array[rows] += 1
        last = rows[self._rights.array[rows] == 0]
        self._count("leased", last, -1)
        self._count("lapsed", last, +1)

    def _drop_right(self, rows: Rows) -> None:
        self._rights.array[rows] -= 1
        last = rows[self._rights.array[rows] == 0]
        self._count("leased", last, -1)
        has_lapsed = self._lapsed.array[last] > 0
        self._count("lapsed", last[has_lapsed], +1)
        self._residency.pins.let_go(last[~has_lapsed])

    def _drop_lapsed(self, rows: Rows) -> None:
        self._lapsed.array[rows] -= 1
        idle = (self._rights.array[rows] == 0) & (self._lapsed.array[rows] == 0)
        self._count("lapsed", rows[idle], -1)
        self._residency.pins.let_go(rows[idle])

    def _count(self, what: Literal["leased", "lapsed"], rows: Rows, sign: int) -> None:
        for tenant, num_bytes in self._totals(rows):
            self._residency.host.add_one(what, tenant, sign * num_bytes)

    # -- reservations --------------------------------------------------------------------------------

    def add_reservation(
        self, session: Session, grant: RequestGrant, part_bytes: int, slot_bytes: int
    ) -> Reservation:
        """An empty reservation; `reserve` fills in rows and parts that `Residency.begin` began."""
        self.num_reservations += 1
        reservation = Reservation(
            number=self.num_reservations,
            session=session.number,
            grant=grant,
            part_bytes=part_bytes,
            slot_bytes=slot_bytes,
            rows=_NO_ROWS,
            parts=_NO_ROWS,
            open=np.empty(0, dtype=np.bool_),
            deadline=self._clock() + self.reservation_s,
        )
        session.reservations[reservation.number] = reservation
        self._queue(reservation)
        return reservation

    def find_reservation(self, number: SessionId, reservation: int) -> Reservation | None:
        """None if it ended or its deadline has passed (which ends it)."""
        session = self.sessions.get(number)
        found = None if session is None else session.reservations.get(reservation)
        if found is not None and found.deadline <= self._clock():
            self.end_reservation(found)
            return None
        return found

    def end_reservation(self, reservation: Reservation) -> None:
        """Give up what of it is neither committed nor being copied now."""
        reservation.ended = True
        left = reservation.open
        rows, parts = reservation.rows[left], reservation.parts[left]
        reservation.open = np.zeros_like(left)
        if len(rows):
            self._residency.cancel(rows, parts, reservation.slot_bytes)
        session = self.sessions.get(reservation.session)
        if session is not None:
            session.reservations.pop(reservation.number, None)
            self._forget_if_gone(session)


def _sorted_distinct(rows: Rows) -> Rows:
    """As np.unique, which is several times slower on vectors this short."""
    ordered = np.sort(rows)
    repeated = ordered[1:] == ordered[:-1]
    return ordered[np.append(True, ~repeated)] if repeated.any() else ordered
