"""Segments come and go: the next one to fill, the spare, which one is given up, and what of it is kept.

Space is given back by whole segments, the oldest first; what the owner calls hot is written anew before, up
to half a segment. What is destroyed goes with all that shares its file, which is written anew as far as there
is room. Works on the event loop of the tier, whose sealer is the only one that calls it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvfabric.errors import CorruptBlock, KVFabricError, NoSpace, TransferError
from kvfabric.failpoints import failpoint
from kvfabric.tiers.base import Flags, Lineage, Move, PartIdentity, RecordBatch, TierOwner
from kvfabric.tiers.pool import IoPool, finished
from kvfabric.tiers.records import record_bytes
from kvfabric.tiers.segment_accounts import Segment
from kvfabric.tiers.segment_directory import SegmentDirectory
from kvfabric.tiers.segment_groups import Plan
from kvfabric.tiers.segment_rescue import (
    RESCUED_SHARE,
    Found,
    read_slice,
    sizes_of,
    slices_of,
    to_rescue,
)
from kvfabric.tiers.write_budget import WriteBudget

_LOG = logging.getLogger(__name__)

_DROPPED = 256
"""Parts of a reclaimed segment told of at once; a segment of small parts has very many."""


@dataclass(frozen=True, slots=True, eq=False)
class Destruction:
    """Of what `Tier.destroy` was asked for, and when; `done` gets the bytes that were given up."""

    is_struck: Callable[[Lineage], bool]
    asked_at: float
    done: asyncio.Future[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What of the tier a reclaim uses. `move`: make a plan durable, and account for it; `refuse`: what waits
    to be written, since there is no place for it; `verify`: a payload that was read; `owner`: who is told,
    if there is one by now."""

    pool: IoPool
    tasks: asyncio.TaskGroup
    budget: WriteBudget
    counts: Counter[str]
    move: Callable[[Plan], Awaitable[None]]
    refuse: Callable[[KVFabricError], None]
    verify: Callable[[memoryview, PartIdentity], None]
    owner: Callable[[], TierOwner | None]


