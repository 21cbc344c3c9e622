"""Arena -> pool without a copy by the CPU: DMA of one chunk beside the verification of the one before.

    locate     many blocks a call                        the node leases them already
    begin      DMA of a chunk into a buffer              \\ both read the arena
    check      XXH3-128 of the same slots, by threads    /
    confirm    the slots were ours until now, else they are not used
    land       kernel: buffer -> pool

Two chunks are open at a time, so the bus is busy while the node is asked. Whatever ends a load early, nothing
reads the arena and nothing writes the pool any more when `run` returns.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash

from kvfabric.errors import RemoteProtocolError
from kvfabric.protocol.messages import Confirmed, Located
from kvfabric.types import MissReason
from kvfabric_engine.staging import Arrival, Landing, Pages

MAX_CHECKERS = 8
"""Threads that verify. One does 10 GB/s or so, the bus 55."""
LOCATE_BYTES = 512 << 20
"""Asked for in one call: few calls, but no long one while blocks come from SSD."""


@dataclass(frozen=True, slots=True)
class NodeCalls:
    """The node, as far as one load needs it. Blocks are counted from the load's first."""

    locate: Callable[[int, int], Located]
    """(first block, number of blocks)"""

    confirm: Callable[[int, Located], Confirmed]
    """(first block, the verified parts)"""

    read: Callable[[int, Located], tuple[int, MissReason]]
    """(first block, parts) -> how many were brought in by the CPU: for what is not page-locked yet."""

    landed: Callable[[int, int], None]
    """(first block, number of blocks) were handed to the pool."""


@dataclass(slots=True)
class _Chunk:
    first: int
    located: Located
    arrival: Arrival
    checks: list[Future[int]]


class DirectLoads:
    """Of one mapped arena. `close` before it is unmapped."""

    def __init__(self, landing: Landing, arena: memoryview) -> None:
        self.landing = landing
        self._arena = arena
        self._num_checkers = max(1, min(MAX_CHECKERS, (os.cpu_count() or 1) // 2))
        self._checkers = ThreadPoolExecutor(self._num_checkers, "kvf-check")

    def close(self) -> None:
        """No load is running. Idempotent."""
        self._checkers.shutdown(wait=True)
        self.landing.unpin()
        self._arena = memoryview(b"")

    def run(self, calls: NodeCalls, blocks: Sequence[Pages], part_bytes: int) -> MissReason:
        """Load a part into each of `blocks` until one is missing; why it was, or NONE."""
        load = _Load(self, calls, blocks, part_bytes)
        try:
            return load.run()
        finally:
            load.give_up()
            self.landing.wait()

    def check(self, located: Located) -> list[Future[int]]:
        """Verify parts where they lie; each future gives the first bad one it met, or their number."""
        step = min(self._num_checkers, located.num_blocks)
        return [
            self._checkers.submit(self._check_some, located, start, step) for start in range(step)
        ]

    def offsets(self, located: Located) -> list[int]:
        """Where the parts lie. Raises RemoteProtocolError for one outside the arena."""
        count = located.num_blocks
        offsets = np.frombuffer(located.offsets, dtype="<u8")
        if len(offsets) < count or len(located.checksums) < 16 * count:
            raise RemoteProtocolError(f"{count} parts located, but {len(offsets)} described")
        last = len(self._arena) - located.part_bytes
        if count and (last < 0 or int(offsets[:count].max()) > last):
            raise RemoteProtocolError("a located part lies outside the arena")
        found: list[int] = offsets[:count].tolist()
        return found

    def _check_some(self, located: Located, start: int, step: int) -> int:
        size, offsets = located.part_bytes, self.offsets(located)
        for index in range(start, located.num_blocks, step):
            part = self._arena[offsets[index] : offsets[index] + size]
            if xxhash.xxh3_128_digest(part) != located.checksums[16 * index : 16 * index + 16]:
                return index
        return located.num_blocks


class _Load:
    """One load under way."""

    def __init__(
        self, loads: DirectLoads, calls: NodeCalls, blocks: Sequence[Pages], part_bytes: int
    ) -> None:
        self._loads = loads
        self._calls = calls
        self._blocks = blocks
        self._part_bytes = part_bytes
        self._open: deque[_Chunk] = deque()
        self._located: deque[tuple[int, Located]] = deque()  # chunks to begin
        self._next = 0  # first block that was not located
        self._reason = MissReason.NONE
        self._is_over = False  # what comes after has no parent here

    def run(self) -> MissReason:
        while not self._is_over:
            if len(self._open) < 2 and (self._located or self._can_locate()):
                self._begin()
            elif self._open:
                self._finish(self._open.popleft())
            else:
                break
        return self._reason

    def give_up(self) -> None:
        """Wait for the verification of what is not used any more."""
        for chunk in self._open:
            for check in chunk.checks:
                check.exception()

    def _can_locate(self) -> bool:
        return self._next < len(self._blocks) and self._reason is MissReason.NONE

    def _begin(self) -> None:
        if not self._located:
            self._locate()
            if not self._located:
                return
        first, located = self._located.popleft()
        landing = self._loads.landing
        offsets = self._loads.offsets(located)
        if landing.covers(offsets):
            checks = self._loads.check(located)
            self._open.append(_Chunk(first, located, landing.begin(offsets), checks))
            return
        while self._open and not self._is_over:  # in the order of the chain
            self._finish(self._open.popleft())
        if not self._is_over:
            count, reason = self._calls.read(first, located)
            self._landed(first, count, located, reason)

    def _locate(self) -> None:
        count = min(len(self._blocks) - self._next, max(1, LOCATE_BYTES // self._part_bytes))
        located = self._calls.locate(self._next, count)
        if located.num_blocks and located.part_bytes != self._part_bytes:
            raise RemoteProtocolError(f"parts of {located.part_bytes} B were not asked for")
        step = self._loads.landing.chunk_parts
        for start in range(0, located.num_blocks, step):
            stop = min(start + step, located.num_blocks)
            self._located.append((self._next + start, parts_of(located, start, stop)))
        self._next += located.num_blocks
        if located.num_blocks < count:
            self._reason = MissReason(located.reason or MissReason.NONE)
            self._next = len(self._blocks)

    def _finish(self, chunk: _Chunk) -> None:
        located = chunk.located
        chunk.arrival.done.wait()
        good = min(check.result() for check in chunk.checks)
        reason = MissReason.NONE if good == located.num_blocks else MissReason.CORRUPT
        usable = 0
        if good:
            confirmed = self._calls.confirm(chunk.first, parts_of(located, 0, good))
            usable = min(good, confirmed.num_blocks)
            if usable < good:
                reason = MissReason(confirmed.reason or MissReason.EXPIRED)
        self._loads.landing.land(chunk.arrival, self._blocks[chunk.first : chunk.first + usable])
        self._landed(chunk.first, usable, located, reason)

    def _landed(self, first: int, count: int, located: Located, reason: MissReason) -> None:
        if count:
            self._calls.landed(first, count)
        if count < located.num_blocks:
            self._reason, self._is_over = reason, True


def parts_of(located: Located, start: int, stop: int) -> Located:
    """Parts [start, stop) of what was located."""
    return Located(
        stop - start,
        located.part_bytes,
        located.offsets[8 * start : 8 * stop],
        located.generations[4 * start : 4 * stop],
        located.checksums[16 * start : 16 * stop],
        "",
    )
