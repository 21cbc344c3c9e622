"""The host arena: one sealed memfd that only the daemon writes, cut into slots of whole 4 KiB pages.

Owns the memory, who of it is free, and the generations; knows nothing of keys, tenants or leases. The
store decides when a slot may be freed. Called on the event loop's thread only; the bytes themselves are
moved by pool threads.

    Arena           descriptor, mapping, allocate / free with generations, background touching
    SlotAllocator   pages: one stack of free slots per size class over a sorted list of free runs. Pure

Slots of one size never fragment. When another size asks and the runs have nothing left for it, the stacks
are merged back into runs, what was carved ahead included; nothing is ever moved, so with several sizes a
request may fail although its bytes are free somewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
from array import array
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kvfabric.errors import ConfigError, NoSpace, RemoteProtocolError

PAGE_BYTES = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_REFILL_PAGES = 4096
"""Carving from the runs takes up to this many pages more than asked (16 MiB), so that it is rare."""

_MERGE_SHARE = 8
"""A merge walks all free slots: worth it once a page has changed for every so many of them."""

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it
_LIBC = ctypes.CDLL(
    None, use_errno=True
)  # unlike mmap.madvise, its calls release the interpreter lock
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

Pages = npt.NDArray[np.uint32]


def pages_of(num_bytes: int) -> int:
    """Pages of the slot for `num_bytes`."""
    return -(-num_bytes // PAGE_BYTES)


def slot_bytes(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole pages: what a slot occupies and is charged."""
    return pages_of(num_bytes) * PAGE_BYTES


