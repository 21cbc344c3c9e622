"""Arena -> pool without a copy by the CPU: DMA of one chunk beside the verification of the one before.

    locate     many blocks a call               the node leases them already
    begin      DMA of a chunk into a buffer; then its checksums, of the buffer, on the device
    confirm    the slots were ours until now, else they are not used
    land       kernel: buffer -> pool

`run_in_place` brings bytes straight into the pool and verifies them there: out of another engine's HBM, or
some layers of all blocks at a time for an engine that has nothing else to do but to compute behind them.

Several chunks are open at a time, so the bus is busy while the node is asked. Whatever ends a load early,
nothing reads the arena and nothing writes the pool any more when `run` returns.

Blocks that also lie in another engine's HBM come from there (`shared_pools`), checked as the others. Where
that holds something else by now, this block and all behind it come out of the arena after all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvfabric.errors import RemoteProtocolError
from kvfabric.protocol.messages import Confirmed, Located
from kvfabric.types import MissReason
from kvfabric_engine.shared_pools import BorrowedPool, PoolPages, Stretch
from kvfabric_engine.staging import Arrival, Landing, LayerArrival, Pages

LOCATE_BYTES = 512 << 20
"""Asked for in one call: few calls, but no long one while blocks come from SSD."""
IN_PLACE_BYTES = 256 << 20
"""Copied and checked by one launch each: a launch takes as long as 64 MiB over NVLink."""


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


@dataclass(frozen=True, slots=True)
class _Piece:
    """Parts to come by one way. `pool`: whose HBM, None for the arena."""

    first: int
    located: Located
    pool: BorrowedPool | None = None
    pages: PoolPages | None = None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A piece on its way."""

    piece: _Piece
    arrival: Arrival


