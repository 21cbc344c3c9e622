"""How long the event loop was kept from its work: the figure behind "stalls at most 5 ms"."""

from __future__ import annotations

import asyncio
from typing import Self


class StallProbe:
    """A timer that notes, inside its context, how late it is called. `max_s`: the worst so far; set it to 0
    to begin anew."""

    def __init__(self, interval_s: float) -> None:
        self.max_s = 0.0
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._set()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _set(self) -> None:
        self._due = self._loop.time() + self._interval_s
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        self.max_s = max(self.max_s, self._loop.time() - self._due)
        self._set()
