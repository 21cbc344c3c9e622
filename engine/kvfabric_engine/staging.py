"""Moves fabric blocks between paged KV and host memory.

A `Mover` belongs to one pool and is used by the connector's threads: any number of gathers and scatters may
run at once as long as they name different pages. Both return only when the bytes have landed, so the caller
may free source or destination at once. Neither allocates in the pool nor knows keys.

On CUDA (`StagedMover`) both go through two buffers in device memory, so that the kernel that gathers or
scatters one chunk runs beside the DMA of the next. Each direction has a lane for its DMA and one for its
kernels, ordered by events; the engine's own stream is waited for, never held up:

    gather   pages --kernel--> buffer --DMA a run of neighbouring parts--> window
             (a pool whose pages are long runs of bytes: pages --DMA--> window)
    scatter  host --DMA--> buffer --kernel--> pages
    land     arena --DMA a run of neighbouring slots--> buffer, its checksums --kernels--> host; the caller
             compares them; buffer --kernel--> pages
             (or another engine's pages --kernel, over NVLink--> buffer, and on as before: `shared_pools`)
    layers   arena --DMA some layers of every page--> pages, then the next layers; checksums of the pages
             last: the model computes a layer while the next ones are on the bus; that counts if they agree

DMA reads only what this mover itself page-locked (`registrations`): memory that the driver still holds for an
earlier mapping of the address would give other bytes.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvfabric.errors import ConfigError, TransferError
from kvfabric_engine.device_checksum import (
    ACCUMULATOR_BYTES,
    DeviceChecksums,
    supports,
    supports_pages,
)
from kvfabric_engine.kernels import PagedRuns
from kvfabric_engine.lanes import Fence, Lane, Passed, fence_here, new_lane, on_device
from kvfabric_engine.layout import PoolShape, pages_as_bytes
from kvfabric_engine.registrations import Addresses, PinnedMemory, address_of
from kvfabric_engine.shared_pools import BorrowedPool, BorrowedPools, PoolPages, SharedPool

__all__ = [
    "Arrival",
    "Fence",
    "HostMover",
    "Landing",
    "Mover",
    "Pages",
    "StagedMover",
    "mover_for",
    "prove_layout",
]

Pages = Sequence[int]
"""The pages of one fabric block, in the order of their tokens: `pages_per_block` indexes into the pool."""

PROBE_BYTES = 64
STAGE_BYTES = 64 << 20
"""Of one of a direction's two buffers: 1.2 ms of DMA, longer than the calls to the node beside it take."""
LONG_RUN_BYTES = 256 << 10
"""From this on a page is read by a DMA of its own: of a batch such copies are as fast as one long copy."""
LAYER_GROUPS = 4
"""Of a load that the model computes behind: few copies, long ones, and only the last is waited for whole."""
LANDING_BUFFERS = 3
"""One is filled while the next is checked and the one before is spread."""


class Mover(ABC):
    """Pool <-> host memory in units of parts. Thread-safe for distinct pages."""

    part_bytes: int
    pins_memory: bool = False
    """Whether `pin` does anything, and so takes time."""
    shared: SharedPool | None = None
    """The pool, if other engines of the host may read it."""

    @abstractmethod
    def fence(self) -> Fence:
        """Call on the engine's thread after launching the step that wrote the blocks."""

    @abstractmethod
    def gather(self, blocks: Sequence[Pages], out: Sequence[memoryview], *, after: Fence) -> None:
        """Copy block i into `out[i]` (writable, `part_bytes` long). Returns when the bytes are there."""

    def begin_gather(
        self, blocks: Sequence[Pages], out: Sequence[memoryview], *, after: Fence
    ) -> Fence:
        """As `gather`, but on CUDA only begun: until the fence has passed nobody may write the blocks or
        touch `out`. With one begun before the last one has ended the bus never idles."""
        self.gather(blocks, out, after=after)
        return Passed()

    @abstractmethod
    def scatter(self, data: Sequence[memoryview], blocks: Sequence[Pages]) -> None:
        """Copy `data[i]` (`part_bytes` long) into block i's pages. Returns when the bytes are there."""

    @abstractmethod
    def host_buffer(self, num_bytes: int) -> memoryview:
        """Fresh writable host memory that scatter reads fastest (page-locked on CUDA)."""

    @abstractmethod
    def pin(self, memory: memoryview) -> None:
        """Page-lock memory of somebody else, such as a window, so that gathers into it are fast.

        Must be undone by `unpin` before the memory is unmapped: the driver goes by address, and would
        write into the old pages when something else is mapped there. Raises TransferError if what the
        device writes there does not show; nothing to do on CPU.
        """

    @abstractmethod
    def unpin(self, memory: memoryview) -> None:
        """Undo `pin`. Idempotent."""

    def landing(self, arena: memoryview) -> Landing | None:
        """Loads straight from `arena`; None where a copy by the CPU is the fastest way anyhow."""
        return None


