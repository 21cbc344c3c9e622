"""A tier's breaker: after a failure the tier is left alone for a while, then tried again. Pure and sync.

    CLOSED --fail--> OPEN --pause over--> HALF OPEN --begin--> PROBING --succeed--> CLOSED
                      ^                                           |
                      +--fail, with twice the pause---------------+        abandon: HALF OPEN again

Whoever uses the tier asks `begin` before, and says `succeed` or `fail` afterwards. Failures while it is open
are of operations that began before, and change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum

log = logging.getLogger(__name__)

PAUSE_S = 5.0
MAX_PAUSE_S = 60.0


class _State(Enum):
    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Breaker:
    """`name` is of what it guards, for the log: one line when it opens, one when it closes.

    `clock`: seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.reason = ""
        """Of the failure that opened it; empty while closed."""
        self.times_opened = 0
        self._clock = clock
        self._state = _State.CLOSED
        self._pause_s = PAUSE_S
        self._open_until = 0.0

    def __repr__(self) -> str:
        return f"<Breaker {self.name} {self._state.value}: {self.reason or 'well'}>"

    @property
    def is_open(self) -> bool:
        """Whether nothing may begin now: in the pause, or until the one probe has ended."""
        if self._state is _State.OPEN:
            return self._clock() < self._open_until
        return self._state is _State.PROBING

    @property
    def is_half_open(self) -> bool:
        """Whether the pause is over and nobody has tried yet."""
        return self._state is _State.OPEN and not self.is_open

    def begin(self) -> bool:
        """May an operation (or a batch of one caller) begin? Half open, the first may: it is the probe."""
        if self.is_open:
            return False
        if self._state is _State.OPEN:
            self._state = _State.PROBING
        return True

    def succeed(self) -> None:
        """Something that began ended well."""
        if self._state is _State.PROBING:
            self._state = _State.CLOSED
            log.info("%s is back after: %s", self.name, self.reason)
            self.reason, self._pause_s = "", PAUSE_S

    def fail(self, reason: str) -> None:
        """Something that began failed, or did not end in time."""
        if self._state is _State.OPEN:
            return
        if self._state is _State.PROBING:
            self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s)
        else:
            self.times_opened += 1
            log.warning("%s is out of service: %s", self.name, reason)
        self._state, self.reason = _State.OPEN, reason
        self._open_until = self._clock() + self._pause_s

    def abandon(self) -> None:
        """The probe ended without a verdict."""
        if self._state is _State.PROBING:
            self._state = _State.OPEN
