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
import queue
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
    start: int  # of its parts among those of the answer
    located: Located
    arrival: Arrival
    verification: Verification


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

    def verify(self, located: Located) -> Verification:
        """Begin to verify parts where they lie, about in order."""
        return Verification(
            self._checkers, self._num_checkers, self._arena, located, self.offsets(located)
        )

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


class Verification:
    """Parts of one answer of the node, checked by several threads. For the thread that made it."""

    def __init__(
        self,
        checkers: ThreadPoolExecutor,
        num_checkers: int,
        arena: memoryview,
        located: Located,
        offsets: Sequence[int],
    ) -> None:
        self._arena = arena
        self._located = located
        self._offsets = offsets
        self._found: dict[int, bool] = {}
        self._results: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
        self._is_over = False
        step = min(num_checkers, located.num_blocks)
        self._jobs = [checkers.submit(self._check, start, step) for start in range(step)]
        for job in self._jobs:
            job.add_done_callback(self._ended)

    def num_good(self, start: int, stop: int) -> int:
        """How many leading parts of [start, stop) verified. Waits for them."""
        for index in range(start, stop):
            while index not in self._found:
                checked, is_good = self._results.get()
                if checked < 0 and not is_good:
                    raise RemoteProtocolError("a thread that verifies parts failed")
                self._found[checked] = is_good
            if not self._found[index]:
                return index - start
        return stop - start

    def give_up(self) -> None:
        """Returns when no thread reads the arena for this any more."""
        self._is_over = True
        for job in self._jobs:
            job.exception()

    def _check(self, start: int, step: int) -> None:
        located, size = self._located, self._located.part_bytes
        for index in range(start, located.num_blocks, step):
            if self._is_over:
                return
            part = self._arena[self._offsets[index] : self._offsets[index] + size]
            expected = located.checksums[16 * index : 16 * index + 16]
            self._results.put((index, xxhash.xxh3_128_digest(part) == expected))

    def _ended(self, job: Future[None]) -> None:
        self._results.put((-1, job.exception() is None))


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
        self._waiting: deque[tuple[int, int, Located, Verification]] = deque()  # chunks to begin
        self._verifications: list[Verification] = []
        self._next = 0  # first block that was not located
        self._reason = MissReason.NONE
        self._is_over = False  # what comes after has no parent here

    def run(self) -> MissReason:
        while not self._is_over:
            if len(self._open) < 2 and self._waiting:
                self._begin()
            elif len(self._open) < 2 and self._can_locate():
                self._locate()
            elif self._open:
                self._finish(self._open.popleft())
            else:
                break
        return self._reason

    def give_up(self) -> None:
        """Wait for the verification of what is not used any more."""
        for verification in self._verifications:
            verification.give_up()

    def _can_locate(self) -> bool:
        return self._next < len(self._blocks) and self._reason is MissReason.NONE

    def _begin(self) -> None:
        first, start, located, verification = self._waiting.popleft()
        arrival = self._loads.landing.begin(self._loads.offsets(located))
        self._open.append(_Chunk(first, start, located, arrival, verification))

    def _locate(self) -> None:
        count = min(len(self._blocks) - self._next, max(1, LOCATE_BYTES // self._part_bytes))
        located = self._calls.locate(self._next, count)
        if located.num_blocks and located.part_bytes != self._part_bytes:
            raise RemoteProtocolError(f"parts of {located.part_bytes} B were not asked for")
        first, self._next = self._next, self._next + located.num_blocks
        if located.num_blocks < count:
            self._reason = MissReason(located.reason or MissReason.NONE)
            self._next = len(self._blocks)
        if located.num_blocks and self._loads.landing.covers(self._loads.offsets(located)):
            self._verify(first, located)
        elif located.num_blocks:
            self._read(first, located)

    def _verify(self, first: int, located: Located) -> None:
        verification = self._loads.verify(located)
        self._verifications.append(verification)
        step = self._loads.landing.chunk_parts
        for start in range(0, located.num_blocks, step):
            chunk = parts_of(located, start, min(start + step, located.num_blocks))
            self._waiting.append((first + start, start, chunk, verification))

    def _read(self, first: int, located: Located) -> None:
        while self._open and not self._is_over:  # in the order of the chain
            self._finish(self._open.popleft())
        if not self._is_over:
            count, reason = self._calls.read(first, located)
            self._landed(first, count, located, reason)

    def _finish(self, chunk: _Chunk) -> None:
        located = chunk.located
        chunk.arrival.done.wait()
        good = chunk.verification.num_good(chunk.start, chunk.start + located.num_blocks)
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