class Landing(ABC):
    """Loads from one mapped arena into a pool, chunk by chunk. For one thread, but `pin` and `unpin`."""

    chunk_parts: int
    """Most parts of one `begin`."""
    max_arrivals: int
    """Most that may be open, begun and not landed, at once."""
    borrowed: BorrowedPools
    """HBM of other engines, to load from as well."""

    @abstractmethod
    def pin(self, offset: int, num_bytes: int) -> None:
        """Page-lock a slice of the arena, whole pages. Raises TransferError if the driver refuses."""

    @abstractmethod
    def unpin(self) -> None:
        """Undo every `pin`: before the arena is unmapped. Idempotent."""

    @abstractmethod
    def covers(self, offsets: Sequence[int]) -> bool:
        """Whether the parts at these offsets of the arena can be loaded: all of them are page-locked."""

    @abstractmethod
    def begin(self, offsets: Sequence[int]) -> Arrival:
        """Start the DMA of parts into the next buffer, and their checksums behind it."""

    @abstractmethod
    def begin_borrowed(self, pool: BorrowedPool, pages: PoolPages) -> Arrival:
        """As `begin`, of parts in another engine's HBM, one a row of `pages`."""

    @abstractmethod
    def checksums(self, arrival: Arrival) -> list[bytes]:
        """XXH3-128 of each of the arrival's parts, 16 B, of the buffer's bytes. After `done`."""

    @abstractmethod
    def land(self, arrival: Arrival, blocks: Sequence[Pages]) -> None:
        """Write the arrival's leading parts into `blocks`, its buffer is free then. Waits for nothing."""

    @abstractmethod
    def begin_layers(
        self, offsets: Sequence[int], blocks: Sequence[Pages], num_layers: int
    ) -> LayerArrival | None:
        """Start the DMA of parts straight into `blocks`, unverified, layer by layer; None where the pool does
        not lie so that it can."""

    @abstractmethod
    def begin_in_place(
        self, pool: BorrowedPool, pages: PoolPages, blocks: Sequence[Pages]
    ) -> LayerArrival | None:
        """Start copying parts in another engine's HBM straight into `blocks`, unverified; None as above."""

    @abstractmethod
    def layer_checksums(self, arrival: LayerArrival) -> list[bytes]:
        """As `checksums`, of the bytes in the blocks. After `done`."""

    @abstractmethod
    def wait(self) -> None:
        """Until no DMA reads the arena and everything landed is in the pool."""


class Arrival(NamedTuple):
    """Parts on their way into a buffer. `done`: they are there, checksums included."""

    buffer: torch.Tensor
    number: int
    done: Fence
    accumulators: torch.Tensor | None = None  # of a landing: int64 [parts, 8], on the host


class LayerArrival(NamedTuple):
    """Parts on their way into their blocks. `before`: what must have passed before a layer (0, and each at
    which the next ones begin) reads them. `done`: all are there, checksums included. `kept`: is read until
    then, and torch would give its memory away."""

    before: Mapping[int, Fence]
    done: Fence
    accumulators: torch.Tensor
    kept: torch.Tensor | None = None


def mover_for(pool: torch.Tensor, shape: PoolShape, shared: SharedPool | None = None) -> Mover:
    """The mover of the device that `pool` lies on. `pool` as `layout` describes it; `shared`: what others of
    the host may read it by."""
    if not pool.is_cuda:
        return HostMover(pool, shape)
    mover = StagedMover(
        PagedRuns([pages_as_bytes(pool)]),
        shape.pages_per_block,
        reads_in_place=shape.page_bytes >= LONG_RUN_BYTES,
    )
    mover.shared = shared
    return mover


