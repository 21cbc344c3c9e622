"""Blocks survive the way from the pool to bytes and back, on every device there is."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
import torch
from kvfabric_engine.kernels import PagedRuns
from kvfabric_engine.lanes import new_lane
from kvfabric_engine.layout import PoolShape, default_block_tokens, pages_as_bytes
from kvfabric_engine.registrations import PinnedMemory, address_of
from kvfabric_engine.staging import HostMover, StagedMover, mover_for, prove_layout

from kvfabric.errors import ConfigError, TransferError

SHAPE = PoolShape(16, 2, 8, 2, 16, torch.float32, block_tokens=24)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_move_bit_for_bit(device: str, dtype: torch.dtype) -> None:
    """Bytes are the pages in order, each as the pool holds it; scatter puts them where it is told."""
    shape = PoolShape(16, 2, 8, 2, 16, dtype, block_tokens=24)
    pool = shape.create(torch.device(device))
    pool.copy_(torch.randn(pool.shape))
    mover = mover_for(pool, shape)
    blocks = [(3, 0, 9), (1, 2, 4)]
    out = [mover.host_buffer(shape.part_bytes) for _ in blocks]
    mover.gather(blocks, out, after=mover.fence())
    for pages, data in zip(blocks, out, strict=True):
        expected = pool[list(pages)].contiguous().view(torch.uint8).cpu().numpy().tobytes()
        assert bytes(data) == expected
    mover.scatter(out, [(10, 11, 12), (13, 14, 15)])
    assert torch.equal(pool[[10, 11, 12, 13, 14, 15]], pool[[3, 0, 9, 1, 2, 4]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_one_tensor", [True, False])
def test_layers_anywhere_make_the_same_parts(device: str, in_one_tensor: bool) -> None:
    """KV of any number of regions: page by page, region by region; several chunks through two buffers, of two
    gathers of which the second begins before the first has ended."""
    shape = PoolShape(40, 3, 8, 2, 16, torch.bfloat16, block_tokens=16)
    pool = shape.create(torch.device(device))
    pool.copy_(torch.randn(pool.shape))
    if in_one_tensor:  # layers are slices of a page
        size = shape.page_bytes // 3
        regions = [pages_as_bytes(pool)[:, i * size : (i + 1) * size] for i in range(3)]
    else:
        regions = [pages_as_bytes(pool[:, i].contiguous()) for i in range(3)]
    mover = StagedMover(PagedRuns(regions), 2, stage_bytes=2 * shape.part_bytes)
    blocks = [(2 * n, 39 - 2 * n) for n in range(7)]
    host = mover.host_buffer(7 * shape.part_bytes)
    parts = [host[n * shape.part_bytes : (n + 1) * shape.part_bytes] for n in range(7)]
    begun = [
        mover.begin_gather(blocks[some], parts[some], after=mover.fence())
        for some in (slice(3), slice(3, None))
    ]
    for fence in begun:
        fence.wait()
    pages = [page for block in blocks for page in block]
    expected = pool[pages].contiguous().view(torch.uint8).cpu().numpy().tobytes()
    assert bytes(host) == expected
    targets = [(14 + 2 * n, 15 + 2 * n) for n in range(5)]
    mover.scatter(parts[2:], targets)
    if in_one_tensor:  # the same bytes without a kernel
        for index in range(3):
            mover = StagedMover(PagedRuns([regions[index]]), 2, reads_in_place=True)
            plain = StagedMover(PagedRuns([regions[index]]), 2)
            size = mover.part_bytes
            two = [mover.host_buffer(2 * size) for _ in range(2)]
            for gather, place in zip((mover.gather, plain.gather), two, strict=True):
                gather(blocks[2:4], [place[:size], place[size:]], after=mover.fence())
            assert bytes(two[0]) == bytes(two[1])
    moved = torch.cat([region[14:24] for region in regions], dim=1).cpu()
    assert moved.numpy().tobytes() == expected[2 * shape.part_bytes :]


@pytest.mark.parametrize("device", DEVICES)
def test_layout_is_proved_before_serving(device: str) -> None:
    """The round trip leaves the pool zeroed."""
    pool = SHAPE.create(torch.device(device))
    prove_layout(pool, SHAPE, mover_for(pool, SHAPE))
    assert not pool.any()


class _Swapped(HostMover):
    """A mover with one mistake: it scatters a block's pages in reverse."""

    def scatter(self, data, blocks):  # type: ignore[no-untyped-def]
        super().scatter(data, [tuple(reversed(pages)) for pages in blocks])


