"""Turns: how work on the event loop is kept from adding up, so that a timer or a request waits little.

A loop runs everything that is ready before it looks at its timers again. Requests, ends of commits, eviction
ahead and snapshots are short each, and several milliseconds together when they come at once. So whoever does
more than a few dozen microseconds asks here first: in each turn of the loop the work begun within `TURN_S` of
the first goes on at once, and the rest waits, in order, for a later turn, after the timers that are due. What
a timer waits for is then one turn and the longest single piece of work, however much there is to do.

Idle, it costs one timer a turn and delays nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

TURN_S = 0.0005

_Waiter = Callable[[], None] | asyncio.Future[None]


class Turns:
    """Of one event loop, which must be running when it is first asked."""

    def __init__(self) -> None:
        self._ends: float | None = None
        self._waiting: deque[_Waiter] = deque()

    def __repr__(self) -> str:
        return f"<Turns {len(self._waiting)} waiting>"

    def is_open(self) -> bool:
        """Whether work may begin now. If not: `call` or `wait`."""
        return not self._waiting and self._has_time()

    def call(self, work: Callable[[], None]) -> None:
        """Have `work` called in its turn, later. It raises nothing."""
        self._waiting.append(work)
        self._has_time()

    async def wait(self) -> None:
        """Return when work may begin. On cancellation: the turn goes to the next."""
        if self.is_open():
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        await mine

    def _has_time(self) -> bool:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._ends is None:
            self._begin(loop, now)
            return True
        return now < self._ends

    def _begin(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        self._ends = now + TURN_S
        loop.call_at(now, self._next)  # runs after the timers that are due before it

    def _next(self) -> None:
        """A turn has passed: serve those that wait, as far as this one goes."""
        self._ends, now = None, asyncio.get_running_loop().time()
        while self._waiting and self._has_time():
            waiter = self._waiting.popleft()
            if not isinstance(waiter, asyncio.Future):
                waiter()
            elif not waiter.done():
                waiter.set_result(None)
                self._ends = now  # it works in the next turn of the loop, which is thereby taken