class DirectLoads:
    """Of one mapped arena. `close` before it is unmapped."""

    def __init__(self, landing: Landing, arena: memoryview) -> None:
        self.landing = landing
        self._arena_bytes = len(arena)

    def close(self) -> None:
        """No load is running. Idempotent."""
        self.landing.borrowed.close()
        self.landing.unpin()

    def run(self, calls: NodeCalls, blocks: Sequence[Pages], part_bytes: int) -> MissReason:
        """Load a part into each of `blocks` until one is missing; why it was, or NONE."""
        load = _Load(self, calls, blocks, part_bytes)
        try:
            return load.run()
        finally:
            self.landing.wait()

    def run_in_place(
        self,
        calls: NodeCalls,
        blocks: Sequence[Pages],
        part_bytes: int,
        num_layers: int,
        begun: Callable[[LayerArrival], None] | None,
    ) -> MissReason:
        """As `run`, but where that is faster the bytes are in `blocks` before they are verified, so what is
        not loaded may hold anything after it: all of them out of another engine's HBM, or layer by layer out
        of the arena. Of the latter `begun` is told when which layers will be there, and what is made of them
        counts only if all of this load does."""
        if begun is None and not self.landing.borrowed.owners:
            return self.run(calls, blocks, part_bytes)
        located = calls.locate(0, len(blocks))
        if located.num_blocks < len(blocks) or located.part_bytes != part_bytes:
            return self.run(calls, blocks, part_bytes)
        offsets = self.offsets(located)
        stretches = list(self.landing.borrowed.stretches(located))
        if all(one.pool for one in stretches):
            return self._run_borrowed(calls, blocks, located, stretches)
        lies_ready = not any(one.pool for one in stretches) and self.landing.covers(offsets)
        if begun is None or not lies_ready:
            return self.run(calls, blocks, part_bytes)
        return self._run_layers(calls, blocks, located, num_layers, begun)

    def _run_layers(
        self,
        calls: NodeCalls,
        blocks: Sequence[Pages],
        located: Located,
        num_layers: int,
        begun: Callable[[LayerArrival], None],
    ) -> MissReason:
        try:
            arrival = self.landing.begin_layers(self.offsets(located), blocks, num_layers)
            if arrival is None:
                return self.run(calls, blocks, located.part_bytes)
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

    def _run_borrowed(
        self,
        calls: NodeCalls,
        blocks: Sequence[Pages],
        located: Located,
        stretches: Sequence[Stretch],
    ) -> MissReason:
        """All of it is begun at once, checked batch by batch and confirmed in one call: over NVLink a batch
        takes less time than a call to the node."""
        step = max(1, IN_PLACE_BYTES // located.part_bytes)
        arrivals: list[tuple[int, LayerArrival]] = []
        good = 0
        try:
            for one in stretches:
                assert one.pool is not None
                assert one.pages is not None
                for start in range(one.start, one.stop, step):
                    stop = min(start + step, one.stop)
                    pages = one.pages[start - one.start : stop - one.start]
                    arrival = self.landing.begin_in_place(one.pool, pages, blocks[start:stop])
                    if arrival is None:
                        return self.run(calls, blocks, located.part_bytes)
                    arrivals.append((stop, arrival))
            for stop, arrival in arrivals:
                arrival.done.wait()
                part = parts_of(located, good, stop)
                good += num_good(part, self.landing.layer_checksums(arrival))
                if good < stop:
                    break
            confirmed = calls.confirm(0, parts_of(located, 0, good)) if good else None
        finally:
            self.landing.wait()
        usable = 0 if confirmed is None else min(good, confirmed.num_blocks)
        self.landing.borrowed.num_borrowed += usable
        if usable:
            calls.landed(0, usable)
        if confirmed is not None and usable < good:
            return MissReason(confirmed.reason or MissReason.EXPIRED)
        if good == located.num_blocks:
            return MissReason.NONE
        self.landing.borrowed.num_stale += located.num_blocks - good
        load = _Load(self, calls, blocks, located.part_bytes, first=good, shuns_pools=True)
        try:
            return load.run()
        finally:
            self.landing.wait()

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
        self,
        loads: DirectLoads,
        calls: NodeCalls,
        blocks: Sequence[Pages],
        part_bytes: int,
        *,
        first: int = 0,
        shuns_pools: bool = False,
    ) -> None:
        """`first`: of the blocks, those before are there. `shuns_pools`: take nothing out of others' HBM."""
        self._loads = loads
        self._calls = calls
        self._blocks = blocks
        self._part_bytes = part_bytes
        self._open: deque[_Chunk] = deque()
        self._waiting: deque[_Piece] = deque()  # to begin
        self._shuns_pools = shuns_pools  # also after one held something else
        self._next = first  # first block that was not located
        self._reason = MissReason.NONE
        self._is_over = False  # what comes after has no parent here

    def run(self) -> MissReason:
        most = self._loads.landing.max_arrivals
        while not self._is_over:
            if self._waiting and len(self._open) < most:
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
        piece = self._waiting.popleft()
        landing = self._loads.landing
        if piece.pool is not None and piece.pages is not None:
            self._open.append(_Chunk(piece, landing.begin_borrowed(piece.pool, piece.pages)))
            return
        offsets = self._loads.offsets(piece.located)
        if len(offsets) <= landing.chunk_parts and landing.covers(offsets):
            self._open.append(_Chunk(piece, landing.begin(offsets)))
        elif self._open:  # in the order of the chain
            self._waiting.appendleft(piece)
            self._finish(self._open.popleft())
        else:
            count, reason = self._calls.read(piece.first, piece.located)
            self._landed(piece, count, reason)

    def _locate(self) -> None:
        count = min(len(self._blocks) - self._next, max(1, LOCATE_BYTES // self._part_bytes))
        located = self._calls.locate(self._next, count)
        if located.num_blocks and located.part_bytes != self._part_bytes:
            raise RemoteProtocolError(f"parts of {located.part_bytes} B were not asked for")
        first, self._next = self._next, self._next + located.num_blocks
        if located.num_blocks < count:
            self._reason = MissReason(located.reason or MissReason.NONE)
            self._next = len(self._blocks)
        if located.num_blocks:
            self._queue(first, located)

    def _queue(self, first: int, located: Located) -> None:
        landing = self._loads.landing
        covered = landing.covers(self._loads.offsets(located))
        whole = [Stretch(0, located.num_blocks, None, None)]
        for one in whole if self._shuns_pools else landing.borrowed.stretches(located):
            # What the CPU reads it cuts itself.
            step = landing.chunk_parts if one.pool is not None or covered else one.stop - one.start
            for start in range(one.start, one.stop, step):
                stop = min(start + step, one.stop)
                pages = None
                if one.pages is not None:
                    pages = one.pages[start - one.start : stop - one.start]
                part = parts_of(located, start, stop)
                self._waiting.append(_Piece(first + start, part, one.pool, pages))

    def _finish(self, chunk: _Chunk) -> None:
        piece, landing = chunk.piece, self._loads.landing
        located = piece.located
        chunk.arrival.done.wait()
        good = num_good(located, landing.checksums(chunk.arrival))
        reason = MissReason.NONE if good == located.num_blocks else MissReason.CORRUPT
        usable = 0
        if good:
            confirmed = self._calls.confirm(piece.first, parts_of(located, 0, good))
            usable = min(good, confirmed.num_blocks)
            if usable < good:
                reason = MissReason(confirmed.reason or MissReason.EXPIRED)
        landing.land(chunk.arrival, self._blocks[piece.first : piece.first + usable])
        if piece.pool is not None:
            landing.borrowed.num_borrowed += usable
            if usable == good < located.num_blocks:
                self._landed(_Piece(piece.first, parts_of(located, 0, good)), good, MissReason.NONE)
                self._turn_to_the_arena(piece, good)
                return
        self._landed(piece, usable, reason)

    def _turn_to_the_arena(self, piece: _Piece, good: int) -> None:
        """From the piece's part `good` on: its pages hold something else, and those of the next will soon."""
        landing = self._loads.landing
        landing.borrowed.num_stale += piece.located.num_blocks - good
        self._shuns_pools = True
        for chunk in self._open:
            landing.land(chunk.arrival, [])
        rest = [chunk.piece for chunk in self._open] + list(self._waiting)
        self._open.clear()
        self._waiting.clear()
        left = parts_of(piece.located, good, piece.located.num_blocks)
        for one in (_Piece(piece.first + good, left), *rest):
            self._queue(one.first, one.located)

    def _landed(self, piece: _Piece, count: int, reason: MissReason) -> None:
        if count:
            self._calls.landed(piece.first, count)
        if count < piece.located.num_blocks:
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
