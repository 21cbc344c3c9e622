"""The admin plane of a node: gRPC on a 0600 Unix socket, for routers and administrators.

Serves `NodeEvents`, `RegistryService`, `NodeAdmin` and the standard health service. It decides nothing
about registry, leases or events: it translates. Whoever can open the socket is trusted as the node's own
user is (design 2); `kvfabric-requested-by` in the metadata is for the audit log, not for access.

A change that takes something out of reach is answered when it counts everywhere: every holder of an epoch
lease has applied it or was waited out. The caller may go away meanwhile; the change stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvfabric import __version__
from kvfabric.daemon.admin_client import ERROR_CODE, REQUESTED_BY
from kvfabric.daemon.lookups import Lookups
from kvfabric.daemon.peers import PeerCheck, TcpListener, identity_in
from kvfabric.errors import (
    AccessError,
    CapacityError,
    ClosedError,
    ConfigError,
    Conflict,
    DeadlineExceeded,
    KVFabricError,
    NotFound,
    ProtocolError,
)
from kvfabric.events.stream import EventStream
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.base import Change, Registry
from kvfabric.registry.changes import TenantChange, mint_tenant_id, tenant_named
from kvfabric.registry.holders import Ack, Holders
from kvfabric.registry.receipts import MADE, AckRow, ChangeRow, assemble
from kvfabric.registry.state import RegistryState, TierQuota
from kvfabric.registry.wire import (
    limits_from_pb,
    quota_from_pb,
    state_to_pb,
    template_to_pb,
    tenant_to_pb,
)
from kvfabric.registry.withdrawn import receipt_id
from kvfabric.store.scrub import ScrubReport
from kvfabric.types import TenantId, TierName, model_scope

Runs = Iterator[list[tuple[bytes, bytes, bytes]]]
Reply = TypeVar("Reply")
Request = TypeVar("Request")
Server = TypeVar("Server")

SERVICES = ("kvfabric.v1.NodeEvents", "kvfabric.v1.RegistryService", "kvfabric.v1.NodeAdmin")
MAX_FLOOR_SHARE = 0.9
MAX_REQUEST_BYTES = 1 << 20
MAX_REPLY_BYTES = 16 << 20
MAX_RECEIPT_WAIT_S = 25.0
_REPORT_S, _DESTROY_S = 1.0, 2.0
"""How long the answer to a change waits for what nodes report, and for what is to be destroyed."""
_ROWS_POLL_S = 0.02
_MAX_RPCS = 1024
_STOP_S = 0.5
_SOCKET_PATH_BYTES = 107
_DIGEST = re.compile(r"([a-z0-9]+:)?[0-9a-f]{16,}")

_STATUS = (
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (Conflict, grpc.StatusCode.FAILED_PRECONDITION),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (AccessError, grpc.StatusCode.PERMISSION_DENIED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (ClosedError, grpc.StatusCode.UNAVAILABLE),
)


class Destroyed(NamedTuple):
    """What of an offboarded tenant went from this node since it started."""

    had_secrets: bool
    keyring_generation: int
    num_blocks: int
    ssd_encrypted: bool


@dataclass(frozen=True, slots=True)
class AdminSources:
    """What the admin plane shows and changes.

    `status(sealed_keys)` fills tiers, usage, counters, `arena_adopted` and, if asked, the sealed keys of a
    NodeStatus; the rest is filled in here. `resident(tier)` yields slices of (namespace tag, parent prefix,
    packed key prefixes), each asked for in a `turn` of the event loop. `reports`: whether this node writes
    rows of receipts (`withdrawals`), for which an answer waits a moment.
    """

    registry: Registry
    keyring: Keyring
    events: EventStream
    status: Callable[[bool], pb.NodeStatus]
    resident: Callable[[TierName], Runs]
    turn: Callable[[], Awaitable[None]]
    reports: bool = False
    destroy: Callable[[TenantId], Awaitable[Destroyed]] | None = None
    scrub: Callable[[], Awaitable[ScrubReport]] | None = None
    lookups: Lookups = field(default_factory=Lookups)


class AdminServer:
    """An async context manager: inside it, the socket is served. `clock`: seconds, CLOCK_BOOTTIME."""

    def __init__(
        self,
        path: Path,
        sources: AdminSources,
        *,
        node_id: str,
        epoch_lease_s: float,
        clock: Callable[[], float],
        tcp: TcpListener | None = None,
    ) -> None:
        self._tcp = tcp
        self.path = path
        self.holders = Holders(ttl_s=epoch_lease_s, clock=clock)
        self.node_id = node_id
        self._sources = sources
        self._clock = clock
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    def __repr__(self) -> str:
        return f"<AdminServer {self.path}: {self.holders!r}>"

    async def __aenter__(self) -> AdminServer:
        """Raises ConfigError if the socket cannot be ours alone."""
        server = grpc.aio.server(
            interceptors=[PeerCheck()],
            maximum_concurrent_rpcs=_MAX_RPCS,
            options=[
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_send_message_length", MAX_REPLY_BYTES),
                ("grpc.so_reuseport", 0),
            ],
        )
        registry = _RegistryService(self._sources, self.holders, self.node_id, self._clock)
        pb_grpc.add_RegistryServiceServicer_to_server(registry, server)  # type: ignore[no-untyped-call]
        events = _NodeEvents(self._sources, self.node_id)
        pb_grpc.add_NodeEventsServicer_to_server(events, server)  # type: ignore[no-untyped-call]
        admin = _NodeAdmin(self._sources, self.node_id, self._clock)
        pb_grpc.add_NodeAdminServicer_to_server(admin, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        bind_private(server, self.path)
        if self._tcp is not None:
            self._tcp.add_to(server)
        await server.start()
        self._server = server
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Answers what is under way for at most half a second, then ends it."""
        assert self._server is not None
        await self._health.enter_graceful_shutdown()
        self._sources.events.close()
        await self._server.stop(_STOP_S)
        self.path.unlink(missing_ok=True)


