"""SSD tier: append-only segment files, an index of them, and the order in which bytes become durable.

    write() ---> queue ---> group ---> O_DIRECT writes ---> fdatasync ---> index commit ---> sealed
                            50 ms or 64 MiB, within one segment

`SegmentTier` owns the decisions: what is written when, and in what order it becomes durable. What is in the
directory is `segment_directory`'s, which file comes and goes `segment_reclaim`'s. Blocking work is run in a
bounded pool. One task, the sealer, is the only one that writes: groups one after the other, so a failed group
is simply overwritten by the next and files have no holes.

Files that hold records, dead ones too, and one empty spare make up the capacity, so the next segment is there
when the current one is full. A process that dies leaves what was sealed; records after the last index commit
are lost. An index that is missing or damaged is rebuilt from the records (highest sequence wins); deleted
parts may then come back, and are right: a part's key says what its bytes are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import xxhash

from kvfabric.errors import (
    ClosedError,
    CorruptBlock,
    KVFabricError,
    LocalProtocolError,
    NoSpace,
    QuotaExceeded,
    TransferError,
    UnknownTenant,
)
from kvfabric.failpoints import failpoint
from kvfabric.tiers.base import (
    Lineage,
    Location,
    PartIdentity,
    RecordBatch,
    Scrubbed,
    Tier,
)
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.pool import IoPool, finished
from kvfabric.tiers.record_cipher import RecordCipher
from kvfabric.tiers.records import (
    NO_CHECKSUM,
    PAGE_BYTES,
    encode_identity,
    verify_payload,
)
from kvfabric.tiers.segment_accounts import Busy, SegmentStatistics
from kvfabric.tiers.segment_directory import SegmentDirectory
from kvfabric.tiers.segment_file import Appended, SegmentFile
from kvfabric.tiers.segment_groups import (
    GROUP_BYTES,
    Drop,
    GroupQueue,
    Plan,
    Write,
    fail,
    plan_runs,
)
from kvfabric.tiers.segment_index import Extent
from kvfabric.tiers.segment_reclaim import Destruction, Means, Reclaimer
from kvfabric.tiers.segment_rescue import (
    ScrubCursor,
    check_slice,
    sizes_of,
    slices_of,
)
from kvfabric.tiers.write_budget import WriteBudget
from kvfabric.types import TenantId

_LOG = logging.getLogger(__name__)

_THREADS = 8
_WRITE_LANES = 4  # threads that write; the rest are for reads


def default_segment_bytes(capacity_bytes: int) -> int:
    """An eighth of the capacity up to 256 MiB; above 64 GiB so that there are 256 files."""
    wanted = max(min(256 << 20, capacity_bytes // 8), capacity_bytes // 256)
    return wanted // PAGE_BYTES * PAGE_BYTES


class SegmentTier(Tier):
    """The SSD tier on one directory of its own. `clock`: seconds, for rates only.

    `capacity_bytes` is a hard bound on the segment files, those under way and those that could not be removed
    included, and must hold at least two of them; the index beside them takes a few hundred bytes a record.
    `budget`: of bytes written in a day, the tier's own from now on. `ops`: the system's file operations.
    Entering raises ConfigError (capacity, directory, another daemon using it), NoSpace or TransferError.
    """

    def __init__(
        self,
        directory: Path,
        *,
        capacity_bytes: int,
        clock: Callable[[], float],
        segment_bytes: int = 0,
        budget: WriteBudget | None = None,
        ops: FileOps | None = None,
    ) -> None:
        self._directory = SegmentDirectory(
            directory,
            capacity_bytes=capacity_bytes,
            segment_bytes=segment_bytes or default_segment_bytes(capacity_bytes),
            ops=ops or FileOps(),
        )
        self._pool = IoPool(_THREADS, "kvfabric-ssd")
        self._tasks = asyncio.TaskGroup()
        self._sealer: asyncio.Task[None] | None = None
        self._queue = GroupQueue()
        self._budget = budget or WriteBudget(0)
        self._cursor = ScrubCursor()
        self._destructions: deque[Destruction] = deque()
        self._is_open = False
        self._counts: Counter[str] = Counter()
        self._reading = Busy(clock)
        self._writing = Busy(clock)
        means = Means(
            pool=self._pool,
            tasks=self._tasks,
            budget=self._budget,
            counts=self._counts,
            move=self._move,
            refuse=lambda exc: fail(self._queue.take_writes(), exc),
            verify=self._verify,
            owner=lambda: self.owner,
        )
        self._reclaimer = Reclaimer(self._directory, means)

    def __repr__(self) -> str:
        s = self.statistics()
        return (
            f"<SegmentTier {self._directory.path}: {s.records} records, {s.live_bytes} live and "
            f"{s.dead_bytes} dead of {s.capacity_bytes} bytes, {len(self._queue)} queued>"
        )

    # ------------------------------------------------------------------ open and close

    async def __aenter__(self) -> Self:
        self._directory.check_sizes()
        try:
            await self._pool.run(self._recover)
            await self._tasks.__aenter__()
        except BaseException:
            await self._shut()
            raise
        self._is_open = True
        self._sealer = self._tasks.create_task(self._run(), name="ssd sealer")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Seals everything that was accepted, also when the body failed or was cancelled."""
        self._is_open = False
        self._queue.close()
        try:
            if self._sealer is not None:
                await finished(self._sealer)
            await self._tasks.__aexit__(None, None, None)
        finally:
            await self._shut()

    async def _shut(self) -> None:
        await self._pool.close()
        self._directory.close()

    def encrypt_with(self, cipher: RecordCipher) -> None:
        """Before entering: records are encrypted. Files of the other kind are removed at opening."""
        self._directory.cipher = cipher

    def inherit_lock(self, descriptor: int) -> None:
        """Before entering: a `lock_descriptor` of the daemon that had the directory, taken over; -1: none."""
        self._directory.lock_fd = descriptor

    @property
    def lock_descriptor(self) -> int:
        """Of the lock, while this is open: whoever gets a copy holds it too."""
        return self._directory.lock_fd

    def _recover(self) -> None:
        """Blocking: find out what is in the directory. Nothing else runs yet."""
        is_rebuilt = self._directory.recover()
        kept = self._directory.index.budget()
        if kept is not None:
            self._budget.resume(kept)
        elif is_rebuilt:
            self._budget.empty()  # what was left is lost with the index

    # ------------------------------------------------------------------ what callers use

    def batches(self) -> Iterator[RecordBatch]:
        self._require_open()
        yield from self._directory.batches()

    async def write(self, identity: PartIdentity, payload: memoryview) -> Location:
        self._require_open()
        cipher, segment_bytes = self._directory.cipher, self._directory.segment_bytes
        if cipher is not None:
            if not cipher.knows(identity.tenant):
                raise UnknownTenant(f"no data key for {identity.tenant}")
            identity = replace(identity, checksum=NO_CHECKSUM)
        encode_identity(identity)  # raises now rather than in the group of others
        if payload.nbytes != identity.num_bytes:
            raise LocalProtocolError(
                f"payload of {payload.nbytes} bytes for a part of {identity.num_bytes}"
            )
        loop = asyncio.get_running_loop()
        write = Write(identity, payload.cast("B"), loop.time(), loop.create_future())
        if write.num_bytes > segment_bytes - PAGE_BYTES:
            raise NoSpace(
                f"a part of {identity.num_bytes} bytes does not fit a segment of {segment_bytes}"
            )
        if not self._budget.take(write.num_bytes):
            raise QuotaExceeded(f"the write budget of {self._directory.path} is spent")
        self._queue.put(write)
        try:
            return await asyncio.shield(write.sealed)
        except asyncio.CancelledError:
            if self._queue.withdraw(write):
                self._budget.give_back(write.num_bytes)
                raise
            await self._undo(write)
            raise

    async def _undo(self, write: Write) -> None:
        """Its caller is gone, its group is under way: wait for the end, then drop the part."""
        with contextlib.suppress(asyncio.CancelledError):
            await finished(write.sealed)
        if write.sealed.exception() is None:
            self._forget(write.sealed.result())

    async def read_into(
        self, location: Location, identity: PartIdentity, buffer: memoryview
    ) -> bytes:
        self._require_open()
        if buffer.nbytes < identity.num_bytes:
            raise LocalProtocolError(
                f"buffer of {buffer.nbytes} bytes for a part of {identity.num_bytes}"
            )
        segment = self._directory.segments.get(location.file)
        if segment is None:
            raise TransferError(
                f"segment {location.file:08x} of {self._directory.path} was reclaimed"
            )
        work = partial(self._read, segment.file, location.offset, identity, buffer.cast("B"))
        segment.file.hold()
        try:
            with self._reading.moving(identity.num_bytes):
                return await self._pool.run(work)
        except CorruptBlock as exc:
            self._quarantine(location, exc)
            raise
        finally:
            segment.file.drop()

    def _read(
        self, file: SegmentFile, offset: int, identity: PartIdentity, buffer: memoryview
    ) -> bytes:
        payload = file.read(offset, identity, buffer)
        if identity.checksum == NO_CHECKSUM and file.header.is_encrypted:
            checksum = xxhash.xxh3_128_digest(payload)
        else:
            self._verify(payload, identity)
            checksum = identity.checksum
        if payload.obj is not buffer.obj:
            buffer[: identity.num_bytes] = payload
        return checksum

    def _verify(self, payload: memoryview, identity: PartIdentity) -> None:
        verify_payload(payload, identity)

    def delete(self, locations: Sequence[Location]) -> None:
        self._require_open()
        for location in locations:
            self._forget(location)

    async def destroy(self, is_struck: Callable[[Lineage], bool]) -> int:
        self._require_open()
        loop = asyncio.get_running_loop()
        task = Destruction(is_struck, loop.time(), loop.create_future())
        self._destructions.append(task)
        self._queue.wake()
        return await asyncio.shield(task.done)

    async def scrub(self, num_bytes: int, *, anew: bool = False) -> Scrubbed:
        self._require_open()
        if anew:
            self._cursor = ScrubCursor()
        number = self._cursor.next_file(sorted(self._directory.segments))
        if number is None:
            self._counts["scrub_rounds"] += 1
            return Scrubbed(0, 0, 0, (), is_round=True)
        file = self._directory.segments[number].file
        file.hold()
        try:
            live = await self._pool.run(partial(self._directory.index.live, number))
            batch = self._cursor.next_records(live, num_bytes)
            condemned = [self._is_condemned(number, at) for at in batch.rows["offset"].tolist()]
            batch = batch.chosen(~np.array(condemned, dtype=np.bool_))
            corrupt, unreadable = [], 0
            for piece in slices_of(batch):
                found = await self._pool.run(partial(check_slice, file, piece))
                corrupt += [(piece.part(at), piece.location(at)) for at in found.corrupt]
                unreadable += len(found.unreadable)
        finally:
            file.drop()
        for _, location in corrupt:
            self._quarantine(location, "at rest")
        read = int(sizes_of(batch).sum())
        self._counts["unreadable"] += unreadable
        self._counts["scrubbed_bytes"] += read
        return Scrubbed(len(batch), read, unreadable, tuple(corrupt), is_round=False)

    def statistics(self) -> SegmentStatistics:
        live: Counter[TenantId] = Counter()
        dead: Counter[TenantId] = Counter()
        segments = self._directory.segments.values()
        for segment in segments:
            live.update(segment.live)
            dead.update(segment.dead)
        used = sum(segment.tail for segment in segments)
        counts = self._counts
        return SegmentStatistics(
            capacity_bytes=self._directory.capacity_bytes,
            used_bytes=used,
            live_bytes=live.total(),
            dead_bytes=used - live.total(),
            records=sum(segment.records for segment in segments),
            quarantined=counts["quarantined"],
            tenant_live_bytes={tenant: size for tenant, size in live.items() if size},
            tenant_dead_bytes={tenant: size for tenant, size in dead.items() if size},
            file_bytes=self._directory.file_bytes,
            sealed_writes=counts["sealed_writes"],
            group_commits=counts["group_commits"],
            direct=self._directory.is_direct,
            read_bytes=self._reading.num_bytes,
            read_s=self._reading.elapsed_s,
            write_bytes=self._writing.num_bytes,
            write_s=self._writing.elapsed_s,
            rescued_bytes=counts["rescued_bytes"],
            budget_left_bytes=self._budget.left_bytes,
            budget_refused=self._budget.refused,
            unreadable=counts["unreadable"],
            scrubbed_bytes=counts["scrubbed_bytes"],
            scrub_rounds=counts["scrub_rounds"],
        )

    def _require_open(self) -> None:
        if not self._is_open:
            raise self._closed()

    def _quarantine(self, location: Location, why: object) -> None:
        if location in self._directory.condemned:
            return
        self._directory.condemned.add(location)
        self._counts["quarantined"] += 1
        _LOG.warning("quarantined the record at %s: %s", location, why)
        self._forget(location)

    def _is_condemned(self, file: int, offset: int) -> bool:
        return Location(file, offset) in self._directory.condemned

    def _forget(self, location: Location) -> None:
        self._queue.put(Drop(location, asyncio.get_running_loop().time()))

    # ------------------------------------------------------------------ the sealer

    async def _run(self) -> None:
        """Seal group after group until the tier closes and the queue is empty."""
        try:
            while await self._queue.is_due():
                await self._seal_next()
                if self._is_open:
                    await self._reclaimer.keep_spare()
                # After what was written before it was asked for: that may be what is to be destroyed.
                if self._destructions and self._queue.is_past(self._destructions[0].asked_at):
                    await self._reclaimer.carry_out(self._destructions.popleft())
            if self._budget.is_limited:
                await self._keep_budget()
        finally:
            fail(self._queue.take_writes(), self._closed())
            for task in self._destructions:
                task.done.set_exception(self._closed())
                task.done.exception()  # whoever asked may be gone

    async def _keep_budget(self) -> None:
        try:
            level = self._budget.to_keep(0)
            await self._pool.run(partial(self._directory.index.keep_budget, level))
        except KVFabricError as exc:  # the last commit has less of it
            _LOG.warning("write budget of %s: %s", self._directory.path, exc)

    async def _seal_next(self) -> None:
        # A frame of its own: between groups nothing refers to the buffers of callers.
        active = self._directory.active
        group = self._queue.take(active.room if active else 0)
        if group:
            await self._seal(group)
        elif len(self._queue):
            await self._reclaimer.advance()

    async def _seal(self, group: Sequence[Write | Drop]) -> None:
        """Make a group durable, or fail its writes and keep its deletions for the next."""
        plan, writes = self._place(group)
        try:
            with self._writing.moving(plan.num_bytes):
                buried = await self._make_durable(plan)
        except KVFabricError as exc:
            _LOG.warning("%d writes to %s failed: %s", len(writes), self._directory.path, exc)
            fail((write for write, _ in writes), exc)
            # A damaged entry of the index would fail every group after this one too: its deletion is
            # given up. What comes back by that after a rebuild is what its key says.
            if isinstance(exc, CorruptBlock):
                await self._doubt_index()
            else:
                self._queue.postpone([item for item in group if isinstance(item, Drop)])
            return
        except BaseException:
            fail((write for write, _ in writes), self._closed())
            raise
        self._account(plan, buried)
        self._counts["sealed_writes"] += len(writes)
        for write, location in writes:
            write.sealed.set_result(location)

    async def _doubt_index(self) -> None:
        """The next start rebuilds it."""
        with contextlib.suppress(OSError):
            await self._pool.run(self._directory.index.doubt)

    def _place(self, group: Sequence[Write | Drop]) -> tuple[Plan, list[tuple[Write, Location]]]:
        """Say where in the active segment each record of the group goes. Changes no account."""
        plan = Plan(self._directory.active)
        writes: list[tuple[Write, Location]] = []
        for item in group:
            if isinstance(item, Drop):
                plan.forgets.append(item.location)
            else:
                sequence = self._directory.next_sequence()
                writes.append((item, plan.add(sequence, item.identity, item.payload)))
        return plan, writes

    async def _make_durable(self, plan: Plan) -> list[Extent]:
        """The order of these three is the promise of `write`."""
        await self._write_data(plan)
        await self._sync_data(plan)
        return await self._commit_index(plan)

    async def _write_data(self, plan: Plan) -> None:
        if plan.segment and plan.records:
            runs = list(plan_runs(plan.records))
            lanes = [runs[lane::_WRITE_LANES] for lane in range(_WRITE_LANES)]
            file = plan.segment.file
            await self._pool.run_all([partial(_append, file, lane) for lane in lanes if lane])

    async def _sync_data(self, plan: Plan) -> None:
        if plan.segment and plan.records:
            await self._pool.run(plan.segment.file.sync)

    async def _commit_index(self, plan: Plan) -> list[Extent]:
        """With the budget as it is without what may be written before the next commit."""
        budget = self._budget.to_keep(GROUP_BYTES) if self._budget.is_limited else None
        return await self._pool.run(
            partial(self._directory.index.apply, plan.puts, plan.forgets, budget)
        )

    async def _move(self, plan: Plan) -> None:
        """As `_seal`, of records that leave their segment."""
        with self._writing.moving(plan.num_bytes):
            buried = await self._make_durable(plan)
        failpoint("segment.reclaim.moved")
        self._account(plan, buried)

    def _account(self, plan: Plan, buried: Iterable[Extent]) -> None:
        self._counts["group_commits"] += 1
        self._directory.account(plan, buried)

    def _closed(self) -> ClosedError:
        return ClosedError(f"SSD tier {self._directory.path} is not open")


def _append(file: SegmentFile, runs: Sequence[Sequence[Appended]]) -> None:
    for run in runs:
        file.append(run)
