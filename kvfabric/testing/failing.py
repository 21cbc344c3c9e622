"""File operations that fail when told: the Nth of a run, in one of several ways."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from kvfabric.tiers.file_ops import FileOps

_PAGE = 4096


class Fault(StrEnum):
    """What the Nth operation does. `short`: it moves one page only, and says so, which is no error; `torn`:
    it moves part of a page. `swallowed`: nothing, and claims success (what no kernel may do: for twins)."""

    EIO = "EIO"
    ENOSPC = "ENOSPC"
    EMFILE = "EMFILE"
    SHORT = "short"
    TORN = "torn"
    SWALLOWED = "swallowed"


class FailingOps(FileOps):
    """Counts operations, and lets the `fail_at`-th fail (0: none), once. Open descriptors are counted too."""

    def __init__(self, fault: Fault = Fault.EIO, fail_at: int = 0) -> None:
        super().__init__()
        self.count = 0
        self.failed = ""
        self.open_fds: set[int] = set()
        self._fault = fault
        self._fail_at = fail_at
        self._counting = threading.Lock()  # the tier's threads

    def _is_next(self, name: str) -> bool:
        with self._counting:
            self.count += 1
            if self.count != self._fail_at:
                return False
            self.failed = name
            return True

    def _fails(self, name: str) -> bool:
        """Whether this one is to be skipped, in silence; raises if it is to fail."""
        if not self._is_next(name):
            return False
        if self._fault is Fault.SWALLOWED:
            return True
        code = getattr(errno, self._fault.value, errno.EIO)
        raise OSError(code, os.strerror(code))

    def open(self, path: Path, flags: int) -> int:
        if self._fault is not Fault.SWALLOWED:
            self._fails("open")
        fd = super().open(path, flags)
        self.open_fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        super().close(fd)
        self.open_fds.remove(fd)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return self._moved(super().pwritev, "pwritev", fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return self._moved(super().preadv, "preadv", fd, buffers, offset)

    def _moved(
        self, move: Any, name: str, fd: int, buffers: Sequence[memoryview], offset: int
    ) -> int:
        if self._fault in (Fault.SHORT, Fault.TORN):
            if not self._is_next(name):
                return int(move(fd, buffers, offset))
            moved = int(move(fd, [buffers[0][:_PAGE]], offset))
            return moved if self._fault is Fault.SHORT else min(moved, 100)
        if self._fails(name):
            return sum(map(len, buffers))
        return int(move(fd, buffers, offset))

    def fdatasync(self, fd: int) -> None:
        if not self._fails("fdatasync"):
            super().fdatasync(fd)

    def fsync(self, fd: int) -> None:
        if not self._fails("fsync"):
            super().fsync(fd)

    def fallocate(self, fd: int, num_bytes: int) -> None:
        if not self._fails("fallocate"):
            super().fallocate(fd, num_bytes)

    def unlink(self, path: Path) -> None:
        if not self._fails("unlink"):
            super().unlink(path)

    def list_names(self, directory: Path) -> list[str]:
        if self._fault is not Fault.SWALLOWED:
            self._fails("list_names")
        return super().list_names(directory)
