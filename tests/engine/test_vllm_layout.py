"""vLLM's tensors as parts: every form of them goes out and comes back; no vLLM is needed here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kvfabric_engine.integrations.vllm_layout import SKIP, PagedMover, find_runs, prove
from kvfabric_engine.integrations.vllm_pool import PoolMirror
from kvfabric_engine.pool_events import CachedKey, PoolEvents

from kvfabric.errors import ConfigError
from kvfabric.types import BlockKey

BLOCKS = 12
Tensors = dict[str, torch.Tensor]


def one_storage() -> Tensors:
    """As on CPU: all layers in one storage, a page is [heads, tokens, 2 * head]."""
    whole = torch.randn(3, BLOCKS, 2, 4, 16)
    return {f"layer{i}": whole[i] for i in range(3)}


def blocks_outermost() -> Tensors:
    """BLHNC: the layers of a block next to each other."""
    whole = torch.randn(BLOCKS, 3, 2, 4, 16)
    return {f"layer{i}": whole[:, i] for i in range(3)}


def apart() -> Tensors:
    """A storage a layer, in half precision."""
    return {f"layer{i}": torch.randn(BLOCKS, 2, 4, 16).half() for i in range(3)}


def keys_and_values_apart() -> Tensors:
    return {f"layer{i}": torch.randn(2, BLOCKS, 4, 2, 8) for i in range(2)}


def permuted() -> Tensors:
    """A page of [tokens, heads, head], shown as [heads, tokens, head]."""
    return {"layer": torch.randn(BLOCKS, 4, 2, 8).permute(0, 2, 1, 3)}


def sizes_differ() -> Tensors:
    return {"wide": torch.randn(BLOCKS, 2, 8), "narrow": torch.randn(BLOCKS, 1, 8)}


FORMS = [one_storage, blocks_outermost, apart, keys_and_values_apart, permuted, sizes_differ]


def page(tensors: Tensors, block: int) -> list[torch.Tensor]:
    """What a block holds, layer by layer."""
    return [(t[block] if t.shape[0] == BLOCKS else t[:, block]).clone() for t in tensors.values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_round_trips(form: object) -> None:
    """Blocks 3 and 4 leave by a copy, are zeroed, come back as blocks 7 and 8; nothing else changes."""
    assert callable(form)
    tensors: Tensors = form()
    mover = PagedMover(tensors, num_blocks=BLOCKS, pages_per_block=2)
    before = [page(tensors, block) for block in range(BLOCKS)]
    copied = mover.snapshot([[3, 4]])
    mover.zero([3, 4])
    buffer = mover.host_buffer(mover.part_bytes)
    mover.gather([[3, 4]], [buffer], after=copied)
    mover.free(copied)
    mover.scatter([buffer], [[7, 8]])
    assert equal(page(tensors, 7), before[3])
    assert equal(page(tensors, 8), before[4])
    assert all(not t.any() for t in page(tensors, 3))
    for block in (0, 1, 2, 5, 6, 9, 10, 11):
        assert equal(page(tensors, block), before[block])


@pytest.mark.parametrize("form", FORMS)
def test_self_test_passes_and_leaves_zeros(form: object) -> None:
    assert callable(form)
    tensors: Tensors = form()
    prove(PagedMover(tensors, num_blocks=BLOCKS, pages_per_block=2))
    assert all(not t.any() for block in range(1, 5) for t in page(tensors, block))


def test_self_test_sees_blocks_that_share_memory() -> None:
    """Tensors in which all blocks are one: refused."""
    shared = torch.randn(1, 2, 8).expand(BLOCKS, 2, 8)
    with pytest.raises(ConfigError, match="share memory"):
        prove(PagedMover({"layer": shared}, num_blocks=BLOCKS, pages_per_block=1))


def test_null_block_and_skipped_pages_are_not_written() -> None:
    tensors = one_storage()
    mover = PagedMover(tensors, num_blocks=BLOCKS, pages_per_block=3)
    before = [page(tensors, block) for block in range(BLOCKS)]
    part = memoryview(bytearray(mover.part_bytes))
    mover.scatter([part], [[0, SKIP, 5]])
    assert equal(page(tensors, 0), before[0])
    assert equal(page(tensors, BLOCKS - 1), before[BLOCKS - 1])
    assert all(not t.any() for t in page(tensors, 5))


def test_layers_that_share_a_tensor_are_stored_once() -> None:
    tensors = apart()
    mover = PagedMover(tensors | {"again": tensors["layer0"]}, num_blocks=BLOCKS, pages_per_block=1)
    assert mover.part_bytes == 3 * 2 * 4 * 16 * 2


def test_unknown_forms_are_refused() -> None:
    """No dimension of blocks, or a block with gaps."""
    with pytest.raises(ConfigError, match="no block dimension"):
        find_runs("layer", torch.randn(3, 4, 5), BLOCKS)
    with pytest.raises(ConfigError, match="not contiguous"):
        find_runs("layer", torch.randn(BLOCKS, 4, 8)[:, :, :5], BLOCKS)


def key(number: int) -> CachedKey:
    return CachedKey(BlockKey(bytes([number]) * 32), BlockKey(bytes(32)), b"namespac")


def held(events: PoolEvents) -> int:
    """Blocks that a node new to us would be told of."""
    events.snapshot()
    told = events.take()
    return sum(len(run.keys) // 8 for run in told.stored) if told is not None else 0


def made_of(number: int, *incarnations: bytes) -> CachedKey:
    return replace(key(number), incarnations=incarnations)


def test_what_was_struck_off_is_evicted_and_nothing_else() -> None:
    events = PoolEvents()
    mirror = PoolMirror(events)
    evicted: list[set[int]] = []
    one, two = b"1" * 16, b"2" * 16
    mirror.busy()
    mirror.let_go(evicted.append)
    for block, pages in (
        (made_of(1, one), [3, 4]),
        (made_of(2, one, two), [5, 6]),
        (made_of(3, two), [7, 8]),
    ):
        mirror.cached(block, pages)
    done = mirror.strike((one,))
    assert (done.done(), evicted) == (False, []), "the pool is its own thread's"
    mirror.let_go(evicted.append)
    assert (done.done(), evicted) == (True, [{3, 4, 5, 6}])
    assert held(events) == 1
    # A request that runs with it completes another block: that goes too.
    mirror.cached(made_of(4, one), [9, 10])
    mirror.let_go(evicted.append)
    mirror.let_go(evicted.append)
    assert evicted[1:] == [{9, 10}]
    mirror.cached(key(5), [11])
    assert mirror.strike((b"namespac",)).done() is False
    mirror.let_go(evicted.append)
    assert held(events) == 0


def test_an_idle_engine_lets_go_before_the_next_lookup() -> None:
    events = PoolEvents()
    mirror = PoolMirror(events)
    evicted: list[set[int]] = []
    mirror.busy()
    mirror.cached(made_of(1, b"1" * 16), [3])
    done = mirror.strike((b"1" * 16,))
    assert not done.done()
    mirror.idle()
    assert done.done()
    assert mirror.strike((b"2" * 16,)).done()
    mirror.busy()
    mirror.let_go(evicted.append)
    assert evicted == [{3}]


def test_mirror_follows_the_pool() -> None:
    """A block is there until the first of its pages is reused, and as long as another copy is."""
    events = PoolEvents()
    mirror = PoolMirror(events)
    mirror.cached(key(1), [3, 4])
    mirror.cached(key(1), [3, 4])
    mirror.cached(key(1), [5, 6])
    mirror.cached(key(2), [7, 8])
    assert held(events) == 2
    mirror.reused([4])
    assert held(events) == 2
    mirror.reused([5, 9])
    assert held(events) == 1
    mirror.cached(key(3), [7, 8])
    assert held(events) == 1
    mirror.reset()
    assert held(events) == 0
