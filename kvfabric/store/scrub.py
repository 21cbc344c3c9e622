"""The scrubbers: re-check the bytes at rest against their checksums, a slice at a time.

Nothing is held meanwhile, so scrubbing neither delays an eviction nor makes a block look used. A slot
that was freed and written anew while it was read has another generation afterwards: that is no corruption.
The SSD tier reads its records past the page cache, header and payload, and takes out what does not verify.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from kvfabric.store.copying import corrupt_parts
from kvfabric.store.index import HOST, Array, Rows
from kvfabric.store.residency import Residency
from kvfabric.store.turns import Turns
from kvfabric.tiers.base import Scrubbed
from kvfabric.tiers.pool import IoPool

SLICE_PARTS = 128
"""Of one slice: the pool's thread takes the interpreter for each, and the loop must get its turn."""
SLICE_BYTES = 8 * 1024 * 1024

_WALK_ROWS = 16_384
"""Rows looked at for the next that have bytes."""


SSD_SLICE_BYTES = 8 * 1024 * 1024


class ScrubReport(NamedTuple):
    """What a whole round came to, both tiers. `unreadable`: the medium failed; their bytes are unknown."""

    arena_parts: int = 0
    arena_corrupt: int = 0
    ssd_records: int = 0
    ssd_bytes: int = 0
    ssd_corrupt: int = 0
    ssd_unreadable: int = 0

    def __add__(self, other: object) -> ScrubReport:
        assert isinstance(other, ScrubReport)
        return ScrubReport(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Scrubbable(Protocol):
    """A `Tier`, or what stands before it."""

    async def scrub(self, num_bytes: int, *, anew: bool = False) -> Scrubbed: ...


async def scrub_ssd(ssd: Scrubbable, turns: Turns) -> ScrubReport:
    """One whole round, anew. Raises what `scrub` raises. On cancellation: what was found so far is out."""
    report, anew = ScrubReport(), True
    while True:
        await turns.wait()
        done = await ssd.scrub(SSD_SLICE_BYTES, anew=anew)
        if done.is_round:
            return report
        found = (done.records, done.num_bytes, len(done.corrupt), done.unreadable)
        report, anew = report + ScrubReport(0, 0, *found), False


class _Batch(NamedTuple):
    """Parts to be checked: vectors of one length."""

    rows: Rows
    parts: Rows
    lengths: Array

    @property
    def num_bytes(self) -> int:
        return int(self.lengths.sum())


class Scrubber:
    """`drop` takes a block out of both tiers. `corrupt` counts parts from the start."""

    def __init__(
        self, residency: Residency, pool: IoPool, turns: Turns, drop: Callable[[int], None]
    ) -> None:
        self.corrupt = 0
        self._residency = residency
        self._index = residency.index
        self._pool = pool
        self._turns = turns
        self._drop = drop
        self._last_row = 0

    async def scrub(self, num_bytes: int) -> int:
        """Check about the next `num_bytes`, from where the last call ended, once round at most; how many
        parts were corrupt. On cancellation: what was found so far is out."""
        found, walked = 0, 0
        while num_bytes > 0 and walked <= self._index.highest_row:
            await self._turns.wait()
            rows, passed = self._next_rows(min(num_bytes, SLICE_BYTES))
            walked += passed
            for batch in self._batches(rows):
                found += await self._check(batch)
                num_bytes -= batch.num_bytes
        return found

    async def scrub_arena(self) -> ScrubReport:
        """Check every part that is there from the first row to the last. On cancellation: as `scrub`."""
        checked, found, start = 0, 0, 1
        while start <= self._index.highest_row:
            rows = np.arange(start, min(start + SLICE_PARTS, self._index.highest_row + 1))
            start += SLICE_PARTS
            present = rows[self._index.host_parts.array[rows] > 0].astype(np.uint32)
            checked += int(self._index.host_parts.array[present].sum())
            found += await self.recheck(present)
        return ScrubReport(arena_parts=checked, arena_corrupt=found)

    async def recheck(self, rows: Rows) -> int:
        """Check the parts of these blocks now; how many were corrupt. On cancellation: as `scrub`."""
        found = 0
        for start in range(0, len(rows), SLICE_PARTS):
            await self._turns.wait()
            for batch in self._batches(rows[start : start + SLICE_PARTS]):
                found += await self._check(batch)
        return found

    def _next_rows(self, num_bytes: int) -> tuple[Rows, int]:
        """Rows with about so many bytes in the arena; how many rows were passed to find them."""
        index = self._index
        start = self._last_row + 1
        end = min(start + _WALK_ROWS, index.highest_row + 1)
        present = np.flatnonzero(index.host_parts.array[start:end]).astype(np.uint32)
        present += np.uint32(start)
        sizes = np.cumsum(index.block_bytes_of(present))
        num_parts = np.cumsum(index.host_parts.array[present], dtype=np.int64)
        count = 1 + int(
            min(
                np.searchsorted(sizes, num_bytes),
                np.searchsorted(num_parts, SLICE_PARTS),
            )
        )
        if count < len(present):
            self._last_row = int(present[count - 1])
            return present[:count], self._last_row + 1 - start
        self._last_row = end - 1 if end <= index.highest_row else 0
        return present, max(1, end - start)

    def _batches(self, rows: Rows) -> list[_Batch]:
        """Their parts in the arena, by lineage and ordinal."""
        index, batches = self._index, []
        lineages = index.lineage.array[rows]
        for lineage in set(lineages.tolist()):
            own = rows[lineages == lineage]
            layout = index.layouts[index.lineage_of(lineage).layout_fingerprint]
            for ordinal, spec in enumerate(layout.specs):
                parts = index.parts(own, ordinal)
                there = (index.part_state.array[parts] & HOST) != 0
                lengths = np.full(int(there.sum()), spec.num_bytes, dtype=np.int64)
                batches.append(_Batch(own[there], parts[there], lengths))
        return batches

    async def _check(self, batch: _Batch) -> int:
        index, arena = self._index, self._residency.arena
        if arena is None or not len(batch.parts):
            return 0
        generations = index.part_generation.array[batch.parts]
        sums = index.part_checksum[batch.parts].tobytes()
        pages, lengths = index.part_page.array[batch.parts].tolist(), batch.lengths.tolist()
        suspects = await self._pool.run(partial(corrupt_parts, arena.view, pages, lengths, sums))
        found = 0
        for at in suspects:
            part = int(batch.parts[at])
            there = index.part_state.cell[part] & HOST
            if there and index.part_generation.cell[part] == generations[at]:
                found += 1
                self._drop(int(batch.rows[at]))
        self.corrupt += found
        return found
