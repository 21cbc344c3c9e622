"""Connector: what any engine asks the fabric for. Engine-neutral; fails open.

    open     handle -> keys                        control thread
    match    keys -> leased prefix                 control thread
    follow   likewise, of a prompt that another    follow threads
             engine computes: once there is more
    plan     fetch or recompute                    pure
    load     arena -> staging -> pool              load thread; the pool gets verified, confirmed bytes
             (on a GPU by DMA from the arena, `direct_load`; elsewhere and meanwhile by the CPU)
    save     pool -> window -> commit              save thread; in the order of the chain
    release  after loads and saves of the request  link thread, batched

Each verb returns a Future that always gets a result, never an exception: no node, a slow node, a refused
handle, a corrupt block are a miss with a MissReason, counted and logged once. The caller keeps the pool's
blocks that it names in a load or save untouched until that Future is done. Every call has a deadline.

The engine's scheduler and its workers may each have a Connector (`ConnectorOptions.role`, `session`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from kvfabric.client import EngineHello, NodeClient
from kvfabric.client.pools import borrow, lend
from kvfabric.errors import TransferError
from kvfabric.hashing import layout_fingerprint
from kvfabric.protocol.messages import EngineEvents, Lend, Pong, PoolName
from kvfabric.types import BlockKey, BlockLayout, ExtraInput, MissReason, TierName
from kvfabric_engine.audit import PartAudit
from kvfabric_engine.boundary import Boundary, reason_of
from kvfabric_engine.direct_load import DirectLoads
from kvfabric_engine.loads import Loaded as Loaded  # these are part of this interface
from kvfabric_engine.loads import Loads, LoadTask
from kvfabric_engine.node_link import PING_S, LinkCalls, NodeLink
from kvfabric_engine.options import ConnectorOptions as ConnectorOptions
from kvfabric_engine.pinning import Pinning
from kvfabric_engine.plan import PrefixMatch as PrefixMatch
from kvfabric_engine.pool_events import PoolEvents
from kvfabric_engine.request_keys import LocalNamespaces, RequestKeys
from kvfabric_engine.saves import Backlog, Saves, SaveTask
from kvfabric_engine.saves import Saved as Saved
from kvfabric_engine.staging import Fence, LayerArrival, Mover, Pages

R = TypeVar("R")
WIRE_TIERS = (TierName.HOST, TierName.SSD, TierName.PEER)
CONTROL_THREADS = 2
FOLLOW_THREADS = 16
FOLLOW_S = 0.25
"""One question to the node waits so long at most: the threads take turns with all that wait."""
RELEASES_PER_MESSAGE = 1000


@dataclass(frozen=True, slots=True)
class Opened:
    """`keys` None: reuse nothing, store nothing. `in_fabric`: the node knows the request.

    `hands_over`: another engine waits for the blocks, so each chunk is to be saved as it is computed.
    `wait_s` above 0: another engine computes them; `follow` them for so long at most.
    """

    keys: RequestKeys | None
    in_fabric: bool
    reason: MissReason
    hands_over: bool = False
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ConnectorStatistics:
    """Since start, but `is_up` and `saving_bytes`, which are now."""

    is_up: bool
    saving_bytes: int
    loaded_blocks: int
    loaded_bytes: int
    borrowed_blocks: int
    """Of these, out of another engine's HBM."""
    stale_blocks: int
    """Looked for there in vain, and loaded from the arena."""
    saved_blocks: int
    saved_bytes: int
    misses: dict[MissReason, int]


@dataclass(slots=True)
class _Request:
    """What the node holds for one request, as far as we know."""

    num_pending: int = 0
    is_released: bool = False
    is_ours: bool = True
    leased_keys: tuple[BlockKey, ...] = ()
    renew_at: float = 0.0


