"""What vLLM's own block pool caches, told as fabric events. Sync, on the scheduler's thread.

vLLM publishes its cache by its own hashes, with token ids and salts beside them. Here the pool is followed by
what the scheduler hands out instead: a computed block is cached under its BlockKey until one of its pages is
allocated anew, which is when vLLM drops it, or until the whole cache is reset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kvfabric.types import BlockKey
from kvfabric_engine.pool_events import CachedKey, PoolEvents


class PoolMirror:
    """Fabric blocks held in HBM, by the pages that they lie in.

    `is_caching` False: vLLM has no prefix cache, so it holds none.
    """

    def __init__(self, events: PoolEvents, *, is_caching: bool = True) -> None:
        self._events = events
        self._is_caching = is_caching
        self._by_page: dict[int, tuple[BlockKey, tuple[int, ...]]] = {}
        self._copies: Counter[BlockKey] = Counter()

    def __repr__(self) -> str:
        return f"<PoolMirror {len(self._copies)} blocks>"

    def cached(self, block: CachedKey, pages: Sequence[int]) -> None:
        """`pages` hold this block from now on. Idempotent."""
        if not self._is_caching:
            return
        held = (block.key, tuple(pages))
        if self._by_page.get(pages[0]) == held:
            return
        self.reused(pages)
        self._by_page.update(dict.fromkeys(pages, held))
        self._copies[block.key] += 1
        if self._copies[block.key] == 1:
            self._events.stored(block)

    def reused(self, pages: Iterable[int]) -> None:
        """vLLM allocated these pages: what they held is gone."""
        for page in pages:
            held = self._by_page.get(page)
            if held is None:
                continue
            key, whole = held
            for other in whole:
                del self._by_page[other]
            self._copies[key] -= 1
            if not self._copies[key]:
                del self._copies[key]
                self._events.removed(key)

    def reset(self) -> None:
        """vLLM dropped its whole prefix cache."""
        self.reused(list(self._by_page))
