"""Links to the nodes: one task for each, over gRPC.

A link passes hints on, and keeps three things current: what the node holds (`FleetIndex`), which engine
sessions it serves (`Fleet`) and, where no directory is used, for the first node of the list the registry's
state and the lease on it (`RegistryView`).
A broken link is opened again with growing, jittered pauses; until then the node counts as holding nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from kvfabric.errors import ConnectError, KVFabricError, RemoteProtocolError
from kvfabric.events.index import FleetIndex, NodeFeed
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.lease import RENEW_EVERY_S
from kvfabric.registry.wire import state_from_pb
from kvfabric.tls import Security, diagnose, open_channel
from kvfabric.types import MissReason, NodeId, TenantId
from kvfabric_router import hints
from kvfabric_router.fleet import Fleet, SessionReport
from kvfabric_router.hints import Hint
from kvfabric_router.identity import ModelIdentity
from kvfabric_router.load_sharing import share_load
from kvfabric_router.metrics import RouterMetrics
from kvfabric_router.registry_view import RegistryView
from kvfabric_router.topology import Place

HOLDER_KIND = "router"
CALL_TIMEOUT_S = 2.0
HINT_TIMEOUT_S = 0.25
MAX_HINTS = 32
"""On their way to one node; what comes beyond is not hinted at. Late hints are worth nothing."""
PAUSE_S, MAX_PAUSE_S = 0.05, 2.0
DISTRUST_PAUSE_S = 30.0
# A channel of its own for each attempt: otherwise gRPC shares its own, longer back-off between them.
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    # Who only listens never learns that a machine is gone without a word: an idle node says nothing either.
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
)

_log = logging.getLogger(__name__)


def session_report(engine: pb.Engine) -> SessionReport:
    """An engine session from its message."""
    return SessionReport(
        endpoint=engine.endpoint,
        engine_id=engine.engine_id,
        session=engine.session,
        model_name=engine.model,
        model=ModelIdentity(
            model_revision=engine.model_revision,
            layout_fingerprint=engine.layout_fingerprint,
            block_tokens=engine.block_tokens,
            adapter=engine.adapter,
            adapter_revision=engine.adapter_revision,
        ),
        block_bytes=engine.block_bytes,
        serves=engine.serves or "both",
    )


@dataclass(frozen=True, slots=True)
class Told:
    """What a node answered to the lookup of a request: of `num_asked` leading blocks so many from each tier,
    and why not the next."""

    num_asked: int
    num_host: int
    num_ssd: int
    num_peer: int
    reason: MissReason


class NodeLink:
    """One node. `target`: `unix:PATH` or `HOST:PORT`. `registry` is None for one that only sends events."""

    def __init__(
        self,
        target: str,
        *,
        fleet: Fleet,
        index: FleetIndex,
        registry: RegistryView | None,
        metrics: RouterMetrics,
        security: Security,
    ) -> None:
        self.target = target
        self._security = security
        self._fleet = fleet
        self._index = index
        self._registry = registry
        self._metrics = metrics
        self._node_id = NodeId("")
        self._snapshot_needed = asyncio.Event()
        self._told = ""
        self._events: Any = None
        self._hints: deque[Hint] = deque()
        self._hinted = asyncio.Event()
        self._takes_hints = False
        self.connected = False
        self.is_settled = False
        """What the node holds was learned once, or it was asked in vain."""
        self.version = ""
        self.clock_ahead_s = 0.0
        self.stale_serves = 0

    async def run(self) -> None:
        """Serve the link until cancelled."""
        pause = PAUSE_S
        while True:
            try:
                async with self._channel() as channel:
                    await self._serve(channel)
            except* (grpc.aio.AioRpcError, KVFabricError) as group:
                self.is_settled = True
                await self._tell(_reason(group))
            if self.connected:
                pause = PAUSE_S
                self.connected = False
                _log.warning("node %s: link lost", self.target)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, MAX_PAUSE_S)

    async def _tell(self, reason: str) -> None:
        """Each reason once: a link is tried again and again."""
        why = await asyncio.to_thread(diagnose, self.target, self._security)
        if (why or reason) != self._told:
            self._told = why or reason
            _log.log(logging.ERROR if why else logging.INFO, "node %s: %s", self.target, self._told)

    @contextlib.asynccontextmanager
    async def _channel(self) -> AsyncIterator[Any]:
        channel = open_channel(self.target, self._security, _CHANNEL_OPTIONS)
        try:
            yield channel
        finally:
            await channel.close()

    async def _serve(self, channel: Any) -> None:
        events = pb_grpc.NodeEventsStub(channel)  # type: ignore[no-untyped-call]
        asked_at = time.time()
        description = await events.Describe(pb.DescribeRequest(), timeout=CALL_TIMEOUT_S)
        # Halfway between question and answer.
        self.clock_ahead_s = description.clock - (asked_at + time.time()) / 2
        self.version = description.version
        self._alarm(description.stale_serves)
        self._node_id = NodeId(description.node_id)
        feed = NodeFeed(self._index, self._node_id)
        self._fleet.announce(self._node_id, map(session_report, description.engines))
        place = Place(
            machine=description.machine,
            rack=description.rack,
            zone=description.zone,
            exchanges=description.exchanges,
            host_bytes=description.host_bytes,
            ssd_bytes=description.ssd_bytes,
        )
        self._fleet.topology.placed(self._node_id, place)
        self._fleet.topology.measured(self._node_id, description.rates)
        self._events = events
        self._takes_hints = description.takes_hints
        self._hints.clear()
        self.connected = True
        self._snapshot_needed.clear()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(events, feed))
                group.create_task(self._take_snapshots(events, feed))
                group.create_task(self._watch_trust(feed))
                group.create_task(self._send_hints(pb_grpc.NodeHintsStub(channel)))  # type: ignore[no-untyped-call]
                if self._registry is not None:
                    registry = pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]
                    group.create_task(self._watch_registry(registry, self._registry))
                    group.create_task(self._renew(registry, self._registry))
                    group.create_task(share_load(self._fleet, partial(_exchange, registry)))
        finally:
            feed.lost()
            self._fleet.node_lost(self._node_id)

    @property
    def node_id(self) -> NodeId:
        """Empty before the first contact."""
        return self._node_id

    async def lookup(self, request_id: str, tenant: TenantId) -> Told | None:
        """None if the node does not know, or does not answer."""
        if not self.connected:
            return None
        asked = pb.FindLookupRequest(request_id=request_id, tenant_id=tenant)
        try:
            found = await self._events.FindLookup(asked, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            _log.info("node %s: no lookup: %s", self.target, exc.code().name)
            return None
        if not found.known:
            return None
        return Told(
            found.num_asked,
            found.num_host,
            found.num_ssd,
            found.num_peer,
            MissReason(found.reason),
        )

    async def end_handoff(self, name: str, tenant: TenantId) -> None:
        """A node that does not hear it lets its engine wait until the deadline."""
        if not self.connected:
            return
        request = pb.EndHandoffRequest(name=name, tenant_id=tenant)
        try:
            await self._events.EndHandoff(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            _log.info("node %s: a hand-off goes on: %s", self.target, exc.code().name)

    # ------------------------------------------------------------------ hints

    def hint(self, hint: Hint) -> None:
        """Have the node begin to bring these blocks. Returns at once, and nothing waits for it."""
        if not self.connected or not self._takes_hints:
            return
        if len(self._hints) >= MAX_HINTS:
            self._metrics.hints.labels(result="dropped").inc()
            return
        self._hints.append(hint)
        self._hinted.set()

    async def _send_hints(self, stub: Any) -> None:
        """All that gathered while the last ones were on their way go together."""
        while True:
            await self._hinted.wait()
            self._hinted.clear()
            for some in hints.messages(self._hints):
                said = [pb.PrefetchHint(handle=hint.handle, keys=hint.keys) for hint in some]
                try:
                    request = pb.PrefetchRequest(hints=said)
                    reply = await stub.Prefetch(request, timeout=HINT_TIMEOUT_S)
                except grpc.aio.AioRpcError as exc:
                    # A link that broke ends by its event stream; a busy node is left alone.
                    _log.debug("node %s: hints lost: %s", self.target, exc.code().name)
                    self._metrics.hints.labels(result="failed").inc(len(some))
                else:
                    self._metrics.hints.labels(result="begun").inc(reply.num_begun)
                    self._metrics.hints.labels(result="refused").inc(reply.num_refused)

    # ------------------------------------------------------------------ events

    async def _watch(self, stub: Any, feed: NodeFeed) -> None:
        boot_id, sequence = feed.position
        request = pb.WatchEventsRequest(boot_id=boot_id, from_sequence=sequence)
        async for batch in stub.Watch(request):
            self._alarm(batch.stale_serves)
            self._fleet.topology.measured(self._node_id, batch.rates)
            if not feed.watch(batch):
                self._snapshot_needed.set()
            elif batch.engines:
                self._announce(feed)
        raise ConnectError("the node ended its event stream")

    def _alarm(self, stale_serves: int) -> None:
        if stale_serves > self.stale_serves:
            _log.error(
                "node %s: its auditor was served withdrawn blocks, %d times",
                self.target,
                stale_serves,
            )
        self.stale_serves = stale_serves

    async def _take_snapshots(self, stub: Any, feed: NodeFeed) -> None:
        while True:
            await self._snapshot_needed.wait()
            self._snapshot_needed.clear()
            if not feed.needs_snapshot:
                continue  # asked for by a batch that came while the last one was read
            batches = [batch async for batch in stub.Snapshot(pb.SnapshotRequest())]
            try:
                feed.snapshot(batches)
            except RemoteProtocolError as exc:
                # Not an empty node: what was known stays until a snapshot succeeds.
                _log.warning("%s", exc)
                self._metrics.index_gaps.labels(result="failed").inc()
                await asyncio.sleep(PAUSE_S)
                self._snapshot_needed.set()
            else:
                self._metrics.index_gaps.labels(result="applied").inc()
                self.is_settled = True
                self._announce(feed)

    async def _watch_trust(self, feed: NodeFeed) -> None:
        """What engines reuse is less than the index says, again and again: learn the node anew."""
        distrusted = self._fleet.distrusted.setdefault(self._node_id, asyncio.Event())
        while True:
            await distrusted.wait()
            _log.warning("node %s: engines reuse less than it told; learning anew", self._node_id)
            self._metrics.index_gaps.labels(result="distrusted").inc()
            feed.distrust()
            self._snapshot_needed.set()
            await asyncio.sleep(DISTRUST_PAUSE_S)
            distrusted.clear()

    def _announce(self, feed: NodeFeed) -> None:
        self._fleet.announce(self._node_id, map(session_report, feed.engines.values()))

    # ------------------------------------------------------------------ registry

    async def _watch_registry(self, stub: Any, view: RegistryView) -> None:
        request = pb.WatchRegistryRequest(holder_id=view.holder_id, holder_kind=HOLDER_KIND)
        async for message in stub.Watch(request):
            view.apply(state_from_pb(message))
        raise ConnectError("the node ended its registry stream")

    async def _renew(self, stub: Any, view: RegistryView) -> None:
        """Renew the epoch lease every half second, and at once when a change was applied."""
        while True:
            view.changed.clear()
            await view.wait_sent()
            state = view.state
            sent_at = view.lease.now()
            reply = await stub.RenewLease(
                pb.RenewLeaseRequest(
                    holder_id=view.holder_id,
                    holder_kind=HOLDER_KIND,
                    applied_version=state.version if state else 0,
                ),
                timeout=CALL_TIMEOUT_S,
            )
            view.lease.renewed(
                sent_at=sent_at,
                registry_id=reply.registry_id,
                ttl_s=reply.ttl_s,
                version=reply.version,
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_EVERY_S):
                    await view.changed.wait()


async def _exchange(stub: Any, replica: str, row: bytes) -> Iterable[bytes]:
    told = await stub.ShareLoad(pb.RouterLoad(router=replica, row=row))
    return list(told.rows)


def _reason(group: BaseExceptionGroup[BaseException]) -> str:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, grpc.aio.AioRpcError):
        return f"{first.code().name}: {first.details()}"
    return str(first)
