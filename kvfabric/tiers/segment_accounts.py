"""Accounts of the SSD tier: whose bytes are in which segment, and how fast bytes move. No I/O."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from kvfabric.tiers.base import RecordBatch, TierStatistics
from kvfabric.tiers.records import PAGE_BYTES
from kvfabric.tiers.segment_file import SegmentFile
from kvfabric.tiers.segment_index import Extent
from kvfabric.types import TenantId


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


@dataclass(slots=True, eq=False)
class Segment:
    """A file and the accounts of what is in it. Bytes in [PAGE_BYTES, tail) are records."""

    file: SegmentFile
    tail: int = PAGE_BYTES
    records: int = 0
    live: Counter[TenantId] = field(default_factory=Counter)
    dead: Counter[TenantId] = field(default_factory=Counter)

    @property
    def room(self) -> int:
        return self.file.header.num_bytes - self.tail

    def load(self, batch: RecordBatch) -> None:
        """All that was found in it."""
        if not len(batch):
            return
        sizes = PAGE_BYTES + -(-batch.rows["num_bytes"].astype(np.int64) // PAGE_BYTES) * PAGE_BYTES
        live = batch.rows["is_live"] != 0
        self.tail = int(batch.rows["offset"][-1]) + int(sizes[-1])
        self.records = int(live.sum())
        lineages = batch.rows["lineage"]
        for number in batch.used_lineages():
            tenant, own = batch.lineages[number].tenant, lineages == number
            self.live[tenant] += int(sizes[own & live].sum())
            self.dead[tenant] += int(sizes[own & ~live].sum())

    def enter(self, extent: Extent) -> None:
        """A record that was added."""
        self.tail = max(self.tail, extent.location.offset + extent.num_bytes)
        self.records += 1
        self.live[extent.tenant] += extent.num_bytes

    def bury(self, extent: Extent) -> None:
        """A live record that is not any more."""
        self.records -= 1
        self.live[extent.tenant] -= extent.num_bytes
        self.dead[extent.tenant] += extent.num_bytes


@dataclass(slots=True)
class Busy:
    """Bytes moved, and the time in which at least one movement was under way."""

    clock: Callable[[], float]
    num_bytes: int = 0
    elapsed_s: float = 0.0
    _under_way: int = 0
    _since: float = 0.0

    @contextlib.contextmanager
    def moving(self, num_bytes: int) -> Iterator[None]:
        """Counts the bytes when the movement succeeded."""
        if not self._under_way:
            self._since = self.clock()
        self._under_way += 1
        try:
            yield
            self.num_bytes += num_bytes
        finally:
            self._under_way -= 1
            if not self._under_way:
                self.elapsed_s += self.clock() - self._since
