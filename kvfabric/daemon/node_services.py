"""`NodeEvents`, `NodeAdmin`, `KeyringService`: what a node holds, for whoever may know."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from kvfabric import __version__
from kvfabric.daemon.admin_sources import AdminSources
from kvfabric.daemon.rpc import stream, unary
from kvfabric.errors import NotFound
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.types import TenantId, TierName


class NodeEvents(pb_grpc.NodeEventsServicer):
    def __init__(self, sources: AdminSources, node_id: str) -> None:
        self._sources = sources
        self._node_id = node_id

    @unary
    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.NodeDescription:
        events, place = self._sources.events, self._sources.place
        return pb.NodeDescription(
            node_id=self._node_id,
            boot_id=events.boot_id,
            version=__version__,
            sequence=events.sequence,
            engines=events.engines,
            clock=time.time(),
            models=self._sources.models.own(),
            stale_serves=events.stale_serves,
            takes_hints=self._sources.prefetches is not None,
            rates=self._sources.rates(),
            machine=place.machine,
            rack=place.rack,
            zone=place.zone,
            exchanges=place.exchanges,
            host_bytes=place.host_bytes,
            ssd_bytes=place.ssd_bytes,
        )

    @unary
    async def FindLookup(self, request: pb.FindLookupRequest, context: Any) -> pb.Lookup:
        found = self._sources.lookups.find(request.request_id, TenantId(request.tenant_id))
        if found is None:
            return pb.Lookup()
        return pb.Lookup(
            known=True,
            num_asked=found.num_asked,
            num_host=found.num_host,
            num_ssd=found.num_ssd,
            num_peer=found.num_peer,
            reason=found.reason.value,
        )

    @unary
    async def EndHandoff(self, request: pb.EndHandoffRequest, context: Any) -> pb.HandoffEnded:
        self._sources.handoffs.ended((TenantId(request.tenant_id), request.name))
        return pb.HandoffEnded()

    @stream
    async def Watch(
        self, request: pb.WatchEventsRequest, context: Any
    ) -> AsyncIterator[pb.EventBatch]:
        events = self._sources.events
        async for batch in events.subscribe(request.boot_id, request.from_sequence):
            yield batch

    @stream
    async def Snapshot(
        self, request: pb.SnapshotRequest, context: Any
    ) -> AsyncIterator[pb.EventBatch]:
        # What changes while it is taken comes over Watch after `sequence`, and is applied after it.
        events = self._sources.events
        events.flush()
        yield pb.EventBatch(
            boot_id=events.boot_id, sequence=events.sequence, engines=events.engines
        )
        for batch in events.hbm_runs():
            yield batch
            await self._sources.turn()
        for slice_ in self._sources.resident(TierName.HOST):
            yield events.snapshot_batch(
                [
                    pb.Run(
                        kind=pb.STORED, tier=pb.HOST, namespace_tag=tag, parent=parent, keys=keys
                    )
                    for tag, parent, keys in slice_
                ]
            )
            await self._sources.turn()
        yield events.snapshot_batch([], end=True)


class KeyringService(pb_grpc.KeyringServiceServicer):
    """For nodes and routers of the fleet; who may ask is `peers.PeerCheck`'s."""

    def __init__(self, sources: AdminSources) -> None:
        self._sources = sources

    @unary
    async def Fetch(self, request: pb.FetchKeysRequest, context: Any) -> pb.SharedKeys:
        keys = self._sources.fleet_keys
        if keys is None:
            raise NotFound("this node is in no directory: its keyring is its own")
        given = keys.give(request.tenant_ids)
        return pb.SharedKeys(
            fleet_check=given.fleet_check,
            tenant_secrets={str(name): secret for name, secret in given.tenant_secrets.items()},
            handle_keys=dict(given.handle_keys),
            current_handle_key=given.current_handle_key,
        )


class NodeAdmin(pb_grpc.NodeAdminServicer):
    def __init__(self, sources: AdminSources, node_id: str, clock: Callable[[], float]) -> None:
        self._sources = sources
        self._node_id = node_id
        self._clock = clock
        self._started = clock()

    @unary
    async def MeasureLinks(self, request: pb.MeasureLinksRequest, context: Any) -> pb.MeasuredLinks:
        if self._sources.measure_links is None:
            return pb.MeasuredLinks()
        return await self._sources.measure_links()

    @unary
    async def Scrub(self, request: pb.ScrubRequest, context: Any) -> pb.ScrubReport:
        if self._sources.scrub is None:
            raise NotFound("this node has no tiers to verify")
        return pb.ScrubReport(**(await self._sources.scrub())._asdict())

    @unary
    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.NodeStatus:
        status = self._sources.status(request.sealed_keys)
        status.node_id = self._node_id
        status.boot_id = self._sources.events.boot_id
        status.version = __version__
        status.uptime_s = self._clock() - self._started
        status.registry_version = self._sources.registry.state.version
        status.ClearField("engines")
        status.engines.extend(self._sources.events.engines)
        return status