def bind_private(server: grpc.aio.Server, path: Path) -> None:
    """Make the socket so that only this user can open it, from its first moment on."""
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise ConfigError(f"the path of a Unix socket has at most 107 bytes: {path}")
    if _answers(path):
        raise ConfigError(f"another process serves {path}: stop it, or choose another admin_socket")
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
        mode = path.stat()
    except (RuntimeError, OSError) as exc:
        raise ConfigError(f"cannot listen on {path}: {exc}") from exc
    finally:
        os.umask(before)
    if stat.S_IMODE(mode.st_mode) & 0o077 or mode.st_uid != os.geteuid():
        raise ConfigError(f"{path} could be opened by others (mode {stat.S_IMODE(mode.st_mode):o})")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        return True
    return False


# ---------------------------------------------------------------------- errors


def _status_of(error: KVFabricError) -> grpc.StatusCode:
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INTERNAL


async def _abort(context: Any, error: KVFabricError) -> None:
    context.set_trailing_metadata(((ERROR_CODE, error.code),))
    await context.abort(_status_of(error), str(error))


def _unary(
    method: Callable[[Server, Request, Any], Awaitable[Reply]],
) -> Callable[[Server, Request, Any], Awaitable[Reply | None]]:
    """KVFabricError -> status and message. Anything else is a bug, and gRPC logs it and says UNKNOWN."""

    @functools.wraps(method)
    async def answer(self: Server, request: Request, context: Any) -> Reply | None:
        try:
            return await method(self, request, context)
        except KVFabricError as exc:
            await _abort(context, exc)
            return None

    return answer


def _stream(
    method: Callable[[Server, Request, Any], AsyncIterator[Reply]],
) -> Callable[[Server, Request, Any], AsyncIterator[Reply]]:
    @functools.wraps(method)
    async def answers(self: Server, request: Request, context: Any) -> AsyncIterator[Reply]:
        try:
            async for reply in method(self, request, context):
                yield reply
        except KVFabricError as exc:
            await _abort(context, exc)

    return answers


def _requested_by(context: Any) -> str:
    """What the caller says; over TLS, who its certificate says it is before that."""
    identity = identity_in(context)
    if identity is not None:
        return f"{identity} ({_claimed(context)})"
    return _claimed(context)


def _claimed(context: Any) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUESTED_BY:
            return str(value)[:200]
    return ""


# ---------------------------------------------------------------------- services


