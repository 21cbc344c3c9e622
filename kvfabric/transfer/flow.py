"""How much may be on its way at once, in bytes; and memory that lies between arena and network."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

SMALLEST_BYTES = 64 << 10


class Flow:
    """At most `limit_bytes` at a time, first come, first served; what is larger than that goes alone."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def __repr__(self) -> str:
        return f"<Flow {self.taken_bytes} of {self.limit_bytes} B, {len(self._waiting)} waiting>"

    async def take(self, num_bytes: int) -> None:
        """Returns when there is room. On cancellation: nothing was taken."""
        if not self._waiting and self._has_room(num_bytes):
            self.taken_bytes += num_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(num_bytes)
            else:
                self._waiting.remove((num_bytes, turn))
                self._serve()
            raise

    def give(self, num_bytes: int) -> None:
        self.taken_bytes -= num_bytes
        self._serve()

    @asynccontextmanager
    async def room(self, num_bytes: int) -> AsyncIterator[None]:
        await self.take(num_bytes)
        try:
            yield
        finally:
            self.give(num_bytes)

    def _has_room(self, num_bytes: int) -> bool:
        return not self.taken_bytes or self.taken_bytes + num_bytes <= self.limit_bytes

    def _serve(self) -> None:
        while self._waiting and self._has_room(self._waiting[0][0]):
            num_bytes, turn = self._waiting.popleft()
            self.taken_bytes += num_bytes
            turn.set_result(None)


class Buffers:
    """Memory to pack, seal or receive in, at most `limit_bytes` of it, kept for the next who needs some: a
    fresh page costs more than to copy one."""

    def __init__(self, limit_bytes: int) -> None:
        self._flow = Flow(limit_bytes)
        self._kept: defaultdict[int, list[memoryview]] = defaultdict(list)
        self._kept_bytes = 0

    def __repr__(self) -> str:
        return f"<Buffers {self._flow.taken_bytes} B lent, {self._kept_bytes} B kept>"

    @property
    def lent_bytes(self) -> int:
        return self._flow.taken_bytes

    async def take(self, num_bytes: int) -> memoryview:
        """At least so many bytes, of any content; waits until there are. On cancellation: none are lent."""
        size = max(SMALLEST_BYTES, 1 << (num_bytes - 1).bit_length())
        await self._flow.take(size)
        if kept := self._kept[size]:
            self._kept_bytes -= size
            return kept.pop()
        while self._kept_bytes + self._flow.taken_bytes > self._flow.limit_bytes:
            other = max((size for size, free in self._kept.items() if free), default=0)
            if not other:
                break
            self._kept[other].pop()
            self._kept_bytes -= other
        return np.empty(size, np.uint8).data

    def give(self, memory: memoryview) -> None:
        """Back. Nobody touches it any more."""
        size = len(memory)
        if self._kept_bytes + self._flow.taken_bytes <= self._flow.limit_bytes:
            self._kept[size].append(memory)
            self._kept_bytes += size
        self._flow.give(size)
