"""match, load, confirm: how bytes get from the store to a reader that may have them.

match    (sync)   longest prefix READY, the request's own and within budget; leased
load     (async)  where one part of each leased block lies, once those on SSD or on their way are there
confirm  (sync)   after the reader's copies: every right held, every slot is what was located
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from kvfabric.errors import RemoteProtocolError
from kvfabric.protocol.messages import MAX_KEYS, Confirmed, Located, Matched
from kvfabric.store.access import Access, Flags, cacheable
from kvfabric.store.arrivals import ARRIVING, Arrivals
from kvfabric.store.index import HOST, NO_ROW, RESERVED, SSD, USED, Rows, packed_keys
from kvfabric.store.lease import LeaseBook, Request, RequestGrant, Session
from kvfabric.store.residency import Residency
from kvfabric.store.ssd import SsdTraffic
from kvfabric.tiers.arena import PAGE_BYTES
from kvfabric.types import MissReason, SessionId, TierName

_HOST_TIER, _SSD_TIER, _PEER_TIER = 0, 1, 2
_TIERS = (TierName.HOST, TierName.SSD, TierName.PEER)


class Reader:
    """`ssd` is set when the tier has been indexed; `hits` counts blocks of matches."""

    def __init__(
        self,
        residency: Residency,
        leases: LeaseBook,
        access: Access,
        arrivals: Arrivals,
        *,
        lease_s: float,
    ) -> None:
        self.ssd: SsdTraffic | None = None
        self.hits: Counter[TierName] = Counter()
        self._misses = residency.misses
        self._residency = residency
        self._index = residency.index
        self._leases = leases
        self._access = access
        self._arrivals = arrivals
        self._lease_s = lease_s

    # -- match ---------------------------------------------------------------------------------------

    def match(self, session: SessionId, request_id: str, keys: bytes, *, counts: bool) -> Matched:
        words = packed_keys(keys)
        found = self._leases.find(session, request_id)
        if found is None:
            return self._missed(len(words), MissReason.NO_HANDLE, counts=counts)
        holder, request = found
        counts = counts and holder.counts
        reason = self._access.to_read(request)
        if reason is not MissReason.NONE:
            return self._missed(len(words), reason, counts=counts)
        rows = self._index.lookup(words[: min(MAX_KEYS, cacheable(request.grant, len(words)))])
        expected = self._access.lineages(holder, request.grant, 0, len(rows))
        num_blocks = leading(self._readable(rows, expected, holder, request.grant))
        if num_blocks < len(words):
            reason = self._why_not(words, rows, expected, num_blocks, holder)
        affordable = self._leases.affordable(rows[:num_blocks])
        if affordable < num_blocks:
            num_blocks, reason = affordable, MissReason.LEASE_BUDGET
        rows = rows[:num_blocks]
        tiers = self._tiers(rows, holder.layout.num_parts)
        if num_blocks:
            fresh = self._leases.lease(request, rows)
            if holder.counts:
                self._use(fresh)
                self._pin(request.grant, rows)
        if counts:
            self._count(tiers, len(words), reason)
        return Matched(
            num_blocks=num_blocks,
            tiers=tiers.tobytes(),
            lease_s=self._lease_s if num_blocks else 0.0,
            reason=reason.value,
        )

    def peek(self, session: SessionId, request_id: str, keys: bytes, *, arriving: bool) -> int:
        found = self._leases.find(session, request_id)
        if found is None or self._access.to_read(found[1]) is not MissReason.NONE:
            return 0
        holder, request = found
        words = packed_keys(keys)
        rows = self._index.lookup(words[: min(MAX_KEYS, cacheable(request.grant, len(words)))])
        expected = self._access.lineages(holder, request.grant, 0, len(rows))
        return leading(self._readable(rows, expected, holder, request.grant, arriving=arriving))

    def _missed(self, num_keys: int, reason: MissReason, *, counts: bool) -> Matched:
        if counts:
            self._misses.counts[reason] += num_keys
        return Matched(num_blocks=0, tiers=b"", lease_s=0.0, reason=reason.value)

    def _tiers(self, rows: Rows, num_parts: int) -> npt.NDArray[np.uint8]:
        index = self._index
        tiers = np.full(len(rows), _SSD_TIER, dtype=np.uint8)
        tiers[index.available_parts.array[rows] < num_parts] = _PEER_TIER
        tiers[index.host_parts.array[rows] == num_parts] = _HOST_TIER
        return tiers

    def _count(self, tiers: npt.NDArray[np.uint8], num_keys: int, reason: MissReason) -> None:
        for tier, number in enumerate(np.bincount(tiers, minlength=len(_TIERS)).tolist()):
            self.hits[_TIERS[tier]] += number
        if num_keys > len(tiers):
            self._misses.counts[reason] += num_keys - len(tiers)

    def _lost(self, request: Request, rows: Rows, reason: MissReason) -> None:
        """Blocks that a match found are not to be had after all: each counts once, whatever the number of
        its parts and of those that ask for them."""
        rows = rows[np.isin(rows, request.rows)]
        lost = np.setdiff1d(rows, request.lost)
        request.lost = np.union1d(request.lost, lost)
        self._misses.counts[reason] += len(lost)

    def _readable(
        self,
        rows: Rows,
        expected: Rows,
        session: Session,
        grant: RequestGrant,
        *,
        arriving: bool = True,
    ) -> Flags:
        """Which blocks are READY in a tier that works, or on their way (`arriving`), and stored under the
        expected lineage.

        The lineage is compared beside the key on purpose: a key alone must never decide whose bytes
        somebody gets.
        """
        index = self._index
        ssd_works = self.ssd is not None and not self.ssd.read_breaker.is_open
        counts = index.available_parts if ssd_works else index.host_parts
        num_parts = session.layout.num_parts
        readable: Flags = (rows != NO_ROW) & (counts.array[rows] == num_parts)
        if arriving and self._arrivals and not readable.all():
            readable |= (rows != NO_ROW) & self._arrivals.promised(rows, num_parts)
        readable &= index.lineage.array[rows] == expected
        readable &= ~self._access.expired(rows, grant)
        return readable

    def _why_not(
        self,
        words: npt.NDArray[np.uint64],
        rows: Rows,
        expected: Rows,
        position: int,
        session: Session,
    ) -> MissReason:
        """Why the block at `position` misses."""
        if position == MAX_KEYS:
            return MissReason.TOO_MANY
        if position >= len(rows):
            return MissReason.WITHDRAWN  # from here on the text of a withdrawn template
        index, row = self._index, int(rows[position])
        own = row != NO_ROW and index.lineage.cell[row] == expected[position]
        if own and index.available_parts.cell[row] == session.layout.num_parts:
            ssd_down = self.ssd is None or self.ssd.read_breaker.is_open
            only_there = index.host_parts.cell[row] < session.layout.num_parts
            return MissReason.TIER_DOWN if ssd_down and only_there else MissReason.EXPIRED
        if own and any(index.part_state.cell[part] & RESERVED for part in index.parts_of(row)):
            return MissReason.PENDING
        word = int(words[position, 0])
        if self._residency.policy.was_evicted(word):
            return MissReason.EVICTED
        return self._misses.why_absent(word)

    def _use(self, fresh: Rows) -> None:
        """A request leased these for the first time: their second use, if it is not a later one."""
        index = self._index
        self._residency.policy.hit(fresh)
        index.flags.array[fresh] |= USED
        if self.ssd is not None:
            unsealed = (index.host_parts.array[fresh] > 0) & (index.ssd_parts.array[fresh] == 0)
            self.ssd.offer(fresh[unsealed])

    def _pin(self, grant: RequestGrant, rows: Rows) -> None:
        """A prompt's leading blocks, as far as they lie in the texts of templates."""
        rows = rows[: grant.text_blocks]
        if len(rows):
            self._residency.pins.read(rows, grant.texts(np.arange(len(rows))))

    # -- load ----------------------------------------------------------------------------------------

    async def load(
        self, session: SessionId, request_id: str, keys: bytes, group: int, shard: int
    ) -> Located:
        words = packed_keys(keys)
        found = self._leases.find(session, request_id)
        if found is None:
            return _not_located(MissReason.NO_HANDLE)
        holder, request = found
        ordinal = ordinal_of(holder, group, shard)
        reason = self._access.to_read(request)
        if reason is not MissReason.NONE:
            self._lost(request, self._index.lookup(words[:MAX_KEYS]), reason)
            return _not_located(reason)
        rows = self._index.lookup(words[:MAX_KEYS])
        rows = rows[: leading(np.isin(rows, request.rows))]
        parts = self._index.parts(rows, ordinal)
        if not self._here(parts).all():
            if self._arrivals:
                await self._arrivals.wait(parts)
            if self.ssd is not None:
                await self.ssd.promote(rows, ordinal)
            reason = self._after_await(session, request_id, request)
            if reason is not MissReason.NONE:
                self._lost(request, rows, reason)
                return _not_located(reason)
        parts = self._index.parts(rows, ordinal)
        num_blocks = leading(self._here(parts))
        if num_blocks < len(words):
            reason = self._why_not_here(parts, num_blocks)
            self._lost(request, rows[num_blocks:], reason)
        return self._located(parts[:num_blocks], holder.layout.specs[ordinal].num_bytes, reason)

    def _after_await(self, session: SessionId, request_id: str, request: Request) -> MissReason:
        """Rights may have ended meanwhile, and with them the hold that keeps its rows what they are."""
        found = self._leases.find(session, request_id)
        if found is None or found[1] is not request:
            return MissReason.NO_HANDLE
        return self._access.to_read(request)

    def _here(self, parts: Rows) -> Flags:
        here: Flags = (self._index.part_state.array[parts] & HOST) != 0
        return here

    def _why_not_here(self, parts: Rows, position: int) -> MissReason:
        if position == MAX_KEYS:
            return MissReason.TOO_MANY
        if position >= len(parts):
            return MissReason.ABSENT  # never leased by this request
        state = self._index.part_state.cell[int(parts[position])]
        if state & ARRIVING == ARRIVING:
            return MissReason.TOO_SLOW  # the node that has it did not send it in time
        if not state & SSD:
            return MissReason.CORRUPT  # leased and gone: it did not verify, or was withdrawn
        if self.ssd is None or self.ssd.read_breaker.is_open:
            return MissReason.TIER_DOWN
        return MissReason.EVICTED  # no room for it in the arena

    def _located(self, parts: Rows, num_bytes: int, reason: MissReason) -> Located:
        index = self._index
        offsets = index.part_page.array[parts].astype(np.uint64) * np.uint64(PAGE_BYTES)
        return Located(
            num_blocks=len(parts),
            part_bytes=num_bytes,
            offsets=offsets.tobytes(),
            generations=index.part_generation.array[parts].tobytes(),
            checksums=index.part_checksum[parts].tobytes(),
            reason=reason.value,
        )

    # -- confirm -------------------------------------------------------------------------------------

    def confirm(
        self,
        session: SessionId,
        request_id: str,
        keys: bytes,
        generations: bytes,
        part: tuple[int, int],
    ) -> Confirmed:
        words = packed_keys(keys)
        if len(generations) != 4 * len(words):
            raise RemoteProtocolError("as many generations as keys are confirmed")
        found = self._leases.find(session, request_id)
        if found is None:
            return Confirmed(num_blocks=0, reason=MissReason.NO_HANDLE.value)
        holder, request = found
        reason = self._access.to_read(request)
        rows = self._index.lookup(words[:MAX_KEYS])
        if reason is not MissReason.NONE:
            self._lost(request, rows, reason)
            return Confirmed(num_blocks=0, reason=reason.value)
        parts = self._index.parts(rows, ordinal_of(holder, *part))
        good = np.isin(rows, request.rows) & self._here(parts)
        asked = np.frombuffer(generations, "<u4")[:MAX_KEYS]
        good &= self._index.part_generation.array[parts] == asked
        num_blocks = leading(good)
        if num_blocks < len(words):
            reason = MissReason.TOO_MANY if num_blocks == MAX_KEYS else MissReason.CORRUPT
            self._lost(request, rows[num_blocks:], reason)
        return Confirmed(num_blocks=num_blocks, reason=reason.value)

    # -- recheck -------------------------------------------------------------------------------------

    def leased(
        self, session: SessionId, request_id: str, keys: bytes, part: tuple[int, int]
    ) -> Rows:
        """The blocks among `keys` that this request leases; none for an unknown request."""
        found = self._leases.find(session, request_id)
        if found is None:
            return np.empty(0, dtype=np.uint32)
        holder, request = found
        ordinal_of(holder, *part)
        rows = self._index.lookup(packed_keys(keys)[:MAX_KEYS])
        held: Rows = np.unique(rows[np.isin(rows, request.rows)])
        return held


def leading(flags: Flags) -> int:
    """How many of the first are true."""
    return int(flags.argmin()) if len(flags) and not flags.all() else len(flags)


def ordinal_of(session: Session, group: int, shard: int) -> int:
    """Raises RemoteProtocolError for a part that the session's layout does not declare."""
    ordinal = session.layout.ordinal(group, shard)
    if ordinal is None:
        raise RemoteProtocolError(f"the layout has no part of group {group}, shard {shard}")
    return ordinal


def _not_located(reason: MissReason) -> Located:
    return Located(
        num_blocks=0,
        part_bytes=0,
        offsets=b"",
        generations=b"",
        checksums=b"",
        reason=reason.value,
    )