class _NodeEvents(pb_grpc.NodeEventsServicer):
    def __init__(self, sources: AdminSources, node_id: str) -> None:
        self._sources = sources
        self._node_id = node_id

    @_unary
    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.NodeDescription:
        events = self._sources.events
        return pb.NodeDescription(
            node_id=self._node_id,
            boot_id=events.boot_id,
            version=__version__,
            sequence=events.sequence,
            engines=events.engines,
            clock=time.time(),
        )

    @_unary
    async def FindLookup(self, request: pb.FindLookupRequest, context: Any) -> pb.Lookup:
        found = self._sources.lookups.find(request.request_id, TenantId(request.tenant_id))
        if found is None:
            return pb.Lookup()
        return pb.Lookup(
            known=True,
            num_asked=found.num_asked,
            num_host=found.num_host,
            num_ssd=found.num_ssd,
            reason=found.reason.value,
        )

    @_stream
    async def Watch(
        self, request: pb.WatchEventsRequest, context: Any
    ) -> AsyncIterator[pb.EventBatch]:
        events = self._sources.events
        async for batch in events.subscribe(request.boot_id, request.from_sequence):
            yield batch

    @_stream
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


class _RegistryService(pb_grpc.RegistryServiceServicer):
    def __init__(
        self,
        sources: AdminSources,
        holders: Holders,
        node_id: str,
        clock: Callable[[], float],
    ) -> None:
        self._registry = sources.registry
        self._sources = sources
        self._holders = holders
        self._node_id = node_id
        self._clock = clock
        self._heard = asyncio.Event()
        self._keyring_lock = asyncio.Lock()

    @_stream
    async def Watch(
        self, request: pb.WatchRegistryRequest, context: Any
    ) -> AsyncIterator[pb.RegistryState]:
        state = self._registry.state
        while True:
            yield state_to_pb(state)
            state = await self._registry.wait_newer(state.version)

    @_unary
    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Any) -> pb.EpochLease:
        if not 0 < len(request.holder_id) <= 200:
            raise ConfigError("a holder has an id of 1 to 200 characters")
        if self._registry.tracks_holders:
            raise Conflict(
                "this node's registry is a directory: give the router the same --directory"
            )
        state = self._registry.state
        ttl_s = self._holders.renew(
            request.holder_id, request.holder_kind, request.applied_version, state.version
        )
        heard, self._heard = self._heard, asyncio.Event()
        heard.set()
        return pb.EpochLease(registry_id=state.registry_id, ttl_s=ttl_s, version=state.version)

    @_unary
    async def CreateTenant(self, request: pb.CreateTenantRequest, context: Any) -> pb.TenantCreated:
        host, ssd = quota_from_pb(request.host), quota_from_pb(request.ssd)
        self._check_floors("", host, ssd)
        # The secret is durable before the tenant is: a tenant without one could never be served.
        tenant_id = mint_tenant_id()
        async with self._keyring_lock:
            await asyncio.to_thread(self._sources.keyring.add_tenant, tenant_id)
        tenant, api_key = await self._registry.create_tenant(
            request.name,
            host,
            ssd,
            limits=limits_from_pb(request.limits),
            tenant_id=tenant_id,
            requested_by=_requested_by(context),
        )
        return pb.TenantCreated(tenant=tenant_to_pb(tenant), api_key=api_key)

    @_unary
    async def SetTenant(self, request: pb.SetTenantRequest, context: Any) -> pb.Tenant:
        change = TenantChange(
            host=quota_from_pb(request.host) if request.HasField("host") else None,
            ssd=quota_from_pb(request.ssd) if request.HasField("ssd") else None,
            max_age_s=request.max_age_s if request.HasField("max_age_s") else None,
            opted_out=request.opted_out if request.HasField("opted_out") else None,
            limits=limits_from_pb(request.limits) if request.HasField("limits") else None,
        )
        self._check_floors(request.name, change.host, change.ssd)
        tenant = await self._registry.set_tenant(
            request.name, change, requested_by=_requested_by(context)
        )
        return tenant_to_pb(tenant)

    @_unary
    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: Any) -> pb.ApiKeyCreated:
        api_key = await self._registry.create_api_key(
            request.name, requested_by=_requested_by(context)
        )
        return pb.ApiKeyCreated(api_key=api_key)

    @_unary
    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, context: Any) -> pb.Tenant:
        """Answers when no router takes the key any more."""
        tenant, change = await self._registry.revoke_api_key(
            request.name, request.api_key_prefix, requested_by=_requested_by(context)
        )
        await self._reached(change.version)
        return tenant_to_pb(tenant)

    @_unary
    async def RotateApiKey(self, request: pb.RotateApiKeyRequest, context: Any) -> pb.ApiKeyCreated:
        """Answers when every router takes the fresh key, and without grace none takes an old one."""
        api_key, change = await self._registry.rotate_api_keys(
            request.name, grace_s=request.grace_s, requested_by=_requested_by(context)
        )
        await self._reached(change.version)
        return pb.ApiKeyCreated(api_key=api_key)

    @_unary
    async def OffboardTenant(
        self, request: pb.OffboardTenantRequest, context: Any
    ) -> pb.OffboardReceipt:
        """Keys end everywhere, then secrets and blocks here. Other nodes destroy theirs when they hear of
        it, those that are away at their next start. Asked again, it is done again."""
        if self._sources.destroy is None:
            raise NotFound("this node has no tiers and no keyring to destroy a tenant in")
        started, requested_at = self._clock(), time.time()
        who = _requested_by(context)
        tenant, change = await self._registry.offboard_tenant(request.name, requested_by=who)
        receipt = await self._receipt(change, who, started, requested_at, for_good=False)
        gone = await self._sources.destroy(tenant.tenant_id)
        return pb.OffboardReceipt(
            tenant_id=tenant.tenant_id,
            receipt=receipt,
            destroyed_at=time.time(),
            **gone._asdict(),
        )

    @_unary
    async def RegisterTemplate(
        self, request: pb.RegisterTemplateRequest, context: Any
    ) -> pb.Template:
        template = await self._registry.register_template(
            request.name,
            request.version,
            request.text,
            is_public=request.is_public,
            requested_by=_requested_by(context),
        )
        return template_to_pb(template)

    @_unary
    async def PromoteTemplate(self, request: pb.PromoteTemplateRequest, context: Any) -> pb.Receipt:
        started, requested_at = self._clock(), time.time()
        who = _requested_by(context)
        change = await self._registry.promote_template(
            request.name, request.version, requested_by=who
        )
        return await self._receipt(change, who, started, requested_at, for_good=False)

    @_unary
    async def GetReceipt(self, request: pb.GetReceiptRequest, context: Any) -> pb.Receipt:
        wait_s = min(max(0.0, request.wait_s), MAX_RECEIPT_WAIT_S)
        receipt = await self._receipt_of(request.receipt_id, {}, lambda r: r.is_final, wait_s)
        if receipt is None:
            raise NotFound(
                f"there is no receipt {request.receipt_id!r}: its id is SCOPE@EPOCH, as it was printed"
            )
        return receipt

    @_unary
    async def Invalidate(self, request: pb.InvalidateRequest, context: Any) -> pb.Receipt:
        started, requested_at = self._clock(), time.time()
        who = _requested_by(context)
        name = request.name
        if request.scope == "model":
            name = model_revision_of(self._registry.state, self._sources.events.engines, name)
        change = await self._registry.invalidate(
            request.scope, name, request.version, purge=request.purge, requested_by=who
        )
        for_good = request.purge or request.scope != "template"
        wait_s = (
            min(max(0.0, request.wait_s), MAX_RECEIPT_WAIT_S)
            if request.HasField("wait_s")
            else None
        )
        return await self._receipt(
            change, who, started, requested_at, for_good=for_good, wait_s=wait_s
        )

    async def _receipt(
        self,
        change: Change,
        who: str,
        started: float,
        requested_at: float,
        *,
        for_good: bool,
        wait_s: float | None = None,
    ) -> pb.Receipt:
        """What happened and when it counted; and, as far as they say so within a moment, what became of the
        bytes on each node. `GetReceipt` tells the rest."""
        acks = await self._reached(change.version)
        row = ChangeRow(
            action=change.action,
            scope=change.scope,
            old_epoch=change.old_epoch,
            new_epoch=change.new_epoch,
            requested_by=who,
            requested_at=requested_at,
            unreachable_at=requested_at + max(ack.at for ack in acks) - started,
            acknowledgements=tuple(
                AckRow(ack.holder_id, ack.kind, ack.at - started, ack.waited_out) for ack in acks
            ),
            audit_head=change.audit_head,
            for_good=for_good,
        )
        name = receipt_id(change.scope, change.new_epoch)
        made = {MADE: msgspec.msgpack.encode(row)}
        with contextlib.suppress(KVFabricError):  # the change stands, and is told of
            await self._registry.put_receipt_row(name, MADE, made[MADE])
        if not self._sources.reports:
            wait_s = 0.0
        elif wait_s is None:
            wait_s = _DESTROY_S if for_good else _REPORT_S
        lost = {ack.holder_id for ack in acks if ack.waited_out}

        def is_enough(receipt: pb.Receipt) -> bool:
            heard = set(receipt.not_heard_from) <= lost
            return heard and (not for_good or all(node.destroyed_at for node in receipt.nodes))

        receipt = await self._receipt_of(name, made, is_enough, wait_s)
        assert receipt is not None
        return receipt

    async def _receipt_of(
        self,
        name: str,
        made: Mapping[str, bytes],
        is_enough: Callable[[pb.Receipt], bool],
        wait_s: float,
    ) -> pb.Receipt | None:
        """As it is once it is enough, or after `wait_s`. `made`: rows known without the registry."""
        ends = self._clock() + wait_s
        while True:
            rows: Mapping[str, bytes] = {}
            try:
                rows = await self._registry.receipt_rows(name)
            except KVFabricError:
                if not made:
                    raise
            receipt = assemble(name, {**made, **rows})
            if receipt is None or is_enough(receipt) or self._clock() >= ends:
                return receipt
            await asyncio.sleep(_ROWS_POLL_S)

    async def _reached(self, version: int) -> list[Ack]:
        """Wait until every holder of a lease has applied `version` or was waited out."""
        if self._registry.tracks_holders:
            return await self._registry.reached(version)
        # The node itself acts on the registry's own state, from the moment it was published.
        own = Ack(self._node_id, "node", self._clock())
        current = self._holders.begin(version)
        try:
            while (wait_s := self._holders.wait_s(current)) is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._heard.wait()
            return [own, *current.acks]
        finally:
            self._holders.end(current)

    def _check_floors(self, name: str, host: TierQuota | None, ssd: TierQuota | None) -> None:
        """Floors sum to at most 90 % of a tier (design 7). Raises ConfigError."""
        state = self._registry.state
        own = tenant_named(state, name).tenant_id if name else None
        others = [tenant for tenant in state.tenants.values() if tenant.tenant_id != own]
        capacities = {tier.tier: tier.capacity_bytes for tier in self._sources.status(False).tiers}
        for tier, quota in ((TierName.HOST, host), (TierName.SSD, ssd)):
            if quota is None or not quota.floor_bytes or tier not in capacities:
                continue
            of_others = sum(getattr(tenant, tier).floor_bytes for tenant in others)
            room = int(MAX_FLOOR_SHARE * capacities[tier]) - of_others
            if quota.floor_bytes > room:
                raise ConfigError(
                    f"a {tier} floor of {quota.floor_bytes} bytes is too much: all floors together "
                    f"may be 90 % of the tier, which leaves {max(0, room)}"
                )


