"""What one SSD directory holds while a tier is open: its lock, its index, its files and their accounts.

No decisions: `segments` says what is written, `segment_reclaim` which file comes and goes. Methods that are
called blocking are run in the tier's pool, the others on its event loop.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvfabric.errors import ConfigError
from kvfabric.failpoints import failpoint
from kvfabric.tiers import direct_io
from kvfabric.tiers.base import Location, RecordBatch
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.record_cipher import RecordCipher
from kvfabric.tiers.records import PAGE_BYTES, record_bytes
from kvfabric.tiers.segment_accounts import Segment
from kvfabric.tiers.segment_file import SegmentFile, numbers_in, path_of
from kvfabric.tiers.segment_groups import Plan
from kvfabric.tiers.segment_index import Extent, SegmentIndex
from kvfabric.tiers.segment_recovery import recover

_LOG = logging.getLogger(__name__)


class SegmentDirectory:
    """`segments` by number; `active` is filled, `spare` is empty and next. `condemned`: found corrupt, and
    live in the index until the next commit. `unavailable`: bytes of files that did not open."""

    def __init__(
        self, path: Path, *, capacity_bytes: int, segment_bytes: int, ops: FileOps
    ) -> None:
        self.path = path
        self.capacity_bytes = capacity_bytes
        self.segment_bytes = segment_bytes
        self.ops = ops
        self.cipher: RecordCipher | None = None
        self.lock_fd = -1
        self.index = SegmentIndex(path, 0, ops)
        self.segments: dict[int, Segment] = {}
        self.active: Segment | None = None
        self.spare: Segment | None = None
        self.unavailable: dict[int, int] = {}
        self.condemned: set[Location] = set()
        self._stray_bytes = 0
        self._sequence = 0
        # What recovery read, of files in which nothing changed since, until it is asked for.
        self._recovered: dict[int, RecordBatch] = {}

    def __repr__(self) -> str:
        return (
            f"<SegmentDirectory {self.path}: {len(self.segments)} files, {self.file_bytes} bytes>"
        )

    # ------------------------------------------------------------------ open and close

    def check_sizes(self) -> None:
        """Raises ConfigError for sizes that cannot be."""
        if self.segment_bytes % PAGE_BYTES or self.segment_bytes < 2 * PAGE_BYTES:
            raise ConfigError(f"a segment of {self.segment_bytes} bytes is not two pages or more")
        if self.capacity_bytes < 2 * self.segment_bytes:
            raise ConfigError(
                f"an SSD tier of {self.capacity_bytes} bytes does not hold two segments of "
                f"{self.segment_bytes}"
            )

    def recover(self) -> bool:
        """Blocking: lock it and find out what is in it. Nothing else runs yet. Whether files were there
        without a sound index."""
        self._lock()
        found = recover(self.path, self.capacity_bytes, self.ops, self.cipher)
        self.index, self.segments = found.index, found.segments
        self.active, self.spare = found.active, found.spare
        self.unavailable = found.unavailable
        self._recovered = found.live
        self._sequence = self.index.next_sequence()
        return found.is_rebuilt

    def _lock(self) -> None:
        """Blocking: make the directory and become its only user, until the process ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = self.path / "lock"
            if self.lock_fd >= 0 and not _is_at(path, self.lock_fd):
                self.ops.close(self.lock_fd)  # of another directory
                self.lock_fd = -1
            if self.lock_fd < 0:
                self.lock_fd = self.ops.open(path, os.O_CREAT | os.O_RDWR)
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ConfigError(f"SSD directory {self.path} is in use by another daemon") from exc
        except OSError as exc:
            raise ConfigError(f"SSD directory {self.path}: {exc.strerror}") from exc

    def close(self) -> None:
        for segment in self.segments.values():
            segment.file.retire()
        self.index.close()
        if self.lock_fd >= 0:
            self.ops.close(self.lock_fd)
            self.lock_fd = -1

    # ------------------------------------------------------------------ records

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def batches(self) -> Iterator[RecordBatch]:
        """What is live in each file. Lazy."""
        for number in sorted(self.segments):
            if number in self.segments:
                live = self._recovered.pop(number, None)
                if live is None:
                    live = self.index.live(number)
                if len(live):
                    yield live

    def account(self, plan: Plan, buried: Iterable[Extent]) -> None:
        """A plan is durable."""
        for location in (*(put.location for put in plan.puts), *plan.forgets):
            self._recovered.pop(location.file, None)
        for put in plan.puts:
            assert plan.segment is not None
            size = record_bytes(put.identity.num_bytes)
            plan.segment.enter(Extent(put.location, size, put.identity.tenant))
        for extent in buried:
            self.condemned.discard(extent.location)
            segment = self.segments.get(extent.location.file)
            if segment is not None:
                segment.bury(extent)

    # ------------------------------------------------------------------ files

    @property
    def file_bytes(self) -> int:
        """Of all files of the tier, also those that ought to be gone."""
        files = (segment.file.header.num_bytes for segment in self.segments.values())
        return self._stray_bytes + sum(self.unavailable.values()) + sum(files)

    @property
    def has_room(self) -> bool:
        """Whether one more file fits the capacity."""
        return self.file_bytes + self.segment_bytes <= self.capacity_bytes

    @property
    def is_direct(self) -> bool:
        return all(segment.file.direct for segment in self.segments.values())

    def oldest(self) -> Segment | None:
        """Of those that are neither filled nor spare."""
        in_use = (self.active, self.spare)
        ordered = (segment for _, segment in sorted(self.segments.items()))
        return next((segment for segment in ordered if segment not in in_use), None)

    def enter(self, file: SegmentFile) -> Segment:
        """A file that was made."""
        segment = self.segments[file.header.number] = Segment(file)
        return segment

    def empty(self, segment: Segment) -> None:
        """Nothing in it counts any more: it is out of the index, and about to be removed."""
        number = segment.file.header.number
        segment.live.clear()
        segment.dead.clear()
        segment.records = 0
        self._recovered.pop(number, None)
        self.condemned = {place for place in self.condemned if place.file != number}

    def leave(self, segment: Segment) -> None:
        """Its file is removed."""
        segment.file.retire()
        del self.segments[segment.file.header.number]

    def make_file(self) -> SegmentFile:
        """Blocking: a new file, in the index too."""
        on_disk = numbers_in(self.ops, self.path)
        # A file that could not be removed keeps its number.
        number = max(self.index.next_number(), *(n + 1 for n in on_disk), 1)
        file = SegmentFile.create(self.ops, self.path, number, self.segment_bytes, self.cipher)
        try:
            self.index.add_segment(file.header)
        except BaseException:
            file.retire()
            file.unlink()
            raise
        failpoint("segment.create.registered")
        if self.ops.direct and not file.direct:
            _LOG.warning("%s refuses O_DIRECT: SSD I/O goes through the page cache", self.path)
        return file

    def clear(self) -> None:
        """Blocking: remove files that belong to no segment; those that stay are counted."""
        stay = 0
        known = self.segments.keys() | self.unavailable.keys()
        for number in set(numbers_in(self.ops, self.path)) - known:
            path = path_of(self.path, number)
            try:
                self.ops.unlink(path)
            except OSError:
                with direct_io.translated(f"look at {path}"):
                    stay += self.ops.file_bytes(path)
        self._stray_bytes = stay


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
