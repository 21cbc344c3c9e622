"""Connector: what any engine asks the fabric for. Engine-neutral; fails open.

    open     handle -> keys                        control thread
    match    keys -> leased prefix                 control thread
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

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from kvfabric.client import EngineHello, NodeClient, Window
from kvfabric.errors import KVFabricError, NoSpace, TransferError
from kvfabric.hashing import layout_fingerprint
from kvfabric.protocol.messages import Confirmed, EngineEvents, Located, Role
from kvfabric.types import BlockKey, BlockLayout, ExtraInput, GrantState, MissReason, TierName
from kvfabric_engine.audit import PartAudit
from kvfabric_engine.boundary import Boundary, reason_of
from kvfabric_engine.direct_load import LOCATE_BYTES, DirectLoads, NodeCalls, parts_of
from kvfabric_engine.node_link import LinkCalls, NodeLink
from kvfabric_engine.pinning import Pinning
from kvfabric_engine.plan import PrefixMatch as PrefixMatch  # part of this interface
from kvfabric_engine.pool_events import PoolEvents
from kvfabric_engine.request_keys import LocalNamespaces, RequestKeys
from kvfabric_engine.staging import Fence, LayerArrival, Mover, Pages

R = TypeVar("R")
GROUP = 0
"""The one KV group that this connector moves."""
WIRE_TIERS = (TierName.HOST, TierName.SSD)
STAGING_BYTES = 64 << 20
"""Read, verified and confirmed at once by a load that the CPU copies: each time asks the node once."""
CONTROL_THREADS = 2
RELEASES_PER_MESSAGE = 1000


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a request may lose to the fabric before it does without."""

    control_s: float = 1.0  # open, match, release, events
    load_s: float = 5.0  # a whole load
    save_s: float = 5.0  # each reserve or commit


@dataclass(frozen=True, slots=True)
class ConnectorOptions:
    """Who this engine is to its node. `audit_parts`: path of the checksum log, empty for none."""

    node_socket: str
    engine_id: str
    endpoint: str
    model: str
    model_revision: str
    window_bytes: int
    adapter: str = ""
    adapter_revision: str = ""
    shard: int = 0
    role: Role = Role.SCHEDULER | Role.WORKER
    session: bytes = b""
    audit_parts: str = ""
    deadlines: Deadlines = field(default_factory=Deadlines)


@dataclass(frozen=True, slots=True)
class Opened:
    """`keys` None: reuse nothing, store nothing. `in_fabric`: the node knows the request."""

    keys: RequestKeys | None
    in_fabric: bool
    reason: MissReason


@dataclass(frozen=True, slots=True)
class Loaded:
    """The first `num_blocks` blocks asked for are in the pool; what else was asked for is untouched."""

    num_blocks: int
    reason: MissReason
    seconds: float = 0.0
    """From when the load's turn came."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Of the blocks handed over, `num_stored` are new in the fabric and `num_present` were there."""

    num_stored: int
    num_present: int
    reason: MissReason


