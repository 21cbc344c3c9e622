"""KV straight out of the HBM of another engine of the same host, GPU to GPU.

    the one that has it     its pool lies in memory that others can map (`device_memory`); it hands its node
                            the descriptor, and says after each save which pages the stored blocks lie in
    the one that wants it   maps the pools that its node lends it; where `Located` names pages of one, a
                            kernel gathers them over NVLink into a landing buffer, in place of DMA

What lies in somebody's pages is a hint, as old as the last message: nothing keeps them from being given to
other tokens while they are read. So only the copy counts: it is checked, after it has landed, against the
checksum that the node made when the block was stored, and the block is leased and confirmed as every other.
What does not verify comes out of the arena.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvfabric.client.pools import LentPool
from kvfabric.errors import KVFabricError, RemoteProtocolError, TransferError
from kvfabric.protocol.messages import Located, PoolName
from kvfabric_engine import kernels
from kvfabric_engine.device_memory import MappedMemory, ShareableMemory
from kvfabric_engine.lanes import Lane
from kvfabric_engine.layout import PoolShape

log = logging.getLogger(__name__)

LONG_PAGE_BYTES = 1 << 20
"""From this on pages are copied by the copy engines, which leave the multiprocessors to the checksums: 286
GB/s for pages of 2.25 MiB, 240 of 1 MiB, but 137 of 256 KiB, where a kernel reaches 300."""
PoolPages = npt.NDArray[np.int64]
"""[num_parts, pages_per_block]: pages of somebody's pool."""


@dataclass(frozen=True, slots=True)
class SharedPool:
    """Our own pool, for others. `memory.descriptor` goes to the node."""

    memory: ShareableMemory
    num_pages: int
    page_bytes: int


def create_shared(shape: PoolShape, device: torch.device) -> tuple[torch.Tensor, SharedPool | None]:
    """A zeroed pool as `PoolShape.create` makes it, in memory that others can map; in memory of our own, and
    None, where the driver has no such memory."""
    size = shape.num_pages * shape.page_bytes
    try:
        memory = ShareableMemory(size, device)
    except TransferError as exc:
        log.warning("other engines cannot read this one's HBM: %s", exc)
        return shape.create(device), None
    return shape.over(memory.tensor), SharedPool(memory, shape.num_pages, shape.page_bytes)


class BorrowedPool:
    """Somebody else's pool, mapped here read-only: pages of `page_bytes`, one after the other."""

    def __init__(self, lent: LentPool, device: torch.device) -> None:
        """Takes the descriptor over. Raises TransferError if it cannot be mapped."""
        self.num_pages, self.page_bytes = lent.num_pages, lent.page_bytes
        self._device = device
        try:
            self._memory = MappedMemory(lent.descriptor, self.num_pages * self.page_bytes, device)
        finally:
            os.close(lent.descriptor)
        self._bases = torch.tensor([self._memory.address], device=device)

    def gather(self, pages: torch.Tensor, out: torch.Tensor) -> None:
        """Enqueue pages (int64 [n], on our device, each below `num_pages`) -> out (uint8, n * page_bytes)."""
        if self._device.type == "cuda":
            kernels.launch(self._bases, pages, out, self.page_bytes, self.page_bytes, True)
            return
        for number, page in enumerate(pages.tolist()):
            target = out.data_ptr() + number * self.page_bytes
            ctypes.memmove(target, self._memory.address + page * self.page_bytes, self.page_bytes)

    def copy(
        self, pages: PoolPages, target: torch.Tensor, into: PoolPages, lane: Lane
    ) -> torch.Tensor | None:
        """Enqueue pages -> rows `into` of `target`: uint8 [num_pages, page_bytes], ours. What is returned is
        read until that is done."""
        if self.page_bytes < LONG_PAGE_BYTES and self._device.type == "cuda":
            both = np.concatenate([pages.ravel(), into.ravel()])
            index = torch.from_numpy(both).pin_memory().to(self._device, non_blocking=True)
            kernels.copy_pages(
                self._memory.address, index[: pages.size], target, index[pages.size :]
            )
            return index
        sources = pages.ravel() * self.page_bytes + self._memory.address
        targets = into.ravel() * target.stride(0) + target.data_ptr()
        sizes = np.full(len(sources), self.page_bytes, dtype=np.int64)
        lane.copy(np.stack([targets, sources, sizes], axis=1).astype(np.uint64))
        return None

    def close(self) -> None:
        """Nothing reads it any more. Idempotent."""
        self._memory.close()


@dataclass(frozen=True, slots=True)
class Stretch:
    """Blocks [start, stop) of what was located; `pool` None: they come out of the arena."""

    start: int
    stop: int
    pool: BorrowedPool | None
    pages: PoolPages | None


class BorrowedPools:
    """What other engines lend us now. For the connector's load thread alone."""

    def __init__(self, device: torch.device, page_bytes: int, pages_per_block: int) -> None:
        self._device = device
        self._page_bytes = page_bytes
        self._pages_per_block = pages_per_block
        self._pools: dict[PoolName, BorrowedPool] = {}
        self._refused: set[PoolName] = set()
        self.num_borrowed = 0  # blocks that came this way
        self.num_stale = 0  # blocks whose pages held something else by then

    @property
    def owners(self) -> frozenset[PoolName]:
        return frozenset(self._pools)

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks that came so, and those that did not hold what they should, since start."""
        return self.num_borrowed, self.num_stale

    def renew(self, owners: Collection[PoolName], borrow: Callable[[PoolName], LentPool]) -> None:
        """Be left with the pools of `owners`: the memory of an engine that ended must not be held.

        `borrow` asks the node; who is refused is not asked for again."""
        for gone in self._pools.keys() - set(owners):
            self._pools.pop(gone).close()
        self._refused &= set(owners)
        for owner in owners:
            if owner in self._pools or owner in self._refused:
                continue
            try:
                lent = borrow(owner)
                if lent.page_bytes != self._page_bytes:
                    os.close(lent.descriptor)
                    raise TransferError(f"its pages have {lent.page_bytes} B")
                self._pools[owner] = BorrowedPool(lent, self._device)
            except KVFabricError as exc:
                self._refused.add(owner)
                log.warning("cannot read the HBM of engine %s: %s", owner.session.hex()[:8], exc)

    def close(self) -> None:
        """Nothing reads any of them. Idempotent; others may be borrowed after it."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self._refused.clear()

    def stretches(self, located: Located) -> Iterator[Stretch]:
        """What was located, cut where it changes from whom it comes."""
        count, k = located.num_blocks, self._pages_per_block
        if not located.pools or not self._pools:
            yield Stretch(0, count, None, None)
            return
        owner_of = np.frombuffer(located.pool_of, np.uint8)
        pages = np.frombuffer(located.pool_pages, "<u4").astype(np.int64)
        if len(owner_of) != count or len(pages) != count * k:
            raise RemoteProtocolError(f"{count} parts located, but pages of {len(owner_of)} named")
        if int(owner_of.max(initial=0)) > len(located.pools):
            raise RemoteProtocolError("a located part lies in a pool that is not named")
        pages = pages.reshape(count, k)
        edges = [0, *(np.flatnonzero(np.diff(owner_of)) + 1).tolist(), count]
        for start, stop in itertools.pairwise(edges):
            number = int(owner_of[start])
            pool = None
            if number:
                pool = self._pools.get(located.pools[number - 1])
            if pool is not None and int(pages[start:stop].max()) >= pool.num_pages:
                raise RemoteProtocolError("a located page lies outside of its pool")
            yield Stretch(start, stop, pool, None if pool is None else pages[start:stop])
