from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvfabric.daemon.admin import AdminServer
from kvfabric.daemon.admin_client import REQUESTED_BY
from kvfabric.daemon.admin_sources import AdminSources, Runs
from kvfabric.daemon.fleet_models import FleetModels, check_adapter, model_revision_of
from kvfabric.errors import ConfigError, ConnectError, CorruptBlock, NotFound, RemoteProtocolError
from kvfabric.events.index import FleetIndex, Holder, NodeFeed
from kvfabric.events.stream import EventStream
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.protocol.messages import BlockRun, EngineEvents
from kvfabric.registry.embedded import EmbeddedRegistry
from kvfabric.registry.holders import Holders, Round
from kvfabric.registry.state import SERVING, RegistryState
from kvfabric.registry.wire import state_from_pb
from kvfabric.store.turns import Turns
from kvfabric.types import BlockKey, TierName, template_scope

TAG, SESSION = b"tag-0001", b"s" * 16
ENGINE = pb.Engine(session=SESSION, engine_id="e1", model="llama", model_revision="rev-1")
MODEL = pb.Model(name="llama", revision="rev-1", adapter="lora")
KEYS = [BlockKey(bytes([i]) * 32) for i in range(1, 5)]
PREFIXES = b"".join(key[:8] for key in KEYS)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Plane:
    """A real admin server, real registry and keyring, and a channel to it."""

    server: AdminServer
    registry: EmbeddedRegistry
    events: EventStream
    keyring: Keyring
    clock: Clock
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return pb_grpc.RegistryServiceStub(self.channel)  # type: ignore[no-untyped-call]

    @property
    def node_events(self) -> Any:
        return pb_grpc.NodeEventsStub(self.channel)  # type: ignore[no-untyped-call]

    @property
    def admin(self) -> Any:
        return pb_grpc.NodeAdminStub(self.channel)  # type: ignore[no-untyped-call]


def node_status(sealed_keys: bool) -> pb.NodeStatus:
    return pb.NodeStatus(
        tiers=[pb.TierStatus(tier="host", state="serving", capacity_bytes=1000)],
        usage=[pb.TenantUsage(tenant_id="default", host_bytes=7)],
        sealed_keys=[bytes(32)] if sealed_keys else [],
    )


def whole_host(tier: TierName) -> Runs:
    assert tier is TierName.HOST
    yield [(TAG, b"", PREFIXES[:16])]
    yield [(TAG, PREFIXES[8:16], PREFIXES[16:])]


@asynccontextmanager
async def plane(
    tmp_path: Path,
    *,
    resident: Callable[[TierName], Runs] = whole_host,
    holders: Callable[[Clock], Holders] | None = None,
    settled: bool = True,
) -> AsyncIterator[Plane]:
    clock = Clock()
    events = EventStream(boot_id=b"b" * 16)
    keyring = Keyring.create_or_open(tmp_path)
    async with EmbeddedRegistry(tmp_path / "registry") as registry:
        models = FleetModels(lambda: [MODEL])
        sources = AdminSources(
            registry, keyring, events, node_status, resident, Turns().wait, models
        )
        path = tmp_path / "admin.sock"
        server = AdminServer(path, sources, node_id="n1", epoch_lease_s=2.0, clock=clock)
        if holders is not None:
            server.holders = holders(clock)
        if settled:
            clock.now += 10  # leases of a previous life would be over
        async with server, grpc.aio.insecure_channel(f"unix:{path}") as channel:
            yield Plane(server, registry, events, keyring, clock, channel)


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


# ---------------------------------------------------------------------- the socket


async def test_socket_is_private_and_gone_after_the_stop(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        mode = p.server.path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        stub = health_pb2_grpc.HealthStub(p.channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service="kvfabric.v1.NodeAdmin"))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert not p.server.path.exists()


async def test_a_socket_that_another_node_serves_is_not_taken_over(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        sources = p.server._sources
        second = AdminServer(p.server.path, sources, node_id="n2", epoch_lease_s=2.0, clock=p.clock)
        with pytest.raises(ConfigError, match="another process serves"):
            async with second:
                pass
        assert (await p.admin.Status(pb.StatusRequest())).node_id == "n1"


async def test_a_socket_left_by_a_crash_is_replaced_and_a_long_path_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "admin.sock"))
    async with plane(tmp_path) as p:
        assert (await p.admin.Status(pb.StatusRequest())).node_id == "n1"
    long = tmp_path / ("x" * 100)
    server = AdminServer(long, p.server._sources, node_id="n", epoch_lease_s=2.0, clock=p.clock)
    with pytest.raises(ConfigError, match="107 bytes"):
        async with server:
            pass


