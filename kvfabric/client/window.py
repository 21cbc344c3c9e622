"""The window: the one piece of memory that an engine writes and its node reads.

A window region and who may touch it:

    FREE --allocate--> OWNED --commit sent--> HELD --answer--> OWNED --free--> FREE
                                               |                                ^
                                               +-- free --> QUARANTINED --answer+

Between commit and its answer the daemon reads the region, however late it is: a deadline ends the wait,
never the hold. A quarantined region comes back with the answer, or with the next connection's window.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

from kvfabric.errors import LocalProtocolError

WINDOW_ALIGN_BYTES = 256


class Window:
    """Regions of this connection's window. Thread-safe. First fit, neighbours merge when freed."""

    def __init__(self, buffer: memoryview) -> None:
        """`buffer`: writable bytes, mapped from the descriptor the node sent; empty for none."""
        self._buffer = buffer
        self._lock = threading.Lock()
        self._gaps: list[tuple[int, int]] = [(0, len(buffer))] if len(buffer) else []
        self._regions: dict[int, int] = {}  # start -> size, of everything not free
        self._starts: list[int] = []
        self._holds: dict[int, int] = {}  # start -> unanswered commits that read it
        self._quarantined: set[int] = set()

    def __repr__(self) -> str:
        return (
            f"<Window {self.num_free_bytes}/{len(self._buffer)} B free, {len(self._regions)} "
            f"regions, {len(self._quarantined)} quarantined>"
        )

    @property
    def num_bytes(self) -> int:
        return len(self._buffer)

    @property
    def num_free_bytes(self) -> int:
        with self._lock:
            return sum(size for _, size in self._gaps)

    def allocate(self, num_bytes: int) -> int | None:
        """Offset of a region of `num_bytes`, aligned to 256; None when there is no room now."""
        if num_bytes <= 0:
            raise LocalProtocolError(f"a window region has at least one byte, not {num_bytes}")
        size = -(-num_bytes // WINDOW_ALIGN_BYTES) * WINDOW_ALIGN_BYTES
        with self._lock:
            for index, (start, gap) in enumerate(self._gaps):
                if gap < size:
                    continue
                if gap == size:
                    del self._gaps[index]
                else:
                    self._gaps[index] = (start + size, gap - size)
                self._regions[start] = size
                insort(self._starts, start)
                return start
        return None

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """Writable bytes inside one region. Not to be written between commit and its answer."""
        with self._lock:
            start = self._region_of(offset)
            if offset + num_bytes > start + self._regions[start]:
                raise LocalProtocolError(
                    f"{num_bytes} B at {offset} leave the region of {self._regions[start]} B "
                    f"at {start}"
                )
        return self._buffer[offset : offset + num_bytes]

    def free(self, offset: int) -> None:
        """Give a region back; while a commit of it is unanswered it is quarantined instead."""
        with self._lock:
            if offset not in self._regions or offset in self._quarantined:
                raise LocalProtocolError(f"no window region starts at {offset}")
            if offset in self._holds:
                self._quarantined.add(offset)
            else:
                self._free(offset)

    def hold(self, offsets: Sequence[int]) -> tuple[int, ...]:
        """The regions that `offsets` lie in are read by the node until `unhold` of what this returns."""
        with self._lock:
            starts = tuple({self._region_of(offset) for offset in offsets})
            for start in starts:
                self._holds[start] = self._holds.get(start, 0) + 1
            return starts

    def unhold(self, starts: Sequence[int]) -> None:
        with self._lock:
            for start in starts:
                self._holds[start] -= 1
                if self._holds[start]:
                    continue
                del self._holds[start]
                if start in self._quarantined:
                    self._quarantined.discard(start)
                    self._free(start)

    def _region_of(self, offset: int) -> int:
        index = bisect_right(self._starts, offset) - 1
        if index >= 0:
            start = self._starts[index]
            if offset < start + self._regions[start]:
                return start
        raise LocalProtocolError(f"offset {offset} lies in no window region")

    def _free(self, start: int) -> None:
        size = self._regions.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        index = bisect_left(self._gaps, (start, 0))
        if index < len(self._gaps) and self._gaps[index][0] == start + size:
            size += self._gaps.pop(index)[1]
        if index and sum(self._gaps[index - 1]) == start:
            start, before = self._gaps.pop(index - 1)
            size += before
            index -= 1
        self._gaps.insert(index, (start, size))
