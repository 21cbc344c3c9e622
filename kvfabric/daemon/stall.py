"""How long the event loop was kept from its work: the figure behind "stalls at most 5 ms"."""

from __future__ import annotations

import asyncio
import sys

SWITCH_S = 0.0005
"""How long a pool thread may keep the interpreter from the loop; Python's own 5 ms are the whole bound."""


class StallProbe:
    """A timer that notes how late it is called. `max_s`: the worst so far; set it to 0 to begin anew.

    While it runs, threads of this process hand the interpreter over every `SWITCH_S`.
    """

    def __init__(self, interval_s: float) -> None:
        self.max_s = 0.0
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._switch_before_s = sys.getswitchinterval()

    def start(self) -> None:
        self._switch_before_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._set()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        sys.setswitchinterval(self._switch_before_s)

    def _set(self) -> None:
        self._due = self._loop.time() + self._interval_s
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        self.max_s = max(self.max_s, self._loop.time() - self._due)
        self._set()
