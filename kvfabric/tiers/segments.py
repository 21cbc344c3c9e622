"""SSD tier: append-only segment files, an index of them, and the order in which bytes become durable.

    write() ---> queue ---> group ---> O_DIRECT writes ---> fdatasync ---> index commit ---> sealed
                            50 ms or 64 MiB, within one segment

`SegmentTier` owns the directory and the decisions: where a record goes, which segment is reclaimed.
Blocking work is in `segment_file`, `segment_index`, `segment_rescue` and `segment_recovery`, run in a bounded
pool. One task, the sealer, is the only one that writes: groups one after the other, so a failed group is
simply overwritten by the next and files have no holes.

Space is given back by whole segments, the oldest first; what the owner calls hot is written anew before, up
to half a segment. Files that hold records, dead ones too, and one empty spare make up the capacity, so the
next segment is there when the current one is full. A process that dies leaves what was sealed; records after
the last index commit are lost. An index that is missing or damaged is rebuilt from the records (highest
sequence wins); deleted parts may then come back, and are right: a part's key says what its bytes are.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import xxhash

from kvfabric.errors import (
    ClosedError,
    ConfigError,
    CorruptBlock,
    KVFabricError,
    LocalProtocolError,
    NoSpace,
    QuotaExceeded,
    TransferError,
    UnknownTenant,
)
from kvfabric.failpoints import failpoint
from kvfabric.tiers import direct_io
from kvfabric.tiers.base import (
    Flags,
    Lineage,
    Location,
    Move,
    PartIdentity,
    RecordBatch,
    Scrubbed,
    Tier,
    TierStatistics,
)
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.pool import IoPool, finished
from kvfabric.tiers.record_cipher import RecordCipher
from kvfabric.tiers.records import (
    NO_CHECKSUM,
    PAGE_BYTES,
    encode_identity,
    record_bytes,
    verify_payload,
)
from kvfabric.tiers.segment_accounts import Busy, Segment
from kvfabric.tiers.segment_file import Appended, SegmentFile, numbers_in, path_of
from kvfabric.tiers.segment_groups import (
    GROUP_BYTES,
    Drop,
    GroupQueue,
    Plan,
    Write,
    fail,
    plan_runs,
)
from kvfabric.tiers.segment_index import Extent, SegmentIndex
from kvfabric.tiers.segment_recovery import recover
from kvfabric.tiers.segment_rescue import (
    RESCUED_SHARE,
    Found,
    ScrubCursor,
    check_slice,
    read_slice,
    sizes_of,
    slices_of,
    to_rescue,
)
from kvfabric.tiers.write_budget import WriteBudget
from kvfabric.types import TenantId

_LOG = logging.getLogger(__name__)

_DROPPED = 256
"""Parts of a reclaimed segment told of at once; a segment of small parts has very many."""
_THREADS = 8
_WRITE_LANES = 4  # threads that write; the rest are for reads


@dataclass(frozen=True, slots=True)
class SegmentStatistics(TierStatistics):
    """`file_bytes`: length of all files, at most the capacity. `direct`: False where the file system
    refused O_DIRECT. `read_s`, `write_s`: time in which at least one read or write was under way.

    `rescued_bytes`: of records written anew at a reclaim. `budget_left_bytes`: negative when overdrawn, 0
    without a budget; `budget_refused`: writes that found it spent. `unreadable`: records that the scrubber or
    a reclaim could not read. `scrub_rounds`: how often everything was verified at rest.
    """

    file_bytes: int
    sealed_writes: int
    group_commits: int
    direct: bool
    read_bytes: int
    read_s: float
    write_bytes: int
    write_s: float
    rescued_bytes: int
    budget_left_bytes: int
    budget_refused: int
    unreadable: int
    scrubbed_bytes: int
    scrub_rounds: int


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
        self._cipher: RecordCipher | None = None
        self._directory = directory
        self._capacity_bytes = capacity_bytes
        self._segment_bytes = segment_bytes or default_segment_bytes(capacity_bytes)
        self._ops = ops or FileOps()
        self._lock_fd = -1
        self._pool = IoPool(_THREADS, "kvfabric-ssd")
        self._tasks = asyncio.TaskGroup()
        self._sealer: asyncio.Task[None] | None = None
        self._index = SegmentIndex(directory, 0, self._ops)
        self._segments: dict[int, Segment] = {}
        self._active: Segment | None = None
        self._spare: Segment | None = None
        self._making: asyncio.Task[None] | None = None
        self._stray_bytes = 0
        self._unavailable: dict[int, int] = {}
        # Found corrupt, and live in the index until the next commit: not to be found again.
        self._condemned: set[Location] = set()
        # What recovery read, of files in which nothing changed since, until it is asked for.
        self._recovered: dict[int, RecordBatch] = {}
        self._sequence = 0
        self._queue = GroupQueue()
        self._budget = budget or WriteBudget(0)
        self._cursor = ScrubCursor()
        self._destructions: deque[_Destruction] = deque()
        self._is_open = False
        self._counts: Counter[str] = Counter()
        self._reading = Busy(clock)
        self._writing = Busy(clock)

    def __repr__(self) -> str:
        s = self.statistics()
        return (
            f"<SegmentTier {self._directory}: {s.records} records, {s.live_bytes} live and "
            f"{s.dead_bytes} dead of {s.capacity_bytes} bytes, {len(self._queue)} queued>"
        )

    # ------------------------------------------------------------------ open and close

    async def __aenter__(self) -> Self:
        if self._segment_bytes % PAGE_BYTES or self._segment_bytes < 2 * PAGE_BYTES:
            raise ConfigError(f"a segment of {self._segment_bytes} bytes is not two pages or more")
        if self._capacity_bytes < 2 * self._segment_bytes:
            raise ConfigError(
                f"an SSD tier of {self._capacity_bytes} bytes does not hold two segments of "
                f"{self._segment_bytes}"
            )
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
        for segment in self._segments.values():
            segment.file.retire()
        self._index.close()
        if self._lock_fd >= 0:
            self._ops.close(self._lock_fd)
            self._lock_fd = -1

    def _lock(self) -> None:
        """Blocking: make the directory and become its only user, until the process ends."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = self._directory / "lock"
            if self._lock_fd >= 0 and not _is_at(path, self._lock_fd):
                self._ops.close(self._lock_fd)  # of another directory
                self._lock_fd = -1
            if self._lock_fd < 0:
                self._lock_fd = self._ops.open(path, os.O_CREAT | os.O_RDWR)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ConfigError(
                f"SSD directory {self._directory} is in use by another daemon"
            ) from exc
        except OSError as exc:
            raise ConfigError(f"SSD directory {self._directory}: {exc.strerror}") from exc

    def encrypt_with(self, cipher: RecordCipher) -> None:
        """Before entering: records are encrypted. Files of the other kind are removed at opening."""
        self._cipher = cipher

    def inherit_lock(self, descriptor: int) -> None:
        """Before entering: a `lock_descriptor` of the daemon that had the directory, taken over; -1: none."""
        self._lock_fd = descriptor

    @property
    def lock_descriptor(self) -> int:
        """Of the lock, while this is open: whoever gets a copy holds it too."""
        return self._lock_fd

    def _recover(self) -> None:
        """Blocking: find out what is in the directory. Nothing else runs yet."""
        self._lock()
        found = recover(self._directory, self._capacity_bytes, self._ops, self._cipher)
        self._index, self._segments = found.index, found.segments
        self._active, self._spare = found.active, found.spare
        self._unavailable = found.unavailable
        self._recovered = found.live
        self._sequence = self._index.next_sequence()
        kept = self._index.budget()
        if kept is not None:
            self._budget.resume(kept)
        elif found.is_rebuilt:
            self._budget.empty()  # what was left is lost with the index

    # ------------------------------------------------------------------ what callers use

    def batches(self) -> Iterator[RecordBatch]:
        self._require_open()
        for number in sorted(self._segments):
            if number in self._segments:
                live = self._recovered.pop(number, None)
                if live is None:
                    live = self._index.live(number)
                if len(live):
                    yield live

    async def write(self, identity: PartIdentity, payload: memoryview) -> Location:
        self._require_open()
        if self._cipher is not None:
            if not self._cipher.knows(identity.tenant):
                raise UnknownTenant(f"no data key for {identity.tenant}")
            identity = replace(identity, checksum=NO_CHECKSUM)
        encode_identity(identity)  # raises now rather than in the group of others
        if payload.nbytes != identity.num_bytes:
            raise LocalProtocolError(
                f"payload of {payload.nbytes} bytes for a part of {identity.num_bytes}"
            )
        loop = asyncio.get_running_loop()
        write = Write(identity, payload.cast("B"), loop.time(), loop.create_future())
        if write.num_bytes > self._segment_bytes - PAGE_BYTES:
            raise NoSpace(
                f"a part of {identity.num_bytes} bytes does not fit a segment of {self._segment_bytes}"
            )
        if not self._budget.take(write.num_bytes):
            raise QuotaExceeded(f"the write budget of {self._directory} is spent")
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
        segment = self._segments.get(location.file)
        if segment is None:
            raise TransferError(f"segment {location.file:08x} of {self._directory} was reclaimed")
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
        task = _Destruction(is_struck, loop.time(), loop.create_future())
        self._destructions.append(task)
        self._queue.wake()
        return await asyncio.shield(task.done)

    async def scrub(self, num_bytes: int, *, anew: bool = False) -> Scrubbed:
        self._require_open()
        if anew:
            self._cursor = ScrubCursor()
        number = self._cursor.next_file(sorted(self._segments))
        if number is None:
            self._counts["scrub_rounds"] += 1
            return Scrubbed(0, 0, 0, (), is_round=True)
        file = self._segments[number].file
        file.hold()
        try:
            live = await self._pool.run(partial(self._index.live, number))
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
        for segment in self._segments.values():
            live.update(segment.live)
            dead.update(segment.dead)
        used = sum(segment.tail for segment in self._segments.values())
        counts = self._counts
        return SegmentStatistics(
            capacity_bytes=self._capacity_bytes,
            used_bytes=used,
            live_bytes=live.total(),
            dead_bytes=used - live.total(),
            records=sum(segment.records for segment in self._segments.values()),
            quarantined=counts["quarantined"],
            tenant_live_bytes={tenant: size for tenant, size in live.items() if size},
            tenant_dead_bytes={tenant: size for tenant, size in dead.items() if size},
            file_bytes=self._file_bytes(),
            sealed_writes=counts["sealed_writes"],
            group_commits=counts["group_commits"],
            direct=all(segment.file.direct for segment in self._segments.values()),
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
        if location in self._condemned:
            return
        self._condemned.add(location)
        self._counts["quarantined"] += 1
        _LOG.warning("quarantined the record at %s: %s", location, why)
        self._forget(location)

    def _is_condemned(self, file: int, offset: int) -> bool:
        return Location(file, offset) in self._condemned

    def _forget(self, location: Location) -> None:
        self._queue.put(Drop(location, asyncio.get_running_loop().time()))

    # ------------------------------------------------------------------ the sealer

    async def _run(self) -> None:
        """Seal group after group until the tier closes and the queue is empty."""
        try:
            while await self._queue.is_due():
                await self._seal_next()
                await self._keep_spare()
                # After what was written before it was asked for: that may be what is to be destroyed.
                if self._destructions and self._queue.is_past(self._destructions[0].asked_at):
                    await self._carry_out(self._destructions.popleft())
            if self._budget.is_limited:
                await self._keep_budget()
        finally:
            fail(self._queue.take_writes(), self._closed())
            for task in self._destructions:
                task.done.set_exception(self._closed())
                task.done.exception()  # whoever asked may be gone

    async def _keep_budget(self) -> None:
        try:
            await self._pool.run(partial(self._index.keep_budget, self._budget.to_keep(0)))
        except KVFabricError as exc:  # the last commit has less of it
            _LOG.warning("write budget of %s: %s", self._directory, exc)

    async def _seal_next(self) -> None:
        # A frame of its own: between groups nothing refers to the buffers of callers.
        group = self._queue.take(self._active.room if self._active else 0)
        if group:
            await self._seal(group)
        elif len(self._queue):
            await self._advance()

    async def _seal(self, group: Sequence[Write | Drop]) -> None:
        """Make a group durable, or fail its writes and keep its deletions for the next."""
        plan, writes = self._place(group)
        try:
            with self._writing.moving(plan.num_bytes):
                buried = await self._make_durable(plan)
        except KVFabricError as exc:
            _LOG.warning("%d writes to %s failed: %s", len(writes), self._directory, exc)
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
            await self._pool.run(self._index.doubt)

    def _place(self, group: Sequence[Write | Drop]) -> tuple[Plan, list[tuple[Write, Location]]]:
        """Say where in the active segment each record of the group goes. Changes no account."""
        plan = Plan(self._active)
        writes: list[tuple[Write, Location]] = []
        for item in group:
            if isinstance(item, Drop):
                plan.forgets.append(item.location)
            else:
                self._sequence += 1
                writes.append((item, plan.add(self._sequence, item.identity, item.payload)))
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
        return await self._pool.run(partial(self._index.apply, plan.puts, plan.forgets, budget))

    def _account(self, plan: Plan, buried: Iterable[Extent]) -> None:
        self._counts["group_commits"] += 1
        for location in (*(put.location for put in plan.puts), *plan.forgets):
            self._recovered.pop(location.file, None)
        for put in plan.puts:
            assert plan.segment is not None
            size = record_bytes(put.identity.num_bytes)
            plan.segment.enter(Extent(put.location, size, put.identity.tenant))
        for extent in buried:
            self._condemned.discard(extent.location)
            segment = self._segments.get(extent.location.file)
            if segment is not None:
                segment.bury(extent)

    # ------------------------------------------------------------------ segments come and go

    async def _advance(self) -> None:
        """The active segment is full: the spare takes its place. No segment: the writes fail."""
        self._active = None
        if self._making is not None:
            await finished(self._making)
        if self._spare is None:
            try:
                self._spare = await self._make_segment()
            except KVFabricError as exc:
                _LOG.warning("no segment in %s: %s", self._directory, exc)
                fail(self._queue.take_writes(), exc)
                return
        self._active, self._spare = self._spare, None

    async def _keep_spare(self) -> None:
        if self._spare is not None or self._active is None or not self._is_open:
            return
        if self._making is not None and not self._making.done():
            return
        if self._file_bytes() + self._segment_bytes <= self._capacity_bytes:
            # Nothing is reclaimed for it, so groups go on meanwhile.
            self._making = self._tasks.create_task(self._make_spare(), name="ssd spare")
        else:
            try:
                self._spare = await self._make_segment()
            except KVFabricError as exc:
                # Not needed yet: whoever needs it tries again, and gets the error.
                _LOG.warning("no spare segment in %s: %s", self._directory, exc)

    async def _make_spare(self) -> None:
        try:
            self._stray_bytes = await self._pool.run(self._clear)
            if self._file_bytes() + self._segment_bytes <= self._capacity_bytes:
                self._spare = await self._add_segment()
        except KVFabricError as exc:
            _LOG.warning("no spare segment in %s: %s", self._directory, exc)

    async def _make_segment(self) -> Segment:
        self._stray_bytes = await self._pool.run(self._clear)
        while self._file_bytes() + self._segment_bytes > self._capacity_bytes:
            await self._reclaim()
        return await self._add_segment()

    async def _add_segment(self) -> Segment:
        segment = Segment(await self._pool.run(self._create_file))
        self._segments[segment.file.header.number] = segment
        return segment

    def _create_file(self) -> SegmentFile:
        """Blocking: a new file, in the index too."""
        on_disk = numbers_in(self._ops, self._directory)
        # A file that could not be removed keeps its number.
        number = max(self._index.next_number(), *(n + 1 for n in on_disk), 1)
        file = SegmentFile.create(
            self._ops, self._directory, number, self._segment_bytes, self._cipher
        )
        try:
            self._index.add_segment(file.header)
        except BaseException:
            file.retire()
            file.unlink()
            raise
        failpoint("segment.create.registered")
        if self._ops.direct and not file.direct:
            _LOG.warning(
                "%s refuses O_DIRECT: SSD I/O goes through the page cache", self._directory
            )
        return file

    def _clear(self) -> int:
        """Blocking: remove files that belong to no segment; bytes of those that stay."""
        stay = 0
        known = self._segments.keys() | self._unavailable.keys()
        for number in set(numbers_in(self._ops, self._directory)) - known:
            path = path_of(self._directory, number)
            try:
                self._ops.unlink(path)
            except OSError:
                with direct_io.translated(f"look at {path}"):
                    stay += self._ops.file_bytes(path)
        return stay

    async def _reclaim(self) -> None:
        """Drop the oldest segment with all that is in it. Readers that hold it finish undisturbed."""
        if self._unavailable:
            number = min(self._unavailable)
            await self._tell(await self._pool.run(partial(self._index.drop_segment, number)))
            del self._unavailable[number]  # a stray file now
            self._stray_bytes = await self._pool.run(self._clear)
            return
        in_use = (self._active, self._spare)
        oldest = next((s for s in self._ordered() if s not in in_use), None)
        if oldest is None:
            raise NoSpace(f"{self._directory} has no segment to reclaim: {self!r}")
        if self._active is not None and self.owner is not None:
            await self._rescue(oldest, self._active, self.owner.hot, RESCUED_SHARE)
        await self._drop_segment(oldest)

    async def _drop_segment(self, oldest: Segment) -> None:
        """Give up a segment with all that is in it."""
        number = oldest.file.header.number
        # Out of the index first: what is gone must not come back after a crash.
        batch = await self._pool.run(partial(self._index.drop_segment, number))
        failpoint("segment.reclaim.forgotten")
        oldest.live.clear()
        oldest.dead.clear()
        oldest.records = 0
        self._recovered.pop(number, None)
        self._condemned = {place for place in self._condemned if place.file != number}
        await self._tell(batch)
        await self._pool.run(oldest.file.unlink)
        failpoint("segment.reclaim.done")
        oldest.file.retire()
        del self._segments[number]

    async def _tell(self, gone: RecordBatch) -> None:
        if self.owner is not None:
            for first in range(0, len(gone), _DROPPED):
                self.owner.dropped(gone.chosen(slice(first, first + _DROPPED)).places())
                await asyncio.sleep(0)

    async def _carry_out(self, task: _Destruction) -> None:
        try:
            task.done.set_result(await self._destroy(task.is_struck))
        except KVFabricError as exc:
            _LOG.warning("not everything to be destroyed in %s is gone: %s", self._directory, exc)
            task.done.set_exception(exc)
            task.done.exception()  # whoever asked may be gone

    async def _destroy(self, is_struck: Callable[[Lineage], bool]) -> int:
        num_bytes = 0
        if self._unavailable:
            raise TransferError(f"{len(self._unavailable)} segment files cannot be read")
        for number in sorted(self._segments):
            batch = await self._pool.run(partial(self._index.batch, number))
            struck = [n for n, lineage in batch.lineages.items() if is_struck(lineage)]
            if not np.isin(batch.rows["lineage"], struck).any():
                continue
            segment = self._segments[number]
            others = batch.chosen(batch.rows["is_live"] != 0)
            others = others.chosen(_not_of(struck, others))
            await self._make_room(segment, int(sizes_of(others).sum()))
            if self._active is not None and self._active is not segment:
                await self._rescue(segment, self._active, partial(_not_of, struck), 1.0)
            await self._drop_segment(segment)
            num_bytes += segment.file.header.num_bytes
        return num_bytes

    async def _make_room(self, leaving: Segment, num_bytes: int) -> None:
        """Have an active segment other than `leaving`, with room for so much if no other must go for it."""
        has_next = self._spare is not None or self._making is not None
        may_make = has_next or self._file_bytes() + self._segment_bytes <= self._capacity_bytes
        full = self._active is None or self._active.room < num_bytes
        if may_make and (full or self._active is leaving):
            await self._advance()
        elif self._active is leaving:
            self._active = None

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
            live = await self._pool.run(partial(self._index.live, file.header.number))
            most = int(self._segment_bytes * share)
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
            self._sequence += 1
            new = plan.add(self._sequence, identity, payload)
            plan.forgets.append(batch.location(at))
            moves.append(Move(identity.part, batch.location(at), new))
        if not moves:
            return
        with self._writing.moving(plan.num_bytes):
            buried = await self._make_durable(plan)
        failpoint("segment.reclaim.moved")
        self._account(plan, buried)
        self._counts["rescued_bytes"] += sum(record_bytes(one[1].num_bytes) for one in found.intact)
        if self.owner is not None:
            self.owner.moved(moves)

    def _ordered(self) -> list[Segment]:
        """Oldest first."""
        return [segment for _, segment in sorted(self._segments.items())]

    def _file_bytes(self) -> int:
        """Of all files of the tier, also those that ought to be gone."""
        files = (segment.file.header.num_bytes for segment in self._segments.values())
        return self._stray_bytes + sum(self._unavailable.values()) + sum(files)

    def _closed(self) -> ClosedError:
        return ClosedError(f"SSD tier {self._directory} is not open")


@dataclass(frozen=True, slots=True, eq=False)
class _Destruction:
    is_struck: Callable[[Lineage], bool]
    asked_at: float
    done: asyncio.Future[int]


def _not_of(struck: Sequence[int], batch: RecordBatch) -> Flags:
    others: Flags = ~np.isin(batch.rows["lineage"], struck)
    return others


def _append(file: SegmentFile, runs: Sequence[Sequence[Appended]]) -> None:
    for run in runs:
        file.append(run)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