class Reclaimer:
    """Methods raise KVFabricError if the disk or the index fails; nothing that was sealed is lost by that."""

    def __init__(self, directory: SegmentDirectory, means: Means) -> None:
        self._directory = directory
        self._pool = means.pool
        self._tasks = means.tasks
        self._budget = means.budget
        self._counts = means.counts
        self._move = means.move
        self._refuse = means.refuse
        self._verify = means.verify
        self._owner = means.owner
        self._making: asyncio.Task[None] | None = None

    async def advance(self) -> None:
        """The active segment is full: the spare takes its place. No segment: the writes fail."""
        directory = self._directory
        directory.active = None
        if self._making is not None:
            await finished(self._making)
        if directory.spare is None:
            try:
                directory.spare = await self._make_segment()
            except KVFabricError as exc:
                _LOG.warning("no segment in %s: %s", directory.path, exc)
                self._refuse(exc)
                return
        directory.active, directory.spare = directory.spare, None

    async def keep_spare(self) -> None:
        directory = self._directory
        if directory.spare is not None or directory.active is None:
            return
        if self._making is not None and not self._making.done():
            return
        if directory.has_room:
            # Nothing is reclaimed for it, so groups go on meanwhile.
            self._making = self._tasks.create_task(self._make_spare(), name="ssd spare")
        else:
            try:
                directory.spare = await self._make_segment()
            except KVFabricError as exc:
                # Not needed yet: whoever needs it tries again, and gets the error.
                _LOG.warning("no spare segment in %s: %s", directory.path, exc)

    async def _make_spare(self) -> None:
        directory = self._directory
        try:
            await self._pool.run(directory.clear)
            if directory.has_room:
                directory.spare = await self._add_segment()
        except KVFabricError as exc:
            _LOG.warning("no spare segment in %s: %s", directory.path, exc)

    async def _make_segment(self) -> Segment:
        await self._pool.run(self._directory.clear)
        while not self._directory.has_room:
            await self._reclaim()
        return await self._add_segment()

    async def _add_segment(self) -> Segment:
        return self._directory.enter(await self._pool.run(self._directory.make_file))

    # ------------------------------------------------------------------ reclaim

    async def _reclaim(self) -> None:
        """Drop the oldest segment with all that is in it. Readers that hold it finish undisturbed."""
        directory = self._directory
        if directory.unavailable:
            number = min(directory.unavailable)
            await self._tell(await self._pool.run(partial(directory.index.drop_segment, number)))
            del directory.unavailable[number]  # a stray file now
            await self._pool.run(directory.clear)
            return
        oldest, owner = directory.oldest(), self._owner()
        if oldest is None:
            raise NoSpace(f"{directory.path} has no segment to reclaim: {directory!r}")
        if directory.active is not None and owner is not None:
            await self._rescue(oldest, directory.active, owner.hot, RESCUED_SHARE)
        await self._drop(oldest)

    async def _drop(self, segment: Segment) -> None:
        """Give up a segment with all that is in it."""
        directory, number = self._directory, segment.file.header.number
        # Out of the index first: what is gone must not come back after a crash.
        batch = await self._pool.run(partial(directory.index.drop_segment, number))
        failpoint("segment.reclaim.forgotten")
        directory.empty(segment)
        await self._tell(batch)
        await self._pool.run(segment.file.unlink)
        failpoint("segment.reclaim.done")
        directory.leave(segment)

    async def _tell(self, gone: RecordBatch) -> None:
        owner = self._owner()
        if owner is not None:
            for first in range(0, len(gone), _DROPPED):
                owner.dropped(gone.chosen(slice(first, first + _DROPPED)).places())
                await asyncio.sleep(0)

    # ------------------------------------------------------------------ destroy

    async def carry_out(self, task: Destruction) -> None:
        try:
            task.done.set_result(await self._destroy(task.is_struck))
        except KVFabricError as exc:
            _LOG.warning(
                "not everything to be destroyed in %s is gone: %s", self._directory.path, exc
            )
            task.done.set_exception(exc)
            task.done.exception()  # whoever asked may be gone

    async def _destroy(self, is_struck: Callable[[Lineage], bool]) -> int:
        directory, num_bytes = self._directory, 0
        if directory.unavailable:
            raise TransferError(f"{len(directory.unavailable)} segment files cannot be read")
        for number in sorted(directory.segments):
            batch = await self._pool.run(partial(directory.index.batch, number))
            struck = [n for n, lineage in batch.lineages.items() if is_struck(lineage)]
            if not np.isin(batch.rows["lineage"], struck).any():
                continue
            segment = directory.segments[number]
            others = batch.chosen(batch.rows["is_live"] != 0)
            others = others.chosen(_not_of(struck, others))
            await self._make_room(segment, int(sizes_of(others).sum()))
            if directory.active is not None and directory.active is not segment:
                await self._rescue(segment, directory.active, partial(_not_of, struck), 1.0)
            await self._drop(segment)
            num_bytes += segment.file.header.num_bytes
        return num_bytes

    async def _make_room(self, leaving: Segment, num_bytes: int) -> None:
        """Have an active segment other than `leaving`, with room for so much if no other must go for it."""
        directory = self._directory
        has_next = directory.spare is not None or self._making is not None
        full = directory.active is None or directory.active.room < num_bytes
        if (has_next or directory.has_room) and (full or directory.active is leaving):
            await self.advance()
        elif directory.active is leaving:
            directory.active = None

    # ------------------------------------------------------------------ rescue

    async def _rescue(
        self,
        oldest: Segment,
        into: Segment,
        chosen: Callable[[RecordBatch], Flags],
        share: float,
    ) -> None:
        """Write chosen records of a segment anew, up to a share of one, in the order and with the promise
        of every write."""
        file = oldest.file
        try:
            live = await self._pool.run(partial(self._directory.index.live, file.header.number))
            most = int(self._directory.segment_bytes * share)
            hot = to_rescue(live, chosen(live), min(most, into.room))
            for piece in slices_of(hot):
                if not self._budget.take(int(sizes_of(piece).sum())):
                    return
                found = await self._pool.run(partial(read_slice, file, piece, self._verify))
                self._counts["quarantined"] += len(found.corrupt)
                self._counts["unreadable"] += len(found.unreadable)
                await self._rewrite(into, piece, found)
        except (NoSpace, CorruptBlock) as exc:
            _LOG.warning("records of %s are not written anew: %s", file.path, exc)

    async def _rewrite(self, into: Segment, batch: RecordBatch, found: Found) -> None:
        plan, moves = Plan(into), []
        for at, identity, payload in found.intact:
            new = plan.add(self._directory.next_sequence(), identity, payload)
            plan.forgets.append(batch.location(at))
            moves.append(Move(identity.part, batch.location(at), new))
        if not moves:
            return
        await self._move(plan)
        self._counts["rescued_bytes"] += sum(record_bytes(one[1].num_bytes) for one in found.intact)
        owner = self._owner()
        if owner is not None:
            owner.moved(moves)


def _not_of(struck: Sequence[int], batch: RecordBatch) -> Flags:
    others: Flags = ~np.isin(batch.rows["lineage"], struck)
    return others
