"""Arena -> pool without a copy by the CPU: DMA of one chunk beside the verification of the one before.

    locate     many blocks a call               the node leases them already
    begin      DMA of a chunk into a buffer; then its checksums, of the buffer, on the device
    confirm    the slots were ours until now, else they are not used
    land       kernel: buffer -> pool

`run_layers` instead brings some layers of all blocks at a time straight into the pool, for an engine that has
nothing else to do but to compute behind them, and verifies there.

Several chunks are open at a time, so the bus is busy while the node is asked. Whatever ends a load early,
nothing reads the arena and nothing writes the pool any more when `run` returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvfabric.errors import RemoteProtocolError
from kvfabric.protocol.messages import Confirmed, Located
from kvfabric.types import MissReason
from kvfabric_engine.staging import Arrival, Landing, LayerArrival, Pages

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


class DirectLoads:
    """Of one mapped arena. `close` before it is unmapped."""

    def __init__(self, landing: Landing, arena: memoryview) -> None:
        self.landing = landing
        self._arena_bytes = len(arena)

    def close(self) -> None:
        """No load is running. Idempotent."""
        self.landing.unpin()

    def run(self, calls: NodeCalls, blocks: Sequence[Pages], part_bytes: int) -> MissReason:
        """Load a part into each of `blocks` until one is missing; why it was, or NONE."""
        load = _Load(self, calls, blocks, part_bytes)
        try:
            return load.run()
        finally:
            self.landing.wait()

    def run_layers(
        self,
        calls: NodeCalls,
        blocks: Sequence[Pages],
        part_bytes: int,
        num_layers: int,
        begun: Callable[[LayerArrival], None],
    ) -> MissReason:
        """As `run`, but the bytes are in `blocks` before they are verified: `begun` is told when which layers
        will be, and what is made of them counts only if all of this load does. A load that cannot go so goes
        as `run` does, and `begun` is not called."""
        located = calls.locate(0, len(blocks))
        if located.num_blocks < len(blocks) or located.part_bytes != part_bytes:
            return self.run(calls, blocks, part_bytes)
        offsets = self.offsets(located)
        if not self.landing.covers(offsets):
            return self.run(calls, blocks, part_bytes)
        try:
            arrival = self.landing.begin_layers(offsets, blocks, num_layers)
            if arrival is None:
                return self.run(calls, blocks, part_bytes)
            begun(arrival)
            arrival.done.wait()
            good = num_good(located, self.landing.layer_checksums(arrival))
            usable = calls.confirm(0, parts_of(located, 0, good)).num_blocks if good else 0
        finally:
            self.landing.wait()
        usable = min(good, usable)
        if usable:
            calls.landed(0, usable)
        if good < located.num_blocks:
            return MissReason.CORRUPT
        return MissReason.NONE if usable == good else MissReason.EXPIRED

    def offsets(self, located: Located) -> list[int]:
        """Where the parts lie. Raises RemoteProtocolError for one outside the arena."""
        count = located.num_blocks
        offsets = np.frombuffer(located.offsets, dtype="<u8")
        if len(offsets) < count or len(located.checksums) < 16 * count:
            raise RemoteProtocolError(f"{count} parts located, but {len(offsets)} described")
        last = self._arena_bytes - located.part_bytes
        if count and (last < 0 or int(offsets[:count].max()) > last):
            raise RemoteProtocolError("a located part lies outside the arena")
        found: list[int] = offsets[:count].tolist()
        return found


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
        self._waiting: deque[tuple[int, Located]] = deque()  # chunks to begin
        self._next = 0  # first block that was not located
        self._reason = MissReason.NONE
        self._is_over = False  # what comes after has no parent here

    def run(self) -> MissReason:
        most = self._loads.landing.max_arrivals
        while not self._is_over:
            if len(self._open) < most and self._waiting:
                self._begin()
            elif len(self._open) < most and self._can_locate():
                self._locate()
            elif self._open:
                self._finish(self._open.popleft())
            else:
                break
        return self._reason

    def _can_locate(self) -> bool:
        return self._next < len(self._blocks) and self._reason is MissReason.NONE

    def _begin(self) -> None:
        first, located = self._waiting.popleft()
        arrival = self._loads.landing.begin(self._loads.offsets(located))
        self._open.append(_Chunk(first, located, arrival))

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
            self._queue(first, located)
        elif located.num_blocks:
            self._read(first, located)

    def _queue(self, first: int, located: Located) -> None:
        step = self._loads.landing.chunk_parts
        for start in range(0, located.num_blocks, step):
            chunk = parts_of(located, start, min(start + step, located.num_blocks))
            self._waiting.append((first + start, chunk))

    def _read(self, first: int, located: Located) -> None:
        while self._open and not self._is_over:  # in the order of the chain
            self._finish(self._open.popleft())
        if not self._is_over:
            count, reason = self._calls.read(first, located)
            self._landed(first, count, located, reason)

    def _finish(self, chunk: _Chunk) -> None:
        located = chunk.located
        chunk.arrival.done.wait()
        good = num_good(located, self._loads.landing.checksums(chunk.arrival))
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


def num_good(located: Located, checksums: Sequence[bytes]) -> int:
    """How many leading parts have the checksums that they were stored with."""
    expected = located.checksums
    for index, found in enumerate(checksums):
        if found != expected[16 * index : 16 * index + 16]:
            return index
    return located.num_blocks


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
