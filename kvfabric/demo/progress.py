"""What the demo shows while it runs: a bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from kvfabric.demo.checks import Check

_WIDTH = 30


class Progress:
    """Prints titles, a bar for the stage under way, and checks as they are decided."""

    def __init__(self, out: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._clock = clock
        self._label = ""
        self._total = 0
        self._done = 0
        self._started = clock()

    def title(self, text: str) -> None:
        print(f"\n{text}", file=self._out, flush=True)

    def line(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def stage(self, label: str, total: int = 0) -> None:
        """Begin a stage of `total` steps (0: not counted)."""
        self._label, self._total, self._done = label, total, 0
        self._started = self._clock()
        self._draw()

    def advance(self) -> None:
        self._done += 1
        self._draw()

    def end(self) -> None:
        """The stage is over: its bar gives way to one line with its time."""
        seconds = self._clock() - self._started
        count = f"{self._done} requests, " if self._total else ""
        clear = "\r\033[K" if self._is_terminal else ""
        print(f"{clear}  {self._label} ({count}{seconds:.1f} s)", file=self._out, flush=True)

    def check(self, check: Check) -> None:
        mark = "ok  " if check.passed else "FAIL"
        print(f"  {mark} {check.name}: {check.seen}", file=self._out, flush=True)

    def _draw(self) -> None:
        if not self._is_terminal:
            return
        filled = _WIDTH * self._done // self._total if self._total else 0
        bar = f"[{'#' * filled}{'.' * (_WIDTH - filled)}]" if self._total else "..."
        count = f" {self._done}/{self._total}" if self._total else ""
        print(f"\r\033[K  {bar}{count} {self._label}", end="", file=self._out, flush=True)