def test_proof_finds_a_wrong_layout() -> None:
    """A device or kernel that mixes up pages does not get to serve."""
    pool = SHAPE.create(torch.device("cpu"))
    with pytest.raises(ConfigError, match="survive"):
        prove_layout(pool, SHAPE, _Swapped(pool, SHAPE))


def test_sizes() -> None:
    """Part bytes are the pages' bytes; the layout declares them; odd multiples are refused."""
    assert SHAPE.page_bytes == 2 * 2 * 8 * 2 * 16 * 4
    assert SHAPE.part_bytes == 3 * SHAPE.page_bytes
    layout = SHAPE.block_layout(rope="r", packing="p")
    assert layout.block_bytes == SHAPE.part_bytes
    assert layout.dtype == "float32"
    assert [default_block_tokens(n) for n in (16, 48, 64, 128)] == [64, 96, 64, 128]
    with pytest.raises(ConfigError, match="no multiple"):
        PoolShape(16, 2, 8, 2, 16, torch.float32, block_tokens=20)


class _Memory:
    """`size` bytes of a file in memory, mapped; another may be mapped at the same address."""

    def __init__(self, size: int) -> None:
        self._descriptor = os.memfd_create("test")
        os.truncate(self._descriptor, size)
        self._map = mmap.mmap(self._descriptor, size)
        self.view = memoryview(self._map)
        self.address = np.frombuffer(self.view, np.uint8).ctypes.data

    def close(self) -> None:
        self.view.release()
        self._map.close()
        os.close(self._descriptor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_unpinned", [True, False])
def test_memory_mapped_where_pinned_memory_was(device: str, is_unpinned: bool) -> None:
    """A new window at the old one's address gets the bytes, since the old one was unpinned first.

    With that guard removed, the device writes into the old pages: the probe finds it and refuses.
    """
    pool = SHAPE.create(torch.device(device))
    pool.copy_(torch.randn(pool.shape))
    mover = StagedMover(PagedRuns([pages_as_bytes(pool)]), SHAPE.pages_per_block)
    old = _Memory(1 << 20)
    mover.pin(old.view)
    if is_unpinned or device == "cpu":
        mover.unpin(old.view)
    old.close()
    new = _Memory(1 << 20)
    assert new.address == old.address
    if not is_unpinned and device != "cpu":
        with pytest.raises((TransferError, RuntimeError)):
            mover.pin(new.view)
        mover.pinned.remove(old.address)  # for the tests after this one
    else:
        mover.pin(new.view)
        with new.view[: SHAPE.part_bytes] as part:
            mover.gather([(1, 2, 3)], [part], after=mover.fence())
            assert bytes(part) == pool[1:4].contiguous().view(torch.uint8).cpu().numpy().tobytes()
        mover.unpin(new.view)
    new.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_refused_copy_is_told_once_cuda() -> None:
    """Out of one registration into the next; what the thread launches after it does not fail for it."""
    device = torch.device("cuda")
    lane, pinned = new_lane(device), PinnedMemory(device)
    memory = memoryview(mmap.mmap(-1, 2 * mmap.PAGESIZE))
    seam = address_of(memory) + mmap.PAGESIZE
    for start in (seam - mmap.PAGESIZE, seam):
        assert pinned.add(start, mmap.PAGESIZE, is_writable=True)
    here = torch.zeros(64, dtype=torch.uint8, device=device)
    for count in (1, 2):
        rows = [(here.data_ptr(), seam - 4, 8)] * count
        with pytest.raises(TransferError, match="refuses"):
            lane.copy(np.array(rows, dtype=np.uint64))
        assert int((here + 1).sum()) == 64
    for start in (seam - mmap.PAGESIZE, seam):
        pinned.remove(start)
