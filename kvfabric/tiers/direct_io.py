"""Files without the page cache: O_DIRECT, vectors of aligned buffers, and foreign errors translated.

Blocking; callers run it in a pool. O_DIRECT wants addresses, lengths and offsets in multiples of the
device's block: everything here is in pages of 4 KiB. Where a file system refuses O_DIRECT the same calls
go through the page cache, and `open_file` says so.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kvfabric.errors import NoSpace, TransferError
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.records import PAGE_BYTES

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that say: full (the disk, a quota, the largest file)."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_GONE = frozenset({errno.ENOENT, errno.EISDIR, errno.ENXIO, errno.ELOOP})
_MAX_BUFFERS = 1024  # IOV_MAX of Linux

# Mapping and unmapping a page for each read costs more than reading it.
_scratch = threading.local()


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """OSError becomes NoSpace (full: disk, quota or file size) or TransferError (anything else)."""
    try:
        yield
    except OSError as exc:
        name = errno.errorcode.get(exc.errno or 0, "?")
        kind = NoSpace if exc.errno in NO_SPACE else TransferError
        raise kind(f"{what}: {exc.strerror or exc} ({name})") from exc


def raise_if_exhausted(error: Exception) -> None:
    """Raise again what says nothing about a file: that this process or machine has no more to give."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in _EXHAUSTED:
        raise error
    if any(os.strerror(code) in str(error) for code in _EXHAUSTED):
        raise error  # LMDB passes on the words only


def is_gone(error: Exception) -> bool:
    """Whether it says that there is no such file, rather than that it cannot be had now."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _GONE


def round_up(num_bytes: int) -> int:
    """To whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def aligned_buffer(num_bytes: int) -> memoryview:
    """Zeroed, page-aligned, whole pages; unmapped when the last view of it goes."""
    return memoryview(mmap.mmap(-1, round_up(num_bytes)))


def scratch_page() -> memoryview:
    """An aligned page of this thread's own, good until the thread asks again; not zeroed."""
    try:
        page: memoryview = _scratch.page
    except AttributeError:
        page = _scratch.page = aligned_buffer(PAGE_BYTES)
    return page


def is_aligned(view: memoryview) -> bool:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address % PAGE_BYTES == 0


def open_file(ops: FileOps, path: Path, flags: int) -> tuple[int, bool]:
    """A descriptor, and whether it bypasses the page cache. Raises OSError."""
    if ops.direct:
        try:
            return ops.open(path, flags | os.O_DIRECT), True
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
    return ops.open(path, flags), False


def write_all(ops: FileOps, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write aligned buffers one after the other. Raises OSError; then any part may be written."""
    pending = list(buffers)
    while pending:
        batch = pending[:_MAX_BUFFERS]
        written = ops.pwritev(fd, batch, offset)
        if written <= 0 or (written % PAGE_BYTES and written < sum(map(len, batch))):
            raise OSError(errno.EIO, f"short write of {written} bytes")
        offset += written
        pending = _after(pending, written)


def read_all(ops: FileOps, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill aligned buffers one after the other; returns bytes read, fewer at the end of the file."""
    pending = list(buffers)
    total, torn = 0, -1
    while pending:
        got = ops.preadv(fd, pending[:_MAX_BUFFERS], offset + total)
        whole = got // PAGE_BYTES * PAGE_BYTES
        if got == 0 or (got > whole and total + got == torn):
            return total + got
        if got > whole:
            torn = total + got  # the end of the file, if it is there again
        total += whole
        pending = _after(pending, whole)
    return total


def _after(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of `buffers` behind their first `num_bytes`."""
    for index, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[index + 1 :]]
        num_bytes -= len(buffer)
    return []
