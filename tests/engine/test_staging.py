"""Blocks survive the way from the pool to bytes and back, on every device there is."""

from __future__ import annotations

import pytest
import torch
from kvfabric_engine.layout import PoolShape, default_block_tokens
from kvfabric_engine.staging import HostMover, mover_for, prove_layout

from kvfabric.errors import ConfigError

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