def populate(array: npt.NDArray[Any]) -> int:
    """Have the kernel provide and map the whole pages of a contiguous array, contents kept. Blocks, without
    the interpreter lock; returns the error number, 0 for none, EINVAL on a kernel that cannot."""
    start = -(-array.ctypes.data // PAGE_BYTES) * PAGE_BYTES
    length = (array.ctypes.data + array.nbytes - start) // PAGE_BYTES * PAGE_BYTES
    if length <= 0 or not _LIBC.madvise(start, length, _MADV_POPULATE_WRITE):
        return 0
    return ctypes.get_errno()


class SlotAllocator:
    """Which pages are free. A slot is named by its first page."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free_pages = num_pages
        self._stacks: dict[int, array[int]] = {}
        self._run_starts = np.zeros(1, dtype=np.int64)
        self._run_pages = np.full(1, num_pages, dtype=np.int64)
        self._changed_pages = 0  # freed or carved since the last merge
        self.withheld_pages = 0
        self._withheld = np.empty((0, 2), dtype=np.int64)  # runs: start, pages

    def allocate(self, num_slots: int, pages: int) -> Pages | None:
        """First pages of `num_slots` slots, ascending and neighbouring where possible; all or none."""
        if num_slots == 0:
            return np.empty(0, dtype=np.uint32)
        if num_slots * pages > self.free_pages:
            return None
        stack = self._stacks.setdefault(pages, array("I"))
        if len(stack) < num_slots and not self._refill(stack, num_slots, pages):
            return None
        taken = np.frombuffer(stack[-num_slots:], dtype=np.uint32)
        del stack[-num_slots:]
        self.free_pages -= num_slots * pages
        return np.sort(taken)

    def free(self, first_pages: Pages, pages: int) -> None:
        """Give slots of `pages` pages each back."""
        stack = self._stacks.setdefault(pages, array("I"))
        # Descending, so that the next batch takes the lowest of them first and in one run.
        stack.frombytes(np.sort(first_pages)[::-1].astype(np.uint32).tobytes())
        self.free_pages += len(first_pages) * pages
        self._changed_pages += len(first_pages) * pages

    def resume(self, first_pages: Pages, pages: npt.NDArray[np.int64]) -> None:
        """Of a fresh allocator: these slots, each of so many pages, are in use. Raises ValueError if they
        overlap or lie outside."""
        order = np.argsort(first_pages, kind="stable")
        starts = first_pages[order].astype(np.int64)
        ends = starts + pages[order]
        edges = np.concatenate([[0], ends])
        gaps = np.append(starts, self.num_pages) - edges
        if (gaps < 0).any():
            raise ValueError("slots in use overlap or lie outside the arena")
        self._run_starts, self._run_pages = edges[gaps > 0], gaps[gaps > 0]
        self.free_pages = int(gaps.sum())

    def withhold(self, first_page: int) -> None:
        """Give nothing out that lies behind `first_page` and is free now, nor what was withheld before."""
        self._merge()
        starts, ends = self._run_starts, self._run_starts + self._run_pages
        cuts = np.clip(first_page, starts, ends)
        behind = np.stack([cuts, ends - cuts], axis=1)[ends > cuts]
        self._withheld = np.concatenate([self._withheld, behind])
        kept = cuts > starts
        self._run_starts, self._run_pages = starts[kept], (cuts - starts)[kept]
        self._count_withheld()

    def provide(self, end_page: int) -> None:
        """Of what was withheld, all before `end_page` is free again."""
        starts, ends = self._withheld[:, 0], self._withheld.sum(axis=1)
        cuts = np.clip(end_page, starts, ends)
        back, left = cuts > starts, ends > cuts
        self._run_starts = np.concatenate([self._run_starts, starts[back]])
        self._run_pages = np.concatenate([self._run_pages, (cuts - starts)[back]])
        self._withheld = np.stack([cuts, ends - cuts], axis=1)[left]
        self._merge()  # neighbours that a cut had parted
        self._count_withheld()

    def _count_withheld(self) -> None:
        before, self.withheld_pages = self.withheld_pages, int(self._withheld[:, 1].sum())
        self.free_pages -= self.withheld_pages - before

    def _refill(self, stack: array[int], num_slots: int, pages: int) -> bool:
        missing = num_slots - len(stack)
        if self._carve(stack, missing, pages):
            return True
        stacked = sum(map(len, self._stacks.values()))
        if not self._changed_pages or self._changed_pages * _MERGE_SHARE < stacked:
            return False
        self._merge()
        return self._carve(stack, num_slots - len(stack), pages)

    def _carve(self, stack: array[int], missing: int, pages: int) -> bool:
        """Cut at least `missing` slots, up to _REFILL_PAGES more, from the longest runs to the stack."""
        fitting = self._run_pages // pages
        if int(fitting.sum()) < missing:
            return False
        wanted = missing + _REFILL_PAGES // pages
        cut: list[npt.NDArray[np.int64]] = []
        for run in np.argsort(-fitting, kind="stable"):
            count = min(wanted, int(fitting[run]))
            if count == 0:
                break
            start = int(self._run_starts[run])
            cut.append(start + pages * np.arange(count, dtype=np.int64))
            self._run_starts[run] += count * pages
            self._run_pages[run] -= count * pages
            self._changed_pages += count * pages
            wanted -= count
        kept = self._run_pages > 0
        self._run_starts, self._run_pages = self._run_starts[kept], self._run_pages[kept]
        older = stack.tobytes()
        del stack[:]
        stack.frombytes(np.concatenate(cut)[::-1].astype(np.uint32).tobytes())
        stack.frombytes(older)
        return True

    def _merge(self) -> None:
        """Put all stacks back into the runs and join neighbours."""
        starts, lengths = [self._run_starts], [self._run_pages]
        for pages, stack in self._stacks.items():
            slots = np.frombuffer(stack.tobytes(), dtype=np.uint32).astype(np.int64)
            starts.append(slots)
            lengths.append(np.full(len(slots), pages, dtype=np.int64))
            del stack[:]
        start, length = np.concatenate(starts), np.concatenate(lengths)
        order = np.argsort(start, kind="stable")
        start, length = start[order], length[order]
        head = np.ones(len(start), dtype=np.bool_)
        head[1:] = start[1:] != start[:-1] + length[:-1]
        group = np.cumsum(head) - 1
        self._run_starts = start[head]
        self._run_pages = np.bincount(group, weights=length).astype(np.int64)
        self._changed_pages = 0  # freed or carved since the last merge


class Slots(NamedTuple):
    """Allocated slots: first pages and their new generations, both u32 vectors."""

    first_pages: Pages
    generations: npt.NDArray[np.uint32]


class Arena:
    """`with Arena.create(size) as arena`, or `close()`. `view` is the whole memory, writable."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self.size_bytes = size_bytes
        self._map = mmap.mmap(fd, size_bytes)
        self.view = memoryview(self._map)
        self.allocator = SlotAllocator(size_bytes // PAGE_BYTES)
        # One counter for the whole arena: each allocation gets a number that no slot had before, which
        # is all that "the slot's generation rises" needs. It starts anywhere, so that numbers of an
        # earlier daemon's life mean nothing to this one.
        self._generation = secrets.randbelow(1 << 24)

    @classmethod
    def create(cls, size_bytes: int) -> Arena:
        """A new arena of `size_bytes` (a multiple of 4 KiB), mode 0600, sealed in size.

        Raises ConfigError if the size is wrong, NoSpace if the machine does not give the memory.
        """
        if size_bytes <= 0 or size_bytes % PAGE_BYTES:
            raise ConfigError(f"the arena's size is a positive multiple of 4096, not {size_bytes}")
        try:
            fd = os.memfd_create("kvfabric-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as exc:
            raise NoSpace(f"no arena of {size_bytes} bytes: {exc.strerror}") from exc
        try:
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, size_bytes)
        except OSError as exc:
            os.close(fd)
            raise NoSpace(f"no arena of {size_bytes} bytes: {exc.strerror}") from exc

    @classmethod
    def adopt(cls, fd: int) -> Arena:
        """The arena of an earlier daemon, from any descriptor of it; its contents are void.

        `fd` stays the caller's. Raises RemoteProtocolError if it is no arena of ours.
        """
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise RemoteProtocolError("the returned descriptor is not sealed as an arena is")
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or status.st_size % PAGE_BYTES or not status.st_size:
                raise RemoteProtocolError("the returned descriptor is no arena of this user")
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise RemoteProtocolError(f"the returned descriptor is no arena: {exc}") from exc
        try:
            return cls(own, status.st_size)
        except OSError as exc:
            os.close(own)
            raise RemoteProtocolError(f"the returned arena cannot be mapped: {exc}") from exc

    def read_only_fd(self) -> int:
        """A new O_RDONLY descriptor for an engine; the caller closes it."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def identity(self) -> tuple[int, int]:
        """(st_dev, st_ino): equal for every descriptor of the same arena on this machine."""
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino

    @property
    def free_bytes(self) -> int:
        return self.allocator.free_pages * PAGE_BYTES

    @property
    def withheld_bytes(self) -> int:
        """What `withhold` took and `provide` has not given back."""
        return self.allocator.withheld_pages * PAGE_BYTES

    def withhold(self, offset: int) -> None:
        """The machine has no memory behind `offset`: what is free there is not given out."""
        self.allocator.withhold(pages_of(offset))

    def provide(self, end: int) -> None:
        """It has, up to `end`."""
        if self.allocator.withheld_pages:
            self.allocator.provide(end // PAGE_BYTES)

    def allocate(self, num_slots: int, num_bytes: int) -> Slots | None:
        """Slots of `num_bytes` each, under new generations; None if they do not fit."""
        pages = self.allocator.allocate(num_slots, pages_of(num_bytes))
        if pages is None:
            return None
        steps = np.arange(1, num_slots + 1, dtype=np.uint64)
        generations = ((self._generation + steps) & 0xFFFFFFFF).astype(np.uint32)
        self._generation = (self._generation + num_slots) & 0xFFFFFFFF
        return Slots(pages, generations)

    @property
    def generation(self) -> int:
        """The last number given."""
        return self._generation

    def resume(self, first_pages: Pages, pages: npt.NDArray[np.int64], generation: int) -> None:
        """Of an arena that nobody has used yet: go on where another daemon stopped. As the allocator's."""
        self.allocator.resume(first_pages, pages)
        self._generation = generation

    def free(self, first_pages: Pages, num_bytes: int) -> None:
        """Give slots of `num_bytes` back. Nobody may be reading or writing them any more."""
        self.allocator.free(first_pages, pages_of(num_bytes))

    def part(self, first_page: int, num_bytes: int) -> memoryview:
        """The first `num_bytes` bytes of a slot."""
        offset = first_page * PAGE_BYTES
        return self.view[offset : offset + num_bytes]

    def touch(self, offset: int, num_bytes: int) -> None:
        """Have the kernel provide and map these pages now; keeps their contents. Blocks: run it in a pool.

        Raises NoSpace if there is no memory, instead of SIGBUS at the first write to it.
        """
        whole = np.frombuffer(self.view, dtype=np.uint8)
        code = populate(whole[offset : offset + num_bytes])
        if code == errno.EINVAL:
            self._provide(offset, num_bytes)
        elif code:
            raise NoSpace(f"the machine has no memory for the arena: {os.strerror(code)}")

    def _provide(self, offset: int, num_bytes: int) -> None:
        """On a kernel before 5.14: provided, not mapped, so each first write to a page still faults."""
        try:
            os.posix_fallocate(self._fd, offset, num_bytes)
        except OSError as exc:
            raise NoSpace(f"the machine has no memory for the arena: {exc.strerror}") from exc

    def close(self) -> None:
        """Give the daemon's mapping back. Engines that mapped the arena keep theirs."""
        # A traceback somewhere may still view a slot: then the mapping goes with the last view.
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Arena {self.size_bytes} bytes, {self.free_bytes} free>"