class _NodeAdmin(pb_grpc.NodeAdminServicer):
    def __init__(self, sources: AdminSources, node_id: str, clock: Callable[[], float]) -> None:
        self._sources = sources
        self._node_id = node_id
        self._clock = clock
        self._started = clock()

    @_unary
    async def Scrub(self, request: pb.ScrubRequest, context: Any) -> pb.ScrubReport:
        if self._sources.scrub is None:
            raise NotFound("this node has no tiers to verify")
        return pb.ScrubReport(**(await self._sources.scrub())._asdict())

    @_unary
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


def model_revision_of(state: RegistryState, engines: list[pb.Engine], name: str) -> str:
    """The revision that an administrator means: itself, or the name under which engines serve it.

    Raises NotFound for what is neither: an invalidation that hits nothing must not look like one.
    """
    served = {engine.model_revision for engine in engines if engine.model == name}
    if len(served) > 1:
        raise ConfigError(
            f"engines serve {name!r} in {len(served)} revisions, name one: {', '.join(sorted(served))}"
        )
    if served:
        return served.pop()
    known = any(engine.model_revision == name for engine in engines)
    if known or model_scope(name) in state.epochs or _DIGEST.fullmatch(name):
        return name
    raise NotFound(
        f"no engine here serves a model {name!r}: name its revision (`kvfabric status` shows them)"
    )
