"""Page-locks a connection's window and arena by slices, from a thread of its own, while both are in use.

Window slices are all taken from the window and given back as they are locked, so nobody writes into one while
it is probed; a slice that the device does not reach is kept. The arena is only read: parts in slices that are
not locked yet are copied by the CPU meanwhile.
"""

from __future__ import annotations

import threading

from kvfabric.client import Window
from kvfabric_engine.boundary import Boundary
from kvfabric_engine.staging import Landing, Mover

WINDOW_SLICE_BYTES = 32 << 20
ARENA_SLICE_BYTES = 64 << 20
"""Locking a slice holds up whatever else calls the driver, for about 5 ms."""


class Pinning:
    """`start`, and `stop` before the memory is unmapped."""

    def __init__(
        self, mover: Mover, window: Window, landing: Landing | None, arena_bytes: int
    ) -> None:
        self._mover = mover
        self._window = window
        self._landing = landing
        self._arena_bytes = arena_bytes
        self._pinned: list[memoryview] = []  # held: not to be unmapped while they are locked
        self._is_stopping = False
        self._is_window_ready = threading.Event()
        self._is_done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, boundary: Boundary) -> None:
        """Takes the window; gives it back slice by slice. What fails is logged and left as it is."""
        step = min(WINDOW_SLICE_BYTES, self._window.num_bytes)
        sizes = [step] * (self._window.num_bytes // step) if step else []
        sizes += [rest] if step and (rest := self._window.num_bytes % step) else []
        offsets = [self._window.allocate(size) for size in sizes]
        slices = [(o, n) for o, n in zip(offsets, sizes, strict=True) if o is not None]

        def run() -> None:
            for offset, size in slices:
                boundary.run("pin window", lambda o=offset, n=size: self._pin(o, n), lambda _: None)  # type: ignore[misc]
            self._is_window_ready.set()
            boundary.run("pin arena", self._pin_arena, lambda _: None)
            self._is_done.set()

        self._thread = threading.Thread(target=run, name="kvf-pin", daemon=True)
        self._thread.start()

    def wait_window(self, timeout_s: float) -> None:
        """Until the window is there for saves."""
        self._is_window_ready.wait(timeout_s)

    def wait(self, timeout_s: float) -> bool:
        """Until everything is page-locked that will be."""
        return self._is_done.wait(timeout_s)

    def stop(self) -> None:
        """Nothing uses the memory any more: unlock all of it. Idempotent."""
        self._is_stopping = True
        if self._thread is not None:
            self._thread.join()
        while self._pinned:
            self._mover.unpin(self._pinned.pop())
        if self._landing is not None:
            self._landing.unpin()

    def _pin(self, offset: int, num_bytes: int) -> None:
        if self._is_stopping:
            return
        view = self._window.view(offset, num_bytes)
        self._pinned.append(view)
        self._mover.pin(view)
        self._window.free(offset)

    def _pin_arena(self) -> None:
        if self._landing is None:
            return
        for offset in range(0, self._arena_bytes, ARENA_SLICE_BYTES):
            if self._is_stopping:
                return
            self._landing.pin(offset, min(ARENA_SLICE_BYTES, self._arena_bytes - offset))
