"""What the engine's HBM pool holds, as the events its node streams on. Pure; safe to call from any thread.

The engine reports each block it caches or drops; the connector takes what changed and publishes it. A node
that is new to us (start, reconnect) gets `snapshot`. Only 8-byte prefixes leave the engine: never a token id
or a salt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

from kvfabric.protocol.messages import BlockRun, EngineEvents
from kvfabric.types import BlockKey

PREFIX_BYTES = 8
BLOCKS_PER_MESSAGE = 1 << 14
"""Even if each were a run of its own, they fit a frame."""


@dataclass(frozen=True, slots=True)
class CachedKey:
    """A block in the HBM pool: its key, the key before it (32 zero bytes for none), its namespace's tag, and
    the incarnations (16 B each) of the segments that begin in it or before."""

    key: BlockKey
    parent: BlockKey
    namespace_tag: bytes
    incarnations: tuple[bytes, ...] = ()

    def is_struck(self, names: Collection[bytes]) -> bool:
        """Whether one of these incarnations or namespace tags is its own."""
        return self.namespace_tag in names or any(one in names for one in self.incarnations)


class PoolEvents:
    """Changes since the last `take`, netted per block, over a mirror of what is cached now."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None
        """Called after a change when none was pending, on the thread that reported it."""
        self.strike: Callable[[tuple[bytes, ...]], Future[None]] | None = None
        """Has the pool let go of blocks made of these incarnations (16 B) or in these namespaces (tags, 8 B),
        which were struck off for good; done when nobody uses one any more. Any thread."""
        self.kept = ""
        """Why there is no such way, where there is a pool without one."""
        self._lock = threading.Lock()
        self._held: dict[BlockKey, CachedKey] = {}
        # Last change wins, so a block that came and went within a batch is published once.
        self._changed: dict[BlockKey, tuple[CachedKey, bool]] = {}

    def __repr__(self) -> str:
        return f"<PoolEvents {len(self._held)} cached, {len(self._changed)} to publish>"

    def stored(self, block: CachedKey) -> None:
        with self._lock:
            self._held[block.key] = block
            is_first = self._note(block, True)
        if is_first:
            self.on_change()

    def removed(self, key: BlockKey) -> None:
        with self._lock:
            is_first = self._note(self._held.pop(key), False)
        if is_first:
            self.on_change()

    def _note(self, block: CachedKey, present: bool) -> bool:
        was_empty = not self._changed
        self._changed.pop(block.key, None)  # so that the order is that of the last changes
        self._changed[block.key] = (block, present)
        return was_empty

    def struck(self, names: Collection[bytes]) -> list[BlockKey]:
        """Blocks that are cached now and made of these incarnations, or in these namespaces."""
        with self._lock:
            return [key for key, block in self._held.items() if block.is_struck(names)]

    def take(self) -> EngineEvents | None:
        """The oldest changes that were not taken yet, as many as one message holds; None for none."""
        with self._lock:
            if not self._changed:
                return None
            keys = list(islice(self._changed, BLOCKS_PER_MESSAGE))
            changes = [self._changed.pop(key) for key in keys]
        return EngineEvents(
            stored=_runs(block for block, present in changes if present),
            removed=_runs(block for block, present in changes if not present),
            cleared=False,
        )

    def snapshot(self) -> EngineEvents:
        """For a node that knows nothing: all was dropped. What is cached now follows with `take`."""
        with self._lock:
            self._changed = {key: (block, True) for key, block in self._held.items()}
        return EngineEvents(stored=(), removed=(), cleared=True)


def _runs(blocks: Iterable[CachedKey]) -> tuple[BlockRun, ...]:
    """Neighbours that follow each other in one chain become one run."""
    runs: list[BlockRun] = []
    first: CachedKey | None = None
    last: BlockKey | None = None
    keys: list[bytes] = []
    for block in blocks:
        if first is None or block.parent != last or block.namespace_tag != first.namespace_tag:
            if first is not None:
                runs.append(_run(first, keys))
            first, keys = block, []
        keys.append(block.key[:PREFIX_BYTES])
        last = block.key
    if first is not None:
        runs.append(_run(first, keys))
    return tuple(runs)


def _run(first: CachedKey, keys: list[bytes]) -> BlockRun:
    return BlockRun(first.namespace_tag, first.parent[:PREFIX_BYTES], b"".join(keys))
