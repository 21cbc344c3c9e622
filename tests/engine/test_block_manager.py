"""Pages: free, owned, cached, idle. Each page is in one place."""

from __future__ import annotations

import random

import pytest
from kvfabric_engine.pool_events import CachedKey, PoolEvents
from kvfabric_engine.reference.block_manager import BlockManager, CachedBlock

from kvfabric.hashing import ROOT_PARENT, block_keys
from kvfabric.types import BlockKey

KEYS = block_keys(range(16 * 40), 16, bytes(32))


def identity(number: int) -> CachedKey:
    parent = KEYS[number - 1] if number else ROOT_PARENT
    return CachedKey(KEYS[number], parent, b"tag-tag-")


def cache(blocks: BlockManager, numbers: range) -> list[CachedBlock]:
    """Own pages -> cached, referenced once."""
    found = []
    for number in numbers:
        pages = blocks.allocate(blocks.pages_per_block)
        assert pages is not None
        found.append(blocks.register(identity(number), tuple(pages)))
    return found


def test_match_is_the_longest_prefix() -> None:
    """A lookup stops at the first key that is not cached."""
    blocks = BlockManager(40, 2, PoolEvents())
    held = cache(blocks, range(3))
    assert blocks.match_prefix(KEYS[:5]) == held
    assert blocks.match_prefix(KEYS[1:]) == held[1:]
    assert blocks.match_prefix([BlockKey(bytes(32)), *KEYS]) == []


def test_referenced_blocks_are_never_evicted() -> None:
    """Only idle blocks give way; too few of them is None, and nothing changed."""
    blocks = BlockManager(8, 2, PoolEvents())
    held = cache(blocks, range(3))
    blocks.unreference(held[2:])
    assert blocks.allocate(5) is None
    assert blocks.match_prefix(KEYS[:3]) == held
    assert len(blocks.allocate(4) or []) == 4
    assert blocks.match_prefix(KEYS[:3]) == held[:2]


def test_the_end_of_a_chain_goes_first() -> None:
    """Of one chain, a block outlives what hangs on it."""
    blocks = BlockManager(6, 2, PoolEvents())
    blocks.unreference(cache(blocks, range(3)))
    blocks.allocate(2)
    assert [b.key for b in blocks.match_prefix(KEYS[:3])] == KEYS[:2]


def test_same_key_twice_keeps_the_first() -> None:
    """Two sequences computed one block: the second gets the first's pages and its own are free."""
    blocks = BlockManager(4, 2, PoolEvents())
    (first,) = cache(blocks, range(1))
    (second,) = cache(blocks, range(1))
    assert second is first
    assert first.refs == 2
    assert blocks.num_available_pages == 2
    blocks.check_integrity()


def test_events_follow_the_cache() -> None:
    """Each block is announced once when cached and once when dropped."""
    events = PoolEvents()
    blocks = BlockManager(4, 2, events)
    blocks.unreference(cache(blocks, range(2)))
    stored = events.take()
    assert stored is not None
    assert [run.keys for run in stored.stored] == [KEYS[0][:8] + KEYS[1][:8]]
    assert blocks.clear() == 2
    removed = events.take()
    assert removed is not None
    assert sum(len(run.keys) for run in removed.removed) == 16
    assert events.take() is None


@pytest.mark.parametrize("seed", range(3))
def test_random_use_keeps_every_page_in_one_place(seed: int) -> None:
    """Any order of allocating, registering, sharing and freeing leaves the books balanced."""
    rng = random.Random(seed)
    blocks = BlockManager(24, 2, PoolEvents())
    owned: list[list[int]] = []
    held: list[list[CachedBlock]] = []
    for _ in range(400):
        action = rng.randrange(4)
        if action == 0 and (pages := blocks.allocate(2)) is not None:
            owned.append(pages)
        elif action == 1 and owned:
            own = tuple(owned.pop())
            held.append([blocks.register(identity(rng.randrange(12)), own)])
        elif action == 2 and held:
            blocks.unreference(held.pop(rng.randrange(len(held))))
        elif action == 3 and (hits := blocks.match_prefix(KEYS[: rng.randrange(6)])):
            blocks.reference(hits)
            held.append(hits)
        blocks.check_integrity()
    for pages in owned:
        blocks.free(pages)
    for chain in held:
        blocks.unreference(chain)
    assert blocks.num_available_pages == 24
    assert blocks.statistics().used == 0


def test_what_is_struck_off_goes_and_is_found_by_nobody() -> None:
    """Idle blocks go at once, used ones with their last user; what is computed on is not cached again."""
    blocks = BlockManager(40, 2, PoolEvents())
    free = blocks.statistics().free
    idle = cache(blocks, range(2))
    blocks.unreference(idle)
    struck = [
        CachedKey(KEYS[number], KEYS[number - 1], b"tag-tag-", (b"i" * 16,)) for number in (2, 3, 4)
    ]
    used = [blocks.register(one, tuple(blocks.allocate(2) or ())) for one in struck[:2]]
    blocks.strike([b"i" * 16])
    assert blocks.match_prefix(KEYS[:5]) == idle
    later = blocks.register(struck[2], tuple(blocks.allocate(2) or ()))
    assert blocks.match_prefix(KEYS[4:5]) == []
    blocks.check_integrity()
    is_used = blocks.holds_struck
    blocks.unreference([*used, later])
    assert (is_used, blocks.holds_struck) == (True, False)
    assert blocks.statistics().free == free - 4
    blocks.strike([b"tag-tag-"])
    assert blocks.statistics().free == free
    blocks.check_integrity()
