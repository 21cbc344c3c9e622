"""Moves fabric blocks between the paged pool and host memory; the only file that touches CUDA streams.

A `Mover` belongs to one pool and is used by the connector's threads: any number of gathers and scatters may
run at once as long as they name different pages. Both return only when the bytes have landed, so the caller
may free source or destination at once. Neither allocates in the pool nor knows keys.

On CUDA a gather runs on a stream of its own after the fence (what had been launched when the block was
handed over): pages -> device buffer (one indexed kernel) -> one DMA into page-locked memory. A scatter goes
the other way. Windows are page-locked where the driver agrees (`pin`); otherwise copies are only slower.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvfabric.errors import ConfigError, TransferError
from kvfabric_engine.layout import PoolShape, pages_as_bytes

Pages = Sequence[int]
"""The pages of one fabric block, in the order of their tokens: `pages_per_block` indexes into the pool."""


PROBE_BYTES = 64


class Fence(ABC):
    """A point in the engine's compute order: a gather behind it sees all that was computed before."""

    @abstractmethod
    def wait(self) -> None:
        """Block the calling thread until everything before the fence is done."""


class _Passed(Fence):
    """On CPU whoever hands a block over has computed it."""

    def wait(self) -> None:
        return


class Mover(ABC):
    """Pool <-> host memory in units of parts. Thread-safe for distinct pages."""

    part_bytes: int

    @abstractmethod
    def fence(self) -> Fence:
        """Call on the engine's thread after launching the step that wrote the blocks."""

    @abstractmethod
    def gather(self, blocks: Sequence[Pages], out: Sequence[memoryview], *, after: Fence) -> None:
        """Copy block i into `out[i]` (writable, `part_bytes` long). Returns when the bytes are there."""

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


def mover_for(pool: torch.Tensor, shape: PoolShape) -> Mover:
    """The mover of the device that `pool` lies on. `pool` as `layout` describes it."""
    return CudaMover(pool, shape) if pool.is_cuda else HostMover(pool, shape)


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
        return _Passed()

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


class _Event(Fence):
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class CudaMover(Mover):
    """Pool in GPU memory. One stream a direction, so a load and a save overlap each other and compute."""

    def __init__(self, pool: torch.Tensor, shape: PoolShape) -> None:
        self.part_bytes = shape.part_bytes
        self._shape = shape
        self._rows = pages_as_bytes(pool)
        self._device = pool.device
        self._to_host = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call] # untyped in torch
        self._to_device = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call] # untyped in torch
        # A stream is an order: two threads interleaving on one would wait for each other's copies.
        self._pinned: set[int] = set()  # addresses
        self._gathering = threading.Lock()
        self._scattering = threading.Lock()

    def fence(self) -> Fence:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call] # untyped in torch
        event.record(torch.cuda.current_stream(self._device))
        return _Event(event)

    def gather(self, blocks: Sequence[Pages], out: Sequence[memoryview], *, after: Fence) -> None:
        with self._gathering, torch.cuda.stream(self._to_host):
            if isinstance(after, _Event):
                self._to_host.wait_event(after.event)
            staged = self._rows.index_select(0, self._index(blocks))
            staged = staged.view(len(blocks), self.part_bytes)
            for row, target in zip(staged, out, strict=True):
                torch.frombuffer(target, dtype=torch.uint8).copy_(row, non_blocking=True)
            self._to_host.synchronize()

    def scatter(self, data: Sequence[memoryview], blocks: Sequence[Pages]) -> None:
        with self._scattering, torch.cuda.stream(self._to_device):
            staged = torch.empty(
                len(blocks), self.part_bytes, dtype=torch.uint8, device=self._device
            )
            for row, source in zip(staged, data, strict=True):
                row.copy_(torch.frombuffer(source, dtype=torch.uint8), non_blocking=True)
            self._rows.index_copy_(0, self._index(blocks), staged.view(-1, self._shape.page_bytes))
            self._to_device.synchronize()

    def _index(self, blocks: Sequence[Pages]) -> torch.Tensor:
        """int64 [num_blocks * pages_per_block] on the pool's device."""
        return torch.tensor([page for pages in blocks for page in pages]).to(self._device)

    def host_buffer(self, num_bytes: int) -> memoryview:
        pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return pinned.numpy().data

    def pin(self, memory: memoryview) -> None:
        address = _address(memory)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call] # untyped in torch
        if int(runtime.cudaHostRegister(address, memory.nbytes, 0)) == 0:
            self._pinned.add(address)
        self._probe(memory)

    def unpin(self, memory: memoryview) -> None:
        address = _address(memory)
        if address in self._pinned:
            self._pinned.remove(address)
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call] # untyped in torch
            runtime.cudaHostUnregister(address)

    def _probe(self, memory: memoryview) -> None:
        """Does what the device writes to both ends of `memory` show there? Leaves them overwritten."""
        size = min(PROBE_BYTES, memory.nbytes)
        for end in (memory[:size], memory[memory.nbytes - size :]):
            written = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self._device)
            torch.frombuffer(end, dtype=torch.uint8).copy_(written, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
            if bytes(end) != written.cpu().numpy().tobytes():
                raise TransferError("the device writes to other pages than are mapped here")


def _address(memory: memoryview) -> int:
    address: int = np.frombuffer(memory, np.uint8).ctypes.data
    return address
