"""What vLLM's own block pool caches, told as fabric events. Sync, on the scheduler's thread except `strike`.

vLLM publishes its cache by its own hashes, with token ids and salts beside them. Here the pool is followed by
what the scheduler hands out instead: a computed block is cached under its BlockKey until one of its pages is
allocated anew, which is when vLLM drops it, or until the whole cache is reset.

What was struck off for good leaves vLLM's prefix cache page by page (`BlockPool.evict_blocks`), on the thread
that owns the pool: before the next request is looked up, and at the end of each step. Requests that run with
such a block go on with it. Pages behind a prompt's last whole block stay until they are used anew: nobody
reaches them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

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
        self._lock = threading.Lock()
        self._waiting: list[tuple[tuple[bytes, ...], Future[None]]] = []
        self._is_idle = True
        self._struck: frozenset[bytes] = frozenset()
        self._leaving: set[int] = set()

    def __repr__(self) -> str:
        return f"<PoolMirror {len(self._copies)} blocks>"

    def cached(self, block: CachedKey, pages: Sequence[int]) -> None:
        """`pages` hold this block from now on. Idempotent."""
        if not self._is_caching:
            return
        if self._struck and block.is_struck(self._struck):
            self._leaving.update(pages)
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

    def strike(self, names: tuple[bytes, ...]) -> Future[None]:
        """Have vLLM let go of blocks made of these incarnations or in these namespaces. Any thread. Done when
        no lookup finds one: at once where no request is there, since the next one begins with `let_go`."""
        done: Future[None] = Future()
        with self._lock:
            self._waiting.append((names, done))
            if self._is_idle:
                done.set_result(None)
        return done

    def busy(self) -> None:
        """A request came; `let_go` follows, before vLLM looks it up."""
        with self._lock:
            self._is_idle = False

    def idle(self) -> None:
        """The last request is gone."""
        with self._lock:
            self._is_idle = True
            for _, done in self._waiting:
                if not done.done():
                    done.set_result(None)

    def let_go(self, evict: Callable[[set[int]], None]) -> None:
        """Evict what was struck off, whoever uses it. Only when this mirror is what the pool is."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        names = frozenset(name for several, _ in waiting for name in several)
        if names:
            self._struck |= names
            keys = set(self._events.struck(names))
            pages = [page for page, (key, _) in self._by_page.items() if key in keys]
            self._leaving.update(pages)
            self.reused(pages)
        if self._leaving:
            leaving, self._leaving = self._leaving, set()
            evict(leaving)
        for _, done in waiting:
            if not done.done():
                done.set_result(None)

    def reset(self) -> None:
        """vLLM dropped its whole prefix cache."""
        self.reused(list(self._by_page))
