"""The pages of the KV pool and the prefix cache in them. Sync, owned by the engine's thread, moves no bytes.

A page is in exactly one place:

    free ----allocate----> a sequence's own ----register----> cached, refs > 0
      ^                          |                                 |  ^
      +---------- free ----------+              unreference (last) v  | reference
      +------------------------- evict, oldest first ------- cached, refs 0 (idle)

A cached block is a whole fabric block (`pages_per_block` pages) under its BlockKey; since a key covers all
tokens before its block, equal keys mean equal KV. References are the sequences that read it and the saves
that copy from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvfabric.types import BlockKey
from kvfabric_engine.pool_events import CachedKey, PoolEvents


@dataclass(eq=False, slots=True)
class CachedBlock:
    """One fabric block in the prefix cache."""

    identity: CachedKey
    pages: tuple[int, ...]
    refs: int

    @property
    def key(self) -> BlockKey:
        return self.identity.key


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Pages of the pool by what they are used for."""

    free: int
    idle: int  # cached, nobody uses them: the first to go
    used: int  # a sequence's own, or cached and referenced
    evicted_blocks: int  # since start


class BlockManager:
    """Hands out pages, finds cached prefixes, evicts the least recently used."""

    def __init__(self, num_pages: int, pages_per_block: int, events: PoolEvents) -> None:
        self.num_pages = num_pages
        self.pages_per_block = pages_per_block
        self._events = events
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: dict[BlockKey, CachedBlock] = {}
        self._idle: OrderedDict[BlockKey, CachedBlock] = OrderedDict()
        self._evicted_blocks = 0
        self._struck: frozenset[bytes] = frozenset()
        self._leaving: set[CachedBlock] = set()

    def __repr__(self) -> str:
        s = self.statistics()
        return f"<BlockManager pages: {s.used} used, {s.idle} idle, {s.free} free>"

    @property
    def num_available_pages(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free) + len(self._idle) * self.pages_per_block

    def match_prefix(self, keys: Sequence[BlockKey]) -> list[CachedBlock]:
        """The longest cached prefix of a chain. Changes nothing: `reference` what is used."""
        found = []
        for key in keys:
            block = self._cached.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def reference(self, blocks: Iterable[CachedBlock]) -> None:
        for block in blocks:
            block.refs += 1
            self._idle.pop(block.key, None)

    def unreference(self, blocks: Sequence[CachedBlock]) -> None:
        """Ends what `reference` or `register` began. The end of the chain becomes the oldest idle block."""
        for block in reversed(blocks):
            block.refs -= 1
            if block.refs == 0 and block in self._leaving:
                self._leaving.remove(block)
                self._free.extend(block.pages)
            elif block.refs == 0:
                self._idle[block.key] = block

    def strike(self, names: Iterable[bytes]) -> None:
        """Let go, for good, of blocks made of these incarnations or in these namespaces (tags). Whoever uses
        one goes on with it; nobody else finds it, and its pages are free after the last."""
        self._struck |= frozenset(names)
        for key, block in list(self._cached.items()):
            if block.identity.is_struck(self._struck):
                del self._cached[key]
                self._events.removed(key)
                if self._idle.pop(key, None) is not None:
                    self._free.extend(block.pages)
                else:
                    self._leaving.add(block)

    @property
    def holds_struck(self) -> bool:
        """Whether somebody still uses a block that was struck off."""
        return bool(self._leaving)

    def allocate(self, num_pages: int) -> list[int] | None:
        """Own pages, evicting idle blocks as needed; None (and nothing changed) if there are too few."""
        if num_pages > self.num_available_pages:
            return None
        while len(self._free) < num_pages:
            key, block = self._idle.popitem(last=False)
            del self._cached[key]
            self._free.extend(block.pages)
            self._evicted_blocks += 1
            self._events.removed(key)
        return [self._free.pop() for _ in range(num_pages)]

    def free(self, pages: Iterable[int]) -> None:
        """Own pages go back. Nothing may read or write them any more."""
        self._free.extend(pages)

    def register(self, identity: CachedKey, pages: tuple[int, ...]) -> CachedBlock:
        """Own `pages` hold the whole KV of a block now: cache it, referenced once for the caller.

        If the key is cached already, the caller gets that block and its own pages are freed: it must
        read the returned block's pages from here on.
        """
        present = self._cached.get(identity.key)
        if present is not None:
            self.free(pages)
            self.reference([present])
            return present
        block = CachedBlock(identity, pages, refs=1)
        if self._struck and identity.is_struck(self._struck):
            self._leaving.add(block)
            return block
        self._cached[identity.key] = block
        self._events.stored(identity)
        return block

    def clear(self) -> int:
        """Forget every idle block; returns how many. Blocks in use stay until they are idle."""
        dropped = len(self._idle)
        for key, block in self._idle.items():
            del self._cached[key]
            self._free.extend(block.pages)
            self._events.removed(key)
        self._idle.clear()
        return dropped

    def statistics(self) -> PoolStatistics:
        idle = len(self._idle) * self.pages_per_block
        used = self.num_pages - idle - len(self._free)
        return PoolStatistics(len(self._free), idle, used, self._evicted_blocks)

    def check_integrity(self) -> None:
        """Assert what the picture above promises. For tests and idle moments."""
        places = list(self._free)
        for key, block in self._cached.items():
            assert block.key == key
            assert block.refs >= 0
            assert (block.refs == 0) == (key in self._idle)
            places.extend(block.pages)
        for block in self._leaving:
            assert block.refs > 0
            places.extend(block.pages)
        assert len(places) == len(set(places)), "a page is in two places"
        assert set(self._idle) <= set(self._cached)
