"""The one seam between the SSD tier and the kernel's file operations. Blocking; everything raises OSError.

Everything that the tier itself does with files goes through a `FileOps`: tests give it one that fails. What
LMDB does in the index's file does not; there the kernel itself has to be made to fail.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class FileOps:
    """The system's calls, one method each. `direct`: whether to try O_DIRECT."""

    def __init__(self, *, direct: bool = True) -> None:
        self.direct = direct

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fallocate(self, fd: int, num_bytes: int) -> None:
        os.posix_fallocate(fd, 0, num_bytes)

    def forget_cached(self, fd: int, offset: int, num_bytes: int) -> None:
        """The page cache gives these bytes up, as far as they are clean."""
        os.posix_fadvise(fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def list_names(self, directory: Path) -> list[str]:
        return os.listdir(directory)

    def file_bytes(self, path: Path) -> int:
        return path.stat().st_size

    def sync_directory(self, path: Path) -> None:
        """Make creations and removals in `path` durable."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.fsync(fd)
        finally:
            self.close(fd)