class Connector:
    """One engine process's side of the fabric. `start` before use, `close` at the end. Thread-safe."""

    def __init__(
        self,
        options: ConnectorOptions,
        *,
        layout: BlockLayout,
        mover: Mover,
        events: PoolEvents,
        clock: Callable[[], float] = time.monotonic,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_thread` runs first on each thread that moves bytes."""
        self._options = options
        self._layout = layout
        self._mover = mover
        self._events = events
        self._clock = clock
        # On the link's thread alone: up to which registry version HBM is clean, and what is on its way.
        self._dropped = 0 if events.strike is not None or events.kept else -1
        self._striking: tuple[int, Future[None]] | None = None
        self._boundary = Boundary()
        self._local = LocalNamespaces(options.model_revision, layout_fingerprint(layout))
        self._lends = mover.shared is not None  # until the node refuses
        self._lenders: frozenset[PoolName] = frozenset()  # as the node told last
        self._audit = PartAudit(options.audit_parts, mover) if options.audit_parts else None
        self._link = NodeLink(
            options.node_socket,
            self._hello(),
            boundary=self._boundary,
            session=options.session,
            calls=LinkCalls(
                connected=self._connected, gone=self._unpin, tick=self._tick, ping=self._ping
            ),
        )
        self._control = ThreadPoolExecutor(CONTROL_THREADS, "kvf-control")
        self._following = ThreadPoolExecutor(FOLLOW_THREADS, "kvf-follow")
        self._loading = ThreadPoolExecutor(1, "kvf-load", on_thread)
        self._saving = ThreadPoolExecutor(1, "kvf-save", on_thread)
        self._loads = Loads(
            options,
            link=self._link,
            mover=mover,
            num_layers=layout.num_layers,
            boundary=self._boundary,
            audit=self._audit,
        )
        self._saves = Saves(options, link=self._link, mover=mover, audit=self._audit)
        self._backlog = Backlog(options.window_bytes)
        self._pinning: Pinning | None = (
            None  # of this connection; changes while nobody uses the client
        )
        self._lock = threading.Lock()  # guards all below
        self._requests: dict[str, _Request] = {}
        self._to_release: list[str] = []
        self._needs_snapshot = True
        self._num_loaded = self._num_saved = self._num_borrowed = self._num_stale = 0  # blocks

    def _hello(self) -> EngineHello:
        o = self._options
        return EngineHello(
            engine_id=o.engine_id,
            endpoint=o.endpoint,
            model=o.model,
            model_revision=o.model_revision,
            adapter=o.adapter,
            adapter_revision=o.adapter_revision,
            layout=self._layout,
            shard=o.shard,
            window_bytes=o.window_bytes,
            role=o.role,
            recompute=o.recompute,
            serves=o.serves,
        )

    def __repr__(self) -> str:
        return f"<Connector {self._link!r}, {len(self._requests)} requests>"

    @property
    def session(self) -> bytes:
        """This engine instance, as the node knows it; empty before the first connection."""
        return self._link.session

    def start(self) -> None:
        """Begin to connect, and keep at it. Returns at once: no node is no reason to wait."""
        self._events.on_change = self._link.wake
        self._link.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the node; False if it is not there after `timeout_s`."""
        return self._link.wait_up(timeout_s)

    def close(self) -> None:
        """Finish what was handed over (each within its deadline), say goodbye. Idempotent."""
        self._events.on_change = lambda: None
        for pool in (self._control, self._following, self._loading, self._saving):
            pool.shutdown(wait=True)
        self._link.close()
        if self._audit is not None:
            self._audit.close()

    def open(
        self,
        request_id: str,
        handle: str,
        salt: str,
        tokens: Sequence[int],
        inputs: Callable[[], Sequence[ExtraInput]] = lambda: (),
    ) -> Future[Opened]:
        """Keys of a prompt. A refused handle means no reuse; no node means reuse in HBM by `salt` alone.

        `inputs`: called on the control thread for what the KV depends on besides the tokens.

        A salt without a handle is a router that may not vouch for the request now (design 6): such a
        request shares with its own salt only, and never through the node's default tenant.
        """
        if salt and not handle:
            return self._control.submit(
                self._boundary.run,
                "open",
                lambda: self._open_local(salt, tokens, inputs, MissReason.NO_HANDLE),
                lambda error: Opened(None, False, reason_of(error)),
            )
        return self._submit(
            self._control,
            "open",
            request_id,
            lambda: self._open(request_id, handle, tokens, inputs),
            lambda error: self._open_failed(error, salt, tokens, inputs),
        )

    def match(self, request_id: str, keys: Sequence[BlockKey]) -> Future[PrefixMatch]:
        """Ask for the chain's longest prefix and lease it until `release`."""
        return self._submit(
            self._control,
            "match",
            request_id,
            lambda: self._match(request_id, keys),
            lambda error: PrefixMatch(0, (), reason_of(error)),
        )

    def follow(
        self, request_id: str, keys: Sequence[BlockKey], *, beyond: int, wait_s: float
    ) -> Future[PrefixMatch]:
        """As `match`, of a request that was opened with `wait_s`: answered once more than `beyond` blocks are
        here, or nothing more is to come, or after `FOLLOW_S`, or after `wait_s` if that is less.
        `PrefixMatch.more` says whether to ask again."""
        wait_s = max(0.0, min(wait_s, FOLLOW_S))
        return self._submit(
            self._following,
            "follow",
            request_id,
            lambda: self._match(request_id, keys, beyond, wait_s),
            lambda error: PrefixMatch(0, (), reason_of(error)),
        )

    def load(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        blocks: Sequence[Pages],
        *,
        in_place: bool = False,
        begun: Callable[[LayerArrival], None] | None = None,
    ) -> Future[Loaded]:
        """Bring matched `keys` into the pool's `blocks`. What fails is left to be computed.

        `in_place`: bytes may come straight into the blocks where that is faster; these hold unverified bytes
        until the future is done then, and of what was not loaded they hold anything. `begun`: with it, for an
        engine that wants to compute layers as they come; it may be called, on the load's thread.
        """
        fence = self._mover.fence()  # the pages may be in use still by what had them before
        task = LoadTask(request_id, keys, blocks, fence, in_place, begun)
        return self._submit(
            self._loading,
            "load",
            request_id,
            lambda: self._load(task),
            lambda error: Loaded(task.num_loaded, reason_of(error)),
        )

    def save(
        self,
        request_id: str,
        parent: BlockKey,
        keys: Sequence[BlockKey],
        blocks: Sequence[Pages],
        fence: Fence,
        *,
        handle: str | None = None,
    ) -> Future[Saved]:
        """Store consecutive blocks of a chain; `parent` is the key before the first, or 32 zeros.

        `fence` (`Mover.fence`) stands behind the computation of the blocks. When too much is being saved
        already (`Backlog`) they are not stored: the cache is slower than the engine.
        `handle`: open the request with it first, for a process that did not open it itself.
        """
        number = self._backlog.begin(fence, len(keys) * self._mover.part_bytes)
        if number is None:
            self._boundary.count(MissReason.DEADLINE)
            dropped: Future[Saved] = Future()
            dropped.set_result(Saved(0, 0, MissReason.DEADLINE))
            return dropped
        task = SaveTask(request_id, parent, keys, blocks, fence)
        future = self._submit(
            self._saving,
            "save",
            request_id,
            lambda: self._save(task, handle),
            lambda error: Saved(0, 0, reason_of(error)),
        )
        future.add_done_callback(lambda _: self._backlog.end(number))
        return future

    def release(self, request_id: str) -> None:
        """The request needs the fabric no more. Takes effect when its loads and saves are done."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is None:
                return
            request.is_released = True
            if request.num_pending:
                return
            self._drop(request_id)
        self._link.wake()

    def forget(self, request_id: str) -> None:
        """As `release`, of a request that another process of the session opened and will release."""
        with self._lock:
            if (request := self._requests.get(request_id)) is not None:
                request.is_ours = False
        self.release(request_id)

    def count(self, reason: MissReason) -> None:
        """What the caller does not take of what it was offered, or never asked for."""
        self._boundary.count(reason)

    def statistics(self) -> ConnectorStatistics:
        with self._lock:
            loaded, saved = self._num_loaded, self._num_saved
            borrowed, stale = self._num_borrowed, self._num_stale
        size = self._mover.part_bytes
        return ConnectorStatistics(
            is_up=self._link.is_up,
            saving_bytes=self._backlog.num_bytes,
            loaded_blocks=loaded,
            loaded_bytes=loaded * size,
            borrowed_blocks=borrowed,
            stale_blocks=stale,
            saved_blocks=saved,
            saved_bytes=saved * size,
            misses=self._boundary.misses,
        )

    # --- what runs on the pools' threads -------------------------------------------------------------

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        operation: str,
        request_id: str,
        action: Callable[[], R],
        otherwise: Callable[[BaseException], R],
    ) -> Future[R]:
        with self._lock:
            self._requests.setdefault(request_id, _Request()).num_pending += 1

        def run() -> R:
            try:
                return self._boundary.run(operation, action, otherwise)
            finally:
                self._ended(request_id)

        return pool.submit(run)

    def _ended(self, request_id: str) -> None:
        with self._lock:
            request = self._requests[request_id]
            request.num_pending -= 1
            if request.num_pending or not request.is_released:
                return
            self._drop(request_id)
        self._link.wake()

    def _drop(self, request_id: str) -> None:
        """Under the lock."""
        if self._requests.pop(request_id).is_ours:
            self._to_release.append(request_id)

    def _open(
        self,
        request_id: str,
        handle: str,
        tokens: Sequence[int],
        inputs: Callable[[], Sequence[ExtraInput]] = lambda: (),
    ) -> Opened:
        extra_inputs = inputs()
        with self._link.use() as client:
            deadline_s = self._options.deadlines.control_s
            opened = client.open_handle(request_id, handle, deadline_s=deadline_s)
        keys = RequestKeys(opened, self._layout.block_tokens, extra_inputs=extra_inputs)
        keys.extend(tokens)
        return Opened(keys, True, MissReason.NONE, opened.hands_over, opened.wait_s)

    def _open_local(
        self,
        salt: str,
        tokens: Sequence[int],
        inputs: Callable[[], Sequence[ExtraInput]],
        reason: MissReason,
    ) -> Opened:
        opened = self._local.open(salt)
        keys = RequestKeys(opened, self._layout.block_tokens, extra_inputs=inputs())
        keys.extend(tokens)
        return Opened(keys, False, reason)

    def _open_failed(
        self,
        error: BaseException,
        salt: str,
        tokens: Sequence[int],
        inputs: Callable[[], Sequence[ExtraInput]],
    ) -> Opened:
        reason = reason_of(error)
        if salt and isinstance(error, TransferError):
            return self._open_local(salt, tokens, inputs, reason)
        return Opened(None, False, reason)

    def _match(
        self, request_id: str, keys: Sequence[BlockKey], beyond: int = 0, wait_s: float = 0.0
    ) -> PrefixMatch:
        with self._link.use() as client:
            deadline_s = self._options.deadlines.control_s + wait_s
            matched = client.match(
                request_id, keys, deadline_s=deadline_s, beyond=beyond, wait_s=wait_s
            )
        reason = MissReason(matched.reason or MissReason.NONE)
        if matched.num_blocks < len(keys) and not matched.more:
            self._boundary.count(reason)
        with self._lock:
            request = self._requests[request_id]
            request.leased_keys = tuple(keys[: matched.num_blocks])
            request.renew_at = self._clock() + matched.lease_s / 3
        tiers = tuple(WIRE_TIERS[tier] for tier in matched.tiers[: matched.num_blocks])
        return PrefixMatch(matched.num_blocks, tiers, reason, matched.more)

    def _load(self, task: LoadTask) -> Loaded:
        loaded = self._loads.run(task)
        with self._lock:
            self._num_loaded += loaded.num_blocks
            self._num_borrowed += loaded.num_borrowed
            self._num_stale += loaded.num_stale
            self._requests[task.request_id].leased_keys = ()
        return loaded

    def _save(self, task: SaveTask, handle: str | None) -> Saved:
        if handle is not None:
            self._open(task.request_id, handle, ())
        saved = self._saves.run(task)
        with self._lock:
            self._num_saved += saved.num_stored
        return saved

    # --- what runs on the link's thread --------------------------------------------------------------

    def _connected(self, client: NodeClient) -> None:
        """A new connection: the node knows nothing of our pool, and of no request."""
        self._pin(client)
        self._lends, self._lenders = self._mover.shared is not None, frozenset()
        with self._lock:
            self._needs_snapshot = True
            self._to_release.clear()
            for request in self._requests.values():
                request.leased_keys = ()

    def _pin(self, client: NodeClient) -> None:
        """Begin to page-lock the connection's memory; it is used meanwhile."""
        if not self._mover.pins_memory:
            return
        arena = client.arena
        landing = self._mover.landing(arena) if len(arena) else None
        self._loads.direct = DirectLoads(landing, arena) if landing is not None else None
        self._pinning = self._saves.pinning = Pinning(
            self._mover, client.window, landing, len(arena)
        )
        self._pinning.start(self._boundary)

    def _unpin(self) -> None:
        """Before the memory is unmapped; the link lets nobody use the client now."""
        if self._pinning is not None:
            self._pinning.stop()
        if self._loads.direct is not None:
            self._loads.direct.close()
        self._pinning = self._saves.pinning = self._loads.direct = None

    def wait_pinned(self, timeout_s: float) -> bool:
        """Wait until all is page-locked that this connection will page-lock: for measuring."""
        return self._pinning is None or self._pinning.wait(timeout_s)

    def _ping(self, client: NodeClient) -> None:
        """Hear what was struck off since our pool last let go of all that was; say so when it did."""
        if self._striking is not None and self._striking[1].done():
            version, done = self._striking
            self._striking = None
            if done.exception() is None:
                self._dropped = version
        pong = client.ping(deadline_s=PING_S, dropped=self._dropped, kept=self._events.kept)
        self._share_pools(client, pong)
        strike = self._events.strike
        if strike is None or self._striking is not None or pong.version <= self._dropped:
            return
        if not pong.struck:
            self._dropped = pong.version
            return
        done = strike(pong.struck)
        self._striking = (pong.version, done)
        done.add_done_callback(lambda _: self._link.wake())

    def _share_pools(self, client: NodeClient, pong: Pong) -> None:
        """Lend our pool if the node does not know it (any more); have the others' mapped, or let go of."""
        ours = PoolName(client.session, self._options.shard)
        self._saves.lends = ours in pong.pools
        if self._lends and not self._saves.lends:
            self._lends = self._boundary.run("lend", lambda: self._lend(ours), lambda _: False)
        lenders = frozenset(
            name for name in pong.pools if name != ours and name.shard == ours.shard
        )
        if lenders != self._lenders:
            self._lenders = lenders
            self._loading.submit(
                self._boundary.run, "borrow", lambda: self._borrow(lenders), lambda _: None
            )

    def _lend(self, name: PoolName) -> bool:
        shared = self._mover.shared
        assert shared is not None
        message = Lend(name, shared.num_pages, shared.page_bytes)
        deadline_s = self._options.deadlines.control_s
        lend(self._options.node_socket, message, shared.memory.descriptor, deadline_s=deadline_s)
        return True

    def _borrow(self, lenders: Collection[PoolName]) -> None:
        """On the load thread: nothing reads a pool that is let go of."""
        with self._link.use() as client:
            if self._loads.direct is not None:
                self._loads.direct.landing.borrowed.renew(
                    lenders,
                    lambda name: borrow(
                        self._options.node_socket,
                        client.session,
                        name,
                        deadline_s=self._options.deadlines.control_s,
                    ),
                )

    def _tick(self, client: NodeClient) -> None:
        self._send_releases(client)
        self._renew(client)
        self._publish(client)

    def _send_releases(self, client: NodeClient) -> None:
        while True:
            with self._lock:
                request_ids = self._to_release[:RELEASES_PER_MESSAGE]
            if not request_ids:
                return
            client.release(request_ids, deadline_s=self._options.deadlines.control_s)
            with self._lock:  # only this thread takes any out
                del self._to_release[: len(request_ids)]

    def _renew(self, client: NodeClient) -> None:
        now = self._clock()
        with self._lock:
            due = [
                (name, request.leased_keys)
                for name, request in self._requests.items()
                if request.leased_keys and not request.is_released and request.renew_at <= now
            ]
            for name, _ in due:
                self._requests[name].renew_at = now + client.lease_s / 3
        for name, keys in due:
            client.match(name, keys, deadline_s=self._options.deadlines.control_s)

    def _publish(self, client: NodeClient) -> None:
        while (events := self._next_events()) is not None:
            try:
                client.publish(events, deadline_s=self._options.deadlines.control_s)
            except BaseException:
                with self._lock:  # what was taken is lost: only everything mends that
                    self._needs_snapshot = True
                raise

    def _next_events(self) -> EngineEvents | None:
        with self._lock:
            wanted, self._needs_snapshot = self._needs_snapshot, False
        return self._events.snapshot() if wanted else self._events.take()