def prove_layout(pool: torch.Tensor, shape: PoolShape, mover: Mover) -> None:
    """Store, load, compare on the real tensors, before anything is served. Uses and zeroes some pages.

    Raises ConfigError if what comes back is not bit for bit what was there.
    """
    k = shape.pages_per_block
    if shape.num_pages < 2 * k:
        raise ConfigError(f"a pool of {shape.num_pages} pages holds no two blocks of {k}")
    source, target = list(range(k)), list(range(k, 2 * k))
    stored = pages_as_bytes(pool)
    stored[:k] = torch.randint(0, 256, (k, shape.page_bytes), dtype=torch.uint8).to(pool.device)
    host = mover.host_buffer(shape.part_bytes)
    mover.gather([source], [host], after=mover.fence())
    mover.scatter([host], [target])
    same = torch.equal(stored[:k], stored[k : 2 * k])
    same &= bytes(host) == stored[:k].cpu().numpy().tobytes()
    stored[: 2 * k] = 0
    if not same:
        raise ConfigError("blocks do not survive a store and a load on this device")


class HostMover(Mover):
    """Pool in CPU memory: each page is one memcpy, outside the interpreter lock."""

    def __init__(self, pool: torch.Tensor, shape: PoolShape) -> None:
        self.part_bytes = shape.part_bytes
        self._page_bytes = shape.page_bytes
        self._rows: npt.NDArray[np.uint8] = pages_as_bytes(pool).numpy()

    def fence(self) -> Fence:
        return Passed()

    def gather(self, blocks: Sequence[Pages], out: Sequence[memoryview], *, after: Fence) -> None:
        after.wait()
        for pages, target in zip(blocks, out, strict=True):
            runs = np.frombuffer(target, np.uint8).reshape(len(pages), self._page_bytes)
            for run, page in zip(runs, pages, strict=True):
                run[:] = self._rows[page]

    def scatter(self, data: Sequence[memoryview], blocks: Sequence[Pages]) -> None:
        for source, pages in zip(data, blocks, strict=True):
            runs = np.frombuffer(source, np.uint8).reshape(len(pages), self._page_bytes)
            for run, page in zip(runs, pages, strict=True):
                self._rows[page] = run

    def host_buffer(self, num_bytes: int) -> memoryview:
        return np.empty(num_bytes, np.uint8).data

    def pin(self, memory: memoryview) -> None:
        return

    def unpin(self, memory: memoryview) -> None:
        return


class _Direction:
    """Some buffers, the lane of their DMA and the lane of their kernels. Used under its lock."""

    def __init__(self, device: torch.device, num_bytes: int, num_buffers: int = 2) -> None:
        self.lock = threading.Lock()
        self.dma = new_lane(device)
        self.kernels = new_lane(device)
        self.free: list[Fence] = [Passed()] * num_buffers  # when each buffer may be written again
        self._device = device
        self._num_bytes = num_bytes
        self._buffers: list[torch.Tensor] = []
        self._turn = 0

    def next(self) -> tuple[int, torch.Tensor]:
        """The buffer whose turn it is, and its number. Made at first use."""
        if not self._buffers:
            self._buffers = [
                torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
                for _ in self.free
            ]
            fence_here(self._device).wait()  # the memory may be in use still by who had it before
        self._turn = (self._turn + 1) % len(self.free)
        return self._turn, self._buffers[self._turn]


