"""SSD tier: append-only segment files, an index of them, and the order in which bytes become durable.

    write() ---> queue ---> group ---> O_DIRECT writes ---> fdatasync ---> index commit ---> sealed
                            50 ms or 64 MiB, within one segment

`SegmentTier` owns the directory and the decisions: where a record goes, which segment is reclaimed.
Blocking work is in `segment_file`, `segment_index` and `segment_recovery`, run in a bounded pool. One
task, the sealer, is the only one that writes: groups one after the other, so a failed group is simply
overwritten by the next and files have no holes.

Space is given back by whole segments, the oldest first. Files that hold records and one empty spare make
up the capacity, so the next segment is there when the current one is full. A process that dies leaves
what was sealed; records after the last index commit are lost. An index that is missing or damaged is
rebuilt from the records (highest sequence wins); deleted parts may then come back, and are right: a part's
key says what its bytes are.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from kvfabric.errors import (
    ClosedError,
    ConfigError,
    CorruptBlock,
    KVFabricError,
    LocalProtocolError,
    NoSpace,
    TransferError,
)
from kvfabric.failpoints import failpoint
from kvfabric.tiers.base import Location, PartIdentity, Tier, TierStatistics
from kvfabric.tiers.pool import IoPool, finished
from kvfabric.tiers.records import (
    PAGE_BYTES,
    encode_identity,
    record_bytes,
    verify_payload,
)
from kvfabric.tiers.segment_accounts import Busy, Segment
from kvfabric.tiers.segment_file import Appended, SegmentFile, numbers_in
from kvfabric.tiers.segment_index import Change, Extent, Forget, Put, SegmentIndex
from kvfabric.tiers.segment_recovery import recover
from kvfabric.types import Part, TenantId

_LOG = logging.getLogger(__name__)

GROUP_S = 0.05
GROUP_BYTES = 64 << 20
RUN_BYTES = 8 << 20
"""Neighbouring records written by one call to the kernel."""

_RUN_RECORDS = 256
_DROPPED = 256
"""Parts of a reclaimed segment told of at once; a segment of small parts has very many."""
_THREADS = 6
_WRITE_LANES = 2  # threads that write; the rest are for reads


@dataclass(frozen=True, slots=True)
class SegmentStatistics(TierStatistics):
    """`file_bytes`: length of all files, at most the capacity. `direct`: False where the file system
    refused O_DIRECT. `read_s`, `write_s`: time in which at least one read or write was under way."""

    file_bytes: int
    sealed_writes: int
    group_commits: int
    direct: bool
    read_bytes: int
    read_s: float
    write_bytes: int
    write_s: float


@dataclass(slots=True, eq=False)
class _Write:
    identity: PartIdentity
    payload: memoryview
    queued_at: float
    sealed: asyncio.Future[Location]

    @property
    def num_bytes(self) -> int:
        return record_bytes(self.identity.num_bytes)


@dataclass(slots=True, eq=False)
class _Drop:
    change: Forget
    queued_at: float


@dataclass(slots=True)
class _Plan:
    """A group, placed: `records` and `writes` go into `segment`, `changes` into the index, in order."""

    segment: Segment | None
    records: list[Appended] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    writes: list[tuple[_Write, Location]] = field(default_factory=list)


def default_segment_bytes(capacity_bytes: int) -> int:
    """An eighth of the capacity up to 256 MiB; above 64 GiB so that there are 256 files."""
    wanted = max(min(256 << 20, capacity_bytes // 8), capacity_bytes // 256)
    return wanted // PAGE_BYTES * PAGE_BYTES


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


class SegmentTier(Tier):
    """The SSD tier on one directory of its own. `clock`: seconds, for rates only.

    `capacity_bytes` is a hard bound on the segment files and must hold at least two of them; the index
    beside them takes about 1 KiB a record. `on_dropped` gets the parts that went with a reclaimed
    segment, in slices, on the event loop, before their space is used again; it must not raise or block.
    Entering raises ConfigError (capacity, directory, another daemon using it), NoSpace or TransferError.
    """

    def __init__(
        self,
        directory: Path,
        *,
        capacity_bytes: int,
        clock: Callable[[], float],
        on_dropped: Callable[[list[Part]], None],
        segment_bytes: int = 0,
        direct: bool = True,
    ) -> None:
        self._directory = directory
        self._capacity_bytes = capacity_bytes
        self._segment_bytes = segment_bytes or default_segment_bytes(capacity_bytes)
        self._on_dropped = on_dropped
        self._direct = direct
        self._lock_fd = -1
        self._pool = IoPool(_THREADS, "kvfabric-ssd")
        self._tasks = asyncio.TaskGroup()
        self._sealer: asyncio.Task[None] | None = None
        self._index = SegmentIndex(directory, 0)
        self._segments: dict[int, Segment] = {}
        self._active: Segment | None = None
        self._spare: Segment | None = None
        self._sequence = 0
        self._queue: deque[_Write | _Drop] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()  # something is queued, or we are closing
        self._full = asyncio.Event()  # a whole group is queued, or we are closing
        self._is_open = False
        self._quarantined = 0
        self._sealed_writes = 0
        self._group_commits = 0
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
        self._wake.set()
        self._full.set()
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
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _lock(self) -> None:
        """Blocking: make the directory and become its only user, until the process ends."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_fd = os.open(
                self._directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600
            )
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ConfigError(
                f"SSD directory {self._directory} is in use by another daemon"
            ) from exc
        except OSError as exc:
            raise ConfigError(f"SSD directory {self._directory}: {exc.strerror}") from exc

    def _recover(self) -> None:
        """Blocking: find out what is in the directory. Nothing else runs yet."""
        self._lock()
        found = recover(self._directory, self._capacity_bytes, direct=self._direct)
        self._index, self._segments = found.index, found.segments
        self._active, self._spare = found.active, found.spare
        self._sequence = self._index.next_sequence()

    # ------------------------------------------------------------------ what callers use

    def records(self) -> Iterator[tuple[PartIdentity, Location]]:
        self._require_open()
        return self._index.records()

    async def write(self, identity: PartIdentity, payload: memoryview) -> Location:
        self._require_open()
        encode_identity(identity)  # raises now rather than in the group of others
        if payload.nbytes != identity.num_bytes:
            raise LocalProtocolError(
                f"payload of {payload.nbytes} bytes for a part of {identity.num_bytes}"
            )
        loop = asyncio.get_running_loop()
        write = _Write(identity, payload.cast("B"), loop.time(), loop.create_future())
        if write.num_bytes > self._segment_bytes - PAGE_BYTES:
            raise NoSpace(
                f"a part of {identity.num_bytes} bytes does not fit a segment of {self._segment_bytes}"
            )
        self._enqueue(write)
        try:
            return await asyncio.shield(write.sealed)
        except asyncio.CancelledError:
            if write in self._queue:
                self._queue.remove(write)
                self._queued_bytes -= write.num_bytes
                raise
            await self._undo(write)
            raise

    async def _undo(self, write: _Write) -> None:
        """Its caller is gone, its group is under way: wait for the end, then drop the part."""
        with contextlib.suppress(asyncio.CancelledError):
            await finished(write.sealed)
        if write.sealed.exception() is None:
            self._forget(Forget(write.identity.part, write.sealed.result()))

    async def read_into(
        self, location: Location, identity: PartIdentity, buffer: memoryview
    ) -> None:
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
                await self._pool.run(work)
        except CorruptBlock as exc:
            self._quarantined += 1
            self._forget(Forget(identity.part, location))
            _LOG.warning("quarantined part %s: %s", identity.part.key.hex()[:16], exc)
            raise
        finally:
            segment.file.drop()

    def _read(
        self, file: SegmentFile, offset: int, identity: PartIdentity, buffer: memoryview
    ) -> None:
        payload = file.read(offset, identity, buffer)
        self._verify(payload, identity)
        if payload.obj is not buffer.obj:
            buffer[: identity.num_bytes] = payload

    def _verify(self, payload: memoryview, identity: PartIdentity) -> None:
        verify_payload(payload, identity)

    def delete(self, parts: list[Part]) -> None:
        self._require_open()
        for part in parts:
            self._forget(Forget(part))

    def statistics(self) -> SegmentStatistics:
        live: Counter[TenantId] = Counter()
        dead: Counter[TenantId] = Counter()
        for segment in self._segments.values():
            live.update(segment.live)
            dead.update(segment.dead)
        used = sum(segment.tail for segment in self._segments.values())
        return SegmentStatistics(
            capacity_bytes=self._capacity_bytes,
            used_bytes=used,
            live_bytes=live.total(),
            dead_bytes=used - live.total(),
            records=sum(segment.records for segment in self._segments.values()),
            quarantined=self._quarantined,
            tenant_live_bytes={tenant: size for tenant, size in live.items() if size},
            tenant_dead_bytes={tenant: size for tenant, size in dead.items() if size},
            file_bytes=self._file_bytes(),
            sealed_writes=self._sealed_writes,
            group_commits=self._group_commits,
            direct=all(segment.file.direct for segment in self._segments.values()),
            read_bytes=self._reading.num_bytes,
            read_s=self._reading.elapsed_s,
            write_bytes=self._writing.num_bytes,
            write_s=self._writing.elapsed_s,
        )

    def _require_open(self) -> None:
        if not self._is_open:
            raise self._closed()

    def _forget(self, change: Forget) -> None:
        self._enqueue(_Drop(change, asyncio.get_running_loop().time()))

    def _enqueue(self, item: _Write | _Drop) -> None:
        # Bounded by the callers: each write is one of them waiting with a buffer of its own.
        self._queue.append(item)
        if isinstance(item, _Write):
            self._queued_bytes += item.num_bytes
        if self._queued_bytes >= GROUP_BYTES:
            self._full.set()
        self._wake.set()

    # ------------------------------------------------------------------ the sealer

    async def _run(self) -> None:
        """Seal group after group until the tier closes and the queue is empty."""
        try:
            while await self._group_is_due():
                await self._seal_next()
                await self._keep_spare()
        finally:
            _fail(self._take_writes(), self._closed())

    async def _seal_next(self) -> None:
        # A frame of its own: between groups nothing refers to the buffers of callers.
        group = self._take_group()
        if group:
            await self._seal(group)
        elif self._queue:
            await self._advance()

    async def _group_is_due(self) -> bool:
        """Wait until a group is full or old enough. False: closing, and nothing is left."""
        if not self._queue and self._is_open:
            self._wake.clear()
        await self._wake.wait()
        if not self._queue:
            return self._is_open
        if self._is_open and self._queued_bytes < GROUP_BYTES:
            self._full.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._queue[0].queued_at + GROUP_S):
                    await self._full.wait()
        return True

    def _take_group(self) -> list[_Write | _Drop]:
        """The queue's head, as far as one group and the active segment hold it."""
        group: list[_Write | _Drop] = []
        room = self._active.room if self._active else 0
        num_bytes = 0
        while self._queue and num_bytes < GROUP_BYTES:
            item = self._queue[0]
            if isinstance(item, _Write):
                if num_bytes + item.num_bytes > room:
                    break
                num_bytes += item.num_bytes
            group.append(self._queue.popleft())
        self._queued_bytes -= num_bytes
        return group

    def _take_writes(self) -> list[_Write]:
        writes = [item for item in self._queue if isinstance(item, _Write)]
        self._queue = deque(item for item in self._queue if isinstance(item, _Drop))
        self._queued_bytes = 0
        return writes

    async def _seal(self, group: Sequence[_Write | _Drop]) -> None:
        """Make a group durable, or fail its writes and keep its deletions for the next."""
        plan = self._place(group)
        try:
            with self._writing.moving(sum(write.identity.num_bytes for write, _ in plan.writes)):
                decided = await self._make_durable(plan)
        except KVFabricError as exc:
            _LOG.warning("%d writes to %s failed: %s", len(plan.writes), self._directory, exc)
            _fail((write for write, _ in plan.writes), exc)
            # A damaged entry of the index would fail every group after this one too: its deletion is
            # given up. What comes back by that after a rebuild is what its key says.
            if not isinstance(exc, CorruptBlock):
                self._postpone([item for item in group if isinstance(item, _Drop)])
            return
        except BaseException:
            _fail((write for write, _ in plan.writes), self._closed())
            raise
        self._account(decided)
        self._group_commits += 1
        self._sealed_writes += len(plan.writes)
        for write, location in plan.writes:
            write.sealed.set_result(location)

    def _postpone(self, drops: Sequence[_Drop]) -> None:
        """Back to the head of the queue, to wait a group's time again; given up when closing."""
        if self._is_open:
            now = asyncio.get_running_loop().time()
            for drop in drops:
                drop.queued_at = now
            self._queue.extendleft(reversed(drops))

    def _place(self, group: Sequence[_Write | _Drop]) -> _Plan:
        """Say where in the active segment each record of the group goes. Changes no account."""
        plan = _Plan(self._active)
        offset = self._active.tail if self._active else 0
        for item in group:
            if isinstance(item, _Drop) or self._active is None:
                assert isinstance(item, _Drop), "a write is taken only into an active segment"
                plan.changes.append(item.change)
                continue
            self._sequence += 1
            location = Location(self._active.file.header.number, offset)
            plan.records.append(Appended(offset, self._sequence, item.identity, item.payload))
            plan.changes.append(Put(location, self._sequence, item.identity))
            plan.writes.append((item, location))
            offset += item.num_bytes
        return plan

    async def _make_durable(self, plan: _Plan) -> list[Extent]:
        """The order of these three is the promise of `write`."""
        await self._write_data(plan)
        await self._sync_data(plan)
        return await self._commit_index(plan)

    async def _write_data(self, plan: _Plan) -> None:
        if plan.segment and plan.records:
            runs = list(plan_runs(plan.records))
            lanes = [runs[lane::_WRITE_LANES] for lane in range(_WRITE_LANES)]
            file = plan.segment.file
            await self._pool.run_all([partial(_append, file, lane) for lane in lanes if lane])

    async def _sync_data(self, plan: _Plan) -> None:
        if plan.segment and plan.records:
            await self._pool.run(plan.segment.file.sync)

    async def _commit_index(self, plan: _Plan) -> list[Extent]:
        return await self._pool.run(partial(self._index.apply, plan.changes))

    def _account(self, decided: Iterable[Extent]) -> None:
        for extent in decided:
            segment = self._segments.get(extent.location.file)
            if segment is None:
                continue
            if extent.is_live:
                segment.enter(extent)
            else:
                segment.bury(extent)

    # ------------------------------------------------------------------ segments come and go

    async def _advance(self) -> None:
        """The active segment is full: the spare takes its place. No segment: the writes fail."""
        self._active = None
        if self._spare is None:
            try:
                self._spare = await self._make_segment()
            except KVFabricError as exc:
                _LOG.warning("no segment in %s: %s", self._directory, exc)
                _fail(self._take_writes(), exc)
                return
        self._active, self._spare = self._spare, None

    async def _keep_spare(self) -> None:
        if self._spare is None and self._active is not None and self._is_open:
            try:
                self._spare = await self._make_segment()
            except KVFabricError as exc:
                # Not needed yet: whoever needs it tries again, and gets the error.
                _LOG.warning("no spare segment in %s: %s", self._directory, exc)

    async def _make_segment(self) -> Segment:
        while self._file_bytes() + self._segment_bytes > self._capacity_bytes:
            await self._reclaim()
        segment = Segment(await self._pool.run(self._create_file))
        self._segments[segment.file.header.number] = segment
        return segment

    def _create_file(self) -> SegmentFile:
        """Blocking: a new file, in the index too."""
        # A file that could not be removed keeps its number.
        number = max(self._index.next_number(), *(n + 1 for n in numbers_in(self._directory)), 1)
        file = SegmentFile.create(self._directory, number, self._segment_bytes, direct=self._direct)
        try:
            self._index.add_segment(file.header)
        except KVFabricError:
            file.retire()
            file.unlink()
            raise
        failpoint("segment.create.registered")
        return file

    async def _reclaim(self) -> None:
        """Drop the oldest segment with all that is in it. Readers that hold it finish undisturbed."""
        in_use = (self._active, self._spare)
        oldest = next((s for s in self._ordered() if s not in in_use), None)
        if oldest is None:
            raise NoSpace(f"{self._directory} has no segment to reclaim: {self!r}")
        number = oldest.file.header.number
        # Out of the index first: what is gone must not come back after a crash.
        parts = await self._pool.run(partial(self._index.drop_segment, number))
        failpoint("segment.reclaim.forgotten")
        for first in range(0, len(parts), _DROPPED):
            self._on_dropped(parts[first : first + _DROPPED])
            await asyncio.sleep(0)
        await self._pool.run(oldest.file.unlink)
        failpoint("segment.reclaim.done")
        oldest.file.retire()
        del self._segments[number]

    def _ordered(self) -> list[Segment]:
        """Oldest first."""
        return [segment for _, segment in sorted(self._segments.items())]

    def _file_bytes(self) -> int:
        return sum(segment.file.header.num_bytes for segment in self._segments.values())

    def _closed(self) -> ClosedError:
        return ClosedError(f"SSD tier {self._directory} is not open")


def _append(file: SegmentFile, runs: Sequence[Sequence[Appended]]) -> None:
    for run in runs:
        file.append(run)


def _fail(writes: Iterable[_Write], error: KVFabricError) -> None:
    for write in writes:
        write.sealed.set_exception(type(error)(*error.args))
