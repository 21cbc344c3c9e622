"""Saves: blocks of the pool through the window into the node, on the connector's save thread.

    reserve -> gather into the window -> commit        half a window at a time, in the order of the chain

Knows no futures and no threads: the Connector calls `run` on its save thread.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvfabric.client import NodeClient, Window
from kvfabric.errors import KVFabricError, NoSpace
from kvfabric.types import BlockKey, GrantState, MissReason
from kvfabric_engine.audit import PartAudit
from kvfabric_engine.lanes import Passed
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


@dataclass(frozen=True, slots=True)
class _Piece:
    """Of a task: reserved, and on its way into the window."""

    task: SaveTask
    reservation: int
    granted: list[int]
    """Which of the task's blocks are to be stored; nothing below matters if none is."""
    num_present: int
    reason: MissReason
    start: int = 0
    """Of its region of the window."""
    offsets: Sequence[int] = ()
    gathered: Fence = field(default_factory=Passed)
    digests: Sequence[str] = ()

    @property
    def is_whole(self) -> bool:
        return len(self.granted) + self.num_present == len(self.task.keys)


@dataclass(slots=True)
class _Total:
    """Of the pieces that are done."""

    num_keys: int = 0
    saved: Saved = field(default_factory=lambda: Saved(0, 0, MissReason.NONE))

    def add(self, piece: _Piece, saved: Saved) -> None:
        self.num_keys += len(piece.task.keys)
        stored = self.saved.num_stored + saved.num_stored
        self.saved = Saved(stored, self.saved.num_present + saved.num_present, saved.reason)

    @property
    def is_whole(self) -> bool:
        """Otherwise what follows has no parent."""
        return self.saved.num_stored + self.saved.num_present == self.num_keys


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
        self.lends = False
        """Others of the host can read our pool: the node is told what lies where."""
        """Of the connection; changes while nobody uses the client."""

    def run(self, task: SaveTask) -> Saved:
        """Blocks until the node has what it takes. Raises what ends the save early."""
        total = _Total()
        begun: _Piece | None = None
        last: _Piece | None
        with self._link.use() as client:
            if self.pinning is not None:
                self.pinning.wait_window(self._options.deadlines.save_s)
            # Half the window at most: the other half may be quarantined behind a commit that hangs.
            half = max(1, client.window.num_bytes // 2 // self._mover.part_bytes)
            try:
                for chunk in _cut(task, max(1, half // 2)):
                    if begun is not None and half == 1:  # there is no room to begin ahead
                        last, begun = begun, None
                        self._finish(client, last, total)
                    if not total.is_whole:
                        break
                    last, begun = begun, None
                    try:
                        begun = self._begin(client, chunk)
                    finally:  # whatever becomes of this one, the one before is stored
                        if last is not None:
                            self._finish(client, last, total)
                    if not begun.is_whole:
                        break
                if begun is not None and total.is_whole:
                    last, begun = begun, None
                    self._finish(client, last, total)
            finally:
                if begun is not None:
                    self._give_up(client, begun)
        return total.saved

    def _begin(self, client: NodeClient, task: SaveTask) -> _Piece:
        """Reserve, and start the bytes' way into the window. If it raises, nothing is left of it."""
        shard, size = self._options.shard, self._mover.part_bytes
        reserved = client.reserve(
            task.request_id,
            task.parent,
            task.keys,
            group=GROUP,
            shard=shard,
            deadline_s=self._options.deadlines.save_s,
        )
        states = [GrantState(state) for state in reserved.states]
        granted = [i for i, state in enumerate(states) if state is GrantState.GRANTED]
        present = sum(state in (GrantState.EXISTS, GrantState.PENDING) for state in states)
        reason = MissReason(reserved.reason or MissReason.NONE)
        if not granted:
            return _Piece(task, reserved.reservation, granted, present, reason)
        try:
            start = self._allocate(client.window, len(granted) * size)
            try:
                offsets = [start + i * size for i in range(len(granted))]
                sources = [task.blocks[i] for i in granted]
                digests = self._audit.digests(sources, after=task.fence) if self._audit else []
                views = [client.window.view(offset, size) for offset in offsets]
                gathered = self._mover.begin_gather(sources, views, after=task.fence)
            except BaseException:
                client.window.free(start)
                raise
        except BaseException:
            self._abort(client, reserved.reservation)
            raise
        return _Piece(
            task, reserved.reservation, granted, present, reason, start, offsets, gathered, digests
        )

    def _finish(self, client: NodeClient, piece: _Piece, total: _Total) -> None:
        """Commit; on failure the reservation is given up."""
        total.add(piece, self._commit(client, piece) if piece.granted else _nothing(piece))

    def _commit(self, client: NodeClient, piece: _Piece) -> Saved:
        task, granted = piece.task, piece.granted
        try:
            try:
                piece.gathered.wait()
                committed = client.commit(
                    piece.reservation,
                    granted,
                    piece.offsets,
                    deadline_s=self._options.deadlines.save_s,
                )
            finally:
                client.window.free(piece.start)
        except BaseException:
            self._abort(client, piece.reservation)
            raise
        kept = [i for i, state in enumerate(committed.states) if state]
        if self._audit is not None:
            stored_keys = [task.keys[granted[i]] for i in kept]
            stored_digests = [piece.digests[i] for i in kept]
            shard = self._options.shard
            self._audit.write("store", client.session, stored_keys, shard, stored_digests)
        if self.lends and kept:
            client.place(
                self._options.shard,
                [task.keys[granted[i]] for i in kept],
                [task.blocks[granted[i]] for i in kept],
                deadline_s=self._options.deadlines.control_s,
            )
        reason = piece.reason
        if len(kept) < len(granted):
            reason = MissReason(committed.reason or MissReason.EXPIRED)
        return Saved(len(kept), piece.num_present, reason)

    def _give_up(self, client: NodeClient, piece: _Piece) -> None:
        if piece.granted:
            piece.gathered.wait()
            client.window.free(piece.start)
            self._abort(client, piece.reservation)

    def _abort(self, client: NodeClient, reservation: int) -> None:
        with contextlib.suppress(KVFabricError):
            client.abort(reservation, deadline_s=self._options.deadlines.control_s)

    def _allocate(self, window: Window, num_bytes: int) -> int:
        start = window.allocate(num_bytes)
        if start is None:
            raise NoSpace(f"no {num_bytes} B in {window!r}")
        return start


def _cut(task: SaveTask, step: int) -> Iterator[SaveTask]:
    parent = task.parent
    for start in range(0, len(task.keys), step):
        keys, blocks = task.keys[start : start + step], task.blocks[start : start + step]
        yield SaveTask(task.request_id, parent, keys, blocks, task.fence)
        parent = keys[-1]


def _nothing(piece: _Piece) -> Saved:
    return Saved(0, piece.num_present, piece.reason)