class StagedMover(Mover):
    """Paged KV of any number of regions in device memory; on the CPU for tests."""

    pins_memory = True

    def __init__(
        self,
        paged: PagedRuns,
        pages_per_block: int,
        *,
        stage_bytes: int = STAGE_BYTES,
        reads_in_place: bool = False,
    ) -> None:
        """`reads_in_place`: gathers go without a kernel and a buffer; for a single region."""
        self.page_bytes = paged.page_bytes
        self.part_bytes = pages_per_block * paged.page_bytes
        self.chunk_parts = max(1, stage_bytes // self.part_bytes)
        self.pages_per_block = pages_per_block
        self._paged = paged
        self._device = paged.device
        size = self.chunk_parts * self.part_bytes
        self._out = _Direction(self._device, size)
        self._in = _Direction(self._device, size)
        self._landing_in = _Direction(self._device, size, LANDING_BUFFERS)
        self._pinned = PinnedMemory(self._device)
        self._in_place = paged.only_region if reads_in_place else None

    def fence(self) -> Fence:
        return fence_here(self._device)

    def gather(self, blocks: Sequence[Pages], out: Sequence[memoryview], *, after: Fence) -> None:
        self.begin_gather(blocks, out, after=after).wait()

    def begin_gather(
        self, blocks: Sequence[Pages], out: Sequence[memoryview], *, after: Fence
    ) -> Fence:
        side, size, k = self._out, self.part_bytes, self.pages_per_block
        addresses = np.array([address_of(view) for view in out], dtype=np.int64)
        if self._in_place is not None:
            return self._begin_in_place(self._in_place, blocks, addresses, after)
        with side.lock, side.kernels.use():
            side.kernels.wait_for(after)
            index = self._index(blocks)
            with _ended_on_failure(side.dma):
                for start in range(0, len(blocks), self.chunk_parts):
                    stop = min(start + self.chunk_parts, len(blocks))
                    number, buffer = side.next()
                    side.kernels.wait_for(side.free[number])
                    self._read(index[start * k : stop * k], buffer[: (stop - start) * size], after)
                    side.dma.wait_for(side.kernels.mark())
                    here = buffer.data_ptr() + size * np.arange(stop - start, dtype=np.int64)
                    side.dma.copy(self._pinned.copies(addresses[start:stop], here, size, host=0))
                    side.free[number] = side.dma.mark()
            return side.dma.mark()

    def _begin_in_place(
        self, region: torch.Tensor, blocks: Sequence[Pages], addresses: Addresses, after: Fence
    ) -> Fence:
        side = self._out
        pages = np.array([tuple(pages) for pages in blocks], dtype=np.int64)
        sources = (pages * region.stride(0) + region.data_ptr()).ravel()
        within = np.arange(self.pages_per_block, dtype=np.int64) * self.page_bytes
        targets = (addresses[:, None] + within).ravel()
        with side.lock:
            side.dma.wait_for(after)
            with _ended_on_failure(side.dma):
                side.dma.copy(self._pinned.copies(targets, sources, self.page_bytes, host=0))
            return side.dma.mark()

    def _read(self, pages: torch.Tensor, buffer: torch.Tensor, after: Fence) -> None:
        """Enqueue pages -> buffer on the current lane, for a gather behind `after`."""
        self._paged.gather(pages, buffer)

    def scatter(self, data: Sequence[memoryview], blocks: Sequence[Pages]) -> None:
        side = self._in
        addresses = np.array([address_of(view) for view in data], dtype=np.int64)
        with side.lock:
            for start in range(0, len(blocks), self.chunk_parts):
                chunk = slice(start, start + self.chunk_parts)
                number, buffer = side.next()
                arrived = self.copy_in(side, number, buffer, addresses[chunk])
                self.spread(side, Arrival(buffer, number, arrived), blocks[chunk])
            side.kernels.mark().wait()

    def host_buffer(self, num_bytes: int) -> memoryview:
        is_cuda = self._device.type == "cuda"
        with on_device(self._device):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda).numpy().data

    def pin(self, memory: memoryview) -> None:
        self._pinned.add(address_of(memory), memory.nbytes, is_writable=True)
        self._probe(memory)

    def unpin(self, memory: memoryview) -> None:
        self._pinned.remove(address_of(memory))

    def landing(self, arena: memoryview) -> Landing | None:
        if not supports(self.part_bytes):
            return None
        checksums = DeviceChecksums(self._device, self.part_bytes)
        return _StagedLanding(self, self._landing_in, checksums, arena)

    def copy_in(
        self, side: _Direction, number: int, buffer: torch.Tensor, addresses: Addresses
    ) -> Fence:
        """Enqueue host -> buffer behind the buffer's last use; the fence is behind the copies."""
        side.dma.wait_for(side.free[number])
        here = buffer.data_ptr() + self.part_bytes * np.arange(len(addresses), dtype=np.int64)
        side.dma.copy(self._pinned.copies(here, addresses, self.part_bytes, host=1))
        return side.dma.mark()

    def spread(self, side: _Direction, arrival: Arrival, blocks: Sequence[Pages]) -> None:
        """Enqueue buffer -> pages behind the arrival."""
        with side.kernels.use():
            side.kernels.wait_for(arrival.done)
            if blocks:
                self._paged.scatter(self._used(arrival.buffer, blocks), self._index(blocks))
            side.free[arrival.number] = side.kernels.mark()

    @property
    def pinned(self) -> PinnedMemory:
        return self._pinned

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def page_major(self) -> torch.Tensor | None:
        """uint8 [num_pages, page_bytes] if each page is one run of bytes."""
        return self._paged.only_region

    def index(self, blocks: Sequence[Pages]) -> torch.Tensor:
        """As kernels take it, on the current stream."""
        return self._index(blocks)

    def _used(self, buffer: torch.Tensor, blocks: Sequence[Pages]) -> torch.Tensor:
        return buffer[: len(blocks) * self.part_bytes]

    def _index(self, blocks: Sequence[Pages]) -> torch.Tensor:
        """int64 [num_blocks * pages_per_block] on the pool's device, by the current stream."""
        pages = torch.tensor([page for pages in blocks for page in pages])
        if self._device.type == "cuda":
            return pages.pin_memory().to(self._device, non_blocking=True)
        return pages

    def _probe(self, memory: memoryview) -> None:
        """Does what the device writes to both ends of `memory` show there? Leaves them overwritten."""
        if self._device.type != "cuda":
            return
        size = min(PROBE_BYTES, memory.nbytes)
        for end in (memory[:size], memory[memory.nbytes - size :]):
            written = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self._device)
            torch.frombuffer(end, dtype=torch.uint8).copy_(written, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
            if bytes(end) != written.cpu().numpy().tobytes():
                raise TransferError("the device writes to other pages than are mapped here")


class _StagedLanding(Landing):
    def __init__(
        self,
        mover: StagedMover,
        side: _Direction,
        checksums: DeviceChecksums,
        arena: memoryview,
    ) -> None:
        self.chunk_parts = mover.chunk_parts
        self.max_arrivals = len(side.free)
        self.borrowed = BorrowedPools(mover.device, mover.page_bytes, mover.pages_per_block)
        self._mover = mover
        self._side = side
        self._checksums = checksums
        self._checks = new_lane(mover.device)
        self._accumulators = [
            mover.host_buffer(self.chunk_parts * ACCUMULATOR_BYTES) for _ in side.free
        ]
        self._start = address_of(arena)
        self._arena = arena  # held: it must not be unmapped while it is page-locked
        self._slices: list[int] = []  # addresses

    def pin(self, offset: int, num_bytes: int) -> None:
        address = self._start + offset
        if not self._mover.pinned.add(address, num_bytes, is_writable=False):
            raise TransferError("the driver does not page-lock the arena; loads are copied twice")
        self._slices.append(address)

    def unpin(self) -> None:
        while self._slices:
            self._mover.pinned.remove(self._slices.pop())

    def covers(self, offsets: Sequence[int]) -> bool:
        addresses = np.array(offsets, dtype=np.int64) + self._start
        return self._mover.pinned.holds(addresses, self._mover.part_bytes)

    def begin(self, offsets: Sequence[int]) -> Arrival:
        number, buffer = self._side.next()
        addresses = np.array(offsets, dtype=np.int64) + self._start
        arrived = self._mover.copy_in(self._side, number, buffer, addresses)
        return self._checked(number, buffer, len(offsets), arrived)

    def begin_borrowed(self, pool: BorrowedPool, pages: PoolPages) -> Arrival:
        number, buffer = self._side.next()
        with self._side.dma.use():
            self._side.dma.wait_for(self._side.free[number])
            parts = buffer[: len(pages) * self._mover.part_bytes]
            pool.gather(self._mover.index(pages.tolist()), parts)
            arrived = self._side.dma.mark()
        return self._checked(number, buffer, len(pages), arrived)

    def _checked(self, number: int, buffer: torch.Tensor, count: int, arrived: Fence) -> Arrival:
        """The checksums of the parts that `arrived` stands behind, and a fence behind them."""
        parts = buffer[: count * self._mover.part_bytes]
        used = self._accumulators[number][: count * ACCUMULATOR_BYTES]
        on_host = torch.frombuffer(used, dtype=torch.int64).view(count, -1)
        with self._checks.use():
            self._checks.wait_for(arrived)
            on_host.copy_(self._checksums.accumulate(parts), non_blocking=True)
            return Arrival(buffer, number, self._checks.mark(), on_host)

    def checksums(self, arrival: Arrival) -> list[bytes]:
        assert arrival.accumulators is not None
        return self._checksums.digests(arrival.accumulators)

    def land(self, arrival: Arrival, blocks: Sequence[Pages]) -> None:
        self._mover.spread(self._side, arrival, blocks)

    def begin_layers(
        self, offsets: Sequence[int], blocks: Sequence[Pages], num_layers: int
    ) -> LayerArrival | None:
        region, layer_bytes = self._mover.page_major, self._mover.page_bytes // num_layers
        if region is None or not supports_pages(layer_bytes):
            return None
        sources, targets = self._page_addresses(region, offsets, blocks)
        before: dict[int, Fence] = {}
        pinned = self._mover.pinned
        groups = min(LAYER_GROUPS, num_layers)
        used = self._mover.host_buffer(len(offsets) * ACCUMULATOR_BYTES)
        on_host = torch.frombuffer(used, dtype=torch.int64).view(len(offsets), -1)
        with self._checks.use():
            begun = self._checksums.begin_paged(region, self._mover.index(blocks))
            for group in range(groups):
                first, stop = num_layers * group // groups, num_layers * (group + 1) // groups
                start, size = first * layer_bytes, (stop - first) * layer_bytes
                self._side.dma.copy(pinned.copies(targets + start, sources + start, size, host=1))
                before[first] = self._side.dma.mark()
                self._checks.wait_for(before[first])
                self._checksums.add_paged(begun, start, size)
            on_host.copy_(self._checksums.accumulate_paged(begun), non_blocking=True)
            return LayerArrival(before, self._checks.mark(), on_host)

    def begin_in_place(
        self, pool: BorrowedPool, pages: PoolPages, blocks: Sequence[Pages]
    ) -> LayerArrival | None:
        region = self._mover.page_major
        if region is None or not supports_pages(self._mover.page_bytes):
            return None
        used = self._mover.host_buffer(len(blocks) * ACCUMULATOR_BYTES)
        on_host = torch.frombuffer(used, dtype=torch.int64).view(len(blocks), -1)
        with self._side.dma.use():
            kept = pool.copy(pages, region, np.array(blocks, dtype=np.int64), self._side.dma)
            arrived = self._side.dma.mark()
        with self._checks.use():
            begun = self._checksums.begin_paged(region, self._mover.index(blocks))
            self._checks.wait_for(arrived)
            self._checksums.add_paged(begun, 0, self._mover.page_bytes)
            on_host.copy_(self._checksums.accumulate_paged(begun), non_blocking=True)
            return LayerArrival({}, self._checks.mark(), on_host, kept)

    def layer_checksums(self, arrival: LayerArrival) -> list[bytes]:
        return self._checksums.digests(arrival.accumulators)

    def _page_addresses(
        self, region: torch.Tensor, offsets: Sequence[int], blocks: Sequence[Pages]
    ) -> tuple[Addresses, Addresses]:
        """Of every page of every part: in the arena, and in the pool."""
        pages = np.array([page for block in blocks for page in block], dtype=np.int64)
        per_part = len(pages) // len(offsets)
        starts = np.repeat(np.array(offsets, dtype=np.int64) + self._start, per_part)
        within = np.tile(np.arange(per_part, dtype=np.int64) * region.shape[1], len(offsets))
        return starts + within, pages * region.stride(0) + region.data_ptr()

    def wait(self) -> None:
        self._side.dma.mark().wait()
        self._checks.mark().wait()
        self._side.kernels.mark().wait()


@contextlib.contextmanager
def _ended_on_failure(lane: Lane) -> Iterator[None]:
    """What was begun inside has ended before the caller hears that not all of it was."""
    try:
        yield
    except BaseException:
        lane.mark().wait()
        raise
