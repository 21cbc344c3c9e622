"""Saves: blocks of the pool through the window into the node, on the connector's save thread.

    reserve -> gather into the window -> commit        half a window at a time, in the order of the chain

Knows no futures and no threads: the Connector calls `run` on its save thread.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvfabric.client import NodeClient, Window
from kvfabric.errors import KVFabricError, NoSpace
from kvfabric.types import BlockKey, GrantState, MissReason
from kvfabric_engine.audit import PartAudit
from kvfabric_engine.node_link import NodeLink
from kvfabric_engine.options import GROUP, ConnectorOptions
from kvfabric_engine.pinning import Pinning
from kvfabric_engine.staging import Fence, Mover, Pages


@dataclass(frozen=True, slots=True)
class Saved:
    """Of the blocks handed over, `num_stored` are new in the fabric and `num_present` were there."""

    num_stored: int
    num_present: int
    reason: MissReason


@dataclass(frozen=True, slots=True)
class SaveTask:
    """Consecutive blocks of a request's chain; `parent` is the key before the first, or 32 zeros."""

    request_id: str
    parent: BlockKey
    keys: Sequence[BlockKey]
    blocks: Sequence[Pages]
    fence: Fence
    """Behind the computation of the blocks."""


class Backlog:
    """Bytes of the saves that are not done. Thread-safe."""

    def __init__(self, window_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._lock = threading.Lock()
        self._saves: dict[int, tuple[Fence, int]] = {}
        self._numbers = itertools.count()

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(size for _, size in self._saves.values())

    def begin(self, fence: Fence, num_bytes: int) -> int | None:
        """The save's number for `end`; None when the cache is too far behind the engine to take it.

        That is when more than two windows of computed bytes, or twice as many as these, wait already.
        """
        with self._lock:
            # What the engine has yet to compute is not late, however far ahead it launches.
            late = sum(size for fence, size in self._saves.values() if fence.is_passed())
            if late > 2 * max(self._window_bytes, num_bytes):
                return None
            number = next(self._numbers)
            self._saves[number] = (fence, num_bytes)
            return number

    def end(self, number: int) -> None:
        with self._lock:
            del self._saves[number]


class Saves:
    """Of one Connector; one thread."""

    def __init__(
        self,
        options: ConnectorOptions,
        *,
        link: NodeLink,
        mover: Mover,
        audit: PartAudit | None,
    ) -> None:
        self._options = options
        self._link = link
        self._mover = mover
        self._audit = audit
        self.pinning: Pinning | None = None
        """Of the connection; changes while nobody uses the client."""

    def run(self, task: SaveTask) -> Saved:
        """Blocks until the node has what it takes. Raises what ends the save early."""
        stored = present = 0
        reason, parent = MissReason.NONE, task.parent
        with self._link.use() as client:
            if self.pinning is not None:
                self.pinning.wait_window(self._options.deadlines.save_s)
            # Half a window at most: the other half may be quarantined behind a commit that hangs.
            step = max(1, client.window.num_bytes // 2 // self._mover.part_bytes)
            for start in range(0, len(task.keys), step):
                keys = task.keys[start : start + step]
                blocks = task.blocks[start : start + step]
                chunk = SaveTask(task.request_id, parent, keys, blocks, task.fence)
                saved = self._save_chunk(client, chunk)
                stored += saved.num_stored
                present += saved.num_present
                parent = keys[-1]
                reason = saved.reason
                if saved.num_stored + saved.num_present < len(keys):
                    break  # what follows would have no parent
        return Saved(stored, present, reason)

    def _save_chunk(self, client: NodeClient, task: SaveTask) -> Saved:
        deadline_s = self._options.deadlines.save_s
        reserved = client.reserve(
            task.request_id,
            task.parent,
            task.keys,
            group=GROUP,
            shard=self._options.shard,
            deadline_s=deadline_s,
        )
        states = [GrantState(state) for state in reserved.states]
        granted = [i for i, state in enumerate(states) if state is GrantState.GRANTED]
        present = sum(state in (GrantState.EXISTS, GrantState.PENDING) for state in states)
        reason = MissReason(reserved.reason or MissReason.NONE)
        if not granted:
            return Saved(0, present, reason)
        with self._reserved(client, reserved.reservation, len(granted)) as offsets:
            size = self._mover.part_bytes
            sources = [task.blocks[i] for i in granted]
            digests = self._audit.digests(sources, after=task.fence) if self._audit else []
            views = [client.window.view(offset, size) for offset in offsets]
            self._mover.gather(sources, views, after=task.fence)
            committed = client.commit(reserved.reservation, granted, offsets, deadline_s=deadline_s)
        kept = [i for i, state in enumerate(committed.states) if state]
        if self._audit is not None:
            stored_keys = [task.keys[granted[i]] for i in kept]
            stored_digests = [digests[i] for i in kept]
            shard = self._options.shard
            self._audit.write("store", client.session, stored_keys, shard, stored_digests)
        if len(kept) < len(granted):
            reason = MissReason(committed.reason or MissReason.EXPIRED)
        return Saved(len(kept), present, reason)

    @contextlib.contextmanager
    def _reserved(
        self, client: NodeClient, reservation: int, num_parts: int
    ) -> Iterator[list[int]]:
        """Window offsets for the parts of a reservation; on failure the reservation is given up."""
        size = self._mover.part_bytes
        try:
            start = self._allocate(client.window, num_parts * size)
            try:
                yield [start + i * size for i in range(num_parts)]
            finally:
                client.window.free(start)
        except BaseException:
            with contextlib.suppress(KVFabricError):
                client.abort(reservation, deadline_s=self._options.deadlines.control_s)
            raise

    def _allocate(self, window: Window, num_bytes: int) -> int:
        start = window.allocate(num_bytes)
        if start is None:
            raise NoSpace(f"no {num_bytes} B in {window!r}")
        return start