@dataclass(frozen=True, slots=True)
class ConnectorStatistics:
    """Since start, but `is_up` and `saving_bytes`, which are now."""

    is_up: bool
    saving_bytes: int
    loaded_blocks: int
    loaded_bytes: int
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
        self._boundary = Boundary()
        self._local = LocalNamespaces(options.model_revision, layout_fingerprint(layout))
        self._audit = PartAudit(options.audit_parts, mover) if options.audit_parts else None
        self._link = NodeLink(
            options.node_socket,
            self._hello(),
            boundary=self._boundary,
            session=options.session,
            calls=LinkCalls(connected=self._connected, gone=self._unpin, tick=self._tick),
        )
        self._control = ThreadPoolExecutor(CONTROL_THREADS, "kvf-control")
        self._loading = ThreadPoolExecutor(1, "kvf-load", on_thread)
        self._saving = ThreadPoolExecutor(1, "kvf-save", on_thread)
        self._staging: list[memoryview] = []
        self._pinning: Pinning | None = (
            None  # of this connection; changes while nobody uses the client
        )
        self._direct: DirectLoads | None = None  # likewise
        self._lock = threading.Lock()  # guards all below
        self._requests: dict[str, _Request] = {}
        self._to_release: list[str] = []
        self._needs_snapshot = True
        self._saving_bytes = 0
        self._backlog: dict[int, tuple[Fence, int]] = {}  # of each save that is not done
        self._save_numbers = itertools.count()
        self._moved = [0, 0]  # blocks loaded, blocks saved

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
        for pool in (self._control, self._loading, self._saving):
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

    def load(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        blocks: Sequence[Pages],
        begun: Callable[[LayerArrival], None] | None = None,
    ) -> Future[Loaded]:
        """Bring matched `keys` into the pool's `blocks`. What fails is left to be computed.

        `begun`: for an engine that wants to compute layers as they come. It may be called, on the load's
        thread; the blocks then hold unverified bytes until the future is done, and of what was not loaded
        they hold anything.
        """
        progress = [0]
        fence = self._mover.fence()  # the pages may be in use still by what had them before
        return self._submit(
            self._loading,
            "load",
            request_id,
            lambda: self._load(request_id, keys, blocks, progress, fence, begun),
            lambda error: Loaded(progress[0], reason_of(error)),
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

        `fence` (`Mover.fence`) stands behind the computation of the blocks. When more than two windows of
        computed bytes, or twice as many as these, are being saved already, they are not stored: the cache
        is slower than the engine.
        `handle`: open the request with it first, for a process that did not open it itself.
        """
        num_bytes = len(keys) * self._mover.part_bytes
        with self._lock:
            # What the engine has yet to compute is not late, however far ahead it launches.
            late = sum(size for fence, size in self._backlog.values() if fence.is_passed())
            is_full = late > 2 * max(self._options.window_bytes, num_bytes)
            if not is_full:
                self._saving_bytes += num_bytes
                number = next(self._save_numbers)
                self._backlog[number] = (fence, num_bytes)
        if is_full:
            self._boundary.count(MissReason.DEADLINE)
            dropped: Future[Saved] = Future()
            dropped.set_result(Saved(0, 0, MissReason.DEADLINE))
            return dropped
        future = self._submit(
            self._saving,
            "save",
            request_id,
            lambda: self._open_and_save(request_id, parent, keys, blocks, fence, handle),
            lambda error: Saved(0, 0, reason_of(error)),
        )
        future.add_done_callback(lambda _: self._end_saving(number))
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

    def statistics(self) -> ConnectorStatistics:
        with self._lock:
            loaded, saved = self._moved
            saving_bytes = self._saving_bytes
        size = self._mover.part_bytes
        return ConnectorStatistics(
            is_up=self._link.is_up,
            saving_bytes=saving_bytes,
            loaded_blocks=loaded,
            loaded_bytes=loaded * size,
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

    def _end_saving(self, number: int) -> None:
        with self._lock:
            _, num_bytes = self._backlog.pop(number)
            self._saving_bytes -= num_bytes

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
        return Opened(keys, True, MissReason.NONE)

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

    def _match(self, request_id: str, keys: Sequence[BlockKey]) -> PrefixMatch:
        with self._link.use() as client:
            deadline_s = self._options.deadlines.control_s
            matched = client.match(request_id, keys, deadline_s=deadline_s)
        reason = MissReason(matched.reason or MissReason.NONE)
        if matched.num_blocks < len(keys):
            self._boundary.count(reason)
        with self._lock:
            request = self._requests[request_id]
            request.leased_keys = tuple(keys[: matched.num_blocks])
            request.renew_at = self._clock() + matched.lease_s / 3
        tiers = tuple(WIRE_TIERS[tier] for tier in matched.tiers[: matched.num_blocks])
        return PrefixMatch(matched.num_blocks, tiers, reason)

    def _load(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        blocks: Sequence[Pages],
        progress: list[int],
        fence: Fence,
        begun: Callable[[LayerArrival], None] | None,
    ) -> Loaded:
        started = time.monotonic()
        deadline = started + self._options.deadlines.load_s
        with self._link.use() as client:
            fence.wait()
            if self._direct is not None:
                calls = self._node_calls(client, request_id, keys, blocks, progress, deadline)
                size, layers = self._mover.part_bytes, self._layout.num_layers
                if begun is None:
                    reason = self._direct.run(calls, blocks, size)
                else:
                    reason = self._direct.run_layers(calls, blocks, size, layers, begun)
                if progress[0] < len(keys):
                    self._boundary.count(reason)
            else:
                reason = self._load_copied(client, request_id, keys, blocks, progress, deadline)
            if reason is MissReason.CORRUPT and progress[0] < len(keys):
                self._recheck(client, request_id, keys[progress[0]])
        with self._lock:
            self._moved[0] += progress[0]
            self._requests[request_id].leased_keys = ()
        return Loaded(progress[0], reason, time.monotonic() - started)

    def _recheck(self, client: NodeClient, request_id: str, key: BlockKey) -> None:
        """Have the node look at a block that did not verify here, or every hit on it would fail."""
        self._boundary.run(
            "recheck",
            lambda: client.recheck(
                request_id,
                [key],
                group=GROUP,
                shard=self._options.shard,
                deadline_s=self._options.deadlines.control_s,
            ),
            lambda _: None,
        )

    def _load_copied(
        self,
        client: NodeClient,
        request_id: str,
        keys: Sequence[BlockKey],
        blocks: Sequence[Pages],
        progress: list[int],
        deadline: float,
    ) -> MissReason:
        reason, step = MissReason.NONE, max(1, LOCATE_BYTES // self._mover.part_bytes)
        while progress[0] < len(keys):
            done = progress[0]
            wanted, rest = keys[done : done + step], blocks[done : done + step]
            located = client.load(
                request_id,
                wanted,
                group=GROUP,
                shard=self._options.shard,
                deadline_s=_left(deadline),
            )
            reason = MissReason(located.reason or MissReason.NONE)
            for count, found in self._read(client, request_id, wanted, rest, located, deadline):
                first = progress[0]
                self._record_load(
                    client, keys[first : first + count], blocks[first : first + count]
                )
                progress[0] += count
                reason = found if found is not MissReason.NONE else reason
            if progress[0] < done + len(wanted):
                self._boundary.count(reason)
                break
        return reason

    def _read(
        self,
        client: NodeClient,
        request_id: str,
        keys: Sequence[BlockKey],
        blocks: Sequence[Pages],
        located: Located,
        deadline: float,
    ) -> Iterator[tuple[int, MissReason]]:
        """Located parts -> pool by the CPU, as many at a time as staging holds; how many came each time, and
        why the last time not all did."""
        staging = self._staging_buffers()
        for start in range(0, located.num_blocks, len(staging)):
            part = parts_of(located, start, min(start + len(staging), located.num_blocks))
            wanted = keys[start : start + part.num_blocks]
            usable, reason = self._take(client, request_id, wanted, part, deadline)
            self._mover.scatter(staging[:usable], blocks[start : start + usable])
            yield usable, reason
            if usable < part.num_blocks:
                return

    def _node_calls(
        self,
        client: NodeClient,
        request_id: str,
        keys: Sequence[BlockKey],
        blocks: Sequence[Pages],
        progress: list[int],
        deadline: float,
    ) -> NodeCalls:
        """What a direct load asks of the node, and what it tells us."""
        shard = self._options.shard

        def locate(first: int, count: int) -> Located:
            wanted = keys[first : first + count]
            return client.load(
                request_id, wanted, group=GROUP, shard=shard, deadline_s=_left(deadline)
            )

        def confirm(first: int, located: Located) -> Confirmed:
            read = keys[first : first + located.num_blocks]
            return client.confirm(
                request_id, read, located, group=GROUP, shard=shard, deadline_s=_left(deadline)
            )

        def read(first: int, located: Located) -> tuple[int, MissReason]:
            stop = first + located.num_blocks
            wanted, places = keys[first:stop], blocks[first:stop]
            read = list(self._read(client, request_id, wanted, places, located, deadline))
            return sum(count for count, _ in read), read[-1][1]

        def landed(first: int, count: int) -> None:
            progress[0] = first + count
            if self._audit is not None and self._direct is not None:
                self._direct.landing.wait()
                stop = first + count
                self._record_load(client, keys[first:stop], blocks[first:stop])

        return NodeCalls(locate, confirm, read, landed)

    def _staging_buffers(self) -> list[memoryview]:
        """Host buffers of one part each, used by the load thread alone."""
        if not self._staging:
            size = self._mover.part_bytes
            count = max(1, STAGING_BYTES // size)
            whole = self._mover.host_buffer(count * size)
            self._staging = [whole[i * size : (i + 1) * size] for i in range(count)]
        return self._staging

    def _take(
        self,
        client: NodeClient,
        request_id: str,
        keys: Sequence[BlockKey],
        located: Located,
        deadline: float,
    ) -> tuple[int, MissReason]:
        """Parts -> staging; how many leading ones are verified, confirmed and so usable."""
        reason = MissReason.NONE
        good = client.read(located, self._staging) if located.num_blocks else 0
        if good < located.num_blocks:
            reason = MissReason.CORRUPT
        if good == 0:
            return 0, reason
        confirmed = client.confirm(
            request_id,
            keys[:good],
            located,
            group=GROUP,
            shard=self._options.shard,
            deadline_s=_left(deadline),
        )
        if confirmed.num_blocks < good:
            reason = MissReason(confirmed.reason or MissReason.EXPIRED)
        return min(good, confirmed.num_blocks), reason

    def _record_load(
        self, client: NodeClient, keys: Sequence[BlockKey], blocks: Sequence[Pages]
    ) -> None:
        if self._audit is not None:
            digests = self._audit.digests(blocks, after=self._mover.fence())
            self._audit.write("load", client.session, keys, self._options.shard, digests)

    def _open_and_save(
        self,
        request_id: str,
        parent: BlockKey,
        keys: Sequence[BlockKey],
        blocks: Sequence[Pages],
        fence: Fence,
        handle: str | None,
    ) -> Saved:
        if handle is not None:
            self._open(request_id, handle, ())
        return self._save(request_id, parent, keys, blocks, fence)

    def _save(
        self,
        request_id: str,
        parent: BlockKey,
        keys: Sequence[BlockKey],
        blocks: Sequence[Pages],
        fence: Fence,
    ) -> Saved:
        stored = present = 0
        reason = MissReason.NONE
        with self._link.use() as client:
            if self._pinning is not None:
                self._pinning.wait_window(self._options.deadlines.save_s)
            # Half a window at most: the other half may be quarantined behind a commit that hangs.
            step = max(1, client.window.num_bytes // 2 // self._mover.part_bytes)
            for start in range(0, len(keys), step):
                chunk = slice(start, start + step)
                saved = self._save_chunk(
                    client, request_id, parent, keys[chunk], blocks[chunk], fence
                )
                stored += saved.num_stored
                present += saved.num_present
                parent = keys[chunk][-1]
                reason = saved.reason
                if saved.num_stored + saved.num_present < len(keys[chunk]):
                    break  # what follows would have no parent
        with self._lock:
            self._moved[1] += stored
        return Saved(stored, present, reason)

    def _save_chunk(
        self,
        client: NodeClient,
        request_id: str,
        parent: BlockKey,
        keys: Sequence[BlockKey],
        blocks: Sequence[Pages],
        fence: Fence,
    ) -> Saved:
        deadline_s = self._options.deadlines.save_s
        reserved = client.reserve(
            request_id,
            parent,
            keys,
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
            sources = [blocks[i] for i in granted]
            digests = self._audit.digests(sources, after=fence) if self._audit else []
            views = [client.window.view(offset, size) for offset in offsets]
            self._mover.gather(sources, views, after=fence)
            committed = client.commit(reserved.reservation, granted, offsets, deadline_s=deadline_s)
        kept = [i for i, state in enumerate(committed.states) if state]
        if self._audit is not None:
            stored_keys = [keys[granted[i]] for i in kept]
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

    # --- what runs on the link's thread --------------------------------------------------------------

    def _connected(self, client: NodeClient) -> None:
        """A new connection: the node knows nothing of our pool, and of no request."""
        self._pin(client)
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
        self._direct = DirectLoads(landing, arena) if landing is not None else None
        self._pinning = Pinning(self._mover, client.window, landing, len(arena))
        self._pinning.start(self._boundary)

    def _unpin(self) -> None:
        """Before the memory is unmapped; the link lets nobody use the client now."""
        if self._pinning is not None:
            self._pinning.stop()
        if self._direct is not None:
            self._direct.close()
        self._pinning = self._direct = None

    def wait_pinned(self, timeout_s: float) -> bool:
        """Wait until all is page-locked that this connection will page-lock: for measuring."""
        return self._pinning is None or self._pinning.wait(timeout_s)

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


def _left(deadline: float) -> float:
    """Seconds until `deadline` (monotonic), never quite zero: the call itself decides that it is late."""
    return max(0.001, deadline - time.monotonic())
