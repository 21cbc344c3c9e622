"""How fast bytes move somewhere, from what moved. Pure and sync.

Moves overlap, so bytes are counted against the time in which any of them was under way. What was seen long
ago weighs less: a rate is bytes over seconds, both of them fading with each sight.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_FADE = 0.8
_LONGEST_S = 1.0
"""Of one sight: where something is always under way it would never end."""
_LEAST_BYTES = 64 << 10
"""A sight of less says more of the way there than of the rate."""


class Meter:
    """One way. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.num_sights = 0
        self._clock = clock
        self._bytes = self._seconds = 0.0
        self._num_moving = 0
        self._since = 0.0
        self._moved = 0

    def __repr__(self) -> str:
        return f"<Meter {self.bytes_per_s / 1e6:.0f} MB/s of {self.num_sights} sights>"

    @property
    def bytes_per_s(self) -> float:
        """0 before the first sight."""
        return self._bytes / self._seconds if self._seconds else 0.0

    def begin(self) -> None:
        """One more is under way; `end` follows."""
        if not self._num_moving:
            self._since, self._moved = self._clock(), 0
        self._num_moving += 1

    def end(self, num_bytes: int) -> None:
        """It is there; 0 bytes if it is not."""
        self._num_moving -= 1
        self._moved += num_bytes
        now = self._clock()
        if not self._num_moving or (self._moved and now - self._since >= _LONGEST_S):
            self.saw(self._moved, now - self._since)
            self._since, self._moved = now, 0

    def saw(self, num_bytes: int, seconds: float) -> None:
        """So much moved in that time, and nothing else did meanwhile."""
        if num_bytes < _LEAST_BYTES or seconds <= 0:
            return
        self._bytes = _FADE * self._bytes + num_bytes
        self._seconds = _FADE * self._seconds + seconds
        self.num_sights += 1
