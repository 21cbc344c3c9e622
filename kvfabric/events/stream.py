"""`EventStream`: what changes in the tiers of one node, numbered and batched for routers.

Sync and atomic on the event loop's thread; only `Subscription` waits. The store and the engines' events
write into it, `daemon.admin` reads it out over gRPC. Runs gather for 20 ms into one batch; batches stand
in a bounded history, and each subscription is a cursor into it: no queue of its own to grow. A reader
that fell behind what is kept gets a batch with `gap`, and takes a snapshot.

HBM and host are streamed. SSD is not: it is asked when chosen (design 6).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import numpy as np

from kvfabric.errors import RemoteProtocolError
from kvfabric.events.table import KeyTable
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol.messages import BlockRun, EngineEvents
from kvfabric.types import TierName

BATCH_S = 0.02
SLICE_BLOCKS = 8192
"""Blocks in one batch of a snapshot, and at most about so many in one batch of the stream."""

_PREFIX_BYTES = 8
_KEPT_BYTES = 48
"""Of memory for each batch that is kept, beside its own bytes."""
_TIERS = {TierName.HBM: pb.HBM, TierName.HOST: pb.HOST}


@dataclass(slots=True)
class _PendingRun:
    kind: pb.EventKind
    tier: pb.Tier
    namespace_tag: bytes
    parent: bytes
    keys: bytearray
    engine: bytes

    def takes(self, other: _PendingRun) -> bool:
        """Whether `other`, which came next, is more of the same run."""
        same = (self.kind, self.tier, self.namespace_tag, self.engine) == (
            other.kind,
            other.tier,
            other.namespace_tag,
            other.engine,
        )
        chained = self.kind != pb.STORED or other.parent == self.keys[-_PREFIX_BYTES:]
        return same and chained and self.kind != pb.CLEARED

    def to_pb(self) -> pb.Run:
        return pb.Run(
            kind=self.kind,
            tier=self.tier,
            namespace_tag=self.namespace_tag,
            parent=self.parent,
            keys=bytes(self.keys),
            engine=self.engine,
        )


@dataclass(slots=True)
class _Session:
    """An engine, and what its HBM holds: a set of key prefixes for each namespace tag."""

    engine: pb.Engine
    held: dict[bytes, KeyTable] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EventStreamStatistics:
    sequence: int
    history_batches: int
    history_bytes: int
    hbm_blocks: int
    subscriptions: int


class EventStream:
    """See the module. `boot_id`: 16 random bytes, one life of the daemon. `history_bytes`: of memory."""

    def __init__(self, *, boot_id: bytes, history_bytes: int = 16 << 20) -> None:
        self.boot_id = boot_id
        # Packed: a message of a few runs takes a dozen times its bytes.
        self._history: deque[bytes] = deque()
        self._history_limit = history_bytes
        self._history_bytes = 0
        self._sequence = 0
        self._runs: list[_PendingRun] = []
        self._pending_blocks = 0
        self._engine_changes: list[pb.Engine] = []
        self._sessions: dict[bytes, _Session] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._subscriptions = 0
        self._closed = False
        self.stale_serves = 0
        self._alarm_due = False
        self._rates: list[pb.Rate] = []

    def __repr__(self) -> str:
        return (
            f"<EventStream at {self._sequence}: {len(self._history)} batches kept, "
            f"{len(self._sessions)} engines>"
        )

    @property
    def sequence(self) -> int:
        """Number of the newest batch; 0 before the first."""
        return self._sequence

    @property
    def engines(self) -> list[pb.Engine]:
        """Engine sessions that live."""
        return [session.engine for session in self._sessions.values()]

    def statistics(self) -> EventStreamStatistics:
        held = (table for session in self._sessions.values() for table in session.held.values())
        return EventStreamStatistics(
            sequence=self._sequence,
            history_batches=len(self._history),
            history_bytes=self._history_bytes,
            hbm_blocks=sum(table.num_keys for table in held),
            subscriptions=self._subscriptions,
        )

    # ------------------------------------------------------------------ the store's side (EventSink)

    def stored(
        self,
        tier: TierName,
        namespace_tag: bytes,
        parent: bytes,
        keys: bytes,
        *,
        engine: bytes = b"",
    ) -> None:
        """Consecutive blocks of a chain are there now. `parent`, `keys`: 8-byte prefixes, packed."""
        self._add(pb.STORED, tier, BlockRun(namespace_tag, parent, keys), engine)

    def removed(
        self, tier: TierName, namespace_tag: bytes, keys: bytes, *, engine: bytes = b""
    ) -> None:
        """These blocks are there no more; in any order."""
        self._add(pb.REMOVED, tier, BlockRun(namespace_tag, b"", keys), engine)

    def cleared(self, tier: TierName, *, engine: bytes = b"") -> None:
        """The whole tier (of that engine) is empty."""
        self._add(pb.CLEARED, tier, BlockRun(b"", b"", b""), engine)

    def alarm(self, stale_serves: int) -> None:
        """The node's auditor was served withdrawn blocks so often; every batch says so from now on."""
        self.stale_serves, self._alarm_due = stale_serves, True
        self.flush()

    def tell_rates(self, rates: list[pb.Rate]) -> None:
        """All that the node has measured of how fast blocks move, because it changed."""
        self._rates = rates
        self._schedule()

    # ------------------------------------------------------------------ the engines' side

    def engine_joined(self, engine: pb.Engine) -> None:
        """A session began, or came back; its HBM is empty until it says otherwise."""
        self.flush()
        self._sessions[engine.session] = _Session(engine)
        self._engine_changes.append(engine)
        self.cleared(TierName.HBM, engine=engine.session)

    def engine_gone(self, session: bytes) -> None:
        """A session ended: readers forget its HBM. An unknown one is no news."""
        if self._sessions.pop(session, None) is None:
            return
        self.flush()
        self._engine_changes.append(pb.Engine(session=session, gone=True))
        self._schedule()

    def engine_events(self, session: bytes, events: EngineEvents) -> None:
        """What an engine says of its own HBM; of a session that ended it is no news.

        Raises RemoteProtocolError, with nothing taken, for a run that is not made of 8-byte prefixes.
        """
        for run in (*events.stored, *events.removed):
            _check(run)
        known = self._sessions.get(session)
        if known is None:
            return
        if events.cleared:
            known.held.clear()
            self.cleared(TierName.HBM, engine=session)
        for run in events.removed:
            self._add(pb.REMOVED, TierName.HBM, run, session)
            _forget(known.held, run)
        for run in events.stored:
            self._add(pb.STORED, TierName.HBM, run, session)
            table = known.held.setdefault(run.namespace_tag, KeyTable(64))
            table.insert(np.unique(np.frombuffer(run.keys, "<u8")))

    def hbm_runs(self) -> Iterator[pb.EventBatch]:
        """What the engines' HBM holds, in slices for a snapshot. Parents are not kept."""
        for session in list(self._sessions.values()):
            for tag, table in list(session.held.items()):
                keys = table.keys().astype("<u8", copy=False).tobytes()
                step = SLICE_BLOCKS * _PREFIX_BYTES
                for start in range(0, len(keys), step):
                    run = pb.Run(
                        kind=pb.STORED,
                        tier=pb.HBM,
                        namespace_tag=tag,
                        keys=keys[start : start + step],
                        engine=session.engine.session,
                    )
                    yield self.snapshot_batch([run])

    def snapshot_batch(self, runs: list[pb.Run], *, end: bool = False) -> pb.EventBatch:
        """A batch of a snapshot; the caller sets the sequence of its beginning in the first."""
        return pb.EventBatch(boot_id=self.boot_id, runs=runs, snapshot_end=end)

    # ------------------------------------------------------------------ the readers' side

    def flush(self) -> None:
        """Close the batch under way, if there is anything in it, and wake the readers."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not (self._runs or self._engine_changes or self._alarm_due or self._rates):
            return
        self._alarm_due = False
        self._sequence += 1
        batch = pb.EventBatch(
            boot_id=self.boot_id,
            sequence=self._sequence,
            runs=[run.to_pb() for run in self._runs],
            engines=self._engine_changes,
            stale_serves=self.stale_serves,
            rates=self._rates,
        )
        self._rates = []
        self._runs, self._pending_blocks, self._engine_changes = [], 0, []
        self._keep(batch)
        self._wake()

    def close(self) -> None:
        """End every subscription after what is pending."""
        self.flush()
        self._closed = True
        self._wake()

    def reopen(self) -> None:
        """After `close`: take subscriptions again. Sequence and history go on."""
        self._closed = False

    async def subscribe(self, boot_id: bytes, from_sequence: int) -> AsyncIterator[pb.EventBatch]:
        """Batches from `from_sequence` of that life on. Where they are not kept any more, or the life is
        another: one batch with `gap` and the engines that live, then what comes next.

        Ends at `close`. On cancellation: nothing was consumed for anybody else.
        """
        self._subscriptions += 1
        try:
            following = from_sequence if boot_id == self.boot_id else -1
            while True:
                batch = self._after(following)
                if batch is not None:
                    following = batch.sequence + 1
                    yield batch
                elif self._closed:
                    return
                else:
                    await self._news.wait()
        finally:
            self._subscriptions -= 1

    def _after(self, following: int) -> pb.EventBatch | None:
        """What a reader gets that waits for number `following`; None: nothing yet."""
        if following == self._sequence + 1:
            return None
        oldest = self._sequence + 1 - len(self._history)
        if oldest <= following <= self._sequence:
            return pb.EventBatch.FromString(self._history[following - oldest])
        return pb.EventBatch(
            boot_id=self.boot_id, sequence=self._sequence, engines=self.engines, gap=True
        )

    # ------------------------------------------------------------------ inside

    def _add(self, kind: pb.EventKind, tier: TierName, run: BlockRun, engine: bytes) -> None:
        if tier not in _TIERS:
            return
        if kind == pb.CLEARED:
            self._append(_PendingRun(kind, _TIERS[tier], b"", b"", bytearray(), engine))
        parent, step = run.parent, SLICE_BLOCKS * _PREFIX_BYTES
        for start in range(0, len(run.keys), step):
            keys = bytearray(run.keys[start : start + step])
            self._append(_PendingRun(kind, _TIERS[tier], run.namespace_tag, parent, keys, engine))
            parent = bytes(keys[-_PREFIX_BYTES:])

    def _append(self, fresh: _PendingRun) -> None:
        if self._runs and self._runs[-1].takes(fresh):
            self._runs[-1].keys += fresh.keys
        else:
            self._runs.append(fresh)
        self._pending_blocks += 1 + len(fresh.keys) // _PREFIX_BYTES
        if self._pending_blocks >= SLICE_BLOCKS:
            self.flush()
        else:
            self._schedule()

    def _schedule(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(BATCH_S, self.flush)

    def _keep(self, batch: pb.EventBatch) -> None:
        packed = batch.SerializeToString()
        self._history.append(packed)
        self._history_bytes += len(packed) + _KEPT_BYTES
        while self._history_bytes > self._history_limit and len(self._history) > 1:
            self._history_bytes -= len(self._history.popleft()) + _KEPT_BYTES

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def _check(run: BlockRun) -> None:
    if len(run.namespace_tag) != _PREFIX_BYTES or len(run.keys) % _PREFIX_BYTES:
        raise RemoteProtocolError(
            f"a run has a tag of 8 bytes and keys of 8 bytes each, not {len(run.namespace_tag)} "
            f"and {len(run.keys)}"
        )


def _forget(held: dict[bytes, KeyTable], run: BlockRun) -> None:
    table = held.get(run.namespace_tag)
    if table is None:
        return
    slots = table.find(np.unique(np.frombuffer(run.keys, "<u8")))
    table.delete(slots[slots >= 0])
    if table.num_keys == 0:
        del held[run.namespace_tag]