async def test_too_long_a_message_is_refused(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        request = pb.RegisterTemplateRequest(name="t", version="1", text=b"x" * (2 << 20))
        code, _ = await refused(p.stub.RegisterTemplate(request))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


# ---------------------------------------------------------------------- errors


async def test_errors_have_a_status_and_say_what_to_do(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        stub, status = p.stub, grpc.StatusCode
        await stub.CreateTenant(pb.CreateTenantRequest(name="acme"))
        for call, code, text in (
            (stub.CreateTenant(pb.CreateTenantRequest(name="acme")), "FAILED_PRECONDITION", "acme"),
            (stub.CreateTenant(pb.CreateTenantRequest(name="")), "INVALID_ARGUMENT", "letters"),
            (stub.SetTenant(pb.SetTenantRequest(name="x")), "NOT_FOUND", "tenant list"),
            (
                stub.PromoteTemplate(pb.PromoteTemplateRequest(name="t", version="1")),
                "NOT_FOUND",
                "template list",
            ),
            (
                stub.Invalidate(pb.InvalidateRequest(scope="galaxy", name="x")),
                "INVALID_ARGUMENT",
                "no scope",
            ),
            (
                stub.Invalidate(pb.InvalidateRequest(scope="model", name="lama")),
                "NOT_FOUND",
                "revision",
            ),
            (stub.RenewLease(pb.RenewLeaseRequest()), "INVALID_ARGUMENT", "id"),
        ):
            found, details = await refused(call)
            assert (found, text in details) == (status[code], True), details


async def test_floors_sum_to_at_most_nine_tenths_of_a_tier(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:

        def create(name: str, floor: int) -> Any:
            host = pb.TierQuota(floor_bytes=floor)
            return p.stub.CreateTenant(pb.CreateTenantRequest(name=name, host=host))

        await create("a", 500)
        code, details = await refused(create("b", 401))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "leaves 400" in details
        await create("b", 400)
        change = pb.SetTenantRequest(name="a", host=pb.TierQuota(floor_bytes=500))
        await p.stub.SetTenant(change)


def test_a_model_is_named_by_its_revision_or_by_what_engines_serve() -> None:
    state, models = RegistryState(), [MODEL]
    assert model_revision_of(state, models, "llama") == "rev-1"
    assert model_revision_of(state, models, "rev-1") == "rev-1"
    digest = "0123456789abcdef"
    assert model_revision_of(state, [], digest) == digest
    with pytest.raises(NotFound, match=r"there are llama; not asked.*: n3"):
        model_revision_of(state, models, "llma", ["n3"])
    other = pb.Model(name="llama", revision="rev-2")
    with pytest.raises(ConfigError, match="rev-1, rev-2"):
        model_revision_of(state, [MODEL, other], "llama")
    # Who does not answer may have another one of that name; a revision is one whoever answers.
    with pytest.raises(ConnectError, match="rev-1, as far as nodes answer; n3"):
        model_revision_of(state, models, "llama", ["n3"])
    assert model_revision_of(state, models, "rev-1", ["n3"]) == "rev-1"
    check_adapter(state, models, "lora")
    with pytest.raises(NotFound, match="there are lora"):
        check_adapter(state, models, "laura")


# ---------------------------------------------------------------------- tenants and templates


async def test_tenant_gets_its_secret_before_it_is_known(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        created = await p.stub.CreateTenant(pb.CreateTenantRequest(name="acme"))
        assert created.api_key.startswith("kvf-")
        secret = p.keyring.tenant_secret(created.tenant.tenant_id)
        assert len(secret) == 32
        assert Keyring.open(tmp_path).tenant_secret(created.tenant.tenant_id) == secret
        change = pb.SetTenantRequest(name="acme", opted_out=True, max_age_s=5.0)
        tenant = await p.stub.SetTenant(change)
        assert (tenant.opted_out, tenant.max_age_s) == (True, 5.0)
        key = await p.stub.CreateApiKey(pb.CreateApiKeyRequest(name="acme"))
        assert key.api_key != created.api_key
        prefix = created.tenant.api_key_digests[0].hex()[:8]
        left = await p.stub.RevokeApiKey(pb.RevokeApiKeyRequest(name="acme", api_key_prefix=prefix))
        assert len(left.api_key_digests) == 1


async def test_registry_watch_pushes_each_change(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        watch = aiter(p.stub.Watch(pb.WatchRegistryRequest(holder_id="r1", holder_kind="router")))
        first = state_from_pb(await anext(watch))
        assert first == p.registry.state
        request = pb.RegisterTemplateRequest(name="t", version="1", text=b"hello")
        template = await p.stub.RegisterTemplate(request)
        assert template.state == SERVING
        second = state_from_pb(await anext(watch))
        assert second == p.registry.state
        assert second.templates["t", "1"].incarnation == template.incarnation


# ---------------------------------------------------------------------- epoch leases and receipts


class Router:
    """A holder of an epoch lease, by the rules of a router; it applies pushed states when told to."""

    def __init__(self, p: Plane, name: str = "r1") -> None:
        self._plane = p
        self._name = name
        self._lease_ends = 0.0
        self._newest = 0
        self.state = RegistryState()

    def apply(self) -> None:
        self.state = self._plane.registry.state

    async def renew(self) -> None:
        sent_at = self._plane.clock.now
        lease = await self._plane.stub.RenewLease(
            pb.RenewLeaseRequest(
                holder_id=self._name, holder_kind="router", applied_version=self.state.version
            )
        )
        self._lease_ends = max(self._lease_ends, sent_at + lease.ttl_s)
        self._newest = max(self._newest, lease.version)

    def serves(self, name: str, version: str) -> bool:
        """Whether it would dispatch a request with this template version now."""
        template = self.state.templates.get((name, version))
        leased = self._plane.clock.now < self._lease_ends and self.state.version >= self._newest
        return leased and template is not None and template.state == SERVING


async def serving_router(p: Plane) -> Router:
    request = pb.RegisterTemplateRequest(name="t", version="1", text=b"hello")
    await p.stub.RegisterTemplate(request)
    router = Router(p)
    router.apply()
    await router.renew()
    assert router.serves("t", "1")
    return router


def retire(p: Plane) -> Any:
    request = pb.InvalidateRequest(scope="template", name="t", version="1")
    return p.stub.Invalidate(request, metadata=((REQUESTED_BY, "alice@here"),))


async def until_waiting(p: Plane) -> None:
    """Until an invalidation is made and waits for holders."""
    async with asyncio.timeout(5):
        while not p.server.holders._rounds:  # noqa: ASYNC110 - only the server sees it begin
            await asyncio.sleep(0.001)


async def serves_after_receipt(p: Plane) -> bool:
    """A router that is slow to apply what was pushed: does it serve the version after the receipt?"""
    router = await serving_router(p)
    async with asyncio.TaskGroup() as group:

        async def wake_up() -> None:
            await until_waiting(p)
            for _ in range(3):
                await router.renew()  # alive, but behind
                await asyncio.sleep(0.01)
            router.apply()
            await router.renew()

        invalidation = retire(p)
        slow = group.create_task(wake_up())
        await invalidation
        still = router.serves("t", "1")
        await slow
    return still


async def test_receipt_comes_after_the_slow_router_applied_the_change(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        assert not await serves_after_receipt(p)


class NobodyAsked(Holders):
    """The guard removed: no holder is waited for."""

    def begin(self, version: int) -> Round:
        started = super().begin(version)
        started.pending.clear()
        return started


async def serves_after_receipt_without_news(p: Plane) -> bool:
    """The same with a router that is stopped (SIGSTOP, a long collection) until the receipt is there."""
    router = await serving_router(p)
    async with asyncio.TaskGroup() as group:

        async def time_passes() -> None:
            await until_waiting(p)
            p.clock.now += 2.4
            await Router(p, "other").renew()
            p.clock.now += 0.2
            await Router(p, "other").renew()

        invalidation = retire(p)
        passing = group.create_task(time_passes())
        await invalidation
        still = router.serves("t", "1")
        await passing
    return still


async def test_receipt_comes_after_a_silent_routers_lease_is_over(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        assert not await serves_after_receipt_without_news(p)


async def test_without_waiting_a_stale_router_serves_after_the_receipt(tmp_path: Path) -> None:
    def nobody(clock: Clock) -> Holders:
        return NobodyAsked(ttl_s=2.0, clock=clock)

    async with plane(tmp_path, holders=nobody) as p:
        router = await serving_router(p)
        await retire(p)
        assert router.serves("t", "1")


async def test_receipt_says_who_what_when(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        await serving_router(p)
        async with asyncio.TaskGroup() as group:

            async def router_dies() -> None:
                await until_waiting(p)
                quick = Router(p, "r2")
                p.clock.now += 1.0
                quick.apply()
                await quick.renew()
                p.clock.now += 1.5
                await quick.renew()

            invalidation = retire(p)
            dying = group.create_task(router_dies())
            receipt = await invalidation
            await dying
        assert (receipt.action, receipt.scope) == ("retire_template", template_scope("t"))
        assert (receipt.old_epoch, receipt.new_epoch) == (1, 2)
        assert receipt.requested_by == "alice@here"
        acks = {ack.holder_id: ack for ack in receipt.acknowledgements}
        assert set(acks) == {"n1", "r1"}
        assert (acks["n1"].holder_kind, acks["n1"].waited_out) == ("node", False)
        assert (acks["r1"].holder_kind, acks["r1"].waited_out) == ("router", True)
        assert receipt.unreachable_at - receipt.requested_at == pytest.approx(2.5, abs=1e-3)
        assert receipt.bytes_unreachable == 0
        log = await p.registry.audit_log()
        assert (log[-1].who, log[-1].action) == ("alice@here", "retire_template")
        assert receipt.audit_head == p.registry._head


async def test_after_a_restart_leases_of_the_life_before_are_waited_out(tmp_path: Path) -> None:
    async with plane(tmp_path, settled=False) as p:
        request = pb.RegisterTemplateRequest(name="t", version="1", text=b"hello")
        await p.stub.RegisterTemplate(request)
        async with asyncio.TaskGroup() as group:

            async def time_passes() -> None:
                await until_waiting(p)
                p.clock.now += 2.5
                await Router(p, "new").renew()

            invalidation = retire(p)
            passing = group.create_task(time_passes())
            receipt = await invalidation
            await passing
        assert p.clock.now == pytest.approx(1002.5)
        assert any(ack.waited_out for ack in receipt.acknowledgements)


async def test_promote_rolls_back_with_a_receipt_and_purged_never_returns(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        request = pb.RegisterTemplateRequest(name="t", version="1", text=b"hello")
        await p.stub.RegisterTemplate(request)
        await retire(p)
        promote = pb.PromoteTemplateRequest(name="t", version="1")
        receipt = await p.stub.PromoteTemplate(promote)
        assert (receipt.action, receipt.new_epoch) == ("promote_template", 3)
        await p.stub.Invalidate(pb.InvalidateRequest(scope="template", name="t", purge=True))
        code, details = await refused(p.stub.PromoteTemplate(promote))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "never serves again" in details


async def test_a_change_stands_when_its_caller_goes_away(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        await serving_router(p)
        call = retire(p)
        async with asyncio.TaskGroup() as group:
            group.create_task(until_waiting(p))
        call.cancel()
        assert p.registry.state.epoch(template_scope("t")) == 2


async def test_a_restored_old_registry_grants_no_lease(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        request = pb.RenewLeaseRequest(holder_id="r1", holder_kind="router", applied_version=99)
        code, details = await refused(p.stub.RenewLease(request))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "old copy" in details


# ---------------------------------------------------------------------- events and snapshots


HOST, HBM = Holder("n1", TierName.HOST), Holder("n1", TierName.HBM, SESSION)


async def follow(p: Plane, feed: NodeFeed) -> Any:
    """Open Watch and take the first batch; returns the stream."""
    boot_id, sequence = feed.position
    watch = aiter(
        p.node_events.Watch(pb.WatchEventsRequest(boot_id=boot_id, from_sequence=sequence))
    )
    feed.watch(await anext(watch))
    return watch


async def test_a_router_mirrors_the_node_by_watch_and_snapshot(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        index = FleetIndex(capacity=64)
        feed = NodeFeed(index, "n1")
        p.events.engine_joined(ENGINE)
        hbm = EngineEvents((BlockRun(TAG, b"", PREFIXES[:8]),), (), False)
        p.events.engine_events(SESSION, hbm)
        watch = await follow(p, feed)
        assert feed.needs_snapshot
        feed.snapshot([b async for b in p.node_events.Snapshot(pb.SnapshotRequest())])
        found = index.match(TAG, KEYS)
        assert found[HOST].tolist() == [True] * 4
        assert found[HBM].tolist() == [True, False, False, False]
        assert feed.engines[SESSION].engine_id == "e1"
        p.events.removed(TierName.HOST, TAG, PREFIXES[8:16])
        while index.match(TAG, KEYS)[HOST].all():
            assert feed.watch(await anext(watch))
        assert index.match(TAG, KEYS)[HOST].tolist() == [True, False, True, True]
        description = await p.node_events.Describe(pb.DescribeRequest())
        assert description.node_id == "n1"
        assert description.sequence == p.events.sequence
        assert [engine.engine_id for engine in description.engines] == ["e1"]


def breaks_off(tier: TierName) -> Iterator[list[tuple[bytes, bytes, bytes]]]:
    yield [(TAG, b"", PREFIXES[:8])]
    raise CorruptBlock("the index broke")


async def received(p: Plane) -> list[pb.EventBatch]:
    """What a reader has of a snapshot when it ends, in whatever way."""
    batches: list[pb.EventBatch] = []

    async def read() -> None:
        async for batch in p.node_events.Snapshot(pb.SnapshotRequest()):
            batches.append(batch)  # noqa: PERF401 - kept when the stream raises

    assert (await refused(read()))[1] == "the index broke"
    return batches


async def filled_feed(p: Plane) -> tuple[FleetIndex, NodeFeed]:
    """A reader that knew the whole node, and then met a gap."""
    index = FleetIndex(capacity=64)
    feed = NodeFeed(index, "n1")
    gap = pb.EventBatch(boot_id=p.events.boot_id, gap=True)
    feed.watch(gap)
    stored = pb.Run(kind=pb.STORED, tier=pb.HOST, namespace_tag=TAG, keys=PREFIXES)
    end = p.events.snapshot_batch([], end=True)
    feed.snapshot([p.events.snapshot_batch([stored]), end])
    feed.watch(gap)
    return index, feed


async def test_a_snapshot_that_fails_midway_is_not_taken_for_what_it_showed(tmp_path: Path) -> None:
    async with plane(tmp_path, resident=breaks_off) as p:
        index, feed = await filled_feed(p)
        batches = await received(p)
        assert len(batches) == 2
        with pytest.raises(RemoteProtocolError):
            feed.snapshot(batches)
        assert index.match(TAG, KEYS)[HOST].all()


async def test_without_its_end_mark_a_broken_snapshot_would_pass_for_a_whole_one(
    tmp_path: Path,
) -> None:
    async with plane(tmp_path, resident=breaks_off) as p:
        index, feed = await filled_feed(p)
        batches = await received(p)
        feed.snapshot([*batches, p.events.snapshot_batch([], end=True)])
        assert not index.match(TAG, KEYS)[HOST].all()


# ---------------------------------------------------------------------- status


async def test_status_names_node_tiers_engines_and_registry(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        p.events.engine_joined(ENGINE)
        p.clock.now += 5
        status = await p.admin.Status(pb.StatusRequest())
        assert (status.node_id, status.registry_version) == ("n1", 1)
        assert status.boot_id == p.events.boot_id
        assert status.uptime_s == pytest.approx(5)
        assert [tier.tier for tier in status.tiers] == ["host"]
        assert [engine.model for engine in status.engines] == ["llama"]
        assert not status.sealed_keys
        assert len((await p.admin.Status(pb.StatusRequest(sealed_keys=True))).sealed_keys) == 1


async def test_stop_ends_open_watches(tmp_path: Path) -> None:
    async with plane(tmp_path) as p:
        watch = await follow(p, NodeFeed(FleetIndex(capacity=64), "n1"))
        p.events.stored(TierName.HOST, TAG, b"", PREFIXES)
        p.events.close()
        assert [batch.sequence async for batch in watch] == [1]
